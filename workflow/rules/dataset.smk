"""Facts to prompts.

INPUT   <folder>/<relation>.yaml               the fact files of the data set
OUTPUT  results/{dataset}/dataset.parquet      one row per fact and template (facts.prompt_table)
"""


rule dataset:
    input:
        expand("results/{dataset}/dataset.parquet", dataset=DATASETS),


rule write_dataset:
    """Check the fact files and fill their templates."""
    input:
        facts=lambda wildcards: fact_files(DATASETS[wildcards.dataset]),
    output:
        table="results/{dataset}/dataset.parquet",
    log:
        "results/logs/write_dataset/{dataset}.log",
    benchmark:
        "results/logs/write_dataset/{dataset}.benchmark.tsv"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=10,
    params:
        code=code("write_dataset.py"),
        settings=settings("tasks"),
    script:
        "../../scripts/write_dataset.py"

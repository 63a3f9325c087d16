"""Facts to prompts.

INPUT   <path>/<relation>.yaml                 the fact files of the data set, or the files of a public one
OUTPUT  results/{dataset}/dataset.parquet      one row per fact and template (facts.prompt_table)
        results/{dataset}/reading.json         what was mended in reading, counted
        results/{dataset}/source.json          of a hub data set: its commit; the files lie beside it in source/
"""


rule dataset:
    input:
        expand("results/{dataset}/dataset.parquet", dataset=DATASETS),


rule fetch_dataset:
    """Fetch the files of a data set of the hub, once."""
    output:
        source="results/{dataset}/source.json",
    log:
        "results/logs/fetch_dataset/{dataset}.log",
    benchmark:
        "results/logs/fetch_dataset/{dataset}.benchmark.tsv"
    wildcard_constraints:
        dataset=one_of([name for name, data in DATA.items() if "hub" in data]),
    localrule: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=minutes(60),
    params:
        code=code("fetch_dataset.py"),
        settings=settings(of_dataset=["hub", "revision", "files"]),
    script:
        "../../scripts/fetch_dataset.py"


rule write_dataset:
    """Check the facts and fill their templates."""
    input:
        facts=lambda wildcards: source_files(
            DATASETS[wildcards.dataset], Path(f"results/{wildcards.dataset}/source.json")
        ),
    output:
        table="results/{dataset}/dataset.parquet",
        reading="results/{dataset}/reading.json",
    log:
        "results/logs/write_dataset/{dataset}.log",
    benchmark:
        "results/logs/write_dataset/{dataset}.benchmark.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=minutes(10),
    params:
        code=code("write_dataset.py"),
        settings=settings("tasks", of_dataset=["format", "path", "columns", "wanted"]),
    script:
        "../../scripts/write_dataset.py"

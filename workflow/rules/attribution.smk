"""Who wrote the answer: log-probability increase of layers, heads and experts.

INPUT   results/{dataset}/{model}/prompts.parquet and activations/, results/models/{model}/ (weights only)
OUTPUT  results/{dataset}/{model}/attribution/{layers,heads,experts,margins}.parquet   (attribution.attribute)
"""


rule attribution:
    input:
        expand(
            "results/{dataset}/{model}/attribution/{level}.parquet",
            dataset=DATASETS,
            model=MODELS,
            level=["layers", "heads", "experts", "margins"],
        ),


rule attribute:
    """Attribute the targets from the cache alone; only a few tokens run forward, to find the parts."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        model=model_files,
    output:
        layers="results/{dataset}/{model}/attribution/layers.parquet",
        heads="results/{dataset}/{model}/attribution/heads.parquet",
        experts="results/{dataset}/{model}/attribution/experts.parquet",
        margins="results/{dataset}/{model}/attribution/margins.parquet",
    log:
        "results/logs/attribute/{dataset}/{model}.log",
    benchmark:
        "results/logs/attribute/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=model_memory,
        runtime=60,
    params:
        code=code("attribute.py"),
        settings=settings("lens", load=["dtype", "trust_remote_code"]),
    script:
        "../../scripts/attribute.py"

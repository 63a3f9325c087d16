"""What breaks: experts blocked, and experts kept alone (Mixture-of-Experts models only).

INPUT   results/{dataset}/{model}/prompts.parquet, activations/, attribution/experts.parquet, results/models/{model}/
OUTPUT  results/{dataset}/{model}/interventions/blocking.parquet           (ablations.measure_blocking)
        results/{dataset}/{model}/interventions/blocked_experts.parquet    (ablations.choose_sets)
        results/{dataset}/{model}/interventions/keep_only.parquet          (ablations.measure_keep_only)
"""


rule interventions:
    input:
        expand(
            "results/{dataset}/{model}/interventions/{experiment}.parquet",
            dataset=DATASETS,
            model=MOE,
            experiment=["blocking", "blocked_experts", "keep_only"],
        ),


rule block_experts:
    """Block a relation's best experts, chosen on one half of its subjects and measured on the other."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        experts="results/{dataset}/{model}/attribution/experts.parquet",
        model=model_files,
    output:
        blocking="results/{dataset}/{model}/interventions/blocking.parquet",
        blocked_experts="results/{dataset}/{model}/interventions/blocked_experts.parquet",
    log:
        "results/logs/block_experts/{dataset}/{model}.log",
    benchmark:
        "results/logs/block_experts/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=model_memory,
        runtime=60,
    params:
        code=code("block_experts.py"),
        settings=settings("seed", "batch_size", "blocking", load=LOADING),
    script:
        "../../scripts/block_experts.py"


rule keep_only:
    """Keep only the shared or the strongest routed experts."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        keep_only="results/{dataset}/{model}/interventions/keep_only.parquet",
    log:
        "results/logs/keep_only/{dataset}/{model}.log",
    benchmark:
        "results/logs/keep_only/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=model_memory,
        runtime=60,
    params:
        code=code("keep_only.py"),
        settings=settings("batch_size", "keep_only", load=LOADING),
    script:
        "../../scripts/keep_only.py"

"""The forward pass: prompts with their clean scores, and the activation cache.

INPUT   results/{dataset}/dataset.parquet, results/models/{model}/
OUTPUT  results/{dataset}/{model}/captured.parquet                   prompts, targets, clean rank and log-probability
        results/{dataset}/{model}/prompts.parquet                    those of them that are analysed
        results/{dataset}/{model}/unknown.parquet                    the others: prompts that the model does not know
        results/{dataset}/{model}/dropped.parquet                    prompts that cannot be used, with the reason
        results/{dataset}/{model}/activations/{shard}.safetensors    the cache (capture.capture lists its tensors)
        results/{dataset}/{model}/activations/{shard}.parquet        the prompts of a shard; the cache names them by prompt_id
        results/{dataset}/{model}/activations/index.json             shards, tensors, provenance, verified equations
"""


rule activations:
    input:
        expand("results/{dataset}/{model}/prompts.parquet", dataset=DATASETS, model=MODELS),


rule capture:
    """Run the prompts of a shard and record the parts of the residual stream at the readout position."""
    input:
        dataset="results/{dataset}/dataset.parquet",
        model=model_files,
    output:
        activations="results/{dataset}/{model}/activations/{shard}.safetensors",
        prompts="results/{dataset}/{model}/activations/{shard}.parquet",
        dropped="results/{dataset}/{model}/activations/{shard}.dropped.parquet",
    log:
        "results/logs/capture/{dataset}/{model}/{shard}.log",
    cache: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(60),
    params:
        code=code("capture.py"),
        settings=settings("batch_size", "shards", of_dataset=["templates", "answer"], of_model=["moe"], load=LOADING),
        shared_as=shared_as,
    script:
        "../../scripts/capture.py"


rule gather_prompts:
    """Put the shards' prompts together and index the cache."""
    input:
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        prompts=expand("results/{{dataset}}/{{model}}/activations/{shard}.parquet", shard=SHARDS),
        dropped=expand("results/{{dataset}}/{{model}}/activations/{shard}.dropped.parquet", shard=SHARDS),
    output:
        prompts="results/{dataset}/{model}/captured.parquet",
        dropped="results/{dataset}/{model}/dropped.parquet",
        index="results/{dataset}/{model}/activations/index.json",
    log:
        "results/logs/gather_prompts/{dataset}/{model}.log",
    benchmark:
        "results/logs/gather_prompts/{dataset}/{model}.benchmark.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=minutes(10),
    params:
        code=code("gather_prompts.py"),
        settings=settings(),
    script:
        "../../scripts/gather_prompts.py"


rule filter_known:
    """Keep the prompts whose target the model ranks well enough in the clean run; by default all."""
    input:
        prompts="results/{dataset}/{model}/captured.parquet",
    output:
        prompts="results/{dataset}/{model}/prompts.parquet",
        unknown="results/{dataset}/{model}/unknown.parquet",
    log:
        "results/logs/filter_known/{dataset}/{model}.log",
    benchmark:
        "results/logs/filter_known/{dataset}/{model}.benchmark.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=minutes(10),
    params:
        code=code("filter_known.py"),
        settings=settings(of_dataset=["known"]),
    script:
        "../../scripts/filter_known.py"

"""Models: toys are trained here, others fetched from the hub or read from a folder, once, and described.

INPUT   results/{dataset}/dataset.parquet      the data set that toy models learn
OUTPUT  results/models/{model}/model.json      where a model's files lie, its commit, the hash of each file
        results/models/{model}/                of a toy: its checkpoint (safetensors, tokenizer, config), training.json
        results/models/{model}/checkpoints/    earlier states of it, a folder each
"""


rule models:
    input:
        [f"results/models/{model}/model.json" for model in MODELS],


rule train_toy:
    """Train a toy-sized model of a real architecture class on the facts (see scripts/moescope/toy.py)."""
    input:
        dataset=expand("results/{dataset}/dataset.parquet", dataset=config["toy_training"]["dataset"]),
    output:
        **{file.replace(".", "_"): f"results/models/{{model}}/{file}" for file in CHECKPOINT_FILES},
        checkpoints=directory("results/models/{model}/checkpoints"),
    log:
        "results/logs/train_toy/{model}.log",
    wildcard_constraints:
        model=one_of(TOYS),
    cache: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(30),
    params:
        code=code("train_toy.py"),
        settings=settings("toy_training", of_model=["toy", "checkpoints"]),
        shared_as=shared_as,
    script:
        "../../scripts/train_toy.py"


rule describe_model:
    """Fetch a model or look into its folder, check it as far as that can be done without running it, describe it."""
    input:
        lambda wildcards: model_sources(MODELS[wildcards.model]),
    output:
        description="results/models/{model}/model.json",
    log:
        "results/logs/describe_model/{model}.log",
    benchmark:
        "results/logs/describe_model/{model}.benchmark.tsv"
    wildcard_constraints:
        model=one_of([name for name in MODELS if name not in TOYS]),
    localrule: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(240),
    params:
        code=code("describe_model.py"),
        settings=lambda wildcards: described(MODELS[wildcards.model]),
    script:
        "../../scripts/describe_model.py"


rule describe_checkpoint:
    """The same for an earlier state of a model: a revision of the hub."""
    output:
        description="results/models/{model}/checkpoints/{checkpoint}/model.json",
    log:
        "results/logs/describe_checkpoint/{model}/{checkpoint}.log",
    benchmark:
        "results/logs/describe_checkpoint/{model}/{checkpoint}.benchmark.tsv"
    wildcard_constraints:
        model=one_of([name for name in TRAINED if name not in TOYS]),
    localrule: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(240),
    params:
        code=code("describe_model.py"),
        settings=lambda wildcards: described(MODELS[wildcards.model] | {"revision": revision_of(wildcards)}),
    script:
        "../../scripts/describe_model.py"

"""Training: what is measured of a finished model, of its earlier states as well.

INPUT   results/{dataset}/{model}/prompts.parquet, results/models/{model}/ and its checkpoints/
OUTPUT  results/{dataset}/{model}/training/{checkpoint}.parquet     of one state; `final` is the finished model
        results/{dataset}/{model}/training/checkpoints.parquet      of all, with their training steps
"""


rule training:
    input:
        [f"results/{dataset}/{model}/training/checkpoints.parquet" for dataset in DATASETS for model in TRAINED],


rule measure_checkpoint:
    """Ranks, key neurons, routing and concentration of a state of a model, on the prompts of the finished one."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=state_of_training,
    output:
        checkpoint="results/{dataset}/{model}/training/{checkpoint}.parquet",
    log:
        "results/logs/measure_checkpoint/{dataset}/{model}/{checkpoint}.log",
    benchmark:
        "results/logs/measure_checkpoint/{dataset}/{model}/{checkpoint}.benchmark.tsv"
    wildcard_constraints:
        model=one_of(TRAINED),
        checkpoint=one_of({name for names in TRAINED.values() for name in names}),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("measure_checkpoint.py"),
        settings=settings("batch_size", utilization=KEYS, load=LOADING),
    script:
        "../../scripts/measure_checkpoint.py"


rule gather_checkpoints:
    """Put the states of a model together."""
    input:
        checkpoints=lambda wildcards: [
            f"results/{wildcards.dataset}/{wildcards.model}/training/{name}.parquet"
            for name in TRAINED[wildcards.model]
        ],
        training=lambda wildcards: (
            [f"results/models/{wildcards.model}/training.json"] if wildcards.model in TOYS else []
        ),
    output:
        checkpoints="results/{dataset}/{model}/training/checkpoints.parquet",
    log:
        "results/logs/gather_checkpoints/{dataset}/{model}.log",
    benchmark:
        "results/logs/gather_checkpoints/{dataset}/{model}.benchmark.tsv"
    wildcard_constraints:
        model=one_of(TRAINED),
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(20),
    params:
        code=code("gather_checkpoints.py"),
        settings=settings(of_model=["checkpoints"]),
    script:
        "../../scripts/gather_checkpoints.py"

"""Toy models, trained here.

INPUT   results/{dataset}/dataset.parquet      the data set that toy models learn
OUTPUT  results/models/{model}/                a checkpoint (safetensors, tokenizer, config) and training.json
"""


rule models:
    input:
        expand("results/models/{model}/{file}", model=MODELS, file=CHECKPOINT_FILES),


rule train_toy:
    """Train a toy-sized model of a real architecture class on the facts (see scripts/moescope/toy.py)."""
    input:
        dataset=expand("results/{dataset}/dataset.parquet", dataset=config["toy_training"]["dataset"]),
    output:
        expand("results/models/{{model}}/{file}", file=CHECKPOINT_FILES),
    log:
        "results/logs/train_toy/{model}.log",
    benchmark:
        "results/logs/train_toy/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=30,
    params:
        code=code("train_toy.py"),
        settings=settings("toy_training", of_model=["toy"]),
    script:
        "../../scripts/train_toy.py"

"""Who wrote the answer: log-probability increase of layers, heads, experts and neurons, and what lies behind them.

INPUT   results/{dataset}/{model}/prompts.parquet and activations/, results/models/{model}/ (weights only)
OUTPUT  results/{dataset}/{model}/attribution/{layers,heads,experts,margins}.parquet   (attribution.attribute)
        .../attribution/{neurons,attention_neurons,relation_neurons,concentration,neuron_sums}.parquet
                                                                                       (rankings.attribute)
        .../attribution/{queries,value_layers}.parquet                                 (queries.attribute)
        .../attribution/readings.parquet                                               (reading.read)
"""

UNIT_LEVELS = ["layers", "heads", "experts", "margins"]
NEURON_LEVELS = ["neurons", "attention_neurons", "relation_neurons", "concentration", "neuron_sums"]


rule attribution:
    input:
        expand(
            "results/{dataset}/{model}/attribution/{level}.parquet",
            dataset=DATASETS,
            model=MODELS,
            level=[*UNIT_LEVELS, *NEURON_LEVELS, "queries", "value_layers", "readings"],
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
        runtime=minutes(60),
    params:
        code=code("attribute.py"),
        settings=settings("lens", load=["dtype", "trust_remote_code"]),
    script:
        "../../scripts/attribute.py"


rule attribute_neurons:
    """The strongest neurons of each prompt and relation, exact by the bound; nothing runs forward but a few tokens."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        model=model_files,
    output:
        **{level: f"results/{{dataset}}/{{model}}/attribution/{level}.parquet" for level in NEURON_LEVELS},
    log:
        "results/logs/attribute_neurons/{dataset}/{model}.log",
    benchmark:
        "results/logs/attribute_neurons/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("attribute_neurons.py"),
        settings=settings("lens", "neurons", load=["dtype", "trust_remote_code"]),
    script:
        "../../scripts/attribute_neurons.py"


rule read_units:
    """The tokens that each relation's strongest units promote and suppress."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        model=model_files,
        relation_neurons="results/{dataset}/{model}/attribution/relation_neurons.parquet",
        heads="results/{dataset}/{model}/attribution/heads.parquet",
        experts="results/{dataset}/{model}/attribution/experts.parquet",
    output:
        readings="results/{dataset}/{model}/attribution/readings.parquet",
    log:
        "results/logs/read_units/{dataset}/{model}.log",
    benchmark:
        "results/logs/read_units/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=model_memory,
        runtime=minutes(60),
    params:
        code=code("read_units.py"),
        settings=settings("lens", "readings", load=["dtype", "trust_remote_code"]),
    script:
        "../../scripts/read_units.py"


rule attribute_queries:
    """The components that raise the activations of the strongest neurons; the prompts run forward once more."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
        neurons="results/{dataset}/{model}/attribution/neurons.parquet",
        attention_neurons="results/{dataset}/{model}/attribution/attention_neurons.parquet",
    output:
        queries="results/{dataset}/{model}/attribution/queries.parquet",
        value_layers="results/{dataset}/{model}/attribution/value_layers.parquet",
    log:
        "results/logs/attribute_queries/{dataset}/{model}.log",
    benchmark:
        "results/logs/attribute_queries/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(60),
    params:
        code=code("attribute_queries.py"),
        settings=settings("batch_size", "queries", load=LOADING),
    script:
        "../../scripts/attribute_queries.py"

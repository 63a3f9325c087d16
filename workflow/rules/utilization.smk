"""How much of a model a task uses: key neurons, and what blocking them breaks.

INPUT   results/{dataset}/{model}/prompts.parquet of a data set or, made here, of a text task; results/models/{model}/
OUTPUT  results/{text}/texts.parquet                           prompts and responses of a text task (texts.read)
        results/{text}/{model}/prompts.parquet, dropped.parquet  the same as tokens, responses generated where none is given
        results/{dataset}/{model}/utilization/{key_neurons,expert_tokens,units}.parquet         (utilization.find)
        results/{dataset}/{model}/interventions/{masking,masked_units}.parquet                   (masking.measure)
        {kind}/{shard}.parquet                                 the shards of each of these, where there are several
"""

KEY_NEURONS = ["key_neurons", "expert_tokens", "units"]


rule utilization:
    input:
        expand("results/{dataset}/{model}/utilization/{kind}.parquet", dataset=DATA, model=MODELS, kind=KEY_NEURONS),
        expand("results/{dataset}/{model}/interventions/masking.parquet", dataset=DATA, model=MODELS),


rule write_texts:
    """Read a text task and fill its templates."""
    input:
        files=lambda wildcards: source_files(TEXTS[wildcards.dataset], Path(f"results/{wildcards.dataset}/source.json")),
    output:
        texts="results/{dataset}/texts.parquet",
    log:
        "results/logs/write_texts/{dataset}.log",
    benchmark:
        "results/logs/write_texts/{dataset}.benchmark.tsv"
    wildcard_constraints:
        dataset=one_of(TEXTS),
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(4),
        runtime=minutes(20),
    params:
        code=code("write_texts.py"),
        settings=settings("seed", of_dataset=["path", "prompt", "response", "task", "samples"]),
    script:
        "../../scripts/write_texts.py"


rule write_responses:
    """The tokens of prompts and responses; responses that are not given are generated greedily."""
    input:
        texts="results/{dataset}/texts.parquet",
        model=model_files,
    output:
        prompts="results/{dataset}/{model}/prompts.parquet",
        dropped="results/{dataset}/{model}/dropped.parquet",
    log:
        "results/logs/write_responses/{dataset}/{model}.log",
    benchmark:
        "results/logs/write_responses/{dataset}/{model}.benchmark.tsv"
    wildcard_constraints:
        dataset=one_of(TEXTS),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(240),
    params:
        code=code("write_responses.py"),
        settings=settings("batch_size", of_dataset=["tokens"], load=LOADING),
    script:
        "../../scripts/write_responses.py"


rule find_key_neurons:
    """The key neurons of every sample, and the experts that its response tokens use."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        **{kind: of_shard(f"results/{{dataset}}/{{model}}/utilization/{kind}.parquet") for kind in KEY_NEURONS},
    log:
        of_shard("results/logs/find_key_neurons/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/find_key_neurons/{dataset}/{model}.benchmark.tsv")
    wildcard_constraints:
        dataset=one_of(DATA),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("find_key_neurons.py"),
        settings=settings("batch_size", "shards", utilization=KEYS, load=LOADING),
    script:
        "../../scripts/find_key_neurons.py"


rule mask_keys:
    """Block the key neurons and key experts of each task, and random ones, on all tasks."""
    input:
        **{kind: f"results/{{dataset}}/{{model}}/utilization/{kind}.parquet" for kind in KEY_NEURONS},
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        masking=of_shard("results/{dataset}/{model}/interventions/masking.parquet"),
        masked_units=of_shard("results/{dataset}/{model}/interventions/masked_units.parquet"),
    log:
        of_shard("results/logs/mask_keys/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/mask_keys/{dataset}/{model}.benchmark.tsv")
    wildcard_constraints:
        dataset=one_of(DATA),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(240),
    params:
        code=code("mask_keys.py"),
        settings=settings("seed", "batch_size", "shards", "masking", load=LOADING),
    script:
        "../../scripts/mask_keys.py"

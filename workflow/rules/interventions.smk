"""What breaks, and what comes back: experts and heads blocked, kept, mapped one by one; gates and answers traced.

INPUT   results/{dataset}/{model}/prompts.parquet, activations/, attribution/{heads,experts}.parquet,
        results/models/{model}/
OUTPUT  results/{dataset}/{model}/interventions/
            blocking.parquet, blocked_experts.parquet      of MoE models (ablations.measure_blocking, choose_sets)
            keep_only.parquet                              of MoE models (ablations.measure_keep_only)
            expert_map.parquet                             of MoE models (expert_map.measure)
            head_map.parquet, head_router.parquet          (steering.sweep)
            head_blocking.parquet, blocked_heads.parquet   (steering.measure_head_blocking, choose_heads)
            gate_gradients.parquet, gate_paths.parquet     of MoE models (steering.gate_gradients)
            tracing.parquet, tracing_runs.parquet          (tracing.trace)
            {kind}/{shard}.parquet                         the shards of each, where there are several
"""

EXPERT_INTERVENTIONS = ["blocking", "blocked_experts", "keep_only", "expert_map", "gate_gradients", "gate_paths"]
INTERVENTIONS = ["head_map", "head_router", "head_blocking", "blocked_heads", "tracing", "tracing_runs"]


rule interventions:
    input:
        expand(
            "results/{dataset}/{model}/interventions/{experiment}.parquet",
            dataset=DATASETS,
            model=MOE,
            experiment=EXPERT_INTERVENTIONS,
        ),
        expand(
            "results/{dataset}/{model}/interventions/{experiment}.parquet",
            dataset=DATASETS,
            model=MODELS,
            experiment=INTERVENTIONS,
        ),


rule block_experts:
    """Block a relation's best experts, chosen on one half of its subjects and measured on the other."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        experts="results/{dataset}/{model}/attribution/experts.parquet",
        model=model_files,
    output:
        blocking=of_shard("results/{dataset}/{model}/interventions/blocking.parquet"),
        blocked_experts=of_shard("results/{dataset}/{model}/interventions/blocked_experts.parquet"),
    log:
        of_shard("results/logs/block_experts/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/block_experts/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(60),
    params:
        code=code("block_experts.py"),
        settings=settings("seed", "batch_size", "shards", "blocking", load=LOADING),
    script:
        "../../scripts/block_experts.py"


rule keep_only:
    """Keep only the shared or the strongest routed experts."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        keep_only=of_shard("results/{dataset}/{model}/interventions/keep_only.parquet"),
    log:
        of_shard("results/logs/keep_only/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/keep_only/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(60),
    params:
        code=code("keep_only.py"),
        settings=settings("batch_size", "shards", "keep_only", load=LOADING),
    script:
        "../../scripts/keep_only.py"


rule map_experts:
    """Block every expert that a prompt uses, one at a time."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        expert_map=of_shard("results/{dataset}/{model}/interventions/expert_map.parquet"),
    log:
        of_shard("results/logs/map_experts/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/map_experts/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("map_experts.py"),
        settings=settings("batch_size", "shards", "expert_map", load=LOADING),
    script:
        "../../scripts/map_experts.py"


rule sweep_heads:
    """Block every head at the readout position, one at a time, and watch the routers."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        head_map=of_shard("results/{dataset}/{model}/interventions/head_map.parquet"),
        head_router=of_shard("results/{dataset}/{model}/interventions/head_router.parquet"),
    log:
        of_shard("results/logs/sweep_heads/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/sweep_heads/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("sweep_heads.py"),
        settings=settings("batch_size", "shards", "head_sweep", load=LOADING),
    script:
        "../../scripts/sweep_heads.py"


rule block_heads:
    """Block a relation's best heads, chosen on one half of its subjects and measured on the other."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        heads="results/{dataset}/{model}/attribution/heads.parquet",
        model=model_files,
    output:
        head_blocking=of_shard("results/{dataset}/{model}/interventions/head_blocking.parquet"),
        blocked_heads=of_shard("results/{dataset}/{model}/interventions/blocked_heads.parquet"),
    log:
        of_shard("results/logs/block_heads/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/block_heads/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("block_heads.py"),
        settings=settings("seed", "batch_size", "shards", "head_blocking", load=LOADING),
    script:
        "../../scripts/block_heads.py"


rule trace_gates:
    """Split the gate probabilities of the chosen experts over heads, by integrated gradients."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        gate_gradients=of_shard("results/{dataset}/{model}/interventions/gate_gradients.parquet"),
        gate_paths=of_shard("results/{dataset}/{model}/interventions/gate_paths.parquet"),
    log:
        of_shard("results/logs/trace_gates/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/trace_gates/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(60),
    params:
        code=code("trace_gates.py"),
        settings=settings("seed", "batch_size", "shards", "gate_gradients", load=LOADING),
    script:
        "../../scripts/trace_gates.py"


rule trace_causes:
    """Corrupt the subject, and restore single parts of the clean run."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        model=model_files,
    output:
        tracing=of_shard("results/{dataset}/{model}/interventions/tracing.parquet"),
        tracing_runs=of_shard("results/{dataset}/{model}/interventions/tracing_runs.parquet"),
    log:
        of_shard("results/logs/trace_causes/{dataset}/{model}.log"),
    benchmark:
        of_shard("results/logs/trace_causes/{dataset}/{model}.benchmark.tsv")
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **GPUS,
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("trace_causes.py"),
        settings=settings("seed", "batch_size", "shards", "tracing", load=LOADING),
    script:
        "../../scripts/trace_causes.py"


if len(SHARDS) > 1:

    rule gather_shards:
        """Put the shards of a table together."""
        input:
            expand("results/{{dataset}}/{{model}}/{{stage}}/{{kind}}/{shard}.parquet", shard=SHARDS),
        output:
            "results/{dataset}/{model}/{stage}/{kind}.parquet",
        log:
            "results/logs/gather_shards/{dataset}/{model}/{stage}/{kind}.log",
        benchmark:
            "results/logs/gather_shards/{dataset}/{model}/{stage}/{kind}.benchmark.tsv"
        wildcard_constraints:
            dataset=one_of(DATA),
            stage="interventions|utilization",
            kind=r"\w+",
        localrule: True
        conda:
            "../../envs/analysis.yaml"
        threads: 1
        resources:
            mem_mb=memory(2),
            runtime=minutes(10),
        params:
            code=code("gather_shards.py"),
            settings=settings(),
        script:
            "../../scripts/gather_shards.py"

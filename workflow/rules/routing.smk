"""How experts are chosen, and by whom (Mixture-of-Experts models only).

INPUT   results/{dataset}/{model}/prompts.parquet, activations/, attribution/{heads,experts}.parquet,
        results/models/{model}/ (weights only)
OUTPUT  results/{dataset}/{model}/routing/loads.parquet, gates.parquet                          (routing.summarise)
        results/{dataset}/{model}/routing/router_attribution.parquet, associations.parquet      (router_attribution)
"""


rule routing:
    input:
        expand(
            "results/{dataset}/{model}/routing/{kind}.parquet",
            dataset=DATASETS,
            model=MOE,
            kind=["loads", "gates", "router_attribution", "associations"],
        ),


rule analyse_routing:
    """Count the experts that each prompt chooses, and how clearly."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
    output:
        loads="results/{dataset}/{model}/routing/loads.parquet",
        gates="results/{dataset}/{model}/routing/gates.parquet",
    log:
        "results/logs/analyse_routing/{dataset}/{model}.log",
    benchmark:
        "results/logs/analyse_routing/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(30),
    params:
        code=code("analyse_routing.py"),
        settings=settings(),
    script:
        "../../scripts/analyse_routing.py"


rule attribute_routers:
    """Split every router's logits over all that wrote to the residual stream below it; find heads that go with experts."""
    input:
        prompts="results/{dataset}/{model}/prompts.parquet",
        activations=expand("results/{{dataset}}/{{model}}/activations/{shard}.safetensors", shard=SHARDS),
        heads="results/{dataset}/{model}/attribution/heads.parquet",
        experts="results/{dataset}/{model}/attribution/experts.parquet",
        model=model_files,
    output:
        router_attribution="results/{dataset}/{model}/routing/router_attribution.parquet",
        associations="results/{dataset}/{model}/routing/associations.parquet",
    log:
        "results/logs/attribute_routers/{dataset}/{model}.log",
    benchmark:
        "results/logs/attribute_routers/{dataset}/{model}.benchmark.tsv"
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=model_memory,
        runtime=minutes(120),
    params:
        code=code("attribute_routers.py"),
        settings=settings("seed", "associations", load=["dtype", "trust_remote_code"]),
    script:
        "../../scripts/attribute_routers.py"

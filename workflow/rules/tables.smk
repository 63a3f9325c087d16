"""Result tables of all data sets and models, with intervals.

INPUT   results/{dataset}/{model}/prompts.parquet, attribution/, interventions/
OUTPUT  results/tables/{efficiency,gains,stages,heads,experts,expert_curves,near_ties}.{csv,parquet}   from attribution
        results/tables/{neurons,concentration,additivity,relation_neurons,unit_readings,queries}.{csv,parquet}
        results/tables/{blocking,keep_only}.{csv,parquet}                                    from interventions
"""

PUBLISHED = {name: model["published"] for name, model in MODELS.items() if model["published"]}
SUMMARISED = [
    "layers",
    "heads",
    "experts",
    "neurons",
    "attention_neurons",
    "relation_neurons",
    "concentration",
    "neuron_sums",
    "queries",
    "value_layers",
    "readings",
]
PARTNERS = {name: model["dense_partner"] for name, model in MODELS.items() if model["dense_partner"]}


rule tables:
    input:
        expand("results/tables/{table}.csv", table=[*ATTRIBUTION_TABLES, *NEURON_TABLES, *INTERVENTION_TABLES]),


rule summarise_attribution:
    """Efficiency, gains over depth, stages, head and expert maps."""
    input:
        prompts=expand("results/{dataset}/{model}/prompts.parquet", dataset=DATASETS, model=MODELS),
        layers=expand("results/{dataset}/{model}/attribution/layers.parquet", dataset=DATASETS, model=MODELS),
        heads=expand("results/{dataset}/{model}/attribution/heads.parquet", dataset=DATASETS, model=MODELS),
        experts=expand("results/{dataset}/{model}/attribution/experts.parquet", dataset=DATASETS, model=MODELS),
        margins=expand("results/{dataset}/{model}/attribution/margins.parquet", dataset=DATASETS, model=MODELS),
    output:
        reported_table("efficiency"),
        reported_table("stages"),
        expand("results/tables/{table}.csv", table=["gains", "heads", "experts", "expert_curves", "near_ties"]),
        expand("results/tables/{table}.parquet", table=ATTRIBUTION_TABLES),
    log:
        "results/logs/summarise_attribution.log",
    benchmark:
        "results/logs/summarise_attribution.benchmark.tsv"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=30,
    params:
        code=code("summarise.py"),
        settings=settings(
            "seed",
            "statistics",
            toys=TOYS,
            published=PUBLISHED,
            n_prompts=n_prompts_of_all(),
            tables=ATTRIBUTION_TABLES,
            partners=PARTNERS,
            runs=[[dataset, model] for dataset in DATASETS for model in MODELS],
        ),
    script:
        "../../scripts/summarise.py"


rule summarise_neurons:
    """Where the strongest neurons lie, how few hold the LPI, what adds up, what is read, what raises them."""
    input:
        **{
            kind: expand(f"results/{{dataset}}/{{model}}/attribution/{kind}.parquet", dataset=DATASETS, model=MODELS)
            for kind in SUMMARISED
        },
        prompts=expand("results/{dataset}/{model}/prompts.parquet", dataset=DATASETS, model=MODELS),
    output:
        reported_table("concentration"),
        reported_table("additivity"),
        reported_table("relation_neurons"),
        reported_table("unit_readings"),
        expand("results/tables/{table}.csv", table=["neurons", "queries"]),
        expand("results/tables/{table}.parquet", table=NEURON_TABLES),
    log:
        "results/logs/summarise_neurons.log",
    benchmark:
        "results/logs/summarise_neurons.benchmark.tsv"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(8),
        runtime=60,
    params:
        code=code("summarise.py"),
        settings=settings(
            "seed",
            "statistics",
            toys=TOYS,
            published={},
            n_prompts=n_prompts_of_all(),
            tables=NEURON_TABLES,
            partners=PARTNERS,
            runs=[[dataset, model] for dataset in DATASETS for model in MODELS],
        ),
    script:
        "../../scripts/summarise.py"


rule summarise_interventions:
    """Blocking with its random controls, and keep-only."""
    input:
        prompts=expand("results/{dataset}/{model}/prompts.parquet", dataset=DATASETS, model=MOE),
        blocking=expand("results/{dataset}/{model}/interventions/blocking.parquet", dataset=DATASETS, model=MOE),
        keep_only=expand("results/{dataset}/{model}/interventions/keep_only.parquet", dataset=DATASETS, model=MOE),
    output:
        reported_table("blocking"),
        reported_table("keep_only"),
        expand("results/tables/{table}.parquet", table=INTERVENTION_TABLES),
    log:
        "results/logs/summarise_interventions.log",
    benchmark:
        "results/logs/summarise_interventions.benchmark.tsv"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=30,
    params:
        code=code("summarise.py"),
        settings=settings(
            "seed",
            "statistics",
            toys=TOYS,
            published=PUBLISHED,
            n_prompts=n_prompts_of_all(),
            tables=INTERVENTION_TABLES,
            partners={},
            runs=[[dataset, model] for dataset in DATASETS for model in MOE],
        ),
    script:
        "../../scripts/summarise.py"

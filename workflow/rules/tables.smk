"""Result tables of all data sets and models, with intervals.

INPUT   results/{dataset}/{model}/prompts.parquet, attribution/, interventions/
OUTPUT  results/tables/{efficiency,gains,stages,heads,experts,near_ties}.{csv,parquet}    from attribution
        results/tables/{blocking,keep_only}.{csv,parquet}                       from interventions
"""

PUBLISHED = {name: model["published"] for name, model in MODELS.items() if model["published"]}
PARTNERS = {name: model["dense_partner"] for name, model in MODELS.items() if model["dense_partner"]}


rule tables:
    input:
        expand("results/tables/{table}.csv", table=[*ATTRIBUTION_TABLES, *INTERVENTION_TABLES]),


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
        expand("results/tables/{table}.csv", table=["gains", "heads", "experts", "near_ties"]),
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

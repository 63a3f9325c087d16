"""Figures, one rule each, so that each has its own caption in the report.

INPUT   results/tables/*.parquet
OUTPUT  results/figures/{dataset}.{figure}.svg
"""

# Figures, by the models that they show; those of tasks are made of text tasks as well.
FIGURE_MODELS = {
    **dict.fromkeys(
        [
            *["gains", "stages", "efficiency", "heads", "neurons", "concentration", "additivity", "queries"],
            *["head_map", "head_blocking", "tracing"],
            *["utilization", "rarefaction", "key_overlap", "diversity", "masking"],
        ],
        list(MODELS),
    ),
    **dict.fromkeys(
        [
            *["experts", "expert_curves", "blocking", "keep_only", "contrasts", "expert_map", "faithfulness"],
            *["routing", "mutual_information", "expert_use", "task_overlap"],
            *["router_attribution", "associations", "head_router", "gate_gradients"],
            *["key_experts", "key_scores"],
        ],
        MOE,
    ),
    "training": list(TRAINED),
    "families": list(FAMILIES),
}
FIGURE_MODELS = {figure: models for figure, models in FIGURE_MODELS.items() if models}
OF_TASKS = ["utilization", "rarefaction", "key_experts", "key_overlap", "diversity", "masking"]
FIGURE_DATA = {figure: list(DATA if figure in OF_TASKS else DATASETS) for figure in FIGURE_MODELS}


rule figures:
    input:
        [f"results/figures/{dataset}.{figure}.svg" for figure in FIGURE_MODELS for dataset in FIGURE_DATA[figure]],


for figure, models in FIGURE_MODELS.items():

    rule:
        name:
            f"plot_{figure}"
        input:
            **{figure: f"results/tables/{figure}.parquet"},
        output:
            figure=report(
                f"results/figures/{{dataset}}.{figure}.svg",
                caption=f"../report/{figure}.rst",
                category="Figures",
                labels={"figure": figure, "data set": "{dataset}"},
            ),
        log:
            f"results/logs/plot/{{dataset}}.{figure}.log",
        benchmark:
            f"results/logs/plot/{{dataset}}.{figure}.benchmark.tsv"
        wildcard_constraints:
            dataset=one_of(FIGURE_DATA[figure]),
        conda:
            "../../envs/analysis.yaml"
        threads: 1
        resources:
            mem_mb=memory(1),
            runtime=10,
        params:
            code=code("plot.py"),
            settings=settings(
                "seed",
                "statistics",
                of_dataset=["n_prompts"],
                figure=figure,
                models=models,
                toys=TOYS,
            ),
        script:
            "../../scripts/plot.py"

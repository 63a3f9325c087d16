"""Figures: one job draws those of a group of tables, and each has its own caption in the report.

INPUT   results/tables/*.parquet
OUTPUT  results/figures/{dataset}.{figure}.svg
"""

# Figures, by the models that they show.
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
FIGURES = {
    name: [table for table in of["tables"] if table in FIGURE_MODELS]
    for name, of in (SUMMARIES | {"families": {"tables": ["families"]}}).items()
}
FIGURE_DATA = {name: SUMMARIES.get(name, {"data": list(DATASETS)})["data"] for name in FIGURES}


rule figures:
    input:
        [
            f"results/figures/{dataset}.{figure}.svg"
            for name, drawn in FIGURES.items()
            for figure in drawn
            for dataset in FIGURE_DATA[name]
        ],


for name, drawn in FIGURES.items():

    if drawn:

        rule:
            name:
                f"plot_{name}"
            input:
                **{figure: f"results/tables/{figure}.parquet" for figure in drawn},
            output:
                **{
                    figure: report(
                        f"results/figures/{{dataset}}.{figure}.svg",
                        caption=f"../report/{figure}.rst",
                        category="Figures",
                        labels={"figure": figure, "data set": "{dataset}"},
                    )
                    for figure in drawn
                },
            log:
                f"results/logs/plot_{name}/{{dataset}}.log",
            benchmark:
                f"results/logs/plot_{name}/{{dataset}}.benchmark.tsv"
            wildcard_constraints:
                dataset=one_of(FIGURE_DATA[name]),
            localrule: True
            conda:
                "../../envs/analysis.yaml"
            threads: 1
            resources:
                mem_mb=memory(1),
                runtime=minutes(10),
            params:
                code=code("plot.py"),
                settings=settings(
                    "seed",
                    "statistics",
                    of_dataset=["n_prompts"],
                    models={figure: FIGURE_MODELS[figure] for figure in drawn},
                    toys=TOYS,
                ),
            script:
                "../../scripts/plot.py"

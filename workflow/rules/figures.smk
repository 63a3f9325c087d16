"""Figures, one rule each, so that each has its own caption in the report.

INPUT   results/tables/*.parquet
OUTPUT  results/figures/{dataset}.{figure}.svg
"""

MOE_FIGURES = [
    *["experts", "expert_curves", "blocking", "keep_only", "contrasts", "expert_map", "faithfulness"],
    *["routing", "mutual_information", "expert_use", "task_overlap"],
    *["router_attribution", "associations", "head_router", "gate_gradients"],
]
FIGURES = [
    figure
    for figure in [
        *["gains", "stages", "efficiency", "heads", "neurons", "concentration", "additivity", "queries"],
        *["head_map", "head_blocking", "tracing"],
        *MOE_FIGURES,
    ]
    if MOE or figure not in MOE_FIGURES
]


rule figures:
    input:
        expand("results/figures/{dataset}.{figure}.svg", dataset=DATASETS, figure=FIGURES),


for figure in FIGURES:

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
                models=MOE if figure in MOE_FIGURES else list(MODELS),
                toys=TOYS,
            ),
        script:
            "../../scripts/plot.py"

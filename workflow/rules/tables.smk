"""Result tables of all data sets and models, with intervals.

INPUT   results/{dataset}/{model}/prompts.parquet, attribution/, routing/, interventions/
OUTPUT  results/tables/{table}.{csv,parquet}, the tables of SUMMARIES
        results/provenance.json    what made them, and a configuration that makes them again
"""

FOLDERS = {
    "attribution": [*UNIT_LEVELS, *NEURON_LEVELS, "queries", "value_layers", "readings"],
    "routing": ["loads", "gates", "router_attribution", "associations"],
    "interventions": [*EXPERT_INTERVENTIONS, *INTERVENTIONS, "masking"],
    "utilization": ["key_neurons", "expert_tokens", "units"],
    "training": ["checkpoints"],
}
FOLDER_OF = {kind: folder for folder, kinds in FOLDERS.items() for kind in kinds}
PARTNERS = {name: model["dense_partner"] for name, model in MODELS.items() if model["dense_partner"]}
PUBLISHED = {name: model["published"] for name, model in MODELS.items() if model["published"]}


FAMILY_TABLES = ["utilization", "efficiency", "blocking"]


rule tables:
    input:
        expand("results/tables/{table}.csv", table=TABLES),


for name, of in SUMMARIES.items():

    rule:
        name:
            f"summarise_{name}"
        input:
            **{
                kind: expand(
                    f"results/{{dataset}}/{{model}}/{FOLDER_OF[kind]}/{kind}.parquet",
                    dataset=of["data"],
                    model=of["models"],
                )
                for kind in of["made_from"]
            },
            prompts=expand("results/{dataset}/{model}/prompts.parquet", dataset=of["data"], model=of["models"]),
        output:
            [reported_table(table) for table in of["tables"] if table in REPORTED],
            [f"results/tables/{table}.csv" for table in of["tables"] if table not in REPORTED],
            [f"results/tables/{table}.parquet" for table in of["tables"]],
        log:
            f"results/logs/summarise_{name}.log",
        benchmark:
            f"results/logs/summarise_{name}.benchmark.tsv"
        conda:
            "../../envs/analysis.yaml"
        threads: 1
        resources:
            mem_mb=memory(of["memory_gb"]),
            runtime=minutes(60),
        params:
            code=code("summarise.py"),
            settings=settings(
                "seed",
                "statistics",
                toys=TOYS,
                published=PUBLISHED,
                n_prompts=n_prompts_of_all(),
                tables=of["tables"],
                partners=PARTNERS,
                runs=[[dataset, model] for dataset in of["data"] for model in of["models"]],
                expert_share=config["utilization"]["expert_share"] if name in ("utilization", "training") else None,
            ),
        script:
            "../../scripts/summarise.py"


rule summarise_families:
    """What one difference between toy models does, over seeds; from the tables of all."""
    input:
        **{name: f"results/tables/{name}.parquet" for name in FAMILY_TABLES},
    output:
        reported_table("families"),
        "results/tables/families.parquet",
    log:
        "results/logs/summarise_families.log",
    benchmark:
        "results/logs/summarise_families.benchmark.tsv"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=minutes(10),
    params:
        code=code("summarise_families.py"),
        settings=dict(members=FAMILIES, confidence=config["statistics"]["confidence"]),
    script:
        "../../scripts/summarise_families.py"


rule write_provenance:
    """What made the tables of this run; `--configfile results/provenance.json` makes them again."""
    input:
        models=[f"results/models/{model}/model.json" for model in MODELS],
        states=[
            f"results/models/{model}/checkpoints/{name}/model.json"
            for model in TRAINED
            if model not in TOYS
            for name in TRAINED[model]
        ],
        fetched=[f"results/{name}/source.json" for name, data in DATA.items() if "hub" in data],
        prompts=[f"results/{dataset}/{model}/prompts.parquet" for dataset in DATA for model in MODELS],
        files=read_files(),
        tables=rules.tables.input,
    output:
        record="results/provenance.json",
    log:
        "results/logs/write_provenance.log",
    benchmark:
        "results/logs/write_provenance.benchmark.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        runtime=minutes(10),
    params:
        code=code("write_provenance.py"),
        code_of_all=code_of_all,
        settings=settings(config=GIVEN),
    script:
        "../../scripts/write_provenance.py"

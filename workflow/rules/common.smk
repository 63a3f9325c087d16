"""What all rules share: the checked configuration, the code digests, the wildcards. No rules here."""

import logging
import os
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

LIBRARY = (
    "ablations activations anatomy artifacts attribution bounds capture cause_plots cause_tables checkpoints"
    " config devices drawing expert_map facts faults intervene lens logs masking masking_plots masking_tables"
    " miniature models neurons plan planted plots published queries rankings reading record responses resume"
    " router_attribution routing routing_plots routing_tables samples sources stats steering steering_plots"
    " steering_tables summaries tables texts toy tracing training training_plots training_tables utilization"
    " utilization_plots utilization_tables __init__"
).split()

# Deployed as a module, the workflow's files are copied one by one as their places are asked for:
# ask for the whole library before anything imports it.
for name in LIBRARY:
    SCRIPTS = Path(workflow.source_path(f"../../scripts/moescope/{name}.py")).parents[1]
sys.path.append(str(SCRIPTS))

from moescope import record
from moescope.artifacts import read_json, table_provenance, versions
from moescope.config import CHECKPOINT_FILES, ConfigError, family_members, is_moe, model_sources, resolve
from moescope.config import source_files, wanted_relations, with_defaults, yaml_error
from moescope.facts import n_prompts
from moescope.faults import FaultError, begin, explain, full, mend_times

CONFIG_FILE = "config/config.yaml"
if sentence := yaml_error(Path(CONFIG_FILE)):
    raise WorkflowError(sentence)


configfile: CONFIG_FILE


# The record of a run is a configuration too, whatever config/config.yaml says.
RECORD = config if config.get("kind") == record.KIND else {}
config = RECORD.get("config", config)

try:
    with open(workflow.source_path("../schemas/config.schema.yaml")) as schema_file:
        SCHEMA = yaml.load(schema_file, Loader=yaml.CSafeLoader)
    GIVEN = with_defaults(config, SCHEMA)
    config, RELATIONS = resolve(config, SCHEMA, ", ".join(map(str, workflow.configfiles)) or "config")
except ConfigError as error:
    raise WorkflowError("The configuration has errors; nothing was run.", *error.errors) from None

RESULTS = Path("results")
# Before Snakemake looks at any time. Jobs on a cluster read this file, too.
if workflow.is_main_process and (mended := mend_times(RESULTS)):
    logger.warning(
        f"{RESULTS}/: {mended} files were dated in the future, by a clock that was wrong; they are dated back."
    )

MODELS = {name: model | {"moe": is_moe(model)} for name, model in config["models"].items()}
DATASETS = {
    name: dataset
    | {"path": dataset.get("path", ""), "wanted": wanted_relations(dataset)}
    | {"n_prompts": n_prompts(RELATIONS[name], dataset["templates"]) if name in RELATIONS else 0}
    for name, dataset in config["datasets"].items()
}
TEXTS = {name: text | {"path": text.get("path", "")} for name, text in config["texts"].items()}
DATA = DATASETS | TEXTS
KEYS = {key: config["utilization"][key] for key in ("score", "threshold", "share")}
MOE = [name for name, model in MODELS.items() if model["moe"]]
TOYS = [name for name, model in MODELS.items() if "toy" in model]
TRAINED = {
    name: [*model["checkpoints"], *["final"] * ("toy" in model)]
    for name, model in MODELS.items()
    if model["checkpoints"]
}
FAMILIES = {name: {k: v for k, v in of.items() if k != "toy"} for name, of in family_members(config).items()}
SUMMARIES = {
    "attribution": {
        "tables": ["efficiency", "stages", "gains", "heads", "experts", "expert_curves", "near_ties"],
        "made_from": ["layers", "heads", "experts", "margins"],
        "models": list(MODELS),
        "memory_gb": 2,
    },
    "neurons": {
        "tables": ["neurons", "concentration", "additivity", "relation_neurons", "unit_readings", "queries"],
        "made_from": [
            *["layers", "heads", "experts", "neurons", "attention_neurons", "relation_neurons", "concentration"],
            *["neuron_sums", "queries", "value_layers", "readings"],
        ],
        "models": list(MODELS),
        "memory_gb": 8,
    },
    "heads": {
        "tables": ["head_map", "head_blocking", "tracing"],
        "made_from": ["head_map", "head_blocking", "tracing", "tracing_runs"],
        "models": list(MODELS),
        "memory_gb": 4,
    },
    "interventions": {
        "tables": ["blocking", "keep_only", "contrasts", "expert_map", "faithfulness"],
        "made_from": ["layers", "experts", "blocking", "keep_only", "expert_map"],
        "models": MOE,
        "memory_gb": 4,
    },
    "steering": {
        "tables": ["router_attribution", "associations", "association_pairs", "head_router", "gate_gradients"],
        "made_from": ["router_attribution", "associations", "head_router", "gate_gradients", "gate_paths"],
        "models": MOE,
        "memory_gb": 8,
    },
    "routing": {
        "tables": ["routing", "expert_use", "coactivation", "task_overlap", "mutual_information"],
        "made_from": ["loads", "gates"],
        "models": MOE,
        "memory_gb": 4,
    },
}
SUMMARIES |= {
    "utilization": {
        "tables": ["utilization", "rarefaction", "key_experts", "key_overlap", "diversity"],
        "made_from": ["key_neurons", "expert_tokens", "units"],
        "data": list(DATA),
        "models": list(MODELS),
        "memory_gb": 8,
    },
    "key_scores": {
        "tables": ["key_scores"],
        "made_from": ["key_neurons", "expert_tokens", "units", "experts"],
        "models": MOE,
        "memory_gb": 4,
    },
    "masking": {
        "tables": ["masking"],
        "made_from": ["masking"],
        "data": list(DATA),
        "models": list(MODELS),
        "memory_gb": 4,
    },
    "training": {
        "tables": ["training", "phases"],
        "made_from": ["checkpoints", "units"],
        "models": list(TRAINED),
        "memory_gb": 4,
    },
}
SUMMARIES = {name: {"data": list(DATASETS)} | of for name, of in SUMMARIES.items() if of["models"]}
TABLES = [table for of in SUMMARIES.values() for table in of["tables"]] + ["families"] * bool(FAMILIES)
REPORTED = [
    *[
        "efficiency",
        "stages",
        "concentration",
        "additivity",
        "relation_neurons",
        "unit_readings",
        "blocking",
        "keep_only",
    ],
    *["contrasts", "faithfulness", "head_blocking", "tracing", "gate_gradients", "associations", "association_pairs"],
    *["mutual_information", "utilization", "key_experts", "diversity", "masking", "training", "phases", "families"],
]
SHARDS = [str(number) for number in range(config["shards"])]


def of_shard(path):
    """Where a shard of `path` is written: there, if there is one only; or else each its own, for gather_shards."""
    stem, _, suffix = path.partition(".")
    return path if len(SHARDS) == 1 else f"{stem}/{{shard}}.{suffix}"


def begin_run():
    """What is done before the first job: see faults.begin."""
    # A log on a full disk must not bury what is said on the terminal under a traceback for each line.
    logging.raiseExceptions = False
    try:
        begin(RESULTS)
    except FaultError as error:
        raise WorkflowError(str(error)) from None
    ask_once_for_min_job_age()


def ask_once_for_min_job_age():
    """Let the SLURM plugin ask the controller how long it remembers jobs once, not whenever it asks for their states.

    Version 2.8.0 takes no answer for a reason to leave squeue for sacct. Where the controller was away for ten seconds
    and there is no accounting, it then lost its jobs and waited for ever.
    """
    if hasattr(workflow.executor_settings, "status_command"):
        import snakemake_executor_plugin_slurm as plugin

        age = plugin.get_min_job_age()
        if age is not None:
            plugin.get_min_job_age = lambda: age


def explain_failure(logs):
    """Write the end of a failed run: see faults.explain."""
    log = "".join(Path(log).read_text(encoding="utf-8", errors="replace") for log in logs)
    for sentence in [*explain(log), *(full(RESULTS) or full(Path(".snakemake")))]:
        logger.error(sentence)


def one_of(names):
    """A wildcard constraint: just these names, or nothing at all."""
    return "|".join(names) or "(?!)"


wildcard_constraints:
    dataset=one_of(DATASETS),
    model=one_of(MODELS),
    shard=one_of(SHARDS),


def code(script):
    """A params function: the digest of a script's code. An edit re-runs the rule.

    It is made when a job asks for it: each job of a cluster reads the whole workflow twice, but needs one digest.
    """
    script = Path(workflow.source_path(f"../../scripts/{script}"))
    return lambda wildcards: record.code_digest(script)


def code_of_all(wildcards=None):
    """The digests of all scripts that a rule asks for, by name."""
    return {script.name: record.code_digest(script) for script in sorted(SCRIPTS.glob("*.py"))}


def read_files():
    """The files that data are read from, but for those fetched from the hub, whose commit is known."""
    return sorted({str(file) for data in DATA.values() if "hub" not in data for file in source_files(data, Path())})


def warn_of_differences():
    """Where a run is made again from its record, say what is not as it was."""
    if RECORD and workflow.is_main_process:
        for sentence in record.differences(RECORD, code_of_all(), read_files()):
            logger.warning(f"The record that this run repeats: {sentence}")


LOADING = ["device", "dtype", "attention_backend", "experts_backend", "max_memory", "trust_remote_code"]


def settings(*sections, of_dataset=(), of_model=(), load=(), **more):
    """A params function: all wildcards, `more`, and just those settings that the rule's result depends on.

    With the section `shards` there is also the number of the shard, 0 where there is one only.
    `load` names the arguments of checkpoints.load that come from the model's settings.
    """

    def chosen(wildcards):
        values = dict(wildcards.items()) | more | {key: config[key] for key in sections}
        if "shards" in sections:
            values["shard"] = int(values.get("shard", 0))
        if load:
            model = MODELS[wildcards.model]
            values["load"] = {key: model[key] if model[key] not in ("", {}) else None for key in load}
        values |= {key: DATA[wildcards.dataset].get(key) for key in of_dataset}
        return values | {key: MODELS[wildcards.model][key] for key in of_model}

    return chosen


def shared_as(wildcards, input):
    """What an entry of the shared cache is known by beside settings, code and the jobs before it (`--cache`).

    Versions of what computes it, and what moving revisions were resolved to. A param that depends on `input` is part
    of the entry's key but, to Snakemake, no reason to run again.
    """
    if workflow.output_file_cache is None or not all(map(os.path.exists, input)):
        return {}
    commits = [read_json(path)["commit"] for path in input if Path(path).name == "model.json"]
    digests = [table_provenance(path)["dataset_digest"] for path in input if Path(path).name == "dataset.parquet"]
    return {"versions": versions(), "commits": commits, "digests": digests}


def model_files(wildcards):
    """The files that a model is known by: its description first, and what is trained here."""
    toy = wildcards.model in TOYS
    return [f"results/models/{wildcards.model}/{file}" for file in (CHECKPOINT_FILES if toy else CHECKPOINT_FILES[:1])]


def state_of_training(wildcards):
    """The file or folder that a state of a model is known by."""
    if wildcards.checkpoint == "final":
        return model_files(wildcards)
    folder = f"results/models/{wildcards.model}/checkpoints"
    return folder if wildcards.model in TOYS else f"{folder}/{wildcards.checkpoint}/model.json"


def revision_of(wildcards):
    """The revision of the hub that a state of a model is."""
    return MODELS[wildcards.model]["checkpoint_revisions"].get(wildcards.checkpoint, wildcards.checkpoint)


def described(model):
    """What the description of a model that is not trained here depends on."""
    return {key: model.get(key, "") for key in ("hub", "revision", "folder", "kind", "trust_remote_code")}


def gpus(wildcards):
    """GPUs of a job that runs the model forward."""
    model = MODELS[wildcards.model]
    return 0 if model["device"] == "cpu" else model["gpus"]


def gpu_resources():
    """Resources of a job on a GPU, as the profile's resource gpu_request says: gpus or gres, with a model or without.

    SLURM knows them as --gpus=1 and --gres=gpu:1, and a cluster may take only one of the two.
    """
    request = (workflow.resource_settings.default_resources or {}).get("gpu_request")
    way, _, kind = str(request.raw if request else "gpus").partition(":")
    if way == "gres":
        name = f"gpu:{kind}" if kind else "gpu"
        return {"gres": lambda wildcards: f"{name}:{gpus(wildcards)}" if gpus(wildcards) else None}
    if way == "gpus":
        return {"gpu": gpus, "gpu_model": lambda wildcards: kind if kind and gpus(wildcards) else None}
    raise WorkflowError(f"default-resources.gpu_request: {request.raw} is neither gpus nor gres; mend the profile")


GPUS = gpu_resources()


def memory(gigabytes):
    """A resource function: megabytes that grow with every attempt."""
    return lambda wildcards, attempt: int(1000 * gigabytes * attempt)


def minutes(number):
    """A resource function: minutes of run time that grow with every attempt."""
    return lambda wildcards, attempt: number * attempt


def model_memory(wildcards, attempt):
    """A resource function: megabytes of a job that loads the model."""
    return int(1000 * MODELS[wildcards.model]["memory_gb"] * attempt)


def n_prompts_of_all():
    """Prompts of all data sets, 0 if some are only counted when they are read."""
    counts = [dataset["n_prompts"] for dataset in DATASETS.values()]
    return sum(counts) if all(counts) else 0


def reported_table(name):
    """A result table that the report shows."""
    return report(
        f"results/tables/{name}.csv", caption=f"../report/{name}_table.rst", category="Tables", labels={"table": name}
    )

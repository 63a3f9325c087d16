"""What all rules share: the checked configuration, the code digests, the wildcards. No rules here."""

import sys
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

LIBRARY = (
    "ablations artifacts attribution capture config facts intervene lens logs models plots stats tables toy __init__"
).split()

# Deployed as a module, the workflow's files are copied one by one as their places are asked for:
# ask for the whole library before anything imports it.
for name in LIBRARY:
    SCRIPTS = Path(workflow.source_path(f"../../scripts/moescope/{name}.py")).parents[1]
sys.path.append(str(SCRIPTS))

from moescope.artifacts import digest
from moescope.config import CHECKPOINT_FILES, ConfigError, fact_files, is_moe, resolve, yaml_error
from moescope.facts import n_prompts

CONFIG_FILE = "config/config.yaml"
if sentence := yaml_error(Path(CONFIG_FILE)):
    raise WorkflowError(sentence)


configfile: CONFIG_FILE


try:
    with open(workflow.source_path("../schemas/config.schema.yaml")) as schema_file:
        SCHEMA = yaml.safe_load(schema_file)
    config, RELATIONS = resolve(config, SCHEMA, ", ".join(map(str, workflow.configfiles)) or "config")
except ConfigError as error:
    raise WorkflowError("The configuration has errors; nothing was run.", *error.errors) from None

MODELS = config["models"]
DATASETS = {
    name: dataset | {"n_prompts": n_prompts(RELATIONS[name], dataset["templates"])}
    for name, dataset in config["datasets"].items()
}
MOE = [name for name, model in MODELS.items() if is_moe(model)]
ATTRIBUTION_TABLES = ["efficiency", "stages", "gains", "heads", "experts"]
INTERVENTION_TABLES = ["blocking", "keep_only"] if MOE else []
SHARDS = [str(number) for number in range(config["shards"])]


wildcard_constraints:
    dataset="|".join(DATASETS),
    model="|".join(MODELS),
    shard="|".join(SHARDS),


@cache
def code(script):
    """Digest of a script and of every library module that it reaches by import: an edit re-runs the rule."""
    script = Path(workflow.source_path(f"../../scripts/{script}"))
    finder = ModuleFinder(path=[str(SCRIPTS)])
    finder.run_script(str(script))
    files = [(name, Path(module.__file__)) for name, module in finder.modules.items() if module.__file__]
    return digest(b"".join(name.encode() + file.read_bytes() for name, file in sorted(files)))


def settings(*sections, of_dataset=(), of_model=(), **more):
    """A params function: all wildcards, `more`, and just those settings that the rule's result depends on."""

    def chosen(wildcards):
        values = dict(wildcards.items()) | more | {key: config[key] for key in sections}
        values |= {key: DATASETS[wildcards.dataset][key] for key in of_dataset}
        return values | {key: MODELS[wildcards.model][key] for key in of_model}

    return chosen


def model_files(wildcards):
    """The files that a model is loaded from."""
    return expand("results/models/{{model}}/{file}", file=CHECKPOINT_FILES)


def gpus(wildcards):
    """GPUs of a job that runs the model forward."""
    return int(MODELS[wildcards.model]["device"] == "cuda")


def memory(gigabytes):
    """A resource function: megabytes that grow with every attempt."""
    return lambda wildcards, attempt: int(1000 * gigabytes * attempt)


def reported_table(name):
    """A result table that the report shows."""
    return report(
        f"results/tables/{name}.csv", caption=f"../report/{name}_table.rst", category="Tables", labels={"table": name}
    )

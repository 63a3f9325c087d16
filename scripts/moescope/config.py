"""The settings of a run: defaults from the schema, and every error at once, as sentences."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError

from moescope import texts
from moescope.facts import FactsError, Relation, did_you_mean, load_relations, malformed
from moescope.sources import PRESETS, SUFFIXES, check

MOE_SHAPE = ("experts", "experts_per_token", "expert_width")
DENSE_SHAPE = ("ffn_width",)
CHECKPOINT_FILES = (
    "model.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)
FACTS = "config/facts"
SOURCES = ("toy", "hub", "folder")
SECTIONS = ("datasets", "models")
# Kinds of the files that a model in a folder is loaded from (those that checkpoints.describe names are among them).
LOADED = (".safetensors", ".json", ".model", ".txt", ".tiktoken", ".jinja", ".py")
# What a value that is not written as it should be is not, by the key of its entry; "" for the name of an entry.
WRITTEN = {
    "": "is not a usable name: it becomes part of a path; start with a letter or digit and use only letters, digits,"
    " '-' and '_'",
    "checkpoints": "is not a usable name of a checkpoint: it becomes part of a path; use only letters, digits, '.', '-'"
    " and '_'",
    "hub": "is not the name of a repository of the hub; write it as owner/name",
    "max_memory": "is neither a device (the number of a GPU, or cpu) nor a size (such as 40GiB); mend it",
}
SEEDS = (0, 1, 2)
MOE_ARCHITECTURES = ("qwen2_moe", "olmoe", "mixtral")


class ConfigError(ValueError):
    """Everything that is wrong with a configuration and its fact files, one sentence a line."""

    def __init__(self, errors: Sequence[str]):
        super().__init__("\n".join(errors))
        self.errors = list(errors)


def resolve(
    raw: Mapping[str, Any], schema: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, list[Relation]]]:
    """The configuration with its defaults filled in, and the relations of each data set of fact files.

    `source` names the file that the sentences point to. Raises ConfigError with every error of the
    configuration and of all fact files that it leads to.
    """
    raw, hidden = _with_families(raw, {path[:2] for path, _ in schema_errors(raw, schema)})
    found = schema_errors(raw, schema)
    config = with_defaults(raw, schema)
    broken = {path[:2] for path, _ in found}
    for dataset in _entries(config, "datasets", broken).values():
        own = dataset["format"] == "facts"
        dataset.setdefault("templates", "held_out" if own else "all")
        if own and "hub" not in dataset:
            dataset.setdefault("path", FACTS)
    for model in _entries(config, "models", broken).values():
        # YAML reads the number of a GPU as a number.
        model["max_memory"] = {str(device): size for device, size in model["max_memory"].items()}
    errors = [f"{source}: {sentence}" for sentence in [*(s for _, s in found), *cross_errors(config, broken)]]
    errors += [f"{source}: {sentence}" for sentence in hidden]
    for name, text in _entries(config, "texts", broken).items():
        errors += [f"texts.{name}: {sentence}" for sentence in _text_errors(text)]
    tasks = config["tasks"] if ("tasks",) not in broken else schema["properties"]["tasks"]["default"]
    relations = {}
    for name, dataset in _entries(config, "datasets", broken).items():
        if dataset["format"] != "facts":
            errors += [f"datasets.{name}: {sentence}" for sentence in _public_errors(dataset)]
            continue
        if "path" not in dataset:
            continue
        try:
            relations[name] = load_relations(fact_files(dataset), tasks)
        except FactsError as error:
            errors += error.errors
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    return config, relations


def yaml_error(path: Path) -> str:
    """Why a configuration file is not YAML, with its line; empty if it is, or if there is no such file."""
    try:
        yaml.safe_load(path.read_text(encoding="utf-8") if path.exists() else "")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return malformed(path, error)
    return ""


def fact_files(dataset: Mapping[str, Any]) -> list[Path]:
    """The fact files of a data set: those of its relations, or all of its folder, sorted by name."""
    folder = Path(dataset["path"])
    if dataset["relations"]:
        return [folder / f"{relation}.yaml" for relation in dataset["relations"]]
    return sorted(folder.glob("*.yaml"))


def with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    """A copy of `value` with the schema's defaults for the keys that it leaves out, at every depth.

    Keys that the schema knows come in its order, so that their order in a file changes nothing.
    """
    if not isinstance(value, Mapping):
        return deepcopy(value)
    known = schema.get("properties", {})
    defaults = {key: sub["default"] for key, sub in known.items() if "default" in sub}
    filled = {key: value.get(key, defaults.get(key)) for key in known if key in value or key in defaults} | dict(value)
    rest = schema.get("additionalProperties") or {}
    return {key: with_defaults(item, known.get(key, rest)) for key, item in filled.items()}


def source_files(dataset: Mapping[str, Any], fetched: Path) -> list[Path]:
    """The files that a data set or a text task is read from: its own, or those fetched into the folder `fetched`."""
    if dataset.get("format") == "facts":
        return fact_files(dataset)
    if "hub" in dataset:
        return [fetched]
    path = Path(dataset["path"])
    return _visible(path, SUFFIXES) if path.is_dir() else [path]


def model_sources(model: Mapping[str, Any]) -> list[Path]:
    """Of a model in a folder the files that it can be loaded from; none of what else lies there."""
    return _visible(Path(model["folder"]), LOADED, "*") if "folder" in model else []


def _visible(folder: Path, suffixes: Collection[str], pattern: str = "**/*") -> list[Path]:
    """Files of these kinds in a folder, but in no hidden one, such as that of git."""
    found = [path for path in folder.glob(pattern) if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def family_members(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The models of the families: by name, its family, its variant, its seed, and its toy shape."""
    return {
        f"{family}-{variant}-{seed}": {
            "family": family,
            "variant": variant,
            "seed": seed,
            "toy": {**of["base"], **replaced, "seed": seed},
        }
        for family, of in config.get("families", {}).items()
        for variant, replaced in of["variants"].items()
        for seed in of.get("seeds", SEEDS)
    }


def wanted_relations(dataset: Mapping[str, Any]) -> list[str]:
    """The relations that a public data set is cut down to; empty for all."""
    return [*dataset["relations"], *PRESETS.get(dataset["preset"], ())]


def is_moe(model: Mapping[str, Any]) -> bool:
    """Whether a model of the configuration has routed experts, or is asked to have them."""
    return model["toy"]["architecture"] in MOE_ARCHITECTURES if "toy" in model else model["kind"] == "moe"


def active_width(toy: Mapping[str, Any]) -> int:
    """FFN neurons that one token passes through in each layer."""
    if toy["architecture"] in MOE_ARCHITECTURES:
        return toy["experts_per_token"] * toy["expert_width"] + toy["shared_width"]
    return toy["ffn_width"]


def schema_errors(raw: Mapping[str, Any], schema: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Every violation of the schema: its path and its sentence."""
    found = [(tuple(map(str, e.absolute_path)), e) for e in Draft202012Validator(schema).iter_errors(raw)]
    return [(path, sentence) for path, error in sorted(found, key=lambda f: f[0]) for sentence in _sentences(error)]


def cross_errors(config: Mapping[str, Any], broken: Collection[tuple[str, ...]]) -> Iterator[str]:
    """What no schema can say: names that must exist, and shapes that must fit each other.

    `broken` holds the paths (section, or section and name) that the schema has refused already.
    """
    models, datasets = _entries(config, "models", broken), _entries(config, "datasets", broken)
    for section, name in [*(("datasets", name) for name in datasets), *(("models", name) for name in models)]:
        if not isinstance(name, str):
            yield f"{section}: {name!r} is not text; write the name in quotes, or choose another one"
    for name, dataset in datasets.items():
        yield from (f"datasets.{name}{sentence}" for sentence in _dataset_errors(dataset))
    for name in sorted(set(map(str, _entries(config, "texts", broken))) & set(map(str, datasets))):
        yield f"texts.{name}: is also the name of a data set; choose another name"
    names = {section: config[section] if isinstance(config.get(section), Mapping) else None for section in SECTIONS}
    learned = config["toy_training"].get("dataset") if isinstance(config["toy_training"], Mapping) else None
    toys = any("toy" in model for model in models.values())
    if toys and isinstance(learned, str) and names["datasets"] is not None and learned not in names["datasets"]:
        yield f"toy_training.dataset: '{learned}' is not a data set{did_you_mean(learned, names['datasets'])}"
    elif toys and datasets.get(str(learned), {"format": "facts"})["format"] != "facts":
        yield f"toy_training.dataset: '{learned}' has no held-out templates; name a data set of fact files"
    complete = set()
    for name, model in models.items():
        yield from (f"models.{name}{sentence}" for sentence in _model_errors(model))
        shape_errors = list(_shape_errors(model["toy"])) if "toy" in model else []
        yield from (f"models.{name}.toy.{sentence}" for sentence in shape_errors)
        if not shape_errors:
            complete.add(name)
    for name, model in models.items():
        partner, here = model["dense_partner"], f"models.{name}.dense_partner"
        if not partner:
            continue
        if partner not in config["models"]:
            yield f"{here}: '{partner}' is not a model{did_you_mean(partner, config['models'])}"
        elif partner not in models or not (_has_kind(model) and _has_kind(models[partner])):
            continue
        elif not is_moe(model):
            yield f"{here}: '{name}' is dense itself; only a Mixture-of-Experts model has a dense partner"
        elif is_moe(models[partner]):
            yield f"{here}: '{partner}' is itself a Mixture-of-Experts model; name a dense one"
        elif {name, partner} <= complete and "toy" in model and "toy" in models[partner]:
            ours, theirs = (
                {"layers": t["layers"], "seed": t["seed"], "active FFN neurons": active_width(t)}
                for t in (model["toy"], models[partner]["toy"])
            )
            for what, mine in ours.items():
                if mine != theirs[what]:
                    yield f"{here}: '{partner}' has {what} {theirs[what]}, '{name}' has {mine}; a pair must agree"


def _with_families(raw: Mapping[str, Any], broken: Collection[tuple[str, ...]]) -> tuple[Mapping[str, Any], list[str]]:
    """With the models of the families that the schema accepts among the models; which of them hide another one."""
    if not isinstance(raw.get("families"), Mapping) or not isinstance(raw.get("models", {}), Mapping):
        return raw, []
    sound = {name: of for name, of in raw["families"].items() if not {("families",), ("families", name)} & set(broken)}
    members, models = family_members({"families": sound}), raw.get("models", {})
    hidden = [
        f"families.{members[name]['family']}: its model '{name}' is also one of models; rename one"
        for name in members
        if name in models
    ]
    return {**raw, "models": {**models, **{name: {"toy": of["toy"]} for name, of in members.items()}}}, hidden


def _has_kind(model: Mapping[str, Any]) -> bool:
    return "toy" in model or "kind" in model


def _model_errors(model: Mapping[str, Any]) -> Iterator[str]:
    given = [key for key in SOURCES if key in model]
    if len(given) != 1:
        yield f": {' and '.join(given) or 'nothing'} given; give just one of {', '.join(SOURCES)}"
    elif given != ["toy"] and "kind" not in model:
        yield ".kind: missing; say moe or dense, so that the jobs are known before the model is fetched"
    if "toy" in model and "kind" in model:
        yield ".kind: a toy model says it by its architecture; remove it"
    if "folder" in model and not Path(model["folder"]).is_dir():
        yield f".folder: '{model['folder']}' is not a folder; mend the path, which is relative to the working directory"
    if model["revision"] != "main" and "hub" not in model:
        yield ".revision: only a model of the hub has one; remove it"
    if model["checkpoint_revisions"] and "hub" not in model:
        yield ".checkpoint_revisions: only a model of the hub has them; remove the key"
    for name in model["checkpoint_revisions"].keys() - model["checkpoints"].keys():
        yield f".checkpoint_revisions: '{name}' is none of its checkpoints; add it there, with its training step"
    if model["checkpoints"] and "folder" in model:
        yield ".checkpoints: a folder holds one state of a model; give a hub model, or a toy, or remove the key"
    if model["gpus"] > 1 and model["device"] == "cuda":
        yield f".gpus: {model['gpus']} asked for, but device cuda is one GPU; set device to auto, or remove gpus"
    if model["max_memory"] and model["device"] != "auto":
        yield f".max_memory: only means something with device auto, not {model['device']}; remove one"


def _dataset_errors(dataset: Mapping[str, Any]) -> Iterator[str]:
    own = dataset["format"] == "facts"
    if ("path" in dataset) + ("hub" in dataset) != 1:
        yield f": {'both path and hub' if 'path' in dataset else 'no path'} given; give path or hub"
    elif own and "hub" in dataset:
        yield f".hub: fact files are local; give the folder as path, or the format of '{dataset['hub']}'"
    elif own and not dataset["relations"] and not fact_files(dataset):
        yield f".path: '{dataset['path']}' holds no fact file (*.yaml); name another folder"
    if "hub" not in dataset:
        for key, default in (("revision", "main"), ("files", "*")):
            if dataset[key] != default:
                yield f".{key}: only a data set of the hub has one; remove it"
    if own and dataset["preset"]:
        yield f".preset: '{dataset['preset']}' names LRE relations; use it with format lre, or list relations"
    if not own and dataset.get("templates", "all") != "all":
        yield f".templates: a public data set has no {dataset['templates']} templates; remove the key"
    if dataset["preset"] and dataset["relations"]:
        yield ".relations: preset names relations already; remove one of the two"
    if dataset["columns"] and dataset["format"] != "table":
        yield f".columns: format {dataset['format']} has columns of its own; use format table, or remove columns"
    if own:
        for relation in dataset["relations"]:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", relation):
                yield f".relations: '{relation}' is not a usable name of a fact file; use letters, digits, '-' and '_'"


def _text_errors(text: Mapping[str, Any]) -> list[str]:
    """What is wrong with a text task, as far as it is here already."""
    if ("path" in text) + ("hub" in text) != 1:
        return [f"{'both path and hub' if 'path' in text else 'no path'} given; give path or hub"]
    if "hub" in text:
        return texts.check(None, text["prompt"], text["response"], text["task"])
    found = [
        f"{key}: only a data set of the hub has one; remove it"
        for key, default in (("revision", "main"), ("files", "*"))
        if text[key] != default
    ]
    return found + texts.check(Path(text["path"]), text["prompt"], text["response"], text["task"])


def _public_errors(dataset: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of a public data set that are here already."""
    if "path" not in dataset or any(_dataset_errors(dataset)):
        return []
    return check(
        dataset["format"], Path(dataset["path"]), relations=wanted_relations(dataset), columns=dataset["columns"]
    )


def _shape_errors(toy: Mapping[str, Any]) -> Iterator[str]:
    architecture = toy["architecture"]
    moe = architecture in MOE_ARCHITECTURES
    for key in MOE_SHAPE if moe else DENSE_SHAPE:
        if key not in toy:
            yield f"{key}: missing; {architecture} needs {', '.join(MOE_SHAPE if moe else DENSE_SHAPE)}"
    for key in DENSE_SHAPE if moe else (*MOE_SHAPE, "shared_width"):
        if toy.get(key):
            yield f"{key}: {architecture} is {'a Mixture-of-Experts model' if moe else 'dense'} and has none; remove it"
    if moe and toy["shared_width"] and architecture != "qwen2_moe":
        yield f"shared_width: is {toy['shared_width']}, but {architecture} has none; set it to 0"
    if moe and toy.get("experts_per_token", 0) > toy.get("experts", 0) > 0:
        yield f"experts_per_token: {toy['experts_per_token']} is more than the {toy['experts']} experts"


def _sentences(error: ValidationError) -> Iterator[str]:
    path = ".".join(str(part) for part in error.absolute_path)
    at = f"{path}: " if path else ""
    prefix = f"{path}." if path else ""
    value, wanted = error.instance, error.validator_value
    match error.validator:
        case "additionalProperties":
            known = error.schema["properties"]
            for key in value:
                if key not in known:
                    yield f"{prefix}{key}: not a known key{did_you_mean(str(key), known)}"
        case "required":
            for key in wanted:
                if key not in value and f"'{key}'" in error.message:
                    yield f"{prefix}{key}: missing; {error.schema['properties'][key]['description']}"
        case "type":
            yield f"{at}{value!r} is not of type {wanted}; {error.schema.get('description', 'see config/README.md')}"
        case "enum":
            yield f"{at}'{value}' is not a known value{did_you_mean(str(value), [str(w) for w in wanted])}"
        case "minimum":
            yield f"{at}{value} is too small; at least {wanted} is needed"
        case "exclusiveMinimum" | "exclusiveMaximum":
            yield f"{at}{value} must be {'more' if error.validator == 'exclusiveMinimum' else 'less'} than {wanted}"
        case "pattern":
            key = str(error.absolute_path[2]) if len(error.absolute_path) > 2 else ""
            yield f"{at}'{value}' {WRITTEN.get(key, WRITTEN[''])}"
        case "not":
            yield f"{at}'{value}' has a meaning of its own in the folder of results; choose another name"
        case "minItems" | "minProperties":
            yield f"{at}empty; give at least {wanted}"
        case "minLength":
            yield f"{at}empty; fill it in, or remove the key"
        case "multipleOf":
            yield f"{at}{value} is not a multiple of {wanted}"
        case _:
            yield f"{at}{error.message}"


def _entries(config: Mapping[str, Any], section: str, broken: Collection[tuple[str, ...]]) -> dict[str, Any]:
    """The entries of `models` or `datasets` that the schema has accepted."""
    entries = config.get(section)
    if not isinstance(entries, Mapping):
        return {}
    return {name: entry for name, entry in entries.items() if (section, str(name)) not in broken}

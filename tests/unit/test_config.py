"""Bad configurations get sentences: file, key, value and mend, all of them at once."""

import copy
from pathlib import Path

import pytest
import yaml

from moescope import config

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text())


def errors_of(change, fact_folder):
    raw = copy.deepcopy(DEFAULT)
    raw["datasets"]["facts"]["folder"] = str(fact_folder)
    change(raw)
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(raw, SCHEMA, "config.yaml")
    return caught.value.errors


def put(path, value):
    def change(raw):
        *parents, key = path.split(".")
        for parent in parents:
            raw = raw.setdefault(parent, {})
        raw[key] = value

    return change


def drop(path):
    def change(raw):
        *parents, key = path.split(".")
        for parent in parents:
            raw = raw[parent]
        del raw[key]

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("sed", 1), "config.yaml: sed: not a known key; did you mean 'seed'?"),
        (
            put("models.toy-olmoe.dense_partnr", "toy-llama"),
            "config.yaml: models.toy-olmoe.dense_partnr: not a known key; did you mean 'dense_partner'?",
        ),
        (
            put("models.toy-olmoe.dense_partner", "toy-lama"),
            "config.yaml: models.toy-olmoe.dense_partner: 'toy-lama' is not a model; did you mean 'toy-llama'?",
        ),
        (
            put("models.toy-olmoe.dense_partner", "toy-mixtral"),
            "models.toy-olmoe.dense_partner: 'toy-mixtral' is itself a Mixture-of-Experts model; name a dense one",
        ),
        (
            put("models.toy-llama.dense_partner", "toy-qwen2"),
            "models.toy-llama.dense_partner: 'toy-llama' is dense itself; only a Mixture-of-Experts model has",
        ),
        (
            put("models.toy-llama.toy.ffn_width", 64),
            "dense_partner: 'toy-llama' has active FFN neurons 64, 'toy-olmoe' has 128; a pair must agree",
        ),
        (put("models.toy-llama.toy.seed", 7), "'toy-llama' has seed 7, 'toy-olmoe' has 0; a pair must agree"),
        (
            put("models.toy-olmoe.toy.architecture", "olmo"),
            "models.toy-olmoe.toy.architecture: 'olmo' is not a known value; did you mean 'olmoe'?",
        ),
        (put("models.toy-olmoe.toy.layers", 0), "models.toy-olmoe.toy.layers: 0 is too small; at least 3 is needed"),
        (
            put("models.toy-olmoe.toy.experts", -4),
            "models.toy-olmoe.toy.experts: -4 is too small; at least 2 is needed",
        ),
        (put("models.toy-olmoe.toy.expert_width", 30), "models.toy-olmoe.toy.expert_width: 30 is not a multiple of 4"),
        (
            put("models.toy-olmoe.toy.experts_per_token", 99),
            "models.toy-olmoe.toy.experts_per_token: 99 is more than the 32 experts",
        ),
        (put("models.toy-olmoe.toy.shared_width", 8), "toy.shared_width: is 8, but olmoe has none; set it to 0"),
        (
            put("models.toy-llama.toy.experts", 8),
            "models.toy-llama.toy.experts: llama is dense and has none; remove it",
        ),
        (drop("models.toy-llama.toy.ffn_width"), "models.toy-llama.toy.ffn_width: missing; llama needs ffn_width"),
        (drop("models.toy-llama.toy.layers"), "models.toy-llama.toy.layers: missing; Number of decoder layers."),
        (put("blocking.random_draws", 0), "blocking.random_draws: 0 is too small; at least 1 is needed"),
        (put("blocking.top", [1, -5]), "blocking.top.1: -5 is too small; at least 1 is needed"),
        (put("blocking.top", []), "blocking.top: empty; give at least 1"),
        (put("batch_size", "many"), "batch_size: 'many' is not of type integer; Prompts of equal length"),
        (put("statistics.confidence", 1), "statistics.confidence: 1 must be less than 1"),
        (put("models.a/b", {"toy": {"architecture": "llama", "layers": 3}}), "models: 'a/b' is not a usable name"),
        (put("models", {"..": {"toy": {"architecture": "llama", "layers": 3}}}), "models: '..' is not a usable name"),
        (put("datasets.tables", {}), "datasets: 'tables' is the name of a folder of results; choose another name"),
        (put("toy_training.dataset", "fact"), "toy_training.dataset: 'fact' is not a data set; did you mean 'facts'?"),
        (put("datasets.facts.folder", "nowhere"), "datasets.facts.folder: 'nowhere' holds no fact file (*.yaml)"),
        (put("datasets.facts.relations", ["../x"]), "datasets.facts.relations.0: '../x' is not a usable name"),
        (put("datasets.facts.relations", ["country_capitol"]), "country_capitol.yaml: no such fact file"),
        (put("tasks", ["entity"]), "country_capital.yaml:2: task: 'geography' is not a known task; known: entity"),
        (put("models", None), "models: None is not of type object"),
        (drop("models"), "config.yaml: models: missing; Models by name."),
    ],
)
def test_each_error_is_a_sentence(fact_folder, change, sentence):
    found = errors_of(change, fact_folder)
    assert any(sentence in error for error in found), found
    assert len(found) <= 2, found


def test_all_errors_come_at_once(fact_folder):
    (fact_folder / "country_capital.yaml").write_text("task: geografy\nfacts: {a: b, a: c}\n")

    def change(raw):
        put("sed", 1)(raw)
        put("models.toy-olmoe.dense_partner", "toy-lama")(raw)
        put("models.toy-mixtral.toy.layers", -1)(raw)
        put("datasets.facts.relations", ["country_capital", "nowhere"])(raw)

    found = errors_of(change, fact_folder)
    for word in (
        "sed:",
        "'toy-lama'",
        "layers: -1",
        "'geografy'",
        "duplicate fact 'a'",
        "'templates' is missing",
        "nowhere",
    ):
        assert any(word in error for error in found), (word, found)


def test_defaults_are_filled_at_every_depth_and_the_input_is_left_alone(fact_folder):
    raw = copy.deepcopy(DEFAULT)
    raw["datasets"]["facts"]["folder"] = str(fact_folder)
    before = copy.deepcopy(raw)
    found, relations = config.resolve(raw, SCHEMA, "config.yaml")
    assert raw == before
    assert found["blocking"] == {"top": [1, 5, 10], "random_draws": 20}
    assert found["models"]["toy-llama"]["dense_partner"] == ""
    assert found["models"]["toy-llama"]["toy"] == {"architecture": "llama", "layers": 4, "ffn_width": 128} | {
        "shared_width": 0,
        "seed": 0,
    }
    assert [r.name for r in relations["facts"]] == ["country_capital", "fruit_inside_color"]


def test_every_key_of_the_schema_is_described_and_optional_ones_have_defaults():
    def walk(schema, path):
        for key, sub in schema.get("properties", {}).items():
            assert sub.get("description"), f"{path}.{key}"
            shape_of_one_kind = key in {*config.MOE_SHAPE, *config.DENSE_SHAPE}
            assert "default" in sub or key in schema.get("required", []) or shape_of_one_kind, f"{path}.{key}"
            walk(sub, f"{path}.{key}")
        rest = schema.get("additionalProperties")
        if schema.get("type") == "object":
            assert rest is not None, f"{path} accepts unknown keys"
        if isinstance(rest, dict):
            walk(rest, f"{path}.*")

    walk(SCHEMA, "")


def test_the_default_configuration_needs_nothing_but_its_models_and_facts(monkeypatch):
    monkeypatch.chdir(ROOT)
    found, relations = config.resolve(DEFAULT, SCHEMA, "config/config.yaml")
    assert sum(config.is_moe(model) for model in found["models"].values()) == 3
    assert len(relations["facts"]) >= 16

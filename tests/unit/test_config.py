"""Bad configurations get sentences: file, key, value and mend, all of them at once."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from moescope import config, published, sources

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text())
TABLE = {"format": "table", "path": "towns.csv"}
COLUMNS = {"subject": "country", "object": "capital", "template": "text"}
FOLDER = {"folder": "model", "kind": "moe"}
HUB = {"hub": "owner/model", "kind": "moe"}
DENSE = {"toy": {"architecture": "llama", "layers": 4, "ffn_width": 128}}


def errors_of(change, fact_folder):
    raw = copy.deepcopy(DEFAULT)
    raw["datasets"]["facts"]["path"] = str(fact_folder)
    change(raw)
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(raw, SCHEMA, "config.yaml")
    return caught.value.errors


MOE = {"architecture": "olmoe", "layers": 3, "experts": 8, "experts_per_token": 4, "expert_width": 8}
TWO = {"experts_per_token": 2}


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


def model(**settings):
    return put("models.mine", settings)


def dataset(**settings):
    return put("datasets.mine", settings)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with files of public data sets, and a folder that a model could be in."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("towns.csv").write_text("country,capital,text\nFrance,Paris,The capital of {} is\n")
    Path("nothing.csv").write_text("country,capital,text\n")
    Path("lre/factual").mkdir(parents=True)
    relation = {"prompt_templates": ["The capital of {} is"], "samples": [{"subject": "France", "object": "Paris"}]}
    Path("lre/factual/country_capital_city.json").write_text(json.dumps(relation))


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
        (put("datasets.tables", {}), "datasets: 'tables' has a meaning of its own in the folder of results; choose"),
        (put("toy_training.dataset", "fact"), "toy_training.dataset: 'fact' is not a data set; did you mean 'facts'?"),
        (put("datasets.facts.path", "nowhere"), "datasets.facts.path: 'nowhere' holds no fact file (*.yaml)"),
        (put("datasets.facts.relations", ["../x"]), "datasets.facts.relations: '../x' is not a usable name"),
        (put("datasets.facts.relations", ["country_capitol"]), "country_capitol.yaml: no such fact file"),
        (put("tasks", ["entity"]), "country_capital.yaml:2: task: 'geography' is not a known task; known: entity"),
        (put("models", None), "models: None is not of type object"),
        (put("models", {1: DENSE}), "config.yaml: models: 1 is not text; write the name in quotes, or choose another"),
        (
            put("models", {"source": DENSE}),
            "models: 'source' has a meaning of its own in the folder of results; choose",
        ),
        (put("utilization.share", 0), "utilization.share: 0 must be more than 0"),
        (put("utilization.scor", "normed"), "utilization.scor: not a known key; did you mean 'score'?"),
        (put("texts.sums", {"path": "towns.csv"}), "texts.sums.prompt: missing; The prompt, with columns in braces"),
        (put("texts.sums", {"prompt": "{a}"}), "texts.sums: no path given; give path or hub"),
        (put("texts.sums", {"prompt": "{a}", "path": "no.csv"}), "no.csv"),
        (
            put("texts.facts", {"prompt": "{country}", "path": "towns.csv"}),
            "texts.facts: is also the name of a data set",
        ),
        (put("models.toy-olmoe.checkpoints", {"../x": 1}), "checkpoints: '../x' is not a usable name of a checkpoint"),
        (put("models.toy-olmoe.checkpoints", {"final": 1}), "checkpoints: 'final' has a meaning of its own"),
        (
            put("models.toy-olmoe.checkpoint_revisions", {"a": "main"}),
            "models.toy-olmoe.checkpoint_revisions: only a model of the hub has them; remove the key",
        ),
        (
            put("models", {"a": {"hub": "o/a", "kind": "moe", "checkpoint_revisions": {"b": "main"}}}),
            "models.a.checkpoint_revisions: 'b' is none of its checkpoints; add it there, with its training step",
        ),
        (
            put("models", {"mine": {"folder": "model", "kind": "moe", "checkpoints": {"a": 1}}}),
            "models.mine.checkpoints: a folder holds one state of a model; give a hub model, or a toy",
        ),
        (put("families.k", {"base": MOE, "variants": {"a": {}}}), "families.k.variants: "),
        (
            put("families.k", {"base": MOE, "variants": {"a/b": {}, "c": {}}}),
            "families.k.variants: 'a/b' is not a usable",
        ),
        (
            put("families.k", {"base": MOE, "variants": {"few": {"expert": 4}, "many": {}}, "seeds": [1]}),
            "models.k-few-1.toy.expert: not a known key; did you mean 'experts'?",
        ),
        (
            put("families.k", {"base": MOE, "variants": {"few": {"experts": 2}, "many": {}}, "seeds": [1]}),
            "models.k-few-1.toy.experts_per_token: 4 is more than the 2 experts",
        ),
        (
            put("lens.norm", "real"),
            "config.yaml: lens.norm: 'real' is not a known value; known: fixed, recomputed, reference",
        ),
        (drop("models"), "config.yaml: models: missing; Models by name."),
    ],
)
def test_each_error_is_a_sentence(fact_folder, change, sentence):
    found = errors_of(change, fact_folder)
    assert any(sentence in error for error in found), found
    assert len(found) <= 2, found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (DENSE | {"hub": "a/b"}, "mine: toy and hub given; give just one of toy, hub, folder"),
        (HUB | FOLDER, "mine: hub and folder given; give just one of toy, hub, folder"),
        ({}, "mine: nothing given; give just one of toy, hub, folder"),
        ({"folder": "model"}, "mine.kind: missing; say moe or dense, so that the jobs are known before the model is"),
        (DENSE | {"kind": "dense"}, "mine.kind: a toy model says it by its architecture; remove it"),
        (HUB | {"kind": "sparse"}, "mine.kind: 'sparse' is not a known value; known: moe, dense"),
        (FOLDER | {"folder": "modl"}, "mine.folder: 'modl' is not a folder; mend the path, which is relative to the"),
        (FOLDER | {"folder": "towns.csv"}, "mine.folder: 'towns.csv' is not a folder; mend the path"),
        (
            HUB | {"hub": "a/b/c"},
            "mine.hub: 'a/b/c' is not the name of a repository of the hub; write it as owner/name",
        ),
        (HUB | {"revision": ""}, "mine.revision: empty; fill it in, or remove the key"),
        (HUB | {"revision": 1234567}, "mine.revision: 1234567 is not of type string; Commit, tag or branch of the hub"),
        (FOLDER | {"revision": "v2"}, "mine.revision: only a model of the hub has one; remove it"),
        (
            FOLDER | {"dtype": "fp16"},
            "mine.dtype: 'fp16' is not a known value; known: auto, float32, bfloat16, float16",
        ),
        (
            FOLDER | {"trust_remote_code": "yes"},
            "mine.trust_remote_code: 'yes' is not of type boolean; Run Python code",
        ),
        (FOLDER | {"published": "OLMoe"}, "mine.published: 'OLMoe' is not a known value; did you mean 'OLMoE'?"),
        (FOLDER | {"memory_gb": 0}, "mine.memory_gb: 0 must be more than 0"),
        (FOLDER | {"gpus": 0}, "mine.gpus: 0 is too small; at least 1 is needed"),
        (
            FOLDER | {"gpus": 2, "device": "cuda"},
            "mine.gpus: 2 asked for, but device cuda is one GPU; set device to auto",
        ),
        (FOLDER | {"max_memory": {0: "40GiB"}}, "mine.max_memory: only means something with device auto, not cpu"),
        (
            FOLDER | {"device": "auto", "max_memory": {"gpu": "40GiB"}},
            "mine.max_memory: 'gpu' is neither a device (the number of a GPU, or cpu) nor a size (such as 40GiB); mend",
        ),
        (FOLDER | {"device": "auto", "max_memory": {0: "all"}}, "mine.max_memory.0: 'all' is neither a device"),
        (FOLDER | {"dense_partner": "toy-lama"}, "dense_partner: 'toy-lama' is not a model; did you mean 'toy-llama'?"),
        (FOLDER | {"kind": "dense", "dense_partner": "toy-llama"}, "'mine' is dense itself; only a Mixture-of-Experts"),
    ],
)
def test_each_error_of_a_model_is_one_sentence(fact_folder, settings, sentence):
    [found] = errors_of(model(**settings), fact_folder)
    assert found.startswith("config.yaml: models.mine")
    assert sentence in found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (TABLE | {"columns": COLUMNS, "format": "csv"}, "mine.format: 'csv' is not a known value; known: facts, lre, "),
        ({"format": "lre"}, "mine: no path given; give path or hub"),
        ({"format": "lre", "path": "lre", "hub": "a/b"}, "mine: both path and hub given; give path or hub"),
        ({"format": "lre", "hub": "a b"}, "mine.hub: 'a b' is not the name of a repository of the hub"),
        ({"hub": "a/b"}, "mine.hub: fact files are local; give the folder as path, or the format of 'a/b'"),
        ({"format": "lre", "path": "lrre"}, "mine: lrre: no such file or folder; mend the path, or put the data set"),
        (TABLE | {"columns": COLUMNS, "path": "nothing.csv"}, "mine: nothing.csv: holds no record; give a file with"),
        (
            TABLE | {"columns": COLUMNS | {"object": "captial"}},
            "mine: towns.csv: columns.object: no column 'captial'; did you mean 'capital'?",
        ),
        (TABLE | {"columns": COLUMNS | {"sbject": "x"}}, "columns.sbject: not a known key; did you mean 'subject'?"),
        (
            TABLE | {"columns": {"subject": "country", "object": "capital"}},
            "mine: towns.csv: columns: give one of prompt (its full text) and template (with {} for the subject)",
        ),
        (
            {"format": "popqa", "path": "towns.csv"},
            "towns.csv: format popqa: no column 'subj'; known: country, capital",
        ),
        (
            {"format": "lre", "path": "lre", "columns": COLUMNS},
            "mine.columns: format lre has columns of its own; use format table, or remove columns",
        ),
        (
            {"format": "lre", "path": "lre", "relations": ["country_capital"]},
            "mine: lre: relations: no relation 'country_capital'; did you mean 'country_capital_city'?",
        ),
        (
            {"format": "lre", "path": "lre", "preset": "ka"},
            "mine: lre: relations: no relation 'object_superclass'; known: country_capital_city",
        ),
        (
            {"format": "lre", "path": "lre", "preset": "kaa"},
            "mine.preset: 'kaa' is not a known value; did you mean 'ka'?",
        ),
        (
            {"format": "lre", "path": "lre", "preset": "ka", "relations": ["country_capital_city"]},
            "mine.relations: preset names relations already; remove one of the two",
        ),
        ({"preset": "ka"}, "mine.preset: 'ka' names LRE relations; use it with format lre, or list relations"),
        (
            {"format": "lre", "path": "lre", "templates": "held_out"},
            "mine.templates: a public data set has no held_out templates; remove the key",
        ),
        (
            {"format": "lre", "path": "lre", "revision": "v2"},
            "mine.revision: only a data set of the hub has one; remove",
        ),
        ({"format": "lre", "path": "lre", "files": "*.json"}, "mine.files: only a data set of the hub has one; remove"),
        ({"answer": "first"}, "mine.answer: 'first' is not a known value; did you mean 'first_token'?"),
        ({"known": -1}, "mine.known: -1 is too small; at least 0 is needed"),
        ({"known": "10"}, "mine.known: '10' is not of type integer; Keep only prompts whose target has at most this"),
    ],
)
def test_each_error_of_a_data_set_is_a_sentence(fact_folder, settings, sentence):
    own = {"path": str(fact_folder)} if settings.keys() <= {"preset", "answer", "known"} else {}
    found = errors_of(dataset(**own, **settings), fact_folder)
    assert any(sentence in error for error in found), found
    assert all("datasets.mine" in error for error in found)
    # One sentence for each column, and for each relation, that is not there.
    several = settings.get("format") == "popqa" or settings.get("preset") == "ka"
    assert len(found) == 1 or several, found


@pytest.mark.usefixtures("here")
def test_toys_learn_fact_files_and_no_public_data_set(fact_folder):
    def change(raw):
        raw["datasets"]["towns"] = TABLE | {"columns": COLUMNS}
        raw["toy_training"] = {"dataset": "towns"}

    sentence = "toy_training.dataset: 'towns' has no held-out templates; name a data set of fact files"
    assert errors_of(change, fact_folder) == [f"config.yaml: {sentence}"]


@pytest.mark.usefixtures("here")
def test_without_toys_and_fact_files_nothing_is_asked_of_them():
    Path("lre/.git").mkdir()
    Path("lre/.git/index").write_text("")
    raw = {
        "datasets": {
            "lre": {"format": "lre", "path": "lre", "relations": ["country_capital_city"]},
            "towns": TABLE | {"columns": COLUMNS},
            "far": {"format": "popqa", "hub": "owner/facts", "revision": "v1", "files": "*.tsv", "preset": "ka"},
        },
        "models": {
            "folder": FOLDER | {"dense_partner": "hub"},
            "hub": HUB | {"kind": "dense", "device": "auto", "gpus": 2, "max_memory": {0: "40GiB", "cpu": "100 GB"}},
        },
    }
    found, relations = config.resolve(raw, SCHEMA, "config.yaml")
    assert relations == {}
    lre, towns, far = found["datasets"].values()
    assert (lre["templates"], lre["answer"], lre["known"]) == ("all", "first_token", 0)
    assert [config.is_moe(model) for model in found["models"].values()] == [True, False]
    # As YAML reads it, the GPU is a number; as a setting it can be sorted and recorded.
    assert found["models"]["hub"]["max_memory"] == {"0": "40GiB", "cpu": "100 GB"}
    assert config.source_files(lre, Path("x")) == [Path("lre/factual/country_capital_city.json")]
    assert config.source_files(towns, Path("x")) == [Path("towns.csv")]
    assert config.source_files(far, Path("results/far/source.json")) == [Path("results/far/source.json")]
    assert config.wanted_relations(lre) == ["country_capital_city"]
    assert config.wanted_relations(far)[1] == "country_capital_city"


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
    raw["datasets"]["facts"]["path"] = str(fact_folder)
    before = copy.deepcopy(raw)
    found, relations = config.resolve(raw, SCHEMA, "config.yaml")
    assert raw == before
    assert found["blocking"] == {"top": [1, 5, 10], "random_draws": 20, "how": ["zero"]}
    assert found["models"]["toy-llama"]["dense_partner"] == ""
    assert found["models"]["toy-llama"]["toy"] == {"architecture": "llama", "layers": 4, "ffn_width": 128} | {
        "shared_width": 0,
        "load_balancing": 0.01,
        "seed": 0,
    }
    assert [r.name for r in relations["facts"]] == ["country_capital", "fruit_inside_color"]


def test_every_key_of_the_schema_is_described_and_optional_ones_have_defaults():
    # Keys that only some entries have: a toy's shape, one of several sources, a table's columns.
    some = {*config.MOE_SHAPE, *config.DENSE_SHAPE, *config.SOURCES, *sources.WORDS, "path", "kind", "templates"}

    def walk(schema, path):
        for key, sub in schema.get("properties", {}).items():
            assert sub.get("description"), f"{path}.{key}"
            assert "default" in sub or key in {*schema.get("required", []), *some}, f"{path}.{key}"
            walk(sub, f"{path}.{key}")
        rest = schema.get("additionalProperties")
        if schema.get("type") == "object":
            assert rest is not None, f"{path} accepts unknown keys"
        if isinstance(rest, dict):
            walk(rest, f"{path}.*")

    walk(SCHEMA, "")


def test_what_a_key_allows_is_what_the_code_knows():
    datasets, models = (
        SCHEMA["properties"][section]["additionalProperties"]["properties"] for section in config.SECTIONS
    )
    assert datasets["format"]["enum"] == ["facts", *sources.FORMATS]
    assert datasets["preset"]["enum"] == ["", *sources.PRESETS]
    assert list(datasets["columns"]["properties"]) == list(sources.WORDS)
    assert models["published"]["enum"] == ["", *published.MODELS]


def test_families_are_expanded_into_models_that_differ_in_what_their_variants_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"datasets": {"facts": {}}, "families": {"k": {"base": MOE, "variants": {"two": TWO, "four": {}}}}}
    found, _ = config.resolve(given, SCHEMA, "config.yaml")
    members = config.family_members(found)
    assert list(members) == [f"k-{variant}-{seed}" for variant in ("two", "four") for seed in (0, 1, 2)]
    assert list(found["models"]) == list(members)
    assert members["k-two-1"] == {"family": "k", "variant": "two", "seed": 1, "toy": {**MOE, **TWO, "seed": 1}}
    two, four = (found["models"][f"k-{variant}-2"]["toy"] for variant in ("two", "four"))
    assert {key for key in two if two[key] != four[key]} == {"experts_per_token"}


def test_a_family_cannot_hide_a_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    family = {"base": MOE, "variants": {"two": TWO, "four": {}}, "seeds": [0]}
    given = {"datasets": {"facts": {}}, "models": {"k-two-0": {"toy": MOE}}, "families": {"k": family}}
    with pytest.raises(config.ConfigError, match=r"families\.k: its model 'k-two-0' is also one of models; rename one"):
        config.resolve(given, SCHEMA, "config.yaml")


def test_the_default_configuration_needs_nothing_but_its_models_and_facts(monkeypatch):
    monkeypatch.chdir(ROOT)
    found, relations = config.resolve(DEFAULT, SCHEMA, "config/config.yaml")
    assert sum(config.is_moe(model) for model in found["models"].values()) == 3
    assert len(relations["facts"]) >= 16


def test_the_configuration_of_the_paper_pairs_its_models_and_prints_its_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    paper = yaml.safe_load((ROOT / "config/paper.yaml").read_text())
    found, relations = config.resolve(paper, SCHEMA, "config/paper.yaml")
    models = found["models"]
    pairs = {
        model["published"]: models[model["dense_partner"]]["published"]
        for model in models.values()
        if config.is_moe(model)
    }
    assert pairs == {"Qwen1.5-MoE": "Qwen1.5-7B", "OLMoE": "Llama-7B", "Mixtral-8x7B": "Mistral-7B"}
    assert len(relations["ka"]) == len(sources.PRESETS["ka"]) == 5

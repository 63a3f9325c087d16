"""Whole runs of checkpoints that were not trained here, on public facts; what is refused; the models of the paper."""

import os
import re
import shutil

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, MiniMaxConfig, PreTrainedTokenizerFast

from moescope import artifacts, sources

import small

CONFIG = {
    "datasets": {"lre": {"format": "lre", "path": "data/lre", "preset": "ka"}},
    "models": {
        "moe": {"folder": "models/moe", "kind": "moe", "dense_partner": "dense"},
        "dense": {"folder": "models/dense", "kind": "dense"},
    },
    "blocking": {"top": [1], "random_draws": 2},
    "keep_only": {"top": [1]},
    "head_blocking": {"top": [1], "random_draws": 2},
    "gate_gradients": {"prompts": 5, "steps": 4},
    "associations": {"permutations": 20},
    "tracing": {"n_prompts": 5, "draws": 1, "coalitions": [1]},
    "utilization": {"share": 0.02},
    "masking": {"shares": [0.02], "experts": [1], "random_draws": 1},
    "statistics": {"bootstrap_draws": 100},
    "batch_size": 8,
}
HUB = CONFIG | {"models": CONFIG["models"] | {"hub": {"hub": "owner/moe", "kind": "moe", "dense_partner": "dense"}}}
LEVELS = ["layers", "heads", "experts", "margins"]
OF_THE_HUB = [f"results/lre/hub/attribution/{level}.parquet" for level in LEVELS]
# Every layer but the first has experts.
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
SUMMARIES = {
    f"summarise_{name}"
    for name in (
        *("attribution", "neurons", "heads", "interventions", "steering", "routing"),
        *("utilization", "key_scores", "masking"),
    )
}
NEURONS = {"attribute_neurons", "attribute_queries", "read_units"}
HEADS = {"sweep_heads", "block_heads", "trace_causes"}
EXPERTS = {"block_experts", "keep_only", "map_experts", "trace_gates"}
ROUTING = {"analyse_routing", "attribute_routers"}
KEYS = {"find_key_neurons", "mask_keys"}
# One table of each summary that the models of folders are run to; it comes with all of its summary.
TABLES = [f"results/tables/{name}.csv" for name in ("efficiency", "neurons", "blocking", "routing")]
OF_THE_MOE = {
    *["capture", "gather_prompts", "filter_known", "attribute", *NEURONS, "analyse_routing"],
    *["block_experts", "keep_only", "map_experts"],
    *(f"summarise_{name}" for name in ("attribution", "neurons", "interventions", "routing")),
}
OF_ALL = {
    *["efficiency", "stages", "gains", "heads", "neurons", "concentration", "additivity", "relation_neurons"],
    *["unit_readings", "queries"],
}
"""Tables that dense models have rows in."""


def checkpoint(folder, tokenizer, architecture, dtype="float32", **settings):
    """An untrained checkpoint of a real class, in several files."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    settings = {"vocab_size": len(tokenizer), **sizes, **heads, **settings}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory, tokenizer):
    """Two models to some of their tables; the weights of one, from the hub, to the attribution of units."""
    folder = small.make(tmp_path_factory.mktemp("real") / "run", CONFIG)
    small.lre(folder / "data/lre")
    checkpoint(folder / "models/moe", tokenizer, "qwen3_moe", **MOE)
    checkpoint(folder / "models/dense", tokenizer, "llama", dtype="bfloat16")
    small.cached(folder / "models/moe", folder / "home", "owner/moe")
    small.snakemake(folder, *TABLES)
    small.snakemake(small.configure(folder, HUB), *OF_THE_HUB)
    return folder


@pytest.fixture
def copy_of_real(real, tmp_path):
    """A copy that a test may change, times kept."""
    return shutil.copytree(real, tmp_path / "run", symlinks=True)


def described(folder, model):
    return artifacts.read_json(folder / f"results/models/{model}/model.json")


def test_a_model_is_described_by_its_files_and_what_was_foreseen(real):
    moe, dense, hub = (described(real, name) for name in ("moe", "dense", "hub"))
    assert len([name for name in moe["files"] if name.endswith(".safetensors")]) > 5
    assert (moe["source"], moe["folder"], moe["architecture"]) == ("folder", "models/moe", "Qwen3MoeForCausalLM")
    foreseen = {"layers": 3, "with_heads": 3, "with_shared_experts": 0, "reasons": []}
    assert moe["foreseen"] == foreseen | {"with_experts": 2, "with_dense_neurons": 1}
    assert dense["foreseen"] == foreseen | {"with_experts": 0, "with_dense_neurons": 3}
    # Of the hub's revision the commit is recorded, once and for all.
    of_the_hub = {"source": "hub", "hub": "owner/moe", "requested": "main", "commit": small.COMMIT, "folder": ""}
    assert hub == moe | of_the_hub


def test_every_artifact_names_the_model_the_dtype_and_the_data(real):
    expected = {"moe": "float32", "hub": "float32", "dense": "bfloat16"}
    for model, dtype in expected.items():
        found = artifacts.table_provenance(real / f"results/lre/{model}/prompts.parquet")
        assert (found["model_commit"], found["dtype"]) == (described(real, model)["commit"], dtype)
        assert found["dataset_digest"]
        captured = artifacts.table_provenance(real / f"results/lre/{model}/activations/0.parquet")
        # A miniature is believed until the model itself has run.
        assert captured["levels"] == described(real, model)["foreseen"]
        assert captured["verified"]
    sources_of = artifacts.table_provenance(real / "results/tables/efficiency.parquet")["sources"]
    assert [source["dtype"] for source in sources_of] == [expected[model] for model in CONFIG["models"]]
    assert [source["model_commit"] for source in sources_of] == [
        described(real, model)["commit"] for model in CONFIG["models"]
    ]


def test_the_prompts_are_those_of_the_relations_asked_for(real):
    table = artifacts.read_table(real / "results/lre/dataset.parquet", "dataset")
    assert list(dict.fromkeys(table["relation"])) == list(sources.PRESETS["ka"])
    assert dict(zip(table["relation"], table["task"])) == sources.KA_TASKS
    assert artifacts.read_json(real / "results/lre/reading.json") == {"records": 20, "rows": 20}
    for model in HUB["models"]:
        prompts = artifacts.read_table(real / f"results/lre/{model}/prompts.parquet", "prompts")
        assert prompts["prompt"].tolist() == table["prompt"].tolist()


def test_the_tables_have_every_model_and_only_layers_with_experts(real):
    tables = small.tables(real)
    assert len(tables) == 23
    for name, table in tables.items():
        assert set(table["model"]) == {"moe"} | ({"dense"} if name in OF_ALL else set()), name
        # Some pairs of experts never meet.
        counted = ["prompts", "subjects"]
        estimates = [] if name == "coactivation" else ["estimate", "low", "high"]
        shown = [column for column in (*estimates, *counted) if column in table]
        assert not table[shown].isna().any(axis=None), name
    for name in ("experts", "near_ties", "expert_map", "mutual_information"):
        assert set(tables[name]["layer"]) == {1, 2}
    assert set(tables["heads"]["layer"]) == {0, 1, 2}
    efficiency = tables["efficiency"].fillna("")
    assert set(zip(efficiency["model"], efficiency["kind"], efficiency["minus"])) == {
        ("moe", "moe", ""),
        ("dense", "dense", ""),
        ("moe", "moe", "dense"),
    }


def test_a_model_of_the_hub_gives_what_the_same_weights_in_a_folder_give(real):
    for level in LEVELS:
        moe, hub = (
            artifacts.read_table(real / f"results/lre/{model}/attribution/{level}.parquet", level)
            for model in ("moe", "hub")
        )
        assert len(moe)
        pd.testing.assert_frame_equal(moe, hub, check_exact=True, obj=level)


def test_a_second_run_does_nothing_even_where_the_revision_has_moved(real):
    (real / "home/hub/models--owner--moe/refs/main").write_text("f" * 40)
    assert small.planned(real, *OF_THE_HUB) == {}


def test_of_a_folder_only_what_is_loaded_counts_and_only_its_content(copy_of_real):
    small.configure(copy_of_real, CONFIG)
    folder = copy_of_real / "models/moe"
    (folder / "README.md").write_text("about")
    for path in folder.iterdir():
        os.utime(path)
    assert small.planned(copy_of_real, *TABLES) == {}
    # Snakemake compares the contents of small files only: a touched large one counts as changed.
    assert small.planned(copy_of_real, *TABLES, "--max-checksum-file-size", "1000")["describe_model"] == 1
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert small.planned(copy_of_real, *TABLES) == dict.fromkeys({"describe_model", *OF_THE_MOE}, 1)
    small.snakemake(copy_of_real, "results/lre/moe/activations/index.json")
    before, after = described(copy_of_real, "hub"), described(copy_of_real, "moe")
    assert {name for name, sha in after["files"].items() if sha != before["files"][name]} == {"config.json"}
    made_by = artifacts.table_provenance(copy_of_real / "results/lre/moe/captured.parquet")
    assert made_by["model_commit"] == after["commit"]


# What is refused, all of it by one run.


def with_config(folder, source, config):
    """A checkpoint whose configuration says that it is of another family."""
    shutil.copytree(source, folder)
    config.save_pretrained(folder)


def greek():
    """A tokenizer that has no token for a Latin letter, and none for what it does not know."""
    letters = {letter: number for number, letter in enumerate("αβγδε")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])))


REFUSED = {
    # model: rule, sentence
    "dense": ("describe_model", "kind: moe, but no routed experts"),
    "bert": (
        "describe_model",
        "models/bert/config.json: BertForMaskedLM is no causal language model; give a model that",
    ),
    "minimax": (
        "describe_model",
        "layer 0: its output is not the residual stream plus outputs of its modules; this structure of the residual"
        " stream is not understood",
    ),
    "uncached": ("describe_model", "owner/nothing: cannot be fetched, and is not whole in the local cache ("),
    "foreign": (
        "capture",
        "but the model has 300 embeddings; this is the tokenizer of another model, put the right one",
    ),
    "greek": (
        "capture",
        "none of the 20 prompts can be used, for 20 of them because the object '...' has no token of its own; write the"
        " objects in characters that the tokenizer keeps",
    ),
}


@pytest.fixture(scope="module")
def refused(real, tokenizer, tmp_path_factory):
    """A run in which every model is refused: its folder, and what it printed."""
    folder = small.make(tmp_path_factory.mktemp("refused") / "run")
    small.lre(folder / "data/lre")
    dense = shutil.copytree(real / "models/dense", folder / "models/dense")
    with_config(folder / "models/bert", dense, BertConfig(architectures=["BertForMaskedLM"]))
    with_config(folder / "models/minimax", dense, MiniMaxConfig())
    checkpoint(folder / "models/foreign", tokenizer, "llama", vocab_size=300)
    checkpoint(folder / "models/greek", greek(), "llama")
    models = {name: {"folder": f"models/{name}", "kind": "dense"} for name in REFUSED if name != "uncached"}
    models |= {"uncached": {"hub": "owner/nothing", "kind": "dense"}}
    for name in ("dense", "minimax"):
        models[name]["kind"] = "moe"
    small.configure(folder, CONFIG | {"models": models})
    return folder, small.snakemake(folder, "activations", "--keep-going", check=False)


@pytest.mark.parametrize("model", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(refused, model):
    folder, printed = refused
    rule, sentence = REFUSED[model]
    place = "capture/lre/{}/0" if rule == "capture" else "describe_model/{}"
    log = (folder / f"results/logs/{place.format(model)}.log").read_text()
    [critical] = re.findall(r"^.* CRITICAL (.*)$", log, re.M)
    assert sentence in critical
    assert critical in printed
    assert (folder / f"results/models/{model}/model.json").exists() == (rule == "capture")
    assert not list((folder / f"results/lre/{model}").rglob("*.*"))
    if rule == "describe_model":
        assert not (folder / f"results/logs/capture/lre/{model}").exists()


def test_revisions_of_a_hub_model_are_states_of_its_training(copy_of_real):
    refs = copy_of_real / "home/hub/models--owner--moe/refs"
    (refs / "step1").write_text(small.COMMIT)
    hub = HUB["models"]["hub"] | {"checkpoints": {"early": 7}, "checkpoint_revisions": {"early": "step1"}}
    small.configure(copy_of_real, HUB | {"models": HUB["models"] | {"hub": hub}})
    target = "results/lre/hub/training/checkpoints.parquet"
    planned = small.planned(copy_of_real, target)
    assert planned == {"describe_checkpoint": 1, "measure_checkpoint": 1, "gather_checkpoints": 1}
    small.snakemake(copy_of_real, target)
    described = artifacts.read_json(copy_of_real / "results/models/hub/checkpoints/early/model.json")
    assert (described["requested"], described["commit"]) == ("step1", small.COMMIT)
    table = artifacts.read_table(copy_of_real / target, "checkpoints")
    prompts = artifacts.read_table(copy_of_real / "results/lre/hub/prompts.parquet", "prompts")
    # The same weights as those of the finished model.
    assert table["rank"].tolist() == prompts["rank"].tolist()
    assert set(zip(table["checkpoint"], table["step"])) == {("early", 7)}


# The models of the paper.


def test_the_models_of_the_paper_are_planned_as_configured(tmp_path):
    folder = small.make(tmp_path / "run")
    arguments = ("--configfile", "config/paper.yaml", "--replace-workflow-config")
    text = small.snakemake(folder, *arguments, "--resources", "gpu=2", "--dry-run")
    jobs = re.findall(r"^(?:local)?rule (\w+):\n((?: {4}.*\n)*)", text, re.M)
    gpus = {}
    for rule, body in jobs:
        model, asked = re.search(r"model=([\w.-]+)", body), re.search(r"gpu=(\d)", body)
        if asked:
            gpus.setdefault(model[1], []).append((rule, int(asked[1])))
    dense = sorted([("attribute_queries", 1), *[(rule, 1) for rule in ("capture", *HEADS, *KEYS)] * 4])
    moe = sorted([*dense, *[(rule, 1) for rule in EXPERTS] * 4])
    assert {model: sorted(asked) for model, asked in gpus.items()} == {
        **dict.fromkeys(("qwen-moe", "olmoe"), moe),
        **dict.fromkeys(("qwen-7b", "llama-7b", "mistral-7b"), dense),
        "mixtral-8x7b": [(rule, 2) for rule, _ in moe],
    }
    assert "mem_mb=128000" in text
    counted = pd.Series([rule for rule, _ in jobs]).value_counts().to_dict()
    each = dict.fromkeys(("describe_model", "gather_prompts", "filter_known", "attribute", *NEURONS), 6)
    each |= dict.fromkeys(("capture", *HEADS, *KEYS), 4 * 6) | dict.fromkeys(EXPERTS, 4 * 3) | dict.fromkeys(ROUTING, 3)
    # Head_map, head_blocking and two of tracing, three of key neurons, masking; of MoE models five of experts and
    # head_router. What was chosen is gathered where it is asked for.
    each |= {"write_dataset": 1, "gather_shards": 8 * 6 + 6 * 3}
    assert counted.items() >= (each | dict.fromkeys(SUMMARIES, 1)).items()
    others = {"all", "write_provenance", *(name for name in counted if name.startswith("plot_"))}
    assert set(counted) - each.keys() - SUMMARIES == others


def test_the_models_of_the_paper_are_planned_on_its_own_relations(tmp_path):
    folder = small.make(tmp_path / "run")
    small.lre(folder / "data/lre")
    paper = (folder / "config/paper.yaml").read_text()
    [variant] = re.findall(r"# (ka: {format: lre.*})", paper)
    own = paper[paper.index("  ka:\n") : paper.index("  # The paper's own facts")]
    written = paper.replace(own, f"  {variant.replace('<folder of LRE files>', 'data/lre')}\n")
    (folder / "mine.yaml").write_text(written)
    planned = small.planned(folder, "activations", "--configfile", "mine.yaml", "--replace-workflow-config")
    jobs = {"write_dataset": 1, "describe_model": 6, "capture": 24, "gather_prompts": 6, "filter_known": 6}
    assert planned == jobs

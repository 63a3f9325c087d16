"""Rule by rule, in one run of Snakemake on the small toy models: its outputs hold what its contract says.

On a cluster all but the light rules run again, each job in a Snakemake of its own, to the same tables (see
tests/workflow/test_slurm.py); the light ones do below.
"""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from benchmarks import kills
from pyroaring import BitMap
from safetensors import safe_open

from moescope import artifacts, config

import small

RESULTS = "results/facts/small-moe"
FIGURES = [
    *["gains", "stages", "efficiency", "heads", "experts", "expert_curves"],
    *["neurons", "concentration", "additivity", "queries", "blocking", "keep_only"],
    *["contrasts", "expert_map", "faithfulness", "head_map", "head_blocking", "tracing"],
    *["routing", "mutual_information", "expert_use", "task_overlap"],
    *["router_attribution", "associations", "head_router", "gate_gradients"],
    *["utilization", "rarefaction", "key_experts", "key_overlap", "key_scores", "diversity", "masking", "training"],
]
PLOTTED = [
    *["attribution", "neurons", "heads", "interventions", "steering", "routing"],
    *["utilization", "key_scores", "masking", "training"],
]


def prompts_of(folder):
    return artifacts.read_table(folder / RESULTS / "prompts.parquet", "prompts")


def tables_of(folder, stage, *kinds):
    return [artifacts.read_table(folder / RESULTS / stage / f"{kind}.parquet", kind) for kind in kinds]


def test_write_dataset(finished):
    path = finished / "results/facts/dataset.parquet"
    table = artifacts.read_table(path, "dataset")
    assert set(table["relation"]) == {"animal_young", "country_capital", "product_by_company"}
    assert table.groupby("fact_id").size().eq(5).all()
    assert len(artifacts.table_provenance(path)["dataset_digest"]) == 16


AGAIN = {"train_toy", "capture", *(f"plot_{name}" for name in PLOTTED)}


@pytest.fixture(scope="module")
def remade(finished, tmp_path_factory):
    """The finished run, in which a model was trained, a cache captured and all figures drawn a second time."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("again") / "run", symlinks=True)
    files = [file for file, job in kills.records(folder).items() if job["rule"] in AGAIN]
    files = [file for file in files if ("small-dense" in file) == ("models" in file)]
    for file in files:
        kills.remove(folder / file)
    small.snakemake(folder, *files, "--allowed-rules", *AGAIN)
    return folder


def test_train_toy(remade, finished):
    files = [f"results/models/small-dense/{file}" for file in config.CHECKPOINT_FILES]
    paths = [remade / file for file in files]
    for path, file in zip(paths, files):
        if path.name != "training.json":
            assert path.read_bytes() == (finished / file).read_bytes(), file
    report = json.loads(paths[-1].read_text())
    assert report["model"] == "small-dense"
    assert report["mrr_without"]["ffn"] < 0.5
    described = json.loads(paths[0].read_text())
    assert (described["source"], described["folder"]) == ("toy", "results/models/small-dense")
    assert set(described["files"]) == set(config.CHECKPOINT_FILES) - {"model.json", "training.json"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = paths[0].parent
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert len(tokenizer) == model.config.vocab_size


def test_capture(remade, finished):
    names = ["0.safetensors", "0.parquet", "0.dropped.parquet"]
    tensors, prompts, dropped = (remade / f"{RESULTS}/activations/{name}" for name in names)
    table = artifacts.read_table(prompts, "prompts")
    assert len(table) + len(artifacts.read_table(dropped, "dropped")) == 199
    assert table["held_out"].all()
    with safe_open(tensors, "np") as cache, safe_open(finished / RESULTS / "activations/0.safetensors", "np") as before:
        assert cache.keys() == before.keys()
        for name in cache.keys():
            assert np.array_equal(cache.get_tensor(name), before.get_tensor(name)), name
            assert len(cache.get_tensor(name)) == len(table)
        # The cache is written as the prompts run, in batches of equal length.
        assert sorted(cache.get_tensor("prompt_id").tolist()) == table["prompt_id"].tolist()
        assert not cache.get_tensor("step").any()
        per_layer = {name.split(".", 1)[1] for name in cache.keys() if name.startswith("0.")}
    assert per_layer == {
        "resid_pre",
        "resid_mid",
        "head_in",
        "router_logits",
        "router_margin",
        "expert_ids",
        "expert_weights",
        "expert_acts",
        "expert_load",
        "subject_load",
        "shared.0.acts",
        "shared.0.gate",
    }
    found = artifacts.table_provenance(prompts)
    commit = artifacts.read_json(finished / "results/models/small-moe/model.json")["commit"]
    assert (found["model_commit"], found["dtype"], found["device"]) == (commit, "float32", "cpu")
    assert max(found["verified"].values()) < 1e-5
    assert {"settings", "settings_digest", "code_digest", "dataset_digest", "versions", "time"} <= set(found)


@pytest.mark.parametrize("model", ["small-moe", "small-dense"])
def test_a_trained_model_is_read_back_as_it_was(finished, model):
    """Weights, configuration and tokenizer: the clean run has the MRR that training reported."""
    report = json.loads((finished / f"results/models/{model}/training.json").read_text())
    prompts = artifacts.read_table(finished / f"results/facts/{model}/prompts.parquet", "prompts")
    assert (1 / prompts["rank"]).mean() == pytest.approx(report["mrr"])


def test_gather_prompts(finished):
    index = finished / f"{RESULTS}/activations/index.json"
    table = artifacts.read_table(finished / f"{RESULTS}/captured.parquet", "prompts")
    assert table["prompt_id"].is_monotonic_increasing
    assert table["prompt_id"].is_unique
    assert (table["rank"] >= 1).all()
    assert (table["log_prob"] <= 0).all()
    assert all(row.target_id in row.accepted_ids for row in table.itertuples())
    assert all(row.target_ids.tolist() == [row.target_id] for row in table.itertuples())
    found = json.loads(index.read_text())
    assert found["shards"]["0.safetensors"]["resid_final"] == [[len(table), 64], "F32"]
    assert found["provenance"]["model_commit"]


def test_filter_known_keeps_all_by_default(finished):
    kept, unknown, captured = (finished / f"{RESULTS}/{name}.parquet" for name in ("prompts", "unknown", "captured"))
    pd.testing.assert_frame_equal(
        artifacts.read_table(kept, "prompts"), artifacts.read_table(captured, "prompts"), check_exact=True
    )
    assert artifacts.read_table(unknown, "unknown").empty
    named, before = (artifacts.names(artifacts.table_provenance(path)) for path in (kept, captured))
    assert named == before
    assert len(named) == len(artifacts.NAMES)


def test_attribute(finished):
    layers, heads, experts, margins = tables_of(finished, "attribution", "layers", "heads", "experts", "margins")
    n = len(prompts_of(finished))
    assert [len(table) for table in (layers, heads, experts, margins)] == [n * 3, n * 3 * 4, n * 3 * 3, n * 3]
    assert (margins["smallest"] <= margins["margin"]).all()
    assert dict(layers.dtypes.astype(str)) == {
        "prompt_id": "int32",
        "layer": "int16",
        "attention": "float32",
        "ffn": "float32",
    }
    assert dict(experts.dtypes.astype(str)) | {"lpi": "float32", "weight": "float32"} == {
        "prompt_id": "int32",
        "layer": "int16",
        "expert": "int16",
        "lpi": "float32",
        "weight": "float32",
    }
    assert set(experts["expert"]) == {-1, 0, 1, 2, 3}
    assert experts["weight"].between(0, 1).all()


def test_attribute_of_a_dense_model(finished):
    folder = finished / "results/facts/small-dense/attribution"
    assert len(artifacts.read_table(folder / "layers.parquet", "layers"))
    assert not len(artifacts.read_table(folder / "experts.parquet", "experts"))


def test_attribute_neurons(finished):
    kinds = ["neurons", "attention_neurons", "relation_neurons", "concentration", "neuron_sums"]
    tables = dict(zip(kinds, tables_of(finished, "attribution", *kinds)))
    n = len(prompts_of(finished))
    for kind in kinds[:3]:
        assert tables[kind]["exact"].all()
    for kind, unit in (("neurons", "expert"), ("attention_neurons", "head")):
        table = tables[kind]
        assert list(table) == ["prompt_id", "layer", unit, "neuron", "activation", "lpi", "bound", "exact"]
        assert table.groupby("prompt_id").size().between(2, 13).all()
        assert table["prompt_id"].nunique() == n
        assert (table.groupby("prompt_id")["lpi"].diff().dropna() <= 0).all()
    assert set(tables["neurons"]["expert"]) == {-1, 0, 1, 2, 3}
    assert tables["concentration"].groupby("block").size().to_dict() == {"ffn": n, "attention": n}
    # Two routed experts and a shared one, or four heads, in three layers.
    assert tables["neuron_sums"].groupby("block").size().to_dict() == {"ffn": n * 9, "attention": n * 12}
    best = tables["relation_neurons"].groupby(["relation", "block"])["lpi"].max()
    assert len(best) == 6
    [experts] = tables_of(finished, "attribution", "experts")
    both = tables["neuron_sums"].merge(
        experts, left_on=["prompt_id", "layer", "unit"], right_on=["prompt_id", "layer", "expert"]
    )
    assert len(both.query("block == 'ffn'")) == n * 9


def test_attribute_neurons_of_a_dense_model(finished):
    path = finished / "results/facts/small-dense/attribution/neurons.parquet"
    assert set(artifacts.read_table(path, "neurons")["expert"]) == {0}


def test_attribute_queries(finished):
    queries, values = tables_of(finished, "attribution", "queries", "value_layers")
    assert {"embedding", "head", "expert", "head_neuron", "expert_neuron", "rest"} == set(queries["level"])
    # All that was written below the value neurons makes their activations: the scores sum to their LPI.
    units = queries[~queries["level"].str.endswith("neuron")].groupby("prompt_id")[["via_ffn", "via_attention"]].sum()
    lpi = values.groupby(["prompt_id", "block"])["lpi"].sum().unstack(fill_value=0)
    np.testing.assert_allclose(units["via_ffn"], lpi["ffn"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(units["via_attention"], lpi["attention"], rtol=1e-3, atol=1e-3)


def test_read_units(finished):
    [table] = tables_of(finished, "attribution", "readings")
    assert set(table["level"]) == {"expert", "head", "ffn_neuron", "attention_neuron"}
    assert set(table["side"]) == {"promoted", "suppressed"}
    assert table["token"].map(type).eq(str).all()
    assert table.groupby(["relation", "level", "layer", "unit", "neuron", "side"]).size().eq(10).all()


def test_block_experts(finished):
    table, chosen = tables_of(finished, "interventions", "blocking", "blocked_experts")
    prompts = prompts_of(finished)
    # Two sizes, each with the best experts and three random draws, for every prompt.
    assert len(table) == len(prompts) * 2 * 4
    assert set(table["how"]) == {"zero"}
    assert set(table["draw"]) == {-1, 0, 1, 2}
    assert set(table["n_blocked"]) == {1, 2}
    assert len(chosen) == 3 * 2 * 2
    assert (chosen["expert"] >= 0).all()
    assert chosen.groupby(["relation", "half"])["mean_lpi"].is_monotonic_decreasing.all()


def test_keep_only(finished):
    [table] = tables_of(finished, "interventions", "keep_only")
    prompts = prompts_of(finished)
    assert len(table) == len(prompts) * 2 * 3
    everything = table[table["shared"] & (table["routed"] == -1)].set_index("prompt_id").loc[prompts["prompt_id"]]
    assert (everything["rank"].to_numpy() == prompts["rank"].to_numpy()).all()


def test_map_experts(finished):
    [table] = tables_of(finished, "interventions", "expert_map")
    [experts] = tables_of(finished, "attribution", "experts")
    # Every expert that the readout position uses, and no other one.
    keys = ["prompt_id", "layer", "expert"]
    both = table.merge(experts, on=keys, validate="1:1")
    assert len(both) == len(table) == len(experts)
    assert set(table["positions"]) == {"readout"}
    clean = prompts_of(finished).set_index("prompt_id")["log_prob"]
    effect = both["log_prob"] - clean.loc[both["prompt_id"]].to_numpy()
    assert np.corrcoef(effect, -both["lpi"])[0, 1] > 0.3


def test_sweep_heads(finished):
    heads, routers = tables_of(finished, "interventions", "head_map", "head_router")
    n = len(prompts_of(finished))
    # Four heads in each of three layers; the routers of their own layer and those above.
    assert (len(heads), len(routers)) == (n * 12, n * 4 * (3 + 2 + 1))
    assert (routers["router_layer"] >= routers["layer"]).all()
    assert routers["overlap"].between(0, 1).all()
    assert routers[["gate_before", "gate_after"]].stack().between(0, 1 + 1e-6).all()


def test_sweep_heads_of_a_dense_model(finished):
    folder = finished / "results/facts/small-dense/interventions"
    assert len(artifacts.read_table(folder / "head_map.parquet", "head_map"))
    assert not len(artifacts.read_table(folder / "head_router.parquet", "head_router"))


def test_block_heads(finished):
    table, ranking = tables_of(finished, "interventions", "head_blocking", "blocked_heads")
    prompts = prompts_of(finished)
    # The clean run; two sizes, each with the best heads and three random draws, routing free and forced.
    assert len(table) == len(prompts) * (1 + 2 * 4 * 2)
    clean = table[table["n_blocked"] == 0].set_index("prompt_id").loc[prompts["prompt_id"]]
    assert (clean["rank"].to_numpy() == prompts["rank"].to_numpy()).all()
    assert clean["overlap"].eq(1).all()
    assert len(ranking) == 3 * 2 * 2


def test_trace_gates(finished):
    gradients, paths = tables_of(finished, "interventions", "gate_gradients", "gate_paths")
    traced = gradients.groupby(["prompt_id", "router_layer"])["attribution"].sum()
    ends = paths.set_index(["prompt_id", "router_layer"])
    assert 10 <= len(paths) / 3 < 20
    # Exact for the first router, below which nothing jumps.
    first = ends.xs(0, level="router_layer")
    np.testing.assert_allclose(traced.xs(0, level="router_layer"), first["clean"] - first["baseline"], atol=1e-2)


def test_trace_causes(finished):
    table, runs = tables_of(finished, "interventions", "tracing", "tracing_runs")
    levels = {"layer", "attention", "ffn", "expert", "shared", "coalition", "random"}
    assert set(table["level"]) == levels
    assert runs["corrupted"].mean() < runs["clean"].mean()
    last = table[(table["level"] == "layer") & (table["layer"] == 2) & (table["position"] == "readout")]
    both = last.merge(runs, on=["prompt_id", "draw"], suffixes=("", "_run"))
    np.testing.assert_allclose(both["log_prob"], both["clean"], atol=1e-4)


def test_analyse_routing(finished):
    loads, gates = tables_of(finished, "routing", "loads", "gates")
    lengths = prompts_of(finished).set_index("prompt_id")["length"]
    of_prompt = loads.groupby(["prompt_id", "layer"])[["readout", "all"]].sum()
    assert of_prompt["readout"].eq(2).all()
    assert (of_prompt["all"].to_numpy() == 2 * lengths.loc[of_prompt.index.get_level_values(0)].to_numpy()).all()
    assert gates["gate_entropy"].between(0, 2).all()


def test_attribute_routers(finished):
    split, pairs = tables_of(finished, "routing", "router_attribution", "associations")
    assert {"embedding", "head", "expert", "shared"} <= set(split["source"])
    # The sources add up to how far the chosen experts' logits stand above the mean of all.
    with artifacts.open_tensors(finished / RESULTS / "activations/0.safetensors", "activations") as cache:
        for layer in range(3):
            logits, ids = (cache.get_tensor(f"{layer}.{name}") for name in ("router_logits", "expert_ids"))
            pull = logits.gather(1, ids.long()).mean(1) - logits.mean(1)
            expected = pd.Series(pull.numpy(), cache.get_tensor("prompt_id").numpy()).sort_index()
            found = split[split["router_layer"] == layer].groupby("prompt_id")["logit"].sum()
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert pairs["r"].dropna().between(-1, 1).all()
    assert pairs["p"].dropna().ge(1 / 51 - 1e-6).all()


def test_find_key_neurons(finished):
    keys, used, units = tables_of(finished, "utilization", "key_neurons", "expert_tokens", "units")
    prompts = prompts_of(finished)
    assert keys["prompt_id"].tolist() == prompts["prompt_id"].tolist()
    # Three layers of four experts with 16 neurons and a shared one with 32; 2% of them for each token of the answer.
    assert units["width"].sum() == 3 * (4 * 16 + 32)
    for tokens, found in zip(keys["tokens"], keys["keys"]):
        assert 6 <= len(BitMap.deserialize(found)) <= 6 * tokens
    of_shared = used[used["expert"] < 0].groupby("prompt_id")["tokens"].sum()
    assert of_shared.tolist() == (3 * keys["tokens"]).tolist()
    assert used[used["expert"] >= 0].groupby("prompt_id")["tokens"].sum().tolist() == (6 * keys["tokens"]).tolist()


def test_mask_keys(finished):
    masking, masked = tables_of(finished, "interventions", "masking", "masked_units")
    assert set(masking["level"]) == {"clean", "neurons", "experts"}
    assert set(masking["draw"]) == {-1, 0, 1}
    prompts = prompts_of(finished).set_index("prompt_id")
    clean = masking[masking["level"] == "clean"].set_index("prompt_id")["log_prob"]
    np.testing.assert_allclose(clean, prompts["log_prob"].loc[clean.index], atol=1e-5)
    sizes = masking[masking["draw"] == -1].groupby("level")["masked"].max()
    assert (sizes["neurons"], sizes["experts"]) == (6, 1)
    assert masked[masked["level"] == "experts"]["expert"].ge(0).all()


def test_measure_and_gather_checkpoints(finished):
    [table] = tables_of(finished, "training", "checkpoints")
    steps = json.loads((finished / "results/models/small-moe/training.json").read_text())["steps"]
    assert dict(zip(table["checkpoint"], table["step"])) == {"early": 5, "final": steps}
    prompts = prompts_of(finished)
    final = table[table["checkpoint"] == "final"]
    assert final["rank"].tolist() == prompts["rank"].tolist()
    [keys] = tables_of(finished, "utilization", "key_neurons")
    assert final["keys"].tolist() == keys["keys"].tolist()
    early = artifacts.read_table(finished / RESULTS / "training/early.parquet", "checkpoint")
    assert (1 / early["rank"]).mean() < (1 / final["rank"]).mean()


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("summarise_attribution", ["efficiency", "stages", "gains", "heads", "experts", "expert_curves", "near_ties"]),
        (
            "summarise_neurons",
            ["neurons", "concentration", "additivity", "relation_neurons", "unit_readings", "queries"],
        ),
        ("summarise_heads", ["head_map", "head_blocking", "tracing"]),
        ("summarise_interventions", ["blocking", "keep_only", "contrasts", "expert_map", "faithfulness"]),
        ("summarise_key_scores", ["key_scores"]),
        ("summarise_utilization", ["utilization", "rarefaction", "key_experts", "key_overlap", "diversity"]),
        ("summarise_masking", ["masking"]),
        ("summarise_training", ["training", "phases"]),
        (
            "summarise_steering",
            ["router_attribution", "associations", "association_pairs", "head_router", "gate_gradients"],
        ),
        ("summarise_routing", ["routing", "expert_use", "coactivation", "task_overlap", "mutual_information"]),
    ],
)
def test_summaries(finished, rule, names):
    made_by = {file: job["rule"] for file, job in kills.records(finished).items()}
    for name in names:
        path = f"results/tables/{name}.csv"
        assert made_by[path] == rule
        rounded = pd.read_csv(finished / path)
        exact = artifacts.read_table((finished / path).with_suffix(".parquet"), "table")
        assert list(rounded) == list(exact)
        assert len(rounded) == len(exact) > 0
        for count in {"prompts", "subjects"} & {*rounded}:
            assert (rounded[count] > 0).all()
    sources = artifacts.table_provenance(finished / f"results/tables/{names[0]}.parquet")["sources"]
    assert all(source["model_commit"] and source["dataset_digest"] for source in sources)


def test_light_rules_need_nothing_of_the_models_environment(copy_of_finished, tmp_path, monkeypatch):
    """Rules whose environment has no torch run where torch and what loads models cannot be imported."""
    for package in ("torch", "safetensors", "transformers", "tokenizers", "huggingface_hub", "accelerate"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is not in this environment')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = "".join(path.read_text() for path in (small.ROOT / "workflow/rules").glob("*.smk"))
    light = {
        re.search(r"scripts/(\w+)\.py", body)[1]
        for body in re.split(r"\n *rule ?\w*:\n", text)
        if "envs/analysis.yaml" in body
    }
    targets = {
        "write_dataset": "results/facts/dataset.parquet",
        "gather_prompts": f"{RESULTS}/captured.parquet",
        "filter_known": f"{RESULTS}/prompts.parquet",
        "gather_checkpoints": f"{RESULTS}/training/checkpoints.parquet",
        "summarise": "results/tables/routing.parquet",
        "plot": "results/figures/facts.routing.svg",
        "write_provenance": "results/provenance.json",
    }
    # The others are of text tasks, of families and of shards, which this run has none of.
    assert light == targets.keys() | {"write_texts", "summarise_families", "gather_shards"}
    rules = [*targets.keys() - {"summarise", "plot"}, "summarise_routing", "plot_routing"]
    small.snakemake(copy_of_finished, *targets.values(), "--force", "--allowed-rules", *rules)
    assert "Error" not in (copy_of_finished / "results/logs/gather_prompts/facts/small-moe.log").read_text()
    printed = small.snakemake(copy_of_finished, f"{RESULTS}/routing/loads.parquet", "--force", check=False)
    assert "torch is not in this environment" in printed


def test_efficiency_agrees_with_the_prompts_of_the_run(finished):
    table = artifacts.read_table(finished / "results/tables/efficiency.parquet", "table")
    mrr = table[(table["model"] == "small-moe") & (table["minus"] == "") & (table["task"] == "all")]
    mrr = mrr.set_index("metric")["estimate"]
    rank = prompts_of(finished)["rank"]
    assert mrr["mrr"] == pytest.approx((1 / rank).mean())
    assert mrr["hit_at_10"] == pytest.approx((rank <= 10).mean())


@pytest.mark.parametrize("figure", FIGURES)
def test_plots(remade, finished, figure):
    path = f"results/figures/facts.{figure}.svg"
    text = (remade / path).read_text()
    assert text.startswith("<?xml")
    assert text == (finished / path).read_text()
    assert "findings about toy models" in text


def test_every_job_writes_its_log_and_benchmark(finished):
    rules = {path.name for path in (finished / "results/logs").iterdir() if path.is_dir()}
    by_rule = {"write_dataset", "train_toy", "capture", "gather_prompts", "filter_known", "attribute", "block_experts"}
    assert by_rule <= rules
    logs = list((finished / "results/logs").rglob("*.log"))
    # Trainings and captures may be taken from a cache that checkouts share, which Snakemake does not let be measured.
    shared = 2 + 2
    assert len(logs) == len(list((finished / "results/logs").rglob("*.benchmark.tsv"))) + shared == 57
    verified = (finished / "results/logs/capture/facts/small-moe/0.log").read_text()
    assert "sum of heads = what attention adds to the residual stream" in verified


def test_the_report_holds_every_figure_and_table(copy_of_finished, tmp_path):
    report = tmp_path / "report.html"
    small.snakemake(copy_of_finished, "--report", str(report))
    text = report.read_text()
    for figure in FIGURES:
        assert f"facts.{figure}.svg" in text
    for table in ("efficiency", "stages", "concentration", "additivity", "relation_neurons", "blocking", "tracing"):
        assert f"{table}.csv" in text
    for words in (
        "199 (fewer if any were dropped",
        "95% percentile bootstrap, 100",
        "seed 0",
        "finding about toy models",
    ):
        assert words in text, words

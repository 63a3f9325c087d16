"""Result tables of a run small enough to be worked out by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import artifacts, cause_tables, plots, published, tables

ROOT = Path(__file__).parents[2]


def own(functions):
    """Those of attribution; what interventions and routing add has tests of its own."""
    return [name for name, make in functions.items() if make.__module__ in ("moescope.tables", "moescope.plots")]


BOOTSTRAP = tables.Bootstrap(bootstrap_draws=200, confidence=0.9, seed=0)
PROMPTS = pd.DataFrame(
    {
        "prompt_id": [3, 5, 8, 9],
        "task": ["geography", "geography", "entity", "entity"],
        "relation": ["capital", "capital", "hq", "hq"],
        "subject": ["France", "Japan", "Sony", "France"],
        "rank": [1, 2, 20, 4],
    }
)
FFN = np.array([[0.5, 2.0, 1.0], [1.0, 0.0, -0.5], [0.0, 0.0, 3.0], [0.5, 0.0, 0.0]])
ATTENTION = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 2.0]])


def run(ffn=FFN, prompts=PROMPTS):
    ids = np.repeat(prompts["prompt_id"].to_numpy(), 3)
    layer = np.tile(np.arange(3), len(prompts))
    # Cache order is by length: the tables must not rely on the prompts' order.
    order = np.random.default_rng(0).permutation(len(ids))
    layers = pd.DataFrame({"prompt_id": ids, "layer": layer, "attention": ATTENTION.ravel(), "ffn": ffn.ravel()})
    heads = layers.rename(columns={"ffn": "lpi"}).assign(head=0)[["prompt_id", "layer", "head", "lpi"]]
    experts = pd.DataFrame(
        {
            "prompt_id": [3, 3, 5, 5, 8, 8, 9, 9],
            "layer": [0] * 8,
            "expert": [0, -1, 1, -1, 0, -1, 0, -1],
            "lpi": [4.0, 1.0, 2.0, 1.0, -2.0, 1.0, 6.0, 1.0],
        }
    )
    margins = pd.DataFrame({"prompt_id": [3, 5, 8, 9], "layer": 0, "margin": 0.5, "smallest": [0.001, 0.1, 0.1, 0.1]})
    tables = {"layers": layers.iloc[order], "heads": heads.iloc[order], "experts": experts.iloc[::-1]}
    return {"prompts": prompts, "margins": margins, **tables}


def neuron_level(prompts=PROMPTS, dense=False, seed=0, n_layers=3):
    """Generated tables of the neuron level, whole for every prompt: 2 units a layer, 4 neurons a unit."""
    rng = np.random.default_rng(seed)
    grid = {
        "prompt_id": prompts["prompt_id"].astype("int32"),
        "layer": range(n_layers),
        "unit": range(1 if dense else 2),
    }
    units = pd.MultiIndex.from_product(grid.values(), names=grid).to_frame(index=False)
    units = units.astype({"layer": "int16", "unit": "int16"})
    each = units.merge(pd.DataFrame({"neuron": np.arange(4, dtype="int32")}), how="cross")

    def drawn(frame, *columns):
        return frame.assign(**{column: rng.normal(size=len(frame)).astype("float32") for column in columns})

    both = [units.assign(block=block) for block in ("ffn", "attention")]
    parts = [prompts[["prompt_id"]].assign(block=block) for block in ("ffn", "attention")]
    relations = each.drop(columns="prompt_id").drop_duplicates().merge(prompts[["relation"]].drop_duplicates(), "cross")
    relations = pd.concat([relations.assign(block=block) for block in ("ffn", "attention")], ignore_index=True)
    components = pd.concat(
        [relations.assign(level=relations["block"] + "_neuron"), relations.assign(neuron=-1, level="head")]
        + ([] if dense else [relations.assign(neuron=-1, level="expert")])
    ).drop_duplicates(["relation", "level", "layer", "unit", "neuron"])
    sides = pd.DataFrame(
        {"side": ["promoted", "promoted", "suppressed"], "place": [1, 2, 1], "token": ["$a", "b", "_c^"]}
    )
    levels = pd.concat([units.assign(level=level) for level in ("head", "expert")])
    alone = [prompts[["prompt_id"]].assign(level=level, layer=-1, unit=-1) for level in ("embedding", "rest")]
    concentration = drawn(pd.concat(parts), "share", "entropy", "gini", "positive").assign(neurons=8, saturated=False)
    return {
        "neurons": drawn(each.rename(columns={"unit": "expert"}), "lpi"),
        "attention_neurons": drawn(each.rename(columns={"unit": "head"}), "lpi"),
        "relation_neurons": drawn(relations, "lpi", "bound").assign(exact=True, used=2, prompts=2),
        "concentration": concentration.assign(
            share_error=0.01, entropy_error=0.02, gini_error=0.0, positive_error=0.1
        ).sample(frac=1, random_state=0),
        "neuron_sums": drawn(pd.concat(both), "neuron_sum").assign(error=0.5),
        "queries": drawn(pd.concat([levels, *alone]), "via_ffn", "via_attention").assign(neuron=-1),
        "value_layers": drawn(pd.concat(both).drop_duplicates(["prompt_id", "block", "layer"]), "lpi"),
        "readings": drawn(components, "lpi").merge(sides, how="cross").sample(frac=1, random_state=0),
    }


RUNS = {("facts", "moe"): run(), ("facts", "dense"): run(FFN / 2) | {"experts": run()["experts"].iloc[:0]}}


def row(table, **keys):
    found = table[np.logical_and.reduce([table[key] == value for key, value in keys.items()])]
    assert len(found) == 1
    return found.iloc[0]


def test_efficiency_by_hand():
    table = tables.efficiency(RUNS, {"moe": "dense"}, BOOTSTRAP)
    by_hand = {
        "hit_at_10": 3 / 4,
        "mrr": (1 + 1 / 2 + 1 / 20 + 1 / 4) / 4,
        "ffn_gain": (3.5 + 0.5 + 3 + 0.5) / 4,
        "attention_gain": (1 + 1 + 1 + 4) / 4,
        "peak_position": (2 + 1 + 3 + 1) / 4 / 3,
        "layer_efficiency": (3.5 + 0.5 + 3 + 0.5) / 4 / 3,
    }
    for metric, value in by_hand.items():
        found = row(table, model="moe", minus="", task="all", metric=metric)
        assert found["estimate"] == pytest.approx(value)
        assert found["low"] <= found["estimate"] <= found["high"]
        assert (found["prompts"], found["subjects"]) == (4, 3)
    entity = row(table, model="moe", minus="", task="entity", metric="mrr")
    assert (entity["estimate"], entity["prompts"]) == (pytest.approx((1 / 20 + 1 / 4) / 2), 2)
    pair = row(table, model="moe", minus="dense", task="all", metric="ffn_gain")
    assert pair["estimate"] == pytest.approx(by_hand["ffn_gain"] / 2)
    same = row(table, model="moe", minus="dense", task="all", metric="mrr")
    # Equal ranks: the paired difference is exactly 0 in every draw.
    assert (same["estimate"], same["low"], same["high"]) == (0, 0, 0)


def test_a_pair_is_compared_on_the_prompts_that_both_have():
    fewer = PROMPTS.iloc[1:].reset_index(drop=True)
    half = {key: frame[frame["prompt_id"] != 3] if key != "prompts" else fewer for key, frame in run(FFN / 2).items()}
    table = tables.efficiency({("facts", "moe"): run(), ("facts", "dense"): half}, {"moe": "dense"}, BOOTSTRAP)
    found = row(table, model="moe", minus="dense", task="all", metric="ffn_gain")
    assert (found["estimate"], found["prompts"]) == (pytest.approx((0.5 + 3 + 0.5) / 2 / 3), 3)


def test_gains_heads_and_experts_by_hand():
    gains = tables.gains(RUNS, BOOTSTRAP)
    assert row(gains, model="moe", part="ffn", layer=1)["estimate"] == pytest.approx(0.5)
    assert row(gains, model="moe", part="attention", layer=0)["estimate"] == pytest.approx(0.5)
    heads = tables.heads(RUNS, BOOTSTRAP)
    assert row(heads, model="dense", layer=2, head=0)["estimate"] == pytest.approx(3.5 / 8)
    experts = tables.experts(RUNS, BOOTSTRAP)
    assert set(experts["model"]) == {"moe"}
    found = row(experts, task="all", expert=0)
    # Used by three of four prompts; the fourth adds 0.
    assert (found["estimate"], found["used"]) == (pytest.approx((4 - 2 + 6) / 4), 0.75)
    assert row(experts, task="geography", expert=1)["estimate"] == pytest.approx(1)
    assert row(experts, task="all", expert=-1)["estimate"] == pytest.approx(1)


def test_stages_by_hand():
    table = tables.stages({("facts", "moe"): run()}, BOOTSTRAP)
    assert table["share"].tolist() == pytest.approx([2 / 7.5, 2 / 7.5, 3.5 / 7.5])
    assert table["share"].sum() == pytest.approx(1)
    assert table[["first_layer", "last_layer"]].to_numpy().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_blocking_by_hand():
    ranks = {-1: [2, 4, 20, 10], 0: [1, 2, 20, 4], 1: [2, 4, 20, 20]}
    frames = [
        pd.DataFrame({"prompt_id": PROMPTS["prompt_id"], "how": "zero", "n_blocked": 5, "draw": d, "rank": r})
        for d, r in ranks.items()
    ]
    runs = {("facts", "moe"): run() | {"blocking": pd.concat(frames).sample(frac=1, random_state=1)}}
    table = cause_tables.blocking(runs, BOOTSTRAP)
    found = row(table, scope="all")
    mrr = {draw: np.mean(1 / np.array(r)) for draw, r in ranks.items()}
    assert found["mrr_clean"] == pytest.approx(mrr[0])
    assert found["mrr_blocked"] == pytest.approx(mrr[-1])
    assert found["mrr_drop"] == pytest.approx(mrr[0] - mrr[-1])
    assert found["mrr_random"] == pytest.approx((mrr[0] + mrr[1]) / 2)
    assert found["mrr_random_low"] == pytest.approx(np.quantile([mrr[0], mrr[1]], 0.05))
    assert found["hit_at_10_clean"] == 0.75
    assert found["hit_at_10_blocked"] == 0.75
    assert found["mrr_draws_as_low"] == 0.5
    assert (found["n_blocked"], found["draws"], found["prompts"]) == (5, 2, 4)
    assert row(table, scope="relation", name="hq")["mrr_blocked"] == pytest.approx((1 / 20 + 1 / 10) / 2)
    assert set(table["name"]) == {"all", "geography", "entity", "capital", "hq"}


def test_keep_only_by_hand():
    part = {"prompt_id": PROMPTS["prompt_id"], "rank": [1, 20, 20, 1]}
    frames = [pd.DataFrame(part).assign(shared=s, routed=n) for s, n in ((False, 0), (True, 0), (True, 2), (True, -1))]
    table = cause_tables.keep_only({("facts", "moe"): run() | {"keep_only": pd.concat(frames)}}, BOOTSTRAP)
    assert set(table["kept"]) == {"none", "shared", "shared + top-2", "shared + all routed"}
    found = row(table, task="all", kept="shared + top-2")
    assert (found["hit_at_10"], found["mrr"]) == (0.5, pytest.approx((2 + 2 / 20) / 4))


def table_of(columns, *rows):
    return pd.DataFrame(rows, columns=columns.split())


def test_shares_of_top_neurons_by_hand():
    """Layer 1 has no top neuron, prompt 9 has none at all, prompt 8 has one that counts."""
    top = table_of(
        "prompt_id layer expert neuron lpi",
        *[(3, 0, 0, 7, 2.0), (3, 2, 5, 7, 1.0), (3, 2, -1, 1, 0.5), (3, 2, 5, 8, 0.5), (3, 1, 5, 9, -4.0)],
        *[(5, 0, 1, 7, 3.0), (5, 0, 1, 6, 1.0), (8, 2, 0, 0, 1.0), (8, 2, 0, 1, -1.0), (9, 0, 0, 0, -1.0)],
    )
    found = tables.neurons({("facts", "moe"): run() | {"neurons": top, "attention_neurons": top.iloc[:0]}}, BOOTSTRAP)
    assert set(found["block"]) == {"ffn"}
    assert found["layer"].tolist() == [0, 1, 2]
    assert found["share"].tolist() == pytest.approx([(1 / 4 + 1) / 3, 0, (3 / 4 + 1) / 3])
    assert found["lpi"].tolist() == pytest.approx([(2 + 4) / 3, 0, (2 + 1) / 3])
    # Layers 0 and 2 have all of it, in every draw.
    assert found.loc[0, "low"] + found.loc[2, "high"] == pytest.approx(1)
    assert 0 <= found.loc[0, "low"] < found.loc[0, "share"] < found.loc[0, "high"] <= 1
    assert (found["prompts"] == 3).all()
    assert (found["subjects"] == 3).all()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([3, 5, 8, 9]), st.integers(0, 2), st.floats(-4, 4, width=32)), min_size=1, max_size=40
    )
)
def test_shares_of_layers_sum_to_1_and_lpis_to_the_mean_of_all(rows):
    top = table_of("prompt_id layer lpi", *rows)
    runs = {("facts", "moe"): run() | {"neurons": top, "attention_neurons": top.iloc[:0]}}
    found = tables.neurons(runs, BOOTSTRAP)
    positive = top[top["lpi"] > 0]
    if positive.empty:
        assert found.empty
        return
    assert found["share"].sum() == pytest.approx(1)
    assert found["lpi"].sum() == pytest.approx(positive["lpi"].sum() / positive["prompt_id"].nunique())


def concentrated(block, prompt_id, share, error=0.0, saturated=False, neurons=400):
    values = dict.fromkeys(["entropy", "gini", "positive"], share * 2) | {"share": share}
    errors = {f"{name}_error": error for name in values}
    return {"prompt_id": prompt_id, "block": block, "neurons": neurons, "saturated": saturated} | values | errors


def test_concentration_by_hand():
    moe = [
        concentrated("ffn", 3, 0.5, 0.01),
        concentrated("ffn", 5, 0.2, 0.03),
        concentrated("ffn", 8, 0.9, 0.7, saturated=True),
        concentrated("ffn", 9, np.nan, np.nan),
        concentrated("attention", 3, 0.1, saturated=True),
    ]
    dense = [
        concentrated("ffn", 3, 0.4, 0.05, neurons=100),
        concentrated("ffn", 5, 0.3, 0.01, saturated=True),
        concentrated("ffn", 8, 0.3),
        concentrated("ffn", 9, 0.6, 0.2),
    ]
    runs = {key: RUNS[key] | {"concentration": pd.DataFrame(rows)} for key, rows in zip(RUNS, (moe, dense))}
    found = tables.concentration(runs, {"moe": "dense"}, BOOTSTRAP)
    # Nothing is left of attention.
    assert set(found["block"]) == {"ffn"}
    mine = row(found, model="moe", minus="", task="all", metric="share")
    assert mine["estimate"] == pytest.approx((0.5 + 0.2) / 2)
    # Of the two subjects left.
    assert (mine["low"], mine["high"]) == (0.2, 0.5)
    assert mine["error"] == pytest.approx((0.01 + 0.03) / 2)
    assert mine[["kind", "prompts", "subjects", "saturated"]].tolist() == ["moe", 2, 2, 1]
    assert row(found, model="moe", minus="", task="all", metric="gini")["estimate"] == pytest.approx(0.7)
    count = row(found, model="moe", minus="", task="all", metric="neurons")
    assert (count["estimate"], count["error"]) == (400, 0)
    # Both prompts of the task "entity" are left out.
    assert found[(found["model"] == "moe") & (found["task"] == "entity")].empty
    other = row(found, model="dense", minus="", task="all", metric="share")
    assert other[["estimate", "error"]].tolist() == pytest.approx([1.3 / 3, 0.25 / 3])
    assert other["saturated"] == 1
    assert other["kind"] == "dense"
    # Prompt 5 is saturated in the dense model, 8 in the other, 9 has no share there.
    pair = row(found, model="moe", minus="dense", task="all", metric="share")
    assert (pair["estimate"], pair["error"]) == pytest.approx((0.1, 0.06))
    assert pair[["prompts", "saturated"]].tolist() == [1, 2]
    assert row(found, model="moe", minus="dense", task="all", metric="neurons")["estimate"] == 300


def test_a_difference_of_concentration_is_that_of_the_partners():
    runs = {key: RUNS[key] | neuron_level(seed=seed) for seed, key in enumerate(RUNS)}
    found = tables.concentration(runs, {"moe": "dense"}, BOOTSTRAP)
    keys = ["task", "block", "metric"]
    moe, dense, pair = (
        found[(found["model"] == model) & (found["minus"] == minus)].set_index(keys)
        for model, minus in (("moe", ""), ("dense", ""), ("moe", "dense"))
    )
    assert len(pair) == 3 * 2 * 5
    assert (pair["estimate"] - (moe["estimate"] - dense["estimate"])).abs().max() < 1e-12
    assert (pair["error"] - (moe["error"] + dense["error"])).abs().max() < 1e-12


def test_expert_curves_by_hand():
    """Of "all" the means are 2 (expert 0), 1 (shared) and 0.5 (expert 1); of "hq" only 2 and 1 are left."""
    found = tables.expert_curves(RUNS, BOOTSTRAP)
    assert set(found["model"]) == {"moe"}
    every = found[found["relation"] == "all"]
    assert every["experts"].tolist() == [1, 2, 3]
    assert every["share"].tolist() == pytest.approx([2 / 3.5, 3 / 3.5, 1])
    assert every[["n_experts", "prompts", "subjects"]].drop_duplicates().to_numpy().tolist() == [[3, 4, 3]]
    hq = found[found["relation"] == "hq"]
    assert hq["share"].tolist() == pytest.approx([2 / 3, 1])
    assert (hq["n_experts"] == 2).all()
    # Of a draw: 2 of 3 nats with both subjects, 6 of 7 with France alone, and with Sony -2 of -1.
    assert hq[["low", "high"]].iloc[0].tolist() == pytest.approx([2 / 3, 2])
    worst = run()["experts"].assign(lpi=-1.0)
    assert tables.expert_curves({("facts", "moe"): run() | {"experts": worst}}, BOOTSTRAP).empty


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_expert_curves_rise_to_1_ever_more_slowly(seed, n_experts):
    lpi = np.random.default_rng(seed).normal(0.3, 1, size=(4, n_experts))
    used = [(i, e % 3, e, lpi[row, e]) for row, i in enumerate(PROMPTS["prompt_id"]) for e in range(n_experts)]
    runs = {("facts", "moe"): run() | {"experts": table_of("prompt_id layer expert lpi", *used)}}
    for _, curve in tables.expert_curves(runs, BOOTSTRAP).groupby("relation"):
        steps = np.diff(curve["share"], prepend=0)
        assert (steps > 0).all()
        assert (np.diff(steps) <= 1e-12).all()
        assert curve["share"].iloc[-1] == pytest.approx(1)
        assert curve["experts"].tolist() == list(range(1, curve["n_experts"].iloc[0] + 1))
    mean = lpi.mean(0).clip(0)
    every = tables.expert_curves(runs, BOOTSTRAP).query("relation == 'all'")
    for n, share in zip(every["experts"], every["share"]):
        assert share == pytest.approx(np.sort(mean)[::-1][:n].sum() / mean.sum())


def test_additivity_by_hand():
    """Only layer 0 has experts; layer 2 has a dense FFN with neurons, layer 1 an FFN of one piece."""
    sums = [(i, "ffn", 0, unit, 1.0 + unit, 0.25) for i in (3, 5, 8) for unit in (0, -1)]
    sums += [(9, "ffn", 0, 0, 2.0, 1.0)] + [(i, "ffn", 2, 0, i / 10, 0.0) for i in (3, 5, 8, 9)]
    sums += [(i, "attention", layer, 0, 0.5, 0.125) for i in (3, 5, 8, 9) for layer in range(3)]
    neuron_sums = table_of("prompt_id block layer unit neuron_sum error", *sums)
    found = tables.additivity({("facts", "moe"): run() | {"neuron_sums": neuron_sums}}, BOOTSTRAP)
    layers = found.groupby(["component", "parts"])["layer"].agg(list).to_dict()
    assert layers == {
        ("ffn", "experts"): [0],
        ("experts", "neurons"): [0],
        ("ffn", "neurons"): [2],
        ("attention", "heads"): [0, 1, 2],
        ("heads", "neurons"): [0, 1, 2],
    }
    by_hand = {
        ("ffn", "experts", 0): ((0.5 + 1 + 0 + 0.5) / 4, (5 + 3 - 1 + 7) / 4, 0),
        # Of prompts 3, 5 and 8 the two units have 1 and 0.
        ("experts", "neurons", 0): ((5 + 3 - 1 + 7) / 4, (3 * 1 + 2) / 4, (3 * 0.5 + 1) / 4),
        ("ffn", "neurons", 2): (FFN[:, 2].mean(), 2.5 / 4, 0),
        ("heads", "neurons", 1): (FFN[:, 1].mean(), 0.5, 0.125),
        ("attention", "heads", 1): (0.5, FFN[:, 1].mean(), 0),
    }
    for (component, parts, layer), (whole, total, error) in by_hand.items():
        one = row(found, component=component, parts=parts, layer=layer)
        assert one[["whole", "sum", "error"]].tolist() == pytest.approx([whole, total, error])
        assert one["gap"] == pytest.approx(total - whole)
        assert one["low"] <= one["gap"] <= one["high"]
        assert (one["prompts"], one["subjects"]) == (4, 3)
    assert not np.signbit(found["error"]).any()


def test_parts_that_add_up_leave_no_gap():
    layers = run()["layers"]
    halves = [layers.assign(unit=unit, neuron_sum=layers["ffn"] / 2, block="ffn", error=0.0) for unit in (0, 1)]
    dense = RUNS["facts", "dense"] | {"layers": layers, "neuron_sums": pd.concat(halves)}
    found = tables.additivity({("facts", "dense"): dense}, BOOTSTRAP)
    found = found[found["parts"] == "neurons"]
    assert found["layer"].tolist() == [0, 1, 2]
    assert (found[["gap", "low", "high", "error"]] == 0).all(axis=None)


def test_readings_stand_beside_the_best_neurons():
    ranking = [("capital", "ffn", 1, 2, n, n / 100, 1.0, True, 2, 2) for n in range(-3, 15)]
    ranking += [("capital", "attention", 1, 2, 14, lpi, 1.0, False, 1, 2) for lpi in (0.5, -0.5)]
    columns = "relation block layer unit neuron lpi bound exact used prompts"
    readings = table_of(
        "relation level layer unit neuron lpi side place token",
        *[("capital", "ffn_neuron", 1, 2, 14, 0.1, "promoted", place, token) for place, token in ((2, "b"), (1, " a"))],
        ("capital", "ffn_neuron", 1, 2, 14, 0.1, "suppressed", 1, "$\r\n\x00é"),
        ("hq", "ffn_neuron", 1, 2, 13, 0.1, "promoted", 1, "of another relation"),
        ("capital", "head", 1, 2, -1, 0.2, "promoted", 1, "head"),
        ("capital", "expert", 0, -1, -1, 0.3, "suppressed", 1, "shared"),
        ("capital", "expert", 1, 2, -1, 0.4, "promoted", 1, "routed"),
    )
    moe = run() | {"relation_neurons": table_of(columns, *ranking).sample(frac=1, random_state=0), "readings": readings}
    found = tables.relation_neurons({("facts", "moe"): moe}, BOOTSTRAP)
    assert list(found) == ["dataset", "model", *columns.split(), "promoted", "suppressed"]
    assert found["block"].tolist() == ["attention"] + ["ffn"] * 10
    assert found["neuron"].tolist() == [14, *range(14, 4, -1)]
    read = row(found, block="ffn", neuron=14)
    assert (read["promoted"], read["suppressed"]) == (" a b", "$\\r\\n\\x00é")
    assert (found.drop(read.name)[["promoted", "suppressed"]] == "").all(axis=None)

    units = tables.unit_readings({("facts", "moe"): moe}, BOOTSTRAP)
    assert units.columns.name is None
    assert units.to_numpy().tolist() == [
        ["facts", "moe", "capital", "expert", 1, 2, 0.4, "routed", ""],
        ["facts", "moe", "capital", "expert", 0, -1, 0.3, "", "shared"],
        ["facts", "moe", "capital", "head", 1, 2, 0.2, "head", ""],
    ]


def test_any_token_leaves_the_table_of_readings_whole(tmp_path):
    tokens = ["a\rb", "a\nb", "\x00", '"', "a,b", "\u2028", "$x$", "Ġ東京", "\xa0"]
    columns = "relation level layer unit neuron lpi side place token"
    readings = table_of(columns, *[("r", "head", 0, i, -1, -i, "promoted", 1, token) for i, token in enumerate(tokens)])
    found = tables.unit_readings({("facts", "moe"): {"readings": readings}}, BOOTSTRAP)
    artifacts.write_csv(found, tmp_path / "units.csv")
    artifacts.write_table(found, tmp_path / "units.parquet", "table", {})
    back = pd.read_csv(tmp_path / "units.csv", keep_default_na=False)
    assert back["promoted"].tolist() == found["promoted"].tolist()
    assert len((tmp_path / "units.csv").read_text().splitlines()) == len(tokens) + 1
    assert found["promoted"].tolist()[6:8] == ["$x$", "Ġ東京"]
    assert artifacts.read_table(tmp_path / "units.parquet", "table")["promoted"].tolist() == back["promoted"].tolist()


def test_queries_by_hand():
    """Prompt 9 has no scores; a prompt without heads or value neurons in a layer adds 0."""
    scores = table_of(
        "prompt_id level layer unit neuron via_ffn via_attention",
        *[(i, "embedding", -1, -1, -1, 0.5, 0.25) for i in (3, 5, 8)],
        *[(i, "rest", -1, -1, -1, 9.0, 9.0) for i in (3, 5, 8)],
        *[(3, "head", 0, 0, -1, 1.0, 0.5), (3, "head", 0, 1, -1, 1.0, 0.0), (5, "head", 1, 0, -1, -1.0, 0.0)],
        *[(3, "expert", 1, -1, -1, 0.5, 0.0), (8, "expert", 1, 7, -1, 1.0, 0.0)],
        *[(3, "head_neuron", 0, 0, 5, 9.0, 9.0), (3, "expert_neuron", 0, 0, 5, 9.0, 9.0)],
    )
    values = table_of(
        "prompt_id block layer lpi",
        (3, "ffn", 2, 1.0),
        (8, "ffn", 2, 5.0),
        (5, "attention", 1, 3.0),
        (9, "ffn", 0, 9.0),
    )
    runs = {("facts", "moe"): run() | {"queries": scores, "value_layers": values}}
    runs["facts", "none"] = run() | {"queries": scores.iloc[:0], "value_layers": values}
    found = tables.queries(runs, BOOTSTRAP)
    assert set(found["model"]) == {"moe"}
    assert found.set_index(["role", "part", "layer"])["estimate"].to_dict() == pytest.approx(
        {
            ("value", "attention", 1): 3 / 3,
            ("value", "ffn", 0): 0,
            ("value", "ffn", 2): 6 / 3,
            ("query", "embedding", -1): 0.75,
            ("query", "attention", 0): 2.5 / 3,
            ("query", "attention", 1): -1 / 3,
            ("query", "ffn", 1): 1.5 / 3,
        }
    )
    assert (found[["prompts", "subjects"]] == 3).all(axis=None)
    assert (found["low"] <= found["estimate"]).all()
    assert (found["estimate"] <= found["high"]).all()


@pytest.mark.parametrize(
    "name", ["concentration", *sorted(neuron_level().keys() & tables.SUMMARIES.keys()), "additivity"]
)
def test_a_model_without_neurons_gives_empty_tables_with_the_same_columns(name):
    whole = {("facts", "moe"): run() | neuron_level()}
    none = {kind: table.iloc[:0] for kind, table in neuron_level().items()}
    none |= {kind: run()[kind].iloc[:0] for kind in ("heads", "experts")}
    [(_, full)] = tables.tables([name], whole, {}, BOOTSTRAP)
    [(_, empty)] = tables.tables([name], {("facts", "mamba"): run() | none}, {}, BOOTSTRAP)
    assert len(full)
    assert empty.empty
    assert list(empty) == list(full)
    [(_, both)] = tables.tables([name], whole | {("facts", "mamba"): run() | none}, {}, BOOTSTRAP)
    pd.testing.assert_frame_equal(both, full, check_dtype=False)


def ranks_when_blocked(n_blocked, draw, ranks, prompts=PROMPTS):
    return pd.DataFrame(
        {"prompt_id": prompts["prompt_id"], "how": "zero", "n_blocked": n_blocked, "draw": draw, "rank": ranks}
    )


def test_a_random_draw_that_breaks_as_much_counts_as_that_low():
    """Whatever the order of the sums: equal ranks have equal means."""
    ranks = np.random.default_rng(0).integers(1, 40, 203)
    prompts = pd.DataFrame({"prompt_id": range(203), "task": "t", "relation": "r", "rank": 1})
    prompts["subject"] = prompts["prompt_id"].astype(str)
    blocked = pd.concat([ranks_when_blocked(1, draw, ranks, prompts) for draw in (-1, 0, 1)])
    table = cause_tables.blocking({("facts", "moe"): {"prompts": prompts, "blocking": blocked}}, BOOTSTRAP)
    assert (table[["mrr_draws_as_low", "hit_at_10_draws_as_low"]] == 1).all(axis=None)


def test_layers_that_differ_leave_out_what_they_have_not():
    """Layer 0 is dense, the heads of layer 1 are not told apart, layers 1 and 2 differ in heads and experts."""
    ids = PROMPTS["prompt_id"].to_numpy()
    values = {3: 1.0, 5: 2.0, 8: 3.0, 9: 4.0}
    shapes = {"head": {0: [0, 1], 2: [0, 1, 2, 3]}, "expert": {1: [0, -1], 2: [0, 5, -1, -2]}}
    parts = {
        kind: pd.DataFrame(
            [
                (i, layer, unit, values[i] * (layer + 1))
                for i in ids
                for layer, units in shape.items()
                for unit in units
            ],
            columns=["prompt_id", "layer", kind, "lpi"],
        )
        for kind, shape in shapes.items()
    }
    ragged = run() | {"heads": parts["head"], "experts": parts["expert"]}
    runs = {("facts", "ragged"): ragged, ("facts", "moe"): run()}
    alone = run() | {"heads": run()["heads"].iloc[:0], "experts": run()["experts"].iloc[:0]}
    for kind, shape in shapes.items():
        make = {"head": tables.heads, "expert": tables.experts}[kind]
        table = make(runs | {("facts", "neither"): alone}, BOOTSTRAP)
        assert set(table["model"]) == {"ragged", "moe"}
        mine = table[table["model"] == "ragged"]
        mine = mine[mine["task"] == "all"] if kind == "expert" else mine
        found = {layer: sorted(units) for layer, units in mine.groupby("layer")[kind]}
        assert found == {layer: sorted(units) for layer, units in shape.items()}
        assert mine["estimate"].tolist() == pytest.approx((2.5 * (mine["layer"] + 1)).tolist())
        # Without any such row the table is empty, and still one.
        assert list(make({("facts", "neither"): alone}, BOOTSTRAP)) == list(table)
    efficiency = tables.efficiency(runs | {("facts", "neither"): alone}, {}, BOOTSTRAP)
    assert efficiency.groupby("model")["kind"].first().to_dict() == {"ragged": "moe", "moe": "moe", "neither": "dense"}


def test_an_expert_that_only_some_prompts_have_adds_0_to_the_others():
    experts = run()["experts"]
    runs = {("facts", "moe"): run() | {"experts": experts[experts["prompt_id"] != 9]}}
    found = row(tables.experts(runs, BOOTSTRAP), task="all", expert=0)
    assert (found["estimate"], found["used"], found["prompts"]) == (pytest.approx((4 - 2) / 4), 0.5, 4)


def test_blocking_more_experts_than_there_are():
    """No random draw is left for 10, one relation has fewer draws for 5, and another was not measured at all for 3."""
    frames = [
        ranks_when_blocked(10, -1, [2, 4, 20, 10]),
        ranks_when_blocked(5, -1, [2, 4, 20, 10]),
        ranks_when_blocked(5, 0, [2, 4, 20, 4]),
        ranks_when_blocked(5, 1, [2, 2, 0, 0]).iloc[:2],
        ranks_when_blocked(3, -1, [2, 4, 20, 10]).iloc[2:],
    ]
    table = cause_tables.blocking({("facts", "moe"): run() | {"blocking": pd.concat(frames)}}, BOOTSTRAP)
    none = row(table, scope="all", n_blocked=10)
    assert (none["draws"], none["mrr_blocked"]) == (0, pytest.approx((1 / 2 + 1 / 4 + 1 / 20 + 1 / 10) / 4))
    assert none[["mrr_random", "mrr_random_low", "mrr_random_high", "mrr_draws_as_low"]].isna().all()
    assert row(table, scope="all", n_blocked=5)["draws"] == 1
    assert row(table, scope="all", n_blocked=5)["mrr_random"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 20 + 1 / 4) / 4)
    assert row(table, name="capital", n_blocked=5)["draws"] == 2
    assert row(table, name="capital", n_blocked=5)["mrr_random"] == pytest.approx((3 / 8 + 1 / 2) / 2)
    assert set(table[table["n_blocked"] == 3]["name"]) == {"all", "entity", "hq"}
    partial = row(table, scope="all", n_blocked=3)
    assert (partial["prompts"], partial["mrr_clean"]) == (2, pytest.approx((1 / 20 + 1 / 4) / 2))


def with_interventions(relations):
    prompts = PROMPTS.assign(relation=relations)
    blocked = [ranks_when_blocked(n, d, [2, 4, 20, 10], prompts) for n in (1, 2, 5, 10) for d in (-1, 0)]
    kept = [ranks_when_blocked(1, 0, [1, 1, 20, 20]).assign(shared=s, routed=r) for s in (False, True) for r in (0, 2)]
    interventions = {"blocking": pd.concat(blocked), "keep_only": pd.concat(kept)}
    return run(prompts=prompts) | neuron_level(prompts) | interventions


NAMES = [*tables.COMPARISONS, *own(tables.SUMMARIES), "blocking", "keep_only"]


def test_published_numbers_stand_beside_ours():
    relations = ["country_capital_city", "country_capital_city", "mine", "mine"]
    moe = with_interventions(relations)
    runs = {
        ("facts", "qwen"): moe,
        ("facts", "dense"): run(FFN / 2)
        | neuron_level(moe["prompts"])
        | {name: moe[name].iloc[:0] for name in ("blocking", "keep_only")},
        ("facts", "toy"): with_interventions(["country_capital"] * 2 + ["mine"] * 2),
    }
    names = {"qwen": "Qwen1.5-MoE", "dense": "Qwen1.5-7B"}
    found = dict(tables.tables(NAMES, runs, {"qwen": "dense", "toy": "dense"}, BOOTSTRAP, names))

    efficiency = found["efficiency"]
    peak = row(efficiency, model="qwen", minus="", task="all", metric="peak_position")
    assert peak["published"] == pytest.approx(0.848)
    assert peak["difference"] == pytest.approx(7 / 12 - 0.848)
    pair = row(efficiency, model="qwen", minus="dense", task="all", metric="ffn_gain")
    assert (pair["published"], pair["difference"]) == pytest.approx((7.36 - 6.49, pair["estimate"] - (7.36 - 6.49)))
    others = efficiency[(efficiency["task"] != "all") | (efficiency["model"] == "toy")]
    assert others[["published", "difference"]].isna().all(axis=None)
    assert efficiency[(efficiency["task"] == "all") & (efficiency["model"] != "toy")]["published"].notna().all()

    kept = row(found["keep_only"], model="qwen", task="all", kept="shared + top-2")
    assert kept[["hit_at_10_published", "mrr_published"]].tolist() == [0.83, 0.63]
    assert kept["mrr_difference"] == pytest.approx((2 + 2 / 20) / 4 - 0.63)
    assert np.isnan(row(found["keep_only"], model="qwen", task="entity", kept="shared + top-2")["mrr_published"])
    assert np.isnan(row(found["keep_only"], model="toy", task="all", kept="shared + top-2")["mrr_published"])

    blocked = row(found["blocking"], model="qwen", name="country_capital_city", n_blocked=10)
    assert blocked[["mrr_clean_published", "mrr_blocked_published"]].tolist() == [0.71, 0.40]
    assert blocked["mrr_clean_difference"] == pytest.approx(0.75 - 0.71)
    assert blocked["mrr_blocked_difference"] == pytest.approx(0.375 - 0.40)
    there = found["blocking"]["mrr_blocked_published"].notna()
    shown = found["blocking"][there]
    assert set(zip(shown["model"], shown["name"], shown["n_blocked"])) == {
        ("qwen", "country_capital_city", n) for n in (1, 5, 10)
    }


@pytest.mark.parametrize("names", [None, {}, {"somewhere else": "OLMoE"}])
def test_without_published_numbers_no_column_is_added(names):
    runs = {("facts", "toy"): with_interventions(["country_capital"] * 4)}
    plain = dict(tables.tables(NAMES, runs, {}, BOOTSTRAP))
    found = dict(tables.tables(NAMES, runs, {}, BOOTSTRAP, names))
    for name in NAMES:
        assert not plain[name].columns.str.contains("published|difference").any()
        pd.testing.assert_frame_equal(found[name], plain[name], check_exact=True)


def test_a_table_of_which_nothing_is_printed_has_no_column():
    """Of Mixtral the paper prints Table 1 alone."""
    runs = {("facts", "mixtral"): with_interventions(["country_capital"] * 4)}
    found = dict(tables.tables(NAMES, runs, {}, BOOTSTRAP, {"mixtral": "Mixtral-8x7B"}))
    assert "published" in found["efficiency"]
    assert not any(
        found[name].columns.str.contains("published").any() for name in NAMES if name not in tables.COMPARISONS
    )


def test_a_name_without_published_numbers_is_a_sentence():
    with pytest.raises(
        ValueError, match=r"'Qwen1.5-MOE' is no model with published numbers; did you mean 'Qwen1.5-MoE'"
    ):
        published.numbers("Qwen1.5-MOE")


def test_published_numbers_agree_with_each_other():
    """The paper's own definitions hold for what was copied from it, to its rounding."""
    layers = {"Llama-7B": 32, "Qwen1.5-7B": 32, "Mistral-7B": 32, "Qwen1.5-MoE": 24, "OLMoE": 16, "Mixtral-8x7B": 32}
    assert set(layers) == set(published.MODELS)
    for name, model in published.MODELS.items():
        assert tuple(model.efficiency) == tables.METRICS
        gain, peak = model.efficiency["ffn_gain"], model.efficiency["peak_position"]
        assert gain / layers[name] == pytest.approx(model.efficiency["layer_efficiency"], abs=6e-4)
        assert 0.7 < peak < 1
        for ranks in (*model.blocking.values(), *((hit, mrr) for hit, mrr in model.keep_only.values())):
            assert sorted(ranks, reverse=True) == list(ranks)
    assert [name for name, model in published.MODELS.items() if model.blocking] == ["Qwen1.5-MoE", "OLMoE"]
    moe = published.MODELS["Qwen1.5-MoE"]
    # All four routed experts of a token beside the shared one are the whole model.
    assert moe.keep_only[True, 4] == (moe.efficiency["hit_at_10"], moe.efficiency["mrr"])
    assert published.blocked_mrr(moe, "name_birthplace", 5) == (0.85, 0.83)
    assert published.blocked_mrr(moe, "name_birthplace", 2) is None
    assert published.blocked_mrr(moe, "animal_young", 5) is None


def test_intervals_cover_as_often_as_they_say():
    """90% intervals of a mean of clustered values: the truth lies inside in about 90% of repetitions."""
    rng = np.random.default_rng(0)
    inside = 0
    for repetition in range(200):
        subjects = pd.Series(np.repeat(np.arange(40), 3))
        values = (rng.normal(size=40)[subjects] + 0.3 * rng.normal(size=120))[:, None]
        bootstrap = tables.Bootstrap(200, 0.9, repetition)
        summary = bootstrap.summary(bootstrap.means(values, subjects))
        inside += bool(summary["low"][0] <= 0 <= summary["high"][0])
    assert 0.82 <= inside / 200 <= 0.96


def test_the_mean_of_many_values_of_low_precision_is_exact():
    values = np.full((300_000, 1), 0.1, "float32")
    [mean] = tables.Bootstrap(1, 0.9, 0).means(values, pd.Series(np.zeros(len(values))))[0]
    assert mean == pytest.approx(np.float32(0.1), rel=1e-9)


@pytest.mark.parametrize("figure", [*own(plots.FIGURES), "blocking", "keep_only"])
def test_figures_show_every_model_with_units_and_are_equal_for_equal_tables(tmp_path, figure):
    blocked = [
        pd.DataFrame(
            {"prompt_id": PROMPTS["prompt_id"], "how": "zero", "n_blocked": n, "draw": d, "rank": [1, 2, 9, 9]}
        )
        for n in (1, 5)
        for d in (-1, 0, 1)
    ]
    kept = pd.DataFrame({"prompt_id": PROMPTS["prompt_id"], "rank": 1}).assign(shared=True, routed=2)
    moe = run() | neuron_level() | {"blocking": pd.concat(blocked), "keep_only": kept}
    runs = {("facts", "moe"): moe, ("facts", "dense"): RUNS["facts", "dense"] | neuron_level(dense=True)}
    models = ["moe", "dense"]
    if figure in ("experts", "blocking", "keep_only", "expert_curves"):
        models = ["moe"]
        runs = {("facts", "moe"): moe}
    # No figure needs more than the table of its own name.
    found = dict(tables.tables([figure], runs, {"moe": "dense"} if len(models) > 1 else {}, BOOTSTRAP))
    note = plots.note(found[figure], 0.9, 200, 0, models, toys=models)
    for name in ("one", "two"):
        plots.draw(figure, found, models, note, tmp_path / f"{name}.svg")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for words in (*models, "4 prompts about 3 subjects; intervals: 90% bootstrap", "findings about toy models"):
        assert words in text
    shares = dict.fromkeys(["stages", "neurons", "expert_curves"], "share")
    nats = ["gains", "efficiency", "heads", "experts", "concentration", "additivity", "queries"]
    assert (shares | dict.fromkeys(nats, "nats")).get(figure, "MRR") in text


def points(axes, label):
    [line] = [line for line in axes.get_lines() if line.get_label() == label]
    return list(map(tuple, np.column_stack(line.get_data()).tolist()))


def test_figures_of_the_neuron_level_draw_what_the_tables_say():
    runs = {("facts", "moe"): run() | neuron_level(), ("facts", "dense"): RUNS["facts", "dense"] | neuron_level()}
    found = dict(tables.tables(["neurons", "additivity", "queries", "expert_curves"], runs, {}, BOOTSTRAP))

    def column(name, value, **keys):
        rows = found[name]
        rows = rows[np.logical_and.reduce([rows[key] == one for key, one in keys.items()])]
        return list(zip(rows["layer"], rows[value]))

    for position, model in enumerate(("moe", "dense")):
        axes = plots.neurons(found, ["moe", "dense"], "").axes[position]
        assert points(axes, "FFN") == column("neurons", "share", model=model, block="ffn")
        assert points(axes, "attention") == column("neurons", "share", model=model, block="attention")
        axes = plots.additivity(found, ["moe", "dense"], "").axes[position]
        # Layer 0 of the MoE alone has experts.
        assert points(axes, "sum over experts") == column("additivity", "sum", model=model, parts="experts")
        of_units = column("additivity", "sum", model=model, parts="neurons", component="experts")
        of_ffn = column("additivity", "sum", model=model, parts="neurons", component="ffn")
        assert points(axes, "sum over neurons") == of_units + of_ffn
        assert [value for _, value in points(axes, "FFN")] == pytest.approx(
            (FFN if model == "moe" else FFN / 2).mean(0)
        )
        axes = plots.queries(found, ["moe", "dense"], "").axes[position]
        assert points(axes, "value: FFN") == column("queries", "estimate", model=model, role="value", part="ffn")
        assert points(axes, "query: attention") == column(
            "queries", "estimate", model=model, role="query", part="attention"
        )
        assert [layer for layer, _ in points(axes, "query: embedding")] == [-1]
        embedding = row(found["queries"], model=model, layer=-1)
        assert axes.collections[-1].get_segments()[0].tolist() == [[-1, embedding["low"]], [-1, embedding["high"]]]
    # The band of the gap's interval starts at the whole, and the certified error, 0.5 a unit, widens it.
    rows = found["additivity"].query("model == 'dense' and component == 'ffn'")
    _, _, gap, error = plots.additivity(found, ["dense"], "").axes[0].collections
    for band, width in ((gap, 0), (error, rows["error"])):
        x, y = band.get_paths()[0].vertices.T
        assert [y[x == layer].min() for layer in rows["layer"]] == pytest.approx(rows["whole"] + rows["low"] - width)
        assert [y[x == layer].max() for layer in rows["layer"]] == pytest.approx(rows["whole"] + rows["high"] + width)
    axes = plots.expert_curves(found, ["moe"], "").axes[0]
    assert np.array(points(axes, "all prompts")) == pytest.approx(np.array([[1, 2 / 3.5], [2, 3 / 3.5], [3, 1]]))
    # Two relations, the line that names them in the legend, and all prompts.
    assert len(axes.get_lines()) == 4


@pytest.mark.parametrize("figure", ["neurons", "concentration", "expert_curves", "additivity", "queries"])
def test_a_model_of_which_there_is_nothing_has_an_empty_panel(tmp_path, figure):
    none = {kind: table.iloc[:0] for kind, table in neuron_level().items()}
    none |= {kind: run()[kind].iloc[:0] for kind in ("heads", "experts")}
    runs = {("facts", "mamba"): run() | none, ("facts", "moe"): run() | neuron_level()}
    for models in (["mamba", "moe"], ["mamba"]):
        some = {key: tables_of for key, tables_of in runs.items() if key[1] in models}
        found = dict(tables.tables([figure], some, {}, BOOTSTRAP))
        note = plots.note(found[figure], 0.9, 200, 0, models, toys=[])
        assert note.startswith(f"{4 * (len(models) - 1)} prompts about")
        plots.draw(figure, found, models, note, tmp_path / "figure.svg")
        assert all(model in (tmp_path / "figure.svg").read_text() for model in models)


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("gains", "; intervals: 90% bootstrap over subjects, 200 draws, seed 0."),
        ("rarefaction", "; intervals: 90% jackknife over subjects."),
        ("families", "; intervals: 90% Student's t over seeds of training."),
        ("key_overlap", " about 2 subjects."),
    ],
)
def test_the_note_says_what_the_intervals_are(figure, words):
    table = pd.DataFrame({"prompts": [3], "subjects": [2], "low": [0.0]})
    assert plots.note(table, 0.9, 200, 0, ["moe"], [], figure).endswith(words)


def test_the_certified_error_widens_an_interval():
    found = dict(tables.tables(["concentration"], {("facts", "moe"): run() | neuron_level()}, {}, BOOTSTRAP))
    one = row(found["concentration"], task="all", block="attention", metric="share")
    axes = plots.concentration(found, ["moe"], "").axes[1]
    assert (axes.get_title(), axes.get_xlabel()) == ("attention", "share of the positive LPI in the top 1%")
    wide, interval, estimate = (list(line.get_xdata()) for line in axes.get_lines())
    assert wide == [one["low"] - 0.01, one["high"] + 0.01]
    assert (interval, estimate) == ([one["low"], one["high"]], [one["estimate"]])
    # Without an error there is no such line.
    assert len(plots.concentration(found, ["moe"], "").axes[5].get_lines()) == 2


REPORTED = ["efficiency", "concentration", "additivity", "stages", "blocking", "keep_only"]


@pytest.mark.parametrize(
    "name", [*plots.FIGURES, *(f"{table}_table" for table in [*REPORTED, "relation_neurons", "unit_readings"])]
)
def test_captions_say_on_what_a_figure_rests(name):
    text = (ROOT / f"workflow/report/{name}.rst").read_text()
    assert "finding about toy models" in text
    assert "s.n_prompts" in text
    no_interval = ("relation_neurons_table", "unit_readings_table")
    assert ("Intervals:" in text or "bootstrap" in text) == (name not in no_interval)

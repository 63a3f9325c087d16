"""Result tables of a run small enough to be worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from moescope import plots, tables

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
    return {"prompts": prompts, "layers": layers.iloc[order], "heads": heads.iloc[order], "experts": experts.iloc[::-1]}


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
        pd.DataFrame({"prompt_id": PROMPTS["prompt_id"], "n_blocked": 5, "draw": d, "rank": r})
        for d, r in ranks.items()
    ]
    runs = {("facts", "moe"): run() | {"blocking": pd.concat(frames).sample(frac=1, random_state=1)}}
    table = tables.blocking(runs, BOOTSTRAP)
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
    table = tables.keep_only({("facts", "moe"): run() | {"keep_only": pd.concat(frames)}}, BOOTSTRAP)
    assert set(table["kept"]) == {"none", "shared", "shared + top-2", "shared + all routed"}
    found = row(table, task="all", kept="shared + top-2")
    assert (found["hit_at_10"], found["mrr"]) == (0.5, pytest.approx((2 + 2 / 20) / 4))


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


@pytest.mark.parametrize("figure", plots.FIGURES)
def test_figures_show_every_model_with_units_and_are_equal_for_equal_tables(tmp_path, figure):
    blocked = [
        pd.DataFrame({"prompt_id": PROMPTS["prompt_id"], "n_blocked": n, "draw": d, "rank": [1, 2, 9, 9]})
        for n in (1, 5)
        for d in (-1, 0, 1)
    ]
    kept = pd.DataFrame({"prompt_id": PROMPTS["prompt_id"], "rank": 1}).assign(shared=True, routed=2)
    moe = run() | {"blocking": pd.concat(blocked), "keep_only": kept}
    runs = RUNS | {("facts", "moe"): moe}
    found = dict(
        tables.tables(["gains", "stages", "heads", "experts", "efficiency"], runs, {"moe": "dense"}, BOOTSTRAP)
    )
    found |= dict(tables.tables(["blocking", "keep_only"], {("facts", "moe"): moe}, {}, BOOTSTRAP))
    models = ["moe"] if figure in ("experts", "blocking", "keep_only") else ["moe", "dense"]
    note = plots.note(found[figure], 0.9, 200, 0, toy=True)
    for name in ("one", "two"):
        plots.draw(figure, found, models, note, tmp_path / f"{name}.svg")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for words in (*models, "4 prompts about 3 subjects; intervals: 90% bootstrap", "findings about toy models"):
        assert words in text
    units = {"gains": "nats", "stages": "share", "efficiency": "nats", "heads": "nats", "experts": "nats"}
    assert units.get(figure, "MRR") in text

"""Result tables of a run small enough to be worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from moescope import plots, published, tables

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


def ranks_when_blocked(n_blocked, draw, ranks, prompts=PROMPTS):
    return pd.DataFrame({"prompt_id": prompts["prompt_id"], "n_blocked": n_blocked, "draw": draw, "rank": ranks})


def test_a_random_draw_that_breaks_as_much_counts_as_that_low():
    """Whatever the order of the sums: equal ranks have equal means."""
    ranks = np.random.default_rng(0).integers(1, 40, 203)
    prompts = pd.DataFrame({"prompt_id": range(203), "task": "t", "relation": "r", "rank": 1})
    prompts["subject"] = prompts["prompt_id"].astype(str)
    blocked = pd.concat([ranks_when_blocked(1, draw, ranks, prompts) for draw in (-1, 0, 1)])
    table = tables.blocking({("facts", "moe"): {"prompts": prompts, "blocking": blocked}}, BOOTSTRAP)
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
    table = tables.blocking({("facts", "moe"): run() | {"blocking": pd.concat(frames)}}, BOOTSTRAP)
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
    return run(prompts=prompts) | {"blocking": pd.concat(blocked), "keep_only": pd.concat(kept)}


NAMES = ["efficiency", *tables.SUMMARIES]


def test_published_numbers_stand_beside_ours():
    relations = ["country_capital_city", "country_capital_city", "mine", "mine"]
    moe = with_interventions(relations)
    runs = {
        ("facts", "qwen"): moe,
        ("facts", "dense"): run(FFN / 2) | {name: moe[name].iloc[:0] for name in ("blocking", "keep_only")},
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
    assert not any(found[name].columns.str.contains("published").any() for name in tables.SUMMARIES)


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
    note = plots.note(found[figure], 0.9, 200, 0, models, toys=models)
    for name in ("one", "two"):
        plots.draw(figure, found, models, note, tmp_path / f"{name}.svg")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for words in (*models, "4 prompts about 3 subjects; intervals: 90% bootstrap", "findings about toy models"):
        assert words in text
    units = {"gains": "nats", "stages": "share", "efficiency": "nats", "heads": "nats", "experts": "nats"}
    assert units.get(figure, "MRR") in text

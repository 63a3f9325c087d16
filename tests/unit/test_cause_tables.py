"""Result tables of causes, from runs small enough to be worked out by hand."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import cause_plots, cause_tables, plots
from moescope.summaries import Bootstrap

ROOT = Path(__file__).parents[2]
BOOTSTRAP = Bootstrap(bootstrap_draws=200, confidence=0.9, seed=0)
IDS = [3, 5, 8, 9]
PROMPTS = pd.DataFrame(
    {
        "prompt_id": IDS,
        "task": ["geography", "geography", "object_attributes", "object_attributes"],
        "relation": ["capital", "capital", "colour", "colour"],
        "subject": ["France", "Japan", "apple", "kiwi"],
        "rank": [1, 2, 1, 4],
        "log_prob": [-1.0, -2.0, -1.5, -3.0],
    }
)
NEW = ["contrasts", "expert_map", "faithfulness", "tracing"]


def table_of(columns, *rows):
    return pd.DataFrame(rows, columns=columns.split())


def blocked(ranks, n_blocked=5):
    """Ranks of the four prompts for each draw, -1 being the best experts."""
    frames = [table_of("prompt_id rank", *zip(IDS, rank)).assign(draw=draw) for draw, rank in ranks.items()]
    return pd.concat(frames).assign(how="zero", n_blocked=n_blocked).sample(frac=1, random_state=0)


def experts_used(*experts, layers=1):
    return table_of("prompt_id layer expert", *[(i, layers - 1, e) for i in IDS for e in experts]).assign(
        lpi=0.0, weight=0.5
    )


def run(ranks, *experts, layers=1, prompts=PROMPTS):
    return {"prompts": prompts, "blocking": blocked(ranks), "experts": experts_used(*experts, layers=layers)}


def row(table, **keys):
    found = table[np.logical_and.reduce([table[key] == value for key, value in keys.items()])]
    assert len(found) == 1
    return found.iloc[0]


RANKS = {-1: [20, 20, 2, 4], 0: [1, 4, 1, 4], 1: [2, 2, 1, 20]}


def test_tasks_by_hand():
    table = cause_tables.contrasts({("facts", "moe"): run(RANKS, 0, 1, -1, layers=3)}, BOOTSTRAP)
    assert set(table["contrast"]) == {"tasks"}
    mrr = row(table, metric="mrr", n_blocked=5)
    geography = (1.5 - 0.1) / 2, (1.5 - np.array([1.25, 1.0])) / 2
    colours = (1.25 - 0.75) / 2, (1.25 - np.array([1.25, 1.05])) / 2
    random = geography[1] - colours[1]
    assert mrr["estimate"] == pytest.approx(geography[0] - colours[0] - random.mean())
    assert mrr["random"] == pytest.approx(random.mean())
    assert mrr[["random_low", "random_high"]].tolist() == pytest.approx(np.quantile(random, [0.05, 0.95]).tolist())
    assert mrr["low"] <= mrr["estimate"] <= mrr["high"]
    # Two of two prompts miss the top ten when the best are blocked; of the random draws only one, once in two draws.
    hit = row(table, metric="hit_at_10")
    assert hit[["estimate", "random"]].tolist() == pytest.approx([1 - 0 - (0 - 0.25), -0.25])
    assert mrr[["first", "second", "model", "task"]].tolist() == ["geography", "object_attributes", "moe", ""]
    assert mrr[["first_layers", "second_layers", "first_shared", "second_shared"]].tolist() == [3, 3, True, True]
    assert mrr[["prompts", "subjects"]].tolist() == [4, 4]


def test_without_the_tasks_of_the_claim_all_pairs_are_compared():
    prompts = PROMPTS.assign(task=["geography", "animals", "entity", "entity"])
    table = cause_tables.contrasts({("facts", "moe"): run(RANKS, 0, prompts=prompts)}, BOOTSTRAP)
    pairs = table[["first", "second"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [["animals", "entity"], ["animals", "geography"], ["entity", "geography"]]
    found = row(table, first="animals", second="geography", metric="mrr")
    assert found["estimate"] == pytest.approx((0.375 - 0.05) - (0.75 - 0.05))
    assert found["prompts"] == 2


def test_models_by_hand():
    """Prompt 9 was not measured in the model without shared experts, and only draw 1 is known of both."""
    few = {-1: [2, 20, 4, 0], 1: [2, 2, 1, 0], 2: [1, 1, 1, 0]}
    ranks = {-1: RANKS[-1], 1: RANKS[1], 3: RANKS[0]}
    without = run(few, 0, 1, layers=2, prompts=PROMPTS.assign(rank=[1, 1, 2, 4]))
    without["blocking"] = without["blocking"].query("prompt_id != 9")
    runs = {("facts", "deep"): run(ranks, 0, -1, layers=7), ("facts", "shallow"): without}
    table = cause_tables.contrasts(runs | {("other", "shallow"): without}, BOOTSTRAP)
    pairs = table[table["contrast"] == "models"]
    assert pairs[["dataset", "first", "second", "model"]].drop_duplicates().to_numpy().tolist() == [
        ["facts", "deep", "shallow", ""]
    ]
    found = row(pairs, metric="mrr", task="all")
    # Relative to the clean means: 1 + 1/2 + 1 of the one, 1 + 1 + 1/2 of the other.
    deep, shallow = (2.5 - (0.05 + 0.05 + 0.5)) / 2.5, (2.5 - (0.5 + 0.05 + 0.25)) / 2.5
    random = (2.5 - (0.5 + 0.5 + 1)) / 2.5 - (2.5 - (0.5 + 0.5 + 1)) / 2.5
    assert found["estimate"] == pytest.approx(deep - shallow - random)
    assert found[["random", "random_low", "random_high"]].tolist() == pytest.approx([random] * 3)
    assert found[["first_layers", "first_shared", "second_layers", "second_shared"]].tolist() == [7, True, 2, False]
    assert found[["prompts", "subjects"]].tolist() == [3, 3]
    assert row(pairs, metric="mrr", task="object_attributes")["prompts"] == 1


def test_no_contrast_without_a_random_draw_or_a_hit():
    alone = cause_tables.contrasts({("facts", "moe"): run({-1: RANKS[-1]}, 0)}, BOOTSTRAP)
    assert alone.empty
    late = PROMPTS.assign(rank=50)
    runs = {("facts", "with"): run(RANKS, -1, prompts=late), ("facts", "without"): run(RANKS, 0, prompts=late)}
    table = cause_tables.contrasts(runs, BOOTSTRAP)
    assert set(table.loc[table["contrast"] == "models", "metric"]) == {"mrr"}
    assert set(table.loc[table["contrast"] == "tasks", "metric"]) == {"hit_at_10", "mrr"}


RANK = st.lists(st.integers(1, 40), min_size=4, max_size=4)


@settings(deadline=None, max_examples=25)
@given(RANK, st.lists(RANK, min_size=2, max_size=4))
def test_contrasts_are_differences_of_the_drops_of_the_table_of_blocking(clean, ranks):
    runs = {("facts", "moe"): run(dict(enumerate(ranks, -1)), 0, prompts=PROMPTS.assign(rank=clean))}
    drops = cause_tables.blocking(runs, BOOTSTRAP).set_index("name")
    one, two = drops.loc["geography"], drops.loc["object_attributes"]
    for found in cause_tables.contrasts(runs, BOOTSTRAP).to_dict("records"):
        metric = found["metric"]
        assert np.isfinite([found["low"], found["high"]]).all()
        measured = one[f"{metric}_drop"] - two[f"{metric}_drop"]
        assert found["estimate"] + found["random"] == pytest.approx(measured)
        random = [task[f"{metric}_clean"] - task[f"{metric}_random"] for task in (one, two)]
        assert found["random"] == pytest.approx(random[0] - random[1])


def test_ways_of_blocking_are_told_apart():
    one = run({-1: [2, 4, 40, 8], 0: [1, 2, 20, 4]}, 0)
    other = one["blocking"].assign(how="reroute", rank=one["blocking"]["rank"] * 3)
    both = {("facts", "moe"): one | {"blocking": pd.concat([one["blocking"], other])}}
    for name, keys in (("contrasts", ["metric"]), ("blocking", ["scope", "name"])):
        table = cause_tables.SUMMARIES[name](both, BOOTSTRAP)
        assert set(table["how"]) == {"zero", "reroute"}
        assert not table.duplicated(["how", *keys]).any()


def test_blocking_what_a_random_draw_blocks_makes_no_contrast():
    same = dict.fromkeys((-1, 0, 1), RANKS[-1])
    runs = {("facts", "with"): run(same, -1), ("facts", "without"): run(same, 0)}
    table = cause_tables.contrasts(runs, BOOTSTRAP)
    assert set(table["contrast"]) == {"tasks", "models"}
    assert table[["estimate", "low", "high"]].abs().max(axis=None) < 1e-12
    assert table.query("contrast == 'models'")[["random", "random_low", "random_high"]].abs().max(axis=None) < 1e-12


MAP = table_of(
    "prompt_id positions layer expert rank log_prob",
    *[(3, "readout", 0, 0, 4, -2.0), (3, "readout", 0, -1, 1, -1.0), (5, "readout", 0, 1, 1, -1.5)],
    *[(5, "readout", 0, -1, 2, -2.5), (8, "readout", 0, 0, 1, -1.0), (8, "readout", 0, -1, 10, -4.0)],
    *[(9, "readout", 0, 0, 4, -3.0), (9, "readout", 0, -1, 4, -3.5), (3, "all", 1, 5, 2, -1.25)],
)


def test_expert_map_by_hand():
    runs = {("facts", "moe"): {"prompts": PROMPTS, "expert_map": MAP.sample(frac=1, random_state=0)}}
    table = cause_tables.expert_map(runs, BOOTSTRAP)
    found = row(table, positions="readout", task="all", expert=0)
    # Effects -1, 0.5 and 0 of the three prompts that use it.
    assert found[["estimate", "effect_if_used", "used"]].tolist() == pytest.approx([-0.5 / 4, -0.5 / 3, 0.75])
    assert found["mrr_change"] == pytest.approx((1 / 4 - 1) / 4)
    assert found[["prompts", "subjects"]].tolist() == [4, 4]
    assert found["low"] < found["estimate"] < found["high"]
    assert found["mrr_change_low"] <= found["mrr_change"] <= found["mrr_change_high"]
    shared = row(table, positions="readout", task="object_attributes", expert=-1)
    assert shared[["estimate", "mrr_change", "used"]].tolist() == pytest.approx([(-2.5 - 0.5) / 2, (0.1 - 1) / 2, 1])
    # Exactly nothing where no prompt of the task uses it.
    unused = row(table, positions="readout", task="object_attributes", expert=1)
    assert (
        unused[["estimate", "low", "high", "mrr_change", "mrr_change_low", "mrr_change_high", "used"]].tolist()
        == [0] * 7
    )
    assert np.isnan(unused["effect_if_used"])
    # At all positions only prompt 3 was measured.
    only = row(table, positions="all", task="all", layer=1, expert=5)
    assert only[["estimate", "mrr_change", "prompts"]].tolist() == [-0.25, -0.5, 1]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1))
def test_the_mean_effect_is_that_on_users_times_their_share(seed, share):
    rng = np.random.default_rng(seed)
    rows = [(i, "all", m, e, rng.integers(1, 9), -rng.random()) for i in IDS for m in (0, 2) for e in (-2, -1, 0, 3)]
    drawn = table_of("prompt_id positions layer expert rank log_prob", *rows)
    drawn = pd.concat([drawn.iloc[:1], drawn[rng.random(len(drawn)) < share]]).drop_duplicates(list(drawn)[:4])
    table = cause_tables.expert_map({("facts", "moe"): {"prompts": PROMPTS, "expert_map": drawn}}, BOOTSTRAP)
    used = table[table["used"] > 0]
    assert (used["estimate"] - used["used"] * used["effect_if_used"]).abs().max() < 1e-12
    assert (table.loc[table["used"] == 0, "estimate"] == 0).all()
    every = table[table["task"] == "all"]
    assert len(every) == len(drawn[["layer", "expert"]].drop_duplicates())
    measured = PROMPTS[PROMPTS["prompt_id"].isin(drawn["prompt_id"])].set_index("prompt_id")
    fall = drawn["log_prob"].sum() - measured["log_prob"].loc[drawn["prompt_id"]].sum()
    assert every["estimate"].sum() == pytest.approx(fall / len(measured))


def faithful(scores, log_prob, positions="readout", prompts=PROMPTS):
    """A run whose experts have these scores and log-probabilities when blocked: by prompt, then by (layer, expert)."""
    rows = [(i, *place, lpi, lpi) for i, each in scores.items() for place, lpi in each.items()]
    blocking = [(i, positions, *place, 1, value) for i, each in log_prob.items() for place, value in each.items()]
    return {
        "prompts": prompts,
        "experts": table_of("prompt_id layer expert lpi weight", *rows),
        "expert_map": table_of("prompt_id positions layer expert rank log_prob", *blocking),
    }


def test_faithfulness_by_hand():
    places = [(0, 0), (0, 1), (1, 0), (1, -1)]
    scores = {3: (1, 2, 3, 9), 5: (4, 4, 1, 0), 8: (5, 5, 5, 5), 9: (1, 2, 4, 3)}
    blocking = {3: (-2, -3, -4, -5), 5: (-7, -3, -4, -2), 8: (-2, -3, -4, -5), 9: (-3, -3, -3, -3)}
    named = [{i: dict(zip(places, each)) for i, each in values.items()} for values in (scores, blocking)]
    found = cause_tables.faithfulness({("facts", "moe"): faithful(*named)}, BOOTSTRAP)
    r = row(found, task="all", score="lpi", measure="spearman")
    # Prompt 3 in the same order; of 5, ranks 3.5 3.5 2 1 against 4 2 3 1; 8 has equal scores, 9 equal effects.
    of_5 = np.corrcoef([3.5, 3.5, 2, 1], [4, 2, 3, 1])[0, 1]
    assert r["estimate"] == pytest.approx((1 + of_5) / 2)
    assert r[["left_out", "prompts", "subjects"]].tolist() == [2, 2, 2]
    assert r["difference"] == pytest.approx(r["estimate"] - r["random"])
    assert row(found, task="geography", score="weight", measure="spearman")["left_out"] == 0
    assert found.query("task == 'object_attributes' and measure == 'spearman'").empty
    # The best routed expert (of equal ones the first), against the other routed one of its layer: prompt 3's best is
    # (1, 0), whose layer has no other; 5: (0, 0) and (0, 1); 8: likewise; 9: (1, 0).
    best = row(found, task="all", score="lpi", measure="best")
    assert best["estimate"] == pytest.approx(((-7 + 2) + (-2 + 1.5)) / 2)
    assert best["random"] == pytest.approx(((-3 + 2) + (-3 + 1.5)) / 2)
    assert best["difference"] == pytest.approx(best["estimate"] - best["random"])
    assert best[["left_out", "prompts"]].tolist() == [2, 2]


def test_an_expert_used_elsewhere_only_has_a_score_of_0():
    scores = {3: {(0, 0): 2.0, (0, 1): -1.0}}
    blocking = {3: {(0, 0): -5.0, (0, 1): -1.5, (0, 2): -2.0}}
    found = cause_tables.faithfulness({("facts", "moe"): faithful(scores, blocking, positions="all")}, BOOTSTRAP)
    assert row(found, task="all", score="lpi", measure="spearman")["estimate"] == pytest.approx(1)
    best = row(found, task="all", positions="all", score="lpi", measure="best")
    assert best[["estimate", "random"]].tolist() == pytest.approx([-4, -0.75])


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=12).filter(
        lambda pairs: all(len(set(column)) > 1 for column in zip(*pairs))
    )
)
def test_spearman_is_the_correlation_of_mean_ranks_and_blind_to_scale(pairs):
    def mean_ranks(values):
        return [np.mean([sum(x < y for x in values) + 1, sum(x <= y for x in values)]) for y in values]

    lpi, log_prob = zip(*pairs)
    places = [(0, e) for e in range(len(pairs))]
    runs = [
        faithful({3: dict(zip(places, scores))}, {3: dict(zip(places, log_prob))}) for scores in (lpi, np.exp(lpi) - 9)
    ]
    first, second = (
        row(cause_tables.faithfulness({("facts", "moe"): run}, BOOTSTRAP), task="all", score="lpi", measure="spearman")
        for run in runs
    )
    assert first["estimate"] == pytest.approx(-np.corrcoef(mean_ranks(lpi), mean_ranks(log_prob))[0, 1])
    assert second["estimate"] == pytest.approx(first["estimate"])


def test_shuffled_scores_predict_nothing_as_much_as_chance_allows():
    """Of two experts, shuffled within a prompt, r is 1 or -1; of scores of other prompts it would often be 0."""
    n = 1000
    prompts = pd.DataFrame({"prompt_id": range(n), "task": "t", "relation": "r", "rank": 1, "log_prob": -1.0})
    prompts["subject"] = prompts["prompt_id"].astype(str)
    scores = {i: {(0, 0): 0.0, (0, 1): 1.0} for i in range(n)}
    blocking = {i: {(0, 0): -1.0, (0, 1): -2.0} for i in range(n)}
    table = cause_tables.faithfulness({("facts", "moe"): faithful(scores, blocking, prompts=prompts)}, BOOTSTRAP)
    found = row(table, task="all", score="lpi", measure="spearman")
    assert found[["estimate", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert abs(found["random"]) < 4 / n**0.5
    assert found["random_high"] - found["random_low"] == pytest.approx(2 * 1.645 / n**0.5, rel=0.2)


TRACED = "prompt_id draw level layer expert size position log_prob"
SCORES = table_of(
    "prompt_id draw clean corrupted", (3, 0, -1.0, -5.0), (3, 1, -1.0, -3.0), (5, 0, -2.0, -4.0), (5, 1, -2.0, -1.0)
)


def traced(*rows):
    return {"prompts": PROMPTS, "tracing": table_of(TRACED, *rows).assign(rank=1), "tracing_runs": SCORES}


def test_tracing_by_hand():
    """The noise costs prompt 3 (4 + 2) / 2 nats and prompt 5 (2 - 1) / 2."""
    rows = [(3, 0, "layer", 0, 0, 0, "readout", -4.0), (3, 1, "layer", 0, 0, 0, "readout", -1.0)]
    rows += [(5, 0, "layer", 0, 0, 0, "readout", -3.0), (5, 1, "layer", 0, 0, 0, "readout", -2.0)]
    rows += [(5, 0, "layer", 0, 0, 0, "between", -3.0), (5, 1, "layer", 0, 0, 0, "between", -0.5)]
    rows += [(i, draw, "layer", 1, 0, 0, "readout", clean) for i, draw, clean, _ in SCORES.to_numpy()]
    found = cause_tables.tracing({("facts", "dense"): traced(*rows)}, BOOTSTRAP)
    first = row(found, level="layer", layer=0, position="readout")
    of_3, of_5 = (1 + 2) / 2, (1 - 1) / 2
    assert first["share"] == pytest.approx((of_3 + of_5) / (3 + 0.5))
    assert first[["difference", "total"]].tolist() == pytest.approx([(of_3 + of_5) / 2, 3.5 / 2])
    # Of one subject alone the share is 1.5 / 3 or 0 / 0.5.
    assert first[["low", "high"]].tolist() == pytest.approx([0, 0.5])
    assert first[["prompts", "subjects", "over", "minus"]].tolist() == [2, 2, "mean", ""]
    whole = row(found, level="layer", layer=1)
    assert whole[["share", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    # Prompt 3 has no token between.
    between = row(found, position="between")
    assert between[["share", "total", "prompts"]].tolist() == pytest.approx([(1 + 0.5) / 2 / 0.5, 0.5, 1])
    assert set(found["level"]) == {"layer"}


def test_tracing_of_experts_by_hand():
    rows = [(3, d, "expert", 2, e, 1, "readout", x) for d, e, x in ((0, 4, -4), (0, 6, -1), (1, 4, -1), (1, 6, -3))]
    rows += [(5, d, "expert", 2, 4, 1, "readout", -1) for d in (0, 1)]
    rows += [(3, d, "shared", 2, -1, 1, "readout", -3.0) for d in (0, 1)]
    rows += [(i, d, "coalition", 0, 0, 2, "subject", -1.0) for i in (3, 5) for d in (0, 1)]
    rows += [(3, d, "random", 0, 0, 2, "subject", x) for d in (0, 1) for x in (-4.0, -2.0)]
    found = cause_tables.tracing({("facts", "moe"): traced(*rows)}, BOOTSTRAP)
    # Of prompt 3 expert 4 brings back 1 and 2, expert 6 4 and 0; of 5 its only one 3 and 0: draws before experts.
    mean, best = (row(found, level="expert", over=over) for over in ("mean", "max"))
    assert mean["difference"] == pytest.approx(((1.5 + 2) / 2 + 1.5) / 2)
    assert best["difference"] == pytest.approx((2 + 1.5) / 2)
    assert best["share"] == pytest.approx((2 + 1.5) / 3.5)
    assert mean[["layer", "prompts"]].tolist() == [2, 2]
    assert row(found, level="shared")[["difference", "over"]].tolist() == [(2 + 0) / 2, "mean"]
    coalition = row(found, level="coalition", minus="", size=2)
    assert coalition["difference"] == pytest.approx((3 + 1.5) / 2)
    random = row(found, level="random")
    assert random[["difference", "prompts"]].tolist() == pytest.approx([1, 1])
    # On prompt 3 alone, which has both.
    gap = row(found, level="coalition", minus="random")
    assert gap[["difference", "share", "prompts"]].tolist() == pytest.approx([3 - 1, 2 / 3, 1])
    assert gap["position"] == "subject"


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_coalitions_less_random_ones_are_differences_of_both(seed):
    rng = np.random.default_rng(seed)
    keys = [(i, d, level, size) for i in (3, 5) for d in (0, 1) for level in ("coalition", "random") for size in (2, 4)]
    rows = [(i, d, level, 0, 0, size, "readout", -9 * rng.random()) for i, d, level, size in keys]
    found = cause_tables.tracing({("facts", "moe"): traced(*rows)}, BOOTSTRAP)
    best, random, gap = (
        found[(found["level"] == level) & (found["minus"] == minus)].set_index("size")[["share", "difference"]]
        for level, minus in (("coalition", ""), ("random", ""), ("coalition", "random"))
    )
    assert len(gap) == 2
    assert (best - random - gap).abs().max(axis=None) < 1e-9


def whole_run(dense=False):
    """A run with rows of every kind; a dense one has no experts, and so none of them to block or restore."""
    rows = [
        (i, d, level, m, 0, 0, role, -2.0 - m)
        for i in (3, 5)
        for d in (0, 1)
        for level in ("layer", "attention", "ffn")
        for m in (0, 1)
        for role in cause_plots.ROLES
    ]
    if not dense:
        rows += [
            (i, d, "expert", 1, e, 1, role, -e)
            for i in (3, 5)
            for d in (0, 1)
            for e in (0, 2)
            for role in cause_plots.ROLES
        ]
        rows += [
            (i, d, level, 0, 0, size, "subject", -3.0)
            for i in (3, 5)
            for d in (0, 1)
            for size in (2, 4)
            for level in ("coalition", "random")
        ]
    experts = run(RANKS, 0, 1, -1) | {"expert_map": MAP} | traced(*rows)
    return experts | {kind: experts[kind].iloc[:0] for kind in ("blocking", "experts", "expert_map") if dense}


RUNS = {("facts", "moe"): whole_run(), ("facts", "dense"): whole_run(dense=True)}


@pytest.mark.parametrize("name", [*NEW, "blocking"])
def test_without_rows_a_table_has_its_columns(name):
    summary = cause_tables.SUMMARIES[name]
    full = summary(RUNS, BOOTSTRAP)
    nothing = {kind: table if kind == "prompts" else table.iloc[:0] for kind, table in whole_run().items()}
    for runs in ({}, {("facts", "dense"): nothing}):
        empty = summary(runs, BOOTSTRAP)
        assert empty.empty
        assert list(empty) == list(full)
    assert {"dataset", "prompts", "subjects"} <= set(full)


@pytest.mark.parametrize("name", NEW)
def test_figures_draw_every_model_also_one_without_rows(tmp_path, name):
    for models in (["moe", "dense"], ["dense"]):
        found = {name: cause_tables.SUMMARIES[name]({("facts", m): RUNS["facts", m] for m in models}, BOOTSTRAP)}
        for copy in ("one", "two"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                plots.draw(name, found, models, "note below", tmp_path / f"{copy}.svg")
        text = (tmp_path / "one.svg").read_text()
        assert text == (tmp_path / "two.svg").read_text()
        assert all(words in text for words in (*models, "note below"))


def test_the_figure_of_the_expert_map_shows_what_the_table_says():
    found = {"expert_map": cause_tables.expert_map(RUNS, BOOTSTRAP)}
    axes = cause_plots.expert_map(found, ["moe"], "").axes[0]
    # Shared expert, a gap, experts 0 and 1.
    readout = {e: row(found["expert_map"], positions="readout", task="all", expert=e)["estimate"] for e in (-1, 0, 1)}
    drawn = axes.images[0].get_array().filled(np.nan)
    assert drawn[0].tolist() == pytest.approx([readout[-1], np.nan, readout[0], readout[1]], nan_ok=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["s0", "", "0", "1"]


def test_a_map_has_a_row_for_layers_without_experts():
    found = cause_tables.expert_map(RUNS, BOOTSTRAP)
    found = found[found["expert"] == 0].assign(layer=2)
    drawn = cause_plots.expert_map({"expert_map": found}, ["moe"], "").axes[0].images[0].get_array().filled(np.nan)
    assert np.isnan(drawn[:, 0]).tolist() == [True, True, False]


def dots(axes, label):
    [found] = [each for each in axes.containers if each.get_label() == label]
    return np.column_stack(found.lines[0].get_data()).tolist()


def test_the_figures_of_faithfulness_and_contrasts_show_what_the_tables_say():
    places = [(0, e) for e in range(5)]
    rng = np.random.default_rng(0)
    scores, blocking = ({i: dict(zip(places, rng.normal(size=5))) for i in IDS} for _ in range(2))
    found = {"faithfulness": cause_tables.faithfulness({("facts", "moe"): faithful(scores, blocking)}, BOOTSTRAP)}
    panels = cause_plots.faithfulness(found, ["dense", "moe"], "").axes
    for axes, measure in zip(panels, ("spearman", "best")):
        one = row(found["faithfulness"], task="all", score="lpi", measure=measure)
        assert dots(axes, "LPI")[1] == pytest.approx([one["estimate"], 0.85])
        assert dots(axes, "LPI: control")[1] == pytest.approx([one["random"], 0.85])
        assert np.isnan(dots(axes, "LPI")[0][0])
    runs = {("facts", "with"): run(RANKS, -1, 0), ("facts", "without"): run(RANKS, 0)}
    found = {"contrasts": cause_tables.contrasts(runs, BOOTSTRAP)}
    panels = cause_plots.contrasts(found, ["with", "without"], "").axes
    for axes, keys in zip(panels, ({"model": "with"}, {"model": "without"}, {"contrast": "models", "task": "all"})):
        one = row(found["contrasts"], metric="mrr", **keys)
        assert dots(axes, "MRR: best less random") == [pytest.approx([one["estimate"], 0.15])]
        assert dots(axes, "MRR: random") == [pytest.approx([one["random"], 0.15])]
    assert [label.get_text() for label in panels[2].get_yticklabels()] == ["with - without, 5"]


def test_the_figure_of_tracing_shows_what_the_table_says():
    found = {"tracing": cause_tables.tracing(RUNS, BOOTSTRAP)}
    panels = [axes for axes in cause_plots.tracing(found, ["moe"], "").axes if axes.get_title()]
    for axes, level in zip(panels, ("layer", "attention", "ffn", "expert")):
        drawn = axes.images[0].get_array().filled(np.nan)
        for place, role in enumerate(cause_plots.ROLES):
            one = row(found["tracing"], model="moe", level=level, over="mean", layer=1, position=role)
            assert drawn[1, place] == pytest.approx(one["share"])
        assert [label.get_text() for label in axes.get_xticklabels()] == list(cause_plots.ROLES.values())
    [best] = [line for line in panels[4].get_lines() if line.get_label() == "subject: best"]
    rows = found["tracing"].query("level == 'coalition' and minus == ''")
    assert best.get_xdata().tolist() == [2, 4]
    assert best.get_ydata().tolist() == rows.sort_values("size")["share"].tolist()


@pytest.mark.parametrize("name", [*NEW, *(f"{table}_table" for table in ("contrasts", "faithfulness", "tracing"))])
def test_captions_say_on_what_a_figure_rests(name):
    text = (ROOT / f"workflow/report/{name}.rst").read_text()
    assert all(words in text for words in ("finding about toy models", "s.n_prompts", "percentile bootstrap"))

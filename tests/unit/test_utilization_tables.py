"""Tables and figures of MUI, against brute force, closed forms and a run small enough to be worked out by hand."""

from itertools import combinations, product
from pathlib import Path
from statistics import NormalDist

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from moescope import drawing, utilization_plots, utilization_tables
from moescope.summaries import Bootstrap
from moescope.utilization_tables import SUMMARIES, accumulation, chao2, fit, frequency, inclusion, overlap, spearman

ROOT = Path(__file__).parents[2]
BOOTSTRAP = Bootstrap(bootstrap_draws=50, confidence=0.9, seed=0)

# Layer 0: experts 0 and 1 (neurons 0-1, 2-3) and a shared one (4-7); layer 1: a dense FFN (8-9).
MOE = pd.DataFrame(
    {"layer": [0, 0, 0, 1], "expert": [0, 1, -1, 0], "first": [0, 2, 4, 8], "width": [2, 2, 4, 2]}
).astype({"layer": "int16", "expert": "int16", "first": "int32", "width": "int32"})
DENSE = pd.DataFrame({"layer": [0, 1], "expert": [0, 0], "first": [0, 4], "width": [4, 4]})

# Task, relation, subject, response tokens, key neurons, tokens that used expert 0 and expert 1.
ROWS = [
    ("geography", "capital", "France", 1, [0, 4], 1, 0),
    ("geography", "capital", "Japan", 2, [0, 5, 8], 2, 0),
    ("geography", "language", "France", 1, [4], 1, 0),
    ("entity", "hq", "Sony", 2, [2, 4], 1, 1),
    ("entity", "hq", "Nokia", 2, [2, 3, 5], 1, 1),
]


def run(rows=ROWS, units=MOE, **tables):
    """A run of these samples, in an order that no table may rely on."""
    ids = np.arange(len(rows)) * 3 + 1
    task, relation, subject, tokens, keys, *used = zip(*rows)
    prompts = pd.DataFrame({"prompt_id": ids, "task": task, "relation": relation, "subject": subject})
    found = pd.DataFrame({"prompt_id": ids, "tokens": tokens, "keys": [BitMap(one).serialize() for one in keys]})
    everywhere = units[~((units["layer"] == 0) & (units["expert"] >= 0))] if used else units
    parts = [prompts[["prompt_id"]].assign(tokens=tokens).merge(everywhere[["layer", "expert"]], how="cross")]
    parts += [pd.DataFrame({"prompt_id": ids, "tokens": n, "layer": 0, "expert": i}) for i, n in enumerate(used)]
    expert_tokens = pd.concat(parts).query("tokens > 0").sample(frac=1, random_state=0)
    return {
        "prompts": prompts.sample(frac=1, random_state=1),
        "key_neurons": found.sample(frac=1, random_state=2),
        "expert_tokens": expert_tokens,
        "units": units,
    } | tables


def lpi(values):
    """LPI of experts 0, 1 and -1 of layer 0 in every sample."""
    ids = np.arange(len(ROWS)) * 3 + 1
    rows = [(prompt, 0, expert, value) for prompt in ids for expert, value in zip([0, 1, -1], values)]
    return pd.DataFrame(rows, columns=["prompt_id", "layer", "expert", "lpi"])


def table(name, runs, **options):
    return SUMMARIES[name](runs, BOOTSTRAP, **options)


def row(frame, **where):
    [found] = frame.loc[(frame[list(where)] == pd.Series(where)).all(axis=1)].to_dict("records")
    return found


def of(keys, subjects=None, neurons=8):
    """Samples with these key neurons, of a dense model."""
    units = pd.DataFrame({"layer": [0], "expert": [0], "first": [0], "width": [neurons]})
    subjects = subjects or [str(i) for i in range(len(keys))]
    rows = [("t", "r", subject, 1, key) for subject, key in zip(subjects, keys)]
    return utilization_tables._samples(run(rows, units))


key_sets = st.lists(st.sets(st.integers(0, 7)).map(sorted), min_size=1, max_size=6)


def mean_union(keys, n):
    """Size of the union of the key sets of n samples, the mean over all subsets of that size."""
    return np.mean([len(set().union(*some)) for some in combinations(keys, n)])


@given(key_sets)
@settings(max_examples=30, deadline=None)
def test_rarefaction_is_the_mean_over_all_subsets(keys):
    at = range(1, len(keys) + 1)
    curve, _ = accumulation(of(keys), at, 0.9)
    assert curve["estimate"].tolist() == pytest.approx([mean_union(keys, n) / 8 for n in at])
    assert curve["estimate"].iloc[-1] == len(set().union(*keys)) / 8
    assert (np.diff(curve["estimate"], prepend=0) >= -1e-12).all()
    assert (np.diff(curve["estimate"], 2) <= 1e-12).all()
    assert (curve["low"].isna() | (curve["low"] <= curve["estimate"])).all()


@given(st.integers(1, 2000), st.data())
@settings(max_examples=30, deadline=None)
def test_inclusion_is_that_of_drawing_without_replacement(total, data):
    n = data.draw(st.integers(1, total))
    found = inclusion(total, [n])[:, 0]
    assert found[[0, 1, total]] == pytest.approx([0, n / total, 1], abs=1e-9)
    missed = np.cumprod([1.0, *((total - n - np.arange(5)) / np.maximum(total - np.arange(5), 1)).clip(0)])
    few = min(total, 5)
    assert found[: few + 1] == pytest.approx(1 - missed[: few + 1], abs=1e-9)


def test_chao2_is_the_value_worked_out_by_hand():
    # Four samples; three neurons key in one, one in two, two in four: 6 + 3/4 * 3 * 2 / (2 * 2).
    assert chao2(np.array([5, 3, 1, 0, 2])) == pytest.approx(7.125)
    assert chao2(np.array([5, 0, 1, 0, 2])) == 3
    assert chao2(np.array([5, 3])) == 3


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sets(st.integers(0, 7)).map(sorted)), min_size=2, max_size=7))
@settings(max_examples=30, deadline=None)
def test_intervals_leave_out_one_subject_at_a_time(samples):
    subjects, keys = zip(*samples)
    names = sorted(set(subjects))
    curve, plateau = accumulation(of(keys, list(subjects)), [1, len(keys)], 0.9)
    z, g = NormalDist().inv_cdf(0.95), len(names)
    left = [[key for subject, key in samples if subject != name] for name in names]
    if g == 1:
        assert curve["low"].isna().all()
        return

    def plateau_of(keys):
        counted = np.bincount(np.bincount(np.concatenate([*keys, []]).astype(int), minlength=8))
        return min(chao2(np.pad(counted, (0, len(keys) + 1 - len(counted)))), 8) / 8

    def error(values):
        return np.sqrt((g - 1) / g * ((np.array(values) - np.mean(values)) ** 2).sum())

    for i, n in enumerate([1, len(keys)]):
        half = z * error([mean_union(rest, min(n, len(rest))) / 8 for rest in left])
        assert curve["high"][i] == pytest.approx(min(curve["estimate"][i] + half, 1))
        assert curve["low"][i] == pytest.approx(max(curve["estimate"][i] - half, 0))
    assert plateau["estimate"] == pytest.approx(plateau_of(keys))
    seen = curve["estimate"][1]
    rest = plateau["estimate"] - seen
    ratio = np.exp(z * np.sqrt(np.log(1 + (error([plateau_of(some) for some in left]) / rest) ** 2))) if rest else 1
    assert plateau["low"] == pytest.approx(seen + rest / ratio)
    assert plateau["high"] == pytest.approx(min(seen + rest * ratio, 1))


@given(st.floats(0.05, 1), st.floats(0.5, 500))
@settings(max_examples=30, deadline=None)
def test_the_fit_finds_the_curve_it_was_given(plateau, half):
    at = utilization_tables.grid(200)
    found = fit(at, plateau * at / (half + at))
    assert found == pytest.approx((plateau, half, 0), rel=1e-4, abs=1e-6)


def test_the_fit_is_that_of_least_squares_and_says_where_there_is_none():
    at = np.array([1, 2, 4, 8, 16])
    mui = np.array([0.1, 0.15, 0.3, 0.35, 0.4])
    plateau, half, error = fit(at, mui)
    for p, h in product(plateau * np.array([0.99, 1, 1.01]), half * np.array([0.99, 1, 1.01])):
        assert np.sqrt(((p * at / (h + at) - mui) ** 2).mean()) >= error - 1e-12
    assert fit(at, 0.01 * at)[1] == 16_000
    assert np.isnan(fit(at[:2], mui[:2])).all()


@given(key_sets, key_sets)
@settings(max_examples=25, deadline=None)
def test_overlap_is_that_of_all_subsets_of_equal_size(one, two):
    n = min(len(one), len(two))
    counted = [frequency([np.array(key, int) for key in keys], 8) for keys in (one, two)]
    chances = [inclusion(len(keys), [n])[:, 0][found] for keys, found in zip((one, two), counted)]
    pairs = [
        (set().union(*first), set().union(*second))
        for first, second in product(combinations(one, n), combinations(two, n))
    ]
    either = sum(len(first | second) for first, second in pairs)
    both = sum(len(first & second) for first, second in pairs)
    assert overlap(*chances) == pytest.approx(both / either if either else np.nan, nan_ok=True)


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=4, max_size=12))
@settings(max_examples=25, deadline=None)
def test_spearman_ranks_and_partial_spearman_takes_the_third_out(values):
    frame = pd.DataFrame(values, columns=["x", "y", "z"])
    x, y, z = (frame[[column]].to_numpy(float).T for column in "xyz")
    assert spearman(x, y)[0] == pytest.approx(frame.corr("spearman").loc["x", "y"], nan_ok=True)
    ranks = frame.rank()
    on = np.column_stack([np.ones(len(ranks)), ranks["z"]])
    rest = ranks[["x", "y"]] - on @ np.linalg.lstsq(on, ranks[["x", "y"]], rcond=None)[0]
    if ranks["z"].nunique() > 1 and (rest.abs().max() > 1e-6).all():
        assert spearman(x, y, z)[0] == pytest.approx(rest.corr().loc["x", "y"], abs=1e-6)


def test_utilization_is_the_value_worked_out_by_hand():
    found = row(table("utilization", {("d", "m"): run()}), scope="all")
    # Key: 0, 2, 3, 4, 5, 8. Every unit is used; 8 tokens pass through one routed expert, the shared one and the dense.
    assert (found["tokens"], found["neurons"], found["used_neurons"], found["active_neurons"]) == (8, 10, 10, 8)
    assert (found["key_neurons"], found["mui"], found["mui_used"], found["mui_active"]) == (6, 0.6, 0.6, 0.75)
    assert (found["experts"], found["prompts"], found["subjects"]) == (3, 5, 4)
    # Samples with a key neuron in expert 0: 2 of 5, in expert 1: 2, in the shared one: 5.
    assert (found["key_experts"], found["key_expert_proportion"]) == (1, pytest.approx(1 / 3))
    # Key in one sample: 3, 8; in two: 0, 2, 5; in three: 4.
    assert found["plateau"] == pytest.approx((6 + 4 / 5 * 2 / (2 * 4)) / 10)
    task = row(table("utilization", {("d", "m"): run()}, expert_share=0.4), scope="task", name="entity")
    assert (task["key_neurons"], task["key_experts"], task["matched_prompts"], task["mui_matched"]) == (4, 2, 2, 0.4)
    assert task["mui_random"] == pytest.approx(mean_union([keys for *_, keys, _, _ in ROWS], 2) / 10)


def test_scopes_are_compared_at_the_size_of_the_smallest_of_any_model():
    runs = {("d", "m"): run(), ("d", "other"): run(ROWS[:4]), ("e", "m"): run()}
    found = table("utilization", runs)
    assert found.groupby(["dataset", "scope"])["matched_prompts"].unique().map(list).to_dict() == {
        ("d", "all"): [4],
        ("d", "task"): [1],
        ("d", "relation"): [1],
        ("e", "all"): [5],
        ("e", "task"): [2],
        ("e", "relation"): [1],
    }
    one = row(found, dataset="d", model="m", scope="task", name="geography")
    assert one["mui_matched"] == pytest.approx((2 + 3 + 1) / 3 / 10)
    # Of two samples of entities one may be drawn: both use all units of 10 neurons; of geography none uses expert 1.
    assert one["used_matched"] == pytest.approx(8)
    assert one["used_neurons"] == 8
    # A random sample of the data set.
    assert one["mui_random"] == pytest.approx((2 + 3 + 1 + 2 + 3) / 5 / 10)


def test_a_dense_model_has_neurons_but_no_experts():
    rows = [("t", "r", "a", 2, [0, 5]), ("t", "r", "b", 1, [0])]
    runs = {("d", "dense"): run(rows, DENSE, experts=pd.DataFrame(columns=["prompt_id", "layer", "expert", "lpi"]))}
    found = row(table("utilization", runs), scope="all")
    assert (found["mui"], found["mui_active"], found["active_neurons"]) == (0.25, 0.25, 8)
    assert (found["experts"], found["key_experts"]) == (0, 0)
    assert np.isnan(found["key_expert_proportion"])
    for name in ("key_experts", "key_scores"):
        assert table(name, runs).empty


def test_the_rarefaction_curve_ends_at_the_mui_and_carries_its_fit():
    runs = {("d", "m"): run()}
    curve, mui = table("rarefaction", runs), table("utilization", runs)
    assert curve.groupby("name")["samples"].apply(list).to_dict() == {
        "all": [1, 2, 3, 4, 5],
        "entity": [1, 2],
        "geography": [1, 2, 3],
    }
    for name, part in curve.groupby("name"):
        scope = mui[mui["scope"].isin(["all", "task"]) & (mui["name"] == name)].iloc[0]
        assert part["mui"].iloc[-1] == scope["mui"]
        fitted = part["fitted_plateau"] * part["samples"] / (part["fitted_half"] + part["samples"])
        assert part["fitted"].tolist() == pytest.approx(fitted.tolist(), nan_ok=True)
        assert (part["low"] <= part["mui"]).all()


def test_experts_are_ordered_by_the_samples_they_hold_a_key_neuron_in():
    found = table("key_experts", {("d", "m"): run()}, expert_share=0.4).set_index(["scope", "name", "expert"])
    assert sorted(found.loc["all", "all"].index) == [-1, 0, 1]
    shares = found.loc["all", "all"][["token_share", "sample_share", "mui"]]
    assert shares.loc[0].tolist() == pytest.approx([6 / 8, 0.4, 0.5])
    assert shares.loc[1].tolist() == pytest.approx([2 / 8, 0.4, 1])
    assert shares.loc[-1].tolist() == pytest.approx([1, 1, 0.5])
    assert found.loc["all", "all"][["key", "order", "token_order"]].loc[[0, 1, -1]].to_numpy().tolist() == [
        [True, 2, 2],
        [True, 3, 3],
        [True, 1, 1],
    ]
    assert found.loc["task", "geography"]["sample_share"].loc[[0, 1, -1]].tolist() == pytest.approx([2 / 3, 0, 1])
    assert (found["low"] <= found["sample_share"]).all()
    assert (found["sample_share"] <= found["high"]).all()


def tasks_of(one, two, subjects=None):
    keys = [*one, *two]
    names = ["one"] * len(one) + ["two"] * len(two)
    subjects = subjects or [str(i) for i in range(len(keys))]
    return {("d", "m"): run([(name, name, who, 1, key) for name, who, key in zip(names, subjects, keys)], DENSE)}


def test_tasks_with_the_same_key_neurons_overlap_as_much_as_chance_and_others_less():
    [same, again] = table("key_overlap", tasks_of([[0, 1]] * 5, [[0, 1]] * 6)).to_dict("records")
    assert (same["kind"], again["kind"], same["name"], same["other"]) == ("task", "relation", "one", "two")
    assert (same["jaccard"], same["chance"], same["p"], same["matched_prompts"]) == (1, 1, 1, 5)
    apart = table("key_overlap", tasks_of([[0, 1]] * 6, [[2, 3]] * 6)).iloc[0]
    assert apart["jaccard"] == 0
    assert 0.8 < apart["chance"] <= 1
    assert apart["p"] < 0.05
    assert (apart["samples"], apart["other_samples"], apart["prompts"], apart["subjects"]) == (6, 6, 12, 12)


def test_samples_of_one_subject_are_dealt_out_together():
    found = table("key_overlap", tasks_of([[0, 1]] * 3, [[2, 3]] * 3, ["a"] * 3 + ["b"] * 3)).iloc[0]
    assert (found["jaccard"], found["chance"], found["chance_high"], found["p"]) == (0, 0, 0, 1)


def test_larger_tasks_are_drawn_down_to_the_smaller():
    # Of three samples of the larger task one is drawn: (1/2 + 0 + 0) expected common neurons of 1 + 4/3 in all.
    found = table("key_overlap", tasks_of([[0]], [[0, 1], [2], [3]])).iloc[0]
    assert found["matched_prompts"] == 1
    assert found["jaccard"] == pytest.approx((1 / 3) / (1 + 4 / 3 - 1 / 3))


def test_key_scores_compare_with_use_and_lpi_of_the_same_experts():
    # Sample shares .4, .4 and 1, of routed experts equal; tokens 6, 2, 8.
    runs = {("d", "m"): run(experts=lpi([1.0, 3.0, 2.0]))}
    found = table("key_scores", runs).set_index(["with", "given", "of"])
    assert found.loc[("token_share", "", "all"), "estimate"] == pytest.approx(3 / np.sqrt(12))
    assert found.loc[("lpi", "", "all"), "estimate"] == 0
    assert np.isnan(found.loc[("lpi", "", "routed"), "estimate"])
    assert found.loc[("lpi", "token_share", "all"), "experts"] == 3
    assert set(found["prompts"]) == {5}
    assert set(table("key_scores", {("d", "m"): run()})["with"]) == {"token_share"}
    some = lpi([1.0, 3.0, 2.0]).query("prompt_id < 10")
    assert table("key_scores", {("d", "m"): run(experts=some)}).set_index("with")["prompts"].to_dict() == {
        "token_share": 5,
        "lpi": 3,
    }


def test_what_layers_alone_explain_is_chance():
    units = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "first": [0, 1, 2, 3], "width": 1})
    rows = [("t", "r", str(i), 1, keys) for i, keys in enumerate([[2, 3], [1, 3], [1, 2, 3], *[[0, 1, 2, 3]] * 3])]
    ids = np.arange(6) * 3 + 1
    scores = [(prompt, layer, expert, value) for prompt in ids for layer, expert, value in SCORES]
    frame = pd.DataFrame(scores, columns=["prompt_id", "layer", "expert", "lpi"])
    by_layer = frame.assign(lpi=frame["layer"])
    for experts, layers_explain in ((by_layer, True), (frame, False)):
        found = table("key_scores", {("d", "m"): run(rows, units, experts=experts)})
        one = row(found, **{"with": "lpi", "given": "", "of": "all"})
        assert (one["chance_low"] == pytest.approx(one["chance_high"])) == layers_explain
        assert one["low"] <= one["estimate"] <= one["high"]
        if layers_explain:
            assert one["chance"] == pytest.approx(one["estimate"])


SCORES = [(0, 0, 0.0), (0, 1, 3.0), (1, 0, 1.0), (1, 1, 5.0)]


def test_intervals_of_scores_contain_the_estimate_that_few_samples_blur():
    units = pd.DataFrame({"layer": 0, "expert": range(8), "first": range(8), "width": 1})
    # Expert i holds a key neuron in 8 - i of 8 samples, and has that LPI in all: r is 1, less in most draws.
    rows = [("t", "r", str(i), 1, list(range(i + 1))) for i in range(8)]
    scores = [(i * 3 + 1, 0, expert, 8 - expert) for i in range(8) for expert in range(8)]
    experts = pd.DataFrame(scores, columns=["prompt_id", "layer", "expert", "lpi"])
    one = row(table("key_scores", {("d", "m"): run(rows, units, experts=experts)}), **ALL_LPI)
    assert one["estimate"] == pytest.approx(1) == one["high"]
    assert one["low"] < 1
    # Experts differ in one sample: without it r is not defined, and the draw says nothing.
    rows = [("t", "r", str(i), 1, [1] if i else [0]) for i in range(6)]
    one = row(table("key_scores", {("d", "m"): run(rows, units[:2], experts=experts)}), **ALL_LPI)
    assert (one["estimate"], one["low"], one["high"]) == (-1, -1, -1)


ALL_LPI = {"with": "lpi", "given": "", "of": "all"}


def test_mui_grows_with_the_relations_a_set_mixes():
    rows = [("t", f"r{i}", f"{i}{j}", 1, [i]) for i in range(4) for j in range(5 + i)]
    found = table("diversity", {("d", "m"): run(rows, DENSE)})
    assert found["relations"].tolist() == [1, 2, 3, 4]
    for column in ("mui", "low", "high"):
        assert found[column].tolist() == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert set(found["samples"]) == {5}
    assert set(found["per_relation"]) == {1 / 8}
    assert found["spearman"].tolist() == pytest.approx([1] * 4)
    total, sizes = 26, [5, 6, 7, 8]
    chance = [1 - np.prod([(total - size - i) / (total - i) for i in range(5)]) for size in sizes]
    assert found["shuffled"].tolist() == pytest.approx([sum(chance) / 8] * 4)


def test_sets_have_equally_many_samples():
    # Every sample has one key neuron of its own.
    rows = [("t", f"r{i % 3}", str(i), 1, [i]) for i in range(14)]
    found = table("diversity", {("d", "m"): run(rows, DENSE.assign(first=[0, 7], width=7))})
    assert found[["samples", "mui", "low", "high"]].to_numpy() == pytest.approx(np.array([[4, *[4 / 14] * 3]] * 3))


def test_sets_of_one_relation_have_the_exact_mui_on_average():
    rng = np.random.default_rng(0)
    rows = [("t", f"r{i % 3}", str(i), 1, rng.choice(8, 2, replace=False).tolist()) for i in range(24)]
    found = table("diversity", {("d", "m"): run([row for row in rows if row[2] != "0"], DENSE)}).iloc[0]
    assert found["samples"] == 7
    assert found["mui"] == pytest.approx(found["per_relation"], abs=0.02)
    alone = table("diversity", {("d", "m"): run(rows[::3], DENSE)})
    assert alone["relations"].tolist() == [1]
    assert alone["spearman"].isna().all()


@pytest.mark.parametrize("name", SUMMARIES)
def test_tables_without_rows_have_the_columns_of_those_with_rows(name):
    full = table(name, {("d", "m"): run(experts=lpi([1.0, 3.0, 2.0]))})
    empty = table(name, {})
    assert len(full)
    assert not full.drop(columns=[column for column in full if full[column].isna().all()]).empty
    assert list(empty.columns) == list(full.columns)
    assert {"dataset", "model", "prompts", "subjects"} <= set(empty.columns)
    nothing = {("d", "m"): run() | {"key_neurons": run()["key_neurons"][:0]}}
    assert table(name, nothing).empty


@pytest.mark.parametrize("name", utilization_plots.FIGURES)
def test_figures_show_the_models_that_have_rows(name):
    runs = {("d", "moe"): run(experts=lpi([1.0, 3.0, 2.0])), ("d", "dense"): run([r[:5] for r in ROWS], DENSE_OF_TEN)}
    with matplotlib.rc_context(drawing.STYLE):
        draw = utilization_plots.FIGURES[name]
        for tables in ({name: table(name, runs)}, {name: table(name, {})}):
            figure = draw(tables, ["moe", "dense", "none"], "note")
            figure.canvas.draw()
            titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
            assert titles == list(utilization_plots.OF.values()) if name == "utilization" else ["moe", "dense", "none"]


DENSE_OF_TEN = DENSE.assign(first=[0, 5], width=[5, 5])


def test_the_figure_of_tasks_divides_by_each_denominator():
    found = table("utilization", {("d", "moe"): run()})
    axes = utilization_plots.utilization({"utilization": found}, ["moe"], "").axes
    tasks = found[found["scope"] == "task"]
    for panel, column in zip(axes, ["neurons", "used_matched", "active_neurons"]):
        shown = panel.containers[0].lines[0].get_xdata()
        assert shown.tolist() == pytest.approx((tasks["mui_matched"] * tasks["neurons"] / tasks[column]).tolist())


REPORTED = ["utilization_table", "key_experts_table", "diversity_table"]


@pytest.mark.parametrize("name", [*utilization_plots.FIGURES, *REPORTED])
def test_captions_say_on_what_a_figure_rests(name):
    text = (ROOT / f"workflow/report/{name}.rst").read_text()
    assert "finding about toy models" in text
    assert "s.n_prompts" in text
    assert "Intervals:" in text

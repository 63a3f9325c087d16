"""Training: trajectories and phases from tables made by hand, families from tables of models that do not exist."""

import math
import warnings
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from moescope import training_plots, training_tables
from moescope.summaries import Bootstrap

BOOTSTRAP = Bootstrap(bootstrap_draws=200, confidence=0.9, seed=0)
MOE = pd.DataFrame({"layer": [0, 0, 0, 1, 1, 1], "expert": [0, 1, -1] * 2, "first": [0, 4, 8, 16, 20, 24]})
MOE["width"] = [4, 4, 8] * 2
DENSE = pd.DataFrame({"layer": [0, 1], "expert": [0, 0], "first": [0, 500], "width": [500, 500]})
STEPS = [0, 1, 3, 7, 15, 31, 63, 127, 255]


def run_of(units, subjects, *states):
    """The tables of a run; a state is (name, step, keys of each prompt, ranks, choices of each prompt)."""
    ids = np.arange(len(subjects), dtype="int32") * 2
    tables = [
        pd.DataFrame(
            {
                "prompt_id": ids,
                "rank": ranks,
                "log_prob": -1.0,
                "keys": [BitMap(own).serialize() for own in keys],
                "choices": [np.array(own, dtype="int16") for own in choices],
                "lpi_top_share": 0.5,
                "checkpoint": name,
                "step": step,
            }
        )
        for name, step, keys, ranks, choices in states
    ]
    shuffled = pd.concat(tables).sample(frac=1, random_state=0)
    prompts = pd.DataFrame({"prompt_id": ids, "task": "t", "relation": "r", "subject": subjects})
    return {"prompts": prompts, "units": units, "checkpoints": shuffled}


def of_one(run, summary=training_tables.training, **more):
    return summary({("facts", "m"): run}, BOOTSTRAP, **more)


@pytest.fixture
def small():
    """Three states of a model with two routed and a shared expert in both layers; two prompts share a subject."""
    states = [
        ("first", 0, [{0, 1}, {0, 9}, {0}], [1, 2, 4], [[0, 1], [0, 0], [1, 0]]),
        ("middle", 5, [{0, 17}, {0}, {20}], [1, 2, 2], [[0, 1], [0, 1], [0, 1]]),
        ("final", 20, [{0, 1, 2}, {3, 4}, {5, 31}], [1, 1, 1], [[0, 0], [1, 1], [0, 1]]),
    ]
    return run_of(MOE, ["a", "a", "b"], *states)


def test_a_trajectory_by_hand(small):
    table = of_one(small).set_index(["metric", "checkpoint"])
    neurons = 32
    by_chance = [1 - (30 / 32) ** 2 * (31 / 32), 1 - 30 / 32 * (31 / 32) ** 2, 1 - 29 / 32 * (30 / 32) ** 2]
    expected = {
        "mrr": [7 / 12, 2 / 3, 1],
        "hit10": [1, 1, 1],
        "lpi_top_share": [0.5] * 3,
        "mui": [3 / neurons, 3 / neurons, 7 / neurons],
        # Expert 0 of layer 0 in three, two and two samples, in the last state expert 1 in two as well.
        "key_expert_proportion": [1 / 6, 1 / 6, 2 / 6],
        "routing_previous": [None, 3 / 6, 4 / 6],
        "routing_final": [1 / 6, 4 / 6, None],
    }
    names = ["first", "middle", "final"]
    for metric, values in expected.items():
        found = table.loc[metric]["estimate"]
        assert {n: v for n, v in zip(names, values, strict=True) if v is not None} == pytest.approx(found.to_dict())
    assert table.loc["mui"]["chance"].tolist() == pytest.approx(by_chance)
    assert table.loc["mrr"]["chance"].isna().all()
    assert ((table["low"] <= table["estimate"] + 1e-12) & (table["estimate"] <= table["high"] + 1e-12)).all()
    assert (table["prompts"] == 3).all()
    assert (table["subjects"] == 2).all()
    # At a smaller share experts 0 and 1 of layer 0 are both key in the last state, and the shared one of layer 1 is.
    fewer = of_one(small, expert_share=1 / 3).set_index(["metric", "checkpoint"])
    assert fewer.loc["key_expert_proportion", "estimate"].tolist() == pytest.approx([2 / 6, 3 / 6, 3 / 6])


def test_chance_of_routing_is_the_mean_over_all_pairs_of_prompts(small):
    rng = np.random.default_rng(1)
    chosen = [np.stack([rng.permuted(np.tile(np.arange(5), (2, 1)), axis=1)[:, :3] for _ in range(6)]) for _ in "ab"]
    shared, chance = training_tables._shared(*chosen)
    pairs = [
        len(set(a) & set(b)) / 3 for one in chosen[0] for other in chosen[1] for a, b in zip(one, other, strict=True)
    ]
    own = [
        np.mean([len(set(a) & set(b)) / 3 for a, b in zip(*both, strict=True)]) for both in zip(*chosen, strict=True)
    ]
    assert chance == pytest.approx(np.mean(pairs))
    assert shared.tolist() == pytest.approx(own)


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 11), max_size=5)), min_size=4, max_size=9))
@settings(max_examples=50, deadline=None)
def test_the_influence_of_a_subject_is_what_the_union_loses_without_it(samples):
    samples = [*samples, *((subject, {subject}) for subject in range(4))]
    subjects = pd.Series([subject for subject, _ in samples])
    keys = [np.array(sorted(own), dtype=np.int64) for _, own in samples]
    union, influence, by_chance = training_tables._union(keys, subjects, 12)
    without = [len(set().union(*(own for s, own in samples if s != left))) / 12 for left in range(4)]
    assert union == len(set().union(*(own for _, own in samples))) / 12
    assert influence.tolist() == pytest.approx([3 * (np.mean(without) - value) for value in without])
    assert by_chance == pytest.approx(1 - math.prod(1 - len(own) / 12 for own in keys))


def test_a_dense_model_has_no_rows_of_experts():
    states = [(f"s{step}", step, [{0}, {600}], [1, 2], [[], []]) for step in (0, 5)]
    table = of_one(run_of(DENSE, ["a", "b"], *states))
    assert set(table["metric"]) == {"mrr", "hit10", "lpi_top_share", "mui"}
    assert table.loc[table["metric"] == "mui", "estimate"].tolist() == [0.002, 0.002]


@given(st.floats(1.4, 4.5), st.floats(-2, 2), st.floats(-2, 2), st.floats(-1, 1))
@settings(max_examples=30, deadline=None)
def test_a_planted_change_point_is_found(change, before, after, start):
    x = np.log1p(STEPS)
    values = start + before * np.minimum(x - change, 0) + after * np.maximum(x - change, 0)
    found = training_tables.fit_phases(np.array(STEPS), values[None])
    if abs(before - after) > 0.5:
        assert found.two.all()
        assert np.log1p(found.change_step) == pytest.approx(change, abs=0.05)
        assert found.slopes[:, 0].tolist() == pytest.approx([before, after], abs=0.05)
    line = training_tables.fit_phases(np.array(STEPS), (start + before * x)[None])
    assert not line.two.any()
    assert line.slope == pytest.approx(before, abs=1e-6)
    assert line.error[0] < 1e-6


def test_noise_about_one_line_does_not_pass_for_two():
    rng = np.random.default_rng(0)
    for n in (7, 9, 15):
        steps = np.round(np.geomspace(1, 500, n)).astype(int)
        values = 0.1 * np.log1p(steps) + 0.02 * rng.standard_normal((500, n))
        assert training_tables.fit_phases(steps, values).two.mean() < 0.05


def phased(shares, ranks):
    """A dense model in which each of 20 subjects has key neurons of its own, about as many as `shares` says."""
    states = []
    for number, (step, share, rank) in enumerate(zip(STEPS, shares, ranks, strict=True)):
        count = [round(share * 1000 / 20) + subject % 2 for subject in range(20)]
        keys = [range(50 * subject, 50 * subject + own) for subject, own in enumerate(count)]
        states.append((f"c{number}", step, keys, [rank + subject % 2 for subject in range(20)], [[]] * 20))
    return run_of(DENSE, [f"s{subject}" for subject in range(20)], *states)


RANKS = [90, 80, 70, 60, 50, 30, 10, 3, 1]


def test_phases_are_told_from_a_planted_trajectory():
    shares = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.48, 0.36, 0.24]
    run = phased(shares, RANKS)
    table = of_one(run, training_tables.phases).set_index("segment")
    assert table["phase"].to_dict() == {"before": "accumulating", "after": "evolving"}
    assert (table["two_pieces_share"] > 0.9).all()
    assert (table["checkpoints"] == 9).all()
    point = table.loc["before"]
    assert point["change_step_low"] <= point["change_step"] <= point["change_step_high"]
    assert point["change_step"] == pytest.approx(31, rel=0.1)
    assert point["last_step"] == point["change_step"]
    assert table["mui_slope"].tolist() == pytest.approx([0.1 / math.log(2), -0.12 / math.log(2)], rel=0.1)
    [drawn] = of_one(run).query("metric == 'change_point'").to_dict("records")
    assert (drawn["estimate"], drawn["low"]) == (point["change_step"], point["change_step_low"])
    # MUI that falls while MRR does not rise is neither phase.
    same = of_one(phased(shares, [5] * 9), training_tables.phases).set_index("segment")
    assert same["phase"].to_dict() == {"before": "accumulating", "after": "undecided"}


def test_one_line_is_one_segment_and_few_checkpoints_are_none():
    run = phased(np.linspace(0.1, 0.9, 9), RANKS)
    [row] = of_one(run, training_tables.phases).to_dict("records")
    assert (row["segment"], row["phase"], row["first_step"], row["last_step"]) == ("whole", "accumulating", 0, 255)
    assert np.isnan(row["change_step"])
    run["checkpoints"] = run["checkpoints"].query("step < 60")
    [row] = of_one(run, training_tables.phases).to_dict("records")
    assert row["note"] == "6 checkpoints; a fit of two lines needs at least 7, name more"
    assert row["phase"] == "undecided"
    assert np.isnan(row["mui_slope"])


def of_families(models, value):
    """Summary tables of models, whose MUI, MRR and drops are value(model) times 1, 2, 3 and so on."""
    frames = {"utilization": [], "efficiency": [], "blocking": []}
    for model in models:
        here, one = {"dataset": "facts", "model": model}, value(model)
        size = {"prompts": 8, "subjects": 4}
        for scope in ("all", "task"):
            mui = {"mui": one, "mui_active": 2 * one, "key_expert_proportion": np.nan}
            frames["utilization"].append(here | {"scope": scope} | mui | size)
        for metric, minus in product(("mrr", "layer_efficiency", "ffn_gain"), ("", "other")):
            frames["efficiency"].append(
                here | {"task": "all", "minus": minus, "metric": metric, "estimate": 3 * one if not minus else 99.0}
            )
        for how, n in product(("zero", "reroute"), (1, 10)):
            drop = 4 * one if (how, n) == ("zero", 10) else 99.0
            frames["blocking"].append(
                here
                | {"scope": "all", "how": how, "n_blocked": n, "mrr_drop": drop, "mrr_clean": 1.0, "mrr_random": 0.9}
            )
    return {name: pd.DataFrame(rows) for name, rows in frames.items()}


MEMBERS = {
    f"width-{variant}-{seed}": {"family": "width", "variant": variant, "seed": seed}
    for variant in ("wide", "narrow")
    for seed in (0, 1, 2)
}
VALUES = dict(zip(MEMBERS, [0.10, 0.12, 0.17, 0.20, 0.24, 0.26], strict=True))


def test_families_by_hand():
    table = training_tables.families(of_families(MEMBERS, VALUES.get), MEMBERS, 0.95)
    assert set(table["metric"]) == {"mui", "mui_active", "mrr", "layer_efficiency", "mrr_drop", "mrr_drop_random"}
    assert list(dict.fromkeys(table["variant"])) == ["wide", "narrow"]
    for metric, factor in {"mui": 1, "mui_active": 2, "mrr": 3, "mrr_drop": 4}.items():
        first, second = table[table["metric"] == metric].to_dict("records")
        values = factor * np.array([0.20, 0.24, 0.26])
        # t of two degrees of freedom, from a printed table.
        half = 4.30265 * values.std(ddof=1) / 3**0.5
        assert second["mean"] == pytest.approx(values.mean())
        assert [second["low"], second["high"]] == pytest.approx([values.mean() - half, values.mean() + half])
        gaps = factor * np.array([0.10, 0.12, 0.09])
        half = 4.30265 * gaps.std(ddof=1) / 3**0.5
        found = [second[f"difference{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx([gaps.mean(), gaps.mean() - half, gaps.mean() + half])
        assert (first["minus"], second["minus"]) == ("", "wide")
        assert np.isnan(first["difference"])
    assert table.loc[0, "values"] == "0: 0.1, 1: 0.12, 2: 0.17"
    assert (table["seeds"] == 3).all()
    assert table.loc[table["metric"] == "mrr_drop_random", "mean"].tolist() == pytest.approx([0.1, 0.1])
    assert (table["prompts"] == 8).all()
    assert (table["subjects"] == 4).all()


def test_families_with_a_seed_missing_or_alone_are_paired_by_what_both_have():
    some = {name: member for name, member in MEMBERS.items() if name not in ("width-wide-0", "width-wide-1")}
    table = training_tables.families(of_families(some, VALUES.get), some).query("metric == 'mui'")
    first, second = table.to_dict("records")
    assert first["seeds"] == 1
    assert first["mean"] == 0.17
    assert np.isnan(first["low"])
    assert second["difference"] == pytest.approx(0.09)
    assert np.isnan(second["difference_low"])


@given(st.integers(1, 12), st.floats(0.1, 0.99))
@settings(max_examples=40, deadline=None)
def test_the_quantile_of_t_against_its_density(df, confidence):
    t = training_tables.t_quantile(confidence, df)
    x = np.linspace(-t, t, 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    assert np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x) == pytest.approx(confidence, abs=1e-4)


def test_nothing_gives_empty_tables_with_the_same_columns(small):
    full = {"training": of_one(small), "phases": of_one(small, training_tables.phases)}
    for name, summary in training_tables.SUMMARIES.items():
        empty = summary({}, BOOTSTRAP)
        assert empty.empty
        assert list(empty) == list(full[name])
    tables = of_families(MEMBERS, VALUES.get)
    none = training_tables.families(tables, {})
    assert none.empty
    assert list(none) == list(training_tables.families(tables, MEMBERS))


def test_figures_show_every_state_and_every_seed_and_work_without_rows(small):
    table = of_one(phased([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.48, 0.36, 0.24], RANKS))
    table = pd.concat([table, of_one(small).assign(model="moe")], ignore_index=True)
    found = training_tables.families(of_families(MEMBERS, VALUES.get), MEMBERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = training_plots.training({"training": table}, ["m", "moe", "absent"], "note")
        panels = np.array(figure.axes).reshape(3, 4)
        mui = table.query("model == 'm' and metric == 'mui'")
        assert np.allclose(panels[0, 1].lines[0].get_ydata(), mui["estimate"])
        point = table.query("metric == 'change_point'")["estimate"].iloc[0]
        assert any(np.allclose(line.get_xdata(), np.log1p(point)) for line in panels[0, 1].lines)
        assert len(panels[1, 3].lines) == 4
        assert not panels[0, 3].lines
        assert not panels[2, 0].lines
        figure = training_plots.families({"families": found}, list(MEMBERS), "note")
        dots = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert np.concatenate(dots).tolist() == list(VALUES.values())
        for draw, name, empty in (
            (training_plots.training, "training", table.iloc[:0]),
            (training_plots.families, "families", found.iloc[:0]),
        ):
            draw({name: empty}, ["m"], "note").savefig("/dev/null", format="svg")

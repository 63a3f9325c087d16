"""Result tables and figures of who steers the router, of a run small enough to be worked out by hand."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from moescope import drawing, steering_plots, steering_tables
from moescope.summaries import Bootstrap

ROOT = Path(__file__).parents[2]
BOOTSTRAP = Bootstrap(bootstrap_draws=200, confidence=0.9, seed=0)
PROMPTS = pd.DataFrame(
    {
        "prompt_id": [3, 5, 8, 9],
        "task": ["geography", "geography", "entity", "entity"],
        "relation": ["capital", "capital", "hq", "hq"],
        "subject": ["France", "Japan", "Sony", "France"],
        "rank": [1, 2, 20, 4],
        "log_prob": [-0.5, -1.0, -4.0, -2.0],
    }
)
IDS = PROMPTS["prompt_id"].to_numpy()


def grid(**keys):
    """One row for each prompt and combination of keys, in an order that no table may rely on."""
    rows = pd.MultiIndex.from_product([IDS, *keys.values()], names=["prompt_id", *keys]).to_frame(index=False)
    return rows.sample(frac=1, random_state=0, ignore_index=True)


def by_prompt(table, values):
    return table["prompt_id"].map(dict(zip(IDS, values, strict=True)))


def split():
    """Routers of layers 0 and 1; layer 1 is also read from two experts of layer 0, of which a prompt uses one."""
    rows = [
        (prompt, router, source, layer, unit, logit)
        for prompt, weight in zip(IDS, [1.0, 2.0, 3.0, 2.0])
        for router in (0, 1)
        for source, layer, unit, logit in [
            ("embedding", -1, 0, 1.0),
            ("head", 0, 0, weight),
            ("head", 0, 1, -0.5),
            *([("head", 1, 0, 2 * weight), ("expert", 0, int(weight > 1), 0.25)] if router else []),
        ]
    ]
    return pd.DataFrame(rows, columns=["prompt_id", "router_layer", "source", "layer", "unit", "logit"])


def pairs():
    """50 pairs, r and r_within from 0 to 1 in steps, the second half as large; 10 are significant; one has no r."""
    r = np.append(np.linspace(0, 1, 49) * np.resize([1, -1], 49), np.nan)
    q = np.where(np.arange(50) >= 39, 0.01, 0.5)
    frame = pd.DataFrame({"layer": 0, "head": np.arange(50), "expert_layer": 1, "expert": 2, "r": r, "p": q, "q": q})
    frame = frame.assign(r_within=r / 2, p_within=q, q_within=1.0, r_chance=r / 4, r_chance_within=r / 8, prompts=4)
    return pd.concat([frame.assign(what="gate"), frame.assign(what="lpi", r=-r)]).sample(frac=1, random_state=0)


def mapped():
    table = grid(layer=[0, 1], head=[0, 1, 2])
    damage = 0.5 * table["layer"] + 0.25 * table["head"]
    log_prob = by_prompt(table, PROMPTS["log_prob"]) - damage
    return table.assign(log_prob=log_prob, rank=by_prompt(table, PROMPTS["rank"]) * np.where(table["layer"] == 1, 2, 1))


def routed():
    table = grid(layer=[0, 1], head=[0, 1], router_layer=[0, 1, 2]).query("router_layer >= layer")
    size = by_prompt(table, [1.0, 1.0, 2.0, 4.0])
    return table.assign(
        logit_change=size * (1 + table["router_layer"]),
        overlap=1 - 0.25 * table["head"],
        gate_before=0.1 * size,
        gate_after=0.1 * size * np.where(table["router_layer"] == 2, 0.5, 1),
        lpi_before=size,
        lpi_after=size - table["layer"],
    )


def blocked(n, draw, ranks, gate, forced=False):
    columns = {"n_blocked": n, "draw": draw, "forced": forced, "rank": ranks, "gate_prob": gate, "overlap": 0.5}
    return pd.DataFrame({"prompt_id": IDS, **columns, "expert_lpi": 1.0})


def blocking():
    clean = blocked(0, -1, [1, 2, 20, 4], [0.8, 0.8, 0.4, 0.4]).assign(overlap=1.0, expert_lpi=2.0)
    half = [0.4, 0.4, 0.2, 0.2]
    frames = [clean, blocked(4, -1, [2, 4, 40, 8], half), blocked(4, -1, [1, 2, 20, 8], half, forced=True)]
    frames += [blocked(4, 0, [1, 2, 20, 4], [0.8, 0.8, 0.4, 0.4]), blocked(4, 1, [2, 4, 40, 16], half)]
    # With one head blocked nothing is lost.
    return pd.concat([*frames, blocked(1, -1, [1, 2, 20, 4], half), blocked(1, -1, [1, 2, 20, 4], half, forced=True)])


def gradients():
    table = grid(router_layer=[0, 1], layer=[0, 1], head=[0, 1]).query("layer <= router_layer")
    return table.assign(attribution=0.05 * by_prompt(table, [1.0, 2.0, 3.0, 2.0]) * (1 + table["layer"]))


def paths():
    """Attributions of all heads are 0.1 x weight in router 0, and 0.3 x weight in router 1, which misses 0.05."""
    table = grid(router_layer=[0, 1]).assign(steps=8)
    lost = by_prompt(table, [1.0, 2.0, 3.0, 2.0]) * (0.1 + 0.2 * table["router_layer"]) + 0.05 * table["router_layer"]
    return table.assign(clean=1.0 + table["router_layer"], baseline=1.0 + table["router_layer"] - lost)


RUN = {
    "prompts": PROMPTS,
    "router_attribution": split(),
    "associations": pairs(),
    "head_map": mapped(),
    "head_router": routed(),
    "head_blocking": blocking(),
    "gate_gradients": gradients(),
    "gate_paths": paths(),
}
RUNS = {("facts", "moe"): RUN}
EMPTY = {("facts", "dense"): {kind: table if kind == "prompts" else table.iloc[:0] for kind, table in RUN.items()}}


def row(table, **keys):
    """The one row with these keys; None for all layers."""
    found = table
    for key, value in keys.items():
        found = found[found[key].isna() if value is None else found[key].eq(value).fillna(False)]
    assert len(found) == 1
    return found.iloc[0]


def holds(found, name, value):
    assert found[name] == pytest.approx(value)
    assert found[f"{name}_low"] - 1e-12 <= found[name] <= found[f"{name}_high"] + 1e-12


def test_router_attribution_by_hand():
    table = steering_tables.router_attribution(RUNS, BOOTSTRAP)
    for source, layer, logit in [
        ("embedding", -1, 1.0),
        ("head", 0, 1.5),
        ("head", 1, 4.0),
        ("head", None, 5.5),
        ("expert", 0, 0.25),
        ("expert", None, 0.25),
    ]:
        found = row(table, router_layer=1, source=source, layer=layer)
        holds(found, "logit", logit)
        holds(found, "share", logit / 6.75)
        assert (found["prompts"], found["subjects"]) == (4, 3)
    every = table[table["layer"].isna()]
    assert every.groupby("router_layer")["share"].sum().tolist() == pytest.approx([1, 1])
    assert set(table[table["router_layer"] == 0]["source"]) == {"embedding", "head"}


def test_associations_by_hand():
    table = steering_tables.associations(RUNS, BOOTSTRAP)
    found = row(table, what="gate", control="none")
    assert found[["median", "p75", "largest", "pairs"]].tolist() == pytest.approx([0.5, 0.75, 1.0, 49])
    assert found["significant"] == pytest.approx(10 / 49)
    within = row(table, what="lpi", control="relation")
    assert within[["median", "largest", "significant"]].tolist() == pytest.approx([0.25, 0.5, 0.0])
    assert found[["chance_p95", "chance_largest"]].tolist() == pytest.approx([0.95 / 4, 0.25])
    assert within["chance_largest"] == pytest.approx(0.125)
    # Ten of 49 pairs have the smallest p, .01.
    assert found["least_q"] == pytest.approx(49 * 0.01 / 10)
    best = steering_tables.association_pairs(RUNS, BOOTSTRAP)
    gate = best[best["what"] == "gate"]
    assert gate["head"].tolist() == list(range(48, 28, -1))
    assert gate["r"].iloc[:2].tolist() == pytest.approx([1.0, -47 / 48])
    assert best["what"].value_counts().tolist() == [20, 20]


def test_gates_without_heads_below_them_have_no_rows():
    """A family whose attention blocks are one component has paths, and no gradients."""
    none = RUN | {"gate_gradients": RUN["gate_gradients"].iloc[:0]}
    assert steering_tables.gate_gradients({("facts", "hybrid"): none}, BOOTSTRAP).empty


def test_head_map_by_hand():
    table = steering_tables.head_map(RUNS, BOOTSTRAP)
    assert len(table) == 6
    found = row(table, layer=1, head=2)
    holds(found, "log_prob_drop", 1.0)
    holds(found, "mrr_drop", (1 + 1 / 2 + 1 / 20 + 1 / 4) / 8)
    assert row(table, layer=0, head=1)["mrr_drop"] == 0


def test_head_router_by_hand():
    table = steering_tables.head_router(RUNS, BOOTSTRAP)
    last = row(table, layer=1, head=1, router_layer=2)
    for name, value in {"logit_change": 6.0, "overlap": 0.75, "gate_change": -0.5, "lpi_change": -1.0}.items():
        holds(last, name, value)
    every = row(table, layer=1, head=1, router_layer=None)
    for name, value in {"logit_change": 5.0, "overlap": 0.75, "gate_change": -0.25, "lpi_change": -1.0}.items():
        holds(every, name, value)
    # Layer 0 reaches three routers, one of which loses half.
    holds(row(table, layer=0, head=0, router_layer=None), "gate_change", -1 / 6)
    assert len(table) == 2 * (3 + 1) + 2 * (2 + 1)


def test_head_blocking_by_hand():
    table = steering_tables.head_blocking(RUNS, BOOTSTRAP)
    found = row(table, scope="all", n_blocked=4)
    clean = (1 + 1 / 2 + 1 / 20 + 1 / 4) / 4
    forced = (1 + 1 / 2 + 1 / 20 + 1 / 8) / 4
    assert found["mrr_clean"] == pytest.approx(clean)
    for name, value in {
        "mrr_blocked": clean / 2,
        "mrr_drop": clean / 2,
        "mrr_change": -0.5,
        "mrr_forced": forced,
        "recovered": (forced - clean / 2) / (clean / 2),
        "hit_at_10_drop": 0.0,
        "gate_prob_blocked": 0.3,
        "gate_prob_change": -0.5,
        "overlap_drop": 0.5,
        "expert_lpi_drop": 1.0,
    }.items():
        holds(found, name, value)
    worse = (1 / 2 + 1 / 4 + 1 / 40 + 1 / 16) / 4
    assert found["mrr_random"] == pytest.approx((clean + worse) / 2)
    assert found[["mrr_draws_as_low", "gate_prob_draws_as_low", "draws"]].tolist() == [0.5, 0.5, 2]
    assert found["mrr_random_low"] == pytest.approx(worse + 0.05 * (clean - worse))
    assert set(table["name"]) == {"all", "geography", "entity", "capital", "hq"}
    assert row(table, scope="relation", name="capital", n_blocked=4)["mrr_blocked"] == pytest.approx(3 / 8)


def test_nothing_is_recovered_where_nothing_is_sure_to_be_lost():
    none = row(steering_tables.head_blocking(RUNS, BOOTSTRAP), scope="all", n_blocked=1)
    assert (none["mrr_drop"], none["draws"]) == (0, 0)
    assert none[["recovered", "recovered_low", "recovered_high", "mrr_random", "mrr_draws_as_low"]].isna().all()
    assert none["gate_prob_change"] == pytest.approx(-0.5)
    # A mean drop of one of three subjects: some draws lose nothing.
    one = blocking()
    one.loc[(one["n_blocked"] == 1) & ~one["forced"], "rank"] = [1, 4, 20, 4]
    one = row(
        steering_tables.head_blocking({("facts", "moe"): RUN | {"head_blocking": one}}, BOOTSTRAP),
        scope="all",
        n_blocked=1,
    )
    assert one["mrr_drop"] > 0 >= one["mrr_drop_low"]
    assert np.isnan(one["recovered"])


def test_of_a_dense_model_ranks_alone_are_said():
    dense = blocking().query("not forced").assign(gate_prob=np.nan, overlap=np.nan, expert_lpi=np.nan)
    found = row(
        steering_tables.head_blocking({("facts", "dense"): RUN | {"head_blocking": dense}}, BOOTSTRAP),
        scope="all",
        n_blocked=4,
    )
    assert found[["mrr_change", "mrr_draws_as_low"]].tolist() == pytest.approx([-0.5, 0.5])
    about = found.index[found.index.str.contains("gate_prob|overlap|expert_lpi|forced|recovered")]
    assert found[about].isna().all()


def test_gate_gradients_by_hand():
    table = steering_tables.gate_gradients(RUNS, BOOTSTRAP)
    for router, layer, traced in [(0, None, 0.2), (1, 0, 0.1), (1, 1, 0.2), (1, None, 0.3)]:
        holds(row(table, router_layer=router, layer=layer), "traced", traced)
    # Summed attributions 0.2 and 0.6 of clean probabilities 1 and 2.
    holds(row(table, router_layer=None, layer=None), "traced", 0.8 / 3)
    layers = table[table["router_layer"].isna() & table["layer"].notna()]
    assert layers["traced"].tolist() == pytest.approx([0.4 / 3, 0.4 / 3])
    whole = row(table, router_layer=1, layer=None)
    holds(whole, "error", 0.05)
    assert whole[["clean", "baseline"]].tolist() == pytest.approx([2.0, 2 - 0.65])
    assert row(table, router_layer=0, layer=None)["error"] == pytest.approx(0)
    assert np.isnan(row(table, router_layer=1, layer=1)["error"])
    assert row(table, router_layer=None, layer=None)["error"] == pytest.approx(0.025)


@pytest.mark.parametrize("name", steering_tables.SUMMARIES)
def test_no_rows_give_an_empty_table_with_the_same_columns(name):
    full, none = (steering_tables.SUMMARIES[name](runs, BOOTSTRAP) for runs in (RUNS, EMPTY))
    assert len(full) > 0
    assert none.empty
    assert list(none) == list(full)
    both = steering_tables.SUMMARIES[name](RUNS | EMPTY, BOOTSTRAP)
    pd.testing.assert_frame_equal(both, full)


def drawn(figure, runs, models, path):
    with matplotlib.rc_context(drawing.STYLE):
        made = steering_plots.FIGURES[figure](
            {figure: steering_tables.SUMMARIES[figure](runs, BOOTSTRAP)}, models, "a note"
        )
        made.savefig(path, format="svg", metadata={"Date": None})
    return made, path.read_text()


@pytest.mark.parametrize("figure", steering_plots.FIGURES)
def test_figures_need_their_own_table_only_and_leave_a_panel_empty_for_a_model_without_rows(tmp_path, figure):
    for runs, models in ((RUNS, ["moe"]), (RUNS | EMPTY, ["dense", "moe"]), (EMPTY, ["dense"])):
        one, two = (drawn(figure, runs, models, tmp_path / f"{name}.svg")[1] for name in ("one", "two"))
        assert one == two
        assert all(words in one for words in (*models, "a note"))


def points(axes, label):
    [line] = [line for line in axes.get_lines() if line.get_label() == label]
    return np.column_stack(line.get_data()).tolist()


def test_figures_draw_what_the_tables_say(tmp_path):
    [axes] = drawn("router_attribution", RUNS, ["moe"], tmp_path / "figure.svg")[0].axes
    assert points(axes, "head") == [[0, pytest.approx(1.5 / 2.5)], [1, pytest.approx(5.5 / 6.75)]]
    assert points(axes, "expert") == [[1, pytest.approx(0.25 / 6.75)]]
    axes, bar = drawn("head_map", RUNS, ["moe"], tmp_path / "figure.svg")[0].axes
    assert axes.images[0].get_array().tolist() == [pytest.approx([0, 0.25, 0.5]), pytest.approx([0.5, 0.75, 1.0])]
    assert bar.get_ylabel() == "log-probability lost (nats)"
    axes, _ = drawn("head_router", RUNS, ["moe"], tmp_path / "figure.svg")[0].axes
    assert axes.images[0].get_array()[:, 0].tolist() == pytest.approx([-1 / 6, -0.25])
    rank, gate = drawn("head_blocking", RUNS, ["moe"], tmp_path / "figure.svg")[0].axes
    clean = 1.8 / 4
    assert points(rank, "best by LPI") == [[0, clean], [1, clean], [4, clean / 2]]
    assert points(rank, "best by LPI, clean experts forced") == [[0, clean], [1, clean], [4, pytest.approx(1.675 / 4)]]
    assert points(gate, "best by LPI") == [[0, pytest.approx(0.6)], [1, pytest.approx(0.3)], [4, pytest.approx(0.3)]]
    assert [x for x, _ in points(gate, "random (matched)")] == [0, 4]
    [axes] = drawn("gate_gradients", RUNS, ["moe"], tmp_path / "figure.svg")[0].axes
    assert points(axes, "all heads") == [[0, pytest.approx(0.2)], [1, pytest.approx(0.3)]]
    assert points(axes, "lost without all heads") == [[0, pytest.approx(0.2)], [1, pytest.approx(0.65 / 2)]]
    [axes] = drawn("associations", RUNS, ["moe"], tmp_path / "figure.svg")[0].axes
    assert axes.get_lines()[0].get_xdata().tolist() == pytest.approx([0.5, 0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    "name",
    [
        *steering_plots.FIGURES,
        "associations_table",
        "association_pairs_table",
        "head_blocking_table",
        "gate_gradients_table",
    ],
)
def test_captions_say_on_what_a_figure_rests(name):
    text = (ROOT / f"workflow/report/{name}.rst").read_text()
    assert "finding about toy models" in text
    assert "s.n_prompts" in text
    assert ("percentile bootstrap" in text) == (name not in ("associations_table", "association_pairs_table"))

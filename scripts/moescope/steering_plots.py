"""Figures of who steers the router, and of heads taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Tables,
    axis_labels,
    curve,
    first_panel,
    over_depth,
    panel_grid,
    unit_maps,
)

SOURCES = {
    "embedding": (GREEN, "D", "-"),
    "head": (BLUE, "o", "-"),
    "expert": (ORANGE, "s", "-"),
    "shared": (ORANGE, "^", "--"),
    "ffn": (ORANGE, "x", ":"),
    "attention": (BLUE, "x", ":"),
    "bias": (GREY, "+", ":"),
}
"""Colour, marker and line of each kind of source."""


def router_attribution(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of each kind of source in what pulls a router towards the experts that it chose, over depth."""
    table = tables["router_attribution"]
    table = table[table["layer"].isna()]
    kinds = {kind: style for kind, style in SOURCES.items() if (table["source"] == kind).any()}
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            for kind, (colour, marker, line) in kinds.items():
                style = {"color": colour, "marker": marker, "linestyle": line, "label": kind}
                _curve(axes, rows[rows["source"] == kind], "router_layer", "share", **style)
        over_depth(figure, panels, "share of the pull towards the chosen experts")
    return figure


def associations(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Distribution of |r| over all pairs of a head and an expert: median, quartiles, 5% to 95%, and the largest.

    Grey: up to 95%, and the largest, after a permutation.
    """
    table = tables["associations"]
    order = [(what, control) for what in ("gate", "lpi") for control in ("none", "relation")]
    with panel_grid(models, note, height=1.7) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model].set_index(["what", "control"]).reindex(order)
            colours = [BLUE if control == "none" else ORANGE for _, control in order]
            y = np.arange(len(order))
            axes.hlines(y, rows["p5"], rows["p95"], color=colours, linewidth=1)
            axes.hlines(y, rows["p25"], rows["p75"], color=colours, linewidth=4)
            axes.plot(rows["median"], y, "|", color="white")
            axes.plot(rows["largest"], y, "x", color="black", markersize=4)
            axes.hlines(y + 0.25, 0, rows["chance_p95"], color=GREY, linewidth=1)
            axes.plot(rows["chance_largest"], y + 0.25, "x", color=GREY, markersize=4)
            names = [what + (", within relations" if control == "relation" else "") for what, control in order]
            axes.set_yticks(y, names)
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
        axis_labels(figure, panels, "|r| of a head's LPI and an expert", "")
    return figure


def head_map(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Log-probability that is lost when a head is blocked at the readout position, layer by head."""
    return unit_maps(tables["head_map"], "head", "log_prob_drop", "log-probability lost (nats)", models, note)


def head_router(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Change of the gate probability of the clean choice, mean over routers, when a head is blocked, layer by head."""
    table = tables["head_router"]
    table = table[table["router_layer"].isna()]
    return unit_maps(table, "head", "gate_change", "relative change of gate probability", models, note)


def head_blocking(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MRR and gate probability against the number of heads blocked: best and random ones, and clean experts forced.

    A dense model has no gate probability, and its panel is bare.
    """
    table = tables["head_blocking"]
    table = table[table["scope"] == "all"]
    labels = {"mrr": "MRR", "gate_prob": "gate probability"}
    chosen = {f"{model}: {label}": (model, metric) for model in models for metric, label in labels.items()}
    with panel_grid(list(chosen), note) as (figure, panels):
        for name, axes in panels.items():
            model, metric = chosen[name]
            rows = table[table["model"] == model].sort_values("n_blocked")
            if rows[f"{metric}_clean"].isna().all():
                axes.set_axis_off()
                continue
            clean = rows.iloc[:1].assign(n_blocked=0)
            for end in ("", "_low", "_high"):
                names = [f"{metric}_blocked{end}", f"{metric}_random{end}", f"mrr_forced{end}"]
                clean = clean.assign(**dict.fromkeys(names, clean[f"{metric}_clean"]))
            rows = pd.concat([clean, rows])
            sides = [("random", GREY, "", "--", "random (matched)"), ("blocked", ORANGE, "s", "-", "best by LPI")]
            for side, colour, marker, line, label in sides:
                style = {"color": colour, "marker": marker, "linestyle": line, "label": label}
                _curve(axes, rows, "n_blocked", f"{metric}_{side}", **style)
            if metric == "mrr":
                label = "best by LPI, clean experts forced"
                _curve(axes, rows, "n_blocked", "mrr_forced", color=BLUE, marker="o", linestyle=":", label=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis_labels(figure, panels, "heads blocked", "MRR or gate probability of the clean choice")
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def gate_gradients(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of the gate probability of the chosen experts that integrated gradients trace to heads, over depth."""
    table = tables["gate_gradients"]
    table = table[table["router_layer"].notna()]
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            every = rows[rows["layer"].isna()].sort_values("router_layer")
            own = rows[rows["layer"] == rows["router_layer"]]
            _curve(axes, every, "router_layer", "traced", color=BLUE, marker="o", label="all heads")
            _curve(axes, own, "router_layer", "traced", color=ORANGE, marker="s", label="heads of the router's layer")
            removed = 1 - every["baseline"] / every["clean"]
            axes.plot(every["router_layer"], removed, color="black", linestyle=":", label="lost without all heads")
        over_depth(figure, panels, "share of the gate probability")
    return figure


def _curve(axes: Axes, rows: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """A curve of a column with its own interval, without what is not defined."""
    rows = rows.assign(low=rows[f"{y}_low"], high=rows[f"{y}_high"]).dropna(subset=y).astype({x: int})
    curve(axes, rows, x, y, **style)


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {
    "router_attribution": router_attribution,
    "associations": associations,
    "head_map": head_map,
    "head_router": head_router,
    "head_blocking": head_blocking,
    "gate_gradients": gate_gradients,
}

"""Figures of interventions: what breaks, what routes, and who steers the router."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
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
    heat_map,
    panel_grid,
    unit_maps,
)

METRICS = (("hit_at_10", "HIT@10", BLUE, "o"), ("mrr", "MRR", ORANGE, "s"))

ROLES = {
    "subject_first": "first",
    "subject_middle": "middle",
    "subject_last": "last",
    "between": "between",
    "readout": "readout",
}
"""Roles of tokens in their order; first, middle and last are those of the subject."""


def blocking(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MRR against the number of experts blocked: a relation's best ones, in each way, and matched random ones.

    Grey: the random draws of the first way, zero if it is among them.
    """
    table = tables["blocking"]
    table = table[table["scope"] == "all"]
    ways = sorted(table["how"].unique(), reverse=True)
    styles = [(ORANGE, "s", ""), (BLUE, "o", ": "), (GREEN, "D", ": ")]
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for way, (colour, marker, colon) in zip(ways, styles, strict=False):
                rows = table[(table["model"] == model) & (table["how"] == way)].sort_values("n_blocked")
                x = np.arange(len(rows) + 1)
                columns = [f"mrr_{side}{end}" for side in ("blocked", "random") for end in ("", "_low", "_high")]
                values = {name: np.concatenate([rows["mrr_clean"].iloc[:1], rows[name]]) for name in columns}
                if way == ways[0]:
                    low, high = values["mrr_random_low"], values["mrr_random_high"]
                    axes.fill_between(x, low, high, color=GREY, alpha=0.35, linewidth=0)
                    axes.plot(x, values["mrr_random"], color=GREY, linestyle="--", label="random (matched)")
                    axes.set_xticks(x, ["0", *rows["n_blocked"].astype(str)])
                best = values["mrr_blocked"]
                spread = np.abs(np.stack([values["mrr_blocked_low"], values["mrr_blocked_high"]]) - best)
                label = f"best by LPI{colon}{way if colon else ''}"
                axes.errorbar(x, best, spread, color=colour, marker=marker, markersize=4, capsize=2, label=label)
        axis_labels(figure, panels, "routed experts blocked", "MRR")
        first_panel(panels).legend()
    return figure


def keep_only(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """HIT@10 and MRR when only some experts are kept."""
    table = tables["keep_only"]
    table = table[table["task"] == "all"]
    height = 0.22 * table.groupby("model").size().max() + 0.6
    with panel_grid(models, note, height=height) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model].sort_values(
                ["shared", "routed"], key=lambda c: c.replace(-1, 1 << 14)
            )
            y = np.arange(len(rows))
            for metric, label, colour, marker in METRICS:
                columns = (metric, f"{metric}_low", f"{metric}_high")
                _dots(axes, rows, y, columns, color=colour, marker=marker, label=label)
            axes.set_yticks(y, rows["kept"])
            axes.invert_yaxis()
            axes.set_xlim(-0.03, 1.03)
        axis_labels(figure, panels, "HIT@10, MRR", "experts kept")
        first_panel(panels).legend()
    return figure


def contrasts(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Difference of drops between two tasks (a panel a model) and between two models; grey: of the random draws."""
    table = tables["contrasts"]
    panel_of = table["model"].where(table["contrast"] == "tasks", "with minus without shared experts")
    table = table[table["task"].isin(["", "all"])].assign(panel=panel_of)
    names = [*models, *sorted(set(table["panel"]) - set(models))]
    n_rows = table[["panel", "first", "second", "how", "n_blocked"]].drop_duplicates().groupby("panel").size().max()
    with panel_grid(names, note, width=5, height=0.3 * np.nan_to_num(n_rows, nan=1) + 0.6) as (figure, panels):
        for name, axes in panels.items():
            rows = table[table["panel"] == name].sort_values(["first", "second", "how", "n_blocked"])
            way = rows["how"] + " " if table["how"].nunique() > 1 else ""
            labels = rows["first"] + " - " + rows["second"] + ", " + way + rows["n_blocked"].astype(str)
            ticks = list(dict.fromkeys(labels))
            for offset, (metric, label, colour, marker) in zip((-0.15, 0.15), METRICS, strict=True):
                mine = rows[rows["metric"] == metric]
                y = np.array([ticks.index(one) for one in labels[mine.index]]) + offset
                _with_control(axes, mine, y, f"{label}: best less random", f"{label}: random", colour, marker)
            axes.axvline(0, color="black", linewidth=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_yticks(range(len(ticks)), ticks)
            axes.invert_yaxis()
        axis_labels(figure, panels, "difference of drops (of models: of relative drops)", "experts blocked")
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def expert_map(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Mean effect of blocking every expert at the readout position; shared experts stand apart on the left."""
    table = tables["expert_map"]
    table = table[(table["task"] == "all") & (table["positions"] == "readout")]
    return unit_maps(table, "expert", "estimate", "mean effect (nats)", models, note)


def faithfulness(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """How well LPI and gate weight predict the effect of blocking at the readout position; grey: their controls."""
    table = tables["faithfulness"]
    table = table[(table["task"] == "all") & (table["positions"] == "readout")]
    units = {"spearman": "Spearman r", "best": "effect of blocking the best expert (nats)"}
    scores = (("lpi", "LPI", ORANGE, "s"), ("weight", "gate weight", BLUE, "o"))
    with panel_grid(list(units), note, height=0.4 * len(models) + 0.7, sharey=True) as (figure, panels):
        for measure, axes in panels.items():
            for offset, (score, label, colour, marker) in zip((-0.15, 0.15), scores, strict=True):
                rows = table[(table["measure"] == measure) & (table["score"] == score)]
                rows = rows.set_index("model").reindex(models)
                y = np.arange(len(models)) + offset
                _with_control(axes, rows, y, label, f"{label}: control", colour, marker)
            axes.axvline(0, color="black", linewidth=0.5)
            axes.set_title("")
            axes.set_xlabel(units[measure])
            axes.set_yticks(range(len(models)), models)
        first_panel(panels).invert_yaxis()
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def tracing(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of the log-probability restored, layer by token role; coalitions of experts against random ones by size.

    A row of panels a model, each map with a colour scale of its own: one residual state, one attention block, one FFN
    block, one routed expert (mean over those of the layer).
    """
    table = tables["tracing"]
    table = table[(table["over"] == "mean") & (table["minus"] == "")]
    levels = {"layer": "residual stream", "attention": "attention", "ffn": "FFN", "expert": "one expert"}
    levels |= {"coalition": "coalitions of experts"}
    names = [f"{model}: {title}" for model in models for title in levels.values()]
    with panel_grid(names, note, columns=len(levels), width=2.8) as (figure, panels):
        for (model, level), axes in zip(product(models, levels), panels.values(), strict=True):
            mine = table[table["model"] == model]
            if level == "coalition":
                _coalitions(axes, mine)
                continue
            rows = mine[(mine["level"] == level) & mine["position"].isin(ROLES)]
            wide = rows.pivot(index="layer", columns="position", values="share")
            if not wide.empty:
                wide = wide[[role for role in ROLES if role in wide]].rename(columns=ROLES)
                heat_map(figure, axes, wide, "share restored")
                axes.tick_params(axis="x", rotation=45)
        axis_labels(figure, panels, "token (first, middle, last: of the subject)", "layer")
    return figure


def _coalitions(axes: Axes, rows: pd.DataFrame) -> None:
    """Share restored by coalitions of experts, and by as many random ones (hollow), against their size."""
    hollow: Any = {"markerfacecolor": "white", "linestyle": "--"}
    for position, colour, marker in (("readout", BLUE, "o"), ("subject", ORANGE, "s")):
        for level, label, style in (("coalition", "best", {}), ("random", "random", hollow)):
            found = rows[(rows["level"] == level) & (rows["position"] == position)]
            if len(found):
                named = {"label": f"{position}: {label}", "color": colour, "marker": marker}
                curve(axes, found, "size", "share", **named, **style)
    axes.set_xlabel("experts restored together")
    axes.set_ylabel("share restored")
    if axes.get_lines():
        axes.legend(fontsize=7)


def _with_control(
    axes: Axes, rows: pd.DataFrame, y: Float[np.ndarray, " rows"], label: str, control: str, colour: str, marker: str
) -> None:
    """Estimates with their intervals, and hollow and grey those of the column `random`."""
    hollow: Any = {"color": GREY, "marker": marker, "markerfacecolor": "white", "label": control}
    _dots(axes, rows, y, ("random", "random_low", "random_high"), **hollow)
    _dots(axes, rows, y, ("estimate", "low", "high"), color=colour, marker=marker, label=label)


def _dots(
    axes: Axes, rows: pd.DataFrame, y: Float[np.ndarray, " rows"], columns: tuple[str, str, str], **style: Any
) -> None:
    """A point with its interval for each row; `columns`: estimate, low, high."""
    estimate, *ends = (rows[column].to_numpy(float) for column in columns)
    axes.errorbar(estimate, y, xerr=np.abs(np.stack(ends) - estimate), markersize=4, ls="", **style)


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {
    "blocking": blocking,
    "keep_only": keep_only,
    "contrasts": contrasts,
    "expert_map": expert_map,
    "faithfulness": faithfulness,
    "tracing": tracing,
}

"""Figures of the Model Utilization Index: how many neurons and experts tasks use, and which they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.drawing import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    ORANGE,
    Tables,
    axis_labels,
    curve,
    first_panel,
    panel_grid,
    unit_maps,
)

SERIES = tuple(zip(("-", "--", "-.") * 4, (BLUE, ORANGE, GREEN, GREY) * 3, strict=True))
MARKERS = "osD^vP*X"
OF = {
    "neurons": "of all FFN neurons",
    "used_matched": "of those in units that are used",
    "active_neurons": "of those that one token passes through",
}
"""What the key neurons of so many samples are divided by."""

SCORES = {
    ("token_share", ""): "use",
    ("lpi", ""): "LPI",
    ("lpi", "token_share"): "LPI, given use",
}
"""What an expert's share of samples is compared with, and what is given."""


def utilization(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MUI of each task at equal numbers of samples, for each denominator; MoE models filled, dense ones hollow."""
    table = tables["utilization"]
    table = table[table["scope"] == "task"]
    tasks = list(table["name"].unique())
    with panel_grid(list(OF.values()), note, columns=3, height=0.2 * len(tasks) * len(models) / 3 + 1.5) as (
        figure,
        panels,
    ):
        for (of, axes), (i, model) in product(zip(OF, panels.values(), strict=True), enumerate(models)):
            rows = table[table["model"] == model]
            y = np.array([tasks.index(task) for task in rows["name"]]) + 0.7 * ((i + 0.5) / len(models) - 0.5)
            scale = rows["neurons"] / rows[of]
            values = rows[["mui_matched", "mui_matched_low", "mui_matched_high"]].mul(scale, axis=0)
            dense = (rows["experts"] == 0).all()
            style = {"color": BLUE if dense else ORANGE, "markerfacecolor": "white" if dense else None}
            _dots(axes, values, y, marker=MARKERS[i % len(MARKERS)], label=model, **style)
            axes.plot(rows["mui_random"] * scale, y, ls="", marker="|", color="black")
            axes.set_yticks(range(len(tasks)), tasks if axes is first_panel(panels) else [])
            axes.set_ylim(max(len(tasks), 1) - 0.5, -0.5)
        axis_labels(figure, panels, "MUI", "")
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def rarefaction(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MUI against the number of samples, of all samples and of each task; dotted: the fitted curves, twice as far."""
    table = tables["rarefaction"]
    series = dict(zip(table["name"].unique(), [("-", "black"), *SERIES * len(table)], strict=False))
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for name, (line, colour) in series.items():
                rows = table[(table["model"] == model) & (table["name"] == name)]
                curve(axes, rows, "samples", "mui", color=colour, linestyle=line, label=name)
                for n, plateau, half in rows[["samples", "fitted_plateau", "fitted_half"]].tail(1).to_numpy(float):
                    at = np.linspace(0, 2 * n, 100)
                    axes.plot(at, plateau * at / (half + at), color=colour, ls=":", lw=1)
        axis_labels(figure, panels, "samples", "MUI")
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def key_experts(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of all samples in which each expert holds a key neuron, layer by expert."""
    table = tables["key_experts"]
    return unit_maps(table[table["scope"] == "all"], "expert", "sample_share", "share of samples", models, note)


def key_overlap(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Jaccard index of the key neurons of each two relations; below the diagonal, less that of shuffled relations."""
    table = tables["key_overlap"]
    table = table[table["kind"] == "relation"]
    names = list(dict.fromkeys([*table["name"], *table["other"]]))
    size = max(0.14 * len(names) + 1, 2.3)
    with panel_grid(models, note, width=size + 1.2, height=size) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            if rows.empty:
                continue
            values = np.full((len(names), len(names)), np.nan)
            one, other = (rows[column].map(names.index) for column in ("name", "other"))
            values[one, other], values[other, one] = rows["jaccard"], rows["jaccard"] - rows["chance"]
            image = axes.imshow(values, cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
            axes.set_xticks(range(len(names)), names, fontsize=5, rotation=90)
            axes.set_yticks(range(len(names)), names, fontsize=5)
            figure.colorbar(image, ax=axes, label="Jaccard index")
    return figure


def key_scores(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Spearman's r over all experts of the share of samples with use and with LPI; hollow: shuffled within layers."""
    table = tables["key_scores"]
    table = table[table["of"] == "all"]
    y = np.arange(len(SCORES))
    with panel_grid(models, note, columns=3, height=1.6) as (figure, panels):
        for i, (model, axes) in enumerate(panels.items()):
            rows = table[table["model"] == model].set_index(["with", "given"]).reindex(list(SCORES))
            chance = rows[["chance", "chance_low", "chance_high"]]
            _dots(
                axes, chance, y + 0.2, color=GREY, marker="o", markerfacecolor="white", label="shuffled within layers"
            )
            _dots(axes, rows[["estimate", "low", "high"]], y, color=BLUE, marker="o", label="observed")
            axes.axvline(0, color="black", linewidth=0.5)
            axes.set_xlim(-1.05, 1.05)
            axes.set_ylim(len(SCORES) - 0.5, -0.5)
            axes.set_yticks(y, SCORES.values() if i % 3 == 0 else [])
        axis_labels(figure, panels, "Spearman's r over experts", "")
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def diversity(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MUI of equally large sets of samples against the number of relations they mix; dashed: relations shuffled."""
    table = tables["diversity"]
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            curve(axes, rows, "relations", "mui", color=BLUE, marker="o", label="mixtures")
            axes.plot(rows["relations"], rows["shuffled"], color=GREY, ls="--", lw=1, label="relations shuffled")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis_labels(figure, panels, "relations mixed", "MUI")
        first_panel(panels).legend()
    return figure


def _dots(axes: Any, rows: pd.DataFrame, y: Any, **style: Any) -> None:
    """A point with its interval for each row; the columns: estimate, low, high."""
    estimate, low, high = rows.to_numpy(float).T
    axes.errorbar(estimate, y, xerr=np.abs([low - estimate, high - estimate]), markersize=4, ls="", **style)


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {
    "utilization": utilization,
    "rarefaction": rarefaction,
    "key_experts": key_experts,
    "key_overlap": key_overlap,
    "key_scores": key_scores,
    "diversity": diversity,
}

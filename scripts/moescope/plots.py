"""Figures from result tables. Vector graphics, units on the axes, colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from moescope import cause_plots, masking_plots, routing_plots, steering_plots, training_plots, utilization_plots
from moescope.artifacts import replacing
from moescope.drawing import (
    BLOCKS,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    Tables,
    axis_labels,
    band,
    curve,
    first_panel,
    over_depth,
    panel_grid,
    unit_maps,
)


def gains(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Mean LPI of attention and FFN blocks over depth, a panel for each model."""
    return _blocks_by_layer(tables["gains"], "part", "estimate", "mean LPI (nats)", models, note)


def neurons(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of a prompt's top neurons in each layer, of the FFN and of attention, a panel for each model."""
    return _blocks_by_layer(tables["neurons"], "block", "share", "share of a prompt's top neurons", models, note)


def additivity(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """LPI of the FFN over depth beside the sums over its experts and over its neurons.

    Dark bands: interval of the gap between a sum and what it is compared with; light: certified error besides.
    """
    table = tables["additivity"]
    table = table[~table["component"].isin(["attention", "heads"])]
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            mine = table[table["model"] == model]
            whole = mine[mine["component"] == "ffn"].drop_duplicates("layer").sort_values("layer")
            axes.plot(whole["layer"], whole["whole"], color="black", linestyle="--", label="FFN")
            for parts, colour, marker in (("experts", ORANGE, "s"), ("neurons", BLUE, "o")):
                rows = mine[mine["parts"] == parts]
                rows = rows.assign(low=rows["whole"] + rows["low"], high=rows["whole"] + rows["high"])
                curve(axes, rows, "layer", "sum", color=colour, marker=marker, label=f"sum over {parts}")
                rows = rows.assign(low=rows["low"] - rows["error"], high=rows["high"] + rows["error"])
                band(axes, rows, "layer", color=colour, alpha=0.12)
        over_depth(figure, panels, "mean LPI (nats)")
    return figure


def queries(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Score of value neurons (filled) and of what raises them (hollow) over depth; the embedding stands at -1."""
    table = tables["queries"]
    hollow = {"markerfacecolor": "white", "linestyle": "--"}
    roles: Any = {"value": (BLOCKS, {}), "query": (BLOCKS | {"embedding": ("embedding", GREEN, "D")}, hollow)}
    with panel_grid(models, note) as (figure, panels):
        for model, axes in panels.items():
            mine = table[table["model"] == model]
            for role, (parts, style) in roles.items():
                for part, (label, colour, marker) in parts.items():
                    rows = mine[(mine["role"] == role) & (mine["part"] == part)]
                    named = {"label": f"{role}: {label}", "color": colour, "marker": marker}
                    curve(axes, rows, "layer", "estimate", **named, **style)
        over_depth(figure, panels, "mean score (nats)")
    return figure


def expert_curves(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of the positive LPI that the best experts hold against their number: each relation, and all prompts."""
    table = tables["expert_curves"]
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            rows = table[table["model"] == model]
            for _, each in rows[rows["relation"] != "all"].groupby("relation"):
                axes.plot(each["experts"], each["share"], color=GREY, linewidth=0.6, alpha=0.6)
            axes.plot([], [], color=GREY, linewidth=0.6, label="each relation")
            every = rows[rows["relation"] == "all"]
            curve(axes, every, "experts", "share", color=ORANGE, linewidth=2.5, marker="", label="all prompts")
        axis_labels(figure, panels, "experts of all layers, best first", "share of the positive LPI")
        first_panel(panels).legend()
    return figure


def stages(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of the summed FFN gain in each stage of depth, a bar for each model."""
    table = tables["stages"]
    with panel_grid([""], note, width=6.5, height=0.45 * len(models) + 1) as (figure, panels):
        axes = first_panel(panels)
        for y, model in enumerate(models):
            left = 0.0
            for row, colour, hatch in zip(
                table[table["model"] == model].sort_values("stage").itertuples(),
                (BLUE, GREEN, ORANGE),
                ("", "//", ".."),
                strict=True,
            ):
                label = f"stage {row.stage}" if y == 0 else None
                axes.barh(y, row.share, left=left, color=colour, hatch=hatch, edgecolor="white", label=label)
                depth = (
                    f"{row.first_layer}" if row.first_layer == row.last_layer else f"{row.first_layer}-{row.last_layer}"
                )
                if abs(row.share) > 0.08:
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
                    axes.text(left + row.share / 2, y, depth, ha="center", va="center", color="white", bbox=box)
                left += row.share
        axes.set_yticks(range(len(models)), models)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set_xlabel("share of the summed FFN gain (numbers in the bars: layers)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


def heads(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Mean LPI of every head, layer by head."""
    return unit_maps(tables["heads"], "head", "estimate", "mean LPI (nats)", models, note)


def experts(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Mean LPI of every expert, layer by expert; shared experts stand apart on the left."""
    table = tables["experts"]
    return unit_maps(table[table["task"] == "all"], "expert", "estimate", "mean LPI (nats)", models, note)


def efficiency(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Every metric of every model with its interval; dense models are hollow."""
    table = tables["efficiency"]
    table = table[(table["task"] == "all") & (table["minus"] == "")]
    dense = set(table.loc[table["kind"] == "dense", "model"])
    units = {
        "hit_at_10": "HIT@10",
        "mrr": "MRR",
        "ffn_gain": "FFN gain (nats)",
        "attention_gain": "attention gain (nats)",
        "peak_position": "peak position (share of depth)",
        "layer_efficiency": "layer efficiency (nats per layer)",
    }
    with panel_grid(list(units), note, columns=3, height=0.22 * len(models) + 0.6, sharey=True) as (figure, panels):
        for metric, axes in panels.items():
            _models(axes, table[table["metric"] == metric].assign(error=0.0), models, dense)
            axes.set_title("")
            axes.set_xlabel(units[metric])
        first_panel(panels).invert_yaxis()
    return figure


def concentration(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Every metric of every model with its interval, FFN on the left, attention on the right; dense models are hollow.

    Grey: the interval widened by the certified error.
    """
    table = tables["concentration"]
    table = table[(table["task"] == "all") & (table["minus"] == "")]
    dense = set(table.loc[table["kind"] == "dense", "model"])
    units = {
        "share": "share of the positive LPI in the top 1%",
        "entropy": "entropy (nats)",
        "gini": "Gini coefficient",
        "positive": "positive LPI (nats)",
        "neurons": "neurons used",
    }
    chosen = {f"{BLOCKS[block][0]}, {metric}": (block, metric) for metric in units for block in ("ffn", "attention")}
    with panel_grid(list(chosen), note, height=0.22 * len(models) + 0.75, sharey=True) as (figure, panels):
        for name, axes in panels.items():
            block, metric = chosen[name]
            _models(axes, table[(table["block"] == block) & (table["metric"] == metric)], models, dense)
            axes.set_title(BLOCKS[block][0])
            axes.set_xlabel(units[metric])
        first_panel(panels).invert_yaxis()
    return figure


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {
    "gains": gains,
    "stages": stages,
    "efficiency": efficiency,
    "heads": heads,
    "experts": experts,
    **cause_plots.FIGURES,
    **steering_plots.FIGURES,
    **routing_plots.FIGURES,
    **utilization_plots.FIGURES,
    **masking_plots.FIGURES,
    **training_plots.FIGURES,
    "neurons": neurons,
    "concentration": concentration,
    "expert_curves": expert_curves,
    "additivity": additivity,
    "queries": queries,
}


def draw(figure: str, tables: Tables, models: Sequence[str], note: str, path: Path) -> None:
    """Draw one figure of FIGURES as SVG; equal tables give equal bytes. `note` stands below it."""
    with matplotlib.rc_context(STYLE), replacing(path) as beside:
        FIGURES[figure](tables, models, note).savefig(
            beside, format="svg", bbox_inches="tight", metadata={"Date": None}
        )


OTHER_INTERVALS = {
    "utilization": "jackknife over subjects",
    "rarefaction": "jackknife over subjects",
    "diversity": "of the sets of samples",
    "families": "Student's t over seeds of training",
}
"""Figures whose intervals are no bootstrap intervals."""


def note(
    table: pd.DataFrame,
    confidence: float,
    bootstrap_draws: int,
    seed: int,
    models: Sequence[str],
    toys: Sequence[str],
    figure: str = "",
) -> str:
    """What every figure says below it: prompts, subjects, interval, seed, and which of the models are toys."""
    n, subjects = (max(table[column], default=0) for column in ("prompts", "subjects"))
    found = [model for model in models if model in toys]
    which = "" if len(found) == len(models) else f" ({', '.join(found)})"
    what = f"Toy-sized models, trained here{which}: findings about toy models.\n" if found else ""
    how = OTHER_INTERVALS.get(figure, f"bootstrap over subjects, {bootstrap_draws:,} draws, seed {seed}")
    drawn = f"; intervals: {confidence:.0%} {how}"
    has_intervals = any(column.endswith("low") for column in table) and figure != "key_overlap"
    return f"{what}{n:,} prompts about {subjects:,} subjects{drawn if has_intervals else ''}."


def _models(axes: Axes, table: pd.DataFrame, models: Sequence[str], dense: set[str]) -> None:
    """One estimate a model with its interval, grey where the certified error widens it; a model may have none."""
    for y, (model, row) in enumerate(table.set_index("model").reindex(models).iterrows()):
        colour, fill = (BLUE, "white") if model in dense else (ORANGE, ORANGE)
        if row["error"] > 0:
            axes.plot([row["low"] - row["error"], row["high"] + row["error"]], [y, y], color=GREY, linewidth=0.8)
        axes.plot([row["low"], row["high"]], [y, y], color=colour)
        axes.plot(row["estimate"], y, "o" if model in dense else "s", color=colour, markerfacecolor=fill)
    axes.set_yticks(range(len(models)), models)


def _blocks_by_layer(
    table: pd.DataFrame, block: str, value: str, label: str, models: Sequence[str], note: str
) -> Figure:
    """Curves of attention and FFN over depth, a panel for each model; the column `block` says which of them."""
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for name, (legend, colour, marker) in BLOCKS.items():
                rows = table[(table["model"] == model) & (table[block] == name)]
                curve(axes, rows, "layer", value, color=colour, marker=marker, label=legend)
        over_depth(figure, panels, label)
    return figure

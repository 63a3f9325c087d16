"""Figures from result tables. Vector graphics, units on the axes, colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from moescope.artifacts import replacing

# Okabe and Ito's palette; every series also has a marker or a line style of its own.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
DIVERGING = "PuOr_r"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.hashsalt": "moescope",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}
PANEL_WIDTH, PANEL_HEIGHT = 3.4, 2.3
BLOCKS = {"attention": ("attention", BLUE, "o"), "ffn": ("FFN", ORANGE, "s")}

Tables = Mapping[str, pd.DataFrame]


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
    with _panels(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            mine = table[table["model"] == model]
            whole = mine[mine["component"] == "ffn"].drop_duplicates("layer").sort_values("layer")
            axes.plot(whole["layer"], whole["whole"], color="black", linestyle="--", label="FFN")
            for parts, colour, marker in (("experts", ORANGE, "s"), ("neurons", BLUE, "o")):
                rows = mine[mine["parts"] == parts]
                rows = rows.assign(low=rows["whole"] + rows["low"], high=rows["whole"] + rows["high"])
                _curve(axes, rows, "layer", "sum", color=colour, marker=marker, label=f"sum over {parts}")
                rows = rows.assign(low=rows["low"] - rows["error"], high=rows["high"] + rows["error"])
                _band(axes, rows, "layer", color=colour, alpha=0.12)
        _layers(figure, panels, "mean LPI (nats)")
    return figure


def queries(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Score of value neurons (filled) and of what raises them (hollow) over depth; the embedding stands at -1."""
    table = tables["queries"]
    hollow = {"markerfacecolor": "white", "linestyle": "--"}
    roles: Any = {"value": (BLOCKS, {}), "query": (BLOCKS | {"embedding": ("embedding", GREEN, "D")}, hollow)}
    with _panels(models, note) as (figure, panels):
        for model, axes in panels.items():
            mine = table[table["model"] == model]
            for role, (parts, style) in roles.items():
                for part, (label, colour, marker) in parts.items():
                    rows = mine[(mine["role"] == role) & (mine["part"] == part)]
                    named = {"label": f"{role}: {label}", "color": colour, "marker": marker}
                    _curve(axes, rows, "layer", "estimate", **named, **style)
        _layers(figure, panels, "mean score (nats)")
    return figure


def expert_curves(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of the positive LPI that the best experts hold against their number: each relation, and all prompts."""
    table = tables["expert_curves"]
    with _panels(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            rows = table[table["model"] == model]
            for _, curve in rows[rows["relation"] != "all"].groupby("relation"):
                axes.plot(curve["experts"], curve["share"], color=GREY, linewidth=0.6, alpha=0.6)
            axes.plot([], [], color=GREY, linewidth=0.6, label="each relation")
            every = rows[rows["relation"] == "all"]
            _curve(axes, every, "experts", "share", color=ORANGE, linewidth=2.5, marker="", label="all prompts")
        _label(figure, panels, "experts of all layers, best first", "share of the positive LPI")
        _first(panels).legend()
    return figure


def stages(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Share of the summed FFN gain in each stage of depth, a bar for each model."""
    table = tables["stages"]
    with _panels([""], note, width=6.5, height=0.45 * len(models) + 1) as (figure, panels):
        axes = _first(panels)
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
    return _maps(tables["heads"], "head", models, note)


def experts(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Mean LPI of every expert, layer by expert; shared experts stand apart on the left."""
    table = tables["experts"]
    return _maps(table[table["task"] == "all"], "expert", models, note)


def blocking(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MRR against the number of experts blocked: a relation's best ones, and matched random ones."""
    table = tables["blocking"]
    table = table[table["scope"] == "all"]
    with _panels(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model].sort_values("n_blocked")
            x = np.arange(len(rows) + 1)
            clean = rows["mrr_clean"].iloc[:1]

            def with_clean(column: str, rows: pd.DataFrame = rows, clean: pd.Series = clean) -> np.ndarray:
                return np.concatenate([clean, rows[column]])

            low, high = with_clean("mrr_random_low"), with_clean("mrr_random_high")
            axes.fill_between(x, low, high, color=GREY, alpha=0.35, linewidth=0)
            axes.plot(x, with_clean("mrr_random"), color=GREY, linestyle="--", label="random (matched)")
            best = with_clean("mrr_blocked")
            spread = np.abs(np.stack([with_clean("mrr_blocked_low"), with_clean("mrr_blocked_high")]) - best)
            axes.errorbar(x, best, spread, color=ORANGE, marker="s", markersize=4, capsize=2, label="best by LPI")
            axes.set_xticks(x, ["0", *rows["n_blocked"].astype(str)])
        _label(figure, panels, "routed experts blocked", "MRR")
        _first(panels).legend()
    return figure


def keep_only(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """HIT@10 and MRR when only some experts are kept."""
    table = tables["keep_only"]
    table = table[table["task"] == "all"]
    height = 0.22 * table.groupby("model").size().max() + 0.6
    with _panels(models, note, height=height) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model].sort_values(
                ["shared", "routed"], key=lambda c: c.replace(-1, 1 << 14)
            )
            y = np.arange(len(rows))
            for metric, label, colour, marker in (("hit_at_10", "HIT@10", BLUE, "o"), ("mrr", "MRR", ORANGE, "s")):
                spread = np.abs(np.stack([rows[f"{metric}_low"], rows[f"{metric}_high"]]) - rows[metric].to_numpy())
                axes.errorbar(
                    rows[metric], y, xerr=spread, color=colour, marker=marker, markersize=4, ls="", label=label
                )
            axes.set_yticks(y, rows["kept"])
            axes.invert_yaxis()
            axes.set_xlim(-0.03, 1.03)
        _label(figure, panels, "HIT@10, MRR", "experts kept")
        _first(panels).legend()
    return figure


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
    with _panels(list(units), note, columns=3, height=0.22 * len(models) + 0.6, sharey=True) as (figure, panels):
        for metric, axes in panels.items():
            _models(axes, table[table["metric"] == metric].assign(error=0.0), models, dense)
            axes.set_title("")
            axes.set_xlabel(units[metric])
        _first(panels).invert_yaxis()
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
    with _panels(list(chosen), note, height=0.22 * len(models) + 0.75, sharey=True) as (figure, panels):
        for name, axes in panels.items():
            block, metric = chosen[name]
            _models(axes, table[(table["block"] == block) & (table["metric"] == metric)], models, dense)
            axes.set_title(BLOCKS[block][0])
            axes.set_xlabel(units[metric])
        _first(panels).invert_yaxis()
    return figure


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {
    "gains": gains,
    "stages": stages,
    "efficiency": efficiency,
    "heads": heads,
    "experts": experts,
    "blocking": blocking,
    "keep_only": keep_only,
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


def note(
    table: pd.DataFrame, confidence: float, bootstrap_draws: int, seed: int, models: Sequence[str], toys: Sequence[str]
) -> str:
    """What every figure says below it: prompts, subjects, interval, seed, and which of the models are toys."""
    n, subjects = (max(table[column], default=0) for column in ("prompts", "subjects"))
    found = [model for model in models if model in toys]
    which = "" if len(found) == len(models) else f" ({', '.join(found)})"
    what = f"Toy-sized models, trained here{which}: findings about toy models.\n" if found else ""
    return (
        f"{what}{n:,} prompts about {subjects:,} subjects; intervals: {confidence:.0%} bootstrap over subjects,"
        f" {bootstrap_draws:,} draws, seed {seed}."
    )


def _curve(axes: Axes, rows: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """One line with its interval; a band about one point has no width, it is drawn as an upright line."""
    rows = rows.sort_values(x)
    axes.plot(rows[x], rows[y], **{"markersize": 4, **style})
    _band(axes, rows, x, color=style["color"], alpha=0.25)
    if len(rows) == 1:
        axes.vlines(rows[x], rows["low"], rows["high"], color=style["color"], linewidth=1)


def _band(axes: Axes, rows: pd.DataFrame, x: str, **style: Any) -> None:
    rows = rows.sort_values(x)
    # Columns of a table without rows have no type.
    axes.fill_between(*rows[[x, "low", "high"]].to_numpy(float).T, linewidth=0, **style)


def _layers(figure: Figure, panels: Mapping[str, Axes], y: str) -> None:
    """What curves over depth share: layers below, a line at 0, a legend above."""
    for axes in panels.values():
        axes.axhline(0, color="black", linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(figure, panels, "layer", y)
    figure.legend(*_first(panels).get_legend_handles_labels(), loc="outside upper center", ncols=3)


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
    with _panels(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for name, (legend, colour, marker) in BLOCKS.items():
                rows = table[(table["model"] == model) & (table[block] == name)]
                _curve(axes, rows, "layer", value, color=colour, marker=marker, label=legend)
        _layers(figure, panels, label)
    return figure


def _maps(table: pd.DataFrame, unit: str, models: Sequence[str], note: str) -> Figure:
    """A map of mean LPI, layer by unit, for each model, each with a colour scale of its own."""
    with _panels(models, note) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            wide = rows.pivot(index="layer", columns=unit, values="estimate")
            routed = wide.loc[:, [c for c in wide if c >= 0]].reindex(columns=range(max(wide) + 1))
            shared = wide.loc[:, [c for c in wide if c < 0]].iloc[:, ::-1]
            gap = np.full((len(wide), 1 if shared.size else 0), np.nan)
            values = np.hstack([shared.to_numpy(), gap, routed.to_numpy()])
            limit = np.nanmax(np.abs(values))
            image = axes.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            offset = shared.shape[1] + gap.shape[1]
            ticks = np.unique(np.linspace(0, routed.shape[1] - 1, min(routed.shape[1], 5)).astype(int))
            named = [f"s{i}" for i in range(shared.shape[1])]
            axes.set_xticks([*range(len(named)), *(ticks + offset)], [*named, *map(str, ticks)])
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.invert_yaxis()
            figure.colorbar(image, ax=axes, label="mean LPI (nats)")
        _label(figure, panels, f"{unit} (s: shared)" if (table[unit] < 0).any() else unit, "layer")
    return figure


@contextmanager
def _panels(
    names: Sequence[str],
    note: str,
    columns: int = 2,
    width: float = PANEL_WIDTH,
    height: float = PANEL_HEIGHT,
    sharey: bool = False,
) -> Iterator[tuple[Figure, dict[str, Axes]]]:
    """A figure with one titled panel a name, row by row, and a note below."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.3))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten()
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(name)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    yield figure, dict(zip(names, grid, strict=False))
    figure.text(0.5, -0.02, note, ha="center", va="top", fontsize=7, color="0.35")


def _label(figure: Figure, panels: Mapping[str, Axes], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)


def _first(panels: Mapping[str, Axes]) -> Axes:
    return next(iter(panels.values()))

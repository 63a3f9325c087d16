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
from matplotlib.ticker import MaxNLocator

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

Tables = Mapping[str, pd.DataFrame]


def gains(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Mean LPI of attention and FFN blocks over depth, a panel for each model."""
    table = tables["gains"]
    with _panels(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for part, colour, marker in (("attention", BLUE, "o"), ("ffn", ORANGE, "s")):
                rows = table[(table["model"] == model) & (table["part"] == part)].sort_values("layer")
                label = {"attention": "attention", "ffn": "FFN"}[part]
                axes.plot(rows["layer"], rows["estimate"], color=colour, marker=marker, markersize=4, label=label)
                axes.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.25, linewidth=0)
            axes.axhline(0, color="black", linewidth=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(figure, panels, "layer", "mean LPI (nats)")
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
            rows = table[table["metric"] == metric].set_index("model").loc[list(models)]
            for y, (model, row) in enumerate(rows.iterrows()):
                colour, fill = (BLUE, "white") if model in dense else (ORANGE, ORANGE)
                axes.plot([row["low"], row["high"]], [y, y], color=colour)
                axes.plot(row["estimate"], y, "o" if model in dense else "s", color=colour, markerfacecolor=fill)
            axes.set_title("")
            axes.set_xlabel(units[metric])
            axes.set_yticks(range(len(models)), models)
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
    n, subjects = table["prompts"].max(), table["subjects"].max()
    found = [model for model in models if model in toys]
    which = "" if len(found) == len(models) else f" ({', '.join(found)})"
    what = f"Toy-sized models, trained here{which}: findings about toy models.\n" if found else ""
    return (
        f"{what}{n:,} prompts about {subjects:,} subjects; intervals: {confidence:.0%} bootstrap over subjects,"
        f" {bootstrap_draws:,} draws, seed {seed}."
    )


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

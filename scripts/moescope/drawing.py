"""What all figures share: colours, panels, curves with bands, maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


@contextmanager
def panel_grid(
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


def axis_labels(figure: Figure, panels: Mapping[str, Axes], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)


def first_panel(panels: Mapping[str, Axes]) -> Axes:
    return next(iter(panels.values()))


def curve(axes: Axes, rows: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """One line with its interval; a band about one point has no width, it is drawn as an upright line."""
    rows = rows.sort_values(x)
    axes.plot(rows[x], rows[y], **{"markersize": 4, **style})
    band(axes, rows, x, color=style["color"], alpha=0.25)
    if len(rows) == 1:
        axes.vlines(rows[x], rows["low"], rows["high"], color=style["color"], linewidth=1)


def band(axes: Axes, rows: pd.DataFrame, x: str, **style: Any) -> None:
    rows = rows.sort_values(x)
    # Columns of a table without rows have no type.
    axes.fill_between(*rows[[x, "low", "high"]].to_numpy(float).T, linewidth=0, **style)


def over_depth(figure: Figure, panels: Mapping[str, Axes], y: str) -> None:
    """What curves over depth share: layers below, a line at 0, a legend above."""
    for axes in panels.values():
        axes.axhline(0, color="black", linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis_labels(figure, panels, "layer", y)
    figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=3)


def unit_maps(table: pd.DataFrame, unit: str, value: str, label: str, models: Sequence[str], note: str) -> Figure:
    """A map of `value` for each model, layer by unit; shared experts stand apart on the left."""
    with panel_grid(models, note) as (figure, panels):
        for model, axes in panels.items():
            wide = table[table["model"] == model].pivot(index="layer", columns=unit, values=value)
            if wide.empty:
                continue
            routed = wide.reindex(columns=range(max(wide) + 1))
            shared = wide.loc[:, [number for number in wide if number < 0]].iloc[:, ::-1]
            shared = shared.set_axis([f"s{i}" for i in range(shared.shape[1])], axis=1)
            gap = pd.DataFrame(np.nan, index=wide.index, columns=[""] if shared.size else [])
            heat_map(figure, axes, pd.concat([shared, gap, routed], axis=1), label)
        axis_labels(figure, panels, f"{unit} (s: shared)" if (table[unit] < 0).any() else unit, "layer")
    return figure


def heat_map(figure: Figure, axes: Axes, wide: pd.DataFrame, label: str) -> None:
    """Layers (rows) by the columns of `wide`, which name themselves below, with a colour scale of its own."""
    wide = wide.reindex(range(max(wide.index) + 1))
    limit = np.nanmax(np.abs(wide.to_numpy(float)), initial=0) or 1.0
    style: Any = {"cmap": DIVERGING, "aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    image = axes.imshow(wide.to_numpy(float), vmin=-limit, vmax=limit, **style)
    ticks = np.arange(0, wide.shape[1], -(-wide.shape[1] // 8))
    axes.set_xticks(ticks, [str(wide.columns[tick]) for tick in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=label)

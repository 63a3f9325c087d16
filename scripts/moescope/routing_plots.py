"""Figures of routing: how evenly experts are used, by whom, and what the choice says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moescope.drawing import BLUE, GREEN, GREY, ORANGE, Tables, axis_labels, curve, over_depth, panel_grid

SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (GREY, "v"))
SEQUENTIAL = "Blues"
CURVES = (
    ("load_entropy", "readout", "load, readout position"),
    ("load_entropy", "subject", "load, subject"),
    ("load_entropy", "all", "load, all positions"),
    ("gate_entropy", "readout", "gate, mean over prompts, readout position"),
)
LABELS = {
    ("relation", ""): "relation",
    ("relation", "last_token"): "relation, given the last token",
    ("task", ""): "task",
    ("last_token", ""): "last token",
}


def routing(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Entropy of the load at each kind of positions, and mean entropy of a prompt's gate, over depth."""
    table = tables["routing"]
    table = table[table["scope"] == "all"]
    with panel_grid(models, note) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            for (metric, positions, label), (colour, marker) in zip(CURVES, SERIES, strict=True):
                found = rows[(rows["metric"] == metric) & (rows["positions"] == positions)]
                curve(axes, found, "layer", "estimate", color=colour, marker=marker, label=label)
            even = rows.groupby("layer")["experts"].first()
            axes.plot(even.index, np.log2(even.astype(float)), color="black", ls=":", lw=1, label="all experts alike")
        over_depth(figure, panels, "entropy (bits)")
    return figure


def mutual_information(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """What the chosen experts say about each label over depth, and what they say about shuffled labels."""
    table = tables["mutual_information"]
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for ((label, given), name), (colour, marker) in zip(LABELS.items(), SERIES, strict=True):
                rows = table[(table["model"] == model) & (table["label"] == label) & (table["given"] == given)]
                curve(axes, rows, "layer", "estimate", color=colour, marker=marker, label=name)
                axes.plot(rows["layer"], rows["shuffled"], color=colour, ls=":", lw=1)
        over_depth(figure, panels, "mutual information (bits)")
    return figure


def expert_use(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """How often the prompts of each relation choose each expert at the readout position, the layers side by side."""
    table = tables["expert_use"]
    table = table[(table["scope"] == "relation") & (table["positions"] == "readout")]
    height = 0.1 * table["name"].nunique() + 1
    with panel_grid(models, note, columns=1, width=7, height=height) as (figure, panels):
        for model, axes in panels.items():
            rows = table[table["model"] == model]
            if rows.empty:
                continue
            n, layers, relations = rows["expert"].max() + 1, rows["layer"].unique(), rows["name"].unique()
            wide = rows.pivot(index="name", columns=["layer", "expert"], values="frequency")
            every = pd.MultiIndex.from_product([layers, range(n)])
            values = wide.reindex(index=relations, columns=every).fillna(0)
            image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(len(relations)), relations, fontsize=5)
            axes.set_xticks(np.arange(len(layers)) * n + (n - 1) / 2, layers)
            for border in range(1, len(layers)):
                axes.axvline(border * n - 0.5, color="black", linewidth=0.5)
            figure.colorbar(image, ax=axes, label="share of prompts")
        axis_labels(figure, panels, "experts of each layer", "")
    return figure


def task_overlap(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Overlap of the loads of each two tasks at the readout position over depth, and that of shuffled tasks."""
    table = tables["task_overlap"]
    table = table[(table["scope"] == "task") & (table["positions"] == "readout") & (table["metric"] == "overlap")]
    pairs = table[["one", "other"]].drop_duplicates().itertuples(index=False)
    lines = ("-", "--", "-.")
    series = {pair: (*SERIES[i % len(SERIES)], lines[i // len(SERIES) % len(lines)]) for i, pair in enumerate(pairs)}
    with panel_grid(models, note, sharey=True) as (figure, panels):
        for model, axes in panels.items():
            for (one, other), (colour, marker, line) in series.items():
                rows = table[(table["model"] == model) & (table["one"] == one) & (table["other"] == other)]
                named = {"color": colour, "marker": marker, "linestyle": line, "label": f"{one}, {other}"}
                curve(axes, rows, "layer", "estimate", **named)
                axes.plot(rows["layer"], rows["shuffled"], color=colour, ls=":", lw=1)
        over_depth(figure, panels, "overlap of loads")
    return figure


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {
    "routing": routing,
    "mutual_information": mutual_information,
    "expert_use": expert_use,
    "task_overlap": task_overlap,
}

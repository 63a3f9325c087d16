"""Figures of training: trajectories, and toy models that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from moescope.drawing import BLUE, GREY, ORANGE, Tables, axis_labels, curve, panel_grid

CURVES = (
    ({"mrr": "MRR", "hit10": "HIT@10"}, "MRR, HIT@10"),
    ({"mui": "MUI", "key_expert_proportion": "key experts"}, "share of neurons, of experts"),
    ({"lpi_top_share": "best 1% of neurons"}, "share of positive LPI"),
    ({"routing_previous": "checkpoint before", "routing_final": "last checkpoint"}, "chosen experts shared with"),
)
TICKS = [0, *(10**power for power in range(13))]
SERIES = ((BLUE, "o"), (ORANGE, "s"))
FAMILY_LABELS = {
    "mui": "MUI",
    "mui_active": "MUI / active neurons",
    "key_expert_proportion": "key experts (share)",
    "mrr": "MRR, clean",
    "layer_efficiency": "FFN LPI per layer (nats)",
    "mrr_drop": "MRR lost, best blocked",
    "mrr_drop_random": "MRR lost, random blocked",
}


def training(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Accuracy, utilization, concentration and routing over the steps of training, a row of panels a model.

    Dotted: by chance. Grey: the step where MUI changes its course, with its interval, where two lines fit better.
    """
    table = tables["training"]
    names = [f"{model}: {', '.join(labels.values())}" for model in models for labels, _ in CURVES]
    with panel_grid(names, note, columns=len(CURVES), width=3.2) as (figure, panels):
        for (model, (labels, unit)), axes in zip(product(models, CURVES), panels.values(), strict=True):
            mine = table[table["model"] == model]
            mine = mine.assign(x=np.log1p(mine["step"].astype(float)))
            for (metric, label), (colour, marker) in zip(labels.items(), SERIES, strict=False):
                rows = mine[mine["metric"] == metric].sort_values("x")
                if rows.empty:
                    continue
                curve(axes, rows, "x", "estimate", color=colour, marker=marker, label=label)
                axes.plot(rows["x"], rows["chance"].astype(float), color=colour, ls=":", lw=1)
            for point in mine[mine["metric"] == "change_point"].itertuples() if "mui" in labels else ():
                axes.axvspan(np.log1p(point.low), np.log1p(point.high), color=GREY, alpha=0.25, linewidth=0)
                axes.axvline(np.log1p(point.estimate), color=GREY, lw=1)
            ticks = [tick for tick in TICKS if tick <= mine["step"].max()]
            axes.set_xticks(np.log1p(ticks), [f"{tick:,}" for tick in ticks])
            axes.set_title(model)
            axes.set_ylabel(unit)
            if axes.lines:
                axes.legend(fontsize=7)
        axis_labels(figure, panels, "training step (scale: log(1 + step))", "")
    return figure


def families(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Each metric of each family: a dot for each seed, and the mean with its interval beside them."""
    table = tables["families"]
    names = list(table["family"].unique()) or ["no family"]
    panels_of = [(family, metric) for family, metric in product(names, FAMILY_LABELS)]
    with panel_grid(
        [f"{family}: {FAMILY_LABELS[metric]}" for family, metric in panels_of],
        note,
        columns=len(FAMILY_LABELS),
        width=2.2,
    ) as (figure, panels):
        for (family, metric), axes in zip(panels_of, panels.values(), strict=True):
            rows = table[(table["family"] == family) & (table["metric"] == metric)]
            x = np.arange(len(rows))
            for at, values in zip(x, rows["values"], strict=True):
                seeds = [float(part.split(": ")[1]) for part in values.split(", ")]
                axes.plot(np.full(len(seeds), at - 0.12), seeds, "o", color=GREY, markersize=4)
            spread = (rows[["mean", "high"]].to_numpy(float) - rows[["low", "mean"]].to_numpy(float)).T
            axes.errorbar(x + 0.12, rows["mean"], spread, fmt="s", color=BLUE, markersize=4, capsize=2)
            axes.set_xticks(x, rows["variant"])
            axes.margins(x=0.3)
            axes.set_title(FAMILY_LABELS[metric])
        for family, axes in zip(names, list(panels.values())[:: len(FAMILY_LABELS)], strict=True):
            axes.set_ylabel(family, fontweight="bold")
    return figure


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {"training": training, "families": families}

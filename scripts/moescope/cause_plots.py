"""Figures of interventions: what breaks, what routes, and who steers the router."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moescope.drawing import BLUE, GREY, ORANGE, Tables, axis_labels, first_panel, panel_grid


def blocking(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """MRR against the number of experts blocked: a relation's best ones, and matched random ones."""
    table = tables["blocking"]
    table = table[table["scope"] == "all"]
    with panel_grid(models, note, sharey=True) as (figure, panels):
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
            for metric, label, colour, marker in (("hit_at_10", "HIT@10", BLUE, "o"), ("mrr", "MRR", ORANGE, "s")):
                spread = np.abs(np.stack([rows[f"{metric}_low"], rows[f"{metric}_high"]]) - rows[metric].to_numpy())
                axes.errorbar(
                    rows[metric], y, xerr=spread, color=colour, marker=marker, markersize=4, ls="", label=label
                )
            axes.set_yticks(y, rows["kept"])
            axes.invert_yaxis()
            axes.set_xlim(-0.03, 1.03)
        axis_labels(figure, panels, "HIT@10, MRR", "experts kept")
        first_panel(panels).legend()
    return figure


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {"blocking": blocking, "keep_only": keep_only}

"""Figure of masking: what key neurons and key experts are needed for, beside matched random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.drawing import BLUE, ORANGE, Tables, axis_labels, first_panel, panel_grid


def masking(tables: Tables, models: Sequence[str], note: str) -> Figure:
    """Change of the log-probability when a prompt's own task's keys, or those of others, are masked; hollow: random."""
    table = tables["masking"]
    table = table[(table["task"] == "all") & (table["metric"] == "log_prob")]
    table = table.assign(what=table["size"].astype(str) + " " + table["level"]).sort_values(["level", "size"])
    n_rows = table.groupby("model")["what"].nunique().max()
    with panel_grid(models, note, height=0.45 * np.nan_to_num(n_rows, nan=1) + 0.6) as (figure, panels):
        for model, axes in panels.items():
            mine = table[table["model"] == model]
            ticks = list(dict.fromkeys(mine["what"]))
            for own, name, colour, marker, offset in (
                (True, "own task", ORANGE, "s", -0.2),
                (False, "other tasks", BLUE, "o", 0.2),
            ):
                rows = mine[mine["own"] == own]
                y = np.array([ticks.index(what) for what in rows["what"]], dtype=float) + offset
                for column, label, shift, face in (
                    ("change", f"{name}: keys", -0.07, colour),
                    ("change_random", f"{name}: random", 0.07, "white"),
                ):
                    low, change, high = (rows[f"{column}{end}"].to_numpy(float) for end in ("_low", "", "_high"))
                    style: Any = {"color": colour, "marker": marker, "markerfacecolor": face, "label": label}
                    axes.errorbar(change, y + shift, xerr=[change - low, high - change], markersize=4, ls="", **style)
            axes.axvline(0, color="black", linewidth=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_yticks(range(len(ticks)), ticks)
            axes.invert_yaxis()
        axis_labels(figure, panels, "change of the log-probability (nats)", "masked")
        figure.legend(*first_panel(panels).get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


FIGURES: Mapping[str, Callable[[Tables, Sequence[str], str], Figure]] = {"masking": masking}

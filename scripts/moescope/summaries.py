"""What the summaries of all stages share: bootstrap intervals of means, scopes, labels. NumPy and pandas only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from moescope.stats import cluster_bootstrap, interval

Runs = Mapping[tuple[str, str], Mapping[str, pd.DataFrame]]
"""The tables of each (data set, model), by kind."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: number of draws, coverage, seed."""

    bootstrap_draws: int
    confidence: float
    seed: int

    def means(self, values: Float[np.ndarray, "n m"], subjects: pd.Series) -> Float[np.ndarray, "draws+1 m"]:
        """Column means: the observed ones first, then one row a draw."""
        drawn = cluster_bootstrap(values, subjects.to_numpy(), self.bootstrap_draws, self.seed)
        return np.vstack([values.mean(0, dtype=float), drawn])

    def summary(self, means: Float[np.ndarray, "draws+1 *m"]) -> dict[str, Float[np.ndarray, "*m"]]:
        """Observed value and interval of a statistic that was computed from every row of `means`."""
        low, high = interval(means[1:], self.confidence)
        return {"estimate": means[0], "low": low, "high": high}


def tasks(prompts: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", prompts
    for task, rows in prompts.groupby("task"):
        yield str(task), rows


def scopes(prompts: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    yield "all", "all", prompts
    for kind in ("task", "relation"):
        for name, rows in prompts.groupby(kind):
            yield kind, str(name), rows


def only(prompts: pd.DataFrame, prompt_ids: Any) -> pd.DataFrame:
    return prompts[prompts["prompt_id"].isin(prompt_ids)]


def by_layer(table: pd.DataFrame, values: str, prompts: pd.DataFrame) -> pd.DataFrame:
    """Sum over the units of each layer, a row a prompt; a prompt without any in a layer has 0 there."""
    wide = table.groupby(["prompt_id", "layer"])[values].sum().unstack("layer")
    return wide.reindex(prompts["prompt_id"]).fillna(0).astype(float)


def column_summary(wide: pd.DataFrame, prompts: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """Summary of each column of a table with one row a prompt; its column keys become columns."""
    wide = wide.sort_index(axis=1)
    means = bootstrap.means(wide.loc[prompts["prompt_id"]].to_numpy(), prompts["subject"])
    return wide.columns.to_frame(index=False).assign(**bootstrap.summary(means))


def labelled(summary: pd.DataFrame, scope: pd.DataFrame, **labels: str) -> pd.DataFrame:
    frame = summary.assign(**counts(scope))
    for position, (name, value) in enumerate(labels.items()):
        frame.insert(position, name, value)
    return frame


def counts(prompts: pd.DataFrame) -> dict[str, int]:
    return {"prompts": len(prompts), "subjects": prompts["subject"].nunique()}


def prefixed(name: str, summary: Mapping[str, Any]) -> dict[str, float]:
    return {name: summary["estimate"], f"{name}_low": summary["low"], f"{name}_high": summary["high"]}


def random_summary(metric: str, found: Float[np.ndarray, " 1+draws"], confidence: float) -> dict[str, float]:
    """Mean and interval of a metric over the random draws, found[1:], and the share of them at most found[0]."""
    draws = found[1:] if len(found) > 1 else np.array([np.nan])
    low, high = interval(draws, confidence)
    as_low = np.nan if np.isnan(draws).any() else (draws <= found[0]).mean()
    summary = prefixed(f"{metric}_random", {"estimate": draws.mean(), "low": low, "high": high})
    return summary | {f"{metric}_draws_as_low": float(as_low)}


def together(frames: Sequence[pd.DataFrame], columns: str) -> pd.DataFrame:
    """All rows; without any, an empty table of these columns."""
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns.split())

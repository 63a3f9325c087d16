"""Result tables: means with clustered bootstrap intervals, from the tables of each data set and model.

Every table says for each row how many prompts and subjects it rests on. Gains and LPI are in nats.
`task` is "all" or one task; intervals are percentile intervals over resampled subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from moescope.stats import cluster_bootstrap, hits, interval, reciprocal, two_change_points

Runs = Mapping[tuple[str, str], Mapping[str, pd.DataFrame]]
"""The tables of each (data set, model), by kind."""

METRICS = ("hit_at_10", "mrr", "ffn_gain", "attention_gain", "peak_position", "layer_efficiency")


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: number of draws, coverage, seed."""

    bootstrap_draws: int
    confidence: float
    seed: int

    def means(self, values: Float[np.ndarray, "n m"], subjects: pd.Series) -> Float[np.ndarray, "draws+1 m"]:
        """Column means: the observed ones first, then one row a draw."""
        drawn = cluster_bootstrap(values, subjects.to_numpy(), self.bootstrap_draws, self.seed)
        return np.vstack([values.mean(0), drawn])

    def summary(self, means: Float[np.ndarray, "draws+1 *m"]) -> dict[str, Float[np.ndarray, "*m"]]:
        """Observed value and interval of a statistic that was computed from every row of `means`."""
        low, high = interval(means[1:], self.confidence)
        return {"estimate": means[0], "low": low, "high": high}


def efficiency(runs: Runs, partners: Mapping[str, str], bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 1 for each model, and the difference MoE - dense for each pair on the prompts that both have.

    Columns: dataset, model, kind (of the model: moe or dense), minus (the dense partner in a difference, else
    empty), task, metric, estimate, low, high, prompts, subjects. Metrics: HIT@10, MRR; FFN and attention gain
    (sum over layers of the mean LPI); peak position (mean over prompts of the layer with the largest FFN gain,
    counted from 1, divided by the number of layers); layer efficiency (FFN gain / number of layers).
    """
    rows: list[dict[str, Any]] = []
    for (dataset, model), run in runs.items():
        mine = _per_prompt(run)
        labels = {"dataset": dataset, "model": model, "kind": "moe" if len(run["experts"]) else "dense"}
        for task, scope in _tasks(run["prompts"]):
            values = mine.loc[scope["prompt_id"]].to_numpy()
            summary = bootstrap.summary(bootstrap.means(values, scope["subject"]))
            rows += _metric_rows(labels | {"minus": "", "task": task}, summary, scope)
        if model not in partners:
            continue
        other = _per_prompt(runs[dataset, partners[model]])
        both = run["prompts"][run["prompts"]["prompt_id"].isin(other.index)]
        for task, scope in _tasks(both):
            values = np.hstack([mine.loc[scope["prompt_id"]], other.loc[scope["prompt_id"]]])
            means = bootstrap.means(values, scope["subject"])
            summary = bootstrap.summary(means[:, : len(METRICS)] - means[:, len(METRICS) :])
            rows += _metric_rows(labels | {"minus": partners[model], "task": task}, summary, scope)
    return pd.DataFrame(rows)


def gains(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each layer's attention and FFN block: dataset, model, layer, part, estimate, low, high, ..."""
    frames = []
    for (dataset, model), run in runs.items():
        for part in ("attention", "ffn"):
            wide = run["layers"].pivot(index="prompt_id", columns="layer", values=part)
            summary = _column_summary(wide, run["prompts"], bootstrap)
            frames.append(_labelled(summary, run["prompts"], dataset=dataset, model=model, part=part))
    return pd.concat(frames, ignore_index=True)


def stages(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """FFN gain in three stages of depth, split where a two-change-point fit of the mean gain puts the borders.

    Columns: dataset, model, stage (1 to 3), first_layer, last_layer (from 0), share (of the summed FFN gain;
    below 0 or above 1 where layers undo each other), low, high, prompts, subjects. Intervals hold the
    borders fixed (method.md, section 7).
    """
    rows = []
    for (dataset, model), run in runs.items():
        wide = run["layers"].pivot(index="prompt_id", columns="layer", values="ffn")
        means = bootstrap.means(wide.loc[run["prompts"]["prompt_id"]].to_numpy(), run["prompts"]["subject"])
        borders = (0, *two_change_points(means[0]), means.shape[1])
        for stage, (first, end) in enumerate(pairwise(borders), start=1):
            with np.errstate(divide="ignore", invalid="ignore"):
                share = bootstrap.summary(means[:, first:end].sum(1) / means.sum(1))
            where = {"dataset": dataset, "model": model, "stage": stage, "first_layer": first, "last_layer": end - 1}
            named = {"share": share["estimate"], "low": share["low"], "high": share["high"]}
            rows.append(where | named | _counts(run["prompts"]))
    return pd.DataFrame(rows)


def heads(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each head: dataset, model, layer, head, estimate, low, high, prompts, subjects."""
    frames = []
    for (dataset, model), run in runs.items():
        wide = run["heads"].pivot(index="prompt_id", columns=["layer", "head"], values="lpi")
        summary = _column_summary(wide, run["prompts"], bootstrap)
        frames.append(_labelled(summary, run["prompts"], dataset=dataset, model=model))
    return pd.concat(frames, ignore_index=True)


def experts(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each expert over all prompts of a task; an expert that a prompt does not use adds 0 to it.

    Columns: dataset, model, task, layer, expert (shared expert i is -1 - i), estimate, low, high, used (share
    of prompts whose readout position uses it), prompts, subjects. Only experts that some prompt uses.
    """
    frames = []
    for (dataset, model), run in runs.items():
        table = run["experts"]
        for task, scope in _tasks(run["prompts"]) if len(table) else ():
            wide = table.pivot(index="prompt_id", columns=["layer", "expert"], values="lpi").loc[scope["prompt_id"]]
            used = wide.notna().mean().rename("used").reset_index()
            summary = _column_summary(wide.fillna(0), scope, bootstrap).merge(used)
            frames.append(_labelled(summary, scope, dataset=dataset, model=model, task=task))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def blocking(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 5 with controls: ranks before and after a relation's best experts are blocked.

    One row for each data set, model, scope (all prompts, a task or a relation) and n_blocked. Columns, for
    HIT@10 and MRR: clean; blocked with low and high; random (mean of the draws) with random_low and
    random_high (interval over the draws); drop = clean - blocked with drop_low and drop_high; and
    draws_as_low: share of the random draws with a mean at most that of the blocked experts.
    """
    rows = []
    for (dataset, model), run in runs.items():
        clean = run["prompts"].set_index("prompt_id")["rank"]
        for n, sets in run["blocking"].groupby("n_blocked"):
            wide = sets.pivot(index="prompt_id", columns="draw", values="rank")
            for kind, name, scope in _scopes(run["prompts"]):
                ids = scope["prompt_id"]
                row = {"dataset": dataset, "model": model, "scope": kind, "name": name, "n_blocked": n}
                for metric, value in (("hit_at_10", hits), ("mrr", reciprocal)):
                    before, after = value(clean.loc[ids].to_numpy()), value(wide.loc[ids].to_numpy())
                    means = bootstrap.means(np.column_stack([before, after[:, 0]]), scope["subject"])
                    random = after[:, 1:].mean(0)
                    low, high = interval(random, bootstrap.confidence)
                    row |= {f"{metric}_clean": before.mean()}
                    row |= _prefixed(f"{metric}_blocked", bootstrap.summary(means[:, 1]))
                    row |= _prefixed(f"{metric}_drop", bootstrap.summary(means[:, 0] - means[:, 1]))
                    row |= _prefixed(f"{metric}_random", {"estimate": random.mean(), "low": low, "high": high})
                    row[f"{metric}_draws_as_low"] = np.mean(random <= after[:, 0].mean())
                rows.append(row | {"draws": wide.shape[1] - 1} | _counts(scope))
    return pd.DataFrame(rows)


def keep_only(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 2: HIT@10 and MRR when only some experts of each layer are kept, with intervals, by task.

    `shared` tells whether shared experts are kept, `routed` how many routed ones (-1: all), `kept` both in words.
    """
    rows = []
    for (dataset, model), run in runs.items():
        for (shared, routed), part in run["keep_only"].groupby(["shared", "routed"]):
            rank = part.set_index("prompt_id")["rank"]
            for task, scope in _tasks(run["prompts"]):
                row: dict[str, Any] = {"dataset": dataset, "model": model, "task": task}
                row |= {"kept": _kept(shared, routed), "shared": shared, "routed": routed}
                values = rank.loc[scope["prompt_id"]].to_numpy()
                means = bootstrap.means(np.column_stack([hits(values), reciprocal(values)]), scope["subject"])
                for i, metric in enumerate(("hit_at_10", "mrr")):
                    row |= _prefixed(metric, bootstrap.summary(means[:, i]))
                rows.append(row | _counts(scope))
    return pd.DataFrame(rows)


def _per_prompt(run: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The value of every metric for each prompt; each metric is the mean of its column."""
    rank = run["prompts"].set_index("prompt_id")["rank"]
    ffn = run["layers"].pivot(index="prompt_id", columns="layer", values="ffn").loc[rank.index]
    attention = run["layers"].groupby("prompt_id")["attention"].sum().loc[rank.index]
    n_layers = ffn.shape[1]
    columns = {
        "hit_at_10": hits(rank.to_numpy()),
        "mrr": reciprocal(rank.to_numpy()),
        "ffn_gain": ffn.sum(axis=1),
        "attention_gain": attention,
        "peak_position": (ffn.to_numpy().argmax(1) + 1) / n_layers,
        "layer_efficiency": ffn.sum(axis=1) / n_layers,
    }
    return pd.DataFrame(columns, index=rank.index)[list(METRICS)]


def _metric_rows(
    labels: Mapping[str, str], summary: Mapping[str, np.ndarray], scope: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    for i, metric in enumerate(METRICS):
        yield {**labels, "metric": metric} | {key: values[i] for key, values in summary.items()} | _counts(scope)


def _column_summary(wide: pd.DataFrame, prompts: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """Summary of each column of a table with one row a prompt; its column keys become columns."""
    wide = wide.sort_index(axis=1)
    means = bootstrap.means(wide.loc[prompts["prompt_id"]].to_numpy(), prompts["subject"])
    return wide.columns.to_frame(index=False).assign(**bootstrap.summary(means))


def _labelled(summary: pd.DataFrame, scope: pd.DataFrame, **labels: str) -> pd.DataFrame:
    frame = summary.assign(**_counts(scope))
    for position, (name, value) in enumerate(labels.items()):
        frame.insert(position, name, value)
    return frame


def _tasks(prompts: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", prompts
    for task, rows in prompts.groupby("task"):
        yield str(task), rows


def _scopes(prompts: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    yield "all", "all", prompts
    for kind in ("task", "relation"):
        for name, rows in prompts.groupby(kind):
            yield kind, str(name), rows


def _counts(prompts: pd.DataFrame) -> dict[str, int]:
    return {"prompts": len(prompts), "subjects": prompts["subject"].nunique()}


def _prefixed(name: str, summary: Mapping[str, Any]) -> dict[str, float]:
    return {name: summary["estimate"], f"{name}_low": summary["low"], f"{name}_high": summary["high"]}


def _kept(shared: bool, routed: int) -> str:
    words = (["shared"] if shared else []) + ([] if routed == 0 else ["all routed" if routed < 0 else f"top-{routed}"])
    return " + ".join(words) or "none"


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {
    "gains": gains,
    "stages": stages,
    "heads": heads,
    "experts": experts,
    "blocking": blocking,
    "keep_only": keep_only,
}


def tables(
    names: Sequence[str], runs: Runs, partners: Mapping[str, str], bootstrap: Bootstrap
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The named tables, one by one."""
    for name in names:
        yield name, efficiency(runs, partners, bootstrap) if name == "efficiency" else SUMMARIES[name](runs, bootstrap)

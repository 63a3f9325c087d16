"""Result tables: means with clustered bootstrap intervals, from the tables of each data set and model.

Every table says for each row how many prompts and subjects it rests on. Gains and LPI are in nats.
`task` is "all" or one task; intervals are percentile intervals over resampled subjects. Layers may differ:
a layer without routed experts, or whose heads are not told apart, has no rows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from moescope.published import Published, blocked_mrr, numbers
from moescope.stats import cluster_bootstrap, hits, interval, reciprocal, two_change_points

Runs = Mapping[tuple[str, str], Mapping[str, pd.DataFrame]]
"""The tables of each (data set, model), by kind."""

PRECISION = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Largest relative rounding error of each dtype."""

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
        for task, scope in _tasks(both) if len(both) else ():
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
        if run["heads"].empty:
            continue
        wide = run["heads"].pivot(index="prompt_id", columns=["layer", "head"], values="lpi")
        summary = _column_summary(wide, run["prompts"], bootstrap)
        frames.append(_labelled(summary, run["prompts"], dataset=dataset, model=model))
    return _together(frames, "dataset model layer head estimate low high prompts subjects")


def experts(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each expert over all prompts of a task; an expert that a prompt does not use adds 0 to it.

    Columns: dataset, model, task, layer, expert (shared expert i is -1 - i), estimate, low, high, used (share
    of prompts whose readout position uses it), prompts, subjects. Only experts that some prompt uses.
    """
    frames = []
    for (dataset, model), run in runs.items():
        table = run["experts"]
        for task, scope in _tasks(run["prompts"]) if len(table) else ():
            wide = table.pivot(index="prompt_id", columns=["layer", "expert"], values="lpi")
            wide = wide.reindex(scope["prompt_id"])
            used = wide.notna().mean().rename("used").reset_index()
            summary = _column_summary(wide.fillna(0), scope, bootstrap).merge(used)
            frames.append(_labelled(summary, scope, dataset=dataset, model=model, task=task))
    return _together(frames, "dataset model task layer expert estimate low high used prompts subjects")


def near_ties(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How many choices of experts are near ties, which the rounding of a dtype could turn.

    One row for each data set, model and MoE layer. Columns: median_margin (of capture.margins at the readout
    position); for each dtype the prompts whose margin is below its relative precision at the readout position, and
    (`_anywhere`) at some position of the prompt; prompts, subjects. Of this run's own dtype; a lower bound of the
    choices that another precision turns, since scores also carry the rounding of all layers before.
    """
    rows = []
    for (dataset, model), run in runs.items():
        subjects = run["prompts"].set_index("prompt_id")["subject"]
        for layer, margins in run["margins"].groupby("layer"):
            row = {"dataset": dataset, "model": model, "layer": layer, "median_margin": margins["margin"].median()}
            for dtype, precision in PRECISION.items():
                row[dtype] = int((margins["margin"] < precision).sum())
                row[f"{dtype}_anywhere"] = int((margins["smallest"] < precision).sum())
            scope = subjects.loc[margins["prompt_id"]]
            rows.append(row | {"prompts": len(scope), "subjects": scope.nunique()})
    columns = [name for dtype in PRECISION for name in (dtype, f"{dtype}_anywhere")]
    keys = ["dataset", "model", "layer", "median_margin", *columns, "prompts", "subjects"]
    return pd.DataFrame(rows, columns=keys)


def blocking(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 5 with controls: ranks before and after a relation's best experts are blocked.

    One row for each data set, model, scope (all prompts, a task or a relation) and n_blocked. Columns, for
    HIT@10 and MRR: clean; blocked with low and high; random (mean of the draws) with random_low and
    random_high (interval over the draws); drop = clean - blocked with drop_low and drop_high; and
    draws_as_low: share of the random draws with a mean at most that of the blocked experts. A row rests on the
    prompts that were measured with n_blocked experts blocked and on the draws that all of them have; without a
    draw, what is said of draws is NaN.
    """
    rows = []
    for (dataset, model), run in runs.items():
        clean = run["prompts"].set_index("prompt_id")["rank"]
        for n, sets in run["blocking"].groupby("n_blocked"):
            wide = sets.pivot(index="prompt_id", columns="draw", values="rank")
            measured = run["prompts"][run["prompts"]["prompt_id"].isin(wide.index[wide[-1].notna()])]
            for kind, name, scope in _scopes(measured):
                after = wide.loc[scope["prompt_id"]].dropna(axis=1)
                row = {"dataset": dataset, "model": model, "scope": kind, "name": name, "n_blocked": n}
                for metric, value in (("hit_at_10", hits), ("mrr", reciprocal)):
                    before, scores = value(clean.loc[after.index].to_numpy()), value(after.to_numpy())
                    means = bootstrap.means(np.column_stack([before, scores[:, 0]]), scope["subject"])
                    row |= {f"{metric}_clean": before.mean()}
                    row |= _prefixed(f"{metric}_blocked", bootstrap.summary(means[:, 1]))
                    row |= _prefixed(f"{metric}_drop", bootstrap.summary(means[:, 0] - means[:, 1]))
                    row |= _random(metric, scores.mean(0), bootstrap.confidence)
                rows.append(row | {"draws": after.shape[1] - 1} | _counts(scope))
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


def _random(metric: str, found: Float[np.ndarray, " 1+draws"], confidence: float) -> dict[str, float]:
    """Mean and interval of a metric over the random draws, found[1:], and the share of them at most found[0]."""
    blocked, draws = found[0], found[1:]
    low, high = interval(draws, confidence) if len(draws) else (np.nan, np.nan)
    mean, as_low = (draws.mean(), np.mean(draws <= blocked)) if len(draws) else (np.nan, np.nan)
    summary = _prefixed(f"{metric}_random", {"estimate": mean, "low": low, "high": high})
    return summary | {f"{metric}_draws_as_low": float(as_low)}


def _together(frames: Sequence[pd.DataFrame], columns: str) -> pd.DataFrame:
    """All rows; without any, an empty table of these columns."""
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns.split())


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
    "near_ties": near_ties,
    "blocking": blocking,
    "keep_only": keep_only,
}


def _table_1(row: Any, models: Mapping[str, Published]) -> float:
    if row.task != "all" or not {row.model, row.minus or row.model} <= models.keys():
        return np.nan
    subtracted = models[row.minus].efficiency[row.metric] if row.minus else 0.0
    return models[row.model].efficiency[row.metric] - subtracted


def _table_2(column: int, row: Any, models: Mapping[str, Published]) -> float:
    if row.task != "all" or row.model not in models:
        return np.nan
    return models[row.model].keep_only.get((row.shared, row.routed), (np.nan, np.nan))[column]


def _table_5(column: int, row: Any, models: Mapping[str, Published]) -> float:
    if row.scope != "relation" or row.model not in models:
        return np.nan
    return (blocked_mrr(models[row.model], row.name, row.n_blocked) or (np.nan, np.nan))[column]


BESIDE: Mapping[str, Mapping[str, Callable[[Any, Mapping[str, Published]], float]]] = {
    "efficiency": {"estimate": _table_1},
    "keep_only": {"hit_at_10": partial(_table_2, 0), "mrr": partial(_table_2, 1)},
    "blocking": {"mrr_clean": partial(_table_5, 0), "mrr_blocked": partial(_table_5, 1)},
}
"""Which columns of which table have a published counterpart, and where it stands."""


def beside_published(name: str, table: pd.DataFrame, published: Mapping[str, str]) -> pd.DataFrame:
    """A result table with the paper's numbers beside ours (published.py); `published`: our model -> its name there.

    Columns added, in the unit of the number beside them, NaN where the paper prints nothing:

    - efficiency: published and difference (estimate - published), for task "all". In a difference of two
      models the published number is theirs, from the rounded numbers of both.
    - keep_only: {hit_at_10, mrr}_published and _difference, for task "all".
    - blocking: {mrr_clean, mrr_blocked}_published and _difference, for the relations of the paper's Table 5.

    If the paper prints nothing for any row, nothing is added. The paper's prompts come from the LRE files: on
    other prompts a difference is one of facts and wordings too, and of the relations that "all" stands for.
    Raises ValueError for a name that published.py does not know.
    """
    models = {model: numbers(paper) for model, paper in published.items()}
    for column, look_up in BESIDE.get(name, {}).items():
        found = pd.Series([look_up(row, models) for row in table.itertuples()], index=table.index, dtype=float)
        if found.notna().any():
            prefix = "" if column == "estimate" else f"{column}_"
            table = table.assign(**{f"{prefix}published": found, f"{prefix}difference": table[column] - found})
    return table


def tables(
    names: Sequence[str],
    runs: Runs,
    partners: Mapping[str, str],
    bootstrap: Bootstrap,
    published: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The named tables, one by one; `published`: our model -> its name in published.py, for models that have one."""
    for name in names:
        table = efficiency(runs, partners, bootstrap) if name == "efficiency" else SUMMARIES[name](runs, bootstrap)
        yield name, beside_published(name, table, published or {})

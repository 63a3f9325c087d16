"""Result table of masking: what a task's key neurons and key experts are needed for (method.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from moescope.stats import hits, reciprocal
from moescope.summaries import Bootstrap, Runs, counts, only, prefixed, random_summary

METRICS = ["mrr", "hit_at_10", "log_prob"]


def masking(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """What masking a task's keys does to its own prompts and to those of other tasks, beside matched random parts.

    One row for each pair of tasks, size and metric; and, with task and measured "all", for every prompt with the keys
    of its own task masked (`own`), and of the mean over the other tasks. Keys are chosen on other subjects than those
    measured. Columns:

    - dataset, model, level ("neurons" or "experts"), task (whose keys are masked), measured (task of the prompts), own
      (bool: the same), size (asked for), masked and masked_random (really masked, mean over prompts, of the keys and
      of the draws), metric ("mrr", "hit_at_10", or "log_prob": summed over the response tokens, nats);
    - clean (mean), estimate, low, high (keys masked), change = estimate - clean with change_low and change_high;
    - change_random (mean of the random draws) with change_random_low and change_random_high, the interval over the
      draws; draws_as_low, the share of draws with a mean at most that of the keys; specific = change - change_random
      with specific_low and specific_high, over subjects, the draws held fixed. NaN without a draw;
    - draws, prompts, subjects. A row rests on the prompts measured and on the draws that all of them have.
    """
    rows = []
    for (dataset, model), run in runs.items():
        of_scope: dict[tuple, list] = {}
        for labels, values, draws in _measured(run):
            of_scope.setdefault(tuple(values.index), []).append((labels, values, draws))
        for ids, parts in of_scope.items():
            scope = only(run["prompts"], ids)
            values = np.hstack([values.loc[scope["prompt_id"]] for _, values, _ in parts])
            means = np.split(bootstrap.means(values, scope["subject"]), len(parts), axis=1)
            for (labels, _, draws), part in zip(parts, means, strict=True):
                sides = zip(METRICS, *(side.T for side in np.split(part, 3, axis=1)), draws, strict=True)
                for metric, clean, keys, random, each in sides:
                    row = {"dataset": dataset, "model": model} | labels | {"metric": metric, "clean": clean[0]}
                    row |= bootstrap.summary(keys) | prefixed("change", bootstrap.summary(keys - clean))
                    row |= random_summary("change", np.append(keys[0], each) - clean[0], bootstrap.confidence)
                    row |= prefixed("specific", bootstrap.summary(keys - random))
                    rows.append(row | {"draws": len(each)} | counts(scope))
    columns = """dataset model level task measured own size masked masked_random metric clean estimate low high change
        change_low change_high change_random change_random_low change_random_high draws_as_low specific specific_low
        specific_high draws prompts subjects"""
    table = pd.DataFrame(rows).rename(columns={"change_draws_as_low": "draws_as_low"})
    return table.reindex(columns=columns.split())


def _measured(
    run: Mapping[str, pd.DataFrame],
) -> Iterator[tuple[dict, pd.DataFrame, Float[np.ndarray, "metrics draws"]]]:
    """Of each size and pair of tasks: labels; by prompt the metrics clean, with the keys masked and as the mean over
    the draws; the mean of each draw.
    """
    rank, log_prob = run["masking"]["rank"], run["masking"]["log_prob"].astype(float)
    scores = run["masking"].assign(mrr=reciprocal(rank), hit_at_10=hits(rank), log_prob=log_prob)
    scores["measured"] = scores["prompt_id"].map(run["prompts"].set_index("prompt_id")["task"])
    clean = scores[scores["level"] == "clean"].set_index("prompt_id")[METRICS]
    for (level, size), sets in scores[scores["level"] != "clean"].groupby(["level", "size"]):
        for pair, part in _pairs(sets):
            wide = part.groupby(["prompt_id", "draw"])[[*METRICS, "masked"]].mean().unstack()
            wide = wide[wide["masked", -1].notna()].dropna(axis=1)
            found = wide.to_numpy().reshape(len(wide), len(METRICS) + 1, -1)
            keys, draws = found[..., 0], found[..., 1:]
            random = draws.mean(2) if draws.size else np.full_like(keys, np.nan)
            masked = {"masked": keys[:, -1].mean(), "masked_random": random[:, -1].mean()}
            values = np.hstack([clean.loc[wide.index], keys[:, :-1], random[:, :-1]])
            yield {"level": level, "size": size} | pair | masked, pd.DataFrame(values, wide.index), draws.mean(0)[:-1]


def _pairs(sets: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """The prompts of each task with each task's keys masked; all prompts with those of their own, and of others."""
    own = sets["task"] == sets["measured"]
    for of_own, part in sets.groupby(own):
        yield {"task": "all", "measured": "all", "own": of_own}, part
    for (task, measured), part in sets.groupby(["task", "measured"]):
        yield {"task": task, "measured": measured, "own": task == measured}, part


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {"masking": masking}

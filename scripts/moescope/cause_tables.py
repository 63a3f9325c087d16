"""Result tables of interventions: what breaks when parts are taken away (method.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from moescope.stats import hits, interval, reciprocal
from moescope.summaries import Bootstrap, Runs, counts, prefixed, scopes, tasks


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
            for kind, name, scope in scopes(measured):
                after = wide.loc[scope["prompt_id"]].dropna(axis=1)
                row = {"dataset": dataset, "model": model, "scope": kind, "name": name, "n_blocked": n}
                for metric, value in (("hit_at_10", hits), ("mrr", reciprocal)):
                    before, scores = value(clean.loc[after.index].to_numpy()), value(after.to_numpy())
                    means = bootstrap.means(np.column_stack([before, scores[:, 0]]), scope["subject"])
                    row |= {f"{metric}_clean": before.mean()}
                    row |= prefixed(f"{metric}_blocked", bootstrap.summary(means[:, 1]))
                    row |= prefixed(f"{metric}_drop", bootstrap.summary(means[:, 0] - means[:, 1]))
                    row |= _random(metric, scores.mean(0), bootstrap.confidence)
                rows.append(row | {"draws": after.shape[1] - 1} | counts(scope))
    return pd.DataFrame(rows)


def keep_only(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 2: HIT@10 and MRR when only some experts of each layer are kept, with intervals, by task.

    `shared` tells whether shared experts are kept, `routed` how many routed ones (-1: all), `kept` both in words.
    """
    rows = []
    for (dataset, model), run in runs.items():
        for (shared, routed), part in run["keep_only"].groupby(["shared", "routed"]):
            rank = part.set_index("prompt_id")["rank"]
            for task, scope in tasks(run["prompts"]):
                row: dict[str, Any] = {"dataset": dataset, "model": model, "task": task}
                row |= {"kept": _kept(shared, routed), "shared": shared, "routed": routed}
                values = rank.loc[scope["prompt_id"]].to_numpy()
                means = bootstrap.means(np.column_stack([hits(values), reciprocal(values)]), scope["subject"])
                for i, metric in enumerate(("hit_at_10", "mrr")):
                    row |= prefixed(metric, bootstrap.summary(means[:, i]))
                rows.append(row | counts(scope))
    return pd.DataFrame(rows)


def _random(metric: str, found: Float[np.ndarray, " 1+draws"], confidence: float) -> dict[str, float]:
    """Mean and interval of a metric over the random draws, found[1:], and the share of them at most found[0]."""
    blocked, draws = found[0], found[1:]
    low, high = interval(draws, confidence) if len(draws) else (np.nan, np.nan)
    mean, as_low = (draws.mean(), np.mean(draws <= blocked)) if len(draws) else (np.nan, np.nan)
    summary = prefixed(f"{metric}_random", {"estimate": mean, "low": low, "high": high})
    return summary | {f"{metric}_draws_as_low": float(as_low)}


def _kept(shared: bool, routed: int) -> str:
    words = (["shared"] if shared else []) + ([] if routed == 0 else ["all routed" if routed < 0 else f"top-{routed}"])
    return " + ".join(words) or "none"


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {"blocking": blocking, "keep_only": keep_only}

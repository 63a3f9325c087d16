"""Result tables of interventions: what breaks when parts are taken away (method.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from moescope.stats import hits, interval, reciprocal
from moescope.summaries import (
    Bootstrap,
    Runs,
    column_summary,
    counts,
    labelled,
    only,
    prefixed,
    random_summary,
    scopes,
    tasks,
    together,
)

METRICS: Mapping[str, Callable[[Any], np.ndarray]] = {"hit_at_10": hits, "mrr": reciprocal}

CLAIMED = ("geography", "object_attributes")
"""The tasks of KA's claim about Table 5: the core-sensitive one, the distributed-tolerant one."""


def blocking(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 5 with controls: ranks before and after a relation's best experts are blocked.

    One row for each data set, model, way of blocking (`how`, as in intervene.block_experts), scope (all prompts, a task
    or a relation) and n_blocked. Columns, for HIT@10 and MRR: clean; blocked with low and high; random (mean of the
    draws) with random_low and random_high (interval over the draws); drop = clean - blocked with drop_low and
    drop_high; and draws_as_low: share of the random draws with a mean at most that of the blocked experts. A row rests
    on the prompts that were measured with n_blocked experts blocked and on the draws that all of them have; without a
    draw, what is said of draws is NaN.
    """
    rows = []
    for (dataset, model), run in runs.items():
        for (how, n), ranks in _blocked_ranks(run):
            for kind, name, scope in scopes(only(run["prompts"], ranks.index)):
                measured = ranks.loc[scope["prompt_id"]].dropna(axis=1).to_numpy()
                row = {"dataset": dataset, "model": model, "how": how, "scope": kind, "name": name, "n_blocked": n}
                for metric, value in METRICS.items():
                    scores = value(measured)
                    means = bootstrap.means(scores[:, :2], scope["subject"])
                    row |= {f"{metric}_clean": scores[:, 0].mean()}
                    row |= prefixed(f"{metric}_blocked", bootstrap.summary(means[:, 1]))
                    row |= prefixed(f"{metric}_drop", bootstrap.summary(means[:, 0] - means[:, 1]))
                    row |= random_summary(metric, scores.mean(0)[1:], bootstrap.confidence)
                rows.append(row | {"draws": measured.shape[1] - 2} | counts(scope))
    ends = ("", "_low", "_high")
    columns = ["dataset", "model", "how", "scope", "name", "n_blocked"]
    for metric in METRICS:
        sides = [f"{side}{end}" for side in ("blocked", "drop", "random") for end in ends]
        columns += [f"{metric}_{name}" for name in ("clean", *sides, "draws_as_low")]
    return pd.DataFrame(rows, columns=[*columns, "draws", "prompts", "subjects"])


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
                ranks = rank.loc[scope["prompt_id"]].to_numpy()
                scores = np.column_stack([value(ranks) for value in METRICS.values()])
                means = bootstrap.means(scores, scope["subject"])
                for i, metric in enumerate(METRICS):
                    row |= prefixed(metric, bootstrap.summary(means[:, i]))
                rows.append(row | counts(scope))
    columns = ["dataset", "model", "task", "kept", "shared", "routed"]
    columns += [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*columns, "prompts", "subjects"])


def contrasts(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """KA's claims about Table 5: which tasks, and which models, suffer more when a relation's best experts are blocked.

    A drop is the mean over prompts of clean - blocked, less the mean drop of the random draws. Columns:

    - dataset; contrast: "tasks" (drop in the task `first` minus that in `second`, of one model) or "models" (relative
      drop, divided by the clean mean, of the model `first`, which has shared experts, minus that of `second`, which
      has none, on the prompts that both have); first, second, model (empty where models are compared), task ("all" or
      one; empty where tasks are compared), how (they are blocked), n_blocked, metric (hit_at_10 or mrr);
    - estimate, low, high (over subjects, the random draws held fixed); random, the same contrast of the random draws'
      own drops, with random_low and random_high, the interval over the draws (of two models: over pairs of them);
      estimate + random is the contrast of clean - blocked;
    - first_layers, second_layers (up to the last MoE layer), first_shared, second_shared (has shared experts), of the
      models compared or twice of the one; prompts, subjects.

    Tasks: geography (core-sensitive) and object_attributes (distributed-tolerant); where one is missing, all pairs. No
    row without a random draw that all its prompts have, nor relative to a clean mean of 0.
    """
    rows = []
    for labels, traits, scope, sides in [*_between_tasks(runs), *_between_models(runs)]:
        for metric, value in METRICS.items():
            parts = []
            for ranks, of in sides:
                scores = of * value(ranks)
                parts.append(np.hstack([scores[:, :1] if labels["contrast"] == "models" else of, scores]))
            if not all(part[:, 0].any() for part in parts):
                continue
            means = np.split(bootstrap.means(np.hstack(parts), scope["subject"]), 2, axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                first, second = ((mean[:, 1:2] - mean[:, 2:]) / mean[:, :1] for mean in means)
            # Resampled subjects may all lack one of the tasks, or a hit: no contrast.
            drops = (first - second)[np.isfinite(first - second).all(1)]
            random = drops[0, 1:]
            low, high = interval(random, bootstrap.confidence)
            row = labels | {"metric": metric} | bootstrap.summary(drops[:, 0] - drops[:, 1:].mean(1))
            row |= prefixed("random", {"estimate": random.mean(), "low": low, "high": high})
            rows.append(row | traits | counts(scope))
    columns = """dataset contrast first second model task how n_blocked metric estimate low high random random_low
        random_high first_layers second_layers first_shared second_shared prompts subjects"""
    return pd.DataFrame(rows, columns=columns.split())


def expert_map(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Effect of blocking each expert alone, the mean over all prompts of a task; 0, exactly, where it is not used.

    Columns: dataset, model, positions (where it is blocked: "readout" or "all"), task, layer, expert (shared expert i
    is -1 - i), estimate (log-probability blocked - clean, nats), low, high, effect_if_used (nats, mean over the prompts
    that use it there; NaN without one), mrr_change (of the MRR) with mrr_change_low and mrr_change_high, used (share of
    prompts that use it there), prompts, subjects. Only experts that some prompt uses; of the prompts measured.
    """
    frames = []
    for (dataset, model), run in runs.items():
        for positions, part in run["expert_map"].groupby("positions"):
            index = {"index": "prompt_id", "columns": ["layer", "expert"]}
            changes = _changes(part, run["prompts"])
            effect, mrr = (changes.pivot(**index, values=column) for column in ("effect", "mrr_change"))
            for task, scope in tasks(only(run["prompts"], part["prompt_id"])):
                here = effect.loc[scope["prompt_id"]]
                summary = column_summary(here.fillna(0), scope, bootstrap)
                for name, each in (("effect_if_used", here.mean()), ("used", here.notna().mean())):
                    summary = summary.merge(each.rename(name).reset_index())
                names = ["layer", "expert", "mrr_change", "mrr_change_low", "mrr_change_high"]
                change = column_summary(mrr.fillna(0), scope, bootstrap).set_axis(names, axis=1)
                labels = {"dataset": dataset, "model": model, "positions": str(positions), "task": task}
                frames.append(labelled(summary.merge(change), scope, **labels))
    columns = """dataset model positions task layer expert estimate low high effect_if_used mrr_change mrr_change_low
        mrr_change_high used prompts subjects"""
    return together(frames, columns)[columns.split()]


def faithfulness(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How well a score of an expert predicts what blocking it alone does (method.md, section 7).

    Columns: dataset, model, positions (where experts are blocked), task, score ("lpi" or "weight", the gate weight;
    both at the readout position, 0 for an expert that is used elsewhere only), measure, estimate, low, high (mean over
    prompts), random with random_low and random_high (its control), difference = estimate - random with difference_low
    and difference_high, left_out (prompts that have no value of the measure), prompts, subjects. Measures:

    - "spearman": r, over the experts (routed and shared, of all layers) that a prompt uses, between the score and the
      fall of the target's log-probability; ties share their mean rank. Random: the scores shuffled within the prompt,
      once. Left out: a prompt whose scores, or effects, are all equal.
    - "best": effect (log-probability blocked - clean, nats) of the prompt's routed expert with the highest score (of
      equal ones the first). Random: mean effect of the other routed experts of its layer that the prompt uses. Left
      out: a prompt that uses no other.
    """
    rows = []
    measures: dict[str, Callable[[pd.DataFrame, str], pd.DataFrame]]
    measures = {"spearman": partial(_spearman, bootstrap.seed), "best": _best}
    for (dataset, model), run in runs.items():
        keys = ["prompt_id", "layer", "expert"]
        changes = _changes(run["expert_map"], run["prompts"]).merge(run["experts"], how="left", on=keys)
        changes = changes.sort_values(keys, ignore_index=True).fillna({"lpi": 0, "weight": 0})
        for positions, part in changes.groupby("positions"):
            measured = only(run["prompts"], part["prompt_id"])
            for score, (measure, per_prompt) in product(("lpi", "weight"), measures.items()):
                values = per_prompt(part, score)
                for task, scope in tasks(measured):
                    found = only(scope, values.dropna().index)
                    if found.empty:
                        continue
                    means = bootstrap.means(values.loc[found["prompt_id"]].to_numpy(), found["subject"])
                    row = {"dataset": dataset, "model": model, "positions": positions, "task": task}
                    row |= {"score": score, "measure": measure} | bootstrap.summary(means[:, 0])
                    row |= prefixed("random", bootstrap.summary(means[:, 1]))
                    row |= prefixed("difference", bootstrap.summary(means[:, 0] - means[:, 1]))
                    rows.append(row | {"left_out": len(scope) - len(found)} | counts(found))
    columns = """dataset model positions task score measure estimate low high random random_low random_high
        difference difference_low difference_high left_out prompts subjects"""
    return pd.DataFrame(rows, columns=columns.split())


def tracing(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Causal tracing: how much of the target's log-probability one part of the clean run brings back.

    One row for each data set, model, level (layer, attention, ffn, expert, shared, coalition, random), minus, size,
    over, position and layer (means nothing of a coalition). Columns besides: share with low and high, (restored -
    corrupted) / (clean - corrupted), a ratio of means over prompts of log-probabilities (NaN where the interval of the
    total reaches 0: the noise took nothing that could come back); difference with difference_low
    and difference_high, mean of restored - corrupted (nats); total, mean of clean - corrupted (nats); prompts (all that
    have the part at the position, also those that the noise did not hurt), subjects. Draws of noise, and of random
    experts, are averaged within a prompt first.

    `over` says how experts of one layer, which are restored one at a time, become one value of a prompt: "mean", or
    "max", the one that brings back most (the largest of noisy values: too large on average). `minus` is "random" in
    rows of coalition - random, for as many experts at the same position, on the prompts that have both; else empty.
    """
    frames = []
    for (dataset, model), run in runs.items():
        total, effects = _restored(run["tracing"], run["tracing_runs"])
        keys = ["level", "minus", "size", "over", "position"]
        for where, part in effects.groupby(keys):
            wide = part.pivot(index="prompt_id", columns="layer", values="restored")
            scope = only(run["prompts"], wide.index)
            order = scope["prompt_id"]
            means = bootstrap.means(np.column_stack([total.loc[order], wide.loc[order]]), scope["subject"])
            with np.errstate(divide="ignore", invalid="ignore"):
                lost = np.where(bootstrap.summary(means[:, 0])["low"] > 0, means[:, :1], np.nan)
                share = bootstrap.summary(means[:, 1:] / lost)
            summary = {"layer": wide.columns, "share": share["estimate"], "low": share["low"], "high": share["high"]}
            summary |= prefixed("difference", bootstrap.summary(means[:, 1:]))
            labels = {"dataset": dataset, "model": model} | dict(zip(keys, where, strict=True))
            frames.append(labelled(pd.DataFrame(summary).assign(total=means[0, 0]), scope, **labels))
    columns = """dataset model level minus size over position layer share low high difference difference_low
        difference_high total prompts subjects"""
    return together(frames, columns)[columns.split()]


def _blocked_ranks(run: Mapping[str, pd.DataFrame]) -> Iterator[tuple[tuple[str, int], pd.DataFrame]]:
    """(how, n_blocked), and ranks of the prompts measured: clean, the best experts blocked (-1), each random draw."""
    clean = run["prompts"].set_index("prompt_id")["rank"]
    for (how, n), sets in run["blocking"].groupby(["how", "n_blocked"]):
        ranks = sets.pivot(index="prompt_id", columns="draw", values="rank")
        ranks = ranks[ranks[-1].notna()]
        ranks.insert(0, "clean", clean)
        yield (str(how), int(n)), ranks


def _between_tasks(runs: Runs) -> Iterator[tuple[dict, dict, pd.DataFrame, list]]:
    for (dataset, model), run in runs.items():
        for (how, n), ranks in _blocked_ranks(run):
            measured = only(run["prompts"], ranks.index)
            found = set(measured["task"])
            for first, second in [CLAIMED] if found.issuperset(CLAIMED) else combinations(sorted(found), 2):
                scope = measured[measured["task"].isin([first, second])]
                both = ranks.loc[scope["prompt_id"]].dropna(axis=1).to_numpy()
                labels: dict[str, Any] = {"dataset": dataset, "contrast": "tasks"}
                labels |= {"first": first, "second": second, "model": model, "task": "", "how": how, "n_blocked": n}
                sides = [(both, (scope["task"] == task).to_numpy(float)[:, None]) for task in (first, second)]
                if both.shape[1] > 2:
                    yield labels, _traits(run, run), scope, sides


def _between_models(runs: Runs) -> Iterator[tuple[dict, dict, pd.DataFrame, list]]:
    for ((dataset, first), one), ((other, second), two) in product(runs.items(), repeat=2):
        if dataset != other or not _has_shared(one) or _has_shared(two):
            continue
        ranks_of_two = dict(_blocked_ranks(two))
        for (how, n), ranks in _blocked_ranks(one):
            if (how, n) not in ranks_of_two:
                continue
            other_ranks = ranks_of_two[how, n]
            for task, scope in tasks(only(only(one["prompts"], ranks.index), other_ranks.index)):
                labels: dict[str, Any] = {"dataset": dataset, "contrast": "models"}
                labels |= {"first": first, "second": second, "model": "", "task": task, "how": how, "n_blocked": n}
                sides = [each.loc[scope["prompt_id"]].dropna(axis=1) for each in (ranks, other_ranks)]
                common = sides[0].columns.intersection(sides[1].columns, sort=False)
                if len(common) > 2:
                    yield labels, _traits(one, two), scope, [(side[common].to_numpy(), 1.0) for side in sides]


def _has_shared(run: Mapping[str, pd.DataFrame]) -> bool:
    return bool((run["experts"]["expert"] < 0).any())


def _traits(first: Mapping[str, pd.DataFrame], second: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    sides = {"first": first, "second": second}
    layers = {f"{side}_layers": int(run["experts"]["layer"].max()) + 1 for side, run in sides.items()}
    return layers | {f"{side}_shared": _has_shared(run) for side, run in sides.items()}


def _changes(blocked: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """Rows of expert_map with what blocking changes: effect (log-probability, nats) and mrr_change (1 / rank)."""
    clean = prompts.set_index("prompt_id").loc[blocked["prompt_id"]]
    effect = blocked["log_prob"].to_numpy(float) - clean["log_prob"].to_numpy(float)
    return blocked.assign(effect=effect, mrr_change=reciprocal(blocked["rank"]) - reciprocal(clean["rank"]))


def _spearman(seed: int, changes: pd.DataFrame, score: str) -> pd.DataFrame:
    """Spearman r of each prompt between a score and the fall of log-probability; random: of the shuffled scores."""
    of = changes["prompt_id"].to_numpy()
    shuffled = changes.sample(frac=1, random_state=seed).sort_values("prompt_id", kind="stable")
    columns = {"estimate": changes[score], "random": shuffled[score].to_numpy(), "fall": -changes["effect"]}
    ranks = pd.DataFrame(columns).groupby(of).rank()
    centred = ranks - ranks.groupby(of).transform("mean")
    squares = (centred**2).groupby(of).sum()
    products = centred[["estimate", "random"]].mul(centred["fall"], axis=0).groupby(of).sum()
    return products.div(np.sqrt(squares["estimate"] * squares["fall"]), axis=0)


def _best(changes: pd.DataFrame, score: str) -> pd.DataFrame:
    """Effect of each prompt's best routed expert by a score; random: the mean of the others of its layer."""
    routed = changes[changes["expert"] >= 0]
    best = routed.loc[routed.groupby("prompt_id")[score].idxmax()]
    others = routed.drop(best.index).merge(best[["prompt_id", "layer"]])
    random = others.groupby("prompt_id")["effect"].mean()
    return best.set_index("prompt_id")[["effect"]].set_axis(["estimate"], axis=1).assign(random=random)


def _restored(table: pd.DataFrame, corrupted: pd.DataFrame) -> tuple[pd.Series, pd.DataFrame]:
    """Of each prompt the mean over draws of clean - corrupted, and of restored - corrupted for every part (nats)."""
    corrupted = corrupted.astype({"clean": float, "corrupted": float})
    total = (corrupted["clean"] - corrupted["corrupted"]).groupby(corrupted["prompt_id"]).mean()
    restored = table.merge(corrupted, on=["prompt_id", "draw"])
    restored = restored.assign(restored=restored["log_prob"] - restored["corrupted"])
    keys = ["prompt_id", "level", "size", "position", "layer"]
    each = restored.groupby([*keys, "expert"])["restored"].mean()
    effects = each.groupby(keys).agg(["mean", "max"]).stack().rename_axis([*keys, "over"])
    effects = effects.rename("restored").reset_index().assign(minus="")
    effects = effects[(effects["over"] == "mean") | (effects["level"] == "expert")]
    shared = ["prompt_id", "size", "position", "layer", "over"]
    best, random = (
        effects[effects["level"] == level].set_index(shared)["restored"] for level in ("coalition", "random")
    )
    gap = (best - random).dropna().reset_index().assign(level="coalition", minus="random")
    return total, pd.concat([effects, gap], ignore_index=True)


def _kept(shared: bool, routed: int) -> str:
    words = (["shared"] if shared else []) + ([] if routed == 0 else ["all routed" if routed < 0 else f"top-{routed}"])
    return " + ".join(words) or "none"


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {
    "blocking": blocking,
    "keep_only": keep_only,
    "contrasts": contrasts,
    "expert_map": expert_map,
    "faithfulness": faithfulness,
    "tracing": tracing,
}

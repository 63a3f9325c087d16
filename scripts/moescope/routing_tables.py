"""Result tables of routing: which prompts choose which experts, and what the choice says (method.md, section 4).

All rests on loads summed over units: facts (a subject in a relation), or the prompts about a fact that end alike. A
bootstrap draw weights the units of each subject, a shuffle deals out the units' labels anew, so that prompts about one
fact stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from moescope.summaries import Bootstrap, Runs, column_summary, counts, only, prefixed, scopes, together

POSITIONS = ("readout", "subject", "all")
FACTS = ["task", "relation", "subject"]
LOADS = ["load_entropy", "effective_experts", "largest_load"]
GATES = ["gate_entropy", "chosen_probability", "gate_margin"]
QUANTITIES = (("relation", ""), ("task", ""), ("last_token", ""), ("relation", "last_token"))
"""What an expert's mutual information is taken with, and what is given."""

SHUFFLES = 100
SHOWN = 10
"""Pairs of experts of each layer that the table of them shows."""
ITERATIONS = 200
AT_ONCE = 2**22
"""Sums that are held at once: draws x cells x experts."""

Statistic = Callable[[Float[np.ndarray, "d cells positions experts"]], np.ndarray]


def routing(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How evenly experts are used, and how clearly they are chosen.

    Columns: dataset, model, scope (all, task or relation), name, positions (readout, subject or all), layer, experts
    (routed experts of the layer), metric, estimate, low, high, of_largest (estimate / the largest one of any layer:
    the metric saturates where it comes near 1), prompts, subjects. Metrics of the load, the distribution of the scope's
    choices over experts: load_entropy (bits), effective_experts = 2^load_entropy, largest_load (share of the most
    chosen expert); intervals as in `_summary`. Means over prompts, at the readout position only (routing.firmness):
    gate_entropy (bits), chosen_probability, gate_margin.
    """
    frames = []
    for (dataset, model), run in _moe(runs):
        facts, unit = _units(run["prompts"], FACTS)
        names, starts, shares = _scopes(facts)
        weights = _weights(facts["subject"], bootstrap)

        def metrics(joint: np.ndarray, shares: Statistic = shares) -> np.ndarray:
            share = shares(joint)
            bits = entropy(share)
            return np.stack([bits, 2**bits, share.max(-1)], -1)

        found = []
        for layer, _, values in _layers(run, unit):
            summary = _summary(_resampled(values, starts, weights, metrics), bootstrap, biased=True)
            found.append(_grid(names.assign(layer=layer), {"positions": POSITIONS, "metric": LOADS}, summary))
        # Scopes whose subjects are all unknown have no size, and no rows.
        found = [pd.concat(found).merge(_sizes(run))]
        wide = run["gates"].set_index(["prompt_id", "layer"])[GATES].rename_axis("metric", axis=1)
        wide = wide.unstack().dropna(axis=1)
        for scope, name, rows in scopes(run["prompts"]):
            if len(wide.columns):
                summary = column_summary(wide, rows, bootstrap)
                found.append(summary.assign(scope=scope, name=name, positions="readout", **counts(rows)))
        table = pd.concat(found, ignore_index=True).assign(dataset=dataset, model=model)
        table["experts"] = table["layer"].map(run["gates"].groupby("layer")["experts"].first())
        frames.append(table)
    columns = "dataset model scope name positions layer experts metric estimate low high of_largest prompts subjects"
    return _with_largest(together(frames, columns), columns)


def expert_use(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How often the prompts of each relation (and task, and all) choose each expert.

    Columns: dataset, model, scope (all, task or relation), name, positions (readout, subject or all), layer, expert,
    frequency (share of the scope's positions that choose it), low, high, lift (frequency / frequency over all prompts),
    prompts, subjects. Experts that a scope never chooses have no row.
    """
    frames = []
    for (dataset, model), run in _moe(runs):
        facts, unit = _units(run["prompts"], FACTS)
        names, starts, shares = _scopes(facts)
        weights, sizes = _weights(facts["subject"], bootstrap), _sizes(run)
        for layer, k, values in _layers(run, unit):
            frequency = k * _resampled(values, starts, weights, shares)
            overall = np.where(frequency[0, :1] > 0, frequency[0, :1], np.nan)
            found = _summary(frequency, bootstrap) | {"lift": frequency[0] / overall}
            axes = {"positions": POSITIONS, "expert": range(values.shape[-1])}
            table = _grid(names.assign(dataset=dataset, model=model, layer=layer), axes, found)
            frames.append(table[table["estimate"] > 0].merge(sizes).rename(columns={"estimate": "frequency"}))
    columns = "dataset model scope name positions layer expert frequency low high lift prompts subjects"
    return together(frames, columns)[columns.split()]


def coactivation(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Pairs of experts that the readout position chooses together more often than independence says.

    Pairs are chosen on one half of the subjects, those with the largest surplus over what is expected, and measured on
    the other half. Columns: dataset, model, layer, order (from 1), expert, other, together (prompts that choose both),
    expected (`expected_pairs`), estimate = together / expected, low, high, prompts, subjects (the measured ones).
    """
    frames = []
    for (dataset, model), run in _moe(runs):
        rows, row = _units(run["prompts"], ["prompt_id", "subject"])
        subjects = np.random.default_rng(bootstrap.seed).permutation(rows["subject"].unique())
        half = rows["subject"].isin(subjects[::2]).to_numpy()
        measured = rows[~half]
        if measured.empty:
            continue
        weights = _weights(measured["subject"], bootstrap)
        for layer, k, values in _layers(run, row, POSITIONS[:1]):
            first, second = values[half, 0], values[~half, 0]
            surplus = np.triu(first.T @ first - expected_pairs(first.sum(0), k), 1)
            best = np.argsort(-surplus, axis=None, kind="stable")[:SHOWN]
            one, other = np.unravel_index(best[surplus.flat[best] > 0], surplus.shape)
            both = weights @ (second[:, one] * second[:, other])
            expected = expected_pairs(weights @ second, k)[:, one, other]
            summary = _summary(both / np.where(expected > 0, expected, np.nan), bootstrap)
            pairs = {"expert": one, "other": other, "together": both[0].astype(int), "expected": expected[0]}
            table = pd.DataFrame(pairs | summary).assign(dataset=dataset, model=model, layer=layer, **counts(measured))
            frames.append(table.assign(order=table.index + 1))
    columns = "dataset model layer order expert other together expected estimate low high prompts subjects"
    return together(frames, columns)[columns.split()]


def task_overlap(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How far two tasks, or two relations, choose the same experts.

    Columns: dataset, model, scope (task or relation), one, other, positions (readout, subject or all), layer, metric,
    estimate, low, high, shuffled (mean, low and high over SHUFFLES shuffles), prompts, subjects (of both). Metrics:
    overlap (1 - total variation distance of the two loads), jaccard (index of the sets of their k most chosen experts;
    a position chooses k). A shuffle deals out the subjects to all tasks (or relations) anew: where the estimate is not
    below that, the two differ by chance alone. Intervals as in `_summary`.
    """
    frames = []
    for (dataset, model), run in _moe(runs):
        facts, unit = _units(run["prompts"], FACTS)
        weights = _weights(facts["subject"], bootstrap)
        orders = _shuffles(facts["subject"], np.zeros(len(facts)), bootstrap.seed)
        for scope in ("task", "relation"):
            starts = _starts(facts[scope])
            pairs = list(combinations(facts[scope].iloc[starts], 2))
            sizes = [counts(run["prompts"][run["prompts"][scope].isin(pair)]) for pair in pairs]
            names = pd.DataFrame(pairs, columns=["one", "other"]).join(pd.DataFrame(sizes))
            names = names.assign(dataset=dataset, model=model, scope=scope)
            for layer, k, values in _layers(run, unit) if pairs else ():
                drawn = _resampled(values, starts, weights, partial(_overlaps, k=k))
                found = _summary(drawn, bootstrap, biased=[True, False])
                found["high"] = np.minimum(found["high"], 1)
                found |= _over_shuffles(_overlaps(_dealt(values, starts, orders), k), bootstrap)
                axes = {"positions": POSITIONS, "metric": ("overlap", "jaccard")}
                frames.append(_grid(names.assign(layer=layer), axes, found).dropna())
    columns = (
        "dataset model scope one other positions layer metric estimate low high"
        " shuffled shuffled_low shuffled_high prompts subjects"
    )
    return together(frames, columns)[columns.split()]


def mutual_information(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How much the experts chosen at the readout position say about the prompt, in bits.

    A prompt spreads its weight evenly over its chosen experts. Columns: dataset, model, layer, label (relation, task or
    last_token, the prompt's), given (empty, or last_token), label_entropy (bits; of the label, given that), plug_in,
    shuffled (mean, low and high over SHUFFLES shuffles), estimate = plug_in - shuffled with low and high (intervals as
    in `_summary`), of_largest (estimate / the largest one of any layer), prompts, subjects. A shuffle deals out labels
    to the subjects anew, whose facts stay together, only among those with the same last token where that is given.

    Subtracting what shuffled labels have removes what few prompts alone give a plug-in value, and a little more where
    labels do tell experts apart.
    """
    frames = []
    for (dataset, model), run in _moe(runs):
        prompts = run["prompts"].assign(last_token=run["prompts"]["token_ids"].str[-1])
        for label, given in QUANTITIES:
            keys = [given, label] if given else [label]
            units, unit = _units(prompts, list(dict.fromkeys([*keys, *FACTS])))
            weights, starts = _weights(units["subject"], bootstrap), _starts(*(units[key] for key in keys))
            group = units[given].to_numpy() if given else np.zeros(len(units), int)
            orders = _shuffles(units["subject"], group, bootstrap.seed)
            certain = _entropy_of(prompts[[given]]) if given else 0.0
            row = {"dataset": dataset, "model": model, "label": label, "given": given, **counts(prompts)}
            row["label_entropy"] = _entropy_of(prompts[keys]) - certain

            def bits(joint: np.ndarray, group: np.ndarray = group[starts]) -> np.ndarray:
                return information(joint[:, :, 0], group)

            for layer, _, values in _layers(run, unit, POSITIONS[:1]):
                plug_in = _resampled(values, starts, weights, bits)
                shuffled = _over_shuffles(bits(_dealt(values, starts, orders)), bootstrap)
                estimate = _summary(plug_in - shuffled["shuffled"], bootstrap, biased=True)
                frames.append(pd.DataFrame([row | {"layer": layer, "plug_in": plug_in[0], **shuffled, **estimate}]))
    columns = (
        "dataset model layer label given label_entropy plug_in shuffled shuffled_low shuffled_high"
        " estimate low high of_largest prompts subjects"
    )
    return _with_largest(together(frames, columns), columns)


def entropy(shares: Float[np.ndarray, "*n experts"]) -> Float[np.ndarray, "*n"]:
    """Entropy of distributions over experts, bits."""
    return -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(-1)


def information(
    joint: Float[np.ndarray, "*n cells experts"], group: Int[np.ndarray, " cells"]
) -> Float[np.ndarray, "*n"]:
    """Plug-in mutual information of expert and cell (label) within groups of cells, given the group, bits.

    `joint` holds the weight of each cell and expert, of any sum; the cells of a group stand together.
    """
    joint = joint.astype(float)
    by_group = np.add.reduceat(joint, _starts(group), -2)

    def sums(weight: np.ndarray) -> np.ndarray:
        return -entropy(weight).reshape(*joint.shape[:-2], -1).sum(-1)

    of_group, of_cell = by_group.sum(-1, keepdims=True), joint.sum(-1, keepdims=True)
    return (sums(joint) + sums(of_group) - sums(of_cell) - sums(by_group)) / joint.sum((-1, -2))


def expected_pairs(chosen: Float[np.ndarray, "*n experts"], k: int) -> Float[np.ndarray, "*n experts experts"]:
    """How many prompts would choose each pair of experts, were choices independent but for never twice the same.

    `chosen` says how many prompts choose each expert, each prompt k of them. Quasi-independence (Goodman 1968): a pair
    is expected a_i * a_j times, with `a` such that every expert is chosen as often as it was; the diagonal is 0.
    """
    a = np.sqrt((k - 1) * chosen / k)
    for _ in range(ITERATIONS):
        rest = a.sum(-1, keepdims=True) - a
        # The geometric mean of the last two: without it, two experts that are always chosen swing for ever.
        a = np.sqrt(a * (k - 1) * chosen / np.where(rest > 0, rest, np.inf))
    return a[..., :, None] * a[..., None, :] * (1 - np.eye(a.shape[-1]))


def _moe(runs: Runs) -> Iterator[tuple[tuple[str, str], Mapping[str, pd.DataFrame]]]:
    return ((key, run) for key, run in runs.items() if len(run["loads"]))


def _sizes(run: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Prompts and subjects of each scope; at the subject's positions, of those where it is known."""
    rows = []
    for positions in POSITIONS:
        known = only(run["prompts"], run["loads"].loc[run["loads"][positions] > 0, "prompt_id"])
        for scope, name, rest in scopes(known) if len(known) else ():
            rows.append({"scope": scope, "name": name, "positions": positions, **counts(rest)})
    return pd.DataFrame(rows)


def _scopes(facts: pd.DataFrame) -> tuple[pd.DataFrame, Int[np.ndarray, " relations"], Statistic]:
    """Scope and name of all prompts, each task and each relation; where a relation starts; loads to scopes' shares."""
    starts = _starts(facts["relation"])
    relations = facts.iloc[starts]
    tasks = _starts(relations["task"])
    names = {"all": ["all"], "task": relations["task"].iloc[tasks], "relation": relations["relation"]}

    def shares(joint: Float[np.ndarray, "d relations positions experts"]) -> np.ndarray:
        return _shares(np.concatenate([joint.sum(1, keepdims=True), np.add.reduceat(joint, tasks, 1), joint], 1))

    pairs = [(scope, name) for scope, found in names.items() for name in found]
    return pd.DataFrame(pairs, columns=["scope", "name"]), starts, shares


def _units(prompts: pd.DataFrame, keys: list[str]) -> tuple[pd.DataFrame, pd.Series]:
    """All different values of `keys`, sorted, and the number of its unit for each prompt_id."""
    number = prompts.groupby(keys).ngroup().to_numpy()
    units = prompts[keys].drop_duplicates().sort_values(keys, ignore_index=True)
    return units, pd.Series(number, index=prompts["prompt_id"])


def _layers(
    run: Mapping[str, pd.DataFrame], unit: pd.Series, positions: Sequence[str] = POSITIONS
) -> Iterator[tuple[int, int, Float[np.ndarray, "units positions experts"]]]:
    """Each MoE layer, how many experts a position chooses there, and its load, summed over the prompts of each unit."""
    shapes = run["gates"].groupby("layer")[["experts", "chosen"]].first()
    for layer, rows in run["loads"].groupby("layer"):
        n, chosen = shapes.loc[layer]
        shape = (unit.max() + 1, n)
        at = unit.loc[rows["prompt_id"]].to_numpy() * n + rows["expert"].to_numpy()
        counted = [np.bincount(at, rows[name], np.prod(shape)).reshape(shape) for name in positions]
        yield int(layer), int(chosen), np.stack(counted, 1).astype("float32")


def _starts(*labels: Any) -> Int[np.ndarray, " cells"]:
    """Where a new cell of equal labels begins."""
    new = np.logical_or.reduce([np.asarray(label)[1:] != np.asarray(label)[:-1] for label in labels])
    return np.concatenate([[0], np.flatnonzero(new) + 1])


def _weights(subjects: pd.Series, bootstrap: Bootstrap) -> Float[np.ndarray, "draws+1 n"]:
    """How often each row counts: once first, then in each draw as often as its subject is drawn."""
    _, subject = np.unique(subjects, return_inverse=True)
    n = subject.max() + 1
    drawn = np.random.default_rng(bootstrap.seed).multinomial(n, np.full(n, 1 / n), size=bootstrap.bootstrap_draws)
    return np.vstack([np.ones((1, n)), drawn]).astype("float32")[:, subject]


def _resampled(
    values: Float[np.ndarray, "units positions experts"],
    starts: Int[np.ndarray, " cells"],
    weights: Float[np.ndarray, "draws+1 units"],
    statistic: Statistic,
) -> np.ndarray:
    """A statistic of the sums over the units of each cell, in every draw."""
    cells = list(pairwise([*starts, len(values)]))
    found = []
    at_once = max(1, AT_ONCE // (len(cells) * values[0].size))
    for some in np.split(weights, range(at_once, len(weights), at_once)):
        joint = np.stack([np.tensordot(some[:, a:b], values[a:b], 1) for a, b in cells], 1)
        found.append(statistic(joint))
    return np.concatenate(found)


def _shuffles(subjects: pd.Series, group: Int[np.ndarray, " units"], seed: int) -> Int[np.ndarray, "shuffles units"]:
    """Random orders of the units of each group, which stand together; those of a subject stay side by side."""
    rng = np.random.default_rng(seed)
    _, subject = np.unique(subjects, return_inverse=True)
    return np.stack([np.lexsort([rng.permutation(subject.max() + 1)[subject], group]) for _ in range(SHUFFLES)])


def _dealt(
    values: Float[np.ndarray, "units positions experts"],
    starts: Int[np.ndarray, " cells"],
    orders: Int[np.ndarray, "shuffles units"],
) -> Float[np.ndarray, "shuffles cells positions experts"]:
    """Sums over the units of each cell, when each order deals the units out to cells of unchanged sizes."""
    return np.stack([np.add.reduceat(values[order], starts) for order in orders])


def _shares(load: Float[np.ndarray, "*n experts"]) -> Float[np.ndarray, "*n experts"]:
    """Distribution over experts; NaN where there is no load."""
    with np.errstate(invalid="ignore"):
        return load / load.sum(-1, keepdims=True)


def _overlaps(load: Float[np.ndarray, "d cells positions experts"], k: int) -> Float[np.ndarray, "d pairs positions 2"]:
    """1 - total variation distance of the loads of two cells, and Jaccard index of their k most chosen experts."""
    share = _shares(load)
    # Experts as often chosen as the k-th best one belong to the best, whatever their numbers.
    top = (share >= np.partition(share, -k, -1)[..., -k, None]) & (share > 0)
    found = []
    for one, other in combinations(range(load.shape[1]), 2):
        both, either = (how(top[:, one], top[:, other]).sum(-1) for how in (np.logical_and, np.logical_or))
        common = np.minimum(share[:, one], share[:, other]).sum(-1)
        jaccard = np.where(np.isnan(common), np.nan, both / np.maximum(either, 1))
        found.append(np.stack([common, jaccard], -1))
    return np.stack(found, 1)


def _summary(
    drawn: Float[np.ndarray, "draws+1 *m"], bootstrap: Bootstrap, biased: bool | Sequence[bool] = False
) -> dict[str, np.ndarray]:
    """Observed value and interval; a draw without a subject of the scope counts as the observed value.

    What few prompts bias, such as entropy, information or overlap, is biased once more in a draw, which has fewer
    different prompts: where `biased` (along the last dimension), the draws' interval about their own mean is put about
    the observed value.
    """
    drawn = np.where(np.isnan(drawn), drawn[0], drawn)
    drawn[1:] -= (drawn[1:].mean(0) - drawn[0]) * biased
    return bootstrap.summary(drawn)


def _over_shuffles(found: Float[np.ndarray, "shuffles *m"], bootstrap: Bootstrap) -> dict[str, Any]:
    return prefixed("shuffled", bootstrap.summary(np.concatenate([found.mean(0, keepdims=True), found])))


def _grid(rows: pd.DataFrame, axes: Mapping[str, Sequence[Any]], values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Arrays as columns, their first dimension along `rows`, the others along `axes`."""
    for name, labels in axes.items():
        rows = rows.merge(pd.DataFrame({name: labels}), how="cross")
    return rows.assign(**{name: array.ravel() for name, array in values.items()})


def _with_largest(table: pd.DataFrame, columns: str) -> pd.DataFrame:
    """A table with each estimate as a share of the largest one of any layer too (NaN if none is above 0)."""
    keys = [key for key in ("scope", "name", "positions", "metric", "label", "given") if key in table]
    largest = table.groupby(["dataset", "model", *keys])["estimate"].transform("max")
    return table.assign(of_largest=table["estimate"] / largest.where(largest > 0))[columns.split()]


def _entropy_of(labels: pd.DataFrame) -> float:
    return float(entropy(labels.value_counts(normalize=True).to_numpy()))


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {
    "routing": routing,
    "expert_use": expert_use,
    "coactivation": coactivation,
    "task_overlap": task_overlap,
    "mutual_information": mutual_information,
}

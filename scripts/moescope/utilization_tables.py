"""Result tables of the Model Utilization Index (MUI): how many neurons and experts a task uses (method.md, section 6).

All rests on the key neurons of each sample. More samples have more of them between them, so scopes are compared at
equal numbers of samples: what a random subset of n samples has is an exact expectation (`inclusion`), not a draw. Its
interval is that of a jackknife over subjects: key neurons come and go together, a sample at a time, while the closed
variances of the literature (Colwell et al. 2012, Journal of Plant Ecology 5; Chao 1987, Biometrics 43) take each neuron
for independent of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from pyroaring import BitMap

from moescope.summaries import Bootstrap, Runs, counts, only, prefixed, scopes, together

EXPERT_SHARE = 0.6
"""Share of the samples in which a key expert holds a key neuron, at least (MUI's eta_expert)."""

POINTS = 20
"""Numbers of samples of a rarefaction curve, at most; numbers of relations of a curve of diversity, too."""

SHUFFLES = 100
SETS = 200
"""Sets of samples of each number of relations."""

SET_SIZE = 50
"""Samples of such a set, at most."""

AT_ONCE = 64
"""Samples whose neuron ids are held side by side."""


@dataclass(frozen=True)
class Samples:
    """Samples of one data set and model, with their key neurons and the units that their response tokens used."""

    prompts: pd.DataFrame
    units: pd.DataFrame
    keys: Sequence[Int[np.ndarray, " keys"]]
    """Neuron ids of each sample, ascending."""
    holds: Bool[np.ndarray, "samples units"]
    """Whether the unit holds a key neuron of the sample."""
    used: Int[np.ndarray, "samples units"]
    """Response tokens of the sample that used the unit."""
    tokens: Int[np.ndarray, " samples"]

    @property
    def neurons(self) -> int:
        return int(self.units["width"].sum())

    @property
    def is_expert(self) -> Bool[np.ndarray, " units"]:
        """False for a dense FFN, which is alone in its layer."""
        return (self.units.groupby("layer")["expert"].transform("size") > 1).to_numpy()

    def of(self, prompts: pd.DataFrame) -> Samples:
        """The same of these prompts."""
        rows = pd.Index(self.prompts["prompt_id"]).get_indexer(prompts["prompt_id"])
        keys = [self.keys[row] for row in rows]
        return Samples(prompts, self.units, keys, self.holds[rows], self.used[rows], self.tokens[rows])


def utilization(runs: Runs, bootstrap: Bootstrap, expert_share: float = EXPERT_SHARE) -> pd.DataFrame:
    """MUI and key experts of all samples, of each task and of each relation. Columns:

    - dataset, model, scope (all, task or relation), name, tokens (of the responses), neurons (of all FFN units),
      used_neurons (of units that some response token used), active_neurons (that one response token passes through,
      mean), key_neurons (of any sample); mui = key_neurons / neurons (MUI's equation) with mui_low and mui_high;
      mui_used and mui_active, divided by used_neurons and active_neurons instead (mui_active may exceed 1);
    - matched_prompts, the size of the smallest scope of that kind in the data set, of any model; exact expectations
      over random subsets of that size: mui_matched with low and high, used_matched (used_neurons), and mui_random (MUI
      of as many samples of the whole data set);
    - plateau with low and high: estimated share of neurons that ever become key (`chao2`, a lower bound), with the
      log-normal interval of Chao 1987;
    - fitted_plateau, fitted_half, fit_error: the curve fitted_plateau * n / (fitted_half + n) through the rarefaction
      curve, and its root-mean-square residual (`fit`; it describes and is no estimate: no interval);
    - experts (routed and shared), key_experts (with a key neuron in at least `expert_share` of the samples),
      key_expert_proportion = key_experts / experts with low and high (bootstrap); 0, 0 and NaN of a dense model;
    - prompts, subjects.

    Intervals of MUI and plateau are those of a jackknife over subjects, NaN for one subject. A sample with a longer
    response has more key neurons: compare the tokens, too.
    """
    rows = []
    smallest = _smallest(runs)
    for (dataset, model), samples in _each(runs):
        of_all = spectrum(frequency(samples.keys, samples.neurons), len(samples.keys))
        widths = samples.units["width"].to_numpy()
        for scope, name, prompts in scopes(samples.prompts):
            part, matched = samples.of(prompts), smallest[dataset, scope]
            at = grid(len(prompts))
            curve, plateau = accumulation(part, [*at, matched], bootstrap.confidence)
            using = (part.used > 0).sum(0)
            reached, active = widths[using > 0].sum(), (part.used * widths).sum() / part.tokens.sum()
            keys = round(curve["estimate"].iloc[-2] * part.neurons)
            row: dict[str, Any] = {"dataset": dataset, "model": model, "scope": scope, "name": name}
            row |= {"tokens": part.tokens.sum(), "neurons": part.neurons, "used_neurons": reached}
            row |= {"active_neurons": active, "key_neurons": keys} | prefixed("mui", curve.iloc[-2])
            row |= {"mui_used": keys / reached, "mui_active": keys / active, "matched_prompts": matched}
            row |= prefixed("mui_matched", curve.iloc[-1]) | prefixed("plateau", plateau)
            row |= {"mui_random": (of_all @ inclusion(len(of_all) - 1, [matched]))[0] / part.neurons}
            row |= {"used_matched": widths @ inclusion(len(prompts), [matched])[using, 0]}
            fitted = fit(at, curve["estimate"].iloc[:-1])
            row |= dict(zip(("fitted_plateau", "fitted_half", "fit_error"), fitted, strict=True))
            key = bootstrap.means(part.holds[:, part.is_expert], prompts["subject"]) >= expert_share
            row |= {"experts": key.shape[1], "key_experts": key[0].sum()}
            proportion = bootstrap.summary(key.sum(1) / (key.shape[1] or np.nan))
            rows.append(row | prefixed("key_expert_proportion", proportion) | counts(prompts))
    columns = """dataset model scope name tokens neurons used_neurons active_neurons key_neurons mui mui_low mui_high
        mui_used mui_active matched_prompts mui_matched mui_matched_low mui_matched_high mui_random used_matched plateau
        plateau_low plateau_high fitted_plateau fitted_half fit_error experts key_experts key_expert_proportion
        key_expert_proportion_low key_expert_proportion_high prompts subjects"""
    return pd.DataFrame(rows, columns=columns.split())


def rarefaction(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """MUI against the number of samples, of all samples and of each task.

    Columns: dataset, model, scope (all or task), name, samples (n), mui (exact expectation over random subsets of n of
    the scope's samples), low, high (jackknife over subjects), fitted (fitted_plateau * n / (fitted_half + n), `fit`),
    fitted_plateau, fitted_half, prompts, subjects (of the scope).
    """
    frames = []
    for (dataset, model), samples in _each(runs):
        for scope, name, prompts in _tasks(samples.prompts):
            at = grid(len(prompts))
            curve, _ = accumulation(samples.of(prompts), at, bootstrap.confidence)
            plateau, half, _ = fit(at, curve["estimate"])
            table = curve.rename(columns={"estimate": "mui"}).assign(dataset=dataset, model=model, scope=scope)
            table = table.assign(name=name, samples=at, fitted=plateau * at / (half + at), **counts(prompts))
            frames.append(table.assign(fitted_plateau=plateau, fitted_half=half))
    columns = "dataset model scope name samples mui low high fitted fitted_plateau fitted_half prompts subjects"
    return together(frames, columns)[columns.split()]


def key_experts(runs: Runs, bootstrap: Bootstrap, expert_share: float = EXPERT_SHARE) -> pd.DataFrame:
    """What each expert (routed, or shared: -1 - i) of a MoE layer holds, for all samples and for each task.

    Columns: dataset, model, scope (all or task), name, layer, expert, token_share (of the response tokens, that used
    it), sample_share (of the samples, in which it holds a key neuron) with low and high (bootstrap), mui (share of its
    neurons that are key in some sample), key (sample_share >= `expert_share`), order (by sample_share, over all layers,
    from 1: MUI's ten most active experts are order <= 10) and token_order (by token_share), equals in the order of
    layers and units; prompts, subjects. No rows of a dense model.
    """
    frames = []
    for (dataset, model), samples in _each(runs):
        if not samples.is_expert.any():
            continue
        for scope, name, prompts in _tasks(samples.prompts):
            part = samples.of(prompts)
            table = part.units[["layer", "expert"]].assign(dataset=dataset, model=model, scope=scope, name=name)
            table["token_share"] = part.used.sum(0) / part.tokens.sum()
            held = bootstrap.summary(bootstrap.means(part.holds, prompts["subject"]))
            table = table.assign(sample_share=held["estimate"], low=held["low"], high=held["high"])
            is_key = frequency(part.keys, part.neurons) > 0
            table["mui"] = np.add.reduceat(is_key, part.units["first"], dtype=int) / part.units["width"]
            table = table[part.is_expert]
            for order, share in (("order", "sample_share"), ("token_order", "token_share")):
                table[order] = table[share].rank(method="first", ascending=False).astype(int)
            frames.append(table.assign(key=table["sample_share"] >= expert_share, **counts(prompts)))
    columns = """dataset model scope name layer expert token_share sample_share low high mui key order token_order
        prompts subjects"""
    return together(frames, columns)[columns.split()]


def key_overlap(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How far two tasks, or two relations, have the same key neurons.

    Columns: dataset, model, kind (task or relation), name, other, matched_prompts (n, the size of the smaller one),
    jaccard (`overlap` for n samples of each, exact), chance with low and high (mean and interval over SHUFFLES
    shuffles), p (how often shuffles overlap as little, themselves among them; not corrected for the number of pairs),
    samples, other_samples, prompts, subjects (of both). A shuffle deals out the samples of the two anew, in unchanged
    numbers; those of one subject and name go together.
    """
    rows = []
    for (dataset, model), samples in _each(runs):
        for kind in ("task", "relation"):
            groups = [(str(name), prompts) for name, prompts in samples.prompts.groupby(kind)]
            for (name, one), (other, two) in combinations(groups, 2):
                both = pd.concat([one, two])
                keys, n, matched = samples.of(both).keys, len(one), min(len(one), len(two))
                of_both = frequency(keys, samples.neurons)
                in_one, in_two = (inclusion(len(group), [matched])[:, 0] for group in (one, two))
                orders = _dealt(both.groupby([kind, "subject"]).ngroup().to_numpy(), bootstrap.seed)
                found = np.empty(1 + SHUFFLES)
                for i, order in enumerate([np.arange(len(both)), *orders]):
                    of_one = frequency([keys[row] for row in order[:n]], samples.neurons)
                    found[i] = overlap(in_one[of_one], in_two[of_both - of_one])
                chance = bootstrap.summary(np.append(found[1:].mean(), found[1:]))
                row: dict[str, Any] = {"dataset": dataset, "model": model, "kind": kind, "name": name, "other": other}
                row |= {"matched_prompts": matched, "jaccard": found[0]} | prefixed("chance", chance)
                row |= {"p": (found <= found[0]).mean(), "samples": n, "other_samples": len(two)}
                rows.append(row | counts(both))
    columns = """dataset model kind name other matched_prompts jaccard chance chance_low chance_high p samples
        other_samples prompts subjects"""
    return pd.DataFrame(rows, columns=columns.split())


def key_scores(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How far experts that hold key neurons are those that are used, or those with a large LPI: Spearman's r.

    Over the experts of all layers, between sample_share (as in `key_experts`, of all samples) and another column.
    Columns: dataset, model, with (token_share, or lpi: mean over samples of the expert's LPI at the readout position, 0
    where it is not used), given (empty, or token_share: partial r), of (routed: routed experts only, or all), estimate,
    low, high (bootstrap, the draws' interval about their own mean put about the estimate: few samples blur ranks),
    chance with low and high (over SHUFFLES shuffles of the experts of each layer: what layers alone explain), experts,
    prompts, subjects (of lpi: of the samples that have LPIs). r is NaN where all experts have equal shares.

    An expert that is not used holds no key neuron: r with token_share is large by construction, and it takes part in r
    with lpi; the partial r says what is left.
    """
    rows = []
    for (dataset, model), samples in _each(runs):
        routed = samples.is_expert & (samples.units["expert"] >= 0).to_numpy()
        lpi = _by_unit(runs[dataset, model].get("experts"), "lpi", samples.units)
        used = pd.DataFrame(samples.used, index=samples.prompts["prompt_id"])
        for (column, values), (of, chosen) in product(
            {"token_share": used, "lpi": lpi}.items(), {"routed": routed, "all": samples.is_expert}.items()
        ):
            part = samples.of(only(samples.prompts, values.index))
            if not (chosen.any() and len(part.prompts)):
                continue
            parts = [part.holds, part.used, values.loc[part.prompts["prompt_id"]].to_numpy()]
            wide = np.hstack([each[:, chosen] for each in parts])
            share, use, score = np.split(bootstrap.means(wide, part.prompts["subject"]), 3, axis=1)
            shuffled = score[0][_dealt(np.arange(chosen.sum()), bootstrap.seed, samples.units["layer"][chosen])]
            fixed = [np.tile(each[0], (SHUFFLES, 1)) for each in (share, use)]
            for given in ("", "token_share") if column == "lpi" else ("",):
                r = spearman(share, score, use if given else None)
                # A draw in which all experts have equal shares counts as the observed value.
                r = np.where(np.isnan(r), r[0], r)
                r[1:] += r[0] - r[1:].mean()
                dealt = spearman(fixed[0], shuffled, fixed[1] if given else None)
                row: dict[str, Any] = {"dataset": dataset, "model": model, "with": column, "given": given, "of": of}
                row |= bootstrap.summary(r.clip(-1, 1))
                row |= prefixed("chance", bootstrap.summary(np.append(dealt.mean(), dealt)))
                rows.append(row | {"experts": chosen.sum()} | counts(part.prompts))
    columns = "dataset model with given of estimate low high chance chance_low chance_high experts prompts subjects"
    return pd.DataFrame(rows, columns=columns.split())


def diversity(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """MUI of equally large sets of samples from more and more relations: a proxy for the diversity of a prompt set.

    Columns: dataset, model, relations (that a set mixes, in equal parts), samples (of a set: as many as the smallest
    relation has, SET_SIZE at most), mui, low, high (mean and interval over SETS random sets of random relations: their
    spread, not the mean's error), per_relation (exact expectation for one relation, the mean over relations), shuffled
    (exact expectation when relations are dealt out to the samples anew, for any mixture), spearman (r of relations and
    mui over all sets; NaN for one relation), prompts, subjects.
    """
    frames = []
    for (dataset, model), samples in _each(runs):
        numbers = list(samples.prompts.groupby("relation").indices.values())
        n = min(SET_SIZE, *(len(rows) for rows in numbers))
        at = np.unique(np.linspace(1, min(n, len(numbers)), POINTS).astype(int))
        rng = np.random.default_rng(bootstrap.seed)
        found = np.empty((SETS, len(at)))
        for cell in np.ndindex(found.shape):
            mixed = rng.permutation(len(numbers))[: at[cell[1]]]
            parts = [rng.permutation(numbers[which])[i : n : len(mixed)] for i, which in enumerate(mixed)]
            keys = [samples.keys[row] for row in np.concatenate(parts)]
            found[cell] = np.count_nonzero(frequency(keys, samples.neurons)) / samples.neurons
        summary = bootstrap.summary(np.vstack([found.mean(0), found]))
        exact = [expected(samples.of(samples.prompts.iloc[rows]), n) for rows in numbers]
        labels: dict[str, Any] = {"dataset": dataset, "model": model, "samples": n, "per_relation": np.mean(exact)}
        labels |= {"shuffled": expected(samples, n), **counts(samples.prompts)}
        labels["spearman"] = spearman(np.tile(at, (1, SETS)), found.reshape(1, -1))[0]
        frames.append(pd.DataFrame({"relations": at, **summary}).rename(columns={"estimate": "mui"}).assign(**labels))
    columns = "dataset model relations samples mui low high per_relation shuffled spearman prompts subjects"
    return together(frames, columns)[columns.split()]


def inclusion(total: int, at: Any) -> Float[np.ndarray, "total+1 at"]:
    """Probability that a random subset of n (`at`) of `total` samples has one of f given ones; a row each f from 0.

    1 - C(total - f, n) / C(total, n): the exact expectation behind every rarefaction curve (Hurlbert 1971, Ecology 52).
    """
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    f, n = np.arange(total + 1)[:, None], np.asarray(at)[None]
    rest = np.maximum(total - f - n, 0)
    # In this order the terms of f = 0 cancel exactly.
    missed = log[total - f] - log[total] + (log[total - n] - log[rest])
    return np.where(f + n > total, 1.0, -np.expm1(missed))


def frequency(keys: Sequence[Int[np.ndarray, " keys"]], neurons: int) -> Int[np.ndarray, " neurons"]:
    """The number of samples in which each neuron is key."""
    found = np.zeros(neurons, dtype=int)
    for start in range(0, len(keys), AT_ONCE):
        found += np.bincount(np.concatenate(keys[start : start + AT_ONCE]), minlength=neurons)
    return found


def spectrum(frequency: Int[np.ndarray, " neurons"], total: int) -> Int[np.ndarray, " total+1"]:
    """The number of neurons that are key in exactly f of `total` samples, f from 0."""
    return np.bincount(frequency, minlength=total + 1)


def expected(samples: Samples, n: int) -> float:
    """MUI that n of these samples, drawn at random, have on average; exact."""
    total = len(samples.keys)
    return (spectrum(frequency(samples.keys, samples.neurons), total) @ inclusion(total, [n]))[0] / samples.neurons


def overlap(one: Float[np.ndarray, " neurons"], other: Float[np.ndarray, " neurons"]) -> float:
    """Expected size of the intersection / of the union of two random sets (Jaccard index); NaN if both are empty.

    Takes the probability of each neuron to be in either set, which are drawn independently.
    """
    both = one @ other
    either = one.sum() + other.sum() - both
    return float(both / either) if either else np.nan


def chao2(spectrum: Int[np.ndarray, " total+1"]) -> float:
    """Neurons that would ever be key, from those that are key in one and in two samples: a lower bound.

    Bias-corrected form of Chao 1987, Biometrics 43 (as in Colwell et al. 2012, Journal of Plant Ecology 5).
    """
    total = len(spectrum) - 1
    once, twice = np.append(spectrum, 0)[1:3]
    return spectrum[1:].sum() + (total - 1) / total * once * (once - 1) / (2 * (twice + 1))


def accumulation(samples: Samples, at: Any, confidence: float) -> tuple[pd.DataFrame, dict[str, float]]:
    """Estimate, low and high of the MUI of n (`at`) samples, a row each n, and of that of ever more samples (`chao2`).

    Both from a jackknife that leaves out one subject at a time, which is conservative (Efron & Stein 1981, Annals of
    Statistics 9). Without it, n is at most the number of samples left.
    """
    total, size = len(samples.keys), samples.neurons

    @cache
    def reached(left: int) -> Float[np.ndarray, "left+1 at"]:
        return inclusion(left, np.minimum(at, left))

    def statistics(spectrum: Int[np.ndarray, " left+1"]) -> Float[np.ndarray, " at+1"]:
        return np.append(spectrum @ reached(len(spectrum) - 1), min(chao2(spectrum), size)) / size

    found = frequency(samples.keys, size)
    estimate = statistics(spectrum(found, total))
    without = []
    for rows in samples.prompts.groupby("subject").indices.values():
        ids, times = np.unique(np.concatenate([samples.keys[row] for row in rows]), return_counts=True)
        moved = spectrum(found[ids] - times, total) - spectrum(found[ids], total)
        if len(rows) < total:
            without.append(statistics((spectrum(found, total) + moved)[: total + 1 - len(rows)]))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    error = np.std(without, axis=0) * np.sqrt(len(without) - 1) if without else np.full(len(estimate), np.nan)
    low, high = np.maximum(estimate - z * error, 0), np.minimum(estimate + z * error, 1)
    curve = pd.DataFrame({"estimate": estimate, "low": low, "high": high})[:-1]
    observed = np.count_nonzero(found) / size
    rest = estimate[-1] - observed
    factor = np.exp(z * np.sqrt(np.log1p((error[-1] / rest) ** 2))) if rest else 1.0
    ends = {"low": observed + rest / factor, "high": min(observed + rest * factor, 1.0)}
    return curve, {"estimate": estimate[-1], **ends}


def fit(at: Int[np.ndarray, " n"], mui: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(plateau, half, root-mean-square residual) of the least-squares curve plateau * n / (half + n).

    `half` is searched between a thousandth and a thousand times the largest n; at that end, no plateau is seen. NaN for
    fewer than three points.
    """
    if len(at) < 3:
        return np.nan, np.nan, np.nan
    exponents = np.linspace(-3, 3, 601)
    for width in (1e-2, 1e-4, 1e-6):
        half = at[-1] * 10**exponents
        shape = at / (half[:, None] + at)
        plateau = shape @ mui / (shape**2).sum(1)
        errors = np.sqrt(((plateau[:, None] * shape - np.asarray(mui)) ** 2).mean(1))
        best = errors.argmin()
        exponents = np.clip(exponents[best] + np.linspace(-width, width, 201), -3, 3)
    return float(plateau[best]), float(half[best]), float(errors[best])


def grid(total: int) -> Int[np.ndarray, " n"]:
    """Numbers of samples from 1 to `total`, at most POINTS, evenly spaced on a logarithmic scale."""
    return np.unique(np.geomspace(1, total, POINTS).round().astype(int))


def spearman(
    one: Float[np.ndarray, "d n"], other: Float[np.ndarray, "d n"], given: Float[np.ndarray, "d n"] | None = None
) -> Float[np.ndarray, " d"]:
    """Spearman's r of each two rows, or the partial r, given a third; ties share their mean rank.

    NaN where all values of a row are equal, and given a row that fixes the order of one of the two.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if given is not None:
            r, first, second = spearman(one, other), spearman(one, given), spearman(other, given)
            return (r - first * second) / np.sqrt((1 - first**2) * (1 - second**2))
        ranks = [pd.DataFrame(values).rank(axis=1).to_numpy() for values in (one, other)]
        x, y = (rank - rank.mean(1, keepdims=True) for rank in ranks)
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def _each(runs: Runs) -> Iterator[tuple[tuple[str, str], Samples]]:
    for key, run in runs.items():
        if len(run["key_neurons"]):
            yield key, _samples(run)


def _samples(run: Mapping[str, pd.DataFrame]) -> Samples:
    prompts, units = _measured(run), run["units"]
    found = run["key_neurons"].set_index("prompt_id").loc[prompts["prompt_id"]]
    keys = [np.asarray(BitMap.deserialize(one).to_array()) for one in found["keys"]]
    borders = np.append(units["first"], units["width"].sum())
    holds = np.stack([np.diff(np.searchsorted(ids, borders)) > 0 for ids in keys])
    used = _by_unit(run["expert_tokens"], "tokens", units).loc[found.index].to_numpy(int)
    return Samples(prompts, units, keys, holds, used, found["tokens"].to_numpy(int))


def _by_unit(table: pd.DataFrame | None, values: str, units: pd.DataFrame) -> pd.DataFrame:
    """A row each prompt of the table and a column each unit; 0 where there is no row of the two."""
    if table is None or table.empty:
        return pd.DataFrame()
    wide = table.pivot(index="prompt_id", columns=["layer", "expert"], values=values)
    return wide.reindex(columns=pd.MultiIndex.from_frame(units[["layer", "expert"]])).fillna(0)


def _measured(run: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    return only(run["prompts"], run["key_neurons"]["prompt_id"])


def _smallest(runs: Runs) -> dict[tuple[str, str], int]:
    """The samples of the smallest scope of each data set and kind of scope."""
    sizes = dict[tuple[str, str], int]()
    for (dataset, _), run in runs.items():
        for kind, _, prompts in scopes(_measured(run)) if len(run["key_neurons"]) else ():
            sizes[dataset, kind] = min(len(prompts), sizes.get((dataset, kind), len(prompts)))
    return sizes


def _tasks(prompts: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    return (scope for scope in scopes(prompts) if scope[0] != "relation")


def _dealt(units: Int[np.ndarray, " n"], seed: int, within: Any = None) -> Int[np.ndarray, "shuffles n"]:
    """Random orders of the rows, those of a unit side by side; inside the groups of `within`, which stand in order."""
    rng = np.random.default_rng(seed)
    group = np.zeros(len(units), int) if within is None else within
    return np.stack([np.lexsort([rng.permutation(units.max() + 1)[units], group]) for _ in range(SHUFFLES)])


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {
    "utilization": utilization,
    "rarefaction": rarefaction,
    "key_experts": key_experts,
    "key_overlap": key_overlap,
    "key_scores": key_scores,
    "diversity": diversity,
}

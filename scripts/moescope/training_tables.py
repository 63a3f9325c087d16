"""Result tables of training: trajectories, phases, and toy models that differ in one thing (method.md, section 6).

A Model Utilization Index (MUI) counts a union, which every sample left out or drawn twice makes smaller: draws with
replacement are biased low. So its draws are linear ones, the observed value plus the mean influence of resampled
subjects, where the influence of a subject is that of the jackknife: what the union loses without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from pyroaring import BitMap

from moescope.stats import hits, reciprocal
from moescope.summaries import Bootstrap, Runs, counts, only, prefixed, together

EXPERT_SHARE = 0.6
"""Share of the samples in which a key expert holds a key neuron, at least (MUI's eta_expert)."""

FEW, CANDIDATES = 7, 201
"""Checkpoints that a fit of phases needs, and places that are tried for the change point."""

MEANS: Mapping[str, Callable[[pd.DataFrame], np.ndarray]] = {
    "mrr": lambda table: reciprocal(table["rank"]),
    "hit10": lambda table: hits(table["rank"]),
    "lpi_top_share": lambda table: table["lpi_top_share"].to_numpy(float),
}
SIZE = ["prompts", "subjects"]
MEMBER = ["family", "variant", "seed"]
FAMILY_METRICS = {
    "utilization": ("mui", "mui_active", "key_expert_proportion"),
    "efficiency": ("mrr", "layer_efficiency"),
    "blocking": ("mrr_drop", "mrr_drop_random"),
}


@dataclass(frozen=True)
class Trajectory:
    """The states of one model on one data set, in the order of training.

    Of each metric `draws` has the observed values first, then those of resampled subjects, the same for all metrics;
    NaN where a state has none. `chance` is that of `training`.
    """

    names: Sequence[str]
    steps: Int[np.ndarray, " checkpoints"]
    prompts: pd.DataFrame
    draws: Mapping[str, Float[np.ndarray, "draws+1 checkpoints"]]
    chance: Mapping[str, Float[np.ndarray, " checkpoints"]]


def training(runs: Runs, bootstrap: Bootstrap, expert_share: float = EXPERT_SHARE) -> pd.DataFrame:
    """How well each state of a model knows the facts, how much of itself it uses, and how much its routing moves.

    One row for each data set, model, checkpoint (of training step `step`; the last one is the finished model where that
    was measured) and metric:

    - mrr, hit10;
    - mui: share of all FFN neurons that are key in some sample;
    - key_expert_proportion (MoE only): share of the experts of MoE layers that hold a key neuron in at least
      `expert_share` of the samples;
    - lpi_top_share: share of the positive LPI that the best 1% of the neurons hold, to first order, an estimate
      (training.top_share), mean over the prompts that have one in all states;
    - routing_previous, routing_final (MoE only): share of the experts chosen at the end of a prompt that the checkpoint
      before, or the last one, chooses too, mean over prompts and MoE layers; no row where there is no such other one;
    - change_point: the step where MUI changes its course, in a row without checkpoint, where `phases` finds two.

    Columns: dataset, model, checkpoint, step, metric, estimate, low, high, chance, prompts, subjects. Intervals are of
    resampled subjects; those of mui lie about the observed value (see the head of this module). `chance`: of routing,
    what the choices of two random prompts have in common; of mui, the same numbers of key neurons drawn at random for
    each sample; both exact expectations, NaN elsewhere.
    """
    frames = []
    for (dataset, model), run in runs.items():
        path = trajectory(run, bootstrap, expert_share)
        for metric, draws in path.draws.items():
            frame = pd.DataFrame({"checkpoint": path.names, "step": path.steps, "metric": metric})
            frame = frame.assign(**bootstrap.summary(draws), chance=path.chance.get(metric, np.nan))
            frames.append(frame[~np.isnan(draws[0])].assign(dataset=dataset, model=model, **counts(path.prompts)))
        found = fit_phases(path.steps, path.draws["mui"]) if len(path.steps) >= FEW else None
        if found is not None and found.two[0]:
            point = bootstrap.summary(found.change_step)
            row = {"checkpoint": "", "step": round(float(point["estimate"])), "metric": "change_point", **point}
            row |= {"chance": np.nan, "dataset": dataset, "model": model, **counts(path.prompts)}
            frames.append(pd.DataFrame([row]))
    columns = "dataset model checkpoint step metric estimate low high chance prompts subjects"
    return together(frames, columns)[columns.split()]


def phases(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Phases of training by a fitted rule: MUI over log(1 + step) in one line, or in two that meet at a change point.

    Two lines are taken where they beat one by BIC with McQuarrie's correction for few points (1999, Statistics and
    Probability Letters 44); without it, noise about one line passes for two. One row for each data set, model and
    segment ("before" and "after" the change point, or "whole"). Columns:

    - first_step, last_step of the segment; phase: "accumulating" where MUI rises, "evolving" where MUI falls and MRR
      rises (MUI's two phases), for certain: each slope's interval lies on one side of 0; else "undecided";
    - mui_slope, mrr_slope (per unit of log(1 + step); of MUI that of the fit, of MRR least squares over the segment's
      checkpoints) with low and high;
    - change_step with low and high (NaN for one segment); two_pieces_share: share of draws that two lines fit better;
      fit_error: root mean square of what the fit leaves of MUI (large beside MUI's range: neither describes it);
    - checkpoints, note (why there is no fit), prompts, subjects.

    Intervals are of resampled subjects, the number of pieces held fixed; they say what other prompts would have given,
    not what other runs of training would. With fewer than 7 checkpoints there is one row with a note.
    """
    rows = []
    for (dataset, model), run in runs.items():
        path = trajectory(run, bootstrap)
        steps, n = path.steps, len(path.steps)
        same = {"dataset": dataset, "model": model, "checkpoints": n, "note": "", **counts(path.prompts)}
        if n < FEW:
            note = f"{n} checkpoints; a fit of two lines needs at least {FEW}, name more"
            rows.append(same | {"phase": "undecided", "note": note})
            continue
        found = fit_phases(steps, path.draws["mui"])
        same |= {"two_pieces_share": found.two[1:].mean(), "fit_error": found.error[0]}
        segments = [("whole", steps[0], steps[-1], found.slope)]
        if found.two[0]:
            same |= prefixed("change_step", bootstrap.summary(found.change_step))
            ends = [steps[0], found.change_step[0], steps[-1]]
            segments = [*zip(("before", "after"), ends[:-1], ends[1:], found.slopes, strict=True)]
        for segment, start, end, slope in segments:
            inside = (steps > start - 1e-6) & (steps < end + 1e-6)
            mrr = _line(np.log1p(steps[inside]), path.draws["mrr"][:, inside])[0][0]
            row = {"segment": segment, "first_step": start, "last_step": end}
            row |= prefixed("mui_slope", bootstrap.summary(slope)) | prefixed("mrr_slope", bootstrap.summary(mrr))
            rows.append(same | row | {"phase": _phase(row)})
    columns = ["dataset", "model", "segment", "first_step", "last_step", "phase"]
    columns += [f"{name}{end}" for name in ("mui_slope", "mrr_slope", "change_step") for end in ("", "_low", "_high")]
    return pd.DataFrame(
        rows, columns=[*columns, "two_pieces_share", "fit_error", "checkpoints", "note", "prompts", "subjects"]
    )


def families(
    tables: Mapping[str, pd.DataFrame], members: Mapping[str, Mapping[str, object]], confidence: float = 0.95
) -> pd.DataFrame:
    """What one difference between toy models does, over seeds.

    `tables` are summary tables: utilization and blocking (scope all) and efficiency (task all); `members` gives
    family, variant and seed of each model. One row for each data set, family, variant and metric: mui, mui_active,
    key_expert_proportion; mrr (clean), layer_efficiency; mrr_drop (MRR lost when the most experts of a relation are
    blocked, by zero) and mrr_drop_random (the mean of its random controls). Columns:

    - seeds: how many have the metric; mean, low, high: Student's t interval over seeds, NaN for one;
    - minus: the family's first variant; difference with difference_low and difference_high: the same of the
      differences to it, paired by seed (empty and NaN in that variant's own rows);
    - values: "seed: value" of each seed, in words; prompts, subjects (of the seed that has most).

    An interval is of other seeds (initial weights, order of batches), not of other prompts.
    """
    names = pd.DataFrame([{"model": name, **of} for name, of in members.items()], columns=["model", *MEMBER])
    found = _of_families(tables, names)
    rows = []
    for (dataset, family), of_family in found.groupby(["dataset", "family"], sort=False):
        first = str(of_family["variant"].iloc[0])
        for (variant, metric), mine in of_family.groupby(["variant", "metric"], sort=False):
            values = mine.set_index("seed")["value"].sort_index()
            base = of_family.query("variant == @first and metric == @metric").set_index("seed")["value"]
            difference = t_interval((values - base).dropna().to_numpy(), confidence)
            row = dict(zip(("mean", "low", "high"), t_interval(values.to_numpy(), confidence), strict=True))
            if variant != first:
                row |= prefixed("difference", dict(zip(("estimate", "low", "high"), difference, strict=True)))
            text = ", ".join(f"{seed}: {value:.4g}" for seed, value in values.items())
            labels = {"dataset": dataset, "family": family, "variant": variant, "metric": metric}
            minus = "" if variant == first else first
            rows.append(labels | {"seeds": len(values), "minus": minus, "values": text} | row | dict(mine[SIZE].max()))
    columns = """dataset family variant metric seeds mean low high minus difference difference_low difference_high
        values prompts subjects"""
    return pd.DataFrame(rows, columns=columns.split())


def _of_families(tables: Mapping[str, pd.DataFrame], members: pd.DataFrame) -> pd.DataFrame:
    """The value of each metric, with dataset, family, variant and seed, in the order of the members."""
    by = ["dataset", "model"]
    efficiency = tables["efficiency"].fillna({"minus": ""}).query("task == 'all' and minus == ''")
    blocking = tables["blocking"].query("scope == 'all' and how == 'zero'")
    blocking = blocking[blocking["n_blocked"] == blocking.groupby(by)["n_blocked"].transform("max")]
    wide = {
        "utilization": tables["utilization"].query("scope == 'all'"),
        "efficiency": efficiency.pivot(index=by, columns="metric", values="estimate").reset_index(),
        "blocking": blocking.assign(mrr_drop_random=blocking["mrr_clean"] - blocking["mrr_random"]),
    }
    long = [
        wide[name].reindex(columns=[*by, *columns]).melt(by, var_name="metric")
        for name, columns in FAMILY_METRICS.items()
    ]
    found = pd.concat(long).dropna(subset="value").merge(wide["utilization"][by + SIZE], on=by)
    return members.merge(found, on="model").astype({"value": float})


def trajectory(run: Mapping[str, pd.DataFrame], bootstrap: Bootstrap, expert_share: float = EXPERT_SHARE) -> Trajectory:
    """The metrics of `training` with their draws, from the tables prompts, units and checkpoints of a run.

    `checkpoints` are tables of training.measure, one after the other, with the columns checkpoint and step added.
    """
    table = run["checkpoints"].sort_values(["step", "checkpoint", "prompt_id"])
    states = [own for _, own in table.groupby(["step", "checkpoint"])]
    prompts = only(run["prompts"], table["prompt_id"]).sort_values("prompt_id")
    subjects, units, n = prompts["subject"], run["units"], len(states)
    draws, chance = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for metric, value in MEANS.items():
        values = np.column_stack([value(own) for own in states])
        known = ~np.isnan(values).any(1)
        if known.any():
            draws[metric] = bootstrap.means(values[known], subjects[known])
    keys = [[np.array(BitMap.deserialize(one).to_array(), dtype=np.int64) for one in own["keys"]] for own in states]
    found = [_union(own, subjects, int(units["width"].sum())) for own in keys]
    union, influence, by_chance = (np.stack(column, -1) for column in zip(*found, strict=True))
    draws["mui"] = union + bootstrap.means(influence, pd.Series(range(len(influence))))
    chance["mui"] = by_chance
    experts = (units.groupby("layer")["expert"].transform("size") > 1).to_numpy()
    if experts.any():
        holds = np.stack([_holds(own, units)[:, experts] for own in keys], 1).reshape(len(prompts), -1)
        shares = bootstrap.means(holds, subjects).reshape(-1, n, experts.sum())
        draws["key_expert_proportion"] = (shares >= expert_share).mean(2)
        layers = units.loc[experts, "layer"].nunique()
        chosen = [np.stack(own["choices"].to_list()).reshape(len(own), layers, -1) for own in states]
        others = {"routing_previous": [None, *chosen[:-1]], "routing_final": [*chosen[-1:] * (n - 1), None]}
        for metric, other in others.items():
            kept = [_shared(*pair) for pair in zip(chosen, other, strict=True)]
            draws[metric] = bootstrap.means(np.column_stack([pair[0] for pair in kept]), subjects)
            chance[metric] = np.array([pair[1] for pair in kept])
    names = [str(own["checkpoint"].iloc[0]) for own in states]
    return Trajectory(names, np.array([own["step"].iloc[0] for own in states]), prompts, draws, chance)


def _union(
    keys: Sequence[Int[np.ndarray, " k"]], subjects: pd.Series, neurons: int
) -> tuple[float, Float[np.ndarray, " subjects"], float]:
    """MUI of the samples, each subject's jackknife influence on it, and MUI of as many random neurons a sample."""
    _, subject = np.unique(subjects, return_inverse=True)
    owner = np.repeat(subject, [len(own) for own in keys])
    owned = np.unique(owner * neurons + np.concatenate(keys))
    _, first, holders = np.unique(owned % neurons, return_index=True, return_counts=True)
    lost = np.bincount(owned[first[holders == 1]] // neurons, minlength=subject.max() + 1) / neurons
    by_chance = 1 - math.prod(1 - len(own) / neurons for own in keys)
    return len(holders) / neurons, (len(lost) - 1) * (lost - lost.mean()), by_chance


def _holds(keys: Sequence[Int[np.ndarray, " k"]], units: pd.DataFrame) -> Float[np.ndarray, "samples units"]:
    """1 where a unit holds a key neuron of a sample."""
    holds = np.zeros((len(keys), len(units)))
    sample = np.repeat(np.arange(len(keys)), [len(own) for own in keys])
    holds[sample, np.searchsorted(units["first"], np.concatenate(keys), side="right") - 1] = 1
    return holds


def _shared(
    chosen: Int[np.ndarray, "n layers k"], other: Int[np.ndarray, "n layers k"] | None
) -> tuple[Float[np.ndarray, " n"], float]:
    """Share of each prompt's chosen experts that its other choice has too, and the mean over all pairs of prompts."""
    if other is None:
        return np.full(len(chosen), np.nan), np.nan
    shared = (chosen[..., None] == other[..., None, :]).any(-1).mean((1, 2))
    experts = int(max(chosen.max(), other.max())) + 1
    used = [(both[..., None] == np.arange(experts)).any(2).mean(0) for both in (chosen, other)]
    return shared, float((used[0] * used[1]).sum(1).mean() / chosen.shape[2])


@dataclass(frozen=True)
class Phases:
    """Two lines that meet, and one, fitted to each draw of MUI over log(1 + step); the observed values first.

    `two`: whether the two fit better; `error`: root mean square of what the better ones leave; slopes are per unit of
    log(1 + step).
    """

    two: Bool[np.ndarray, " draws"]
    error: Float[np.ndarray, " draws"]
    change_step: Float[np.ndarray, " draws"]
    slopes: Float[np.ndarray, "segments draws"]
    slope: Float[np.ndarray, " draws"]


def fit_phases(steps: Int[np.ndarray, " n"], values: Float[np.ndarray, "draws n"]) -> Phases:
    """Least squares with one line, and with two that meet between the second point and the last but one.

    Two beat one by BIC as McQuarrie (1999) corrects it for few points, n log(RSS) + n k log(n) / (n - k - 2) with k = 4
    coefficients (change point included) against 2. Needs FEW points.
    """
    x = np.log1p(steps)
    n, places = len(x), np.unique(x)
    change = np.linspace(places[1], places[-2], CANDIDATES)
    lines = [_line(x, values), *(_line(np.stack([np.minimum(x - c, 0), np.maximum(x - c, 0)]), values) for c in change)]
    # What rounding leaves of an exact fit is no fit of its own.
    rss = np.maximum([left for _, left in lines], np.finfo(float).eps * (values**2).sum(1) + np.finfo(float).tiny)
    best, every = rss[1:].argmin(0), np.arange(len(values))
    penalty = [n * k * np.log(n) / (n - k - 2) for k in (2, 4)]
    two = n * np.log(rss[1 + best, every]) + penalty[1] < n * np.log(rss[0]) + penalty[0]
    slopes = np.stack([found for found, _ in lines[1:]])[best, :, every].T
    error = np.sqrt(np.where(two, rss[1 + best, every], rss[0]) / n)
    return Phases(two, error, np.expm1(change[best]), slopes, lines[0][0][0])


def _line(
    x: Float[np.ndarray, "*k n"], values: Float[np.ndarray, "draws n"]
) -> tuple[Float[np.ndarray, "k draws"], Float[np.ndarray, " draws"]]:
    """Coefficients of a least-squares fit, without the constant, and the sum of squares that it leaves."""
    design = np.column_stack([*np.atleast_2d(x), np.ones(values.shape[1])])
    found = np.linalg.lstsq(design, values.T)[0]
    return found[:-1], ((values.T - design @ found) ** 2).sum(0)


def _phase(row: Mapping[str, float]) -> str:
    if row["mui_slope_low"] > 0:
        return "accumulating"
    return "evolving" if row["mui_slope_high"] < 0 < row["mrr_slope_low"] else "undecided"


def t_interval(values: Float[np.ndarray, " n"], confidence: float) -> tuple[float, float, float]:
    """(mean, low, high): Student's t interval of a mean; NaN where there is none."""
    n = len(values)
    if n < 2:
        return (float(values[0]) if n else np.nan), np.nan, np.nan
    half = t_quantile(confidence, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def t_quantile(confidence: float, df: int) -> float:
    """The t that |Student's t| stays below with probability `confidence`.

    Bisection of the closed form for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """

    def inside(angle: float) -> float:
        cos, term, total = math.cos(angle), 1.0, 0.0
        odd = df % 2
        for k in range(df // 2):
            total += term * cos ** (2 * k + odd)
            term *= (2 * k + 1 + odd) / (2 * k + 2 + odd)
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(df) * math.tan(low)


SUMMARIES: Mapping[str, Callable[..., pd.DataFrame]] = {"training": training, "phases": phases}

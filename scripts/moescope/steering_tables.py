"""Result tables of who steers the router, and of what heads do when they are taken away (method.md, sections 4 and 5).

A layer that is empty (NA) stands for all layers together. LPI in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from moescope.stats import hits, reciprocal
from moescope.summaries import Bootstrap, Runs, counts, labelled, only, prefixed, random_summary, scopes, together

ALL = np.iinfo("int16").min
"""Stands for all layers, until a table is done."""
LAYERS = ("router_layer", "layer")
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "largest": 1.0}
PAIRS = 20
"""Pairs of each model and `what` that the table of them shows."""
FALSE_DISCOVERIES = 0.05
METRICS = ("hit_at_10", "mrr", "gate_prob", "overlap", "expert_lpi")
RELATIVE = ("mrr", "gate_prob")


def router_attribution(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """What pulls each router towards the experts that it chose: direct router attribution, exact for each prompt.

    Columns: dataset, model, router_layer, source, layer (of the source; -1: the embedding; NA: all), logit (what the
    source adds to the mean logit of the chosen experts minus the mean logit of all, mean over prompts) with logit_low
    and logit_high, share (of the sum over all sources, a ratio of means; below 0 for what pulls away) with share_low
    and share_high, prompts, subjects.
    """
    frames = []
    for (dataset, model), run in runs.items():
        prompts = only(run["prompts"], run["router_attribution"]["prompt_id"])
        for router, rows in run["router_attribution"].groupby("router_layer"):
            summed = rows.groupby(["prompt_id", "source", "layer"])["logit"].sum().unstack(["source", "layer"])
            wide = _with_all(summed.fillna(0), "layer", "sum")
            means = _means(wide, prompts, bootstrap)
            total = means[:, wide.columns.get_level_values("layer") == ALL].sum(1, keepdims=True)
            frame = _rows(wide, bootstrap, logit=means, share=means / total)
            frames.append(labelled(frame.assign(router_layer=router), prompts, dataset=dataset, model=model))
    values = " ".join(_named("logit", "share"))
    return _finished(frames, f"dataset model router_layer source layer {values} prompts subjects")


def associations(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How strongly heads go with experts, over all pairs (KA: r = .68): the distribution of |r|, not the best pair.

    Columns: dataset, model, what (gate: of the head's LPI with the expert's gate probability; lpi: with its LPI),
    control (none; or relation: means of relations subtracted), p5, p25, median, p75, p95, p99, largest (quantiles of
    |r|), chance_p95, chance_largest (of |r| after one permutation: the random control), significant (share of the pairs
    with a false discovery rate below FALSE_DISCOVERIES), least_q (the smallest q that so many pairs can have with the
    permutations done: where it is not below that rate, none could be significant), pairs, prompts, subjects. Pairs of
    which a side is the same in all prompts are left out.
    """
    rows = []
    for (dataset, model), run in runs.items():
        for what, pairs in run["associations"].groupby("what"):
            for control, end in (("none", ""), ("relation", "_within")):
                found = pairs.dropna(subset=f"r{end}")
                row = {"dataset": dataset, "model": model, "what": what, "control": control}
                row |= {name: found[f"r{end}"].abs().quantile(level) for name, level in QUANTILES.items()}
                chance, p = found[f"r_chance{end}"].abs(), found[f"p{end}"]
                row |= {"chance_p95": chance.quantile(0.95), "chance_largest": chance.max()}
                row |= {"significant": (found[f"q{end}"] < FALSE_DISCOVERIES).mean()}
                row |= {"least_q": min(1.0, len(p) * p.min() / max(1, (p == p.min()).sum())), "pairs": len(found)}
                rows.append(row | counts(run["prompts"]))
    columns = ["dataset", "model", "what", "control", *QUANTILES, "chance_p95", "chance_largest", "significant"]
    columns += ["least_q", "pairs", "prompts", "subjects"]
    return pd.DataFrame(rows, columns=columns)


def association_pairs(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """The PAIRS heads and experts of each model and `what` with the largest |r|, largest first.

    Columns: dataset, model and those of the stage table `associations`: layer, head, expert_layer, expert, what, r, p,
    q, r_within, p_within, q_within, prompts. They are chosen on the prompts that they are measured on: r is larger than
    other prompts would give.
    """
    frames = []
    for (dataset, model), run in runs.items():
        pairs = run["associations"].dropna(subset="r")
        best = pairs.sort_values("r", key=lambda r: -r.abs(), kind="stable").groupby("what").head(PAIRS)
        frames.append(best.sort_values("what", kind="stable").assign(dataset=dataset, model=model))
    columns = "dataset model layer head expert_layer expert what r p q r_within p_within q_within prompts"
    return together(frames, columns)[columns.split()]


def head_map(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """What is lost when a head is blocked at the readout position, for every head.

    Columns: dataset, model, layer, head; log_prob_drop (nats) and mrr_drop, the means over prompts of clean - blocked
    log-probability and 1 / rank, each with _low and _high; prompts, subjects.
    """
    frames = []
    for (dataset, model), run in runs.items():
        prompts = only(run["prompts"], run["head_map"]["prompt_id"])
        if prompts.empty:
            continue
        clean = prompts.set_index("prompt_id")
        wide = run["head_map"].pivot(index="prompt_id", columns=["layer", "head"])
        drops = {
            "log_prob_drop": -wide["log_prob"].sub(clean["log_prob"], axis=0),
            "mrr_drop": -(1 / wide["rank"]).sub(1 / clean["rank"], axis=0),
        }
        means = {name: _means(drop, prompts, bootstrap) for name, drop in drops.items()}
        frame = _rows(wide["rank"], bootstrap, **means)
        frames.append(labelled(frame, prompts, dataset=dataset, model=model))
    values = " ".join(_named("log_prob_drop", "mrr_drop"))
    return together(frames, f"dataset model layer head {values} prompts subjects")


def head_router(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """What a head that is blocked at the readout position changes in the routers above it.

    Columns: dataset, model, layer, head, router_layer (NA: the mean over all routers that the head can reach);
    logit_change (root mean square over experts of the change of the router's centred logits), overlap (Jaccard, of the
    chosen experts with the clean choice), gate_change (relative change of the summed gate probability of the experts
    of the clean choice, a ratio of means), lpi_change (nats: summed LPI of the routed experts chosen, blocked - clean),
    each with _low and _high; prompts, subjects. Means over prompts.
    """
    frames = []
    values = ("logit_change", "overlap", "gate_change", "lpi_change")
    for (dataset, model), run in runs.items():
        prompts = only(run["prompts"], run["head_router"]["prompt_id"])
        if prompts.empty:
            continue
        wide = run["head_router"].pivot(index="prompt_id", columns=["layer", "head", "router_layer"])
        every = {name: _with_all(wide[name], "router_layer", "mean") for name in wide.columns.unique(0)}
        means = {name: _means(frame, prompts, bootstrap) for name, frame in every.items()}
        means["gate_change"] = means["gate_after"] / means["gate_before"] - 1
        means["lpi_change"] = means["lpi_after"] - means["lpi_before"]
        frame = _rows(every["overlap"], bootstrap, **{name: means[name] for name in values})
        frames.append(labelled(frame, prompts, dataset=dataset, model=model))
    return _finished(frames, f"dataset model layer head router_layer {' '.join(_named(*values))} prompts subjects")


def head_blocking(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """What breaks when a relation's best heads are blocked, beside matched random ones, and what forcing mends.

    One row for each data set, model, scope, name (all prompts, a task or a relation) and n_blocked. Columns, for
    hit_at_10, mrr, gate_prob (summed gate probability of the experts of the clean choice, mean over MoE layers),
    overlap (Jaccard, of the chosen experts with the clean choice) and expert_lpi (nats: summed LPI of the routed
    experts): clean; blocked with _low and _high; drop = clean - blocked with _low and _high; random (mean of the draws)
    with _low and _high (interval over the draws); draws_as_low (share of the draws with a mean at most that of the best
    heads); and for mrr and gate_prob change = blocked / clean - 1 with _low and _high (KA: -29% and -54%). mrr_forced
    with _low and _high: the best heads blocked, but every token sent to the experts of its clean run. recovered =
    (forced - blocked) / (clean - blocked) of MRR with _low and _high (KA: 85%), NaN where the interval of the drop
    reaches 0: nothing is sure to be lost there. draws, prompts, subjects as in cause_tables.blocking. Of a dense model
    all that is said of experts is NaN.
    """
    rows = []
    for (dataset, model), run in runs.items():
        table = run["head_blocking"]
        table = table.assign(hit_at_10=hits(table["rank"]), mrr=reciprocal(table["rank"]))
        clean = table[table["n_blocked"] == 0].set_index("prompt_id")
        for n, sets in table[table["n_blocked"] > 0].groupby("n_blocked"):
            wide = sets[~sets["forced"]].pivot(index="prompt_id", columns="draw", values=list(METRICS))
            forced = sets[sets["forced"] & (sets["draw"] == -1)].set_index("prompt_id")["mrr"]
            for kind, name, scope in scopes(only(run["prompts"], wide.index[wide["mrr", -1].notna()])):
                ids = scope["prompt_id"]
                draws = wide["mrr"].loc[ids].dropna(axis=1).columns
                after = {metric: wide[metric].loc[ids, draws].to_numpy(float) for metric in METRICS}
                columns = [clean.loc[ids, list(METRICS)], *(each[:, 0] for each in after.values()), forced.reindex(ids)]
                means = bootstrap.means(np.column_stack(columns).astype(float), scope["subject"])
                whole, blocked, mended = np.split(means, [len(METRICS), 2 * len(METRICS)], axis=1)
                row: dict[str, Any] = {"dataset": dataset, "model": model, "scope": kind, "name": name, "n_blocked": n}
                for i, metric in enumerate(METRICS):
                    row[f"{metric}_clean"] = whole[0, i]
                    row |= prefixed(f"{metric}_blocked", bootstrap.summary(blocked[:, i]))
                    row |= prefixed(f"{metric}_drop", bootstrap.summary(whole[:, i] - blocked[:, i]))
                    row |= random_summary(metric, after[metric].mean(0), bootstrap.confidence)
                    if metric in RELATIVE:
                        row |= prefixed(f"{metric}_change", bootstrap.summary(blocked[:, i] / whole[:, i] - 1))
                before, best, again = whole[:, 1], blocked[:, 1], mended[:, 0]
                row |= prefixed("mrr_forced", bootstrap.summary(again))
                # A draw that loses nothing has nothing to recover: it is left out.
                some = before > best
                sure = row["mrr_drop_low"] > 0 and not np.isnan(again[0])
                back = (again - best)[some] / (before - best)[some] if sure else np.full(2, np.nan)
                row |= prefixed("recovered", bootstrap.summary(back))
                rows.append(row | {"draws": len(draws) - 1} | counts(scope))
    columns = ["dataset", "model", "scope", "name", "n_blocked"]
    for metric in METRICS:
        columns += [f"{metric}_clean", *_named(*(f"{metric}_{name}" for name in ("blocked", "drop", "random")))]
        columns += [f"{metric}_draws_as_low", *(_named(f"{metric}_change") if metric in RELATIVE else [])]
    columns += [*_named("mrr_forced", "recovered"), "draws", "prompts", "subjects"]
    return pd.DataFrame(rows, columns=columns)


def gate_gradients(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How much of the gate probability of the chosen experts integrated gradients trace to heads (KA: 28%).

    Columns: dataset, model, router_layer (NA: the mean over all), layer (of the heads; NA: all), traced (summed
    attribution of the heads / gate probability of the experts of the clean choice, a ratio of means) with traced_low
    and traced_high, clean and baseline (mean of that probability, in the clean run and with all heads' outputs at 0),
    error (mean |summed attribution - (clean - baseline)|: what the path misses, by its steps, and by jumps where the
    experts chosen below change; NaN for a single layer) with error_low and error_high, prompts, subjects. Attributions
    are estimates with this error.
    """
    frames = []
    for (dataset, model), run in runs.items():
        prompts = only(run["prompts"], run["gate_gradients"]["prompt_id"])
        if prompts.empty:
            continue
        ends = run["gate_paths"].pivot(index="prompt_id", columns="router_layer", values=["clean", "baseline"])
        summed = run["gate_gradients"].groupby(["prompt_id", "router_layer", "layer"])["attribution"].sum()
        wide = _with_all(summed.unstack(["router_layer", "layer"]).fillna(0), "layer", "sum")
        missed = (wide.xs(ALL, axis=1, level="layer") - (ends["clean"] - ends["baseline"])).abs()
        wide = _with_all(wide, "router_layer", "sum")
        routers, layers = (wide.columns.get_level_values(name) for name in LAYERS)
        means = {"traced": _means(wide, prompts, bootstrap)}
        for name, side in {"clean": ends["clean"], "baseline": ends["baseline"], "error": missed}.items():
            every = pd.concat([side, side.mean(axis=1).rename(ALL)], axis=1)
            means[name] = _means(every[routers], prompts, bootstrap)
        # Of all routers together the mean, 0 for the layers above a router.
        means["traced"] /= means["clean"] * np.where(routers == ALL, len(missed.columns), 1)
        means["error"] = np.where(layers == ALL, means["error"], np.nan)
        frame = _rows(wide, bootstrap, **means)
        frames.append(labelled(frame, prompts, dataset=dataset, model=model))
    values = " ".join([*_named("traced"), "clean", "baseline", *_named("error")])
    return _finished(frames, f"dataset model router_layer layer {values} prompts subjects")


def _with_all(wide: pd.DataFrame, level: str, how: str) -> pd.DataFrame:
    """A table with one row a prompt, and columns for all layers together of one of its column keys."""
    others = [name for name in wide.columns.names if name != level]
    every = pd.concat({ALL: wide.T.groupby(level=others).agg(how).T}, axis=1, names=[level])
    return pd.concat([wide, every.reorder_levels(wide.columns.names, axis=1)], axis=1).sort_index(axis=1)


def _means(wide: pd.DataFrame, prompts: pd.DataFrame, bootstrap: Bootstrap) -> Float[np.ndarray, "draws+1 m"]:
    return bootstrap.means(wide.loc[prompts["prompt_id"]].to_numpy(float), prompts["subject"])


def _rows(wide: pd.DataFrame, bootstrap: Bootstrap, **means: Float[np.ndarray, "draws+1 m"]) -> pd.DataFrame:
    """A row for each column of a table: its keys, and the summary of each of the named means of all columns."""
    frame = wide.columns.to_frame(index=False)
    for name, found in means.items():
        frame = frame.assign(**prefixed(name, bootstrap.summary(found)))
    return frame


def _named(*names: str) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def _finished(frames: list[pd.DataFrame], columns: str) -> pd.DataFrame:
    """All rows in this order of columns, NA for all layers."""
    table = together(frames, columns)[columns.split()]
    layers = {name: table[name].astype("Int16") for name in LAYERS if name in table}
    return table.assign(**{name: column.mask(column == ALL) for name, column in layers.items()})


SUMMARIES: Mapping[str, Callable[[Runs, Bootstrap], pd.DataFrame]] = {
    "router_attribution": router_attribution,
    "associations": associations,
    "association_pairs": association_pairs,
    "head_map": head_map,
    "head_router": head_router,
    "head_blocking": head_blocking,
    "gate_gradients": gate_gradients,
}

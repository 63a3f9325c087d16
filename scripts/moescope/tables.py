"""Result tables: means with clustered bootstrap intervals, from the tables of each data set and model.

Every table with intervals says for each row how many prompts and subjects it rests on. Gains and LPI are in nats.
`task` is "all" or one task; intervals are percentile intervals over resampled subjects. Layers may differ:
a layer without routed experts, or whose heads are not told apart, has no rows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import pairwise
from operator import sub
from typing import Any

import numpy as np
import pandas as pd

from moescope import cause_tables, masking_tables, routing_tables, steering_tables, training_tables, utilization_tables
from moescope.published import Published, blocked_mrr, numbers
from moescope.stats import hits, reciprocal, two_change_points
from moescope.summaries import (
    Bootstrap,
    Runs,
    by_layer,
    column_summary,
    counts,
    labelled,
    only,
    scopes,
    tasks,
    together,
)

PRECISION = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Largest relative rounding error of each dtype."""

METRICS = ("hit_at_10", "mrr", "ffn_gain", "attention_gain", "peak_position", "layer_efficiency")
CONCENTRATION = ("share", "entropy", "gini", "neurons", "positive")

GAPS = (
    ("ffn", "experts", "ffn"),
    ("attention", "heads", "attention"),
    ("experts", "neurons", "ffn"),
    ("heads", "neurons", "attention"),
    ("ffn", "neurons", "ffn"),
)
"""What is compared with the sum over its parts: component, parts, block."""

SHOWN = 10
"""Neurons of each relation and block that the table of them shows."""


def efficiency(runs: Runs, partners: Mapping[str, str], bootstrap: Bootstrap) -> pd.DataFrame:
    """KA Table 1 for each model, and the difference MoE - dense for each pair on the prompts that both have.

    Columns: dataset, model, kind (of the model: moe or dense), minus (the dense partner in a difference, else
    empty), task, metric, estimate, low, high, prompts, subjects. Metrics: HIT@10, MRR; FFN and attention gain
    (sum over layers of the mean LPI); peak position (mean over prompts of the layer with the largest FFN gain,
    counted from 1, divided by the number of layers); layer efficiency (FFN gain / number of layers).
    """
    rows: list[dict[str, Any]] = []
    for labels, prompts, values in _compared(runs, partners, _per_prompt):
        for task, scope in tasks(prompts):
            rows += _metric_rows(labels | {"task": task}, METRICS, values, scope, bootstrap)
    return pd.DataFrame(rows)


def concentration(runs: Runs, partners: Mapping[str, str], bootstrap: Bootstrap) -> pd.DataFrame:
    """How few neurons hold the positive LPI of a prompt, and the difference MoE - dense for each pair.

    Columns: dataset, model, kind, minus, task as in `efficiency`; block (ffn or attention), metric, estimate, low,
    high, error (its certified half-width, the mean of the prompts', of both models together in a difference:
    the estimate is within it of what exact LPIs of all neurons would give), prompts, subjects, saturated (prompts
    left out because the target's probability is 1 to rounding, in either model). Metrics, means over prompts of the
    columns of `concentration`: share (of the summed positive LPI, held by the top 1% of the neurons that the prompt
    uses; Gated-LPI), entropy (of its distribution, nats), gini, neurons (used; a count), positive (the sum, nats).
    A prompt without a neuron whose LPI is certainly positive has no share and is left out as well; no row where no
    prompt is left.
    """
    rows: list[dict[str, Any]] = []
    for block in ("ffn", "attention"):
        for labels, prompts, values in _compared(runs, partners, partial(_concentration, block)):
            saturated = np.any([frame["saturated"] for frame in values], axis=0)
            undefined = np.any([frame["share"].isna() for frame in values], axis=0)
            for task, scope in tasks(prompts.assign(saturated=saturated, left_out=saturated | undefined)):
                left = scope[~scope["left_out"]]
                found = _metric_rows(labels | {"task": task, "block": block}, CONCENTRATION, values, left, bootstrap)
                for row in found:
                    errors = sum(frame.loc[left["prompt_id"], f"{row['metric']}_error"] for frame in values)
                    rows.append(row | {"error": float(errors.mean()), "saturated": scope["saturated"].sum()})
    columns = "dataset model kind minus task block metric estimate low high error prompts subjects saturated"
    return pd.DataFrame(rows, columns=columns.split())


def gains(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each layer's attention and FFN block: dataset, model, layer, part, estimate, low, high, ..."""
    frames = []
    for (dataset, model), run in runs.items():
        for part in ("attention", "ffn"):
            wide = run["layers"].pivot(index="prompt_id", columns="layer", values=part)
            summary = column_summary(wide, run["prompts"], bootstrap)
            frames.append(labelled(summary, run["prompts"], dataset=dataset, model=model, part=part))
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
            rows.append(where | named | counts(run["prompts"]))
    return pd.DataFrame(rows)


def heads(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each head: dataset, model, layer, head, estimate, low, high, prompts, subjects."""
    frames = []
    for (dataset, model), run in runs.items():
        if run["heads"].empty:
            continue
        wide = run["heads"].pivot(index="prompt_id", columns=["layer", "head"], values="lpi")
        summary = column_summary(wide, run["prompts"], bootstrap)
        frames.append(labelled(summary, run["prompts"], dataset=dataset, model=model))
    return together(frames, "dataset model layer head estimate low high prompts subjects")


def experts(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean LPI of each expert over all prompts of a task; an expert that a prompt does not use adds 0 to it.

    Columns: dataset, model, task, layer, expert (shared expert i is -1 - i), estimate, low, high, used (share
    of prompts whose readout position uses it), prompts, subjects. Only experts that some prompt uses.
    """
    frames = []
    for (dataset, model), run in runs.items():
        table = run["experts"]
        for task, scope in tasks(run["prompts"]) if len(table) else ():
            wide = table.pivot(index="prompt_id", columns=["layer", "expert"], values="lpi")
            wide = wide.reindex(scope["prompt_id"])
            used = wide.notna().mean().rename("used").reset_index()
            summary = column_summary(wide.fillna(0), scope, bootstrap).merge(used)
            frames.append(labelled(summary, scope, dataset=dataset, model=model, task=task))
    return together(frames, "dataset model task layer expert estimate low high used prompts subjects")


def neurons(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Where the top neurons lie: of the FFN and of attention, those of each prompt's table that have LPI > 0.

    Columns: dataset, model, block (ffn or attention), layer, share (of a prompt's top neurons that lie in the layer,
    mean over prompts) with low and high, lpi (their summed LPI there, nats, mean over prompts; exact) with lpi_low
    and lpi_high, prompts, subjects. Of the prompts that have a top neuron; their shares of all layers sum to 1.
    """
    frames = []
    for (dataset, model), run in runs.items():
        layers = run["layers"]["layer"].unique()
        for block, kind in (("ffn", "neurons"), ("attention", "attention_neurons")):
            top = run[kind].loc[run[kind]["lpi"] > 0, ["prompt_id", "layer", "lpi"]]
            scope = only(run["prompts"], top["prompt_id"])
            if scope.empty:
                continue
            found = top.groupby(["prompt_id", "layer"])["lpi"].agg(["size", "sum"]).unstack("layer", fill_value=0)
            number, lpi = (found[name].reindex(columns=layers, fill_value=0) for name in ("size", "sum"))
            share = column_summary(number.div(number.sum(axis=1), axis=0), scope, bootstrap)
            summed = column_summary(lpi, scope, bootstrap).set_axis(["layer", "lpi", "lpi_low", "lpi_high"], axis=1)
            both = share.rename(columns={"estimate": "share"}).merge(summed, on="layer")
            frames.append(labelled(both, scope, dataset=dataset, model=model, block=block))
    return together(frames, "dataset model block layer share low high lpi lpi_low lpi_high prompts subjects")


def expert_curves(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How few experts hold the positive LPI of a relation: routed and shared experts of all layers, best first.

    Experts are sorted by their mean LPI over the relation's prompts, as in `experts`; those with a positive mean are
    kept. One row for each data set, model, relation ("all": all prompts) and number of experts. Columns: dataset,
    model, relation, experts (how many of the best), share (of the summed mean LPI of those kept, held by them) with
    low and high, n_experts (kept), prompts, subjects. Intervals hold the kept experts and their order fixed; a share
    of a draw may then exceed 1, where an expert that is kept has a negative mean.
    """
    frames = []
    for (dataset, model), run in runs.items():
        if run["experts"].empty:
            continue
        wide = run["experts"].pivot(index="prompt_id", columns=["layer", "expert"], values="lpi")
        for kind, relation, scope in scopes(run["prompts"]):
            if kind == "task":
                continue
            means = bootstrap.means(wide.reindex(scope["prompt_id"]).fillna(0).to_numpy(), scope["subject"])
            best = np.argsort(-means[0], kind="stable")[: (means[0] > 0).sum()]
            held = means[:, best].cumsum(1)
            with np.errstate(divide="ignore", invalid="ignore"):
                summary = bootstrap.summary(held / held[:, -1:])
            curve = {"experts": np.arange(1, len(best) + 1), "share": summary.pop("estimate"), **summary}
            frame = pd.DataFrame(curve).assign(n_experts=len(best))
            frames.append(labelled(frame, scope, dataset=dataset, model=model, relation=relation))
    return together(frames, "dataset model relation experts share low high n_experts prompts subjects")


def additivity(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """How far LPIs are from adding up: the LPI of a component against the sum over its parts, layer by layer.

    Columns: dataset, model, component, parts, layer, whole (mean LPI of the component; of experts and heads the sum
    over those of the layer), sum (mean of the sum over the parts' LPIs), gap = sum - whole with low and high, error
    (the certified half-width of sum, the mean of the prompts'; 0: exact), prompts, subjects. LPI in nats. Rows: FFN and
    experts, attention and heads, experts and their neurons, heads and their neurons, and of a dense FFN, FFN and
    neurons. A gap can have either sign: LPI is concave in what is added (method.md, section 2.1), not linear.
    """
    frames = []
    for (dataset, model), run in runs.items():
        prompts, table = run["prompts"], run["neuron_sums"]
        whole = {part: by_layer(run["layers"], part, prompts) for part in ("ffn", "attention")}
        whole |= {kind: by_layer(run[kind], "lpi", prompts) for kind in ("experts", "heads")}
        for component, parts, block in GAPS:
            if parts == "neurons":
                of_block = table[table["block"] == block]
                total, error = (by_layer(of_block, column, prompts) for column in ("neuron_sum", "error"))
            else:
                total, error = whole[parts], 0 * whole[parts].abs()
            layers = total.columns.intersection(whole[component].columns)
            if (component, parts) == ("ffn", "neurons"):
                layers = layers.difference(whole["experts"].columns)
            if layers.empty:
                continue
            frame = column_summary((total - whole[component])[layers], prompts, bootstrap)
            frame = frame.rename(columns={"estimate": "gap"}).set_index("layer")
            frame.insert(0, "whole", whole[component].mean())
            frame.insert(1, "sum", total.mean())
            frame = frame.assign(error=error.mean()).reset_index()
            labels = {"dataset": dataset, "model": model, "component": component, "parts": parts}
            frames.append(labelled(frame, prompts, **labels))
    return together(frames, "dataset model component parts layer whole sum gap low high error prompts subjects")


def relation_neurons(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """The best neurons of each relation by mean LPI (> 0), at most SHOWN a block, with the tokens that they write.

    Columns: dataset, model, those of `relation_neurons` (relation, block, layer, unit, neuron, lpi in nats, bound,
    exact, used, prompts), promoted and suppressed: tokens, most first, joined by blanks, with control characters
    escaped; empty where the neuron was not read.
    """
    frames = []
    for (dataset, model), run in runs.items():
        best = run["relation_neurons"].query("lpi > 0")
        best = best.sort_values(["relation", "block", "lpi"], ascending=[True, True, False], kind="stable")
        best = best.groupby(["relation", "block"]).head(SHOWN)
        best = best.assign(level=best["block"] + "_neuron", dataset=dataset, model=model)
        tokens = _tokens(run["readings"]).drop(columns="lpi")
        frames.append(best.merge(tokens, how="left", on=["relation", "level", "layer", "unit", "neuron"]))
    columns = "dataset model relation block layer unit neuron lpi bound exact used prompts promoted suppressed"
    table = together(frames, columns)[columns.split()]
    return table.fillna({"promoted": "", "suppressed": ""})


def unit_readings(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """The best experts and heads of each relation by mean LPI, with the tokens that they write.

    Columns: dataset, model, relation, level (expert or head), layer, unit (shared expert i is -1 - i), lpi (mean over
    the relation's prompts, nats, exact), promoted, suppressed (as in `relation_neurons`).
    """
    frames = []
    for (dataset, model), run in runs.items():
        readings = run["readings"]
        tokens = _tokens(readings[readings["level"].isin(["expert", "head"])])
        tokens = tokens.sort_values(["relation", "level", "lpi"], ascending=[True, True, False], kind="stable")
        frames.append(tokens.assign(dataset=dataset, model=model))
    columns = "dataset model relation level layer unit lpi promoted suppressed"
    return together(frames, columns)[columns.split()]


def queries(runs: Runs, bootstrap: Bootstrap) -> pd.DataFrame:
    """Where value neurons lie, and where the components lie that raise them (method.md, section 2.2).

    Columns: dataset, model, role, part, layer (-1: embedding), estimate (nats, mean over prompts), low, high, prompts,
    subjects. Role "value": summed LPI of the value neurons of the part (attention or ffn). Role "query": summed
    query score, through FFN and attention value neurons and from all positions together, of the layer's heads (part
    attention), of its experts or dense FFN (part ffn) and of the embedding. Of the prompts that have query scores.
    """
    frames = []
    for (dataset, model), run in runs.items():
        values, scores = run["value_layers"], run["queries"]
        scope = only(run["prompts"], scores["prompt_id"])
        wide = {
            ("value", part): by_layer(values[values["block"] == part], "lpi", scope) for part in ("attention", "ffn")
        }
        for level, part in (("embedding", "embedding"), ("head", "attention"), ("expert", "ffn")):
            rows = scores[scores["level"] == level]
            wide["query", part] = sum(by_layer(rows, column, scope) for column in ("via_ffn", "via_attention"))
        for (role, part), found in wide.items():
            if not found.empty:
                summary = column_summary(found, scope, bootstrap)
                frames.append(labelled(summary, scope, dataset=dataset, model=model, role=role, part=part))
    return together(frames, "dataset model role part layer estimate low high prompts subjects")


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


def _concentration(block: str, run: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The concentration of a block's neurons for each prompt; a count has no error."""
    table = run["concentration"]
    return table[table["block"] == block].set_index("prompt_id").assign(neurons_error=0.0)


def _compared(
    runs: Runs, partners: Mapping[str, str], per_prompt: Callable[[Mapping[str, pd.DataFrame]], pd.DataFrame]
) -> Iterator[tuple[dict[str, str], pd.DataFrame, list[pd.DataFrame]]]:
    """Each model and each pair MoE, dense: labels, the prompts that it has, and for them the values of each model."""
    for (dataset, model), run in runs.items():
        labels = {"dataset": dataset, "model": model, "kind": "moe" if len(run["experts"]) else "dense"}
        values = [per_prompt(run)]
        for minus in ("", *([partners[model]] if model in partners else [])):
            values += [per_prompt(runs[dataset, minus])] if minus else []
            prompts = reduce(only, (frame.index for frame in values), run["prompts"])
            if len(prompts):
                yield labels | {"minus": minus}, prompts, [frame.loc[prompts["prompt_id"]] for frame in values]


def _metric_rows(
    labels: Mapping[str, str],
    metrics: Sequence[str],
    values: Sequence[pd.DataFrame],
    scope: pd.DataFrame,
    bootstrap: Bootstrap,
) -> Iterator[dict[str, Any]]:
    """A row for the mean of each metric, or of its difference if there are the values of two models."""
    if scope.empty:
        return
    each = reduce(sub, (frame.loc[scope["prompt_id"], list(metrics)].to_numpy(float) for frame in values))
    summary = bootstrap.summary(bootstrap.means(each, scope["subject"]))
    for i, metric in enumerate(metrics):
        yield {**labels, "metric": metric} | {key: found[i] for key, found in summary.items()} | counts(scope)


def _tokens(readings: pd.DataFrame) -> pd.DataFrame:
    """One row for each unit or neuron of a relation that was read: its mean LPI, promoted and suppressed tokens."""
    keys = ["relation", "level", "layer", "unit", "neuron", "lpi"]
    tokens = readings.sort_values("place").groupby([*keys, "side"])["token"].agg(_joined)
    wide = tokens.unstack("side", fill_value="").reindex(columns=["promoted", "suppressed"], fill_value="")
    return wide.rename_axis(columns=None).reset_index()


def _joined(tokens: pd.Series) -> str:
    """Tokens on one line: a carriage return would break a row of a CSV file, a NUL its readers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(tokens))


COMPARISONS: Mapping[str, Callable[[Runs, Mapping[str, str], Bootstrap], pd.DataFrame]] = {
    "efficiency": efficiency,
    "concentration": concentration,
}

SUMMARIES: Mapping[str, Callable[..., pd.DataFrame]] = {
    "gains": gains,
    "stages": stages,
    "heads": heads,
    "experts": experts,
    "neurons": neurons,
    "expert_curves": expert_curves,
    "additivity": additivity,
    "relation_neurons": relation_neurons,
    "unit_readings": unit_readings,
    "queries": queries,
    "near_ties": near_ties,
    **cause_tables.SUMMARIES,
    **steering_tables.SUMMARIES,
    **routing_tables.SUMMARIES,
    **utilization_tables.SUMMARIES,
    **masking_tables.SUMMARIES,
    **training_tables.SUMMARIES,
}

OF_KEY_EXPERTS = ("utilization", "key_experts", "training")


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
    if row.scope != "relation" or row.how != "zero" or row.model not in models:
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
    expert_share: float | None = None,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The named tables, one by one; `published`: our model -> its name in published.py, for models that have one.

    `expert_share`: an expert is key if it holds a key neuron in at least this share of the samples (OF_KEY_EXPERTS).
    """
    for name in names:
        summary = partial(COMPARISONS[name], runs, partners) if name in COMPARISONS else partial(SUMMARIES[name], runs)
        if name in OF_KEY_EXPERTS:
            summary = partial(summary, expert_share=expert_share)
        yield name, beside_published(name, summary(bootstrap), published or {})

"""The strongest neurons of each prompt and each relation, and what is certain of all neurons together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moescope.activations import Activations, opened
from moescope.bounds import (
    FIGURES,
    GUARD,
    Evaluate,
    Vocabulary,
    figures_of,
    followed_tokens,
    intervals,
    search,
    settle,
    tighten,
)
from moescope.lens import Readout, lpi_of, norm_scale
from moescope.models import MAX_LOGITS, Anatomy
from moescope.neurons import Block, attention_neurons, attention_units, every, ffn_neurons, ffn_units

KINDS = {"ffn": "neurons", "attention": "attention_neurons"}
AT_ONCE = 2**21
"""Changes of logits that are held at once for bounds: fresh memory for more would cost more than the arithmetic."""
CERTAIN = 1e3
"""A prediction with 1 - p_w below this many epsilons is certain to rounding: no LPI says anything there."""
NAMED = {"layer": "int16", "unit": "int16", "neuron": "int32"}
RANKED = {"activation": "float32", "lpi": "float32", "bound": "float32", "exact": "bool"}
SCHEMAS: Mapping[str, Mapping[str, str]] = {
    "neurons": {"prompt_id": "int32", **NAMED, **RANKED},
    "attention_neurons": {"prompt_id": "int32", **NAMED, **RANKED},
    "relation_neurons": {"relation": "str", "block": "str", **NAMED, **RANKED, "used": "int32", "prompts": "int32"},
    "concentration": {"prompt_id": "int32", "block": "str", "neurons": "int32"}
    | {f"{name}{end}": "float32" for name in FIGURES for end in ("", "_error")}
    | {"saturated": "bool"},
    "neuron_sums": {"prompt_id": "int32", "block": "str", "layer": "int16", "unit": "int16"}
    | {"neuron_sum": "float32", "error": "float32"},
}
UNITS = {"neurons": "expert", "attention_neurons": "head"}


@torch.no_grad()
def attribute(
    parts: Anatomy,
    paths: Sequence[str | Path],
    prompts: pd.DataFrame,
    norm: str = "fixed",
    top: int = 100,
    bottom: int = 10,
    exact: str = "top",
    by_relation: bool = True,
) -> dict[str, pd.DataFrame]:
    """LPI of FFN neurons (of routed, shared and dense FFNs) and of attention neurons (method.md, sections 2 and 2.1).

    `paths` are the shards of the cache; prompts (prompt_id, relation, target_ids) that `prompts` lacks are left out.
    LPIs of several answer tokens are summed. `norm` is that of lens.norm_scale. With `exact` = "all" every neuron is
    evaluated (brute force) instead of bounded. Returns five tables (relation_neurons is empty without `by_relation`):

    - neurons, attention_neurons: the `top` neurons with the largest LPI of each prompt and the `bottom` ones with the
      smallest, by falling LPI; ties go to the first layer, unit and neuron. Columns: prompt_id, layer, expert (shared
      expert i is -1 - i, a dense FFN is 0) or head, neuron, activation (what multiplies the neuron's column: gate
      weight and post-norm scale included; the mean over answer tokens that use it), lpi (nats, exact to rounding),
      bound (nats; what it was ranked by: from above where the LPI is positive, else from below; the LPI itself where
      that was known first), exact (these are certain to be the largest, or smallest). LPIs within GUARD of 0 are not
      ranked.
    - relation_neurons: the same for the mean LPI over all prompts of a relation (0 where a prompt does not use the
      neuron): relation, block, layer, unit, neuron, ..., used (prompts, or answer tokens, that use it), prompts.
    - concentration, for each prompt and block: neurons (how many it uses), positive (their summed positive LPI, nats),
      share (of it in the top 1% of the neurons used, at least one), entropy (of its distribution, nats), gini (of
      max(LPI, 0)), each with a certified half-width *_error: the true value lies within +- that, up to rounding;
      saturated: the target is certain to rounding before every block, no ranking is meaningful and none is made.
    - neuron_sums, for each prompt and unit: neuron_sum (nats, sum of its neurons' LPIs), error (certified half-width,
      up to rounding).

    Where logits are capped or the norm scale is recomputed no bound holds: unless `exact` is "all", candidates are
    chosen by the bounds of the uncapped readout at fixed scale, values are exact but `exact` is False, `bound` is NaN,
    and the last two tables are empty.
    """
    readout = Readout.of(parts, norm)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in SCHEMAS}
    with opened(paths, prompts) as cache:
        scale = torch.cat([norm_scale(parts, cache.get("resid_final", rows), norm) for rows in cache.chunks(1024)])
        relation = prompts.set_index("prompt_id")["relation"].loc[cache.prompt_id].to_numpy()
        vocabulary = Vocabulary.of(readout)
        for name in KINDS:
            side = Side(name, parts, readout, vocabulary, cache, scale, exact == "all")
            if side.units:
                for kind, table in _of_side(side, relation if by_relation else None, top, bottom):
                    tables[kind].append(table)
    return {
        name: _typed(found, SCHEMAS[name]).rename(columns={"unit": UNITS.get(name, "unit")})
        for name, found in tables.items()
    }


class Side:
    """The FFN neurons or the attention neurons of a model, numbered layer by layer and unit by unit, in a cache.

    It keeps what bounds need to know of the columns that were met.
    """

    def __init__(
        self,
        name: str,
        parts: Anatomy,
        readout: Readout,
        vocabulary: Vocabulary,
        cache: Activations,
        scale: Float[Tensor, " n"],
        evaluate_all: bool,
    ) -> None:
        of_layer = ffn_units if name == "ffn" else attention_units
        self.name, self.parts, self.readout, self.vocabulary = name, parts, readout, vocabulary
        self.cache, self.scale, self.evaluate_all = cache, scale, evaluate_all
        self.units = {(layer.index, at): unit for layer in parts.layers for at, unit in of_layer(layer).items()}
        self.first = torch.tensor([0, *accumulate(unit.width for unit in self.units.values())])
        self._number = dict(zip(self.units, self.first.tolist(), strict=False))
        self._energy, self._length = torch.full((2, self.total), torch.nan)

    @property
    def total(self) -> int:
        """Number of neurons."""
        return int(self.first[-1])

    @property
    def bounded(self) -> bool:
        """Whether bounds hold, or all is evaluated."""
        return self.evaluate_all or self.readout.is_linear

    def names(self, number: Int[Tensor, "*n"]) -> tuple[Tensor, Tensor, Tensor]:
        """(layer, unit, neuron) of neurons by number; layer -1 for number -1."""
        at = torch.searchsorted(self.first, number, right=True) - 1
        layers, units = torch.tensor(list(self.units)).T
        return torch.where(number < 0, -1, layers[at]), units[at], number - self.first[at]

    def blocks(self, rows: Int[np.ndarray, " n"], layers: set[int] | None = None) -> Iterator[tuple[Block, Tensor]]:
        """The neurons of each layer (of `layers`) at these rows, and the residual states that they are added to."""
        of_layer, state = (ffn_neurons, "resid_mid") if self.name == "ffn" else (attention_neurons, "resid_pre")
        for index in sorted({layer for layer, _ in self.units} if layers is None else layers):
            here = self.cache.layer(index, rows)
            if block := of_layer(self.parts.layers[index], here):
                yield block, here[state]

    def numbers(self, block: Block) -> Int[Tensor, "n m"]:
        """The numbers of a block's neurons."""
        used, inverse = block.units.unique(return_inverse=True)
        first = torch.tensor([self._number[block.layer, unit] for unit in used.tolist()])[inverse]
        widths = torch.tensor(block.starts).diff()
        within = torch.cat([torch.arange(int(width)) for width in widths])
        return first.repeat_interleave(widths, 1) + within

    def bounds(
        self, rows: Int[np.ndarray, " n"]
    ) -> tuple[Float[Tensor, "n total"], Float[Tensor, "n total"], Bool[Tensor, "n units"], Bool[Tensor, " n"]]:
        """Of these rows: (lower, upper) bounds of the LPI of all neurons, 0 for those that a row does not use.

        And which units a row uses, and whether the target is certain to rounding before every block.
        """
        lower, upper = torch.zeros(2, len(rows), self.total)
        used = torch.zeros(len(rows), len(self.units), dtype=torch.bool)
        certain = torch.ones(len(rows), dtype=torch.bool)
        readout = self.readout if self.evaluate_all else replace(self.readout, softcap=0.0, norm=None)
        scale, target = self.scale[rows], self.cache.target[rows]
        for block, state in self.blocks(rows):
            log_p = readout.log_probs(state, scale)
            certain &= log_p.gather(1, target.unsqueeze(1)).squeeze(1) > -CERTAIN * torch.finfo(log_p.dtype).eps
            numbers = self.numbers(block)
            if self.evaluate_all:
                low = high = every(readout, state, block, scale, target)
            else:
                m = block.activations.shape[1]
                pieces, step = [], max(1, AT_ONCE // (m * followed_tokens(m)))
                for some in torch.arange(len(rows)).split(step):
                    part = block.of(some)
                    energy, length = self._columns(part, numbers[some])
                    arguments = (log_p[some], part, energy, length, scale[some], target[some])
                    pieces.append(intervals(readout, self.vocabulary, *arguments))
                low, high = (torch.cat(bounds) for bounds in zip(*pieces, strict=True))
            lower.scatter_(1, numbers, low)
            upper.scatter_(1, numbers, high)
            first = numbers[:, torch.tensor(block.starts[:-1])]
            used.scatter_(1, torch.searchsorted(self.first, first, right=True) - 1, True)
        return lower, upper, used, certain

    def evaluate(
        self, rows: Int[np.ndarray, " n"], group: Int[Tensor, " n"], numbers: Int[Tensor, "groups k"]
    ) -> Float[Tensor, "groups k"]:
        """What Evaluate gives, from these rows, each of which belongs to a group."""
        out = torch.zeros(numbers.shape)
        found = list(self._where(rows, group, numbers))
        if found:
            # All layers in one go: products with the vocabulary are fastest in large batches.
            states = torch.cat([state for _, state, *_ in found])
            vectors = torch.cat([block.contributions(row, place) for block, _, row, _, place in found])
            layer = torch.arange(len(found)).repeat_interleave(torch.tensor([len(row) for _, _, row, _, _ in found]))
            row, column = (torch.cat(parts) for parts in zip(*[where[2:4] for where in found], strict=True))
            scale, target = (x[rows].repeat(len(found)) for x in (self.scale, self.cache.target))
            lpi = lpi_of(self.readout, states, row + layer * len(rows), vectors, scale, target)
            out.index_put_((group[row], column), lpi, accumulate=True)
        return out

    def activations(
        self, rows: Int[np.ndarray, " n"], group: Int[Tensor, " n"], numbers: Int[Tensor, "groups k"]
    ) -> Float[Tensor, "2 groups k"]:
        """(summed activation, rows that use it) of neurons by number over each group of rows."""
        out = torch.zeros(2, *numbers.shape)
        for block, _, row, column, place in self._where(rows, group, numbers):
            at = (group[row], column)
            out[0].index_put_(at, block.activations[row, place], accumulate=True)
            out[1].index_put_(at, torch.ones(len(row)), accumulate=True)
        return out

    def _where(
        self, rows: Int[np.ndarray, " n"], group: Int[Tensor, " n"], numbers: Int[Tensor, "groups k"]
    ) -> Iterator[tuple[Block, Tensor, Tensor, Tensor, Tensor]]:
        """Where neurons by number are: for each layer its block, state, and (row, column of `numbers`, place)."""
        layer, unit, neuron = (name[group] for name in self.names(numbers))
        for block, state in self.blocks(rows, set(layer.unique().tolist()) - {-1}):
            row, column = (layer == block.layer).nonzero(as_tuple=True)
            place = block.places(row, unit[row, column], neuron[row, column])
            found = place >= 0
            if found.any():
                yield block, state, row[found], column[found], place[found]

    def _columns(self, block: Block, numbers: Int[Tensor, "n m"]) -> tuple[Tensor, Tensor]:
        for unit in block.units.unique().tolist():
            first = self._number[block.layer, unit]
            if self._length[first].isnan():
                columns = self.units[block.layer, unit].columns()
                at = slice(first, first + len(columns))
                self._energy[at] = self.vocabulary.energy(columns)
                self._length[at] = columns.norm(dim=1)
        return self._energy[numbers], self._length[numbers]


def _of_side(side: Side, relation: np.ndarray | None, top: int, bottom: int) -> Iterator[tuple[str, pd.DataFrame]]:
    chunks = list(side.cache.chunks(max(1, MAX_LOGITS // 2 // max(len(side.readout.weight), side.total))))
    names, code = np.unique([] if relation is None else relation, return_inverse=True)
    of_relation = torch.tensor(code)
    # Sums over thousands of prompts: in float32 they would be off by more than GUARD allows.
    sums = torch.zeros(2, len(names), side.total, dtype=torch.float64)
    for rows in chunks:
        lower, upper, tables = _of_prompts(side, rows, top, bottom)
        yield from tables.items()
        if relation is not None:
            _, first = np.unique(side.cache.prompt_id[rows], return_index=True)
            for of_all, of_these in zip(sums, (lower, upper), strict=True):
                of_all.index_add_(0, of_relation[rows[first]], of_these.double())
    if relation is not None:
        yield "relation_neurons", _of_relations(side, chunks, names, of_relation, sums, top, bottom)


def _of_prompts(side: Side, rows: np.ndarray, top: int, bottom: int) -> tuple[Tensor, Tensor, dict[str, pd.DataFrame]]:
    """Bounds [prompts total] of the prompts' LPIs, summed over answer tokens, and the tables of these prompts."""
    lower, upper, used, certain = side.bounds(rows)
    prompt_id, inverse = np.unique(side.cache.prompt_id[rows], return_inverse=True)
    group = torch.tensor(inverse)
    if len(prompt_id) < len(rows):
        lower, upper = (x.new_zeros(len(prompt_id), side.total).index_add_(0, group, x) for x in (lower, upper))
        used = torch.zeros(len(prompt_id), len(side.units)).index_add_(0, group, used.float()) > 0
    saturated = np.ones(len(prompt_id), bool)
    saturated[inverse[~certain.numpy()]] = False
    evaluate, activations = (partial(look, rows, group) for look in (side.evaluate, side.activations))
    ranking = _ranking(side, lower, upper, evaluate, activations, group.bincount(), top, bottom)
    ranking = ranking[~saturated[ranking["group"]]]
    tables = {KINDS[side.name]: ranking.assign(prompt_id=prompt_id[ranking["group"]])}
    if side.bounded:
        tighten(lower, upper, evaluate)
        labels = {"prompt_id": prompt_id, "block": side.name, "saturated": saturated}
        tables["neuron_sums"] = _sums(side, prompt_id, lower, upper, used)
        tables["concentration"] = _concentration(side, lower, upper, used).assign(**labels)
    return lower, upper, tables


def _of_relations(
    side: Side,
    chunks: Sequence[np.ndarray],
    names: np.ndarray,
    of_relation: Tensor,
    sums: Tensor,
    top: int,
    bottom: int,
) -> pd.DataFrame:
    """The ranking of each relation; `sums` [2 relations total] are the bounds of LPIs summed over its prompts."""

    def everywhere(look: Callable[..., Tensor], numbers: Tensor) -> Tensor:
        wanted = (numbers >= 0).any(1)[of_relation].numpy()
        parts = [part for rows in chunks if len(part := rows[wanted[rows]])] or [chunks[0][:0]]
        return reduce(torch.add, (look(part, of_relation[part], numbers).double() for part in parts))

    evaluate, activations = (partial(everywhere, look) for look in (side.evaluate, side.activations))
    table = _ranking(side, sums[0], sums[1], evaluate, activations, of_relation.bincount(), top, bottom)
    pairs = pd.DataFrame({"code": of_relation.numpy(), "prompt_id": side.cache.prompt_id}).drop_duplicates()
    prompts = np.bincount(pairs["code"])[table["group"]]
    means = {name: table[name] / prompts for name in ("lpi", "bound")}
    return table.assign(relation=names[table["group"]], block=side.name, prompts=prompts, **means)


def _ranking(
    side: Side,
    lower: Tensor,
    upper: Tensor,
    evaluate: Evaluate,
    activations: Callable[[Tensor], Tensor],
    rows: Tensor,
    top: int,
    bottom: int,
) -> pd.DataFrame:
    """The `top` largest and `bottom` smallest values of each group, by falling value; ties by number.

    What was evaluated is settled in `lower` and `upper`.
    """
    frames = []
    for sign, k in ((1, top), (-1, bottom)) if bottom else ((1, top),):
        numbers, values, limits, certain = search(lower, upper, k, evaluate, rows, sign, side.bounded)
        if side.bounded:
            settle(lower, upper, numbers, sign * values)
        group = torch.arange(len(rows)).unsqueeze(1).expand_as(numbers)
        limits = sign * limits if side.bounded else torch.full_like(limits, torch.nan)
        exact = (side.bounded & certain).unsqueeze(1).expand_as(numbers)
        columns = {"group": group, "number": numbers, "value": values, "bound": limits, "exact": exact}
        frame = pd.DataFrame({name: tensor.flatten().numpy() for name, tensor in columns.items()})
        frame = frame[(frame["number"] >= 0) & (frame["value"] > GUARD * rows.numpy()[frame["group"]])]
        frame = frame.sort_values(["group", "value", "number"], ascending=[True, False, True]).groupby("group").head(k)
        frames.append(frame.assign(lpi=sign * frame["value"]))
    table = pd.concat(frames).sort_values(["group", "lpi", "number"], ascending=[True, False, True], ignore_index=True)
    at = np.array(table["group"]), np.array(table.groupby("group").cumcount())
    chosen = torch.full((len(rows), top + bottom), -1)
    chosen[at] = torch.tensor(np.array(table["number"]))
    summed, used = activations(chosen)[:, *at].numpy()
    layer, unit, neuron = (name[at].numpy() for name in side.names(chosen))
    return table.assign(layer=layer, unit=unit, neuron=neuron, activation=summed / used, used=used)


def _sums(side: Side, prompt_id: np.ndarray, lower: Tensor, upper: Tensor, used: Tensor) -> pd.DataFrame:
    of_unit = torch.arange(len(side.units)).repeat_interleave(side.first.diff())
    low, high = (x.new_zeros(used.shape).index_add_(1, of_unit, x)[used].numpy() for x in (lower, upper))
    row, unit = used.nonzero(as_tuple=True)
    layers, units = np.array(list(side.units)).T[:, unit.numpy()]
    middle, error = _with_error(low, high)
    columns = {"prompt_id": prompt_id[row.numpy()], "block": side.name, "layer": layers, "unit": units}
    return pd.DataFrame(columns | {"neuron_sum": middle, "error": error})


def _concentration(side: Side, lower: Tensor, upper: Tensor, used: Tensor) -> pd.DataFrame:
    counts = used.long() @ side.first.diff()
    found = [figures_of(low, high, int(n)) for low, high, n in zip(lower, upper, counts, strict=True)]
    columns: dict[str, Any] = {"neurons": counts.numpy()}
    for name in FIGURES:
        low, high = np.array([figures[name] for figures in found]).T
        columns[name], columns[f"{name}_error"] = _with_error(low, high)
    return pd.DataFrame(columns)


def _with_error(low: Any, high: Any) -> tuple[Any, Any]:
    """The middle of intervals, and half their width."""
    return (low + high) / 2, np.maximum(high - low, 0) / 2


def _typed(found: Sequence[pd.DataFrame], schema: Mapping[str, str]) -> pd.DataFrame:
    empty = pd.DataFrame({name: np.empty(0, object) for name in schema})
    return (pd.concat(found, ignore_index=True)[list(schema)] if found else empty).astype(dict(schema))

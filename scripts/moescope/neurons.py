"""Exact LPI of the strongest neurons without evaluating all of them (method.md, section 2.1).

With the norm scale fixed, f(v) = log p(w | r + v) is concave in v, so its tangent at 0 bounds every neuron's LPI from
above at the price of one inner product. Neurons are evaluated exactly in descending order of their bound; when the
K-th best exact value is at least the next bound, the K best are known and the rest need no look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.lens import Readout
from moescope.models import Dense, Layer, Path, expert_down, weight_of, weights_of

GUARD = 1e-6
"""Nats by which rounding in float32 may break a bound."""
CERTAIN = 1e3
"""A prediction with 1 - p_w below this many epsilons is certain to rounding: the tighter bound is not used there."""
STEP = 8
"""Neurons that are evaluated beyond K before the stopping rule is first looked at, and at each further step."""
LOGITS = 2**25
"""Logits that are held at once, about 128 MiB of float32."""


@dataclass(frozen=True)
class Block:
    """The neurons of one block (FFN or attention) of one layer that each prompt uses, side by side in `m` places.

    A prompt uses units (routed experts, -1 - i for shared expert i, 0 for a dense FFN, or heads) in slots; slot s holds
    the places [starts[s], starts[s + 1]). `units` [n slots] names them. `activations` [n m] multiply what a neuron adds
    to the residual stream at activation 1, gate weight and post-norm scale included; `columns(unit)` gives that for all
    neurons of a unit, [width d_model], float32.
    """

    layer: int
    starts: tuple[int, ...]
    units: Int[Tensor, "n slots"]
    activations: Float[Tensor, "n m"]
    columns: Callable[[int], Tensor]

    def products(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n m"]:
        """Inner product of each prompt's vector with what each of its neurons adds: all tangents in one go."""
        out = torch.empty_like(self.activations)
        starts = torch.tensor(self.starts)
        for unit in self.units.unique().tolist():
            row, slot = (self.units == unit).nonzero(as_tuple=True)
            columns = self.columns(unit)
            place = starts[slot].unsqueeze(1) + torch.arange(len(columns))
            out[row.unsqueeze(1), place] = vectors[row] @ columns.T
        return out.mul_(self.activations)

    def names(self, row: Int[Tensor, " r"], place: Int[Tensor, " r"]) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
        """(unit, neuron within it) at these places of these prompts."""
        starts = torch.tensor(self.starts)
        slot = torch.searchsorted(starts, place, right=True) - 1
        return self.units[row, slot], place - starts[slot]

    def contributions(self, row: Int[Tensor, " r"], place: Int[Tensor, " r"]) -> Float[Tensor, "r d_model"]:
        """What the neurons at these places of these prompts add to the residual stream."""
        unit, neuron = self.names(row, place)
        parts = {one: (unit == one).nonzero()[:, 0] for one in unit.unique().tolist()}
        found = {one: self.columns(one)[neuron[chosen]] for one, chosen in parts.items()}
        out = torch.empty(len(row), next(iter(found.values())).shape[1])
        for one, chosen in parts.items():
            out[chosen] = found[one]
        return out * self.activations[row, place].unsqueeze(1)


def ffn_neurons(layer: Layer, here: Mapping[str, Tensor]) -> Block | None:
    """The FFN neurons of a layer: of the routed experts that each prompt uses and of shared ones, or of a dense FFN."""
    pieces, units, columns = list[Tensor](), list[Tensor](), dict[int, Callable[[int], Tensor]]()
    n = len(here["resid_pre"])
    if layer.experts is not None:
        experts, path, ids = layer.experts.module, layer.experts.path, here["expert_ids"].long()
        acts = here["expert_acts"].float() * here["expert_weights"].float().unsqueeze(-1)
        pieces += acts.unbind(1)
        units.append(ids)

        def routed(unit: int) -> Tensor:
            with weights_of(experts):
                return _folded(path, expert_down(experts, unit))

        columns |= dict.fromkeys(ids.unique().tolist(), routed)
        pieces = [_scaled(path, piece, here.get("experts_scale")) for piece in pieces]
    parts = [(-1 - i, shared, f"shared.{i}.") for i, shared in enumerate(layer.shared)]
    parts += [(0, layer.dense, "dense_")] if layer.dense is not None else []
    for unit, dense, name in parts:
        acts = here["acts"] if unit == 0 else here[f"{name}acts"] * here[f"{name}gate"].unsqueeze(-1)
        pieces.append(_scaled(dense.path, acts.float(), here.get(f"{name}scale")))
        units.append(torch.full((n, 1), unit))
        columns[unit] = _of_dense(dense)
    return _block(layer.index, pieces, units, lambda unit: columns[unit](unit)) if pieces else None


def attention_neurons(layer: Layer, here: Mapping[str, Tensor]) -> Block | None:
    """The attention neurons of a layer: dimension j of head h is neuron j of unit h."""
    attention = layer.attention
    if attention is None or attention.out_proj is None:
        return None
    out_proj, path = attention.out_proj, attention.path
    heads = _scaled(path, here["head_in"].float().flatten(1), here.get("attention_scale"))
    heads = heads.unflatten(1, (attention.n_heads, -1))

    def columns(unit: int) -> Tensor:
        with weights_of(out_proj):
            return _folded(path, weight_of(out_proj).unflatten(1, (attention.n_heads, -1))[:, unit])

    units = torch.arange(attention.n_heads).expand(len(heads), -1)
    return _block(layer.index, heads.unbind(1), [units], columns)


@torch.no_grad()
def strongest(
    readout: Readout,
    states: Sequence[Float[Tensor, "n d_model"]],
    blocks: Sequence[Block],
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
    k: int,
) -> pd.DataFrame:
    """The k neurons with the largest LPI of each prompt, over all blocks (method.md, section 2.1).

    `states` are the residual states that the blocks add to. Columns: row (of the prompt), layer (int16), unit (int16),
    neuron (int32), lpi (float32, nats, exact to rounding), bound (float32, nats, from above), exact (bool: these are
    certain to be the k largest); for each prompt in descending order of LPI. Ties at the k-th place are broken
    arbitrarily. Logits that are capped have no such bound: there nothing is certain, unless all were evaluated.
    """
    frames = []
    step = max(1, LOGITS // 2 // (len(readout.weight) * len(blocks)))
    for start in range(0, len(scale), step):
        rows = slice(start, start + step)
        part = [_rows_of(block, rows) for block in blocks]
        frame = _strongest(readout, [s[rows] for s in states], part, scale[rows], target[rows], k)
        frames.append(frame.assign(row=frame["row"] + start))
    return pd.concat(frames, ignore_index=True)


def tangents(
    readout: Readout, state: Float[Tensor, "n d_model"], scale: Float[Tensor, " n"], target: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n d_model"]]:
    """(probabilities of the next token, gradient of log p(w | r + v) at v = 0) of each prompt's residual state."""
    p = readout.log_probs(state, scale).exp()
    return p, (readout.weight[target] - p @ readout.weight) * scale.unsqueeze(1)


def upper_bound(tangent: Float[Tensor, "n m"], p_target: Float[Tensor, " n"]) -> Float[Tensor, "n m"]:
    """An upper bound of LPIs from their tangents: Jensen's inequality on {w} against all other tokens.

    With a the change of the logits and E the mean over the other tokens, E exp(a_i) >= exp(E a_i), so
    LPI <= -log(p_w + (1 - p_w) exp(-tangent / (1 - p_w))), which is never above the tangent itself.
    """
    p = p_target.double().unsqueeze(1)
    rest = (1 - p).clamp_min(0)
    certain = rest < CERTAIN * torch.finfo(torch.float32).eps
    tighter = -torch.logaddexp(p.log(), rest.log() - tangent.double() / rest.clamp_min(1e-300))
    return torch.where(certain, tangent.double(), torch.minimum(tighter, tangent.double())).to(tangent.dtype)


def evaluate(
    readout: Readout,
    p: Float[Tensor, "n vocab"],
    row: Int[Tensor, " r"],
    vectors: Float[Tensor, "r d_model"],
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
) -> Float[Tensor, " r"]:
    """Exact LPI of vectors, each added alone to the residual state of prompt `row`, whose next-token probabilities
    are p[row]: a_w - log1p(sum_i p_i expm1(a_i)) with a = s W_U (g v), or by logsumexp where some |a_i| > 1.

    Rows are best sorted by prompt.
    """
    found = []
    step = max(1, LOGITS // len(readout.weight))
    for chunk in range(0, len(row), step):
        rows: Tensor = row[chunk : chunk + step]
        a = (vectors[chunk : chunk + step] * scale[rows].unsqueeze(1)) @ readout.weight.T
        own = a.gather(1, target[rows].unsqueeze(1)).squeeze(1)
        large = (a.abs().amax(1) > 1).nonzero()[:, 0]
        normaliser = torch.empty_like(own)
        normaliser[large] = (p[rows[large]].log() + a[large]).logsumexp(1)
        a.expm1_()
        prompts, counts = torch.unique_consecutive(rows, return_counts=True)
        ends = counts.cumsum(0).tolist()
        for prompt, begin, end in zip(prompts.tolist(), [0, *ends[:-1]], ends, strict=True):
            mean = a[begin:end] @ p[prompt]
            small = torch.ones(end - begin, dtype=torch.bool)
            small[large[(large >= begin) & (large < end)] - begin] = False
            normaliser[begin:end][small] = mean[small].log1p()
        found.append(own - normaliser)
    return torch.cat(found) if found else scale.new_empty(0)


@torch.no_grad()
def every(
    readout: Readout,
    state: Float[Tensor, "n d_model"],
    block: Block,
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
) -> Float[Tensor, "n m"]:
    """Exact LPI of every neuron of a block, by brute force: what `strongest` is checked against."""
    p, _ = tangents(readout, state, scale, target)
    width = block.activations.shape[1]
    out = torch.empty_like(block.activations)
    step = max(1, LOGITS // len(readout.weight) // max(len(scale), 1))
    for place in torch.arange(width).split(step):
        row = torch.arange(len(scale)).repeat_interleave(len(place))
        places = place.repeat(len(scale))
        vectors = block.contributions(row, places)
        out[:, place] = evaluate(readout, p, row, vectors, scale, target).view(len(scale), -1)
    return out


def _strongest(
    readout: Readout, states: Sequence[Tensor], blocks: Sequence[Block], scale: Tensor, target: Tensor, k: int
) -> pd.DataFrame:
    n, total = len(scale), sum(block.activations.shape[1] for block in blocks)
    k = min(k, total)
    pooled = min(k + 4 * STEP, total)
    bounds, numbers, places, probabilities = [], [], [], []
    for index, (state, block) in enumerate(zip(states, blocks, strict=True)):
        p, gradient = tangents(readout, state, scale, target)
        bound = upper_bound(block.products(gradient), p.gather(1, target.unsqueeze(1)).squeeze(1))
        best = bound.topk(min(pooled, bound.shape[1]), dim=1)
        bounds.append(best.values)
        numbers.append(torch.full_like(best.indices, index))
        places.append(best.indices)
        probabilities.append(p)
    bound, order = torch.cat(bounds, 1).topk(pooled, dim=1)
    number, place = (torch.cat(parts, 1).gather(1, order) for parts in (numbers, places))
    lpi = torch.full_like(bound, -torch.inf)
    first, rows = 0, torch.arange(n)
    while len(rows):
        last = min(first + (k + STEP if not first else STEP), pooled)
        for one in number[rows, first:last].unique().tolist():
            at = (number[:, first:last] == one) & torch.isin(torch.arange(n), rows).unsqueeze(1)
            row, column = at.nonzero(as_tuple=True)
            column = column + first
            vectors = blocks[one].contributions(row, place[row, column])
            lpi[row, column] = evaluate(readout, probabilities[one], row, vectors, scale, target)
        first = last
        worst = lpi[rows].topk(k, dim=1).values[:, -1]
        # Whatever lies outside of the pool is bounded by the last in it.
        rows = rows[worst < bound[rows, min(last, pooled - 1)] + GUARD]
        if last == pooled:
            break
    best = lpi.topk(k, dim=1)
    row, chosen = torch.arange(n).repeat_interleave(k), best.indices.flatten()
    number, place = number[row, chosen], place[row, chosen]
    # Bounds so loose that the pool ran out leave a prompt uncertain, and capped logits have no such bound.
    certain = ~torch.isin(row, rows) if pooled < total else torch.ones(len(row), dtype=torch.bool)
    certain &= pooled == total or not readout.softcap
    names = torch.zeros(2, len(row), dtype=torch.long)
    for one in number.unique().tolist():
        at = number == one
        names[:, at] = torch.stack(blocks[one].names(row[at], place[at]))
    return pd.DataFrame(
        {
            "row": row.numpy(),
            "layer": torch.tensor([block.layer for block in blocks], dtype=torch.int16)[number].numpy(),
            "unit": names[0].to(torch.int16).numpy(),
            "neuron": names[1].to(torch.int32).numpy(),
            "lpi": best.values.flatten().numpy(),
            "bound": bound[row, chosen].numpy(),
            "exact": certain.numpy(),
        }
    )


def _rows_of(block: Block, rows: slice) -> Block:
    return replace(block, units=block.units[rows], activations=block.activations[rows])


def _block(layer: int, pieces: Sequence[Tensor], units: Sequence[Tensor], columns: Callable[[int], Tensor]) -> Block:
    starts = (0, *accumulate(piece.shape[1] for piece in pieces))
    return Block(layer, starts, torch.cat(list(units), 1), torch.cat(list(pieces), 1), columns)


def _scaled(path: Path, acts: Float[Tensor, "n m"], scale: Float[Tensor, " n"] | None) -> Float[Tensor, "n m"]:
    acts = acts * path.factor
    return acts if scale is None or not path.norms else acts * scale.unsqueeze(1)


def _folded(path: Path, down: Float[Tensor, "d_model m"]) -> Float[Tensor, "m d_model"]:
    columns = down.T.float()
    return columns * reduce(torch.mul, (norm.gain.float() for norm in path.norms)) if path.norms else columns


def _of_dense(dense: Dense) -> Callable[[int], Tensor]:
    def columns(unit: int) -> Tensor:
        with weights_of(dense.down):
            return _folded(dense.path, weight_of(dense.down))

    return columns

"""Neurons: what each column of a down projection, or of an attention block's output projection, adds, and its LPI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moescope.lens import Readout, lpi_of, rows_at_once
from moescope.models import Dense, Layer, Path, expert_down, weight_of, weights_of


@dataclass(frozen=True)
class Unit:
    """A routed, shared or dense expert, or a head.

    `columns()` is what each of its `width` neurons adds to the residual stream at activation 1, gate weight and
    post-norm scale 1: [width d_model], float32.
    """

    width: int
    columns: Callable[[], Tensor]


@dataclass(frozen=True)
class Block:
    """The neurons of one block (FFN or attention) of one layer that each prompt uses, side by side in `m` places.

    A prompt uses units (routed experts, -1 - i for shared expert i, 0 for a dense FFN, or heads) in slots; slot s holds
    the places [starts[s], starts[s + 1]). `units` [n slots] names them. `activations` [n m] multiply the columns of
    `parts`.
    """

    layer: int
    starts: tuple[int, ...]
    units: Int[Tensor, "n slots"]
    activations: Float[Tensor, "n m"]
    parts: Mapping[int, Unit]

    def columns(self, unit: int) -> Float[Tensor, "width d_model"]:
        """What each neuron of a unit adds at activation 1."""
        return self.parts[unit].columns()

    def of(self, rows: Int[Tensor, " r"]) -> Block:
        """The same of these prompts."""
        return replace(self, units=self.units[rows], activations=self.activations[rows])

    def products(self, vectors: Float[Tensor, "n *q d_model"]) -> Float[Tensor, "n *q m"]:
        """Inner products of each prompt's vectors with what each of its neurons adds."""
        n, m = self.activations.shape
        out = vectors.new_empty(*vectors.shape[:-1], m)
        for unit in self.units.unique().tolist():
            here = self.units == unit
            found = vectors[here.any(1)] @ self.columns(unit).T
            slots = here.int().argmax(1)[here.any(1)]
            for slot in slots.unique().tolist():
                out[here[:, slot], ..., self.starts[slot] : self.starts[slot + 1]] = found[slots == slot]
        return out.mul_(self.activations.view(n, *[1] * (vectors.ndim - 2), m))

    def names(self, row: Int[Tensor, " r"], place: Int[Tensor, " r"]) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
        """(unit, neuron within it) at these places of these prompts."""
        starts = torch.tensor(self.starts)
        slot = torch.searchsorted(starts, place, right=True) - 1
        return self.units[row, slot], place - starts[slot]

    def places(self, row: Int[Tensor, " r"], unit: Int[Tensor, " r"], neuron: Int[Tensor, " r"]) -> Int[Tensor, " r"]:
        """The places of these neurons in these prompts, -1 where a prompt does not use the unit."""
        here = self.units[row] == unit.unsqueeze(1)
        place = torch.tensor(self.starts)[here.int().argmax(1)] + neuron
        return torch.where(here.any(1), place, -1)

    def contributions(self, row: Int[Tensor, " r"], place: Int[Tensor, " r"]) -> Float[Tensor, "r d_model"]:
        """What the neurons at these places of these prompts add to the residual stream."""
        unit, neuron = self.names(row, place)
        parts = {one: (unit == one).nonzero()[:, 0] for one in unit.unique().tolist()}
        found = {one: self.columns(one)[neuron[chosen]] for one, chosen in parts.items()}
        out = torch.empty(len(row), next(iter(found.values())).shape[1])
        for one, chosen in parts.items():
            out[chosen] = found[one]
        return out * self.activations[row, place].unsqueeze(1)


def ffn_units(layer: Layer) -> dict[int, Unit]:
    """The units of a layer's FFN: routed experts from 0, shared expert i at -1 - i; or a dense FFN at 0."""
    units = dict[int, Unit]()
    if layer.experts is not None:
        experts, path = layer.experts.module, layer.experts.path

        def routed(unit: int) -> Tensor:
            with weights_of(experts):
                return _folded(path, expert_down(experts, unit))

        width = expert_down(experts, 0).shape[1]
        units = {unit: Unit(width, partial(routed, unit)) for unit in range(layer.experts.count)}
    return units | {unit: _linear_unit(dense.down, dense.path) for unit, dense, _ in _dense_parts(layer)}


def attention_units(layer: Layer) -> dict[int, Unit]:
    """The heads of a layer; none where they cannot be told apart."""
    attention = layer.attention
    if attention is None or attention.out_proj is None:
        return {}
    out_proj, path = attention.out_proj, attention.path
    width = weight_of(out_proj).shape[1] // attention.n_heads

    def columns(head: int) -> Tensor:
        with weights_of(out_proj):
            return _folded(path, weight_of(out_proj)[:, head * width : (head + 1) * width])

    return {head: Unit(width, partial(columns, head)) for head in range(attention.n_heads)}


def ffn_neurons(layer: Layer, here: Mapping[str, Tensor]) -> Block | None:
    """The FFN neurons of a layer: of the routed experts that each prompt uses and of shared ones, or of a dense FFN."""
    pieces, used = list[Tensor](), list[Tensor]()
    if layer.experts is not None:
        acts = here["expert_acts"].float() * here["expert_weights"].float().unsqueeze(-1)
        pieces = [_scaled(layer.experts.path, piece, here.get("experts_scale")) for piece in acts.unbind(1)]
        used = [here["expert_ids"].long()]
    for unit, dense, name in _dense_parts(layer):
        acts = here["acts" if name == "dense_" else f"{name}acts"].float()
        acts = acts if name == "dense_" else acts * here[f"{name}gate"].float().unsqueeze(-1)
        pieces.append(_scaled(dense.path, acts, here.get(f"{name}scale")))
        used.append(torch.full((len(acts), 1), unit, device=acts.device))
    return _block(layer.index, pieces, used, ffn_units(layer)) if pieces else None


def attention_neurons(layer: Layer, here: Mapping[str, Tensor]) -> Block | None:
    """The attention neurons of a layer: dimension j of head h, summed over source positions, is neuron j of unit h."""
    units = attention_units(layer)
    if not units or layer.attention is None:
        return None
    heads = _scaled(layer.attention.path, here["head_in"].float().flatten(1), here.get("attention_scale"))
    used = torch.arange(len(units)).expand(len(heads), -1)
    return _block(layer.index, heads.unflatten(1, (len(units), -1)).unbind(1), [used], units)


@torch.no_grad()
def every(
    readout: Readout,
    state: Float[Tensor, "n d_model"],
    block: Block,
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
) -> Float[Tensor, "n m"]:
    """Exact LPI of every neuron of a block, by brute force; never more than models.MAX_LOGITS logits at once."""
    out = torch.empty_like(block.activations)
    n, m = out.shape
    for numbers in torch.arange(n * m).split(rows_at_once(readout)):
        row, place = numbers // m, numbers % m
        out[row, place] = lpi_of(readout, state, row, block.contributions(row, place), scale, target)
    return out


def _dense_parts(layer: Layer) -> list[tuple[int, Dense, str]]:
    """Unit, part and prefix of its tensors for what every token passes through: shared experts, or a dense FFN."""
    shared = [(-1 - i, part, f"shared.{i}.") for i, part in enumerate(layer.shared)]
    return shared + ([(0, layer.dense, "dense_")] if layer.dense is not None else [])


def _linear_unit(down: nn.Module, path: Path) -> Unit:
    def columns() -> Tensor:
        with weights_of(down):
            return _folded(path, weight_of(down))

    return Unit(weight_of(down).shape[1], columns)


def _block(layer: int, pieces: Sequence[Tensor], units: Sequence[Tensor], parts: Mapping[int, Unit]) -> Block:
    starts = (0, *accumulate(piece.shape[1] for piece in pieces))
    return Block(layer, starts, torch.cat(list(units), 1), torch.cat(list(pieces), 1), parts)


def _scaled(path: Path, acts: Float[Tensor, "n m"], scale: Float[Tensor, " n"] | None) -> Float[Tensor, "n m"]:
    acts = acts * path.factor
    return acts if scale is None or not path.norms else acts * scale.unsqueeze(1)


def _folded(path: Path, down: Float[Tensor, "d_model m"]) -> Float[Tensor, "m d_model"]:
    columns = down.T.float()
    return columns * reduce(torch.mul, (norm.gain.float() for norm in path.norms)) if path.norms else columns

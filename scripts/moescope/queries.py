"""Query components: which earlier components raise the activations of the top value neurons (method.md, section 2.2).

A value neuron raises the target's log-probability by itself. With the norm scales, the attention patterns and the ratio
f(x) / x of every activation function held at their real values, its activation is an exact sum over all that was
written to the residual stream below it: inner products with its key. How neurons read the stream is found without
names, by watching a short forward pass, and checked by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope import anatomy, capture
from moescope.anatomy import Call
from moescope.models import (
    Anatomy,
    AnatomyError,
    Attention,
    Layer,
    Norm,
    attention_output,
    expert_activations,
    expert_contributions,
    experts_arguments,
    ffn_output,
    head_contributions,
    is_linear,
    shared_contribution,
    weight_of,
    weights_of,
)
from moescope.neurons import attention_neurons, ffn_neurons

NO_UNIT = -(2**15)
"""The unit of what has none (embedding, rest, a block that is one component); no shared expert comes near it."""
UNIT = {"ffn": "expert", "attention": "head"}
"""What the units of a block are called; the order of the two kinds of value neurons in tensors."""
SCORES = ("via_ffn", "via_attention")
KEYS = {"prompt_id": "int32", "level": "str", "layer": "int16", "unit": "int16", "neuron": "int32"}
QUERIES = KEYS | dict.fromkeys(SCORES, "float32")
VALUE_LAYERS = {"prompt_id": "int32", "block": "str", "layer": "int16", "lpi": "float32"}

Linear = tuple[Float[Tensor, "out d_model"], Float[Tensor, " out"] | None]
"""Weight and bias, as stored."""
Scored = tuple[str, int, Int[Tensor, " r"], Int[Tensor, " r"], Int[Tensor, " r"], Float[Tensor, "2 r"]]
"""Level, layer, and then units, neurons, rows of their prompts and scores."""


@dataclass(frozen=True)
class Reader:
    """How the neurons of a unit read the residual stream.

    What they read is norm(stream), or the stream itself, before the FFN if `middle`, else before attention.
    Pre-activations are the outputs of linear(unit), end to end. In an FFN `rows` [factors width] are those whose
    product, times a ratio that is held, is the activation of neuron k, one of activate(pre-activations). In attention
    `rows` [heads head_dim] is the one that neuron j of head h sums over positions, weighted by the pattern that the
    module `pattern` returns.
    """

    norm: Norm | None
    middle: bool
    linear: Callable[[int], Sequence[Linear]]
    rows: Int[Tensor, "_ width"]
    activate: Callable[[Tensor], Tensor] | None = None
    pattern: nn.Module | None = None

    def read(self, stream: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What is read, in float32."""
        x, norm = stream.float(), self.norm
        if norm is None:
            return x
        scale = norm.scale(x).unsqueeze(-1)
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        return x * scale * norm.gain.float() + norm.bias.float()


Readers = Mapping[tuple[int, str, int], Reader]
"""By layer, block ("ffn" or "attention") and unit: -1 - i for shared expert i, else 0 for all units."""


@torch.no_grad()
def attribute(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    values: pd.DataFrame,
    attention_values: pd.DataFrame,
    batch_size: int,
    n_values: int = 10,
    n_neurons: int = 10,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Query scores of all components, in nats (NA, section 3.3; method.md, section 2.2).

    The value neurons of a prompt are the first `n_values` of its rows with lpi > 0 in each of `values` (prompt_id,
    layer, expert, neuron, lpi) and `attention_values` (head in place of expert), both by falling lpi. A component's
    share of a value neuron's activation a is (key . what it writes) / a; its score is the sum over the value neurons
    of share x LPI. The key of a = f(g) u, with g = W_g x + b_g and u = W_u x + b_u, is a/2 (W_g / g + W_u / u), that of
    a = f(g) is a W_g / g, and that of dimension j of a head is, at each position, its attention weight times row j of
    W_v; all are taken through the norm. Scores are exact to rounding, given what is held. Where a pre-activation is a
    small sum of large terms, shares are large and cancel.

    `prompts` (prompt_id, token_ids, length) run through the model, which lies on the CPU or on disk, with eager
    attention, at most `batch_size` of one length at a time. Of an answer of several tokens the first one's readout
    position is used, with the tables' LPI.

    Returns two tables and a dict:

    - queries: prompt_id (int32), level (str), layer, unit (int16), neuron (int32), via_ffn, via_attention (float32:
      the score through FFN and through attention value neurons), sorted by the first five. Levels: `embedding` of
      the tokens; `head`; `expert`, its bias included (shared expert i is -1 - i, a dense FFN 0); `rest` (other biases,
      positional embeddings); `head_neuron` and `expert_neuron`, of each the `n_neurons` with the largest sum of both
      scores, if that is not 0. All are summed over positions; units are listed that the prompt uses at any. A block
      that is one component is a head or expert with the unit NO_UNIT; so are embedding and rest, in layer -1. What is
      no neuron has neuron -1. All levels but the neurons sum to the LPI of the value neurons, up to the rounding of the
      model's dtype;
    - value_layers: prompt_id (int32), block ("ffn" or "attention"), layer (int16), lpi (float32): of the value neurons
      that are used, summed;
    - reasons: for each part of a layer whose neurons are not used as value neurons, why.

    Raises AnatomyError where a key does not give the recorded activation of its value neuron, or scores do not add up.
    """
    with anatomy._eager_attention(model):
        readers, factor, reasons = find_readers(model, parts)
        tables = {"ffn": values, "attention": attention_values}
        chosen = pd.concat([_chosen(table, block, n_values, readers) for block, table in tables.items()])
        chosen = chosen[chosen["prompt_id"].isin(prompts["prompt_id"])]
        frames = [pd.DataFrame(columns=list(QUERIES))]
        for batch in capture.batches(prompts["length"].to_numpy(), batch_size) if readers else ():
            ids = capture.token_tensor(prompts, batch, capture.input_device(model))
            prompt_id = prompts["prompt_id"].to_numpy()[batch]
            own = chosen.join(pd.Series(range(len(batch)), prompt_id, name="row"), on="prompt_id", how="inner")
            frame = _queries(model, parts, readers, factor, ids, own, n_neurons)
            frames.append(frame.assign(prompt_id=prompt_id[frame["row"]])[list(QUERIES)])
    queries = pd.concat([frame.astype(QUERIES) for frame in frames]).sort_values(list(KEYS), ignore_index=True)
    of_layer = chosen.groupby(["prompt_id", "block", "layer"], as_index=False)["lpi"].sum()
    return queries, of_layer.astype(VALUE_LAYERS), reasons


def find_readers(model: PreTrainedModel, parts: Anatomy) -> tuple[Readers, float | None, dict[str, str]]:
    """How neurons read the residual stream; the factor of the tokens' embedding in it, None if unknown; and why other
    neurons are not understood.

    What is found reproduces all activations of a short forward pass. To be called with eager attention.
    """
    root, _ = anatomy._watch(model)
    calls = {call.module: call for call in root.all()}
    found: dict[tuple[int, str, int], Reader | str] = {}
    for layer in parts.layers:
        at, block = layer.index, calls[layer.block]
        streams = [cast(Tensor, calls[module].input) for module in (layer.block, layer.middle) if module is not None]
        if layer.attention is not None:
            found[at, "attention", 0] = _attention_reader(block, streams, layer.attention)
        if layer.whole:
            found[at, "ffn", 0] = layer.whole
        if layer.experts is not None:
            found[at, "ffn", 0] = _experts_reader(block, streams, layer.experts.module)
        dense = {0: layer.dense} | {-1 - i: shared for i, shared in enumerate(layer.shared)}
        found |= {(at, "ffn", i): _dense_reader(block, streams, part.down) for i, part in dense.items() if part}
    readers = {key: reader for key, reader in found.items() if isinstance(reader, Reader)}
    reasons = {_name(*key): why for key, why in found.items() if isinstance(why, str)}
    return readers, _embedding_factor(model, root, calls[parts.layers[0].block]), reasons


def _attention_reader(layer: Call, streams: Sequence[Tensor], attention: Attention) -> Reader | str:
    """Each dimension of each head is looked for among all outputs of linear maps, averaged by the head's pattern."""
    if attention.out_proj is None:
        return attention.whole
    block = next(call for call in layer.all() if call.module is attention.module)
    # The outermost that shows a pattern: what is inside may have a shape like one.
    shows = [call.module for call in block.all() if call.heads][-1]
    patterns: list[Tensor] = []
    handle = shows.register_forward_hook(lambda module, args, out: patterns.append(_pattern(out, anatomy.PROBE)[0]))
    anatomy._again(block, cast(Tensor, block.input))
    handle.remove()
    linears = {call.module: call for call in block.all() if is_linear(call.module) and call.output is not None}
    heads = cast(Tensor, linears.pop(attention.out_proj).input).unflatten(-1, (attention.n_heads, -1)).permute(1, 2, 0)
    for call in linears.values():
        means = torch.einsum("hqk,ko->hoq", patterns[0].float(), cast(Tensor, call.output).float())
        pairs = list(zip(heads.float(), means, strict=True))
        rows = [torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for x, y in pairs]
        if _close(torch.stack([y[row] for (_, y), row in zip(pairs, rows, strict=True)]), heads):
            return _reader(layer, streams, call, _linears(call.module), torch.stack(rows), pattern=shows)
    return "values that are not the outputs of one linear map, weighted by the attention weights that the block shows"


def _dense_reader(layer: Call, streams: Sequence[Tensor], module: nn.Module) -> Reader | str:
    """The linear maps that feed a down projection read what the last one before it reads."""
    parent, down = next((call, inner) for call in layer.all() for inner in call.inside if inner.module is module)
    before = list(parent.all())
    before = [call for call in before[: before.index(down)] if is_linear(call.module) and call.output is not None]
    feeding = [call for call in before if anatomy._same(call.input, before[-1].input)]

    def activate(inner: Tensor) -> Tensor:
        """The input of the down projection, at other outputs of the linear maps; as many tokens run as were watched."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0].flatten(0, -2))
            return down.args

        def other(part: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return part.reshape(output.shape).to(output)

        for some in inner.split(anatomy.PROBE):
            filled = nn.functional.pad(some, (0, 0, 0, anatomy.PROBE - len(some)))
            with ExitStack() as hooks:
                for call, part in zip(feeding, filled.split([len(weight) for weight, _ in linear(0)], -1), strict=True):
                    hooks.callback(call.module.register_forward_hook(partial(other, part)).remove)
                hooks.callback(module.register_forward_pre_hook(see).remove)
                anatomy._again(parent, cast(Tensor, parent.input))
        return torch.cat(seen)[: len(inner)]

    if not feeding:
        return "activations that no linear map beside their down projection feeds"
    linear = _linears(*(call.module for call in feeding))
    expected = {0: (slice(None), cast(Tensor, down.input))}
    return _ffn_reader(layer, streams, feeding[0], linear, activate, expected)


def _experts_reader(layer: Call, streams: Sequence[Tensor], experts: nn.Module) -> Reader | str:
    call, module = next(call for call in layer.all() if call.module is experts), cast(Any, experts)
    name = "gate_up_proj" if module.has_gate else "up_proj"

    def linear(unit: int) -> Sequence[Linear]:
        with weights_of(experts):
            weight = getattr(module, name)[unit]
            bias = getattr(module, f"{name}_bias")[unit] if module.has_bias else None
            return [(weight.T if module.is_transposed else weight, bias)]

    hidden, ids, _ = (x.flatten(0, -2) for x in experts_arguments(experts, call.args, call.kwargs))
    acts = expert_activations(experts, hidden, ids)
    expected = {unit: ((ids == unit).any(1), acts[ids == unit]) for unit in ids.unique().tolist()}
    activate = module._apply_gate if module.has_gate else module.act_fn
    return _ffn_reader(layer, streams, call, linear, activate, expected)


def _ffn_reader(
    layer: Call,
    streams: Sequence[Tensor],
    source: Call,
    linear: Callable[[int], Sequence[Linear]],
    activate: Callable[[Tensor], Tensor],
    expected: Mapping[int, tuple[Any, Tensor]],
) -> Reader | str:
    """A reader that gives, from the stream alone, what is expected: (tokens, their activations) of some units."""
    rows = _feeding(activate, sum(len(weight) for weight, _ in linear(next(iter(expected)))))
    reader = rows if isinstance(rows, str) else _reader(layer, streams, source, linear, rows, activate)
    if isinstance(reader, str):
        return reader
    x = reader.read(streams[reader.middle])
    for unit, (tokens, acts) in expected.items():
        inner = [x @ weight.T.float() + (0 if bias is None else bias.float()) for weight, bias in linear(unit)]
        if not _close(activate(torch.cat(inner, -1))[tokens], acts):
            return "activations that its pre-activations do not give"
    return reader


def _reader(
    layer: Call,
    streams: Sequence[Tensor],
    source: Call,
    linear: Callable[[int], Sequence[Linear]],
    rows: Int[Tensor, "_ width"],
    activate: Callable[[Tensor], Tensor] | None = None,
    pattern: nn.Module | None = None,
) -> Reader | str:
    """A reader, if its source reads the stream or a norm of it."""
    same = anatomy._same
    for middle, stream in enumerate(streams):
        norms = [anatomy._norm(c) for c in layer.all() if same(c.input, stream) and same(c.output, source.input)]
        norm = next((norm for norm in norms if norm is not None), None)
        if norm is not None or same(source.input, stream):
            return Reader(norm, bool(middle), linear, rows, activate, pattern)
    return "linear maps that do not read a norm of the residual stream"


def _feeding(activate: Callable[[Tensor], Tensor], inner: int) -> Int[Tensor, "factors width"] | str:
    """Which pre-activations feed each neuron: asked by gradients of all activations, each weighted by 1 or 2.

    The weights are the bits of the neurons' numbers, one at a time, which half precision does not round.
    """
    x = torch.rand(anatomy.PROBE, inner, generator=torch.Generator().manual_seed(0)) + 0.1
    x[1::2] *= -1
    with torch.enable_grad():
        acts = activate(x.requires_grad_())
        if not acts.requires_grad:
            return "activations that no linear map beside their down projection feeds"
        number = torch.arange(acts.shape[1])
        weights = [torch.ones_like(number), *(1 + (number >> bit) % 2 for bit in range(len(number).bit_length()))]
        whole, *weighted = (torch.autograd.grad((acts * w).sum(), x, retain_graph=True)[0] for w in weights)
    used = whole.abs().sum(0).nonzero()[:, 0]
    ratios = torch.stack([part.abs().sum(0) for part in weighted])[:, used] / whole.abs().sum(0)[used]
    bits = (ratios > 1.5).long()
    neuron = (bits << torch.arange(len(bits)).unsqueeze(1)).sum(0)
    counts = neuron.bincount(minlength=len(number))
    if (ratios - 1 - bits).abs().max() > 0.1 or len(counts) > len(number) or counts.unique().tolist() not in ([1], [2]):
        return "activations that are not each a function of one or two pre-activations"
    rows = used[neuron.argsort(stable=True)].view(len(number), -1).T
    # Proportional to one of them (Euler): x da/dx = a.
    left = ((x * whole)[:, rows] - acts.unsqueeze(1)).abs().amax(0)
    if len(rows) == 2 and (left.amin(0) > 0.05 * acts.abs().max()).any():
        return "activations that are no product of a pre-activation and a function of another one"
    return rows


def _embedding_factor(model: PreTrainedModel, root: Call, first: Call) -> float | None:
    """By what the tokens' embedding is multiplied in the sum that enters the first layer; None if it is no such sum."""
    own = next(call for call in root.all() if call.module is model.get_input_embeddings())
    parent = next(call for call in root.all() if first in call.inside)
    # Not what only hands the sum on, like dropout.
    others = [
        call for call in parent.inside[: parent.inside.index(first)] if not anatomy._same(call.output, first.input)
    ]
    numbers = sorted({1.0, *anatomy._numbers(model.config.get_text_config().to_dict())})
    terms = anatomy._sum(cast(Tensor, first.input), [own, *others], numbers) or []
    return next((term.factor for term in terms if term.call is own and term.gate is None), None)


def _chosen(table: pd.DataFrame, block: str, n_values: int, readers: Readers) -> pd.DataFrame:
    """The value neurons that have a reader: prompt_id, block, layer, unit, neuron, lpi."""
    types = {**dict.fromkeys(("prompt_id", "layer", "unit", "neuron"), "int64"), "lpi": "float32"}
    found = table[table["lpi"] > 0].groupby("prompt_id", sort=False).head(n_values)
    found = found.rename(columns={UNIT[block]: "unit"})[[*types]].astype(types).assign(block=block)
    known = [(layer, block, min(unit, 0)) in readers for layer, unit in zip(found["layer"], found["unit"], strict=True)]
    return found[np.array(known, dtype=bool)]


def _queries(
    model: PreTrainedModel,
    parts: Anatomy,
    readers: Readers,
    factor: float | None,
    ids: Int[Tensor, "b length"],
    values: pd.DataFrame,
    n_neurons: int,
) -> pd.DataFrame:
    """`queries` of a batch, with row in place of prompt_id; so have `values`."""
    found, seen = _record(model, parts, readers, ids)
    b, length = ids.shape
    start, row = found["0.resid_pre"].float(), torch.arange(b)
    # Of the value neurons above, by block: the sum of LPI / activation x key, and of LPI x share of the biases.
    keys, rest = torch.zeros(2, b, length, start.shape[1]), torch.zeros(2, b)
    units, neurons = list[Scored](), list[Scored]()
    for layer in reversed(parts.layers):
        here = capture.of_layer(found, layer)
        own = values[values["layer"] == layer.index]
        for block, middle in (("ffn", True), ("attention", False)):
            units += _unit_scores(layer, here, block, keys)
            neurons += _neuron_scores(layer, here, block, keys, n_neurons)
            if block == "attention" and layer.n_heads:
                rest += _inner(keys, attention_output(layer, here) - head_contributions(layer, here).sum(1))
            for side, rows, key, bias in _value_keys(readers, middle, here, (b, length), seen.get(layer.index), own):
                keys[side].index_add_(0, rows, key)
                rest[side].index_add_(0, rows, bias)
    embedding = start if factor is None else seen["embedding"].float() * factor
    none, no_neuron = torch.full_like(row, NO_UNIT), torch.full_like(row, -1)
    units.append(("embedding", -1, none, no_neuron, row, _inner(keys, embedding)))
    units.append(("rest", -1, none, no_neuron, row, rest + _inner(keys, start - embedding)))
    every, best = _frame(units), _frame(neurons)
    # Of the weights, as in capture.verify: some models keep their residual stream in float32 whatever they are cast to.
    _check_sums(every, values, capture.TOLERANCE[cast(Tensor, parts.unembedding.weight).dtype])
    order = best[list(SCORES)].sum(axis=1).sort_values(ascending=False, kind="stable").index
    return pd.concat([every, best.loc[order].groupby(["row", "level"]).head(n_neurons)], ignore_index=True)


def _record(
    model: PreTrainedModel, parts: Anatomy, readers: Readers, ids: Int[Tensor, "b length"]
) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
    """All parts at every position; and the embedding, and by layer the attention weights of the readout position."""
    seen: dict[Any, Tensor] = {}

    def see_pattern(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        seen[layer] = _pattern(output, ids.shape[1])[:, :, -1].float().cpu()

    with ExitStack() as hooks:
        embedding = cast(nn.Module, model.get_input_embeddings())
        hooks.enter_context(capture.on_output(embedding, lambda x: seen.update(embedding=x.flatten(0, 1).cpu())))
        for (layer, *_), reader in readers.items():
            if reader.pattern is not None:
                hooks.callback(reader.pattern.register_forward_hook(partial(see_pattern, layer)).remove)
        found, _ = capture.record(model, parts, ids, every_position=True)
    return {name: tensor.cpu() for name, tensor in found.items()}, seen


def _unit_scores(layer: Layer, here: Mapping[str, Tensor], block: str, keys: Tensor) -> Iterator[Scored]:
    """Scores of the units of a block that each prompt uses at any position."""
    b = keys.shape[1]
    for ids, vectors in _components(layer, here, block):
        unit, place = ids.unique(return_inverse=True)
        place = place.view(b, -1)
        scores = torch.einsum("vnd,nsd->vns", keys.flatten(1, 2), vectors.float()).reshape(2, b, -1)
        total = torch.zeros(2, b, len(unit)).scatter_add_(2, place.expand(2, -1, -1), scores)
        row, at = torch.zeros(b, len(unit)).scatter_(1, place, 1.0).nonzero(as_tuple=True)
        yield UNIT[block], layer.index, unit[at], torch.full_like(row, -1), row, total[:, row, at]


def _components(layer: Layer, here: Mapping[str, Tensor], block: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(units [n s], what they add to the residual stream [n s d_model]) of a block; biases of heads are left out."""
    n = len(here["resid_pre"])
    if block == "attention" and layer.n_heads:
        yield torch.arange(layer.n_heads).expand(n, -1), head_contributions(layer, here)
    elif block == "attention" and layer.attention is not None:
        yield torch.full((n, 1), NO_UNIT), attention_output(layer, here).unsqueeze(1)
    elif block == "ffn" and layer.experts is not None:
        yield here["expert_ids"].long(), expert_contributions(layer, here)
        for i in range(len(layer.shared)):
            yield torch.full((n, 1), -1 - i), shared_contribution(layer, here, i).unsqueeze(1)
    elif block == "ffn" and (layer.dense or layer.whole_ffn):
        yield torch.full((n, 1), 0 if layer.dense else NO_UNIT), ffn_output(layer, here).unsqueeze(1)


def _neuron_scores(
    layer: Layer, here: Mapping[str, Tensor], block: str, keys: Tensor, n_neurons: int
) -> Iterator[Scored]:
    """The largest scores of the neurons of each unit that are not 0."""
    neurons = (ffn_neurons if block == "ffn" else attention_neurons)(layer, here)
    _, b, length, _ = keys.shape
    if neurons is None:
        return
    for unit in neurons.units.unique().tolist():
        row, slot = (neurons.units == unit).nonzero(as_tuple=True)
        columns = neurons.columns(unit)
        place = torch.tensor(neurons.starts)[slot].unsqueeze(1) + torch.arange(len(columns))
        scores = keys.flatten(1, 2)[:, row] @ columns.T * neurons.activations[row.unsqueeze(1), place]
        total = torch.zeros(2, b, len(columns)).index_add_(1, row // length, scores)
        best = total.sum(0).topk(min(n_neurons, len(columns)))
        row, at = best.values.nonzero(as_tuple=True)
        neuron = best.indices[row, at]
        yield f"{UNIT[block]}_neuron", layer.index, torch.full_like(row, unit), neuron, row, total[:, row, neuron]


def _value_keys(
    readers: Readers,
    middle: bool,
    here: Mapping[str, Tensor],
    shape: tuple[int, int],
    pattern: Float[Tensor, "b heads length"] | None,
    values: pd.DataFrame,
) -> Iterator[tuple[int, Int[Tensor, " n"], Float[Tensor, "n length d_model"], Float[Tensor, " n"]]]:
    """Of the value neurons of a layer that read the stream before its FFN (`middle`) or before attention.

    Unit by unit: the number of their block, the rows of their prompts, LPI / activation x key in coordinates of the
    residual stream, and LPI x share of the biases.
    """
    stream = here["resid_mid" if middle else "resid_pre"].unflatten(0, shape).float()
    for (layer, block, unit), own in values.groupby(["layer", "block", "unit"]):
        reader = readers[layer, block, min(unit, 0)]
        if reader.middle != middle:
            continue
        row, neuron, lpi = (torch.tensor(own[name].to_numpy()) for name in ("row", "neuron", "lpi"))
        if block == "ffn":
            index, weight = reader.rows[:, neuron], torch.zeros(len(row), shape[1])
            weight[:, -1] = 1
        else:
            index, weight = reader.rows[unit, neuron].unsqueeze(0), cast(Tensor, pattern)[row, int(unit)]
        linears = reader.linear(int(unit))
        directions, bias = _rows_of(linears, index)
        scale = weight
        if norm := reader.norm:
            bias = bias + directions @ norm.bias.float()
            directions = directions * norm.gain.float()
            directions = directions - directions.mean(-1, keepdim=True) if norm.centred else directions
            scale = weight * norm.scale(stream[row])
        bias = bias * weight.sum(1)
        inner = torch.einsum("fnd,ntd,nt->fn", directions, stream[row], scale) + bias
        activation = inner[0]
        if reader.activate is not None:
            every = torch.zeros(shape[0], sum(len(weight) for weight, _ in linears))
            every[row, index] = inner
            activation = reader.activate(every)[row, neuron]
        # Rounding can choose other experts than in the run that the values are from: such a one recorded nothing.
        recorded = _recorded(here, block, unit, shape)
        known = ~recorded[row, neuron].isnan()
        if not _close(activation[known], recorded[row, neuron][known], recorded.nan_to_num().abs().max()):
            raise AnatomyError(f"{_name(layer, block, unit)}: keys do not give the activations of its value neurons")
        share = lpi / len(index) / inner
        key = torch.einsum("fn,fnd,nt->ntd", share, directions, scale)
        yield [*UNIT].index(block), row, key, (share * bias).sum(0)


def _recorded(here: Mapping[str, Tensor], block: str, unit: int, shape: tuple[int, int]) -> Float[Tensor, "b width"]:
    """The activations of a unit's neurons at the readout position; NaN in prompts that do not use it."""
    last = {name: tensor.unflatten(0, shape)[:, -1] for name, tensor in here.items()}
    if block == "attention":
        return last["head_in"][:, unit]
    if unit < 0 or "acts" in last:
        return last["acts" if unit == 0 else f"shared.{-1 - unit}.acts"]
    used = last["expert_ids"] == unit
    acts = last["expert_acts"][torch.arange(len(used)), used.int().argmax(1)]
    return acts.where(used.any(1, keepdim=True), torch.nan)


def _rows_of(linears: Sequence[Linear], index: Int[Tensor, "*n"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n"]]:
    """These rows of linear maps, end to end, and their biases, in float32."""
    weights, biases, first = index.new_zeros(*index.shape, linears[0][0].shape[1]).float(), torch.zeros(index.shape), 0
    for weight, bias in linears:
        own = (index >= first) & (index < first + len(weight))
        weights[own] = weight[index[own] - first].float()
        if bias is not None:
            biases[own] = bias[index[own] - first].float()
        first += len(weight)
    return weights, biases


def _inner(keys: Float[Tensor, "2 b length d_model"], vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "2 b"]:
    """Inner products summed over positions."""
    return torch.einsum("vbtd,btd->vb", keys, vectors.float().unflatten(0, keys.shape[1:3]))


def _check_sums(units: pd.DataFrame, values: pd.DataFrame, limit: float) -> None:
    """Raises AnatomyError unless the scores add up to the LPI of the value neurons, relative to the scores' sizes."""
    scores = units.set_index("row")[list(SCORES)].astype("float64")
    total, size = scores.groupby("row").sum(), scores.abs().groupby("row").sum()
    lpi = values.groupby(["row", "block"])["lpi"].sum().unstack().reindex(index=total.index, columns=[*UNIT]).fillna(0)
    error = (np.abs(total.to_numpy() - lpi.to_numpy()) / size.clip(1e-30).to_numpy()).max()
    if not error <= limit:
        raise AnatomyError(f"query scores do not add up to LPI: relative error {error:.2e}, allowed {limit:.0e}")


def _frame(scored: Sequence[Scored]) -> pd.DataFrame:
    level, layer, *columns = zip(*scored, strict=True)
    unit, neuron, row = (torch.cat(column).numpy() for column in columns[:3])
    counts = [len(rows) for rows in columns[2]]
    scores = dict(zip(SCORES, torch.cat(columns[3], 1).numpy(), strict=True))
    names = {"level": np.repeat(level, counts), "layer": np.repeat(layer, counts), "unit": unit, "neuron": neuron}
    return pd.DataFrame({"row": row} | names | scores)


def _linears(*modules: nn.Module) -> Callable[[int], Sequence[Linear]]:
    """Linear maps that are the same for all units."""

    def linear(unit: int) -> Sequence[Linear]:
        with weights_of(*modules):
            return [(weight_of(module), cast("Tensor | None", getattr(module, "bias", None))) for module in modules]

    return linear


def _pattern(output: Any, length: int) -> Float[Tensor, "b heads length length"]:
    """The attention weights among a module's outputs."""
    outputs = output if isinstance(output, tuple) else (output,)
    return next(x for x in outputs if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2:] == (length, length))


def _close(found: Tensor, expected: Tensor, size: Tensor | None = None) -> bool:
    """Whether all entries agree, relative to `size`, or else the largest one."""
    size = expected.abs().max() if size is None else size
    return bool(((found.float() - expected.float()).abs() <= capture.TOLERANCE[expected.dtype] * size.float()).all())


def _name(layer: int, block: str, unit: int) -> str:
    """What a part whose neurons are read is called in sentences."""
    part = "attention" if block == "attention" else f"shared expert {-1 - unit}" if unit else "FFN"
    return f"layer {layer}, {part}"

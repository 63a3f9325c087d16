"""Key neurons: those that a sample's response uses most, whose union is the Model Utilization Index (MUI).

A sample is a prompt with its response. All response tokens are read in one forward pass over prompt and response:
token y at position t at position t - 1, and its neurons are those of that position. Formulas: method.md, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pyroaring import BitMap
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope import capture
from moescope.models import (
    MAX_LOGITS,
    Anatomy,
    AnatomyError,
    Layer,
    Norm,
    expert_activations,
    experts_arguments,
    weights_of,
)
from moescope.neurons import Block, Unit, ffn_neurons, ffn_units
from moescope.samples import responses

SCORES = ("unembedding", "normed", "activation")
THRESHOLDS = ("model", "layer", "score")


@dataclass(frozen=True)
class Piece:
    """Tokens of a sample that run forward, and the response tokens that are read at the last of their positions."""

    sample: int
    token_ids: list[int]
    targets: list[int]


def units(parts: Anatomy) -> pd.DataFrame:
    """How the FFN neurons of a model are numbered: neuron j of a unit has the id first + j.

    Columns layer, expert (int16; routed experts from 0, shared expert i is -1 - i, a dense FFN is 0), first and width
    (int32), in the order of layers and of neurons.ffn_units. An FFN that is one component has no neurons and no row;
    raises AnatomyError for a model that has no other.
    """
    names = [(layer.index, unit, part.width) for layer in parts.layers for unit, part in ffn_units(layer).items()]
    if not names:
        why = next((layer.whole for layer in parts.layers if layer.whole), "there is none")
        raise AnatomyError(
            f"no FFN can be taken apart into neurons: {why}; this model has no key neurons, leave it out"
        )
    table = pd.DataFrame(names, columns=["layer", "expert", "width"])
    table.insert(2, "first", table["width"].cumsum() - table["width"])
    return table.astype({"layer": "int16", "expert": "int16", "first": "int32", "width": "int32"})


@torch.no_grad()
def find(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    batch_size: int,
    score: str = "unembedding",
    threshold: str = "model",
    share: float = 0.001,
    held: int = MAX_LOGITS,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The key neurons of every sample, united over its response tokens, and the units that these tokens used.

    `prompts` has the columns prompt_id, token_ids and those of samples.responses; `score` is that of `scores`,
    `threshold` and `share` those of `key_mask`. Returns two tables, sorted by prompt_id (int32):

    - key_neurons: tokens (int16: response tokens), keys (bytes: BitMap.serialize() of ids, see `units`);
    - expert_tokens: layer, expert, tokens (int16: response tokens that used the unit; no row where none did).

    Samples of similar length share a batch, padded on the right. There is no mask, and the result is exact: a causal
    model looks back only, and its FFNs work by position, so nothing reaches a position from the padding behind it.
    Beside these tables and the forward pass itself, memory grows with neither samples nor response length: a batch
    has at most `batch_size` samples, its response tokens use at most `held` neurons at once, and a response that uses
    more runs forward once for each piece of it. The order of rows changes no bit; `batch_size` and `held` change the
    rounding of scores, and so at most which of nearly equal ones comes first. Raises ValueError for a sample without
    prompt or response tokens, and for another `score` or `threshold`.
    """
    for name, value, known in (("score", score, SCORES), ("threshold", threshold, THRESHOLDS)):
        if value not in known:
            raise ValueError(f"{name}='{value}': not a way to find key neurons; use one of {', '.join(known)}")
    numbering = units(parts)
    sizes = numbering.groupby("layer")["width"].sum()
    number = {layer: _by_unit(rows) for layer, rows in numbering.reset_index().groupby("layer")}
    first = numbering["first"].to_numpy()
    rows = zip(prompts["prompt_id"], prompts["token_ids"], responses(prompts), strict=True)
    samples = sorted(rows, key=itemgetter(0))
    for prompt_id, prompt, response in samples:
        if not len(prompt) or not response:
            raise ValueError(f"sample {prompt_id} has no {'response' if len(prompt) else 'prompt'} token; leave it out")
    one_token = _neurons(model, parts, _pieces(samples[:1], 1)[-1:])[0]
    longest = max(1, held // sum(block.activations.shape[1] for block in one_token))
    keys, counts = [BitMap() for _ in samples], np.zeros((len(samples), len(numbering)), dtype=np.int16)
    for batch in _batches(_pieces(samples, longest), batch_size, longest):
        blocks, scale = _neurons(model, parts, batch)
        targets = torch.tensor([token for piece in batch for token in piece.targets], device=scale.device)
        of_neurons = scores(parts, blocks, targets, scale, score)
        masks = key_mask(of_neurons, [int(sizes[block.layer]) for block in blocks], threshold, share)
        ends = np.cumsum([len(piece.targets) for piece in batch])
        owner = np.repeat([piece.sample for piece in batch], np.diff(ends, prepend=0))
        for block, mask in zip(blocks, masks, strict=True):
            np.add.at(counts, (owner[:, None], number[block.layer][block.units.cpu()]), 1)
            row, place = mask.cpu().nonzero(as_tuple=True)
            unit, neuron = (part.cpu().numpy() for part in block.names(row, place))
            ids = (first[number[block.layer][unit]] + neuron).astype("uint32")
            for piece, own in zip(batch, np.split(ids, np.searchsorted(row.numpy(), ends[:-1])), strict=True):
                keys[piece.sample] |= BitMap(own)
    prompt_id = np.array([sample[0] for sample in samples], dtype=np.int32)
    tokens = np.array([len(sample[2]) for sample in samples], dtype=np.int16)
    key_neurons = pd.DataFrame({"prompt_id": prompt_id, "tokens": tokens, "keys": [own.serialize() for own in keys]})
    sample, used = counts.nonzero()
    expert_tokens = numbering[["layer", "expert"]].iloc[used].assign(tokens=counts[sample, used])
    expert_tokens.insert(0, "prompt_id", prompt_id[sample])
    return key_neurons, expert_tokens.reset_index(drop=True)


def scores(
    parts: Anatomy,
    blocks: Sequence[Block],
    targets: Int[Tensor, " n"],
    norm_scale: Float[Tensor, " n"],
    score: str = "unembedding",
) -> list[Float[Tensor, "n m"]]:
    """How much each neuron of each block does for the response token of its row, g a_k the block's activations.

    - `unembedding`: g a_k (W_down[:, k] . W_U[y]), MUI eq. 2, with the unembedding's rows as they are; where a
      post-norm follows, W_down[:, k] and g are what reaches the residual stream (its gain and scale folded in);
    - `normed`: the same through the final norm at the fixed scale of the row's final state (`norm_scale`), its gain,
      centring and the logit scale: the neuron's exact direct effect on the logit of y, before a cap on logits, which
      is monotone and acts on the sum of all effects;
    - `activation`: |g a_k| times the norm of W_down[:, k], whatever y is.

    Of W_U only the rows of `targets` are read. Scores are float32.
    """
    if score == "activation":
        vectors = torch.ones_like(norm_scale).unsqueeze(1)
        blocks = [replace(b, activations=b.activations.abs(), parts=_sizes(b.parts)) for b in blocks]
    else:
        with weights_of(parts.unembedding):
            vectors = cast(Tensor, parts.unembedding.weight)[targets].float()
    if score == "normed":
        vectors = vectors * parts.final_norm.gain.float() * (norm_scale * parts.logit_scale).unsqueeze(1)
        vectors = vectors - vectors.mean(1, keepdim=True) if parts.final_norm.centred else vectors
    return [block.products(vectors.to(block.activations.device)) for block in blocks]


def key_mask(
    scores: Sequence[Float[Tensor, "n m"]], neurons: Sequence[int], threshold: str = "model", share: float = 0.001
) -> list[Bool[Tensor, "n m"]]:
    """Which neurons are key, response token by response token, from the scores of those it uses, layer by layer.

    `neurons` counts all neurons of each layer, used or not. Key are

    - `model`: the max(1, round(share * neurons of all layers)) with the largest scores;
    - `layer`: the same within each layer;
    - `score`: the fewest whose scores add up to `share` of the sum of the token's positive scores;

    but only neurons with a positive score: fewer where the token uses fewer. Of equal scores the earlier place wins,
    which in the blocks of `find` has the lower id.
    """
    if threshold == "layer":
        return [key_mask([own], [count], "model", share)[0] for own, count in zip(scores, neurons, strict=True)]
    together = torch.cat([own.to(scores[0].device) for own in scores], 1)
    if threshold == "score":
        sums = together.clamp_min(0).double().sort(1, descending=True).values.cumsum(1)
        count = 1 + (sums < share * sums[:, -1:]).sum(1)
    else:
        count = torch.full((len(together),), max(1, round(share * sum(neurons))), device=together.device)
    mask = _largest(together, count.clamp_max(together.shape[1])) & (together > 0)
    return list(mask.split([own.shape[1] for own in scores], 1))


def _largest(x: Float[Tensor, "n m"], count: Int[Tensor, " n"]) -> Bool[Tensor, "n m"]:
    """The `count` largest of each row; of equal ones the first."""
    last = x.topk(int(count.max()), 1).values.gather(1, count.unsqueeze(1) - 1)
    above, equal = x > last, x == last
    return above | (equal & (equal.cumsum(1) <= count.unsqueeze(1) - above.sum(1, keepdim=True)))


def _sizes(parts: Mapping[int, Unit]) -> dict[int, Unit]:
    """The same units with the norms of their columns in place of the columns."""

    def norms(part: Unit) -> Float[Tensor, "width 1"]:
        return part.columns().norm(dim=1, keepdim=True)

    return {unit: Unit(part.width, partial(norms, part)) for unit, part in parts.items()}


def _by_unit(numbering: pd.DataFrame) -> Int[np.ndarray, " units"]:
    """The rows of a layer's units in `units`, to be indexed with the unit; shared ones, negative, stand at the end."""
    rows = np.empty(len(numbering), dtype=np.int64)
    rows[numbering["expert"]] = numbering["index"]
    return rows


def _pieces(samples: Iterable[tuple[int, Sequence[int], list[int]]], longest: int) -> list[Piece]:
    """What runs forward, longest first: (prompt_id, prompt, response), in pieces of at most `longest` targets."""
    pieces = []
    for number, (_, prompt, response) in enumerate(samples):
        tokens = [*map(int, prompt), *response]
        for start in range(0, len(response), longest):
            targets = response[start : start + longest]
            pieces.append(Piece(number, tokens[: len(prompt) + start + len(targets) - 1], targets))
    # Later batches then fit into the memory that earlier ones free.
    return sorted(pieces, key=lambda piece: (-len(piece.token_ids), piece.sample))


def _batches(pieces: Sequence[Piece], batch_size: int, longest: int) -> Iterator[list[Piece]]:
    """The pieces in their order, at most `batch_size` and `longest` targets at a time."""
    batch = list[Piece]()
    for piece in pieces:
        if len(batch) == batch_size or sum(len(one.targets) for one in (*batch, piece)) > longest:
            yield batch
            batch = []
        batch.append(piece)
    yield batch


def _neurons(model: PreTrainedModel, parts: Anatomy, batch: Sequence[Piece]) -> tuple[list[Block], Float[Tensor, " n"]]:
    """The FFN neurons of every layer and the final norm's scale, at the n positions where targets are read.

    The slots of a block are in the order of neuron ids: sorted by expert, shared ones last.
    """
    width = max(len(piece.token_ids) for piece in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    read = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, piece in enumerate(batch):
        end = len(piece.token_ids)
        ids[row, :end] = torch.tensor(piece.token_ids)
        read[row, end - len(piece.targets) : end] = True
    position = read.flatten().nonzero()[:, 0]

    def take(x: Tensor) -> Tensor:
        return x.flatten(0, -2)[position.to(x.device)]

    found: list[dict[str, Tensor]] = [{} for _ in parts.layers]
    final = list[Tensor]()
    with ExitStack() as hooks:
        for layer, here in zip(parts.layers, found, strict=True):
            _tap(layer, here, take, hooks)
        norm = parts.final_norm
        hooks.enter_context(capture.on_input(norm.module, lambda x: final.append(norm.scale(take(x)))))
        capture.readout_logits(model, ids.to(capture.input_device(model)))
    blocks = [ffn_neurons(layer, here) for layer, here in zip(parts.layers, found, strict=True)]
    return [block for block in blocks if block is not None], final[-1]


def _tap(layer: Layer, here: dict[str, Tensor], take: Callable[[Tensor], Tensor], hooks: ExitStack) -> None:
    """Put what neurons.ffn_neurons reads of a layer into `here`, at the positions that `take` takes."""

    def experts_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, ids, weights = (take(x) for x in experts_arguments(module, args, kwargs))
        here["expert_ids"], order = ids.long().sort(1)
        here["expert_weights"] = weights.gather(1, order)
        here["expert_acts"] = expert_activations(module, hidden, here["expert_ids"])

    def acts(name: str, x: Tensor) -> None:
        here[f"{name}acts"] = take(x)
        here.setdefault(f"{name}gate", x.new_ones(1))

    def gate(name: str, x: Tensor) -> None:
        here[name] = take(x).sigmoid().squeeze(1)

    def scale(name: str, norm: Norm, x: Tensor) -> None:
        here[name] = norm.scale(take(x)) * here.get(name, 1.0)

    if layer.experts is not None:
        handle = layer.experts.module.register_forward_pre_hook(experts_input, with_kwargs=True)
        hooks.callback(handle.remove)
    if layer.dense is not None:
        hooks.enter_context(capture.on_input(layer.dense.down, partial(acts, "")))
    for i, shared in enumerate(layer.shared):
        hooks.enter_context(capture.on_input(shared.down, partial(acts, f"shared.{i}.")))
        if shared.gate is not None:
            hooks.enter_context(capture.on_output(shared.gate, partial(gate, f"shared.{i}.gate")))
    for name, path in capture.paths(layer):
        for norm in path.norms:
            hooks.enter_context(capture.on_input(norm.module, partial(scale, name, norm)))

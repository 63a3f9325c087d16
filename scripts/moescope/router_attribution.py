"""Who steers the router: its logits split over all that was written below it, and heads that go with experts.

Both come from the activation cache and the weights (method.md, section 4); no prompt runs through the model again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from moescope import anatomy
from moescope.activations import Activations, opened
from moescope.anatomy import Call
from moescope.capture import TOLERANCE
from moescope.lens import MAX_LOGITS
from moescope.models import (
    Anatomy,
    Layer,
    Norm,
    attention_output,
    expert_contributions,
    ffn_output,
    gate_probabilities,
    head_contributions,
    shared_contribution,
    weights_of,
)

SPLIT = {"prompt_id": "int32", "router_layer": "int16", "source": "str", "layer": "int16", "unit": "int16"} | {
    "logit": "float32"
}
ASSOCIATIONS = (
    dict.fromkeys(("layer", "head", "expert_layer", "expert"), "int16")
    | {"what": "str"}
    | dict.fromkeys(("r", "p", "q", "r_within", "p_within", "q_within", "r_chance", "r_chance_within"), "float32")
    | {"prompts": "int32"}
)
TIE = 1e-6
"""Correlations that differ by less are equal: what float32 leaves of a sum over prompts."""


@dataclass(frozen=True)
class Reading:
    """How the router of a layer reads the residual stream: logits = weight @ (scale * stream) + constant, in float32.

    Read is the stream before the FFN if `middle`, else that before the layer, through `norm` if there is one, whose
    gain and centring are folded into `weight`; `constant` is the router's bias and what it makes of the norm's.
    """

    layer: int
    middle: bool
    norm: Norm | None
    weight: Float[Tensor, "experts d_model"]
    constant: Float[Tensor, " experts"]

    @staticmethod
    def of(layer: int, middle: bool, norm: Norm | None, weight: Tensor, bias: Tensor) -> Reading:
        """A router with this weight and bias."""
        if norm is None:
            return Reading(layer, middle, norm, weight, bias)
        folded = weight * norm.gain.float()
        folded = folded - folded.mean(1, keepdim=True) if norm.centred else folded
        return Reading(layer, middle, norm, folded, bias + weight @ norm.bias.float())

    def logits(
        self, stream: Float[Tensor, "n d_model"], vectors: Float[Tensor, "n d_model"] | None = None
    ) -> Float[Tensor, "n experts"]:
        """The router's logits at states of the stream; or at `vectors`, read with the scales of those states."""
        vectors = stream.float() if vectors is None else vectors
        return (vectors * self.scale(stream)) @ self.weight.T + self.constant

    def scale(self, stream: Float[Tensor, "n d_model"]) -> Float[Tensor, "n 1"]:
        """What the norm multiplies states of the stream with, beside its gain."""
        return torch.ones(len(stream), 1).to(stream) if self.norm is None else self.norm.scale(stream).unsqueeze(1)

    def stream(self, here: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, "n d_model"]:
        """What is read, of the tensors of each layer in the cache."""
        return here[self.layer]["resid_mid" if self.middle else "resid_pre"]

    def sees(self, source: Source) -> bool:
        """Whether a source was written to the stream that is read."""
        return source.layer < self.layer or (source.layer == self.layer and self.middle and source.attends)


@dataclass(frozen=True)
class Source:
    """What some units of one kind in one layer (-1: the embedding) add to the residual stream.

    Kinds: `embedding` (what enters the first layer), `head`, `attention` (a block that is one component, or the bias
    of an output projection), `expert`, `shared`, `ffn` (dense, or one component). `attends` says that it is written
    before the FFN of its layer.
    """

    kind: str
    layer: int
    attends: bool
    units: Int[Tensor, "n units"]
    vectors: Float[Tensor, "n units d_model"]


@torch.no_grad()
def find_readings(model: PreTrainedModel, parts: Anatomy) -> tuple[dict[int, Reading], dict[int, str]]:
    """How the router of each MoE layer reads the residual stream, and why others' routers are not understood.

    Found by watching a forward pass over a few tokens, as in anatomy.find: which norm of the stream, times a weight of
    the router and plus a bias of it, gives the router's logits to capture.TOLERANCE.
    """
    root, _ = anatomy._watch(model)
    calls = {call.module: call for call in root.all()}
    dtype = cast(Tensor, parts.unembedding.weight).dtype
    found = {layer.index: _reading(layer, calls, TOLERANCE[dtype]) for layer in parts.layers if layer.experts}
    readings = {index: reading for index, reading in found.items() if isinstance(reading, Reading)}
    return readings, {index: why for index, why in found.items() if isinstance(why, str)}


def _reading(layer: Layer, calls: Mapping[torch.nn.Module, Call], limit: float) -> Reading | str:
    assert layer.experts is not None
    router = layer.experts.router
    if router is None:
        return "no module gives one for each expert"
    logits = cast(Tensor, calls[router].output).float()
    with weights_of(router):
        own = [parameter.detach().float() for parameter in router.parameters(recurse=False)]
    biases = [torch.zeros_like(logits[0]), *(b for b in own if b.shape == logits[0].shape)]
    for reader in (layer.middle, layer.block):
        if reader is None:
            continue
        stream = cast(Tensor, calls[reader].input)
        norms = [anatomy._norm(call) for call in calls[layer.block].all() if anatomy._same(call.input, stream)]
        weights = [w for w in own if w.shape == (layer.n_experts, stream.shape[1])]
        for norm, weight, bias in product([*norms, None], weights, biases):
            reading = Reading.of(layer.index, reader is layer.middle, norm, weight, bias)
            if _error(reading.logits(stream), logits) <= limit:
                return reading
    return "they are no linear map of the residual stream or of a norm of it"


def _error(found: Float[Tensor, "n experts"], logits: Float[Tensor, "n experts"]) -> float:
    """The largest error relative to the largest logit."""
    return float((found - logits).abs().max() / logits.abs().max().clamp_min(1e-30))


def sources(parts: Anatomy, here: Sequence[Mapping[str, Tensor]]) -> Iterator[Source]:
    """All that is written to the residual stream, in order; `here` are each layer's tensors in the cache."""
    start = here[0]["resid_pre"].float().unsqueeze(1)
    most = max(max(layer.n_heads, 1) for layer in parts.layers)
    number = torch.arange(most, dtype=torch.int16).expand(len(start), -1)
    yield Source("embedding", -1, False, number[:, :1], start)
    for layer, found in zip(parts.layers, here, strict=True):
        heads = head_contributions(layer, found)
        rest = attention_output(layer, found) - heads.sum(1)
        written = [("head", number[:, : layer.n_heads], heads), ("attention", number[:, :1], rest.unsqueeze(1))]
        if layer.experts is None:
            written.append(("ffn", number[:, :1], ffn_output(layer, found).unsqueeze(1)))
        else:
            written.append(("expert", found["expert_ids"], expert_contributions(layer, found)))
        for i in range(len(layer.shared)):
            written.append(("shared", -1 - number[:, :1] - i, shared_contribution(layer, found, i).unsqueeze(1)))
        for kind, units, vectors in written:
            # A projection without a bias, or a layer without the block, writes nothing.
            if vectors.any():
                yield Source(kind, layer.index, kind in ("head", "attention"), units, vectors.float())


@torch.no_grad()
def split(
    reading: Reading, parts: Anatomy, here: Sequence[Mapping[str, Tensor]]
) -> tuple[list[tuple[str, int]], Int[Tensor, "n sources"], Float[Tensor, "n sources experts"]]:
    """Direct router attribution: what each source adds to the logit of each expert (method.md, section 4).

    The norm scale of the router's input is held at that of the prompt. Returns kind and layer of each source (as in
    Source; the last one is `bias`, of the router and of its norm, in the router's layer), its unit in each prompt, and
    float32 logits, whose sum over the sources is the router's logits, to the rounding of the model's dtype.
    """
    scale = reading.scale(reading.stream(here))
    bias = reading.constant.expand(len(scale), 1, -1)
    names, units, logits = [], [], []
    for source in filter(reading.sees, sources(parts, here)):
        names += [(source.kind, source.layer)] * source.units.shape[1]
        units.append(source.units)
        logits.append((source.vectors * scale.unsqueeze(2)) @ reading.weight.T)
    return (
        [*names, ("bias", reading.layer)],
        torch.cat([*units, torch.zeros(len(scale), 1, dtype=torch.int16)], 1),
        torch.cat([*logits, bias], 1),
    )


@torch.no_grad()
def attribute(
    model: PreTrainedModel, parts: Anatomy, activations: Sequence[str | Path], prompts: pd.DataFrame
) -> pd.DataFrame:
    """What pulls each router towards the experts that it chose: `split`, reduced over experts, exact, for all prompts.

    `prompts` gives target_ids by prompt_id; prompts of the cache that it lacks are left out. Columns: prompt_id
    (int32), router_layer (int16), source (a kind of Source, or `bias`, of the router and its norm, where there is any),
    layer (int16: of the source; -1 for the embedding), unit (int16: head or expert, shared expert i is -1 - i; else 0),
    logit (float32: what the source adds to the mean logit of the chosen experts minus the mean logit of all; over
    several answer tokens the mean, 0 for those that do not use the expert).

    A layer where all sources do not sum to the recorded logits, to capture.TOLERANCE of the largest one, has no rows,
    and the log says why.
    """
    readings, reasons = find_readings(model, parts)
    limit = TOLERANCE[cast(Tensor, parts.unembedding.weight).dtype]
    frames = [pd.DataFrame(columns=list(SPLIT))]
    with opened(activations, prompts) as cache:
        widest = max(max(layer.n_heads, 1) for layer in parts.layers) * len(parts.final_norm.gain)
        for rows in cache.chunks(max(1, MAX_LOGITS // widest)) if readings else ():
            here = [cache.layer(layer.index, rows) for layer in parts.layers]
            found, errors = _pulls(readings, parts, here)
            frames += [frame.assign(prompt_id=cache.prompt_id[rows[frame["row"]]])[list(SPLIT)] for frame in found]
            for layer, error in errors.items():
                if not error <= limit:
                    reasons[layer] = f"its sources miss them by {error:.1e} of the largest, allowed {limit:.0e}"
        steps = pd.Series(cache.prompt_id).value_counts()
    for layer, why in reasons.items():
        logging.warning("layer %d: the router's logits are not split: %s", layer, why)
    table = pd.concat([frame.astype(SPLIT) for frame in frames], ignore_index=True)
    table = table[~table["router_layer"].isin(list(reasons))]
    if (steps > 1).any():
        keys = [column for column in SPLIT if column != "logit"]
        table = table.groupby(keys, as_index=False, sort=False)["logit"].sum()
        table["logit"] /= table["prompt_id"].map(steps)
    return table.astype(SPLIT).reset_index(drop=True)


def _pulls(
    readings: Mapping[int, Reading], parts: Anatomy, here: Sequence[Mapping[str, Tensor]]
) -> tuple[list[pd.DataFrame], dict[int, float]]:
    """Rows of `attribute` (`row` in place of prompt_id), and how far all sources are from each router's logits."""
    pulls, totals, frames = dict[int, Tensor](), dict[int, Tensor](), []

    def put(router: int, kind: str, layer: int, units: Tensor, logits: Tensor) -> None:
        row = np.repeat(np.arange(len(units)), units.shape[1])
        columns = {"row": row, "router_layer": router, "source": kind, "layer": layer}
        frames.append(pd.DataFrame(columns | {"unit": units.flatten().numpy(), "logit": logits.flatten().numpy()}))

    for index, reading in readings.items():
        chosen = here[index]["expert_ids"].long()
        towards = reading.weight[chosen].mean(1) - reading.weight.mean(0)
        pulls[index], totals[index] = towards * reading.scale(reading.stream(here)), torch.zeros_like(towards)
        if reading.constant.any():
            bias = reading.constant[chosen].mean(1, keepdim=True) - reading.constant.mean()
            put(index, "bias", index, torch.zeros(bias.shape, dtype=torch.int16), bias)
    for source in sources(parts, here):
        for index, reading in readings.items():
            if reading.sees(source):
                totals[index] += source.vectors.sum(1)
                logits = torch.einsum("nud,nd->nu", source.vectors, pulls[index])
                put(index, source.kind, source.layer, source.units, logits)
    errors = {
        index: _error(reading.logits(reading.stream(here), totals[index]), here[index]["router_logits"].float())
        for index, reading in readings.items()
    }
    return frames, errors


@torch.no_grad()
def associate(
    parts: Anatomy,
    activations: Sequence[str | Path],
    prompts: pd.DataFrame,
    heads: pd.DataFrame,
    experts: pd.DataFrame,
    permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Heads that go with experts (KA; method.md, section 4): Pearson r over prompts, float32.

    A pair is a head and a routed expert of the same or a later layer; r is that between the head's LPI (`heads`) and,
    by `what`, the expert's gate probability at the readout position (`gate`; the mean over answer tokens) or its LPI
    (`lpi`; of `experts`, 0 where a prompt does not use it). r_within is r after the mean of each relation is
    subtracted from both: relations, which differ in heads and in experts, explain no part of it. `prompts` are
    prompt_id, relation, subject, target_ids.

    p = (1 + permutations with |r| at least as large) / (1 + permutations). Prompts about one subject are not
    independent, so its prompts, in order of relation and prompt, move together (whole-block exchangeability: Winkler
    et al. 2015, Multi-level block permutation): the null hypothesis is that subjects with equally many prompts can
    trade the LPIs of their heads (p), or only those with equally many of each relation (p_within). A subject that no
    other one matches stays, which is conservative. q is the Benjamini-Hochberg value among all pairs of a `what`;
    p cannot be smaller than 1 / (1 + permutations), nor q than pairs / (those with the smallest p (1 + permutations)):
    few true pairs among many are not significant, however strong, unless there are many permutations. r_chance is r
    after the first permutation, the random control.

    Columns: layer, head, expert_layer, expert (int16), what (str), r, p, q, r_within, p_within, q_within, r_chance,
    r_chance_within (float32; NaN where a side is the same in all prompts, and left out of q), prompts (int32).
    """
    routed = [layer for layer in parts.layers if layer.experts is not None and layer.experts.router is not None]
    order = prompts.sort_values(["relation", "prompt_id"], ignore_index=True)
    lpi = heads.pivot(index="prompt_id", columns=["layer", "head"], values="lpi")
    if lpi.empty or not routed:
        return pd.DataFrame(columns=list(ASSOCIATIONS)).astype(ASSOCIATIONS)
    with opened(activations, order) as cache:
        sides = {"gate": _gates(cache, routed)}
    used = experts[experts["expert"] >= 0].pivot(index="prompt_id", columns=["layer", "expert"], values="lpi")
    sides["lpi"] = used.reindex(index=order["prompt_id"], columns=sides["gate"].columns).fillna(0)
    lpi = lpi.loc[order["prompt_id"]]
    both = pd.concat([side.loc[lpi.index] for side in sides.values()], axis=1)
    found = dict[str, np.ndarray]()
    for end, within in (("", False), ("_within", True)):
        x, y = (standardised(side, order["relation"] if within else None) for side in (lpi, both))
        r, p, chance = correlations(x, y, exchangeable(order, within), permutations, seed)
        found |= {f"r{end}": r.numpy(), f"p{end}": p.numpy(), f"r_chance{end}": chance.numpy()}
    names = [frame.columns.to_frame(index=False).to_numpy() for frame in (lpi, sides["gate"])]
    head, expert = np.nonzero(names[0][:, :1] <= names[1][:, 0])
    frames = []
    for number, what in enumerate(sides):
        keys = np.hstack([names[0][head], names[1][expert]])
        frame = pd.DataFrame(keys, columns=["layer", "head", "expert_layer", "expert"]).assign(what=what)
        for name, values in found.items():
            frame[name] = values[head, expert + number * len(names[1])]
        for end in ("", "_within"):
            frame[f"q{end}"] = benjamini_hochberg(frame[f"p{end}"].to_numpy())
        frames.append(frame.assign(prompts=len(order)))
    return pd.concat(frames, ignore_index=True)[list(ASSOCIATIONS)].astype(ASSOCIATIONS)


def _gates(cache: Activations, layers: Sequence[Layer]) -> pd.DataFrame:
    """Gate probability of each (layer, expert), a row a prompt: the mean over its answer tokens."""
    frames, rows = [], np.arange(len(cache))
    for layer in layers:
        names = (f"{layer.index}.{name}" for name in ("router_logits", "expert_ids", "expert_weights"))
        gates = gate_probabilities(*(cache.get(name, rows) for name in names))
        columns = pd.MultiIndex.from_product([[layer.index], range(layer.n_experts)], names=["layer", "expert"])
        frames.append(pd.DataFrame(gates.numpy(), pd.Index(cache.prompt_id, name="prompt_id"), columns))
    return pd.concat(frames, axis=1).groupby("prompt_id").mean()


def exchangeable(prompts: pd.DataFrame, within: bool) -> list[Int[np.ndarray, "subjects size"]]:
    """Rows of the prompts of each subject, subjects that can trade places together.

    Those have equally many prompts, or `within`, equally many of each relation.
    """
    rows = prompts.groupby("subject", sort=False).indices.values()
    kind = prompts["relation"].to_numpy() if within else np.zeros(len(prompts))
    alike: dict[tuple[object, ...], list[np.ndarray]] = {}
    for of_subject in rows:
        alike.setdefault(tuple(kind[of_subject]), []).append(of_subject)
    return [np.stack(blocks) for blocks in alike.values()]


def standardised(values: pd.DataFrame, groups: pd.Series | None = None) -> Float[Tensor, "n m"]:
    """Columns with mean 0 (in each group, if there are any) and length 1; NaN where all are equal to rounding."""
    found = values.to_numpy(float)
    keys = np.zeros(len(found)) if groups is None else groups.to_numpy()
    centred = found - pd.DataFrame(found).groupby(keys).transform("mean").to_numpy()
    length = np.linalg.norm(centred, axis=0)
    length[length <= TIE * np.linalg.norm(found, axis=0)] = np.nan
    return torch.tensor(centred / length, dtype=torch.float32)


def correlations(
    x: Float[Tensor, "n a"],
    y: Float[Tensor, "n b"],
    blocks: Sequence[Int[np.ndarray, "subjects size"]],
    permutations: int,
    seed: int,
) -> tuple[Float[Tensor, "a b"], Float[Tensor, "a b"], Float[Tensor, "a b"]]:
    """(r, p, r after the first permutation) of all pairs of standardised columns.

    Permutations trade the rows of x that a block lists together.
    """
    rng = np.random.default_rng(seed)
    r, (n, a) = x.T @ y, x.shape
    at_least, clean = torch.zeros_like(r), (x.nan_to_num(), y.nan_to_num())
    chance = torch.full_like(r, torch.nan)
    step = max(1, MAX_LOGITS // max(r.numel(), x.numel()))
    for start in range(0, permutations, step):
        index = np.empty((min(step, permutations - start), n), dtype=int)
        for row in index:
            for block in blocks:
                row[block] = block[rng.permutation(len(block))]
        permuted = (clean[0][torch.from_numpy(index)].transpose(1, 2).flatten(0, 1) @ clean[1]).unflatten(0, (-1, a))
        at_least += (permuted.abs() >= r.abs() - TIE).sum(0)
        chance = permuted[0] if start == 0 else chance
    p = torch.where(r.isnan(), torch.nan, (1 + at_least) / (1 + permutations))
    return r, p, torch.where(r.isnan(), torch.nan, chance)


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Smallest false discovery rate at which each p is significant: min over p_(j) >= p of p_(j) n / j, at most 1.

    Benjamini & Hochberg 1995. NaN stays NaN and is not counted.
    """
    q, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    scaled = p[order] * (len(order) / np.arange(1, len(order) + 1))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q

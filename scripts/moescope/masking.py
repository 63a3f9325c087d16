"""Masking key neurons and key experts: what breaks, in their own task and in others (method.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pyroaring import BitMap
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from moescope.ablations import matched_draw
from moescope.capture import input_device
from moescope.intervene import Edit, block_experts, block_neurons, intervene
from moescope.models import Anatomy
from moescope.neurons import ffn_units
from moescope.resume import log_probs_and_ranks
from moescope.samples import blocks, in_order
from moescope.summaries import together

SET = ["task", "half", "level", "size", "draw"]
"""What names a set of parts that are masked together."""
MASKING = {"prompt_id": "int32", "level": "str", "task": "str", "size": "int32", "masked": "int32", "draw": "int16"}
MASKING |= {"rank": "int32", "log_prob": "float32"}


@dataclass(frozen=True)
class Batch:
    """Samples side by side: token ids, and of each response token its place among them, flattened, and its sample."""

    ids: Int[Tensor, "b length"]
    place: Int[Tensor, " t"]
    target: Int[Tensor, " t"]
    sample: Int[np.ndarray, " t"]


def choose(
    prompts: pd.DataFrame,
    half: Int[np.ndarray, " n"],
    key_neurons: pd.DataFrame,
    expert_tokens: pd.DataFrame,
    units: pd.DataFrame,
    shares: Sequence[float],
    experts: Sequence[int],
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """The neurons and experts to mask when the prompts of a half are measured, chosen on the other half of each task.

    Samples with a subject that the measured half has too, in whatever task, are not chosen on; a task without others
    has no set. Levels:

    - `neurons`: those that are key in most samples (ties: the lower id), of each share of the model's neurons as many
      as round(share * neurons), at least 1 and at most those that are key at all. Each draw is `matched_neurons`.
    - `experts`: the routed ones that hold a key neuron in most samples (ties: the lower layer, then expert), each
      number that is below that of all routed experts and at most those that hold one at all. Each draw is
      ablations.matched_draw, by the share of response tokens that use an expert. Shared experts have no match.

    `half` is that of each prompt, rows as in `prompts`; the other tables are those of utilization.find. Returns
    masked_units: task (whose keys they are), half (int8, measured), level, size (int32, asked for), draw (int16, -1:
    the keys), layer, expert (int16), neuron (int32, -1 for a whole expert). A control that nothing matches has no row.
    """
    rng = np.random.default_rng(seed)
    keys_of = key_neurons.set_index("prompt_id")
    first, names = units["first"].to_numpy(), units[["layer", "expert"]]
    # The FFN of a dense layer is expert 0, and alone there.
    routed = ((units["expert"] >= 0) & (units.groupby("layer")["expert"].transform("max") > 0)).to_numpy()
    sizes = {max(1, round(share * units["width"].sum())) for share in shares}
    frames = []
    for measured in np.unique(half):
        seen = prompts["subject"].isin(prompts["subject"][half == measured])
        for task, rows in prompts[~seen].groupby("task", sort=True):
            samples = keys_of.loc[rows["prompt_id"]]
            of_neuron, of_unit = _counts(samples["keys"], units)
            used = expert_tokens[expert_tokens["prompt_id"].isin(samples.index)]
            tokens = used.groupby(["layer", "expert"])["tokens"].sum()
            frequency = tokens.reindex(pd.MultiIndex.from_frame(names), fill_value=0) / samples["tokens"].sum()

            best = np.argsort(-of_neuron, kind="stable")[: (of_neuron > 0).sum()]
            for size in sorted(sizes):
                keys = best[:size]
                drawn = [matched_neurons(keys, of_neuron, units, frequency.to_numpy(), rng) for _ in range(draws)]
                of = [(ids, _unit_of(ids, first)) for ids in [keys, *drawn]]
                found = [names.iloc[unit].assign(neuron=ids - first[unit]) for ids, unit in of]
                frames += _numbered(found, task, measured, "neurons", size)

            best = np.argsort(np.where(routed, -of_unit, 1), kind="stable")[: (routed & (of_unit > 0)).sum()]
            for size in sorted({n for n in experts if n < routed.sum() and len(best)}):
                chosen = [(int(layer), int(expert)) for layer, expert in names.iloc[best[:size]].to_numpy()]
                by_layer = frequency[routed].unstack().reindex(range(names["layer"].max() + 1)).to_numpy()
                sets = [chosen, *(matched_draw(chosen, by_layer, rng) for _ in range(draws))]
                found = [pd.DataFrame(each, columns=[*names]).assign(neuron=-1) for each in sets]
                frames += _numbered(found, task, measured, "experts", size)
    types = {"half": "int8", "size": "int32", "draw": "int16", "layer": "int16", "expert": "int16", "neuron": "int32"}
    columns = [*SET, *names, "neuron"]
    return together(frames, " ".join(columns))[columns].astype(types)


def matched_neurons(
    keys: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, " neurons"],
    units: pd.DataFrame,
    frequency: Float[np.ndarray, " units"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " m"]:
    """Ids of as many other neurons as `keys`, each of a unit that a key neuron is of: the same layer and frequency.

    `counts` says in how many samples each neuron is key; those that never are come first. Where a unit has none left,
    the units of its layer give some that have the nearest `frequency` (share of tokens that use them); where the layer
    has none left, there are fewer (m <= n).
    """
    first, width, layer = (units[name].to_numpy() for name in ("first", "width", "layer"))
    free = np.ones(len(counts), dtype=bool)
    free[keys] = False
    drawn = []

    def take(unit: int, n: int) -> int:
        ids = rng.permutation(first[unit] + free[first[unit] : first[unit] + width[unit]].nonzero()[0])
        ids = ids[np.argsort(counts[ids] > 0, kind="stable")][:n]
        free[ids] = False
        drawn.append(ids)
        return n - len(ids)

    used, wanted = np.unique(_unit_of(keys, first), return_counts=True)
    missing = [take(unit, n) for unit, n in zip(used, wanted, strict=True)]
    for unit, n in zip(used, missing, strict=True):
        near = np.flatnonzero(layer == layer[unit])
        for other in near[np.argsort(np.abs(frequency[near] - frequency[unit]), kind="stable")]:
            n = take(other, n) if n else 0
    return np.concatenate([keys[:0], *drawn])


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    half: Int[np.ndarray, " n"],
    masked_units: pd.DataFrame,
    batch_size: int,
) -> pd.DataFrame:
    """Rank and log-probability of every prompt, of all tasks, under every set of its half, at all positions.

    What is masked contributes 0 (intervene.block_neurons, block_experts); routers choose as they then do. Each
    response token is read with the earlier ones before it, all of a sample in one forward pass; samples of one half and
    one of samples.blocks share it. Returns prompt_id (int32), level ("neurons", "experts", or "clean": nothing masked),
    task (whose keys are masked; empty if none), size, masked (int32; asked for, and really masked), draw (int16), rank
    (int32, the worst of the response tokens), log_prob (float32, their sum in nats), in order of prompt_id.
    """
    frames = []
    for measured in np.unique(half):
        pieces = [own for rows in blocks(prompts, batch_size) if len(own := rows[half[rows] == measured])]
        batches = [_batch(model, prompts.iloc[rows]) for rows in pieces]
        prompt_id = prompts["prompt_id"].to_numpy()[np.concatenate(pieces)]
        sets = masked_units[masked_units["half"] == measured].groupby(SET)
        for (task, _, level, size, draw), chosen in [(("", measured, "clean", 0, -1), masked_units[:0]), *sets]:
            with intervene(parts, _edit(parts, level, chosen)):
                scores = [_score(model, parts, batch) for batch in batches]
            columns = {"prompt_id": prompt_id, "level": level, "task": task, "size": size}
            rank, log_prob = (np.concatenate(column) for column in zip(*scores, strict=True))
            columns |= {"masked": len(chosen), "draw": draw, "rank": rank, "log_prob": log_prob}
            frames.append(pd.DataFrame(columns))
    return in_order(together(frames, " ".join(MASKING)).astype(MASKING))


def _numbered(sets: Sequence[pd.DataFrame], *named: object) -> list[pd.DataFrame]:
    """The key set and the random draws, named."""
    return [each.assign(**dict(zip(SET, (*named, draw), strict=True))) for draw, each in enumerate(sets, start=-1)]


def _counts(
    keys: Iterable[bytes], units: pd.DataFrame
) -> tuple[Int[np.ndarray, " neurons"], Int[np.ndarray, " units"]]:
    """In how many samples each neuron is key, and each unit holds a key neuron."""
    of_neuron, of_unit = np.zeros(units["width"].sum(), "int32"), np.zeros(len(units), "int32")
    for each in keys:
        ids = np.asarray(BitMap.deserialize(each).to_array())
        of_neuron[ids] += 1
        of_unit[np.unique(_unit_of(ids, units["first"].to_numpy()))] += 1
    return of_neuron, of_unit


def _unit_of(ids: Int[np.ndarray, " n"], first: Int[np.ndarray, " units"]) -> Int[np.ndarray, " n"]:
    """The row of `units` that each neuron is of."""
    return np.searchsorted(first, ids, side="right") - 1


def _edit(parts: Anatomy, level: str, chosen: pd.DataFrame) -> Edit:
    """Take away what a set names."""
    if level == "experts":
        marks = {}
        for layer, experts in chosen.groupby("layer")["expert"]:
            marks[layer] = torch.zeros(1, parts.layers[layer].n_experts, dtype=torch.bool)
            marks[layer][0, experts.tolist()] = True
        return block_experts(marks)
    neurons = {}
    for (layer, expert), places in chosen.groupby(["layer", "expert"])["neuron"]:
        width = ffn_units(parts.layers[layer])[expert].width
        neurons[layer, expert] = torch.zeros(1, width, dtype=torch.bool)
        neurons[layer, expert][0, places.tolist()] = True
    return block_neurons(neurons)


def _batch(model: PreTrainedModel, samples: pd.DataFrame) -> Batch:
    """Prompts with all of their response but its last token, in their order, padded on the right.

    No position sees a later one, so that padding changes nothing before it, and needs no mask.
    """
    texts = [torch.tensor([*p, *r[:-1]]) for p, r in zip(samples["token_ids"], samples["target_ids"], strict=True)]
    ids = pad_sequence(texts, batch_first=True).to(input_device(model))
    tokens = samples["target_ids"].str.len().to_numpy()
    sample = np.repeat(np.arange(len(samples)), tokens)
    step = np.arange(len(sample)) - np.repeat(tokens.cumsum() - tokens, tokens)
    place = sample * ids.shape[1] + samples["length"].to_numpy(int)[sample] - 1 + step
    return Batch(ids, torch.from_numpy(place), torch.tensor(np.concatenate(samples["target_ids"].tolist())), sample)


def _score(
    model: PreTrainedModel, parts: Anatomy, batch: Batch
) -> tuple[Int[np.ndarray, " b"], Float[np.ndarray, " b"]]:
    """Worst rank and summed log-probability of each sample's response tokens."""
    final: list[Tensor] = []
    handle = parts.final_norm.module.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    try:
        model(input_ids=batch.ids, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    states = final[0].flatten(0, 1)
    log_p, rank = log_probs_and_ranks(parts, states[batch.place.to(states.device)], batch.target)
    starts = np.unique(batch.sample, return_index=True)[1]
    return np.maximum.reduceat(rank.cpu().numpy(), starts), np.add.reduceat(log_p.double().cpu().numpy(), starts)

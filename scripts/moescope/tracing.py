"""Causal tracing to experts: what of a clean run brings the answer back when the subject is corrupted.

Causal tracing (Meng et al. 2022, *Locating and Editing Factual Associations in GPT*, arXiv 2202.05262, section 2)
restores layers, attention and FFN blocks; here also single routed experts, shared experts and coalitions of experts
(method.md, section 5). A prompt's tokens have roles: subject_first and subject_middle (of subjects with several
tokens), subject_last, between (the subject and the readout position) and readout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope import capture
from moescope.ablations import matched_draw, sample_subjects, split_subjects
from moescope.intervene import Edit, block_attention, intervene, replace_states, restore_experts
from moescope.models import Anatomy, Layer, Path, attention_output, expert_outputs, ffn_output, shared_contribution
from moescope.samples import in_order
from moescope.stats import ranks

TRACING = {"prompt_id": "int32", "draw": "int16", "level": "str", "layer": "int16", "expert": "int16", "size": "int16"}
TRACING |= {"position": "str", "rank": "int32", "log_prob": "float32"}
RUNS = {"prompt_id": "int32", "draw": "int16", "clean": "float32", "corrupted": "float32"}
RUNS |= {"clean_rank": "int32", "corrupted_rank": "int32"}


class Restoration(NamedTuple):
    """A part of the clean run, put back into a corrupted one; `experts` are (layer, expert) of routed ones."""

    draw: int
    level: str
    layer: int
    expert: int
    size: int
    position: str
    experts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Recorded:
    """The clean run of a prompt and its corrupted runs, one a draw of the noise.

    `positions` are those of each role that the prompt has, and of the whole `subject`. `values` say, by (level, layer,
    expert), what is put where a part is restored: the attention block's output, or else the state after the layer.
    `chosen` and `outputs` are the routed experts of the clean run and what they give (models.expert_outputs), by layer.
    """

    prompt_id: int
    target: int
    ids: Int[Tensor, "1 length"]
    noise: Float[Tensor, "draws length d_model"]
    positions: dict[str, Bool[Tensor, " length"]]
    values: dict[tuple[str, int, int], Float[Tensor, "draws length d_model"]]
    chosen: dict[int, Int[Tensor, "length k"]]
    outputs: dict[int, Float[Tensor, "length k d_model"]]
    scores: pd.DataFrame


@torch.no_grad()
def trace(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    batch_size: int,
    n_prompts: int,
    noise: float,
    draws: int,
    coalitions: Sequence[int],
    seed: int,
    shard: int = 0,
    shards: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Log-probability and rank of the target after the subject is corrupted and one part of the clean run is restored.

    Gaussian noise of `noise` times the standard deviation of the embedding matrix's entries is added to the embeddings
    of the subject's tokens, in `draws` draws a prompt. `prompts` are those of the main run; traced is a sample of
    n_prompts of those whose subject has a known place. Of answers with several tokens the first one is the target.
    Restored is, at all tokens of a role together:

    - layer: the residual stream after a layer;
    - attention, ffn: what a block adds to the residual stream; shared: what shared expert -1 - `expert` adds;
    - expert: what a routed expert that the clean run uses there gives, in place of its corrupted output (before any
      post-norms, whose scale then changes, while ffn and shared keep recorded scales);
    - coalition: the best `size` of the experts that the clean run uses at the subject, or at the readout position, all
      together; the best by summed effect of single restorations there, on prompts of the other half of the relation's
      subjects (ablations.split_subjects);
    - random: as many others of them, matched in layer first (ablations.matched_draw); the control, drawn anew for each
      draw of the noise. Sizes of which a prompt does not use three times as many experts there are left out, and so
      are relations with one subject.

    Results depend on a prompt's id and the seed, not on the batch it runs in; a coalition also on the other prompts of
    the relation. So a shard has every `shards`-th relation of the sample.

    Returns two tables, in order of prompt_id; log-probabilities are float32 in nats:

    - tracing: prompt_id (int32), draw (int16), level, layer, expert (int16; 0 where it means nothing), size (int16, the
      experts restored; 0 for layers and blocks), position (role, or `subject` for all of its tokens), rank (int32),
      log_prob;
    - tracing_runs: prompt_id, draw, clean, corrupted (log-probabilities), clean_rank, corrupted_rank (int32).
    """
    usable = prompts[prompts["subject_start"] >= 0]
    traced = sample_subjects(usable, n_prompts, seed)
    logging.info(
        "tracing %d of %d prompts; %d others are left out, since the place of their subject is not known",
        *map(len, (traced, usable)),
        len(prompts) - len(usable),
    )
    traced["half"], deviation = split_subjects(traced, seed), noise * embedding_deviation(model)
    traced = traced[traced["relation"].isin(traced["relation"].sort_values().unique()[shard::shards])]
    tables, scores = [_table(TRACING)], [_table(RUNS)]
    for prompt in traced.itertuples():
        run = record(model, parts, prompt, deviation, draws, seed)
        scores.append(run.scores)
        tables.append(_measure(model, parts, run, list(_singles(parts, run)), batch_size))
    runs = pd.concat(scores, ignore_index=True)
    if parts.is_moe:
        effects = _effects(pd.concat(tables), runs, traced)
        for prompt in traced.itertuples():
            others = (prompt.relation, 1 - prompt.half)
            if others in effects:
                # Recorded again: all prompts' contributions would not fit into memory.
                run = record(model, parts, prompt, deviation, draws, seed)
                rows = list(_coalitions(run, effects[others], coalitions, seed))
                tables.append(_measure(model, parts, run, rows, batch_size))
    return in_order(pd.concat(tables)), in_order(runs)


def roles(start: int, end: int, length: int) -> dict[str, Bool[Tensor, " length"]]:
    """The positions of each role that a prompt has, its subject at [start, end), and of the whole `subject`.

    The only token of a subject is its last one. Readout and subject_last are the same where the subject ends a prompt.
    """
    spans = {
        "subject_first": (start, start + 1 if end - start > 1 else start),
        "subject_middle": (start + 1, end - 1),
        "subject_last": (end - 1, end),
        "between": (end, length - 1),
        "readout": (length - 1, length),
        "subject": (start, end),
    }
    position = torch.arange(length)
    return {role: (position >= a) & (position < b) for role, (a, b) in spans.items() if a < b}


@torch.no_grad()
def embedding_deviation(model: PreTrainedModel) -> float:
    """Standard deviation of the entries of the token embeddings, as the model takes them in."""
    embedding = cast(nn.Module, model.get_input_embeddings())
    every = torch.arange(len(cast(Tensor, embedding.weight)), device=capture.input_device(model))
    return float(embedding(every).float().std())


@contextmanager
def corrupted(model: PreTrainedModel, noise: Float[Tensor, "rows length d_model"]) -> Iterator[None]:
    """While the block runs, `noise` is added to the token embeddings; where it is 0, no bit changes."""
    embedding = cast(nn.Module, model.get_input_embeddings())
    handle = embedding.register_forward_hook(lambda module, args, output: output + noise.to(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record(model: PreTrainedModel, parts: Anatomy, prompt: Any, deviation: float, draws: int, seed: int) -> Recorded:
    """The clean and the corrupted runs of a prompt (a row of facts.tokenise with target_id), parts at all positions."""
    device, (start, end) = capture.input_device(model), (prompt.subject_start, prompt.subject_end)
    ids = torch.tensor(np.array(prompt.token_ids)[None], dtype=torch.long, device=device)
    width = cast(Tensor, cast(nn.Module, model.get_input_embeddings()).weight).shape[1]
    noise = torch.zeros(draws, ids.shape[1], width)
    for draw in range(draws):
        # The last number tells the noise's stream from that of the random experts.
        normal = np.random.default_rng([seed, prompt.prompt_id, draw, 0]).standard_normal((end - start, width))
        noise[draw, start:end] = torch.from_numpy(deviation * normal)
    clean, logits = capture.record(model, parts, ids, every_position=True)
    with corrupted(model, noise):
        damaged, damaged_logits = capture.record(model, parts, ids.expand(draws, -1), every_position=True)
    values: dict[tuple[str, int, int], Tensor] = {}
    chosen, outputs = {}, {}
    for layer in parts.layers:
        here, there = capture.of_layer(clean, layer), capture.of_layer(damaged, layer)
        after, was = there["resid_post"].float(), _added(layer, there)
        values["layer", layer.index, 0] = here["resid_post"].float().expand(draws, -1, -1)
        if layer.attention is not None:
            bare = replace(layer, attention=replace(layer.attention, path=Path()))
            values["attention", layer.index, 0] = attention_output(bare, here).expand(draws, -1, -1)
        for key, value in _added(layer, here).items():
            values[key[0], layer.index, key[1]] = (after - was[key]).unflatten(0, (draws, -1)) + value
        if layer.experts is not None:
            chosen[layer.index], outputs[layer.index] = here["expert_ids"].long(), expert_outputs(layer, here)
    (clean_score, clean_rank), (score, rank) = (_scores(x, prompt.target_id) for x in (logits, damaged_logits))
    columns = (prompt.prompt_id, np.arange(draws), clean_score.repeat(draws), score, clean_rank.repeat(draws), rank)
    return Recorded(
        prompt.prompt_id,
        prompt.target_id,
        ids,
        noise.to(device),
        roles(start, end, ids.shape[1]),
        values,
        chosen,
        outputs,
        pd.DataFrame(dict(zip(RUNS, columns, strict=True))).astype(RUNS),
    )


def _added(layer: Layer, here: Mapping[str, Tensor]) -> dict[tuple[str, int], Float[Tensor, "n d_model"]]:
    """What the FFN block and each shared expert add to the residual stream, by level and expert."""
    found = {("ffn", 0): ffn_output(layer, here)} if layer.ffn_modules else {}
    return found | {("shared", -1 - i): shared_contribution(layer, here, i) for i in range(len(layer.shared))}


def _singles(parts: Anatomy, run: Recorded) -> Iterator[Restoration]:
    """All parts, one at a time. Layers change slowest: rows of a batch then share what is held for a layer."""
    for layer in range(len(parts.layers)):
        for position, at in run.positions.items():
            if position == "subject":
                continue
            used = run.chosen[layer][at].unique().tolist() if layer in run.chosen else []
            for draw in range(len(run.noise)):
                for level, index, expert in run.values:
                    if index == layer:
                        yield Restoration(draw, level, layer, expert, int(level == "shared"), position)
                for expert in used:
                    yield Restoration(draw, "expert", layer, expert, 1, position, ((layer, expert),))


def _effects(
    tracing: pd.DataFrame, runs: pd.DataFrame, prompts: pd.DataFrame
) -> dict[tuple[str, int], dict[tuple[str, int, int], float]]:
    """Summed effect of restoring (set of positions, layer, expert) on the prompts of each relation and half."""
    rows = tracing[(tracing["level"] == "expert") & (tracing["position"] != "between")]
    rows = rows.merge(runs[["prompt_id", "draw", "corrupted"]]).merge(prompts[["prompt_id", "relation", "half"]])
    rows["effect"] = rows["log_prob"] - rows["corrupted"]
    rows["position"] = rows["position"].where(rows["position"] == "readout", "subject")
    keys = ["position", "layer", "expert"]
    return {key: of.groupby(keys)["effect"].sum().to_dict() for key, of in rows.groupby(["relation", "half"])}


def _coalitions(
    run: Recorded, effects: Mapping[tuple[str, int, int], float], sizes: Sequence[int], seed: int
) -> Iterator[Restoration]:
    """The best experts by `effects`, and random ones, of those that the clean run uses at a set of positions."""
    draws, n_layers = len(run.noise), max(run.chosen) + 1
    rngs = [np.random.default_rng([seed, run.prompt_id, draw, 1]) for draw in range(draws)]
    for position in ("subject", "readout"):
        at = run.positions[position]
        counts = {layer: ids[at].flatten().bincount().cpu() for layer, ids in run.chosen.items()}
        frequency = np.full((n_layers, max(map(len, counts.values()))), np.nan)
        for layer, count in counts.items():
            frequency[layer, : len(count)] = count.float().masked_fill(count == 0, torch.nan)
        used = [(int(layer), int(expert)) for layer, expert in np.argwhere(~np.isnan(frequency))]
        ranked = sorted(used, key=lambda place: -effects.get((position, *place), 0.0))
        for size in sizes:
            if 3 * size <= len(used):
                best = tuple(ranked[:size])
                for draw, rng in enumerate(rngs):
                    others = matched_draw(best, frequency, rng)
                    yield Restoration(draw, "coalition", 0, 0, size, position, best)
                    yield Restoration(draw, "random", 0, 0, size, position, others)


@torch.no_grad()
def _measure(
    model: PreTrainedModel, parts: Anatomy, run: Recorded, rows: Sequence[Restoration], batch_size: int
) -> pd.DataFrame:
    pieces = [_table(TRACING)]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        noise = run.noise[[row.draw for row in batch]]
        with corrupted(model, noise), intervene(parts, *_edits(parts, run, batch)):
            log_prob, rank = _scores(capture.readout_logits(model, run.ids.expand(len(batch), -1)), run.target)
        table = pd.DataFrame(batch, columns=Restoration._fields).assign(log_prob=log_prob, rank=rank)
        pieces.append(table.assign(prompt_id=run.prompt_id)[list(TRACING)].astype(TRACING))
    return pd.concat(pieces)


def _edits(parts: Anatomy, run: Recorded, batch: Sequence[Restoration]) -> list[Edit]:
    """What puts the clean values of each restoration in its row of the batch."""
    at = torch.stack([run.positions[row.position] for row in batch])
    marks: dict[int, Tensor] = {}
    blocks: dict[int, list[int]] = {}
    states: dict[int, list[int]] = {}
    for number, row in enumerate(batch):
        for layer, expert in row.experts:
            blank = torch.zeros(len(batch), parts.layers[layer].n_experts, dtype=torch.bool)
            marks.setdefault(layer, blank)[number, expert] = True
        if not row.experts:
            (blocks if row.level == "attention" else states).setdefault(row.layer, []).append(number)

    def marked(rows: Sequence[int]) -> Bool[Tensor, " rows"]:
        return torch.zeros(len(batch), dtype=torch.bool).index_fill(0, torch.tensor(rows), True)

    def values(rows: Sequence[int]) -> Float[Tensor, "rows length d_model"]:
        found = torch.stack([run.values[batch[n].level, batch[n].layer, batch[n].expert][batch[n].draw] for n in rows])
        every = found.new_zeros(len(batch), *found.shape[1:])
        every[rows] = found
        return every

    def clean(layer: int) -> Float[Tensor, "tokens d_model"]:
        outputs, ids = run.outputs[layer], run.chosen[layer]
        hit = marks[layer].to(ids.device)[:, ids].to(outputs.dtype)
        return torch.einsum("rtk,tkd->rtd", hit, outputs).flatten(0, 1)

    return [
        restore_experts(marks, {layer: clean(layer) for layer in marks}, at),
        block_attention(
            {layer: marked(rows) for layer, rows in blocks.items()},
            {layer: values(rows).flatten(0, 1) for layer, rows in blocks.items()},
            at,
        ),
        replace_states(
            {layer: values(rows) for layer, rows in states.items()},
            {layer: at & marked(rows).unsqueeze(1) for layer, rows in states.items()},
        ),
    ]


def _scores(logits: Float[Tensor, "n vocab"], target: int) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Log-probability and rank of a token."""
    wanted = torch.full((len(logits),), target, device=logits.device)
    rank = ranks(logits.float(), wanted)
    return logits.float().log_softmax(-1)[:, target].cpu().numpy(), rank.cpu().numpy()


def _table(columns: Mapping[str, str]) -> pd.DataFrame:
    """An empty table."""
    return pd.DataFrame(columns=list(columns)).astype(columns)

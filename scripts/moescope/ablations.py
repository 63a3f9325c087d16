"""Blocking and keep-only experiments: which prompts break when experts are taken away (method.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from transformers import PreTrainedModel

from moescope.artifacts import open_tensors
from moescope.capture import batches, input_device, readout_logits, token_tensor
from moescope.facts import steps
from moescope.intervene import block_experts, block_shared, intervene, keep_top
from moescope.models import Anatomy
from moescope.stats import ranks

NEAREST = 4
"""A random control is drawn among this many experts of nearest activation frequency."""


@dataclass(frozen=True)
class ExpertSet:
    """Experts blocked together: n of them, `draw` -1 for the best by LPI, else the number of a random draw."""

    relation: str
    half: int
    n_blocked: int
    draw: int
    experts: tuple[tuple[int, int], ...]


def split_subjects(prompts: pd.DataFrame, seed: int) -> Int[np.ndarray, " n"]:
    """Half (0 or 1) of each prompt: a random half of each relation's subjects, all prompts of one together."""
    rng = np.random.default_rng(seed)
    half = pd.Series(0, index=prompts.index)
    for _, rows in prompts.groupby("relation", sort=True):
        subjects = rng.permutation(np.sort(rows["subject"].unique()))
        half[rows.index] = rows["subject"].isin(subjects[len(subjects) // 2 :]).astype(int)
    return half.to_numpy()


def sample_subjects(prompts: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """At least n prompts (or all): whole subjects drawn at random, from each relation in turn. Rows stay in order."""
    rng = np.random.default_rng(seed)
    turn = pd.Series(0, index=prompts.index)
    for _, rows in prompts.groupby("relation", sort=True):
        subjects = rng.permutation(np.sort(rows["subject"].unique()))
        turn[rows.index] = rows["subject"].map({subject: i for i, subject in enumerate(subjects)})
    sizes = prompts.groupby([turn, "relation"]).size()
    taken = sizes.index[sizes.cumsum() - sizes < n]
    return prompts[pd.MultiIndex.from_arrays([turn, prompts["relation"]]).isin(taken)].reset_index(drop=True)


def expert_load(
    parts: Anatomy, activations: Sequence[Path], prompts: pd.DataFrame
) -> Int[np.ndarray, "n layers experts"]:
    """Positions of each prompt that chose each routed expert, rows as in `prompts`; -1 where there is no such expert.

    Of a prompt with several answer tokens the longest row counts, which has the positions of all others.
    """
    width = max(layer.n_experts for layer in parts.layers)
    row_of = pd.Series(np.arange(len(prompts)), index=prompts["prompt_id"])
    last = prompts["target_ids"].str.len().to_numpy() - 1
    load = np.full((len(prompts), len(parts.layers), width), -1, dtype=np.int16)
    for path in activations:
        with open_tensors(path, "activations") as cache:
            prompt = row_of.reindex(cache.get_tensor("prompt_id").numpy()).to_numpy()
            kept = np.flatnonzero(~np.isnan(prompt))
            rows = prompt[kept].astype(int)
            kept = kept[cache.get_tensor("step").numpy()[kept] == last[rows]]
            rows = prompt[kept].astype(int)
            for layer in parts.layers:
                if layer.n_experts:
                    counted = cache.get_tensor(f"{layer.index}.expert_load")[kept].numpy()
                    load[rows, layer.index, : layer.n_experts] = counted
    return load


def choose_sets(
    experts: pd.DataFrame,
    load: Int[np.ndarray, "n layers experts"],
    prompts: pd.DataFrame,
    half: Int[np.ndarray, " n"],
    sizes: Sequence[int],
    draws: int,
    seed: int,
) -> tuple[list[ExpertSet], pd.DataFrame]:
    """The experts to block when the prompts of a half are measured, chosen on the other half.

    Routed experts are ranked by mean LPI over the relation's prompts (an expert that a prompt does not use adds 0).
    Each draw of a control has as many experts, matched one by one in layer and activation frequency (share of
    positions) on the same prompts; where a layer has none left, the nearest layer gives one; a set is smaller than its
    size where there are fewer experts. A relation with one subject has no other half to choose on, and no set for it.
    `load` is expert_load, its rows those of `prompts`. Also returns the ranking: relation, half (measured), order,
    layer, expert, mean_lpi (nats), frequency.
    """
    rng = np.random.default_rng(seed)
    exists = (load >= 0).all(0)
    routed = experts[experts["expert"] >= 0].set_index("prompt_id")[["layer", "expert", "lpi"]]
    sets, rankings = [], []
    for relation, rows in prompts.groupby("relation", sort=True):
        for measured in (0, 1):
            chosen_on = rows[half[rows.index] != measured]
            if chosen_on.empty:
                continue
            mean_lpi = np.zeros(load.shape[1:])
            used = routed[routed.index.isin(chosen_on["prompt_id"])]
            np.add.at(mean_lpi, (used["layer"], used["expert"]), used["lpi"])
            mean_lpi /= max(len(chosen_on), 1)
            positions = (chosen_on["length"] + chosen_on["target_ids"].str.len() - 1).sum()
            frequency = np.where(exists, load[chosen_on.index].sum(0) / max(positions, 1), np.nan)
            mean_lpi[~exists] = -np.inf
            best = np.argsort(-mean_lpi, axis=None, kind="stable")[: min(max(sizes), exists.sum())]
            ranking = [(int(i // load.shape[2]), int(i % load.shape[2])) for i in best]
            key = (str(relation), measured)
            for n in sizes:
                sets.append(ExpertSet(*key, n, -1, tuple(ranking[:n])))
                for draw in range(draws):
                    sets.append(ExpertSet(*key, n, draw, matched_draw(ranking[:n], frequency, rng)))
            frame = pd.DataFrame(ranking, columns=["layer", "expert"])
            at = tuple(frame.to_numpy().T)
            rankings.append(frame.assign(mean_lpi=mean_lpi[at], frequency=frequency[at]))
            rankings[-1].insert(0, "order", np.arange(1, len(frame) + 1))
            rankings[-1].insert(0, "half", measured)
            rankings[-1].insert(0, "relation", relation)
    return sets, pd.concat(rankings, ignore_index=True)


def matched_draw(
    chosen: Sequence[tuple[int, int]], frequency: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
    """As many other experts as `chosen`, each near one of them in layer first, then in activation frequency.

    A frequency of NaN is a place without an expert.
    """
    free = ~np.isnan(frequency)
    free[tuple(np.array(chosen).T)] = False
    drawn = []
    for layer, expert in rng.permutation(np.array(chosen)):
        layers, experts = np.nonzero(free)
        if not len(layers):
            break
        near = np.abs(layers - layer) == np.abs(layers - layer).min()
        layers, experts = layers[near], experts[near]
        distance = np.abs(frequency[layers, experts] - frequency[layer, expert])
        pick = rng.choice(np.argsort(distance, kind="stable")[:NEAREST])
        drawn.append((int(layers[pick]), int(experts[pick])))
        free[drawn[-1]] = False
    return tuple(drawn)


@torch.no_grad()
def measure_blocking(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    half: Int[np.ndarray, " n"],
    sets: Sequence[ExpertSet],
    batch_size: int,
    how: Sequence[str] = ("zero",),
) -> pd.DataFrame:
    """Rank and log-probability of every prompt under every set of its relation and half, at all positions.

    Many sets share a batch: each row of it has experts of its own blocked, in each of the ways of
    intervene.block_experts named. Returns prompt_id (int32), how (str), n_blocked (int16), draw (int16), rank (int32),
    log_prob (float32, nats).
    """
    device = input_device(model)
    places = np.array([(i, *place) for i, chosen in enumerate(sets) for place in chosen.experts], int).reshape(-1, 3)
    marks = {}
    for layer in parts.layers:
        if layer.experts is not None:
            mark = torch.zeros(len(sets), layer.n_experts, dtype=torch.bool)
            mark[tuple(places[places[:, 1] == layer.index][:, [0, 2]].T)] = True
            marks[layer.index] = mark.to(device)
    rows_of: dict[tuple[str, int], list[int]] = {}
    for number, chosen in enumerate(sets):
        rows_of.setdefault((chosen.relation, chosen.half), []).append(number)
    of_prompt = dict(zip(prompts["prompt_id"], zip(prompts["relation"], half, strict=True), strict=True))
    answers = steps(prompts)
    numbers = [rows_of.get(of_prompt[prompt_id], []) for prompt_id in answers["prompt_id"]]
    row = np.repeat(np.arange(len(answers)), [len(n) for n in numbers])
    set_number = np.concatenate(numbers).astype(int)
    pairs = answers.iloc[row].reset_index(drop=True)

    def edit(rows: np.ndarray) -> dict[int, Bool[torch.Tensor, "rows experts"]]:
        index = torch.as_tensor(set_number[rows], device=device)
        return {layer: mark[index] for layer, mark in marks.items()}

    of_set = {name: np.array([getattr(s, name) for s in sets], "int16") for name in ("n_blocked", "draw")}
    columns = {name: values[set_number] for name, values in of_set.items()}
    frames = []
    for way in how:
        rank, log_prob = np.empty(len(pairs), "int32"), np.empty(len(pairs), "float32")
        for rows in batches(pairs["length"].to_numpy(), batch_size):
            with intervene(parts, block_experts(edit(rows), way)):
                rank[rows], log_prob[rows] = score(model, pairs, rows)
        scored = {"prompt_id": pairs["prompt_id"], "how": way, **columns, "rank": rank, "log_prob": log_prob}
        frames.append(_per_prompt(pd.DataFrame(scored)))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def measure_keep_only(
    model: PreTrainedModel, parts: Anatomy, prompts: pd.DataFrame, top: Sequence[int], batch_size: int
) -> pd.DataFrame:
    """Rank and log-probability when only some experts of each MoE layer are kept, at all positions (KA Table 2).

    Kept are no expert, the shared ones only, the routed ones with the n largest gate weights, and both;
    gate weights are not rescaled, and an n above the model's own k keeps all. Returns prompt_id (int32), shared
    (bool), routed (int16, n; -1 = all of them), rank (int32), log_prob (float32, nats). Models without shared
    experts have no `shared` rows.
    """
    none_shared = {layer.index: torch.ones(1, len(layer.shared), dtype=torch.bool) for layer in parts.layers}
    has_shared = any(layer.shared for layer in parts.layers)
    answers, frames = steps(prompts), []
    for shared in (False, True) if has_shared else (False,):
        for n in (0, *top, -1):
            rank, log_prob = np.empty(len(answers), "int32"), np.empty(len(answers), "float32")
            edits = ([keep_top(n)] if n >= 0 else []) + ([] if shared else [block_shared(none_shared)])
            with intervene(parts, *edits):
                for rows in batches(answers["length"].to_numpy(), batch_size):
                    rank[rows], log_prob[rows] = score(model, answers, rows)
            columns = {"shared": shared, "routed": np.int16(n), "rank": rank, "log_prob": log_prob}
            frames.append(_per_prompt(pd.DataFrame({"prompt_id": answers["prompt_id"], **columns})))
    return pd.concat(frames, ignore_index=True)


def score(
    model: PreTrainedModel, prompts: pd.DataFrame, rows: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " b"], np.ndarray]:
    """Rank and log-probability of the targets of prompts of equal length."""
    logits = readout_logits(model, token_tensor(prompts, rows, input_device(model))).float()
    target = torch.as_tensor(prompts["target_id"].to_numpy()[rows], dtype=torch.long, device=logits.device)
    log_prob = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return ranks(logits, target).cpu().numpy(), log_prob.cpu().numpy()


def _per_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of answer tokens joined to their prompts: log-probabilities summed, the worst rank."""
    keys = [column for column in rows if column not in ("rank", "log_prob")]
    if not rows.duplicated(keys).any():
        return rows
    return rows.groupby(keys, as_index=False, sort=False).agg({"rank": "max", "log_prob": "sum"})

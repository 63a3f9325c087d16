"""Who steers the router, by intervention: heads blocked one by one or together, and gradients of gate probabilities.

The paper that this reproduces: KA (method.md, sections 4 and 5). The *gate share* of a layer is the summed gate
probability, now, of the routed experts that the clean run chose there, at the readout position.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope.ablations import choose_sets, matched_draw
from moescope.capture import batches, input_device, readout_logits, token_tensor
from moescope.facts import steps
from moescope.intervene import Edit, Positions, block_heads, intervene, record_routing, replay
from moescope.lens import Readout, lpi
from moescope.models import (
    Anatomy,
    Layer,
    Path,
    attention_output,
    expert_activations,
    expert_contributions,
    experts_arguments,
    gate_probabilities,
)
from moescope.resume import CleanRun, ResumeError, at_readout, clean_run, log_probs_and_ranks
from moescope.stats import ranks

KEYS = {"prompt_id": "int32", "layer": "int16", "head": "int16"}
SCORES = {"rank": "int32", "log_prob": "float32"}
HEAD_ROUTER = ("logit_change", "overlap", "gate_before", "gate_after", "lpi_before", "lpi_after")
HEAD_BLOCKING = ("gate_prob", "overlap", "expert_lpi")
OVER_ANSWER_TOKENS = {"rank": "max"} | dict.fromkeys(("log_prob", "lpi_before", "lpi_after", "expert_lpi"), "sum")
"""How values of several answer tokens become one of the prompt; any other is their mean."""
FINAL = -1
"""Where `watch` puts what belongs to no layer."""

Watched = dict[int, dict[str, Tensor]]
"""What `watch` finds, by layer and name."""


@dataclass(frozen=True)
class HeadSet:
    """Heads (layer, head) blocked together, n_blocked of them: `draw` -1 for the best by LPI, else a random draw's."""

    relation: str
    half: int
    n_blocked: int
    draw: int
    heads: tuple[tuple[int, int], ...]


@torch.no_grad()
def sweep(
    model: PreTrainedModel, parts: Anatomy, prompts: pd.DataFrame, batch_size: int, with_lpi: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every head of every layer blocked alone (zero) at the readout position, and what the routers above it then do.

    `prompts` has prompt_id, token_ids and target_ids. Each run starts from the clean one at the head's layer
    (resume.at_readout), or is a whole forward pass where the model cannot be resumed. Returns two tables:

    - head_map: prompt_id (int32), layer, head (int16), rank (int32), log_prob (float32, nats);
    - head_router: prompt_id, layer, head, router_layer (int16, >= layer), and float32: logit_change (root mean square
      over the experts of the change of the router's logits, each run's mean over experts subtracted before), overlap
      (Jaccard index of the chosen set with the clean one), gate_before, gate_after (gate share), lpi_before, lpi_after
      (nats: exact LPIs summed over the routed experts chosen in that run, at the clean run's norm scale; NaN unless
      `with_lpi`). No rows for dense layers; NaN where a layer's router is not known.

    Of several answer tokens log-probabilities and LPIs are summed, the rank is the worst, the rest are means.
    """
    readout = Readout.of(parts) if with_lpi else None
    heads = np.array([(layer.index, head) for layer in parts.layers for head in range(layer.n_heads)], int).reshape(
        -1, 2
    )
    entries = [parts.layers[0].index, *heads[:, 0].tolist()]
    marks = _marks(parts, [[], *([one] for one in heads.tolist())])
    answers, effects, routing = steps(prompts), list[pd.DataFrame](), list[pd.DataFrame]()
    for rows, ids, clean in _clean_runs(model, parts, answers, batch_size, len(entries)):
        found = Watched()
        final = _variants(model, parts, ids, clean, entries, marks, found)
        target = _targets(answers, rows, final.device)
        log_p, rank = log_probs_and_ranks(parts, final.flatten(0, 1), target.repeat_interleave(len(entries)))
        key = _crossed(answers["prompt_id"].to_numpy()[rows], heads)
        effects.append(
            _frame(key, {"rank": rank.view(len(rows), -1)[:, 1:], "log_prob": log_p.view(len(rows), -1)[:, 1:]})
        )
        scale = parts.final_norm.scale(final[:, 0])
        for layer in _routed(parts):
            below = heads[heads[:, 0] <= layer.index]
            key = _crossed(answers["prompt_id"].to_numpy()[rows], below) | {"router_layer": layer.index}
            # In whole forward passes, the heads of later layers have variants here too.
            here = {
                name: x.unflatten(0, (len(rows), -1))[:, : 1 + len(below)] for name, x in found[layer.index].items()
            }
            routing.append(_frame(key, _router_changes(layer, here, readout, scale, target)))
    router_types = KEYS | {"router_layer": "int16"} | dict.fromkeys(HEAD_ROUTER, "float32")
    return _per_prompt(effects, KEYS | SCORES), _per_prompt(routing, router_types)


def choose_heads(
    parts: Anatomy,
    heads: pd.DataFrame,
    prompts: pd.DataFrame,
    half: Int[np.ndarray, " n"],
    sizes: Sequence[int],
    draws: int,
    seed: int,
) -> tuple[list[HeadSet], pd.DataFrame]:
    """The heads to block when the prompts of a half are measured, chosen on the other half by mean LPI.

    `heads` is attribution's table, `half` ablations.split_subjects. Each random draw has as many other heads, of the
    same layers as far as these have any left, each as likely as the next (draws can repeat where few others are left);
    sizes of more than a third of all heads, which leave hardly any such control, are left out. Also returns the
    ranking: relation, half (measured), order, layer, head, mean_lpi (nats).
    """
    rng = np.random.default_rng(seed)
    width = max(layer.n_heads for layer in parts.layers)
    exists = np.array([[head < layer.n_heads for head in range(width)] for layer in parts.layers])
    fitting = [n for n in sizes if 3 * n <= exists.sum()]
    if len(fitting) < len(sizes):
        left_out = ", ".join(str(n) for n in sizes if n not in fitting)
        logging.warning(
            "sets of %s heads left out: of %d heads, twice as many others do not remain", left_out, exists.sum()
        )
    if not fitting:
        return [], pd.DataFrame(columns=["relation", "half", "order", "layer", "head", "mean_lpi"])
    # What choose_sets does not ask where it draws nothing: how often each is used.
    load = np.broadcast_to(np.where(exists, 0, -1), (len(prompts), *exists.shape))
    best, ranking = choose_sets(heads.rename(columns={"head": "expert"}), load, prompts, half, fitting, 0, seed)
    sets = []
    for one in best:
        # The nearest in random numbers are random.
        noise = (np.where(exists, rng.random(exists.shape), np.nan) for _ in range(draws))
        chosen = [one.experts, *(matched_draw(one.experts, numbers, rng) for numbers in noise)]
        sets += [HeadSet(one.relation, one.half, one.n_blocked, i - 1, drawn) for i, drawn in enumerate(chosen)]
    return sets, ranking.drop(columns="frequency").rename(columns={"expert": "head"})


@torch.no_grad()
def measure_head_blocking(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    half: Int[np.ndarray, " n"],
    sets: Sequence[HeadSet],
    batch_size: int,
    with_lpi: bool = True,
) -> pd.DataFrame:
    """Every prompt under every set of heads of its relation and half, blocked (zero) at all positions.

    With `forced`, the clean run's routing is replayed at all positions besides. Returns prompt_id (int32), n_blocked
    (int16; 0 is the clean run, with draw -1), draw (int16), forced (bool), rank (int32), log_prob (float32, nats), and
    float32 at the readout position: gate_prob (gate share, mean over MoE layers), overlap (Jaccard index of the set
    that the router chooses, be it forced or not, with the clean one; likewise), expert_lpi (nats: exact LPIs of the
    routed experts used, summed over layers, at the clean run's norm scale; NaN unless `with_lpi`). These three are NaN
    for dense models, which have no forced rows. Several answer tokens as in `sweep`.
    """
    # Draws of few heads often repeat each other: equal sets are measured once.
    first: dict[tuple[Any, ...], int] = {}
    same_as = [first.setdefault((s.relation, s.half, frozenset(s.heads)), number) for number, s in enumerate(sets)]
    numbers_of: dict[tuple[str, int], list[int]] = {}
    for (relation, measured, _), number in first.items():
        numbers_of.setdefault((relation, measured), []).append(number)
    marks = _marks(parts, [chosen.heads for chosen in sets])
    of_prompt = dict(zip(prompts["prompt_id"], zip(prompts["relation"], half, strict=True), strict=True))
    readout, answers, frames = Readout.of(parts) if with_lpi else None, steps(prompts), list[pd.DataFrame]()
    for rows in batches(answers["length"].to_numpy(), batch_size):
        ids = token_tensor(answers, rows, input_device(model))
        target, prompt_id = _targets(answers, rows, ids.device), answers["prompt_id"].to_numpy()[rows]
        clean = Watched()
        with record_routing(parts) as routing, intervene(parts, watch(clean, _readout_position(ids))):
            logits = readout_logits(model, ids)
        key = {"prompt_id": prompt_id, "set": -1, "forced": False}
        frames.append(_frame(key, _measured(parts, logits, target, clean, clean, readout)))
        pairs = [(row, number) for row, one in enumerate(prompt_id) for number in numbers_of.get(of_prompt[one], ())]
        for start in range(0, len(pairs), batch_size):
            row, number = torch.tensor(pairs[start : start + batch_size]).T
            blocked = block_heads({index: mark[number] for index, mark in marks.items()})
            before = {index: {name: x[row] for name, x in here.items()} for index, here in clean.items()}
            again = {i: tuple(x.unflatten(0, ids.shape)[row].flatten(0, 1) for x in r) for i, r in routing.items()}
            for forced in (False, True) if parts.is_moe else (False,):
                found, held = Watched(), [replay(again)] if forced else []
                with intervene(parts, blocked, watch(found, _readout_position(ids[row])), *held):
                    logits = readout_logits(model, ids[row])
                key = {"prompt_id": prompt_id[row.numpy()], "set": number.numpy(), "forced": forced}
                frames.append(_frame(key, _measured(parts, logits, target[row], found, before, readout, forced)))
    named = [(-1, 0, -1), *((same, s.n_blocked, s.draw) for same, s in zip(same_as, sets, strict=True))]
    table = pd.concat(frames).merge(pd.DataFrame(named, columns=["set", "n_blocked", "draw"]), on="set")
    types = {"prompt_id": "int32", "n_blocked": "int16", "draw": "int16", "forced": "bool"}
    return _per_prompt([table], types | SCORES | dict.fromkeys(HEAD_BLOCKING, "float32"))


def gate_gradients(
    model: PreTrainedModel, parts: Anatomy, prompts: pd.DataFrame, batch_size: int, n_steps: int = 32
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Integrated gradients of each layer's gate share with respect to the heads' outputs at the readout position.

    The path is a z for a from 0 to 1, z the clean outputs of all heads of all layers at once, put in place (not
    computed anew); the integral by Gauss-Legendre quadrature with `n_steps` nodes (Sundararajan et al. 2017, sections 3
    and 5). Attributions sum to clean - baseline as far as the experts that lower layers choose stay the same along the
    path: a change of these is a jump, which no gradient sees. Of several answer tokens, the first. Returns

    - gate_gradients: prompt_id (int32), router_layer, layer (<= router_layer), head (int16), attribution (float32);
    - gate_paths: prompt_id, router_layer, clean, baseline (float32: gate share at a = 1 and a = 0), steps (int16).

    No rows for dense layers, nor where a layer's router is not known.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    alpha, weight = (torch.tensor(x).view(-1, 1, 1) for x in ([0, *(nodes + 1) / 2, 1], [0, *weights / 2, 0]))
    entries = [parts.layers[0].index] * len(alpha)
    gradients, paths = list[pd.DataFrame](), list[pd.DataFrame]()
    known = [layer.index for layer in parts.layers if layer.experts is not None and layer.experts.router is not None]
    for rows, ids, clean in _clean_runs(model, parts, prompts, batch_size, len(entries)) if known else ():
        prompt_id, before, found = prompts["prompt_id"].to_numpy()[rows], Watched(), Watched()
        with torch.no_grad():
            _variants(model, parts, ids, clean, entries[:1], {}, before)
        outputs = {index: here["head_in"] for index, here in before.items() if "head_in" in here}
        path = {index: (alpha.to(z) * z.unsqueeze(1)).requires_grad_() for index, z in outputs.items()}
        every = {index: torch.ones(z.shape[1:3], dtype=torch.bool) for index, z in path.items()}
        with torch.enable_grad():
            _variants(model, parts, ids, clean, entries, every, found, path)
            for router_layer in known:
                chosen = before[router_layer]["expert_ids"].repeat_interleave(len(entries), 0)
                share = _gate_share(found[router_layer], chosen).view(len(ids), -1)
                key = {"prompt_id": prompt_id, "router_layer": router_layer, "steps": n_steps}
                paths.append(_frame(key, {"clean": share[:, -1], "baseline": share[:, 0]}))
                below = [index for index in path if index <= router_layer]
                inputs = [path[index] for index in below]
                slopes = (
                    torch.autograd.grad(share.sum(), inputs, retain_graph=True, materialize_grads=True) if below else ()
                )
                for index, slope in zip(below, slopes, strict=True):
                    attribution = ((slope * weight.to(slope)).sum(1) * outputs[index]).float().sum(-1)
                    key = _crossed(prompt_id, np.array([(index, head) for head in range(attribution.shape[1])]))
                    gradients.append(_frame(key | {"router_layer": router_layer}, {"attribution": attribution}))
    router_key = {"prompt_id": "int32", "router_layer": "int16"}
    path_types = {**router_key, "clean": "float32", "baseline": "float32", "steps": "int16"}
    return _per_prompt(gradients, router_key | KEYS | {"attribution": "float32"}), _per_prompt(paths, path_types)


def watch(found: Watched, at: Positions = None) -> Edit:
    """Changes nothing: fills `found` with what each layer reads and chooses at every token, or at the positions.

    By layer, named and shaped as in capture.capture: resid_pre, resid_mid, head_in or attention_out, as far as there
    are any to be seen; in MoE layers router_logits, expert_ids, expert_weights, and expert_in, what the experts read;
    attention_norm.i and experts_norm.i are the inputs of post-norms. At FINAL: resid_final. It sees what edits before
    it make, not what those after it make.
    """

    def keep(index: int, name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        found.setdefault(index, {})[name] = x if at is None else x[at.to(x.device).flatten()]

    def see(
        module: nn.Module, args: Any, kwargs: Any, output: Any = None, *, index: int, name: str, width: int
    ) -> None:
        shown = (*args, *kwargs.values()) if output is None else output if isinstance(output, tuple) else (output,)
        numbers = (x for x in shown if isinstance(x, Tensor) and x.is_floating_point())
        keep(index, name, next(x for x in numbers if width in (0, x.shape[-1])))

    def choose(module: nn.Module, args: Any, kwargs: Any, *, index: int) -> None:
        for name, x in zip(
            ("expert_in", "expert_ids", "expert_weights"), experts_arguments(module, args, kwargs), strict=True
        ):
            keep(index, name, x)

    @contextmanager
    def edit(parts: Anatomy) -> Iterator[None]:
        with ExitStack() as stack:
            for index, name, module, width in _places(parts):
                hook = module.register_forward_hook if width else module.register_forward_pre_hook
                stack.callback(hook(partial(see, index=index, name=name, width=width), with_kwargs=True).remove)
            for layer in parts.layers:
                if layer.experts is not None:
                    hook = layer.experts.module.register_forward_pre_hook
                    stack.callback(hook(partial(choose, index=layer.index), with_kwargs=True).remove)
            yield
        for layer in parts.layers:
            if "head_in" in found.get(layer.index, {}):
                found[layer.index]["head_in"] = found[layer.index]["head_in"].unflatten(-1, (layer.n_heads, -1))

    return edit


def _places(parts: Anatomy) -> Iterator[tuple[int, str, nn.Module, int]]:
    """What `watch` reads: layer, name, module, and the width of the output, 0 for its input."""
    yield FINAL, "resid_final", parts.final_norm.module, 0
    for layer in parts.layers:
        yield layer.index, "resid_pre", layer.block, 0
        if layer.middle is not None:
            yield layer.index, "resid_mid", layer.middle, 0
        if layer.attention is not None and layer.attention.out_proj is not None:
            yield layer.index, "head_in", layer.attention.out_proj, 0
        elif layer.attention is not None:
            yield layer.index, "attention_out", layer.attention.module, len(parts.final_norm.gain)
        if layer.experts is not None and layer.experts.router is not None:
            yield layer.index, "router_logits", layer.experts.router, layer.experts.count
        for name, path in _paths(layer).items():
            yield from ((layer.index, f"{name}_norm.{i}", norm.module, 0) for i, norm in enumerate(path.norms))


def _paths(layer: Layer) -> dict[str, Path]:
    both = {"attention": layer.attention, "experts": layer.experts}
    return {name: part.path for name, part in both.items() if part is not None}


def _clean_runs(
    model: PreTrainedModel, parts: Anatomy, rows: pd.DataFrame, batch_size: int, variants: int
) -> Iterator[tuple[Int[np.ndarray, " b"], Int[Tensor, "b length"], CleanRun | None]]:
    """Batches of equal length: row numbers, token ids, and a clean run to start from (None: it cannot be resumed)."""
    can_resume, unchecked = True, variants
    for batch in batches(rows["length"].to_numpy(), _prompts_at_once(rows, batch_size, variants)):
        ids, clean = token_tensor(rows, batch, input_device(model)), None
        if can_resume:
            try:
                clean = clean_run(model, parts, ids, variants=unchecked)
                unchecked = 0
            except ResumeError as error:
                can_resume = False
                logging.warning("not resumed, every variant takes a whole forward pass: %s", error)
        yield batch, ids, clean


def _variants(
    model: PreTrainedModel,
    parts: Anatomy,
    ids: Int[Tensor, "b length"],
    clean: CleanRun | None,
    entries: Sequence[int],
    marks: Mapping[int, Bool[Tensor, "v heads"]],
    found: Watched,
    by: Mapping[int, Float[Tensor, "b v heads head_dim"]] | None = None,
) -> Float[Tensor, "b v d_model"]:
    """Final residual states of variants of the readout token that have heads blocked, or replaced; watched there.

    Resumed at `entries` as by resume.at_readout; without a clean run a whole forward pass for each variant.
    """
    b, v = len(ids), len(entries)
    if clean is None:
        pieces: list[Watched] = [{} for _ in range(v)]
        for i, here in enumerate(pieces):
            at = _readout_position(ids)
            rows = {index: mark[i : i + 1].expand(b, -1) for index, mark in marks.items()}
            values = None if by is None else {index: z[:, i] for index, z in by.items()}
            with intervene(parts, block_heads(rows, values, at), watch(here, at)):
                readout_logits(model, ids)
        for index, first in pieces[0].items():
            found[index] = {name: torch.stack([p[index][name] for p in pieces], 1).flatten(0, 1) for name in first}
        return found[FINAL]["resid_final"].unflatten(0, (b, v))
    ran = {layer.index: sum(entry <= layer.index for entry in entries) for layer in parts.layers}
    rows = {index: mark[: ran[index]].repeat(b, 1) for index, mark in marks.items()}
    values = None if by is None else {index: z[:, : ran[index]].flatten(0, 1) for index, z in by.items()}
    return at_readout(parts, clean, entries, block_heads(rows, values), watch(found))


def _measured(
    parts: Anatomy,
    logits: Float[Tensor, "b vocab"],
    target: Int[Tensor, " b"],
    found: Watched,
    clean: Watched,
    readout: Readout | None,
    forced: bool = False,
) -> dict[str, Float[Tensor, " b"]]:
    """The columns SCORES and HEAD_BLOCKING of a forward pass, from what was watched in it and in the clean one."""
    logits, target = logits.float(), target.to(logits.device)
    log_p = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    columns = {"rank": ranks(logits, target), "log_prob": log_p}
    scale = parts.final_norm.scale(clean[FINAL]["resid_final"])
    of_layers = []
    for layer in _routed(parts):
        here, before = found[layer.index], clean[layer.index]
        used = {**here, **{name: before[name] for name in ("expert_ids", "expert_weights") if forced}}
        overlap = _jaccard(here["expert_ids"], before["expert_ids"])
        lpis = _expert_lpi(layer, used, readout, scale, target)
        of_layers.append([x.to(log_p.device) for x in (_gate_share(here, before["expert_ids"]), overlap, lpis)])
    if of_layers:
        gate, overlap, lpis = (torch.stack(values) for values in zip(*of_layers, strict=True))
        columns |= dict(zip(HEAD_BLOCKING, (gate.nanmean(0), overlap.mean(0), lpis.sum(0)), strict=True))
    return columns


def _router_changes(
    layer: Layer,
    here: Mapping[str, Tensor],
    readout: Readout | None,
    scale: Float[Tensor, " b"],
    target: Int[Tensor, " b"],
) -> dict[str, Float[Tensor, "b v"]]:
    """The columns HEAD_ROUTER of v variants, from what was watched in 1 + v, the clean one first."""
    b, n = here["expert_ids"].shape[:2]
    flat = {name: x.flatten(0, 1) for name, x in here.items()}
    chosen = here["expert_ids"][:, :1].expand(-1, n, -1).flatten(0, 1)
    change = scale.new_full((b, n), torch.nan)
    if "router_logits" in here:
        logits = here["router_logits"].float()
        logits = logits - logits.mean(-1, keepdim=True)
        change = (logits - logits[:, :1]).pow(2).mean(-1).sqrt()
    lpis = _expert_lpi(layer, flat, readout, scale.repeat_interleave(n), target.repeat_interleave(n)).view(b, n)
    gate, overlap = _gate_share(flat, chosen).view(b, n), _jaccard(flat["expert_ids"], chosen).view(b, n)
    gate_before, lpi_before = (x[:, :1].expand(-1, n) for x in (gate, lpis))
    columns = (change, overlap, gate_before, gate, lpi_before, lpis)
    return {name: x[:, 1:] for name, x in zip(HEAD_ROUTER, columns, strict=True)}


def _gate_share(here: Mapping[str, Tensor], chosen: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Summed gate probability of these experts; NaN where the router is not known."""
    if "router_logits" not in here:
        return torch.full(chosen.shape[:1], torch.nan, device=chosen.device)
    every = gate_probabilities(here["router_logits"], here["expert_ids"], here["expert_weights"])
    return every.gather(1, chosen.long()).sum(1)


def _jaccard(one: Int[Tensor, "n k"], other: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    both = (one.unsqueeze(2) == other.unsqueeze(1)).any(2).sum(1)
    return both / (2 * one.shape[1] - both)


def _expert_lpi(
    layer: Layer,
    here: Mapping[str, Tensor],
    readout: Readout | None,
    scale: Float[Tensor, " n"],
    target: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Exact LPIs of the chosen routed experts, summed; NaN without a readout."""
    if readout is None or layer.experts is None:
        return torch.full_like(scale, torch.nan)
    acts = expert_activations(layer.experts.module, here["expert_in"], here["expert_ids"].long())
    here = {**here, "expert_acts": acts}
    for name, path in _paths(layer).items():
        if path.norms:
            scales = (norm.scale(here[f"{name}_norm.{i}"]) for i, norm in enumerate(path.norms))
            here[f"{name}_scale"] = reduce(torch.mul, scales)
    middle = here["resid_mid"] if layer.middle is not None else here["resid_pre"] + attention_output(layer, here)
    inputs = (x.to(readout.weight.device) for x in (middle, expert_contributions(layer, here), scale, target))
    return lpi(readout, *inputs).sum(1)


def _marks(parts: Anatomy, sets: Sequence[Iterable[Sequence[int]]]) -> dict[int, Bool[Tensor, "sets heads"]]:
    """Marks of sets of heads (layer, head), for each layer that has heads."""
    shapes = {layer.index: (len(sets), layer.n_heads) for layer in parts.layers if layer.n_heads}
    marks = {index: torch.zeros(shape, dtype=torch.bool) for index, shape in shapes.items()}
    for number, heads in enumerate(sets):
        for layer, head in heads:
            marks[layer][number, head] = True
    return marks


def _routed(parts: Anatomy) -> list[Layer]:
    return [layer for layer in parts.layers if layer.experts is not None]


def _readout_position(ids: Int[Tensor, "b length"]) -> Bool[Tensor, "b length"]:
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, -1] = True
    return at


def _targets(answers: pd.DataFrame, rows: Int[np.ndarray, " b"], device: torch.device) -> Int[Tensor, " b"]:
    return torch.as_tensor(answers["target_id"].to_numpy()[rows], dtype=torch.long, device=device)


def _prompts_at_once(rows: pd.DataFrame, batch_size: int, variants: int) -> int:
    """Prompts whose variants of the readout token are no more tokens than a batch of the shortest prompts has."""
    return max(1, min(batch_size, batch_size * int(rows["length"].min()) // variants))


def _crossed(prompt_id: Int[np.ndarray, " b"], heads: Int[np.ndarray, "heads 2"]) -> dict[str, Any]:
    """Keys of a table with a row for each prompt and head (layer, head)."""
    layer, head = np.tile(heads, (len(prompt_id), 1)).T
    return {"prompt_id": np.repeat(prompt_id, len(heads)), "layer": layer, "head": head}


def _frame(key: Mapping[str, Any], columns: Mapping[str, Float[Tensor, "*rows"]]) -> pd.DataFrame:
    return pd.DataFrame({**key, **{name: x.detach().flatten().cpu().numpy() for name, x in columns.items()}})


def _per_prompt(frames: Sequence[pd.DataFrame], types: Mapping[str, str]) -> pd.DataFrame:
    """All rows in order of their keys, several answer tokens as one; keys are integers and flags but `rank`."""
    if not frames:
        return pd.DataFrame(columns=[*types]).astype(types)
    table = pd.concat(frames, ignore_index=True).reindex(columns=[*types])
    keys = [name for name, kind in types.items() if kind != "float32" and name not in OVER_ANSWER_TOKENS]
    if table.duplicated(keys).any():
        unknown = table.columns[table.isna().all()]
        how = {name: OVER_ANSWER_TOKENS.get(name, "mean") for name in types if name not in keys}
        table = table.groupby(keys, as_index=False).agg(how).assign(**dict.fromkeys(unknown, np.nan))
    return table.astype(types).sort_values(keys, ignore_index=True)

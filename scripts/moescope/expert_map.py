"""The exhaustive expert map: every expert that a prompt uses, blocked one at a time (method.md, section 5).

Blocking an expert takes its contribution from the positions that chose it, and changes what becomes of those and of all
that see them, in the layers above. Only that is computed: each token of a variant (a blocked expert) starts from the
clean run behind the layer of that expert, and sees at every position the variant's keys and values or, where those have
not changed, the clean ones. Tokens of all variants and prompts stand side by side; what prompts share that begin alike
is computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from moescope.capture import TOLERANCE, batches, input_device, readout_logits, token_tensor
from moescope.facts import steps
from moescope.intervene import Edit, block_experts, block_shared, intervene
from moescope.models import Anatomy, Layer, experts_arguments
from moescope.resume import CleanRun, ResumeError, clean_run, log_probs_and_ranks, refusing
from moescope.stats import ranks

POSITIONS = ("readout", "all")
KEYS = ["prompt_id", "positions", "layer", "expert"]
MAX_STATES = 2**18
"""Numbers in the states of the tokens that are computed together."""
BLOCK = 32
"""Tokens that are one sequence for the attention."""


@dataclass(frozen=True)
class Tree:
    """Prompts of equal length as a tree of tokens: prompts that are the same up to a position share its node.

    `node` [b length] is the node at each position; `row` and `depth` [n] are the first prompt that has a node, and its
    position there.
    """

    node: Int[Tensor, "b length"]
    row: Int[Tensor, " n"]
    depth: Int[Tensor, " n"]

    @staticmethod
    def of(ids: Int[Tensor, "b length"]) -> Tree:
        b, length = ids.shape
        prefixes = np.where(np.tri(length, dtype=bool), ids.cpu().numpy()[:, None], -1).reshape(b * length, length)
        _, first, node = np.unique(prefixes, axis=0, return_index=True, return_inverse=True)
        place = torch.from_numpy(first)
        return Tree(torch.from_numpy(node).view(b, length), place // length, place % length)

    def at(self, x: Tensor, nodes: Int[Tensor, "*m"] | slice = slice(None)) -> Tensor:
        """What a tensor [b or 1, length, ...] has at these nodes."""
        return x[self.row[nodes] if len(x) > 1 else 0, self.depth[nodes]]


@dataclass(frozen=True)
class Start:
    """What variants start from: a clean run, its prompts as a tree, and what its experts got and gave.

    `memory` has, by layer, the keys and values of the nodes [n heads head_dim]; `experts`, by layer, states, expert ids
    and gate weights of the routed experts; `shared`, by (layer, i), what shared expert i gives, and by (layer, i,
    "gate") the logit of its gate; the last two [b * length ...].
    """

    run: CleanRun
    tree: Tree
    memory: Mapping[int, Sequence[Tensor]]
    experts: Mapping[int, Sequence[Tensor]]
    shared: Mapping[tuple, Tensor]


@dataclass(frozen=True)
class Variants:
    """Blocked experts, one a variant, and where: layer [v] (not falling), unit [v] and `blocked` [v b length].

    A unit is a routed expert, or n_experts + i for shared expert i.
    """

    layer: Int[Tensor, " v"]
    unit: Int[Tensor, " v"]
    blocked: Bool[Tensor, "v b length"]

    @property
    def changed(self) -> Bool[Tensor, "v b length"]:
        """The blocked positions and all that see one."""
        return self.blocked.cummax(-1).values

    def of(self, which: slice) -> Variants:
        return Variants(self.layer[which], self.unit[which], self.blocked[which])

    def edits(self, layer: Layer, variant: Int[Tensor, " b"], row: Int[Tensor, " b"]) -> tuple[Edit, Edit]:
        """Block, in this layer, what variant i blocks in prompt i."""
        marks = self.unit[variant].unsqueeze(1) == torch.arange(layer.n_experts + len(layer.shared))
        marks &= (self.layer[variant] == layer.index).unsqueeze(1)
        routed, shared = marks.split([layer.n_experts, len(layer.shared)], 1)
        at = self.blocked[variant, row]
        return block_experts({layer.index: routed}, at=at), block_shared({layer.index: shared}, at=at)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    batch_size: int,
    positions: Sequence[str] = ("readout",),
) -> pd.DataFrame:
    """Rank and log-probability of every prompt with each routed or shared expert that it uses blocked (`zero`), alone.

    `readout` blocks an expert at the readout position, `all` wherever a position of the prompt chose it. Experts that
    a prompt does not use there have no row: blocking them changes nothing. Values are those of full forward passes, to
    rounding; models that cannot be started from the middle are measured by full forward passes, which is logged.

    Returns prompt_id (int32), positions (str), layer, expert (int16; shared expert i is -1 - i), rank (int32), log_prob
    (float32, nats). Of several answer tokens log-probabilities are summed, the rank is the worst; a token whose own
    prompt does not use the expert counts as in the clean run. Raises ValueError for other positions.
    """
    if unknown := set(positions) - set(POSITIONS):
        raise ValueError(f"positions: {sorted(unknown)} are not known; use {' or '.join(POSITIONS)}")
    # Sorted: prompts that begin alike share a batch.
    answers = steps(prompts).sort_values("token_ids", ignore_index=True)
    scored = resumed
    clean, blocked = list[pd.DataFrame](), list[pd.DataFrame]()
    for rows in batches(answers["length"].to_numpy(), batch_size):
        ids = token_tensor(answers, rows, input_device(model))
        target = torch.as_tensor(answers["target_id"].to_numpy()[rows], dtype=torch.long)
        try:
            found = scored(model, parts, ids, target, positions)
        except ResumeError as error:
            logging.warning("cannot be started from the middle (%s): measured by full forward passes", error)
            scored = in_full
            found = scored(model, parts, ids, target, positions)
        for frames, frame in zip((clean, blocked), found, strict=True):
            key = answers.iloc[rows[frame.pop("row")]][["prompt_id", "step"]].reset_index(drop=True)
            frames.append(pd.concat([key, frame], axis=1))
    return _per_prompt(pd.concat(clean, ignore_index=True), pd.concat(blocked, ignore_index=True))


def resumed(
    model: PreTrainedModel,
    parts: Anatomy,
    ids: Int[Tensor, "b length"],
    target: Int[Tensor, " b"],
    positions: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The map of prompts of equal length, started from their clean run: (clean scores, scores with experts blocked).

    Both have row (of `ids`), rank and log_prob; the second also positions, layer and expert. Raises ResumeError where
    it cannot be done: see `start`.
    """
    begin = start(model, parts, ids)
    frames = []
    for where in positions:
        every = used(parts, begin.experts, ids, where)
        # A variant's tokens are not torn apart.
        tokens = every.changed.sum((1, 2)).cumsum(0)
        group = tokens // max(1, MAX_STATES // begin.run.final.shape[-1])
        ends = group.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        for variants in (every.of(slice(*pair)) for pair in zip([0, *ends], ends, strict=False)):
            states, variant, row = final_states(parts, begin, variants)
            frames.append(
                _frame(row, *log_probs_and_ranks(parts, states, target[row].to(states.device))).join(
                    _names(parts, variants, variant, where)
                )
            )
    clean = _frame(
        torch.arange(len(ids)), *log_probs_and_ranks(parts, begin.run.final, target.to(begin.run.final.device))
    )
    return clean, pd.concat(frames, ignore_index=True)


def in_full(
    model: PreTrainedModel,
    parts: Anatomy,
    ids: Int[Tensor, "b length"],
    target: Int[Tensor, " b"],
    positions: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As `resumed`, by a full forward pass for each prompt and expert that it uses, as many at a time as prompts."""
    with _recorded(parts) as (experts, _):
        clean = _scores(readout_logits(model, ids), target)
    frames = []
    for where in positions:
        variants = used(parts, experts, ids, where)
        for pairs in variants.changed[..., -1].nonzero().split(len(ids)):
            variant, row = pairs.T
            with intervene(parts, *(edit for layer in parts.layers for edit in variants.edits(layer, variant, row))):
                scores = _scores(readout_logits(model, ids[row]), target[row])
            frames.append(_frame(row, *scores).join(_names(parts, variants, variant, where)))
    return _frame(torch.arange(len(ids)), *clean), pd.concat(frames, ignore_index=True)


def used(parts: Anatomy, experts: Mapping[int, Sequence[Tensor]], ids: Int[Tensor, "b length"], where: str) -> Variants:
    """Every expert that any of the prompts uses there; `experts` as in Start."""
    found = []
    for layer in parts.layers:
        blocked = torch.ones(*ids.shape, layer.n_experts + len(layer.shared), dtype=torch.bool)
        if layer.experts is not None:
            chosen = experts[layer.index][1].cpu().long().view(*ids.shape, -1)
            blocked[..., : layer.n_experts] = False
            blocked.scatter_(2, chosen, True)
        if where == "readout":
            blocked[:, :-1] = False
        units = blocked.flatten(0, 1).any(0).nonzero()[:, 0]
        found.append((torch.full_like(units, layer.index), units, blocked[..., units].movedim(-1, 0)))
    return Variants(*(torch.cat(column) for column in zip(*found, strict=True)))


@torch.no_grad()
def start(model: PreTrainedModel, parts: Anatomy, ids: Int[Tensor, "b length"]) -> Start:
    """Run prompts of equal length, and start the second half of the first again behind the first layer, not blocked.

    Raises ResumeError if its final state does not come back, or if a norm follows the experts of a layer: what blocking
    one takes away is then more than its contribution.
    """
    for layer in parts.layers:
        if any(part.path.norms for part in (layer.experts, *layer.shared) if part is not None):
            raise ResumeError(f"a norm follows the experts of layer {layer.index}")
    with _recorded(parts) as recorded:
        clean = clean_run(model, parts, ids, check=False)
    tree = Tree.of(ids)
    memory = dict[int, list[Tensor]]()
    for layer in parts.layers:
        kept: Any = clean.cache.layers[layer.index]
        memory[layer.index] = [tree.at(x.transpose(1, 2)) for x in (kept.keys, kept.values)]
    begin = Start(clean, tree, memory, *recorded)
    blocked = torch.zeros(1, *ids.shape, dtype=torch.bool)
    blocked[:, 0, ids.shape[1] // 2 :] = True
    no_unit = parts.layers[0].n_experts + len(parts.layers[0].shared)
    nothing = Variants(torch.tensor([0]), torch.tensor([no_unit]), blocked)
    with refusing("its layers cannot be called one by one"):
        states, _, row = final_states(parts, begin, nothing)
        # Before the norm one very large entry would hide all the others.
        found, normed = (parts.final_norm.module(x) for x in (states, clean.final[row.to(states.device)]))
    change = float((found - normed).abs().amax() / normed.abs().amax().clamp_min(1e-30))
    if not change <= TOLERANCE[normed.dtype]:
        raise ResumeError(f"started again with nothing blocked, its final state changes by {change:.1e}")
    return begin


def final_states(
    parts: Anatomy, begin: Start, variants: Variants
) -> tuple[Float[Tensor, "r d_model"], Int[Tensor, " r"], Int[Tensor, " r"]]:
    """(final residual states at the readout position, variant, prompt) of all prompts that a variant changes."""
    clean, tree = begin.run, begin.tree
    nodes, length = len(tree.row), tree.node.shape[1]
    blocked = variants.blocked[:, tree.row, tree.depth]
    changed = variants.changed[:, tree.row, tree.depth]
    # Tokens that see much the same stand together: those of a variant, or if it has one in each prompt, of a prompt.
    if blocked[:, tree.depth < length - 1].any():
        variant, node = changed.nonzero(as_tuple=True)
    else:
        node, variant = changed.T.nonzero(as_tuple=True)
    entry, read, hit = variants.layer[variant], tree.depth[node] == length - 1, blocked[variant, node]
    # The places of keys: nodes first, then tokens; a variant has its tokens' where it has changed.
    place = torch.arange(nodes).repeat(len(changed), 1)
    place[variant, node] = nodes + torch.arange(len(node))
    seen = place[variant.unsqueeze(1), tree.node[tree.row[node]]]
    hidden = clean.final.new_empty(len(node), clean.final.shape[-1])
    after = (*clean.states[1:], clean.final.unsqueeze(1).expand(-1, length, -1))
    for layer, following in zip(parts.layers, after, strict=True):
        above = entry < layer.index
        if above.any():
            branches = _Branches(begin, layer, len(node))
            if layer is parts.layers[-1]:
                if (earlier := above & ~read).any():
                    tokens = _in_blocks(earlier)
                    with suppress(_Stored):
                        branches.call(node[tokens], nodes + tokens, None, hidden[tokens])
                above &= read
            tokens = _in_blocks(above)
            found = branches.call(node[tokens], nodes + tokens, seen[tokens], hidden[tokens])
            hidden.index_copy_(0, tokens.flatten().to(hidden.device), found.flatten(0, 1))
        entering = entry == layer.index
        hidden[entering] = tree.at(following, node[entering]).to(hidden)
        entering &= hit
        hidden[entering] -= _contributions(layer, begin, node[entering], variants.unit[variant[entering]])
    last = tree.node[:, -1]
    variant, row = changed[:, last].nonzero(as_tuple=True)
    return hidden[place[variant, last[row]] - nodes], variant, row


class _Stored(Exception):
    """Keys and values are there, and nothing else is wanted."""


class _Branches(DynamicCache):
    """A layer to be called with tokens in place of nodes, and its keys and values.

    Those of the nodes come first, behind them are those of tokens that are computed anew, and a row of zeros.
    """

    def __init__(self, begin: Start, layer: Layer, tokens: int) -> None:
        super().__init__()
        self.layer, self.tree, self.clean_call = layer, begin.tree, begin.run.calls[layer.index]
        self.both = [torch.cat([x, x.new_zeros(tokens + 1, *x.shape[1:])]) for x in begin.memory[layer.index]]

    def call(
        self,
        node: Int[Tensor, "blocks size"],
        own: Int[Tensor, "blocks size"],
        seen: Int[Tensor, "blocks size length"] | None,
        hidden: Float[Tensor, "blocks size d_model"],
    ) -> Float[Tensor, "blocks size d_model"]:
        """Call the layer. Keys and values are put at `own`; `seen` are those that the token has at each position.

        Without `seen`, _Stored is raised as soon as they are put there.
        """
        mask, self.own, self.seen = None, own, None
        if seen is not None:
            self.seen, sees = _keys(seen, self._visible(node), len(self.both[0]))
            mask = torch.zeros(sees.shape, dtype=hidden.dtype, device=hidden.device)
            mask = mask.masked_fill_(~sees.to(mask.device), torch.finfo(hidden.dtype).min).unsqueeze(1)
        call = self.clean_call
        kwargs = {name: self._adapted(x, node) for name, x in call.kwargs.items()} | {"attention_mask": mask}
        output = self.layer.block(hidden, *(self._adapted(x, node) for x in call.args), **kwargs)
        return (output[0] if isinstance(output, tuple) else output).to(hidden)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for kept, new in zip(self.both, (key_states, value_states), strict=True):
            kept.index_copy_(0, self.own.flatten().to(kept.device), new.transpose(1, 2).flatten(0, 1))
        if self.seen is None:
            raise _Stored
        index = self.seen.flatten().to(key_states.device)
        found = [x.index_select(0, index).view(*self.seen.shape, *x.shape[1:]).transpose(1, 2) for x in self.both]
        return found[0], found[1]

    def _visible(self, node: Int[Tensor, "blocks size"]) -> Bool[Tensor, "blocks size length"]:
        """The positions that the clean run's mask lets each token see."""
        length = self.tree.node.shape[1]
        given = self.clean_call.kwargs.get("attention_mask")
        if given is None:
            return torch.arange(length) <= self.tree.depth[node].unsqueeze(-1)
        if given.ndim != 4:
            raise ResumeError(f"its attention takes a mask of {given.ndim} dimensions")
        given = self.tree.at(given[:, 0, :, :length], node)
        return (given if given.dtype == torch.bool else given == 0).cpu()

    def _adapted(self, x: Any, node: Int[Tensor, "blocks size"]) -> Any:
        """An argument of the clean call for tokens in place of the nodes."""
        b, length = self.tree.node.shape
        if isinstance(x, Cache):
            return self
        if isinstance(x, tuple | list):
            return type(x)(self._adapted(part, node) for part in x)
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] in (1, b) and x.shape[1] == length:
            return self.tree.at(x, node)
        return x


def _in_blocks(chosen: Bool[Tensor, " n"]) -> Int[Tensor, "blocks size"]:
    """The chosen tokens in blocks, the last of which is filled up with the last token."""
    tokens = chosen.nonzero()[:, 0]
    size = min(BLOCK, len(tokens))
    return torch.cat([tokens, tokens[-1:].expand(-len(tokens) % size)]).view(-1, size)


def _keys(
    seen: Int[Tensor, "blocks size length"], visible: Bool[Tensor, "blocks size length"], places: int
) -> tuple[Int[Tensor, "blocks k"], Bool[Tensor, "blocks size k"]]:
    """The places that each block of tokens sees, filled up with the last place, and which of them each token sees."""
    seen = torch.where(visible, seen, places - 1).flatten(1)
    in_block = torch.zeros(len(seen), places, dtype=torch.bool).scatter_(1, seen, True)
    block, place = in_block.nonzero(as_tuple=True)
    count = in_block.sum(1)
    slot = torch.arange(len(block)) - (count.cumsum(0) - count)[block]
    keys = torch.full((len(seen), int(count.max())), places - 1)
    keys[block, slot] = place
    slots = torch.empty(in_block.shape, dtype=torch.int32)
    slots[block, place] = slot.int()
    sees = torch.zeros(*visible.shape[:2], keys.shape[1], dtype=torch.bool)
    return keys, sees.scatter_(2, slots.gather(1, seen).long().view(visible.shape), visible)


@contextmanager
def _recorded(parts: Anatomy) -> Iterator[tuple[dict[int, Sequence[Tensor]], dict[tuple, Tensor]]]:
    """`experts` and `shared` of Start, of the forward pass in the block."""
    experts: dict[int, Sequence[Tensor]] = {}
    shared: dict[tuple, Tensor] = {}

    def got(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        experts[index] = [x.flatten(0, -2) for x in experts_arguments(module, args, kwargs)]

    def gave(key: tuple, module: nn.Module, args: Any, output: Tensor) -> None:
        shared[key] = output.flatten(0, -2)

    with ExitStack() as stack:
        for layer in parts.layers:
            if layer.experts is not None:
                hook = partial(got, layer.index)
                stack.callback(layer.experts.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for i, part in enumerate(layer.shared):
                stack.callback(part.down.register_forward_hook(partial(gave, (layer.index, i))).remove)
                if part.gate is not None:
                    stack.callback(part.gate.register_forward_hook(partial(gave, (layer.index, i, "gate"))).remove)
        yield experts, shared


def _contributions(
    layer: Layer, begin: Start, node: Int[Tensor, " m"], unit: Int[Tensor, " m"]
) -> Float[Tensor, "m d_model"]:
    """What each unit adds to the residual stream of the clean run at a node that uses it."""
    row, depth = begin.tree.row[node], begin.tree.depth[node]
    place = row * begin.tree.node.shape[1] + depth
    out = begin.run.final.new_zeros(len(node), begin.run.final.shape[-1])
    routed = unit < layer.n_experts
    if layer.experts is not None and routed.any():
        states, ids, weights = (x[place[routed]] for x in begin.experts[layer.index])
        chosen = unit[routed].unsqueeze(1).to(ids)
        gate = (weights * (ids == chosen)).sum(1, keepdim=True)
        out[routed] = layer.experts.path.carry(layer.experts.module(states, chosen, gate), None).to(out)
    for i, part in enumerate(layer.shared):
        own = unit == layer.n_experts + i
        added = begin.shared[layer.index, i][place[own]]
        if part.gate is not None:
            added = added * begin.shared[layer.index, i, "gate"][place[own]].sigmoid()
        out[own] = part.path.carry(added, None).to(out)
    return out


def _names(parts: Anatomy, variants: Variants, variant: Int[Tensor, " r"], where: str) -> pd.DataFrame:
    layer, unit = variants.layer[variant].numpy(), variants.unit[variant].numpy()
    routed = np.array([layer.n_experts for layer in parts.layers])[layer]
    expert = np.where(unit < routed, unit, routed - 1 - unit)
    return pd.DataFrame({"positions": where, "layer": layer.astype("int16"), "expert": expert.astype("int16")})


def _frame(row: Int[Tensor, " r"], log_prob: Float[Tensor, " r"], rank: Int[Tensor, " r"]) -> pd.DataFrame:
    return pd.DataFrame({"row": row, "rank": rank.cpu().int(), "log_prob": log_prob.cpu()})


def _scores(logits: Float[Tensor, "r vocab"], target: Int[Tensor, " r"]) -> tuple[Tensor, Tensor]:
    logits, target = logits.float(), target.to(logits.device)
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1), ranks(logits, target)


def _per_prompt(clean: pd.DataFrame, blocked: pd.DataFrame) -> pd.DataFrame:
    """One row for each prompt and expert; an answer token whose prompt does not use it has its clean score."""
    if clean["step"].any():
        every = blocked[KEYS].drop_duplicates().merge(clean, on="prompt_id")
        every = every.merge(blocked, "left", [*KEYS, "step"], suffixes=("_clean", ""))
        filled = {name: every[name].fillna(every[f"{name}_clean"]) for name in ("rank", "log_prob")}
        blocked = every.assign(**filled).groupby(KEYS, as_index=False).agg({"rank": "max", "log_prob": "sum"})
    types = {"rank": "int32", "log_prob": "float32"}
    return blocked[[*KEYS, *types]].astype(types).sort_values(KEYS, ignore_index=True)

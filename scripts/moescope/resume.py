"""Start from a clean run: only what an intervention at the readout position can change is computed again.

Causal attention lets nothing at the last position reach an earlier one, so the keys and values of all earlier
positions stay those of the clean run, and so does everything below the layer where the intervention begins. What is
left of a prompt is one token, from that layer up: many variants of it, with different interventions, run side by side
as tokens of one sequence that see the clean keys and values and themselves, but not each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from moescope.artifacts import one_line
from moescope.capture import TOLERANCE
from moescope.intervene import Edit, intervene
from moescope.models import MAX_LOGITS, Anatomy
from moescope.stats import ranks

READ = 256
"""States that are read out together: fresh memory for the logits of more costs more than the arithmetic."""
REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class ResumeError(ValueError):
    """A model that cannot be started from the middle; full forward passes still work."""


@dataclass(frozen=True)
class Call:
    """How the model called a layer: everything but the residual stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class CleanRun:
    """A forward pass that can be resumed: states before each layer, calls of the layers, keys and values.

    `final` [b d_model] is the residual stream after the last layer, at the readout position.
    """

    states: tuple[Float[Tensor, "b length d_model"], ...]
    final: Float[Tensor, "b d_model"]
    calls: tuple[Call, ...]
    cache: DynamicCache
    kept: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        return self.states[0].shape[1]


@torch.no_grad()
def clean_run(
    model: PreTrainedModel, parts: Anatomy, ids: Int[Tensor, "b length"], check: bool = True, variants: int = 0
) -> CleanRun:
    """One forward pass of prompts of equal length, kept so that `at_readout` can start from it.

    With `check` it is resumed with nothing changed: at every layer, and as many `variants` more as are to run together.
    Raises ResumeError where that does not give the same normed final state to the tolerance of the dtype, or cannot be
    done at all (attention that keeps another memory than keys and values or counts them, a kernel that takes no mask,
    streams beside the residual stream).
    """
    states: list[Tensor] = []
    calls: list[Call] = []
    final: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = (
            None if args else next(key for key, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point())
        )
        states.append(args[0] if name is None else kwargs[name])
        rest = {key: x for key, x in kwargs.items() if key != name}
        calls.append(Call(args[1:], rest))

    cache = DynamicCache()
    handles = [layer.block.register_forward_pre_hook(before, with_kwargs=True) for layer in parts.layers]
    handles.append(parts.final_norm.module.register_forward_pre_hook(lambda module, args: final.append(args[0][:, -1])))
    try:
        with refusing("it does not run with keys and values"):
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    kept = [(layer.keys, layer.values) for layer in cache.layers if type(layer) is DynamicLayer]
    if not len(kept) == len(states) == len(parts.layers):
        raise ResumeError("its layers do not all keep keys and values")
    clean = CleanRun(tuple(states), final[-1], tuple(calls), cache, tuple(cast(Any, kept)))
    if not check:
        return clean
    with refusing("its layers cannot be called one by one"):
        entries = [*[parts.layers[0].index] * variants, *(layer.index for layer in parts.layers)]
        again = at_readout(parts, clean, entries)
    normed = parts.final_norm.module(clean.final)
    # Before the norm one very large entry would hide all the others.
    change = (parts.final_norm.module(again) - normed.unsqueeze(1)).abs().amax() / normed.abs().amax().clamp_min(1e-30)
    if not float(change) <= TOLERANCE.get(normed.dtype, TOLERANCE[torch.float32]):
        raise ResumeError(f"resumed with nothing changed, its final state changes by {float(change):.1e}")
    return clean


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """What goes wrong in the block is a refusal, but for memory that is not enough: that is no property of a model."""
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError | ResumeError):
            raise
        raise ResumeError(f"{sentence}: {one_line(error)}") from error


def at_readout(parts: Anatomy, clean: CleanRun, entries: Sequence[int], *edits: Edit) -> Float[Tensor, "b v d_model"]:
    """Final residual states at the readout position, of v variants of each prompt.

    Variant j starts as the clean state of the readout position before layer entries[j] (not falling). While layer m
    runs, the batch has b * v_m tokens, v_m the number of entries <= m, token row * v_m + variant: marks of edits have
    as many rows. Edits take no `at`. Gradients flow through what edits put in.
    """
    entries = list(entries)
    if entries != sorted(entries):
        raise ValueError(f"entries {entries}: the layers that variants start at must not fall")
    hidden = clean.states[0][:, :0]
    try:
        with intervene(parts, *edits):
            for layer, states, call in zip(parts.layers, clean.states, clean.calls, strict=True):
                joining = entries.count(layer.index)
                hidden = torch.cat([hidden, states[:, -1:].to(hidden.device).expand(-1, joining, -1)], 1)
                if hidden.shape[1]:
                    hidden = _call(layer.block, clean, call, hidden)
    finally:
        for memory, (keys, values) in zip(cast(Any, clean.cache.layers), clean.kept, strict=True):
            memory.keys, memory.values = keys, values
    return hidden


@torch.no_grad()
def log_probs_and_ranks(
    parts: Anatomy, states: Float[Tensor, "n d_model"], target: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Log-probability (float32, nats) and rank of a target for each final residual state, as the model reads it out."""
    vocabulary = len(cast(Tensor, parts.unembedding.weight))
    found = []
    for x, w in zip(*(t.split(max(1, min(READ, MAX_LOGITS // vocabulary))) for t in (states, target)), strict=True):
        logits = parts.unembedding(parts.final_norm.module(x)).float() * parts.logit_scale
        logits = parts.softcap * torch.tanh(logits / parts.softcap) if parts.softcap else logits
        w = w.to(logits.device)
        log_p = logits.log_softmax(-1).gather(-1, w.unsqueeze(-1)).squeeze(-1)
        found.append((log_p, ranks(logits, w)))
    log_p, rank = (torch.cat(column) for column in zip(*found, strict=True))
    return log_p, rank


def _call(block: nn.Module, clean: CleanRun, call: Call, hidden: Float[Tensor, "b v d_model"]) -> Tensor:
    """Call a layer with variants of the readout token in place of the prompts."""
    b, length = clean.states[0].shape[:2]
    mask = _mask(call, length, hidden)

    def adapted(name: str, x: Any) -> Any:
        if name == "attention_mask":
            return mask
        if isinstance(x, Cache):
            return clean.cache
        if isinstance(x, tuple | list):
            return type(x)(adapted("", part) for part in x)
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] in (1, b) and x.shape[1] == length:
            return x[:, -1:].expand(-1, hidden.shape[1], *x.shape[2:])
        if isinstance(x, Tensor) and x.ndim and x.shape[0] == length:
            return x[-1:].expand(hidden.shape[1], *x.shape[1:])
        return x

    kwargs = {name: adapted(name, x) for name, x in call.kwargs.items()}
    if "attention_mask" not in kwargs or not any(isinstance(x, Cache) for x in kwargs.values()):
        raise ResumeError("its layers are not given a mask and a cache by name")
    output = block(hidden, *(adapted("", x) for x in call.args), **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _mask(call: Call, length: int, hidden: Float[Tensor, "b v d_model"]) -> Float[Tensor, "b 1 v length+v"]:
    """What is added to attention scores: a variant sees what the readout position saw, itself in that one's place."""
    b, v = hidden.shape[:2]
    given = call.kwargs.get("attention_mask")
    seen = torch.ones(1, length, dtype=torch.bool, device=hidden.device)
    if given is not None:
        if given.ndim != 4:
            raise ResumeError(f"its attention takes a mask of {given.ndim} dimensions")
        last = given[:, 0, -1, :length]
        seen = (last if last.dtype == torch.bool else last == 0).to(hidden.device)
    seen = seen.clone()
    seen[:, -1] = False
    visible = torch.cat(
        [
            seen.unsqueeze(1).expand(-1, v, -1),
            torch.eye(v, dtype=torch.bool, device=hidden.device).expand(len(seen), v, v),
        ],
        -1,
    )
    added = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
    return added.masked_fill_(~visible, torch.finfo(hidden.dtype).min).unsqueeze(1).expand(b, 1, v, length + v)

"""One context manager that blocks or keeps parts of a model during a forward pass (method.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moescope.models import Anatomy, experts_arguments

GateEdit = Callable[[int, Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]], Float[Tensor, "tokens k"]]
"""(layer, expert ids, gate weights) -> new gate weights, token by token."""


@contextmanager
def intervene(
    parts: Anatomy, *, gate_weights: GateEdit | None = None, shared_experts: bool = True, ffn: bool = True
) -> Iterator[None]:
    """Change what reaches the residual stream, at all positions, while the block runs.

    `gate_weights` edits the weights that the routed experts are given, after the model's own choice, so
    that a weight of 0 removes a contribution and leaves every other one bit for bit (semantics `zero`).
    `shared_experts=False` zeroes the shared experts, `ffn=False` every FFN block, dense or MoE.
    Nothing is left behind after the block, nor after an exception in it; blocks can be nested.
    """
    with ExitStack() as hooks:
        for layer in parts.layers:
            if gate_weights is not None and layer.experts is not None:
                edit = partial(_edit_call, partial(gate_weights, layer.index))
                hooks.callback(layer.experts.module.register_forward_pre_hook(edit, with_kwargs=True).remove)
            silenced = [] if shared_experts else [shared.down for shared in layer.shared]
            for module in silenced if ffn else layer.ffn_modules:
                hooks.callback(module.register_forward_hook(_zero).remove)
        yield


def block_experts(blocked: Mapping[int, Bool[Tensor, "rows experts"]]) -> GateEdit:
    """Zero the contribution of the marked experts; each row of the batch has marks of its own, by layer."""

    def edit(layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        if layer not in blocked:
            return weights
        marks = blocked[layer].to(ids.device)
        per_token = marks.repeat_interleave(len(ids) // len(marks), dim=0)
        return weights.masked_fill(per_token.gather(1, ids), 0)

    return edit


def keep_top(n: int) -> GateEdit:
    """Keep the n routed experts with the largest gate weights of each token; the others get weight 0."""

    def edit(layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return weights.masked_fill(rank >= n, 0)

    return edit


def _edit_call(
    edit: Callable[[Tensor, Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden, ids, weights = experts_arguments(module, args, kwargs)
    return (hidden, ids, edit(ids, weights)), {}


def _zero(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (_zero(module, args, output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

"""One context manager that blocks, keeps, replaces or forces parts of a model while it runs (method.md, section 5).

`intervene(parts, edit, ...)` puts edits in place for as long as its block runs. An edit is made by one of the functions
below; each says what it does to which part, and nothing else does it:

- routed experts: `block_experts` (zero, drop_and_renormalise, reroute), `keep_experts`, `keep_top`, `force_experts`,
  `replay` (of `record_routing`), `replace_experts` (mean, resample), `restore_experts`;
- `block_shared`, `block_heads`, `block_neurons`, `block_attention`, `block_ffn`: zero, or another value in its place;
- `replace_states`: the residual stream itself.

Marks say what is edited: by layer, a row of flags for each row of the batch, or for each token if there are as many
rows as tokens. Layers that are missing are left alone. `at` limits an edit to some positions: bool [rows length], None
for all. Edits combine in their order: a later one sees what an earlier one made. What is blocked or replaced is a
module's output, before any post-norm, whose scale is then that of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from moescope.models import Anatomy, Layer, expert_activations, expert_down, experts_arguments, weights_of

Edit = Callable[[Anatomy], AbstractContextManager[None]]
Marks = Mapping[int, Bool[Tensor, "rows units"]]
Positions = Bool[Tensor, "rows length"] | None
Routing = Mapping[int, tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]]

HOW = ("zero", "drop_and_renormalise", "reroute")


@contextmanager
def intervene(parts: Anatomy, *edits: Edit) -> Iterator[None]:
    """Change what the model computes while the block runs; nothing is left behind, nor after an exception in it.

    Blocks can be nested. Without edits, the model is as it was, bit for bit.
    """
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit(parts))
        yield


def block_experts(marks: Marks, how: str = "zero", at: Positions = None) -> Edit:
    """Take the marked routed experts away, after the model's own choice of experts or before it.

    - `zero`: their gate weights become 0, all others stay (KA's reading);
    - `drop_and_renormalise`: besides, the weights of the other chosen experts grow until the sum is what it was;
    - `reroute`: they are hidden from the router's top-k, so that the next expert steps in. Other experts' scores stay:
      they are hidden after the router's softmax, where it has one before its top-k.

    Tokens that did not choose a marked expert keep every bit. Raises ValueError for another `how`, and, from within the
    forward pass, if a router chose a hidden expert: because it does not choose by torch.topk, or fewer than k are left.
    """
    if how not in HOW:
        raise ValueError(f"how='{how}': not a way to block experts; use one of {', '.join(HOW)}")
    if how == "reroute":
        return _rerouted(marks, at)

    def change(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        hit = _per_token(marks[layer.index], ids, at).gather(1, ids.long())
        left = weights.masked_fill(hit, 0)
        if how == "drop_and_renormalise":
            total, rest = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
            grown = left * torch.where(rest == 0, 0, total / rest)
            left = torch.where(hit.any(-1, keepdim=True), grown, left)
        return ids, left

    return _on_choice(change, marks)


def keep_experts(marks: Marks, at: Positions = None) -> Edit:
    """Keep the contributions of the marked routed experts alone: `zero` for all others in the layers named."""
    return block_experts({layer: ~kept for layer, kept in marks.items()}, at=at)


def keep_top(n: int, at: Positions = None) -> Edit:
    """Keep the n routed experts with the largest gate weights of each token; the others get weight 0."""

    def change(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return ids, weights.masked_fill(_everywhere(rank >= n, at), 0)

    return _on_choice(change)


def force_experts(marks: Marks, at: Positions = None) -> Edit:
    """Make the marked routed experts chosen ones: each takes the place, and the gate weight, of the weakest other.

    Marked experts that are chosen already keep theirs. Raises ValueError, from within the forward pass, if more are
    marked for a token than it chooses.
    """

    def change(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        marked = _per_token(marks[layer.index], ids, at)
        if (marked.sum(-1) > ids.shape[1]).any():
            raise ValueError(f"layer {layer.index}: more experts are forced on than the {ids.shape[1]} of a token")
        chosen = torch.zeros_like(marked).scatter_(1, ids.long(), True)
        missing = marked & ~chosen
        place = weights.masked_fill(marked.gather(1, ids.long()), torch.inf).argsort(dim=-1, stable=True)
        newcomer = missing.int().argsort(dim=-1, descending=True, stable=True)[:, : ids.shape[1]]
        there = missing.gather(1, newcomer)
        value = torch.where(there, newcomer.to(ids.dtype), ids.gather(1, place))
        return ids.scatter(1, place, value), weights

    return _on_choice(change, marks)


@contextmanager
def record_routing(parts: Anatomy) -> Iterator[dict[int, tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]]]:
    """The choice of experts and its gate weights at every token of the forward pass in the block, for `replay`."""
    routing: dict[int, tuple[Tensor, Tensor]] = {}

    def change(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        routing[layer.index] = (ids, weights)
        return ids, weights

    with intervene(parts, _on_choice(change)):
        yield routing


def replay(routing: Routing, at: Positions = None) -> Edit:
    """Hold the routing of a recorded run: its experts with its gate weights, whatever the router now says.

    What is left of an effect is direct; the rest came about by other experts being chosen. Of other tokens than were
    recorded it raises ValueError, from within the forward pass.
    """

    def change(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        recorded = routing[layer.index]
        if recorded[0].shape != ids.shape:
            shapes = " and ".join(str(tuple(x.shape)) for x in (recorded[0], ids))
            raise ValueError(
                f"layer {layer.index}: recorded and present routing have the shapes {shapes}; replay the same"
            )
        where = _everywhere(torch.ones_like(ids, dtype=torch.bool), at)
        return torch.where(where, recorded[0], ids), torch.where(where, recorded[1], weights)

    return _on_choice(change, routing)


def replace_experts(
    marks: Marks, by: Mapping[int, Float[Tensor, "*rows experts d_model"]], at: Positions = None
) -> Edit:
    """Where a marked expert is chosen, another output in place of its own (gate weight included).

    `by` is [experts d_model] or [rows experts d_model], as from models.expert_outputs: means over prompts (`mean`), or
    what the experts gave for another prompt (`resample`).
    """

    def removed(layer: Layer, marked: Tensor, ids: Tensor, hit: Tensor) -> Tensor:
        given = by[layer.index].to(ids.device)
        token = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        every = given[ids.long()] if given.ndim == 2 else given[token // (len(ids) // len(given)), ids.long()]
        # The mean over no prompt is NaN.
        return every.masked_fill(~hit.unsqueeze(-1), 0).sum(1)

    return _exchanged(marks, removed, at)


def restore_experts(marks: Marks, by: Mapping[int, Float[Tensor, "tokens d_model"]], at: Positions = None) -> Edit:
    """At tokens with a mark, `by` in place of all that the marked experts contribute, be they chosen or not."""

    def restored(layer: Layer, marked: Tensor, ids: Tensor, hit: Tensor) -> Tensor:
        return by[layer.index].to(ids.device).masked_fill(~marked.any(-1, keepdim=True), 0)

    return _exchanged(marks, restored, at)


def block_shared(marks: Marks, by: Mapping[int, Tensor] | None = None, at: Positions = None) -> Edit:
    """The marked shared experts [rows n_shared]: output of the down projection 0, or `by` [rows n_shared d_model].

    A shared expert's own gate still multiplies what is put in its place.
    """

    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for layer in _named(parts, marks):
            for i, shared in enumerate(layer.shared):
                value = None if by is None else by[layer.index][..., i, :]
                yield _on_output(shared.down, _substituting(marks[layer.index][:, i : i + 1], value, at))

    return _hooked(handles)


def block_heads(marks: Marks, by: Mapping[int, Tensor] | None = None, at: Positions = None) -> Edit:
    """The marked heads [rows heads]: input of the output projection 0, or `by` [rows heads head_dim].

    Raises ValueError for a layer whose attention block is one component.
    """

    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for layer in _named(parts, marks):
            if layer.attention is None or layer.attention.out_proj is None:
                raise ValueError(
                    f"layer {layer.index} has no heads that can be told apart; block its attention as a whole"
                )
            value = None if by is None else by[layer.index]
            change = _substituting(marks[layer.index].unsqueeze(-1), value, at, units=layer.n_heads)
            yield _on_input(layer.attention.out_proj, change)

    return _hooked(handles)


def block_neurons(
    marks: Mapping[tuple[int, int], Bool[Tensor, "rows neurons"]],
    by: Mapping[tuple[int, int], Tensor] | None = None,
    at: Positions = None,
) -> Edit:
    """The marked neurons of (layer, expert): activation 0, or `by` [neurons] or [rows neurons].

    An expert is named as in neuron tables: routed ones from 0, shared expert i is -1 - i, a dense FFN is 0. A dense or
    shared neuron is blocked before its down projection; of a routed expert, whose activations no backend hands out, the
    neurons' contribution is subtracted from the output, to the rounding of the model's dtype.
    """

    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for (index, expert), marked in marks.items():
            layer, value = parts.layers[index], None if by is None else by[index, expert]
            if expert >= 0 and layer.experts is not None:
                yield from _without_neurons(layer.experts.module, expert, marked, value, at)
            else:
                part = layer.dense if expert >= 0 else layer.shared[-1 - expert]
                if part is None:
                    raise ValueError(f"layer {index}: its FFN is one component; it has no neurons to block")
                yield _on_input(part.down, _substituting(marked, value, at))

    return _hooked(handles)


def block_attention(
    marks: Mapping[int, Bool[Tensor, " rows"]] | None = None,
    by: Mapping[int, Tensor] | None = None,
    at: Positions = None,
) -> Edit:
    """Attention blocks of the marked rows: output 0, or `by` [d_model], [rows d_model] or a row a token; None: all."""
    return _blocks(lambda layer: [layer.attention.module] if layer.attention is not None else [], marks, by, at)


def block_ffn(
    marks: Mapping[int, Bool[Tensor, " rows"]] | None = None,
    by: Mapping[int, Tensor] | None = None,
    at: Positions = None,
) -> Edit:
    """FFN blocks of the marked rows, dense or MoE with its shared experts: output 0, or `by` as in block_attention."""

    def modules(layer: Layer) -> list[nn.Module]:
        if by is not None and len(layer.ffn_modules) != 1:
            raise ValueError(
                f"layer {layer.index}: its FFN has {len(layer.ffn_modules)} parts; replace them one by one"
            )
        return layer.ffn_modules

    return _blocks(modules, marks, by, at)


def replace_states(
    states: Mapping[int, Float[Tensor, "rows length d_model"]], at: Mapping[int, Bool[Tensor, "rows length"]]
) -> Edit:
    """The residual stream after a layer, at the marked positions of each row."""

    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for layer in _named(parts, states):
            given, where = states[layer.index], at[layer.index]
            if given.shape[:2] != where.shape:
                shapes = f"{tuple(given.shape[:2])} and {tuple(where.shape)}"
                raise ValueError(f"layer {layer.index}: states and positions of {shapes} rows and tokens; give as many")
            yield _on_output(layer.block, _substituting(where.reshape(-1, 1), given.flatten(0, 1), None))

    return _hooked(handles)


class _Hidden(TorchFunctionMode):
    """Hides experts from every torch.topk over all of a layer's experts, until the experts are called."""

    def __init__(self, at: Positions) -> None:
        super().__init__()
        self.marks: Tensor | None = None
        self.at = at

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.topk, Tensor.topk) and self.marks is not None:
            scores, *rest = args or (kwargs.pop("input"),)
            if scores.shape[-1] == self.marks.shape[-1]:
                hidden = _per_token(self.marks, scores.flatten(0, -2), self.at)
                scores = scores.masked_fill(hidden.view(scores.shape), -torch.inf)
            args = (scores, *rest)
        return func(*args, **kwargs)


def _rerouted(marks: Marks, at: Positions) -> Edit:
    @contextmanager
    def edit(parts: Anatomy) -> Iterator[None]:
        mode = _Hidden(at)

        def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
            for layer in _named(parts, marks):

                def begin(module: nn.Module, args: Any, kwargs: Any, marked: Tensor = marks[layer.index]) -> None:
                    mode.marks = marked

                yield layer.block.register_forward_pre_hook(begin, with_kwargs=True)

        def check(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            mode.marks = None
            if _per_token(marks[layer.index], ids, at).gather(1, ids.long()).any():
                raise ValueError(
                    f"layer {layer.index}: the router chose an expert that is hidden from it: fewer than {ids.shape[1]}"
                    " are left, or it does not choose by torch.topk; block with 'zero' instead"
                )
            return ids, weights

        with mode, intervene(parts, _hooked(handles), _on_choice(check, marks)):
            yield

    return edit


def _on_choice(
    change: Callable[[Layer, Tensor, Tensor], tuple[Tensor, Tensor]], named: Iterable[int] | None = None
) -> Edit:
    """Put what `change` makes of the chosen experts and gate weights [tokens k] of each layer in their place."""

    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for layer in _named(parts, named):
            if layer.experts is None:
                continue

            def hook(module: nn.Module, args: Any, kwargs: Any, layer: Layer = layer) -> Any:
                hidden, ids, weights = experts_arguments(module, args, kwargs)
                new_ids, new_weights = change(layer, ids.flatten(0, -2), weights.flatten(0, -2))
                return (hidden, new_ids.view(ids.shape), new_weights.view(weights.shape)), {}

            yield layer.experts.module.register_forward_pre_hook(hook, with_kwargs=True)

    return _hooked(handles)


def _exchanged(marks: Marks, added: Callable[[Layer, Tensor, Tensor, Tensor], Tensor], at: Positions) -> Edit:
    """Weights of marked chosen experts to 0, and added(layer, marks, ids, what was hit) to the experts' output."""
    pending: dict[int, Tensor] = {}

    def change(layer: Layer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        marked = _per_token(marks[layer.index], ids, at)
        hit = marked.gather(1, ids.long())
        pending[layer.index] = added(layer, marked, ids, hit)
        return ids, weights.masked_fill(hit, 0)

    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for layer in _named(parts, marks):
            if layer.experts is not None:

                def add(x: Tensor, index: int = layer.index) -> Tensor:
                    return x + pending.pop(index).to(x.dtype)

                yield _on_output(layer.experts.module, add)

    @contextmanager
    def edit(parts: Anatomy) -> Iterator[None]:
        with intervene(parts, _on_choice(change, marks), _hooked(handles)):
            yield

    return edit


def _without_neurons(
    experts: nn.Module, expert: int, marks: Tensor, by: Tensor | None, at: Positions
) -> Iterator[RemovableHandle]:
    pending: list[tuple[Tensor, Tensor]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden, ids, weights = (x.flatten(0, -2) for x in experts_arguments(module, args, kwargs))
        chosen, slot = (ids == expert).nonzero(as_tuple=True)
        pending.append((chosen, hidden[chosen, :0]))
        if len(chosen):
            marked = _per_token(marks, ids, at)[chosen]
            acts = expert_activations(module, hidden[chosen], torch.full_like(chosen, expert).unsqueeze(1))[:, 0]
            kept = 0 if by is None else _rows_of(by.to(acts), len(ids), marks.ndim)[chosen]
            with weights_of(module):
                down = expert_down(module, expert)
            gone = torch.where(marked, acts - kept, 0) @ down.T
            pending[-1] = chosen, gone * weights[chosen, slot].unsqueeze(-1)

    def after(x: Tensor) -> Tensor:
        chosen, gone = pending.pop()
        return x.index_add(0, chosen, gone.to(x.dtype), alpha=-1) if len(chosen) else x

    yield experts.register_forward_pre_hook(before, with_kwargs=True)
    yield _on_output(experts, after)


def _blocks(
    modules: Callable[[Layer], list[nn.Module]],
    marks: Mapping[int, Tensor] | None,
    by: Mapping[int, Tensor] | None,
    at: Positions,
) -> Edit:
    def handles(parts: Anatomy) -> Iterator[RemovableHandle]:
        for layer in _named(parts, marks):
            marked = torch.ones(1, 1, dtype=torch.bool) if marks is None else marks[layer.index].unsqueeze(-1)
            value = None if by is None else by[layer.index]
            yield from (_on_output(module, _substituting(marked, value, at)) for module in modules(layer))

    return _hooked(handles)


def _substituting(marks: Tensor, by: Tensor | None, at: Positions, units: int = 0) -> Callable[[Tensor], Tensor]:
    """A function that puts 0, or `by`, in the marked places of [tokens width], or [tokens units width / units]."""

    def change(x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (units, -1)) if units else x
        where = _per_token(marks, x, at)
        new = torch.zeros((), dtype=x.dtype, device=x.device)
        if by is not None:
            new = _rows_of(by.to(x), len(x), parts.ndim)
        return torch.where(where, new, parts).view(x.shape)

    return change


def _per_token(marks: Bool[Tensor, "rows *units"], tokens: Tensor, at: Positions) -> Bool[Tensor, "tokens *units"]:
    """Marks of rows as marks of tokens, of those at the positions."""
    return _everywhere(_rows_of(marks.to(tokens.device), len(tokens), marks.ndim), at)


def _rows_of(x: Tensor, n: int, ndim: int) -> Tensor:
    """A row for each of n tokens, from a row for each row of the batch, or (with one dimension fewer) one for all."""
    x = x.unsqueeze(0) if x.ndim < ndim else x
    if n % len(x):
        raise ValueError(
            f"{n} tokens do not divide into {len(x)} rows; give a row for each row of the batch, or each token"
        )
    return x.expand(n, *x.shape[1:]) if len(x) == 1 else x.repeat_interleave(n // len(x), dim=0)


def _everywhere(marks: Bool[Tensor, "tokens *units"], at: Positions) -> Bool[Tensor, "tokens *units"]:
    return marks if at is None else marks & at.to(marks.device).reshape(-1, *[1] * (marks.ndim - 1))


def _named(parts: Anatomy, named: Iterable[int] | None) -> Iterator[Layer]:
    return (layer for layer in parts.layers if named is None or layer.index in named)


def _hooked(handles: Callable[[Anatomy], Iterator[RemovableHandle]]) -> Edit:
    """An edit that is made of hooks; those that are registered are removed, whatever happens."""

    @contextmanager
    def edit(parts: Anatomy) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in handles(parts):
                stack.callback(handle.remove)
            yield

    return edit


def _on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Change the first argument of each call of a module, shown as [tokens width]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0].flatten(0, -2)).view(args[0].shape), *args[1:])

    return module.register_forward_pre_hook(hook)


def _on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Change the output of each call of a module, or the first of several, shown as [tokens width]."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = change(first.flatten(0, -2)).view(first.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)

"""The anatomy of a model, found by watching a short forward pass: which modules' outputs make the residual stream.

Every module's inputs and outputs are recorded for a few tokens. The increment of each layer is then written as a
sum of module outputs, each traced back through post-norms to linear maps and experts; a coefficient must be 1, or a
number (or one over it) that the model's configuration or the module itself holds. No table of model names; the only
attributes that are asked for by name are those of transformers' experts interface and the epsilon of a norm.
`capture.verify` checks the same sums again on real prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope.models import (
    Anatomy,
    AnatomyError,
    Attention,
    Dense,
    Experts,
    Layer,
    Norm,
    Path,
    is_experts,
    is_linear,
    weight_of,
)

PROBE = 8
"""Tokens of the forward pass that is watched."""
ROUNDINGS = 4
"""A sum counts as found when what it leaves is, in every entry, at most this many rounding errors."""
TOLERANCE = 32
"""Rounding errors, relative to the largest entry, that a whole norm or unembedding may make."""


@dataclass(eq=False)
class Call:
    """One call of a module: its first tensor argument and its output, both [tokens width], and the calls inside."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Tensor | None = None
    output: Tensor | None = None
    heads: int = 0
    inside: list[Call] = field(default_factory=list)

    def all(self) -> Iterator[Call]:
        """Itself and all calls inside, the innermost first."""
        for call in self.inside:
            yield from call.all()
        yield self


@dataclass(frozen=True)
class Term:
    """factor x gate x the output of a call, carried through post-norms."""

    call: Call
    factor: float = 1.0
    gate: nn.Module | None = None
    norms: tuple[Norm, ...] = ()

    @property
    def path(self) -> Path:
        return Path(self.factor, self.norms)


@torch.no_grad()
def find(model: PreTrainedModel) -> Anatomy:
    """The parts of a decoder that write to its residual stream.

    Runs PROBE tokens forward, with eager attention, which alone shows how many heads there are. Raises AnatomyError,
    naming the layer and what is missing, for a structure that is not understood.
    """
    name = type(model).__name__
    unembedding = model.get_output_embeddings()
    if not isinstance(unembedding, nn.Linear):
        raise AnatomyError(f"{name}: no linear unembedding found; this is not a causal language model")
    dtype = str(model.dtype).removeprefix("torch.")
    if model.dtype == torch.float64:
        raise AnatomyError(f"{name}: float64 is more than is recorded here; set dtype to float32")
    root, logits = _watch(model)
    if not logits.isfinite().all():
        raise AnatomyError(f"{name}: its logits are not finite in {dtype}; set dtype to bfloat16 or float32")
    numbers = sorted({1.0, *_numbers(model.config.get_text_config().to_dict())})
    blocks = _stack(root, unembedding.in_features, name)
    layers = tuple(_layer(index, call, numbers) for index, call in enumerate(blocks))
    last = cast(Tensor, blocks[-1].output)
    norm = next((_norm(c) for c in root.all() if c not in blocks and _same(c.input, last) and _norm(c)), None)
    if norm is None:
        raise AnatomyError(f"{name}: no norm found between the last layer and the unembedding")
    # Some models keep their residual stream in float32 whatever their weights are in.
    raw = unembedding(norm.module(last).to(unembedding.weight.dtype))
    scale, softcap = _readout(raw, logits, numbers, name)
    return Anatomy(layers, norm, unembedding, scale, softcap)


def levels(parts: Anatomy) -> dict[str, Any]:
    """What can be told apart in a model, and why not where it cannot: a summary for people."""
    reasons = sorted({r for layer in parts.layers for r in (layer.whole, getattr(layer.attention, "whole", "")) if r})
    return {
        "layers": len(parts.layers),
        "with_heads": sum(layer.n_heads > 0 for layer in parts.layers),
        "with_experts": sum(layer.n_experts > 0 for layer in parts.layers),
        "with_shared_experts": sum(bool(layer.shared) for layer in parts.layers),
        "with_dense_neurons": sum(layer.dense is not None for layer in parts.layers),
        "reasons": reasons,
    }


def check_kind(parts: Anatomy, moe: bool) -> None:
    """Raises AnatomyError for a model without routed experts where some are asked for, and the other way round."""
    if moe and not parts.is_moe:
        why = "; ".join(levels(parts)["reasons"]) or "all FFNs are dense"
        raise AnatomyError(
            f"kind: moe, but no routed experts can be told apart ({why}); set kind to dense to study layers and heads"
        )
    if parts.is_moe and not moe:
        raise AnatomyError("kind: dense, but the model has routed experts; set kind to moe")


def _watch(model: PreTrainedModel) -> tuple[Call, Tensor]:
    """The tree of calls of a forward pass over PROBE tokens, and its logits [tokens vocab]."""
    ends = [value for key, value in model.config.to_dict().items() if key.endswith("token_id")]
    special = {i for value in ends for i in (value if isinstance(value, list) else [value])}
    embedding = cast(Tensor, cast(nn.Module, model.get_input_embeddings()).weight)
    vocabulary = len(embedding)
    step = max(1, vocabulary // (4 * PROBE))
    usual = [i for i in range(step, vocabulary) if i % step == 0 and i not in special][:PROBE]
    stack: list[Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((x for x in (*args, *kwargs.values()) if _is_states(x)), None)
        call = Call(module, args, kwargs, None if first is None else first.detach().flatten(0, -2).clone())
        if stack:
            stack[-1].inside.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = stack.pop() if len(stack) > 1 else stack[0]
        outputs = output if isinstance(output, tuple | list) else [output]
        first = next((x for x in outputs if _is_states(x)), None)
        call.output = None if first is None else first.detach().flatten(0, -2).clone()
        weights = [x for x in outputs if isinstance(x, Tensor) and x.ndim == 4 and x.shape[-2:] == (PROBE, PROBE)]
        call.heads = weights[0].shape[1] if weights else 0

    with ExitStack() as hooks:
        hooks.enter_context(_eager_attention(model))
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        ids = torch.tensor([usual], device="cpu" if embedding.is_meta else embedding.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return stack[0], logits


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _is_states(x: Any) -> bool:
    """Floating-point values for each of the probe's tokens."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3) and x.shape[:-1].numel() == PROBE


def _stack(root: Call, hidden: int, name: str) -> list[Call]:
    """The calls of the decoder layers: the longest chain of modules in which each reads what the one before wrote."""
    chains: list[list[Call]] = []
    for parent in root.all():
        chain: list[Call] = []
        for call in parent.inside:
            if call.input is None or call.output is None or not len(call.inside) or not _wide(call, hidden):
                continue
            if chain and not _same(chain[-1].output, call.input):
                chains.append(chain)
                chain = []
            chain.append(call)
        chains.append(chain)
    listed = {m for module in root.module.modules() if isinstance(module, nn.ModuleList) for m in module}
    chain = max(([c for c in chain if c.module in listed] for chain in chains), key=len, default=[])
    if not chain:
        raise AnatomyError(f"{name}: no stack of layers found in which each reads what the one before wrote")
    return chain


def _layer(index: int, call: Call, numbers: Sequence[float]) -> Layer:
    """What a layer adds to the residual stream, block by block."""
    here = f"layer {index}"
    states, written = [cast(Tensor, call.input)], list[list[Term]]()
    readers: list[nn.Module | None] = [None]
    seen: list[Call] = []
    numbers = sorted({*numbers, *_scalars(call.module)})
    for inner in [*call.inside, replace(call, input=call.output)]:
        x = inner.input
        if x is None or x.shape != states[0].shape:
            seen.append(inner)
            continue
        if not any(_same(x, state) for state in states) and not any(_same(x, c.output) for c in seen):
            terms = _sum(x, seen, numbers, states[-1])
            if terms:
                written.append(terms)
                states.append(x)
                readers.append(inner.module)
        seen.append(inner)
    if not _same(states[-1], call.output):
        raise AnatomyError(
            f"{here}: its output is not the residual stream plus outputs of its modules; this structure of the"
            " residual stream is not understood"
        )
    blocks = [[leaf for term in terms for leaf in _leaves(term, call.inside, numbers, here)] for terms in written]
    attention, ffn, middle = [], [], None
    for position, leaves in enumerate(blocks):
        looks_back = [_looks_back(leaf.call) and not _experts_in(leaf.call) for leaf in leaves]
        attention += [leaf for leaf, looks in zip(leaves, looks_back, strict=True) if looks]
        ffn += [leaf for leaf, looks in zip(leaves, looks_back, strict=True) if not looks]
        if position == 0 and all(looks_back) and len(blocks) > 1:
            middle = readers[1]
        elif position and any(looks_back):
            raise AnatomyError(f"{here}: an attention block after an FFN block in one layer is not understood")
    if len(attention) > 1:
        raise AnatomyError(f"{here}: {len(attention)} attention blocks in one layer are not understood")
    return Layer(
        index,
        call.module,
        _attention(attention[0], numbers) if attention else None,
        middle,
        **_ffn(ffn, attention, call, numbers),
    )


def _attention(leaf: Term, numbers: Sequence[float]) -> Attention:
    heads = next((c.heads for c in leaf.call.all() if c.heads), 0)
    atoms = _atoms(leaf, numbers)
    if not heads:
        return Attention(leaf.call.module, leaf.path, None, 0, "an attention block that shows no attention weights")
    if atoms is None or len(atoms) != 1 or atoms[0].gate or not is_linear(atoms[0].call.module):
        return Attention(
            leaf.call.module, leaf.path, None, 0, "an attention output that is not one linear map of heads"
        )
    if weight_of(atoms[0].call.module).shape[1] % heads:
        return Attention(leaf.call.module, leaf.path, None, 0, "an output projection that the heads do not divide")
    if not _heads_are_slices(leaf.call, atoms[0].call.module, heads):
        return Attention(leaf.call.module, leaf.path, None, 0, "heads that are mixed before the output projection")
    return Attention(leaf.call.module, atoms[0].path, atoms[0].call.module, heads)


def _ffn(leaves: Sequence[Term], attention: Sequence[Term], layer: Call, numbers: Sequence[float]) -> dict[str, Any]:
    """The FFN fields of a Layer."""
    routed, dense = list[Term](), list[Dense]()
    found: dict[str, Any] = {"experts": None, "shared": (), "dense": None}
    whole = found | {"whole_ffn": tuple((leaf.call.module, leaf.path) for leaf in leaves)}
    for leaf in leaves:
        atoms = _atoms(leaf, numbers)
        if atoms is None:
            return whole | {
                "whole": "an FFN whose output is no sum of linear maps and experts of the experts interface"
            }
        for atom in atoms:
            if is_experts(atom.call.module):
                routed.append(atom)
            else:
                dense.append(Dense(atom.call.module, atom.gate, atom.path))
    if len(routed) != len([c for leaf in leaves for c in _experts_in(leaf.call)]) or len(routed) > 1:
        return whole | {"whole": "experts whose outputs do not reach the residual stream by themselves"}
    if not routed:
        if len(dense) > 1:
            return whole | {"whole": f"{len(dense)} FFNs in one layer without experts"}
        return found | {"dense": dense[0] if dense else None}
    experts = routed[0].call.module
    if experts.has_post_expert_norm or not isinstance(experts.down_proj, Tensor) or routed[0].gate:
        return whole | {"whole": "experts with a norm, a gate or a weight format of their own"}
    router = _router(layer, routed[0].call, [leaf.call for leaf in attention])
    return found | {"experts": Experts(experts, router, routed[0].path), "shared": tuple(dense)}


def _router(layer: Call, experts: Call, attention: Sequence[Call]) -> nn.Module | None:
    """The first module, outside of attention and before the experts, that gives one number per expert."""
    count = len(cast(Tensor, experts.module.down_proj))
    elsewhere = {id(c) for call in attention for c in call.all()}
    for call in layer.all():
        if call is experts:
            return None
        if id(call) in elsewhere or call.input is None or call.output is None:
            continue
        # What corrects numbers per expert gives such numbers too.
        if call.output.shape[-1] == count != call.input.shape[-1]:
            return call.module
    return None


def _atoms(leaf: Term, numbers: Sequence[float]) -> list[Term] | None:
    """A block's output as a sum of outputs of linear maps and of routed experts; None where it is no such sum."""
    module = leaf.call.module
    if is_experts(module) or is_linear(module):
        return [leaf]
    target = leaf.call.output
    terms = _sum(target, leaf.call.inside, sorted({*numbers, *_scalars(module)})) if target is not None else None
    if not terms:
        return None
    found: list[Term] = []
    for term in terms:
        for inner in _leaves(term, leaf.call.inside, numbers, type(module).__name__):
            if leaf.gate is not None and inner.gate is not None:
                return None
            joined = Term(inner.call, leaf.factor * inner.factor, leaf.gate or inner.gate, (*inner.norms, *leaf.norms))
            atoms = _atoms(joined, numbers)
            if atoms is None or (inner.norms and leaf.gate):
                return None
            found += atoms
    return found


def _leaves(term: Term, calls: Sequence[Call], numbers: Sequence[float], here: str) -> list[Term]:
    """A term traced back through the post-norms that its module's output has passed."""
    norm = _norm(term.call)
    if norm is None:
        return [term]
    before = calls[: calls.index(term.call)]
    sources = _sum(cast(Tensor, term.call.input), before, numbers)
    if not sources:
        raise AnatomyError(f"{here}: the input of a post-norm ({type(norm.module).__name__}) is not understood")
    if norm.centred or norm.bias.any():
        raise AnatomyError(f"{here}: a post-norm that centres or adds a bias is not understood")
    carried = (replace(s, factor=s.factor * term.factor, norms=(*s.norms, norm)) for s in sources)
    return [leaf for source in carried for leaf in _through(source, calls, numbers, here)]


def _through(source: Term, calls: Sequence[Call], numbers: Sequence[float], here: str) -> list[Term]:
    leaves = _leaves(replace(source, norms=(), factor=1.0), calls, numbers, here)
    return [
        replace(
            leaf, factor=leaf.factor * source.factor, norms=(*leaf.norms, *source.norms), gate=leaf.gate or source.gate
        )
        for leaf in leaves
    ]


def _sum(
    target: Float[Tensor, "tokens d"],
    calls: Sequence[Call],
    numbers: Sequence[float],
    base: Float[Tensor, "tokens d"] | None = None,
) -> list[Term] | None:
    """`target` = `base` + a sum of outputs of `calls`, some times the sigmoid of a gate; the fewest that explain it.

    Coefficients come from least squares and must be one of `numbers`. None where no such sum is found.
    """
    gates = [c for c in calls if isinstance(c.module, nn.Linear) and c.output is not None and c.output.shape[-1] == 1]
    candidates: list[tuple[Term, Tensor]] = []
    for call in calls:
        out = call.output
        if out is None or out.shape != target.shape or any(_same(out, known) for _, known in candidates):
            continue
        if base is None and _same(out, target):
            return [Term(call)]
        candidates.append((Term(call), out))
        candidates += [(Term(call, gate=g.module), out * cast(Tensor, g.output).sigmoid()) for g in gates]
    rest = target.double() - (0 if base is None else base.double())
    if not candidates or not rest.any():
        return None
    # In units of what rounding can do to each entry: a few entries of a trained model's stream can be huge.
    noise = target.abs().double() + (0 if base is None else base.abs().double()) + rest.abs().median()
    noise = noise.flatten().cpu() * torch.finfo(target.dtype).eps
    goal = rest.flatten().cpu() / noise
    columns = torch.stack([value.double().flatten().cpu() / noise for _, value in candidates], 1)
    # All fits of fewer columns are fits within the span of all of them, where they cost nothing.
    basis, columns_in_it = torch.linalg.qr(columns)
    goal_in_it = basis.T @ goal
    outside = (goal - basis @ goal_in_it).pow(2).sum()

    def fit(some: list[int]) -> tuple[Tensor, float]:
        """Least squares: coefficients, and the root mean square of what is left."""
        part = columns_in_it[:, some]
        solution = torch.linalg.lstsq(part, goal_in_it.unsqueeze(1), driver="gelsd").solution[:, 0]
        return solution, float(((part @ solution - goal_in_it).pow(2).sum() + outside).div(len(goal)).sqrt())

    kept = list(range(len(candidates)))
    factors, whole = fit(kept)
    while len(kept) > 1:
        tried = [[k for k in kept if k != out] for out in kept]
        fits = [fit(some) for some in tried]
        smallest = min(range(len(fits)), key=lambda i: fits[i][1])
        if fits[smallest][1] > max(1.1 * whole, 0.01):
            break
        kept, factors = tried[smallest], fits[smallest][0]
    snapped = [_snap(float(factor), numbers) for factor in factors]
    if any(factor is None for factor in snapped):
        return None
    left = goal - columns[:, kept] @ torch.tensor(snapped, dtype=torch.float64)
    if float(left.abs().max()) > ROUNDINGS:
        return None
    return [replace(candidates[k][0], factor=cast(float, f)) for k, f in zip(kept, snapped, strict=True)]


def _snap(value: float, numbers: Sequence[float], tolerance: float = 0.01) -> float | None:
    """The number of the configuration, or one over it, that a fitted coefficient stands for."""
    near = [n for number in numbers if number for n in (number, 1 / number) if abs(n - value) <= tolerance * abs(n)]
    return min(near, key=lambda n: (abs(n - value), n != 1.0)) if near else None


def _norm(call: Call) -> Norm | None:
    """What a call's module does if it is a norm: asked of the module itself with vectors of +1 and -1."""
    module, x, y = call.module, call.input, call.output
    shapes = [tuple(p.shape) for p in module.parameters()]
    if call.inside or x is None or y is None or x.shape != y.shape or isinstance(module, nn.Linear):
        return None
    if any(shape != (x.shape[-1],) for shape in shapes):
        return None
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None
    )
    if not isinstance(eps, float):
        return None
    signs = torch.ones_like(x[0])
    signs[1::2] = -1
    plus, minus, ones = (module(v.view(1, 1, -1)).flatten() for v in (signs, -signs, torch.ones_like(signs)))
    gain, bias = (plus - minus) / 2 * signs * (1 + eps) ** 0.5, (plus + minus) / 2
    centred = bool((ones - bias).abs().max() < 0.01 * gain.abs().max())
    norm = Norm(module, gain, bias, centred, eps)
    centre = x.float() - x.float().mean(-1, keepdim=True) if centred else x.float()
    expected = centre * norm.scale(x).unsqueeze(-1) * gain.float() + bias.float()
    error = float((expected - y.float()).abs().max() / y.float().abs().max().clamp_min(1e-30))
    return norm if error <= TOLERANCE * torch.finfo(y.dtype).eps else None


def _heads_are_slices(call: Call, out_proj: nn.Module, heads: int) -> bool:
    """Whether the input of the output projection is one slice a head, asked of the attention block itself.

    That the slices of a sum add up says nothing about what they are. So there must be values whose removal leaves the
    slices of the heads that read them at zero, and all others as they were (or in proportion, where a norm follows).
    """
    seen: list[Tensor] = []
    handle = out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    try:
        _again(call, cast(Tensor, call.input))
        whole = seen.pop().unflatten(-1, (heads, -1)).float()
        width = whole.shape[-1]
        for linear in {c.module for c in call.all() if is_linear(c.module)} - {out_proj}:
            for start, own in _first_values(weight_of(linear).shape[0], heads, width):
                with _without(linear, start, width):
                    _again(call, cast(Tensor, call.input))
                left = seen.pop().unflatten(-1, (heads, -1)).float()
                if not left[:, :own].any() and _in_proportion(left[:, own:], whole[:, own:]):
                    return True
        return False
    finally:
        handle.remove()


def _first_values(total: int, heads: int, width: int) -> Iterator[tuple[int, int]]:
    """Where the values of the first head can start in a projection, and how many heads share them.

    Values come last, or of each head (of its query, key and value) last or in the middle.
    """
    for own in range(1, heads + 1):
        if heads % own == 0 and total >= heads // own * width:
            yield total - heads // own * width, own
    if total % heads == 0 and total // heads > width:
        yield total // heads - width, 1
        yield width, 1


@contextmanager
def _without(linear: nn.Module, start: int, width: int) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[..., start : start + width] = 0
        return output

    handle = linear.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _in_proportion(x: Float[Tensor, "tokens heads width"], y: Float[Tensor, "tokens heads width"]) -> bool:
    """Whether, token by token, x is y times a number that is not 0."""
    size = (x * y).sum((1, 2), keepdim=True) / (y * y).sum((1, 2), keepdim=True).clamp_min(1e-30)
    return not y.numel() or bool(((x - size * y).norm() <= 1e-2 * x.norm()) & (size != 0).all())


def _again(call: Call, states: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
    """A module called once more as it was, but with other states; its output."""
    hit = False

    def other(x: Any) -> Any:
        nonlocal hit
        if not hit and _is_states(x):
            hit = True
            return states.view_as(x)
        return x

    args = tuple(other(x) for x in call.args)
    kwargs = {key: other(x) for key, x in call.kwargs.items()}
    output = call.module(*args, **kwargs)
    first = next(x for x in (output if isinstance(output, tuple | list) else [output]) if _is_states(x))
    return first.flatten(0, -2)


def _looks_back(call: Call) -> bool:
    """Whether a token's output depends on the token before it: asked of the module itself."""
    states = cast(Tensor, call.input)
    changed = states.clone()
    changed[-2] = states[-2].flip(-1) + 1
    before, after = cast(Tensor, call.output)[-1].float(), _again(call, changed)[-1].float()
    # Many entries by more than rounding, not the largest one alone: a few entries of some models are huge.
    return float(((before - after).abs() > 0.01 * before.abs()).float().mean()) > 0.1


def _readout(
    raw: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"], numbers: Sequence[float], name: str
) -> tuple[float, float]:
    """(factor, softcap) with which the unembedding of the normed final state gives the logits."""
    limit = TOLERANCE * torch.finfo(raw.dtype).eps * float(logits.abs().max())
    raw, logits = raw.double().cpu(), logits.double().cpu()
    for cap in (0.0, *(n for n in numbers if n > 1)):
        # Only where the cap is not reached does a logit tell the factor.
        low = logits.abs() < (0.5 * cap if cap else torch.inf)
        straight = cap * torch.atanh(logits[low] / cap) if cap else logits[low]
        factor = _snap(float((straight * raw[low]).sum() / (raw[low] ** 2).sum()), numbers) if low.any() else 1.0
        if factor is not None:
            expected = cap * torch.tanh(factor * raw / cap) if cap else factor * raw
            if float((expected - logits).abs().max()) <= limit:
                return factor, cap
    raise AnatomyError(f"{name}: its logits are not the unembedding of the normed final state, times a number")


def _experts_in(call: Call) -> list[Call]:
    return [c for c in call.all() if is_experts(c.module)]


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and x.shape == y.shape and torch.equal(x.to(y.device), y)


def _wide(call: Call, hidden: int) -> bool:
    return all(t is not None and t.shape[-1] == hidden for t in (call.input, call.output))


def _numbers(values: Any) -> Iterator[float]:
    """All numbers of a configuration, at every depth."""
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, int | float) and not isinstance(values, bool):
        yield float(values)
    elif isinstance(values, list | tuple | type({}.values())):
        for value in values:
            yield from _numbers(value)


def _scalars(module: nn.Module) -> Iterator[float]:
    """Numbers that a module keeps as attributes, or as parameters or buffers of one element."""
    for part in module.modules():
        yield from (float(v) for v in vars(part).values() if isinstance(v, float))
        yield from (
            float(t) for t in (*part.parameters(False), *part.buffers(False)) if t.numel() == 1 and not t.is_meta
        )

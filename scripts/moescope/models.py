"""The parts of a model that write to its residual stream, and what each of them writes.

`anatomy.find` finds them by structure and checks them by arithmetic; nothing goes by a model's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MAX_LOGITS = 2**24
"""Numbers that are held at once, beside weights: 64 MiB of float32."""


FITS = 0.02
"""How far gate weights may be from proportional to a router's probabilities, relatively, in half precision too."""


class AnatomyError(ValueError):
    """A model whose parts cannot be found or do not add up."""


@dataclass(frozen=True)
class Norm:
    """A norm, y = gain * scale(x) * x + bias, where x is centred first if `centred` (LayerNorm)."""

    module: nn.Module
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    eps: float

    def scale(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n"]:
        """1 / root mean square of x, in float32: what the norm multiplies with, beside its gain."""
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return torch.rsqrt(x.pow(2).mean(-1) + self.eps)


@dataclass(frozen=True)
class Path:
    """How a block's output reaches the residual stream: through post-norms, the first one first, times a factor."""

    factor: float = 1.0
    norms: tuple[Norm, ...] = ()

    def carry(
        self, vectors: Float[Tensor, "n *units d_model"], scale: Float[Tensor, " n"] | None
    ) -> Float[Tensor, "n *units d_model"]:
        """What of these vectors is added to the residual stream, the post-norms' scales held as recorded."""
        if self.factor != 1.0:
            vectors = vectors * self.factor
        if self.norms and scale is not None:
            gain = reduce(torch.mul, (norm.gain for norm in self.norms))
            vectors = vectors * _exact(gain) * scale.to(vectors.dtype).view(-1, *[1] * (vectors.ndim - 1))
        return vectors


@dataclass(frozen=True)
class Attention:
    """The block of a layer that looks at other positions.

    Head h is dimensions [h head_dim, (h + 1) head_dim) of the input of `out_proj`. A block without heads that can
    be told apart (linear attention, state-space) has no `out_proj`: it is one component, and `whole` says why.
    """

    module: nn.Module
    path: Path
    out_proj: nn.Module | None
    n_heads: int
    whole: str = ""


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer, a module that transformers' experts interface calls."""

    module: nn.Module
    router: nn.Module | None
    path: Path

    @property
    def count(self) -> int:
        """Number of routed experts."""
        return len(cast(Tensor, self.module.down_proj))


@dataclass(frozen=True)
class Dense:
    """A dense FFN, or a shared expert: every token passes through it, times sigmoid(gate) if there is one.

    Neuron k is column k of `down`, the map onto the residual stream.
    """

    down: nn.Module
    gate: nn.Module | None
    path: Path


@dataclass(frozen=True)
class Layer:
    """What writes to the residual stream in one decoder layer.

    An MoE layer has `experts` and any number of `shared` experts, a dense one has `dense`. An FFN that cannot be
    told apart is one component, with its modules in `whole_ffn` and the reason in `whole`. Either block can be
    missing. `middle` is a module that reads the residual stream between the two blocks.
    """

    index: int
    block: nn.Module
    attention: Attention | None
    middle: nn.Module | None
    experts: Experts | None
    shared: tuple[Dense, ...]
    dense: Dense | None
    whole_ffn: tuple[tuple[nn.Module, Path], ...] = ()
    whole: str = ""

    @property
    def n_heads(self) -> int:
        """Heads that can be told apart, 0 if there are none."""
        return self.attention.n_heads if self.attention is not None else 0

    @property
    def n_experts(self) -> int:
        """Number of routed experts, 0 for a dense FFN."""
        return self.experts.count if self.experts is not None else 0

    @property
    def ffn_modules(self) -> list[nn.Module]:
        """The modules whose outputs make the FFN's."""
        dense = [part.down for part in (self.dense, *self.shared) if part is not None]
        routed = [self.experts.module] if self.experts is not None else []
        return dense + routed + [module for module, _ in self.whole_ffn]


@dataclass(frozen=True)
class Anatomy:
    """The layers of a model, its final norm and its unembedding.

    Logits are `logit_scale` times the unembedding of the normed final state, and then, if `softcap` is not 0,
    softcap tanh(logits / softcap).
    """

    layers: tuple[Layer, ...]
    final_norm: Norm
    unembedding: nn.Module
    logit_scale: float = 1.0
    softcap: float = 0.0

    @property
    def is_moe(self) -> bool:
        return any(layer.experts is not None for layer in self.layers)


@contextmanager
def weights_of(*modules: nn.Module | None) -> Iterator[None]:
    """Within the context the weights of these modules can be read, also where they are offloaded."""
    with ExitStack() as stack:
        for module in modules:
            if module is not None:
                stack.enter_context(align_module_device(module))
        yield


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with weights that can be read (nn.Linear, or GPT-2's Conv1D)."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_of(linear: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear map, whichever way round it is stored."""
    weight = cast(Tensor, linear.weight)
    return weight.T if isinstance(linear, Conv1D) else weight


def experts_arguments(
    experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, expert ids, gate weights) of a call through transformers' experts interface.

    The interface fixes their order; their names are each family's own.
    """
    bound = inspect.signature(type(experts).forward).bind(experts, *args, **kwargs)
    _, hidden, ids, weights = list(bound.arguments.values())[:4]
    return hidden, ids, weights


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' experts interface calls this module."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def expert_down(experts: nn.Module, expert: int) -> Float[Tensor, "d_model d_expert"]:
    """The down projection of one routed expert; neuron k is its column k."""
    weight = cast(Tensor, experts.down_proj)[expert]
    return weight.T if experts.is_transposed else weight


def expert_activations(
    experts: nn.Module, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, "n k d_expert"]:
    """What feeds the columns of the down projections of the chosen experts, before the gate weight.

    Recomputed from the experts' input with the module's own gating function, since no backend hands it out;
    `capture.verify` proves it right.
    """
    module = cast(Any, experts)
    order = ids.flatten().argsort(stable=True)
    count = ids.flatten().bincount().tolist()
    name = "gate_up_proj" if module.has_gate else "up_proj"
    rows: list[Tensor] = []
    with weights_of(experts):
        up: Tensor = getattr(module, name)
        bias: Any = getattr(module, f"{name}_bias", None)
        for expert, states in enumerate(hidden[order // ids.shape[1]].split(count)):
            if len(states):
                weight = up[expert].T if module.is_transposed else up[expert]
                rows.append(nn.functional.linear(states, weight, bias[expert] if module.has_bias else None))
        inner = torch.cat(rows)
        acts = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return acts[order.argsort()].unflatten(0, tuple(ids.shape))


def head_contributions(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n heads d_model"]:
    """What each head adds to the residual stream, float32 or more; none where the attention block is one component."""
    attention = layer.attention
    if attention is None or attention.out_proj is None:
        return _exact(here["resid_pre"]).unsqueeze(1)[:, :0]
    with weights_of(attention.out_proj):
        weight = _exact(weight_of(attention.out_proj)).unflatten(1, (attention.n_heads, -1))
        vectors = torch.einsum("nhk,dhk->nhd", _exact(here["head_in"]), weight)
    return attention.path.carry(vectors, here.get("attention_scale"))


def attention_output(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n d_model"]:
    """What the attention block adds to the residual stream: its heads, and its projection's bias if it has one."""
    attention = layer.attention
    if attention is None:
        return torch.zeros_like(_exact(here["resid_pre"]))
    if attention.out_proj is None:
        return attention.path.carry(_exact(here["attention_out"]), here.get("attention_scale"))
    total = head_contributions(layer, here).sum(1)
    bias = cast("Tensor | None", getattr(attention.out_proj, "bias", None))
    if bias is None:
        return total
    with weights_of(attention.out_proj):
        constant = _exact(cast(Tensor, attention.out_proj.bias)).expand_as(total)
        return total + attention.path.carry(constant, here.get("attention_scale"))


def expert_contributions(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n k d_model"]:
    """What each chosen routed expert adds to the residual stream, in the order of `expert_ids`."""
    assert layer.experts is not None
    return layer.experts.path.carry(expert_outputs(layer, here), here.get("experts_scale"))


def expert_outputs(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n k d_model"]:
    """What each chosen routed expert gives, times its gate weight: the experts module adds these up."""
    assert layer.experts is not None
    experts, ids, acts = layer.experts.module, here["expert_ids"].long(), _exact(here["expert_acts"])
    out = acts.new_empty(*ids.shape, here["resid_pre"].shape[-1])
    with weights_of(experts):
        for expert in ids.unique().tolist():
            chosen = ids == expert
            out[chosen] = acts[chosen] @ _exact(expert_down(experts, expert)).T
            if experts.has_bias:
                out[chosen] += _exact(cast(Tensor, experts.down_proj_bias)[expert])
    return out * here["expert_weights"].unsqueeze(-1)


def gate_probabilities(
    router_logits: Float[Tensor, "n experts"], expert_ids: Int[Tensor, "n k"], expert_weights: Float[Tensor, "n k"]
) -> Float[Tensor, "n experts"]:
    """The router's probability of every expert, float32: softmax or sigmoid, whichever the gate weights come from.

    The weights as used are proportional to the probabilities, token by token, where no bias or limit stands between;
    if neither fits, softmax.
    """
    logits, ids, weights = router_logits.float(), expert_ids.long(), expert_weights.detach().float()
    softmax, sigmoid = logits.softmax(-1), logits.sigmoid()

    def misfit(probabilities: Tensor) -> float:
        ratio = weights / probabilities.detach().gather(1, ids).clamp_min(1e-30)
        # With one expert a token any ratio is constant: the weight then has to be the probability itself.
        reference = ratio.mean(-1, keepdim=True) if ids.shape[1] > 1 else 1.0
        return float((ratio / reference - 1).abs().mean())

    # Weights that are all alike (one expert a token, renormalised) fit anything.
    told = weights.numel() == 1 or bool((weights != weights[:1, :1]).any())
    return sigmoid if told and misfit(sigmoid) < min(FITS, 0.5 * misfit(softmax)) else softmax


def shared_contribution(layer: Layer, here: Mapping[str, Tensor], i: int) -> Float[Tensor, "n d_model"]:
    """What shared expert i adds to the residual stream."""
    shared = layer.shared[i]
    out = _through(shared.down, here[f"shared.{i}.acts"]) * here[f"shared.{i}.gate"].unsqueeze(-1)
    return shared.path.carry(out, here.get(f"shared.{i}.scale"))


def ffn_output(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n d_model"]:
    """What the FFN adds to the residual stream: its neurons, or all routed and shared experts."""
    total = torch.zeros_like(_exact(here["resid_pre"]))
    if layer.dense is not None:
        total = layer.dense.path.carry(_through(layer.dense.down, here["acts"]), here.get("dense_scale"))
    if layer.experts is not None:
        total = expert_contributions(layer, here).sum(1)
    for i in range(len(layer.shared)):
        total = total + shared_contribution(layer, here, i)
    for i, (_, path) in enumerate(layer.whole_ffn):
        total = total + path.carry(_exact(here[f"whole.{i}.out"]), here.get(f"whole.{i}.scale"))
    return total


def _through(linear: nn.Module, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
    """A linear map in float32 or more, whatever the model's dtype."""
    with weights_of(linear):
        bias = cast("Tensor | None", getattr(linear, "bias", None))
        return nn.functional.linear(_exact(x), _exact(weight_of(linear)), None if bias is None else _exact(bias))


def _exact(x: Tensor) -> Tensor:
    """Half precision as float32: what a part adds is not rounded once more when it is taken apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

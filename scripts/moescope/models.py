"""Loading a model, and its anatomy: the modules that write to the residual stream, found by structure.

Nothing here goes by a model's name. What is found is only believed after `capture.verify` has added
the parts up and compared the sums with the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moescope.artifacts import file_digest, one_line


class CheckpointError(ValueError):
    """A folder that cannot be loaded as a model."""


class AnatomyError(ValueError):
    """A model whose parts cannot be found or do not add up."""


@dataclass(frozen=True)
class Shared:
    """A shared expert: every token passes through it, times its own gate (1 if it has none)."""

    module: nn.Module
    down: nn.Linear
    gate: nn.Linear | None


@dataclass(frozen=True)
class Layer:
    """What writes to the residual stream in one decoder layer.

    A dense FFN has `down`; an MoE FFN has `experts`, `router` and any number of `shared` experts.
    """

    index: int
    block: nn.Module
    attention: nn.Module
    out_proj: nn.Linear
    head_dim: int
    ffn_norm: nn.Module
    ffn: nn.Module
    down: nn.Linear | None
    experts: nn.Module | None
    router: nn.Module | None
    shared: tuple[Shared, ...]

    @property
    def n_heads(self) -> int:
        return self.out_proj.in_features // self.head_dim

    @property
    def n_experts(self) -> int:
        """Number of routed experts, 0 for a dense FFN."""
        return len(cast(Tensor, self.experts.down_proj)) if self.experts is not None else 0


@dataclass(frozen=True)
class Anatomy:
    """The layers of a model, its final norm (gain [d_model] and epsilon) and its unembedding."""

    layers: tuple[Layer, ...]
    final_norm: nn.Module
    gain: Float[Tensor, " d_model"]
    eps: float
    unembedding: nn.Linear

    @property
    def is_moe(self) -> bool:
        return any(layer.experts is not None for layer in self.layers)


def load(
    folder: str | Path, device: str = "cpu", dtype: str = "auto", experts_backend: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """A causal language model in evaluation mode and its tokenizer, from a local folder of safetensors.

    `experts_backend` names one of transformers' experts implementations; None takes the model's default.
    Raises CheckpointError if a file is missing or damaged.
    """
    transformers_logging.disable_progress_bar()
    backend = {} if experts_backend is None else {"experts_implementation": experts_backend}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **backend
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}/: cannot be loaded ({one_line(error)}); delete it and run again") from error
    return cast(Any, model).to(device).eval().requires_grad_(False), tokenizer


def identity(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """What names a loaded model in the provenance of an artifact."""
    return {
        "model_commit": file_digest(folder / "model.safetensors"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "experts_backend": str(getattr(model.config, "_experts_implementation", None)),
        "device": str(model.device),
    }


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a pre-norm decoder.

    Raises AnatomyError, naming the layer and what is missing, for a structure that is not understood.
    """
    base = model.base_model
    stacks = [module for module in base.children() if isinstance(module, nn.ModuleList)]
    if len(stacks) != 1:
        raise AnatomyError(f"{type(model).__name__}: {len(stacks)} stacks of layers found, one decoder stack is needed")
    unembedding = model.get_output_embeddings()
    if not isinstance(unembedding, nn.Linear):
        raise AnatomyError(f"{type(model).__name__}: no linear unembedding found; this is not a causal language model")
    hidden = unembedding.in_features
    norms = [module for module in base.children() if _is_norm(module, hidden)]
    if len(norms) != 1:
        raise AnatomyError(f"{type(model).__name__}: {len(norms)} final norms found, exactly one is needed")
    eps = next((getattr(norms[0], name) for name in ("variance_epsilon", "eps") if hasattr(norms[0], name)), None)
    if eps is None:
        raise AnatomyError(f"{type(model).__name__}: the final norm {type(norms[0]).__name__} has no epsilon")
    layers = tuple(_layer(index, block, hidden) for index, block in enumerate(stacks[0]))
    # Asked of the norm itself: its parameter is the gain in most models, the gain minus 1 in some.
    with torch.no_grad():
        ones = torch.ones(hidden, dtype=model.dtype, device=unembedding.weight.device)
        gain = norms[0](ones) * (1 + float(eps)) ** 0.5
    return Anatomy(layers, norms[0], gain, float(eps), unembedding)


def experts_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, expert ids, gate weights) of a call through transformers' experts interface."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    named = dict(zip(names[: len(args)], args, strict=True)) | dict(kwargs)
    return named[names[0]], named[names[1]], named[names[2]]


def expert_down(experts: nn.Module, expert: int) -> Float[Tensor, "d_model d_expert"]:
    """The down projection of one routed expert; neuron k is its column k."""
    weight = cast(Tensor, experts.down_proj)[expert]
    return weight.T if experts.is_transposed else weight


def expert_activations(
    experts: nn.Module, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, "n k d_expert"]:
    """What feeds the columns of the down projections of the chosen experts, before the gate weight.

    Recomputed from the experts' input, since no backend hands it out; `capture.verify` proves it right.
    """
    up = cast(Tensor, experts.gate_up_proj)
    rows: list[Tensor] = []
    for expert in ids.unique().tolist():
        token = (ids == expert).nonzero()[:, 0]
        weight = up[expert].T if experts.is_transposed else up[expert]
        rows.append(cast(Any, experts)._apply_gate(nn.functional.linear(hidden[token], weight)))
    order = ids.flatten().argsort(stable=True).argsort()
    return torch.cat(rows)[order].unflatten(0, tuple(ids.shape))


def head_contributions(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n heads d_model"]:
    """Each head's slice of the output projection, applied to that head's input of it."""
    weight = layer.out_proj.weight.unflatten(1, (layer.n_heads, layer.head_dim))
    return torch.einsum("nhk,dhk->nhd", here["head_in"], weight)


def attention_output(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n d_model"]:
    """The sum of the heads' contributions, and the projection's bias if it has one."""
    total = head_contributions(layer, here).sum(1)
    return total if layer.out_proj.bias is None else total + layer.out_proj.bias


def ffn_output(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n d_model"]:
    """The sum of the neurons' contributions of a dense FFN, or of all routed and shared experts."""
    if layer.down is not None:
        return layer.down(here["acts"])
    total = expert_contributions(layer, here).sum(1)
    for i in range(len(layer.shared)):
        total = total + shared_contribution(layer, here, i)
    return total


def expert_contributions(layer: Layer, here: Mapping[str, Tensor]) -> Float[Tensor, "n k d_model"]:
    """Gate weight x output of each chosen routed expert, in the order of `expert_ids`."""
    assert layer.experts is not None
    ids, acts = here["expert_ids"].long(), here["expert_acts"]
    out = acts.new_empty(*ids.shape, layer.out_proj.out_features)
    for expert in ids.unique().tolist():
        chosen = ids == expert
        out[chosen] = acts[chosen] @ expert_down(layer.experts, expert).T
    return out * here["expert_weights"].unsqueeze(-1)


def shared_contribution(layer: Layer, here: Mapping[str, Tensor], i: int) -> Float[Tensor, "n d_model"]:
    """Gate x output of shared expert i."""
    return layer.shared[i].down(here[f"shared.{i}.acts"]) * here[f"shared.{i}.gate"].unsqueeze(-1)


def _layer(index: int, block: nn.Module, hidden: int) -> Layer:
    norms = [module for module in block.children() if _is_norm(module, hidden)]
    parts = [module for module in block.children() if module not in norms and any(True for _ in module.parameters())]
    if len(norms) != 2 or len(parts) != 2:
        raise AnatomyError(
            f"layer {index}: {len(parts)} blocks and {len(norms)} norms found; only pre-norm layers of an"
            " attention block and an FFN block, each with one norm before it, are understood"
        )
    attention, ffn = parts
    out_proj = _last_linear(attention, hidden, f"layer {index}: attention")
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or out_proj.in_features % head_dim:
        raise AnatomyError(f"layer {index}: the size of an attention head cannot be told (head_dim is {head_dim})")
    common = (index, block, attention, out_proj, head_dim, norms[1], ffn)
    experts = [
        module for module in ffn.modules() if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    ]
    if not experts:
        return Layer(*common, _last_linear(ffn, hidden, f"layer {index}: FFN"), None, None, ())
    if len(experts) > 1:
        raise AnatomyError(f"layer {index}: {len(experts)} modules of routed experts found, one is needed")
    return Layer(*common, None, experts[0], *_around_experts(index, ffn, experts[0], hidden))


def _around_experts(
    index: int, ffn: nn.Module, experts: nn.Module, hidden: int
) -> tuple[nn.Module, tuple[Shared, ...]]:
    """The router and the shared experts of an MoE FFN, beside its module of routed experts."""
    if experts.has_bias or experts.has_post_expert_norm or not experts.has_gate:
        raise AnatomyError(f"layer {index}: experts with biases, a norm of their own or no gate are not understood")
    siblings = [module for module in ffn.children() if module is not experts]
    n_experts = len(cast(Tensor, experts.down_proj))
    routers = [m for m in siblings if any(p.shape[:1] == (n_experts,) for p in m.parameters())]
    if len(routers) != 1:
        raise AnatomyError(f"layer {index}: {len(routers)} routers for {n_experts} experts found, one is needed")
    modules = [m for m in siblings if not isinstance(m, nn.Linear) and any(_linears(m, hidden))]
    gates: list[nn.Linear | None] = [m for m in siblings if isinstance(m, nn.Linear) and m.out_features == 1]
    if gates and len(gates) != len(modules):
        raise AnatomyError(f"layer {index}: {len(gates)} gates for {len(modules)} shared experts found")
    downs = [_last_linear(module, hidden, f"layer {index}: shared expert") for module in modules]
    return routers[0], tuple(map(Shared, modules, downs, gates or [None] * len(modules)))


def _is_norm(module: nn.Module, hidden: int) -> bool:
    return [tuple(p.shape) for p in module.parameters()] == [(hidden,)]


def _linears(module: nn.Module, out_features: int) -> Iterator[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == out_features)


def _last_linear(module: nn.Module, hidden: int, where: str) -> nn.Linear:
    """The output projection: of the linear maps onto the residual stream, the one that is defined last."""
    found = list(_linears(module, hidden))
    if not found:
        raise AnatomyError(f"{where}: no linear map onto the residual stream found")
    return found[-1]

"""One forward pass that records the parts of the residual stream at the readout position.

Routing is taken as the model used it: the ids and weights that reach the experts, never re-derived
from router logits. Hooks sit on the experts modules (whose call transformers' experts interface
fixes for every backend) and on the inputs of the output projections, so nothing is patched and the
captured forward pass gives the same bits as a plain one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moescope.models import (
    Anatomy,
    AnatomyError,
    Layer,
    attention_output,
    expert_activations,
    experts_arguments,
    ffn_output,
)
from moescope.stats import ranks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECK_ONLY = ("attention_out", "ffn_out", "resid_post")


@torch.no_grad()
def capture(
    model: PreTrainedModel, parts: Anatomy, tokens: pd.DataFrame, batch_size: int
) -> tuple[dict[str, Tensor], pd.DataFrame, dict[str, float]]:
    """Run all prompts and record their parts at the readout position.

    `tokens` comes from facts.tokenise. Prompts of equal length share a batch, so there is no padding and
    no mask. The first batch is verified (see `verify`). Returns

    - tensors on the CPU, first dimension = prompts in the order of the returned table, model dtype unless
      said otherwise, per layer l: `l.resid_pre` [n d_model], before attention; `l.resid_mid` [n d_model],
      before the FFN; `l.head_in` [n heads head_dim], input of the output projection; for an MoE FFN
      `l.router_logits` [n experts], `l.expert_ids` int16 [n k] and `l.expert_weights` [n k] as used,
      `l.expert_acts` [n k d_expert], `l.expert_load` int16 [n experts] (positions of the prompt that chose
      each expert), `l.shared.i.acts` [n d_shared], `l.shared.i.gate` [n]; for a dense FFN `l.acts`
      [n d_ffn]; and `resid_final` [n d_model], `norm_scale` float32 [n], `prompt_id` int32 [n];
    - `tokens` with target_id (the accepted first token that the model likes best), log_prob (float32,
      nats) and rank (int32) in the clean run;
    - the largest relative error of each verified equation.
    """
    tokens = tokens.sort_values(["length", "prompt_id"], kind="stable").reset_index(drop=True)
    chunks: dict[str, list[Tensor]] = defaultdict(list)
    scores: list[tuple[Tensor, Tensor, Tensor]] = []
    errors: dict[str, float] = {}
    for rows in batches(tokens["length"].to_numpy(), batch_size):
        ids = token_tensor(tokens, rows, model.device)
        found, logits = record(model, parts, ids)
        if not errors:
            errors = verify(model, parts, ids, found, logits)
            logging.info("verified on %d prompts: %s", len(rows), errors)
        for name, tensor in found.items():
            if not name.endswith(CHECK_ONLY):
                chunks[name].append(tensor.cpu())
        scores.append(_clean_scores(logits, [list(tokens["accepted_ids"][row]) for row in rows]))
    target, log_prob, rank = (torch.cat(column).cpu().numpy() for column in zip(*scores, strict=True))
    table = tokens.assign(
        target_id=target.astype("int32"), log_prob=log_prob.astype("float32"), rank=rank.astype("int32")
    )
    tensors = {name: torch.cat(pieces) for name, pieces in chunks.items()}
    return tensors | {"prompt_id": torch.tensor(table["prompt_id"].to_numpy())}, table, errors


def batches(lengths: Int[np.ndarray, " n"], batch_size: int) -> Iterator[Int[np.ndarray, " b"]]:
    """Row numbers in batches of equal token count, at most `batch_size` each."""
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def token_tensor(tokens: pd.DataFrame, rows: Int[np.ndarray, " b"], device: torch.device) -> Int[Tensor, "b length"]:
    """The token ids of prompts of equal length."""
    return torch.tensor(np.stack(tokens["token_ids"].to_numpy()[rows]), dtype=torch.long, device=device)


def record(
    model: PreTrainedModel, parts: Anatomy, ids: Int[Tensor, "b length"]
) -> tuple[dict[str, Tensor], Float[Tensor, "b vocab"]]:
    """One forward pass: the parts named in `capture`, those in CHECK_ONLY, and the readout logits."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for layer in parts.layers:
            hooks.enter_context(_tap_layer(layer, len(ids), found))
        hooks.enter_context(_on_input(parts.final_norm, lambda x: found.update(resid_final=x[:, -1])))
        logits = readout_logits(model, ids)
    final = found["resid_final"].float()
    found["norm_scale"] = torch.rsqrt(final.pow(2).mean(-1) + parts.eps)
    for layer in parts.layers:
        if layer.experts is not None:
            at = f"{layer.index}."
            hidden, chosen = found.pop(f"{at}expert_in"), found[f"{at}expert_ids"]
            found[f"{at}expert_acts"] = expert_activations(layer.experts, hidden, chosen.long())
        for i in range(len(layer.shared)):
            acts = found[f"{layer.index}.shared.{i}.acts"]
            logit = found.pop(f"{layer.index}.shared.{i}.gate_logit", None)
            gate = acts.new_ones(len(acts)) if logit is None else logit.sigmoid().squeeze(-1)
            found[f"{layer.index}.shared.{i}.gate"] = gate
    return found, logits


def readout_logits(model: PreTrainedModel, ids: Int[Tensor, "b length"]) -> Float[Tensor, "b vocab"]:
    """Logits at the readout position, the last one."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def verify(
    model: PreTrainedModel,
    parts: Anatomy,
    ids: Int[Tensor, "b length"],
    found: Mapping[str, Tensor],
    logits: Float[Tensor, "b vocab"],
) -> dict[str, float]:
    """Check that the recorded parts add up; the largest relative error of each equation over the layers.

    Raises AnatomyError with the equation, the layer and the size of the error.
    """
    if not torch.equal(readout_logits(model, ids), logits):
        raise AnatomyError("the forward pass changes when it is recorded; refused, since nothing below would hold")
    limit = TOLERANCE[found["resid_final"].dtype]
    errors: dict[str, float] = {}

    def check(equation: str, layer: str, parts_sum: Tensor, whole: Tensor) -> None:
        error = float((parts_sum.float() - whole.float()).abs().max() / whole.float().abs().max().clamp_min(1e-30))
        if not error <= limit:
            raise AnatomyError(f"{layer}: {equation} does not hold: relative error {error:.2e}, allowed {limit:.0e}")
        errors[equation] = max(error, errors.get(equation, 0.0))

    for layer in parts.layers:
        here = {
            name.removeprefix(f"{layer.index}."): t for name, t in found.items() if name.startswith(f"{layer.index}.")
        }
        name = f"layer {layer.index}"
        after = found.get(f"{layer.index + 1}.resid_pre", found["resid_final"])
        check("sum of heads = attention output", name, attention_output(layer, here), here["attention_out"])
        check("sum of experts (or neurons) = FFN output", name, ffn_output(layer, here), here["ffn_out"])
        check(
            "attention output = residual increment", name, here["resid_pre"] + here["attention_out"], here["resid_mid"]
        )
        check("FFN output = residual increment", name, here["resid_mid"] + here["ffn_out"], here["resid_post"])
        check("a layer's output = the next one's input", name, here["resid_post"], after)
    scaled = found["resid_final"] * found["norm_scale"].to(parts.gain.dtype).unsqueeze(-1) * parts.gain
    check("unembedding of the scaled final state = logits", "readout", parts.unembedding(scaled), logits)
    return errors


def _clean_scores(
    logits: Float[Tensor, "b vocab"], accepted: list[list[int]]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Target, log-probability and rank of each prompt: of the accepted tokens the one that the model likes best."""
    log_probs = logits.float().log_softmax(-1)
    targets = [ids[int(row[ids].argmax())] for row, ids in zip(log_probs, accepted, strict=True)]
    target = torch.tensor(targets, device=logits.device)
    return target, log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1), ranks(logits.float(), target)


@contextmanager
def _tap_layer(layer: Layer, batch: int, found: dict[str, Tensor]) -> Iterator[None]:
    at = f"{layer.index}."

    def last(name: str) -> Callable[[Tensor], None]:
        """Record the readout position, whether or not batch and position are flattened into one dimension."""
        return lambda x: found.update({at + name: x.reshape(batch, -1, x.shape[-1])[:, -1]})

    def experts_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, weights = experts_arguments(args, kwargs)
        last("expert_in")(hidden)
        last("expert_weights")(weights)
        chosen = chosen.reshape(batch, -1, chosen.shape[-1])
        found[f"{at}expert_ids"] = chosen[:, -1].to(torch.int16)
        load = torch.zeros(batch, layer.n_experts, dtype=torch.int16, device=chosen.device)
        every = chosen.flatten(1).long()
        found[f"{at}expert_load"] = load.scatter_add_(1, every, torch.ones_like(every, dtype=torch.int16))

    def heads(x: Tensor) -> None:
        found[f"{at}head_in"] = x[:, -1].unflatten(-1, (layer.n_heads, layer.head_dim))

    with ExitStack() as hooks:
        inputs: list[tuple[nn.Module, Callable[[Tensor], None]]] = [
            (layer.block, last("resid_pre")),
            (layer.out_proj, heads),
            (layer.ffn_norm, last("resid_mid")),
        ]
        outputs = [
            (layer.block, last("resid_post")),
            (layer.attention, last("attention_out")),
            (layer.ffn, last("ffn_out")),
        ]
        if layer.down is not None:
            inputs.append((layer.down, last("acts")))
        if layer.experts is not None and layer.router is not None:
            hooks.callback(layer.experts.register_forward_pre_hook(experts_input, with_kwargs=True).remove)
            outputs.append((layer.router, last("router_logits")))
        for i, shared in enumerate(layer.shared):
            inputs.append((shared.down, last(f"shared.{i}.acts")))
            if shared.gate is not None:
                outputs.append((shared.gate, last(f"shared.{i}.gate_logit")))
        for module, see in inputs:
            hooks.enter_context(_on_input(module, see))
        for module, see in outputs:
            hooks.enter_context(_on_output(module, see))
        yield


@contextmanager
def _on_input(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the first argument of each call of `module` to `see`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_output(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the output of each call of `module`, or the first of several, to `see`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

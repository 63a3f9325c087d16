"""What a model that is still being trained makes of the prompts of the finished one (method.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from moescope import utilization
from moescope.bounds import SHARE
from moescope.capture import capture, of_layer
from moescope.lens import Readout, log_prob
from moescope.models import Anatomy, Layer
from moescope.neurons import Unit, ffn_neurons, ffn_units
from moescope.samples import in_blocks


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    parts: Anatomy,
    prompts: pd.DataFrame,
    batch_size: int,
    score: str = "unembedding",
    threshold: str = "model",
    share: float = 0.001,
) -> pd.DataFrame:
    """Ranks, key neurons, routing and concentration of one state of a model, a row a prompt.

    `prompts` has, beside what runs forward (capture.rows) and the responses (samples.responses), the target_ids of the
    finished model, so that every state is asked for the same tokens. `score`, `threshold` and `share` are those of
    utilization.find. Columns:

    - prompt_id (int32), rank (int32), log_prob (float32, nats): as in the clean run of capture.capture; of several
      target tokens the worst rank and the sum, each read with the earlier ones in the prompt;
    - keys (bytes): pyroaring's BitMap.serialize() of the ids of the key neurons (utilization.units);
    - choices (list of int16): the routed experts chosen at the end of the prompt, layer by layer; empty for a dense
      model;
    - lpi_top_share (float32): `top_share`, an estimate; the mean over target tokens.
    """
    units = utilization.units(parts)
    top = math.ceil(SHARE * int(units["width"].sum()))
    readout = Readout.of(parts)
    targets = prompts.set_index("prompt_id")["target_ids"]
    answers = prompts[["prompt_id", "token_ids", "length"]].assign(answer_ids=[[list(ids)] for ids in targets])
    moe = [layer for layer in parts.layers if layer.experts is not None]
    seen = list[pd.DataFrame]()

    def see(_: int, found: Mapping[str, Tensor]) -> None:
        rows = pd.DataFrame({name: found[name].numpy() for name in ("prompt_id", "step")})
        chosen = [found[f"{layer.index}.expert_ids"] for layer in moe]
        target = torch.tensor([int(targets[prompt][step]) for prompt, step in rows.itertuples(index=False)])
        choices = torch.cat([*chosen, torch.empty(len(rows), 0, dtype=torch.int16)], 1).numpy()
        shares = top_share(parts, readout, found, target, top).numpy()
        seen.append(rows.assign(choices=list(choices), lpi_top_share=shares))

    scored, _ = capture(model, parts, answers, batch_size, see, "all_tokens")
    rows = pd.concat(seen).sort_values(["prompt_id", "step"]).groupby("prompt_id")
    how = (batch_size, score, threshold, share)
    keys, _ = in_blocks(lambda block: utilization.find(model, parts, block, *how), prompts, batch_size)
    table = scored[["prompt_id", "rank", "log_prob"]].merge(keys[["prompt_id", "keys"]], on="prompt_id")
    of_prompts = rows.agg({"choices": "first", "lpi_top_share": "mean"}).astype({"lpi_top_share": "float32"})
    return table.join(of_prompts, on="prompt_id")


def top_share(
    parts: Anatomy, readout: Readout, found: Mapping[str, Tensor], target: Int[Tensor, " n"], top: int
) -> Float[Tensor, " n"]:
    """Share of the positive LPI of all FFN neurons that the `top` best of them hold (Gated-LPI), to first order.

    LPIs are estimated by the tangent grad f(0) . v (method.md, section 2.1), at the recorded norm scale: an upper bound
    of each LPI (an approximation where logits are capped), and so neither a bound of their share. `found` are the
    tensors of capture.capture, on the CPU. Float32; NaN where no neuron has a positive tangent.
    """
    tangents, scale = list[Tensor](), found["norm_scale"]
    for layer in parts.layers:
        here = of_layer(found, layer)
        block = ffn_neurons(layer, here)
        if block is not None:
            slope = gradient(readout, here["resid_mid"].float(), scale, target)
            tangents.append(replace(block, parts=_on_cpu(layer)).products(slope))
    positive = torch.cat(tangents, 1).clamp_min(0)
    return positive.topk(min(top, positive.shape[1]), 1).values.sum(1) / positive.sum(1)


def gradient(
    readout: Readout, states: Float[Tensor, "n d_model"], scale: Float[Tensor, " n"], target: Int[Tensor, " n"]
) -> Float[Tensor, "n d_model"]:
    """The gradient of log p(w | x) at x = `states`, the norm scale held fixed (method.md, section 2.1)."""
    device = readout.weight.device
    with torch.enable_grad():
        x = states.to(device, copy=True).requires_grad_()
        value = log_prob(readout, x, scale.to(device), target.to(device)).sum()
    return torch.autograd.grad(value, x)[0].to(states.device)


def _on_cpu(layer: Layer) -> dict[int, Unit]:
    def columns(part: Unit) -> Float[Tensor, "width d_model"]:
        return part.columns().cpu()

    return {unit: Unit(part.width, partial(columns, part)) for unit, part in ffn_units(layer).items()}

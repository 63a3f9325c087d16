"""Attribution tables from the activation cache and the weights alone: no forward pass is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moescope.artifacts import open_tensors
from moescope.lens import Readout, log_prob, lpi
from moescope.models import Anatomy, Layer, expert_contributions, head_contributions, shared_contribution


@torch.no_grad()
def attribute(
    parts: Anatomy, activations: Sequence[Path], prompts: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """LPI of every layer's two blocks, every head, every routed and shared expert, exact, in nats.

    `prompts` gives target_id by prompt_id. Returns three tables, keyed by prompt_id (int32) and layer (int16):

    - layers: attention, ffn (float32): LPI of the whole attention and FFN output;
    - heads: head (int16), lpi (float32);
    - experts: expert (int16; shared expert i is -1 - i), lpi, weight (float32: gate weight as used);
      no rows for dense FFNs.
    """
    readout = Readout.of(parts)
    target_of = prompts.set_index("prompt_id")["target_id"]
    tables: tuple[list[pd.DataFrame], ...] = ([], [], [])
    for path in activations:
        with open_tensors(path, "activations") as cache:
            prompt_id = cache.get_tensor("prompt_id").numpy()
            target = torch.tensor(target_of.loc[prompt_id].to_numpy(), dtype=torch.long)
            scale, final = cache.get_tensor("norm_scale"), cache.get_tensor("resid_final")
            for layer in parts.layers:
                at = f"{layer.index}."
                found = {name.removeprefix(at): cache.get_tensor(name) for name in cache.keys() if name.startswith(at)}
                after = final if layer is parts.layers[-1] else cache.get_tensor(f"{layer.index + 1}.resid_pre")
                score = partial(lpi, readout, scale=scale, target=target)
                rows = [_layer_rows(readout, found, after, scale, target), *_unit_rows(layer, found, score)]
                for table, frame in zip(tables, rows, strict=True):
                    key = {
                        "prompt_id": np.repeat(prompt_id, len(frame) // len(prompt_id)),
                        "layer": np.int16(layer.index),
                    }
                    table.append(pd.DataFrame(key | dict(frame)))
    layers, heads, experts = (pd.concat(frames, ignore_index=True) for frames in tables)
    return layers, heads, experts


def _layer_rows(
    readout: Readout, found: dict[str, Tensor], after: Tensor, scale: Tensor, target: Tensor
) -> pd.DataFrame:
    before, middle, end = (
        log_prob(readout, state, scale, target) for state in (found["resid_pre"], found["resid_mid"], after)
    )
    return pd.DataFrame({"attention": (middle - before).numpy(), "ffn": (end - middle).numpy()})


def _unit_rows(
    layer: Layer, found: dict[str, Tensor], score: Callable[..., Tensor]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    n = len(found["resid_pre"])
    heads = score(found["resid_pre"], head_contributions(layer, found))
    head = np.tile(np.arange(layer.n_heads, dtype=np.int16), n)
    head_rows = pd.DataFrame({"head": head, "lpi": heads.flatten().numpy()})
    columns: dict[str, Any] = {"expert": np.empty(0, "int16"), "lpi": np.empty(0, "f4"), "weight": np.empty(0, "f4")}
    if layer.experts is not None:
        shared = range(len(layer.shared))
        ids = torch.cat([found["expert_ids"], *(torch.full((n, 1), -1 - i, dtype=torch.int16) for i in shared)], 1)
        weights = torch.cat([found["expert_weights"], *(found[f"shared.{i}.gate"].unsqueeze(1) for i in shared)], 1)
        vectors = [
            expert_contributions(layer, found),
            *(shared_contribution(layer, found, i).unsqueeze(1) for i in shared),
        ]
        experts = score(found["resid_mid"], torch.cat(vectors, 1))
        columns = {"expert": ids, "lpi": experts, "weight": weights.float()}
        columns = {name: tensor.flatten().numpy() for name, tensor in columns.items()}
    return head_rows, pd.DataFrame(columns)

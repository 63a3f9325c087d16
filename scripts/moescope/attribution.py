"""Attribution tables from the activation cache and the weights alone: no forward pass is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moescope.artifacts import open_tensors
from moescope.lens import Readout, log_prob, lpi, norm_scale
from moescope.models import Anatomy, Layer, expert_contributions, head_contributions, shared_contribution

SUMMED = {
    "layers": {"attention": "sum", "ffn": "sum"},
    "heads": {"lpi": "sum"},
    "experts": {"lpi": "sum", "weight": "mean"},
    "margins": {"margin": "min", "smallest": "min"},
}


@torch.no_grad()
def attribute(
    parts: Anatomy, activations: Sequence[Path], prompts: pd.DataFrame, norm: str = "fixed"
) -> tuple[pd.DataFrame, ...]:
    """LPI of every layer's two blocks, every head, every routed and shared expert, exact, in nats.

    `prompts` gives target_ids by prompt_id; prompts of the cache that it lacks are left out. LPIs of several answer
    tokens are summed. `norm` is that of lens.norm_scale. Returns four tables, keyed by prompt_id (int32) and layer
    (int16):

    - layers: attention, ffn (float32): LPI of the whole attention and FFN output;
    - heads: head (int16), lpi (float32); no rows where the attention block is one component;
    - experts: expert (int16; shared expert i is -1 - i), lpi, weight (float32: gate weight as used, the mean over
      answer tokens that use it); no rows for dense FFNs;
    - margins: margin, smallest (float32): capture.margins of the choice of experts at the readout position and the
      smallest over all positions (and answer tokens); no rows where it is not known.
    """
    readout = Readout.of(parts)
    targets = prompts.set_index("prompt_id")["target_ids"]
    tables: dict[str, list[pd.DataFrame]] = {"layers": [], "heads": [], "experts": [], "margins": []}
    for path in activations:
        with open_tensors(path, "activations") as cache:
            every, step = cache.get_tensor("prompt_id").numpy(), cache.get_tensor("step").numpy()
            row = np.flatnonzero(np.isin(every, targets.index))
            prompt_id = every[row]
            if not len(row):
                continue
            pairs = zip(targets.loc[prompt_id], step[row], strict=True)
            target = torch.tensor([ids[at] for ids, at in pairs], dtype=torch.long)

            def get(name: str, cache: Any = cache, row: np.ndarray = row) -> Tensor:
                return cache.get_tensor(name)[row]

            final = get("resid_final")
            scale = norm_scale(parts, final, norm)
            score = partial(lpi, readout, scale=scale, target=target)
            for layer in parts.layers:
                at = f"{layer.index}."
                found = {name.removeprefix(at): get(name) for name in cache.keys() if name.startswith(at)}
                after = final if layer is parts.layers[-1] else get(f"{layer.index + 1}.resid_pre")
                heads, experts = _unit_rows(layer, found, score)
                rows = {"layers": _layer_rows(readout, found, after, scale, target), "heads": heads, "experts": experts}
                if "router_margin" in found:
                    margin = found["router_margin"].numpy()
                    rows["margins"] = pd.DataFrame({"margin": margin[:, 0], "smallest": margin[:, 1]})
                for name, frame in rows.items():
                    key = {
                        "prompt_id": np.repeat(prompt_id, len(frame) // len(prompt_id)),
                        "layer": np.int16(layer.index),
                    }
                    tables[name].append(pd.DataFrame(key | dict(frame)))
    empty = pd.DataFrame({"prompt_id": np.empty(0, "int32"), "layer": np.empty(0, "int16")})
    tables["margins"].append(empty.assign(margin=np.empty(0, "f4"), smallest=np.empty(0, "f4")))
    together = {name: pd.concat(frames, ignore_index=True) for name, frames in tables.items()}
    return tuple(_over_answer_tokens(together[name], how) for name, how in SUMMED.items())


def _over_answer_tokens(table: pd.DataFrame, how: Mapping[str, str]) -> pd.DataFrame:
    """One row for each prompt and part, where an answer has several tokens."""
    keys = [column for column in table if column not in how]
    if not table.duplicated(keys).any():
        return table
    return table.groupby(keys, as_index=False, sort=False).agg(how).astype(dict.fromkeys(how, "float32"))


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

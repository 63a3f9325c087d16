"""Attribution tables from the activation cache and the weights alone: no forward pass is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.activations import opened
from moescope.lens import Readout, lpi, norm_scale
from moescope.models import MAX_LOGITS, Anatomy, Layer, expert_contributions, head_contributions, shared_contribution

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
    readout = Readout.of(parts, norm)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in SUMMED}
    with opened(activations, prompts) as cache:
        vocabulary, width = readout.weight.shape
        size = MAX_LOGITS // max(vocabulary, width * max(layer.n_heads for layer in parts.layers))
        for rows in cache.chunks(max(1, size)):
            final, target = cache.get("resid_final", rows), cache.target[rows]
            scale = norm_scale(parts, final, norm)
            here = cache.layer(parts.layers[0].index, rows)
            log_p = readout.log_probs(here["resid_pre"], scale)
            for layer in parts.layers:
                last = layer is parts.layers[-1]
                following = {"resid_pre": final} if last else cache.layer(layer.index + 1, rows)
                score = partial(lpi, readout, scale=scale, target=target)
                frames = {"heads": _head_rows(layer, here, partial(score, log_p=log_p))}
                before, log_p = _of(target, log_p), readout.log_probs(here["resid_mid"], scale)
                frames["experts"] = _expert_rows(layer, here, partial(score, log_p=log_p))
                middle, log_p = _of(target, log_p), readout.log_probs(following["resid_pre"], scale)
                gains = {"attention": middle - before, "ffn": _of(target, log_p) - middle}
                frames["layers"] = pd.DataFrame({name: gain.numpy() for name, gain in gains.items()})
                if "router_margin" in here:
                    margin = here["router_margin"].numpy()
                    frames["margins"] = pd.DataFrame({"margin": margin[:, 0], "smallest": margin[:, 1]})
                for name, frame in frames.items():
                    prompt_id = np.repeat(cache.prompt_id[rows], len(frame) // len(rows))
                    key = {"prompt_id": prompt_id, "layer": np.int16(layer.index)}
                    tables[name].append(pd.DataFrame(key | dict(frame)))
                here = following
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


def _of(target: Int[Tensor, " n"], log_p: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    return log_p.gather(1, target.unsqueeze(1)).squeeze(1)


def _head_rows(layer: Layer, found: Mapping[str, Tensor], score: Callable[..., Tensor]) -> pd.DataFrame:
    heads = score(found["resid_pre"], head_contributions(layer, found))
    head = np.tile(np.arange(layer.n_heads, dtype=np.int16), len(heads))
    return pd.DataFrame({"head": head, "lpi": heads.flatten().numpy()})


def _expert_rows(layer: Layer, found: Mapping[str, Tensor], score: Callable[..., Tensor]) -> pd.DataFrame:
    if layer.experts is None:
        return pd.DataFrame({"expert": np.empty(0, "int16"), "lpi": np.empty(0, "f4"), "weight": np.empty(0, "f4")})
    n, shared = len(found["resid_mid"]), range(len(layer.shared))
    ids = torch.cat([found["expert_ids"], *(torch.full((n, 1), -1 - i, dtype=torch.int16) for i in shared)], 1)
    weights = torch.cat([found["expert_weights"], *(found[f"shared.{i}.gate"].unsqueeze(1) for i in shared)], 1)
    of_shared = [shared_contribution(layer, found, i).unsqueeze(1) for i in shared]
    vectors = torch.cat([expert_contributions(layer, found), *of_shared], 1)
    columns = {"expert": ids, "lpi": score(found["resid_mid"], vectors), "weight": weights.float()}
    return pd.DataFrame({name: tensor.flatten().numpy() for name, tensor in columns.items()})

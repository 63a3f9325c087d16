"""Which experts every prompt chooses, and how clearly, from the activation cache alone: no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.activations import opened
from moescope.artifacts import open_tensors
from moescope.models import gate_probabilities
from moescope.summaries import together

KEYS = {"prompt_id": "int32", "layer": "int16"}
SCHEMAS: Mapping[str, Mapping[str, str]] = {
    "loads": KEYS | dict.fromkeys(("expert", "readout", "subject", "all"), "int16"),
    "gates": KEYS
    | dict.fromkeys(("experts", "chosen"), "int16")
    | dict.fromkeys(("gate_entropy", "chosen_probability", "gate_margin"), "float32"),
}


def summarise(activations: Sequence[str | Path], prompts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Load of every routed expert, and the gate probabilities in a few numbers (method.md, section 4).

    `activations` are the shards of the cache; prompts of it that `prompts` (prompt_id, target_ids) lacks are left out.
    Of an answer of several tokens only the first counts: all positions are the prompt's own. Returns two tables, keyed
    by prompt_id (int32) and layer (int16), both without rows for a dense model:

    - loads: expert (int16) and at how many positions the prompt chose it (int16): readout (0 or 1), subject (0 for all
      experts where the subject is unknown) and all. An expert that no position of a prompt chose has no row.
    - gates: experts, chosen (int16; number of routed experts of the layer, and of those chosen at each position), and
      `firmness` at the readout position (float32): gate_entropy (bits), chosen_probability, gate_margin; NaN where
      the router's logits are not known.
    """
    with open_tensors(activations[0], "activations") as file:
        layers = sorted(int(name.split(".")[0]) for name in file.keys() if name.endswith(".expert_ids"))
        routers = {layer for layer in layers if f"{layer}.router_logits" in file.keys()}
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in SCHEMAS}
    with opened(activations, prompts) as cache:
        rows = np.flatnonzero(np.diff(cache.prompt_id, prepend=-1))
        for layer in layers:
            names = ("expert_ids", "expert_weights", "expert_load", "subject_load")
            ids, weights, load, subject = (cache.get(f"{layer}.{name}", rows) for name in names)
            readout = torch.zeros_like(load).scatter_(1, ids.long(), 1)
            prompt, expert = load.nonzero(as_tuple=True)
            at = {"readout": readout, "subject": subject, "all": load}
            columns = {name: counted[prompt, expert].numpy() for name, counted in at.items()}
            key = pd.DataFrame({"prompt_id": cache.prompt_id[rows], "layer": layer})
            tables["loads"].append(key.iloc[prompt].assign(expert=expert.numpy(), **columns))
            gates = key.assign(experts=load.shape[1], chosen=ids.shape[1])
            if layer in routers:
                probabilities = gate_probabilities(cache.get(f"{layer}.router_logits", rows), ids, weights)
                gates = gates.assign(**{name: x.numpy() for name, x in firmness(probabilities, ids).items()})
            tables["gates"].append(gates)
    found = {name: together(frames, " ".join(SCHEMAS[name])) for name, frames in tables.items()}
    return {name: table.reindex(columns=list(SCHEMAS[name])).astype(SCHEMAS[name]) for name, table in found.items()}


def firmness(probabilities: Float[Tensor, "n experts"], ids: Int[Tensor, "n k"]) -> dict[str, Float[Tensor, " n"]]:
    """How clearly the chosen experts `ids` stand out from the others, of gate probabilities scaled to a sum of 1.

    - gate_entropy: entropy over all experts, bits;
    - chosen_probability: sum over the chosen ones;
    - gate_margin: smallest of the chosen ones - largest of the others (0 if there are none). Negative where a bias or a
      limit on groups of experts made the choice against the probabilities.
    """
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    chosen = probabilities.gather(-1, ids.long())
    others = probabilities.scatter(-1, ids.long(), 0.0)
    return {
        "gate_entropy": torch.special.entr(probabilities).sum(-1) / np.log(2),
        "chosen_probability": chosen.sum(-1),
        "gate_margin": chosen.amin(-1) - others.amax(-1),
    }

"""Reading units as tokens: what the strongest experts, heads and neurons of each relation promote and suppress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moescope.activations import opened
from moescope.lens import Readout, norm_scale, rows_at_once
from moescope.models import Anatomy, Layer, expert_contributions, shared_contribution
from moescope.neurons import attention_neurons, ffn_neurons

ROWS = 256
"""Rows of the cache that are held at once."""
COMPONENT = ["relation", "level", "layer", "unit", "neuron"]


@torch.no_grad()
def read(
    parts: Anatomy,
    activations: Sequence[Path],
    prompts: pd.DataFrame,
    relation_neurons: pd.DataFrame,
    heads: pd.DataFrame,
    experts: pd.DataFrame,
    decode: Callable[[int], str],
    n_units: int = 10,
    n_tokens: int = 10,
    norm: str = "fixed",
) -> pd.DataFrame:
    """The tokens that the strongest units and neurons of each relation promote and suppress.

    A vector that is added to the residual stream is read as the change of the logits that it makes (Geva et al. 2022,
    arXiv 2203.14680; NA): here W_U (g * v) with v the mean over the relation's prompts of contribution times norm
    scale, 0 where a prompt does not use the component; of a prompt with several answer tokens, the mean over these.
    The scale is that of the real final state (lens.norm_scale with `norm`). Changes of logits are exact to rounding,
    before any capping, and centred over the vocabulary, since softmax does not see a constant.

    Read are, for each relation, the `n_units` with the largest mean LPI over all of its prompts of each level: routed
    and shared experts, heads (tables of attribution.attribute), FFN and attention neurons (relation_neurons, whose
    ranking is as certain as it says). `prompts` gives relation, target_id and target_ids by prompt_id, all of them in
    the cache; `decode` gives the text of a token id. Memory grows with the units that are read, not with the prompts.

    Returns the columns relation, level (expert, head, ffn_neuron or attention_neuron), layer, unit (int16; shared
    expert i is -1 - i), neuron (int32, -1 for an expert or head), lpi (float32, nats, mean over the prompts), side
    (promoted or suppressed), place (int16, 1 = most), token_id (int32), token (what `decode` gives), logit (float32,
    the mean change) and target (bool: the first answer token of some prompt of the relation). Sorted by relation,
    level, falling lpi, side and place.
    """
    readout = Readout.of(parts)
    units = _strongest(prompts, relation_neurons, heads, experts, n_units)
    vectors = torch.zeros(len(units), readout.weight.shape[1])
    with opened(activations, prompts) as cache:
        rows = pd.DataFrame({"prompt_id": cache.prompt_id}).merge(prompts[["prompt_id", "relation"]], how="left")
        count = rows.groupby("prompt_id")["relation"].transform("size")
        count *= rows["relation"].map(prompts["relation"].value_counts())
        for (relation, level, index), chosen in units.groupby(["relation", "level", "layer"]):
            every = np.flatnonzero(rows["relation"] == relation)
            for some in np.split(every, range(ROWS, len(every), ROWS)):
                scale = norm_scale(parts, cache.get("resid_final", some), norm)
                weight = scale / torch.tensor(count.to_numpy("float32")[some])
                here = cache.layer(index, some)
                vectors[chosen.index.tolist()] += _weighted_sums(parts.layers[index], here, weight, level, chosen)
    ids, logits = _extremes(readout, vectors, n_tokens)
    n = ids.shape[-1]
    table = units.loc[units.index.repeat(2 * n)].reset_index(drop=True)
    table["side"] = np.tile(np.repeat(["promoted", "suppressed"], n), len(units))
    table["place"] = np.tile(np.arange(1, n + 1, dtype="int16"), 2 * len(units))
    table["token_id"] = ids.flatten().to(torch.int32).numpy()
    text = {token: decode(token) for token in table["token_id"].unique().tolist()}
    table["token"] = table["token_id"].map(text)
    table["logit"] = logits.flatten().numpy()
    targets = pd.MultiIndex.from_frame(prompts[["relation", "target_id"]])
    return table.assign(target=pd.MultiIndex.from_frame(table[["relation", "token_id"]]).isin(targets))


def promoted_targets(readings: pd.DataFrame) -> pd.DataFrame:
    """How often the tokens that `read` finds promoted are answers of the relation.

    Columns: relation, level, units (how many were read), share (of them, with at least one target among their
    promoted tokens) and targets (mean number of targets among these).
    """
    promoted = readings[readings["side"] == "promoted"]
    found = promoted.groupby(COMPONENT, as_index=False)["target"].sum().assign(any=lambda t: t["target"] > 0)
    columns = {"units": ("any", "size"), "share": ("any", "mean"), "targets": ("target", "mean")}
    return found.groupby(["relation", "level"], as_index=False).agg(**columns)


def _strongest(
    prompts: pd.DataFrame, relation_neurons: pd.DataFrame, heads: pd.DataFrame, experts: pd.DataFrame, n_units: int
) -> pd.DataFrame:
    """The columns COMPONENT and lpi of what is read."""
    share = 1 / prompts.groupby("relation")["relation"].transform("size")
    relations = prompts[["prompt_id", "relation"]].assign(share=share)
    neurons = relation_neurons[relation_neurons["relation"].isin(prompts["relation"])]
    frames = [neurons.assign(level=neurons["block"] + "_neuron")]
    for level, table in (("head", heads), ("expert", experts)):
        own = table.rename(columns={level: "unit"}).merge(relations)
        mean = own.assign(lpi=own["lpi"] * own["share"]).groupby(["relation", "layer", "unit"], as_index=False)["lpi"]
        frames.append(mean.sum().assign(level=level, neuron=-1))
    types = {"layer": "int16", "unit": "int16", "neuron": "int32", "lpi": "float32"}
    found = pd.concat([frame[[*COMPONENT, "lpi"]].astype(types) for frame in frames])
    order = ["relation", "level", "lpi", "layer", "unit", "neuron"]
    found = found.sort_values(order, ascending=[name != "lpi" for name in order])
    return found.groupby(["relation", "level"]).head(n_units).reset_index(drop=True)


def _weighted_sums(
    layer: Layer, here: Mapping[str, Tensor], weight: Float[Tensor, " n"], level: str, chosen: pd.DataFrame
) -> Float[Tensor, "chosen d_model"]:
    """Contributions of the chosen units or neurons of one level, summed over rows with these weights."""
    units, neurons = (torch.tensor(chosen[name].to_numpy("int64")) for name in ("unit", "neuron"))
    if level == "expert":
        return torch.stack([_expert_sum(layer, here, weight, unit) for unit in units.tolist()])
    block = (ffn_neurons if level == "ffn_neuron" else attention_neurons)(layer, here)
    assert block is not None
    out = torch.zeros(len(chosen), here["resid_pre"].shape[1])
    for unit in units.unique().tolist():
        row, slot = (block.units == unit).nonzero(as_tuple=True)
        if not len(row):
            continue
        columns, own = block.columns(unit), units == unit
        neuron = torch.arange(len(columns)) if level == "head" else neurons[own]
        place = torch.tensor(block.starts)[slot].unsqueeze(1) + neuron
        activation = weight[row] @ block.activations[row.unsqueeze(1), place]
        vectors = activation.unsqueeze(1) * columns[neuron]
        out[own] = vectors.sum(0) if level == "head" else vectors
    return out


def _expert_sum(
    layer: Layer, here: Mapping[str, Tensor], weight: Float[Tensor, " n"], unit: int
) -> Float[Tensor, " d_model"]:
    if unit < 0:
        return weight @ shared_contribution(layer, here, -1 - unit)
    # Of the rows' experts only this one is computed, its bias included.
    row, slot = (here["expert_ids"] == unit).nonzero(as_tuple=True)
    uses = {name: here[name][row, slot].unsqueeze(1) for name in ("expert_ids", "expert_acts", "expert_weights")}
    uses |= {name: here[name][row] for name in ("resid_pre", "experts_scale") if name in here}
    return weight[row] @ expert_contributions(layer, uses)[:, 0]


def _extremes(
    readout: Readout, vectors: Float[Tensor, "units d_model"], n: int
) -> tuple[Int[Tensor, "units 2 n"], Float[Tensor, "units 2 n"]]:
    """Token ids and changes of the n largest logits, falling, and of the n smallest, rising."""
    ids, logits = [], []
    for part in vectors.split(rows_at_once(readout)):
        change = part @ readout.weight.T
        change -= change.mean(-1, keepdim=True)
        ends = [change.topk(min(n, change.shape[1]), largest=largest) for largest in (True, False)]
        ids.append(torch.stack([end.indices for end in ends], 1))
        logits.append(torch.stack([end.values for end in ends], 1))
    return torch.cat(ids), torch.cat(logits)

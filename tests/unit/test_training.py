"""What is measured of a state of a model: against unhooked forward passes and neurons multiplied out by hand."""

import math
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import silu

from moescope import anatomy, lens, training, utilization

ARCHITECTURES = ["qwen2_moe", "llama"]


@pytest.fixture(scope="module")
def asked(tokens):
    """Prompts with the tokens that another model preferred: of every third prompt two of them."""
    ids = [[5 + row] if row % 3 else [7 + row, 5] for row in range(len(tokens))]
    return tokens.assign(target_ids=ids, target_id=[own[0] for own in ids], answer_ids=[[own] for own in ids], rank=1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def measured(request, build, asked):
    torch.set_num_threads(1)
    model = build(request.param)
    parts = anatomy.find(model)
    return model, parts, training.measure(model, parts, asked, batch_size=8, share=0.02)


def test_ranks_and_log_probabilities_are_those_of_the_asked_tokens(measured, asked):
    model, _, table = measured
    assert table["prompt_id"].tolist() == sorted(asked["prompt_id"])
    by_id = table.set_index("prompt_id")
    for row in asked.itertuples():
        ids = torch.tensor([[*row.token_ids, *row.target_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row.token_ids) - 1 : -1]
        own = logits.gather(1, torch.tensor(row.target_ids).unsqueeze(1))
        assert by_id.loc[row.prompt_id, "rank"] == (logits >= own).sum(1).max()
        log_prob = logits.log_softmax(1).gather(1, torch.tensor(row.target_ids).unsqueeze(1)).sum()
        assert by_id.loc[row.prompt_id, "log_prob"] == pytest.approx(float(log_prob), abs=1e-4)


def test_keys_are_those_of_the_same_tokens_and_choices_those_at_the_end_of_the_prompt(measured, asked):
    model, parts, table = measured
    keys, _ = utilization.find(model, parts, asked, 8, share=0.02)
    assert table.merge(keys, on="prompt_id").eval("keys_x == keys_y").all()
    dtypes = ["int32", "int32", "float32", "object", "object", "float32"]
    columns = ["prompt_id", "rank", "log_prob", "keys", "choices", "lpi_top_share"]
    assert dict(zip(columns, dtypes, strict=True)) == table.dtypes.astype(str).to_dict()
    chosen = table.set_index("prompt_id")["choices"]
    for row in asked.itertuples():
        gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        seen = during(model, row.token_ids, gates, lambda args, out: out[-1][-1])
        assert chosen[row.prompt_id].dtype == np.int16
        assert chosen[row.prompt_id].tolist() == [int(expert) for layer in seen for expert in layer]


def during(model, ids, modules, see):
    """see(arguments, output) of these modules, in the order of their calls, in a forward pass over one prompt."""
    found = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(lambda _, *call: found.append(see(*call))).remove)
        model(torch.tensor([ids]))
    return found


def neurons_of(mlp, x):
    """What each FFN neuron that the state x uses adds to the residual stream, from the weights alone."""
    if not hasattr(mlp, "experts"):
        return silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
    _, weights, chosen = mlp.gate(x.unsqueeze(0))
    acts, columns = [], []
    for weight, expert in zip(weights[0], chosen[0], strict=True):
        gate, up = (mlp.experts.gate_up_proj[expert] @ x).chunk(2)
        acts.append(weight * silu(gate) * up)
        columns.append(mlp.experts.down_proj[expert])
    shared = mlp.shared_expert
    acts.append(mlp.shared_expert_gate(x).sigmoid() * silu(shared.gate_proj(x)) * shared.up_proj(x))
    return torch.cat(acts), torch.cat([*columns, shared.down_proj.weight], 1)


@torch.no_grad()
def test_the_top_share_is_that_of_tangents_multiplied_out(measured, asked):
    model, parts, table = measured
    found = table.set_index("prompt_id")["lpi_top_share"]
    top = math.ceil(0.01 * utilization.units(parts)["width"].sum())
    norm = model.model.norm
    for row in asked.iloc[:6].itertuples():
        shares = []
        for step, target in enumerate(row.target_ids):
            norms = [*(layer.post_attention_layernorm for layer in model.model.layers), norm]
            ids = [*row.token_ids, *row.target_ids[:step]]
            *states, final = during(model, ids, norms, lambda args, out: args[0][0, -1])
            scale = torch.rsqrt(final.pow(2).mean() + norm.variance_epsilon)
            readout = model.lm_head.weight * norm.weight * scale
            tangents = []
            for layer, state in zip(model.model.layers, states, strict=True):
                slope = readout[target] - (readout @ state).softmax(0) @ readout
                acts, columns = neurons_of(layer.mlp, layer.post_attention_layernorm(state))
                tangents.append(acts * (slope @ columns))
            positive = torch.cat(tangents).clamp_min(0).sort(descending=True).values
            shares.append(float(positive[:top].sum() / positive.sum()))
        assert found[row.prompt_id] == pytest.approx(np.mean(shares), rel=1e-4)


def test_batch_size_and_the_order_of_prompts_change_nothing(measured, asked):
    model, parts, table = measured
    other = training.measure(model, parts, asked.sample(12, random_state=0), batch_size=3, share=0.02)
    table = table[table["prompt_id"].isin(other["prompt_id"])].reset_index(drop=True)
    choices = [table["choices"].map(list), other["choices"].map(list)]
    assert choices[0].tolist() == choices[1].tolist()
    pd.testing.assert_frame_equal(table.drop(columns="choices"), other.drop(columns="choices"), rtol=1e-4)


def test_the_slope_of_a_capped_readout_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 6), (3, 6)))
    plain = lens.Readout(weight, None)
    scale, target = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor([0, 4, 8])
    for readout in (plain, replace(plain, softcap=1.5), replace(plain, bias=weight[:, 0])):
        found = training.gradient(readout, states, scale, target)
        step = 1e-5 * torch.eye(6, dtype=torch.float64)
        for i in range(6):
            up, down = (lens.log_prob(readout, states + sign * step[i], scale, target) for sign in (1, -1))
            assert found[:, i].tolist() == pytest.approx(((up - down) / 2e-5).tolist(), abs=1e-6)

"""The algorithm of the published Gated-LPI notebook, from its definition, on the same OLMoE weights.

Gated-LPI (arXiv 2601.08383) reads every state with the norm scale of the real final state, whose epsilon it sets to
1e-6, for the token that the model itself likes best. Here that is plain arithmetic on one prompt at a time, with a
forward pass of its own: neither the model's code nor any of this project's takes part in it.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, OlmoeConfig

from moescope import anatomy, attribution, capture

from conftest import write_tensors

MODEL_EPS, NOTEBOOK_EPS = 1e-5, 1e-6
# The usual model, and one whose final state is so small that the two epsilons differ.
SIZES = {"usual": 1.0, "small": 5e-3}
by_size = pytest.mark.parametrize("size", SIZES)


@dataclass
class Layer:
    """What the notebook computes in one layer, at the last token."""

    attention: float
    ffn: float
    heads: list[float]
    experts: dict[int, float] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    coefficients: dict[int, torch.Tensor] = field(default_factory=dict)


def rms_norm(x, gain, eps):
    return gain * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def rotate(x, theta):
    """Rotary embedding of [heads positions dimensions]: pair (i, i + d/2) turns by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[1]).float(), theta ** (-torch.arange(half).float() / half))
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], -1)


def attention(w, at, x, config):
    """[positions heads source_positions d_model]: attention-weighted values through each head's slice of o_proj."""
    n, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    groups = n // config.num_key_value_heads
    names = [("q", n), ("k", n // groups), ("v", n // groups)]
    q, k, v = (x @ w[f"{at}self_attn.{name}_proj.weight"].T for name, _ in names)
    q = rms_norm(q, w[f"{at}self_attn.q_norm.weight"], MODEL_EPS)
    k = rms_norm(k, w[f"{at}self_attn.k_norm.weight"], MODEL_EPS)
    q, k, v = (t.view(len(x), heads, width).transpose(0, 1) for t, (_, heads) in zip((q, k, v), names))
    q, k = rotate(q, config.rope_parameters["rope_theta"]), rotate(k, config.rope_parameters["rope_theta"])
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) / width**0.5
    future = torch.ones(len(x), len(x)).triu(1).bool()
    pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
    slices = w[f"{at}self_attn.o_proj.weight"].view(config.hidden_size, n, width)
    return torch.einsum("hij,hjk,dhk->ihjd", pattern, v, slices)


def experts(w, at, x, config):
    """For one token: by expert, its router weight, its neurons' coefficients and their vectors [neurons d_model]."""
    probabilities = (x @ w[f"{at}mlp.gate.weight"].T).softmax(-1)
    found = {}
    for expert in probabilities.argsort(descending=True)[: config.num_experts_per_tok].tolist():
        gate, up = (w[f"{at}mlp.experts.gate_up_proj"][expert] @ x).chunk(2)
        coefficients = silu(gate) * up
        columns = w[f"{at}mlp.experts.down_proj"][expert].T
        found[expert] = probabilities[expert], coefficients, probabilities[expert] * coefficients[:, None] * columns
    return found


def notebook(model, ids, eps=NOTEBOOK_EPS):
    """The notebook on one prompt: its target, its layers, and the logits of this forward pass."""
    w, config = dict(model.named_parameters()), model.config
    h = w["model.embed_tokens.weight"][ids]
    states = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        vectors = attention(w, at, rms_norm(h, w[f"{at}input_layernorm.weight"], MODEL_EPS), config)
        u = h + vectors.sum((1, 2))
        chosen = [experts(w, at, x, config) for x in rms_norm(u, w[f"{at}post_attention_layernorm.weight"], MODEL_EPS)]
        after = u + torch.stack([sum(v.sum(0) for _, _, v in token.values()) for token in chosen])
        states.append((h[-1], u[-1], after[-1], vectors[-1].sum(1), chosen[-1]))
        h = after
    gain, unembedding = w["model.norm.weight"], w["lm_head.weight"]
    logits = unembedding @ rms_norm(h[-1], gain, MODEL_EPS)
    target = int(logits.argmax())
    scale = 1 / torch.sqrt((h[-1] ** 2).mean() + eps)

    def log_p(state):
        return (unembedding @ (gain * state * scale)).double().log_softmax(-1)[target]

    layers = []
    for before, middle, after, heads, chosen in states:
        layer = Layer(
            float(log_p(middle) - log_p(before)),
            float(log_p(after) - log_p(middle)),
            [float(log_p(before + head) - log_p(before)) for head in heads],
        )
        for expert, (weight, coefficients, vectors) in chosen.items():
            layer.experts[expert] = float(log_p(middle + vectors.sum(0)) - log_p(middle))
            layer.weights[expert], layer.coefficients[expert] = float(weight), coefficients
        layers.append(layer)
    return target, layers, logits


@pytest.fixture(scope="module")
def run(tokenizer, tokens, tmp_path_factory):
    """By size: an OLMoE as configured in its release, the cache of its prompts, and what the notebook finds."""
    torch.set_num_threads(1)
    made = {}
    for name, size in SIZES.items():
        config = OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=3,
            max_position_embeddings=64,
            rms_norm_eps=MODEL_EPS,
            eos_token_id=0,
            pad_token_id=0,
        )
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for key, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            if key.endswith(("embed_tokens.weight", "o_proj.weight", "experts.down_proj")):
                weight.mul_(size)
        some = tokens.iloc[::4].reset_index(drop=True)
        parts = anatomy.find(model)
        tensors, table, _ = capture.in_memory(model, parts, some, 16, "argmax")
        path = tmp_path_factory.mktemp(name) / "0.safetensors"
        write_tensors(tensors, path)
        with torch.no_grad():
            found = {row.prompt_id: notebook(model, row.token_ids) for row in some.itertuples()}
        made[name] = model, parts, path, tensors, table, found
    return made


def compare(tables, found):
    """The largest difference of any layer, head or expert, and the largest LPI."""
    layers, heads, experts, _ = (table.set_index(["prompt_id", "layer"]) for table in tables)
    pairs = []
    for prompt, (_, of_layer, _) in found.items():
        for i, layer in enumerate(of_layer):
            row = layers.loc[(prompt, i)]
            pairs += [(row["attention"], layer.attention), (row["ffn"], layer.ffn)]
            ours = heads.loc[(prompt, i)].set_index("head")["lpi"]
            pairs += [(ours[head], lpi) for head, lpi in enumerate(layer.heads)]
            ours = experts.loc[(prompt, i)].set_index("expert")["lpi"]
            assert set(ours.index) == set(layer.experts)
            pairs += [(ours[expert], lpi) for expert, lpi in layer.experts.items()]
    ours, theirs = np.array(pairs).T
    return np.abs(ours - theirs).max(), np.abs(theirs).max()


@by_size
def test_the_definition_is_a_forward_pass_of_the_model(run, size):
    """If this arithmetic were no OLMoE, agreeing with it would mean nothing."""
    model, _, _, _, table, found = run[size]
    for row in table.itertuples():
        target, _, logits = found[row.prompt_id]
        torch.testing.assert_close(
            logits, model(input_ids=torch.tensor([row.token_ids])).logits[0, -1], rtol=1e-4, atol=1e-4
        )
        assert [target] == row.target_ids == [row.target_id]
        assert row.rank == 1


@by_size
def test_lpi_of_layers_heads_and_experts_agrees_with_the_notebook(run, size):
    _, parts, path, _, table, found = run[size]
    error, largest = compare(attribution.attribute(parts, [path], table, norm="reference"), found)
    assert error < 1e-4
    assert largest > 0.5


def test_the_models_own_epsilon_gives_other_values_where_the_final_state_is_small(run):
    """So the test above tells the two modes apart; with the model's epsilon the definition agrees with `fixed`."""
    model, parts, path, tensors, table, found = run["small"]
    assert float(tensors["resid_final"].pow(2).mean(-1).max()) < MODEL_EPS
    fixed = attribution.attribute(parts, [path], table, norm="fixed")
    assert compare(fixed, found)[0] > 0.1
    with torch.no_grad():
        own = {row.prompt_id: notebook(model, row.token_ids, MODEL_EPS) for row in table.itertuples()}
    assert compare(fixed, own)[0] < 1e-4


@by_size
def test_weights_and_neuron_coefficients_are_the_notebooks(run, size):
    """Each expert is the sum of its neurons: router weight x act(gate) * up x column of the down projection."""
    model, parts, path, tensors, table, found = run[size]
    _, _, experts, _ = attribution.attribute(parts, [path], table, norm="reference")
    weights = experts.set_index(["prompt_id", "layer", "expert"])["weight"]
    for row, prompt in enumerate(tensors["prompt_id"].tolist()):
        for i, layer in enumerate(found[prompt][1]):
            down = model.model.layers[i].mlp.experts.down_proj
            middle, after = tensors[f"{i}.resid_mid"][row], tensors.get(f"{i + 1}.resid_pre", tensors["resid_final"])
            total = torch.zeros_like(middle)
            for slot, expert in enumerate(tensors[f"{i}.expert_ids"][row].tolist()):
                assert weights[(prompt, i, expert)] == pytest.approx(layer.weights[expert], abs=1e-5)
                coefficients = tensors[f"{i}.expert_acts"][row, slot]
                torch.testing.assert_close(coefficients, layer.coefficients[expert], rtol=1e-4, atol=1e-5)
                for neuron, coefficient in enumerate(coefficients):
                    total += layer.weights[expert] * coefficient * down[expert][:, neuron]
            torch.testing.assert_close(total, after[row] - middle, rtol=1e-3, atol=1e-5)

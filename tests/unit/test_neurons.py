"""The strongest neurons by the bound, against all neurons by brute force and against planted ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import anatomy, capture, lens, neurons, planted

import families
from conftest import SHAPES

SIDES = {"ffn": (neurons.ffn_neurons, "resid_mid"), "attention": (neurons.attention_neurons, "resid_pre")}
OTHERS = ["deepseek_v3", "flex_olmo", "gpt2", "gpt_oss", "granitemoe", "nemotron_h", "qwen3_next"]


def blocks_of(parts, tensors, side):
    """The neurons of one side of every layer that has some, and the states that they add to."""
    make, state = SIDES[side]
    made = [
        (make(layer, capture._of_layer(tensors, layer)), tensors[f"{layer.index}.{state}"]) for layer in parts.layers
    ]
    return [(block, state) for block, state in made if block is not None]


@pytest.fixture(scope="module")
def recorded(build, tokens):
    def of(name):
        torch.set_num_threads(1)
        model = build(name) if name in SHAPES else families.build(name)
        parts = anatomy.find(model)
        if name in SHAPES:
            tensors, table, _ = capture.in_memory(model, parts, tokens, 64)
            return parts, tensors, torch.tensor(table["target_id"].to_numpy(), dtype=torch.long)
        with torch.no_grad():
            tensors, logits = capture.record(model, parts, families.IDS)
        return parts, tensors, logits.argmin(-1)

    return of


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
def test_the_strongest_neurons_are_those_of_brute_force(recorded, name, side):
    parts, tensors, target = recorded(name)
    readout, scale = lens.Readout.of(parts), tensors["norm_scale"]
    blocks, states = zip(*blocks_of(parts, tensors, side))
    found = neurons.strongest(readout, states, blocks, scale, target, 12)
    every = [neurons.every(readout, s, b, scale, target) for s, b in zip(states, blocks)]
    best = torch.cat(every, 1).topk(12, dim=1).values
    assert found["exact"].all()
    assert (found["row"].to_numpy() == np.arange(len(target)).repeat(12)).all()
    np.testing.assert_allclose(found["lpi"].to_numpy().reshape(len(target), 12), best, atol=1e-7, rtol=1e-5)
    assert (found["lpi"] <= found["bound"] + neurons.GUARD).all()
    # A name leads back to the neuron: its value stands in the table of all.
    for row in found.iloc[::17].itertuples():
        at = next(i for i, block in enumerate(blocks) if block.layer == row.layer)
        places = torch.arange(every[at].shape[1])
        unit, neuron = blocks[at].names(torch.full_like(places, row.row), places)
        [place] = ((unit == row.unit) & (neuron == row.neuron)).nonzero()[:, 0].tolist()
        assert every[at][row.row, place].item() == pytest.approx(row.lpi, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["qwen2_moe", "llama", "deepseek_v3", "gpt_oss", "flex_olmo", "granitemoe"])
def test_neurons_add_up_to_their_block_and_each_is_valued_as_any_vector(recorded, name, side):
    parts, tensors, target = recorded(name)
    readout, scale = lens.Readout.of(parts), tensors["norm_scale"]
    for block, state in blocks_of(parts, {name: tensor.detach() for name, tensor in tensors.items()}, side):
        n, m = block.activations.shape
        row, place = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
        vectors = block.contributions(row, place).unflatten(0, (n, m))
        layer = parts.layers[block.layer]
        here = capture._of_layer(tensors, layer)
        parts_sum = (capture.ffn_output if side == "ffn" else capture.attention_output)(layer, here).detach()
        constant = parts_sum - vectors.sum(1)
        # Biases belong to no neuron: of the output projections, and of routed experts times their gate weights.
        if name != "gpt_oss":
            torch.testing.assert_close(
                constant, torch.zeros_like(constant), rtol=0, atol=2e-5 * parts_sum.abs().max().item()
            )
        vocabulary = torch.randn(n, vectors.shape[2])
        torch.testing.assert_close(
            block.products(vocabulary), torch.einsum("nmd,nd->nm", vectors, vocabulary), rtol=1e-4, atol=1e-4
        )
        expected = lens.lpi(readout, state, vectors, scale, target)
        found = neurons.every(readout, state, block, scale, target)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 40), st.floats(1e-4, 30))
def test_the_bound_is_above_every_lpi_and_never_above_the_tangent(seed, peak, size):
    rng = np.random.default_rng(seed)
    d, vocabulary, n, m = 6, 40, 3, 20
    weight, r = rng.normal(size=(vocabulary, d)), rng.normal(size=(n, d)) * peak
    v, s, w = rng.normal(size=(n, m, d)) * size, rng.uniform(0.1, 1, n), rng.integers(0, vocabulary, n)

    def log_p(x):
        return (z := x @ weight.T) - np.logaddexp.reduce(z, axis=-1, keepdims=True)

    readout = lens.Readout(torch.tensor(weight).float(), None)
    arguments = (torch.tensor(r).float(), torch.tensor(s).float(), torch.tensor(w))
    p, gradient = neurons.tangents(readout, *arguments)
    tangent = torch.einsum("nmd,nd->nm", torch.tensor(v).float(), gradient)
    bound = neurons.upper_bound(tangent, p.gather(1, arguments[2].unsqueeze(1)).squeeze(1)).double().numpy()
    for i in range(n):
        base = log_p(r[i] * s[i])[w[i]]
        exact = np.array([log_p((r[i] + v[i, j]) * s[i])[w[i]] - base for j in range(m)])
        rounding = 2e-5 * (1 + size) * (1 + peak)
        assert (exact <= bound[i] + rounding).all()
    assert (bound <= tangent.double().numpy() + 1e-6).all()


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral"])
def test_the_strongest_neuron_is_the_planted_one(architecture):
    """Hand-set models at toy size: each fact has one neuron by construction."""
    torch.set_num_threads(1)
    made = planted.hand_set(architecture, n_relations=4, n_subjects=8, n_answers=8)
    parts = anatomy.find(made.model)
    tokens, _ = planted.tokenise(made.tokenizer, made.prompts)
    tensors, table, _ = capture.in_memory(made.model, parts, tokens, 64)
    blocks, states = zip(*blocks_of(parts, tensors, "ffn"))
    target = torch.tensor(table["target_id"].to_numpy(), dtype=torch.long)
    found = neurons.strongest(lens.Readout.of(parts), states, blocks, tensors["norm_scale"], target, 3)
    found = found.assign(prompt_id=table["prompt_id"].to_numpy()[found["row"]]).rename(columns={"unit": "expert"})
    assert planted.recall(found, made.truth, 1, planted.NEURON, "lpi") == 1.0


def test_chunks_and_an_exhausted_pool_change_nothing_but_what_is_certain(recorded, monkeypatch):
    parts, tensors, target = recorded("olmoe")
    readout, scale = lens.Readout.of(parts), tensors["norm_scale"]
    blocks, states = zip(*blocks_of(parts, tensors, "ffn"))
    whole = neurons.strongest(readout, states, blocks, scale, target, 5)
    monkeypatch.setattr(neurons, "LOGITS", len(readout.weight) * len(blocks) * 4)
    chunks = neurons.strongest(readout, states, blocks, scale, target, 5)
    np.testing.assert_allclose(chunks["lpi"], whole["lpi"], atol=1e-7)
    monkeypatch.setattr(neurons, "GUARD", 1e3)
    assert not neurons.strongest(readout, states, blocks, scale, target, 5)["exact"].any()

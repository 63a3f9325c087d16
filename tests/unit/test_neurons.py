"""Neurons: what each adds to the residual stream, and its LPI by brute force."""

import pytest
import torch

from moescope import anatomy, capture, lens, neurons

import families
from conftest import SHAPES

SIDES = {"ffn": (neurons.ffn_neurons, "resid_mid"), "attention": (neurons.attention_neurons, "resid_pre")}


def blocks_of(parts, tensors, side):
    """The neurons of one side of every layer that has some, and the states that they add to."""
    make, state = SIDES[side]
    made = [
        (make(layer, capture.of_layer(tensors, layer)), tensors[f"{layer.index}.{state}"]) for layer in parts.layers
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


def test_a_shared_experts_gate_costs_half_precision_no_digits():
    model = families.build("qwen2_moe").to(torch.bfloat16)
    parts = anatomy.find(model)
    with torch.no_grad():
        tensors, _ = capture.record(model, parts, families.IDS)
        for block, _ in blocks_of(parts, tensors, "ffn"):
            n, m = block.activations.shape
            vectors = block.contributions(torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n))
            layer = parts.layers[block.layer]
            whole = capture.ffn_output(layer, capture.of_layer(tensors, layer))
            torch.testing.assert_close(
                vectors.view(n, m, -1).sum(1), whole, rtol=0, atol=1e-5 * float(whole.abs().max())
            )


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
        here = capture.of_layer(tensors, layer)
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

        # The names lead to the places and back.
        unit, neuron = block.names(row, place)
        assert (block.places(row, unit, neuron) == place).all()
        assert (block.places(row, torch.full_like(unit, 99), neuron) == -1).all()
        several = block.products(vocabulary.unsqueeze(1).expand(-1, 3, -1) * torch.tensor([[[1.0], [2.0], [-3.0]]]))
        torch.testing.assert_close(several[:, 2], -3 * several[:, 0], rtol=1e-4, atol=1e-4)

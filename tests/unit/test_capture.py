"""The activation cache of the six architectures, against unhooked forward passes and brute force."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from moescope import capture, models

from conftest import MOE_SHAPES, SHAPES

every_model = pytest.mark.parametrize("name", SHAPES)
every_moe = pytest.mark.parametrize("name", MOE_SHAPES)


def first_batch(tokens, device="cpu"):
    rows = next(capture.batches(tokens["length"].to_numpy(), 64))
    return capture.token_tensor(tokens, rows, torch.device(device))


@every_model
def test_anatomy_finds_the_real_modules(build, name):
    model = build(name)
    parts = models.anatomy(model)
    assert parts.final_norm is model.model.norm
    assert parts.unembedding is model.lm_head
    assert parts.is_moe == (name in MOE_SHAPES)
    for layer, block in zip(parts.layers, model.model.layers, strict=True):
        assert (layer.attention, layer.ffn) == (block.self_attn, block.mlp)
        assert (layer.out_proj, layer.ffn_norm) == (block.self_attn.o_proj, block.post_attention_layernorm)
        assert layer.n_heads == model.config.num_attention_heads
        if name in MOE_SHAPES:
            assert (layer.experts, layer.router, layer.down) == (block.mlp.experts, block.mlp.gate, None)
            assert layer.n_experts == MOE_SHAPES[name]["experts"]
        else:
            assert (layer.down, layer.n_experts) == (block.mlp.down_proj, 0)
    shared = [s for layer in parts.layers for s in layer.shared]
    if name == "qwen2_moe":
        assert [s.module for s in shared] == [block.mlp.shared_expert for block in model.model.layers]
        assert [s.gate for s in shared] == [block.mlp.shared_expert_gate for block in model.model.layers]
    else:
        assert not shared


@every_model
def test_recording_changes_no_bit(build, tokens, name):
    model = build(name)
    ids = first_batch(tokens)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits[:, -1]
        _, logits = capture.record(model, models.anatomy(model), ids)
        again = model(input_ids=ids).logits[:, -1]
    assert torch.equal(plain, again)
    torch.testing.assert_close(logits, plain, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(logits, model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1])


@every_model
def test_recorded_states_are_the_models_own_hidden_states(build, tokens, name):
    """transformers returns its hidden states itself: one before each layer and the normed last one."""
    model = build(name)
    ids = first_batch(tokens)
    with torch.inference_mode():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        found, _ = capture.record(model, models.anatomy(model), ids)
    for layer in range(3):
        torch.testing.assert_close(found[f"{layer}.resid_pre"], hidden[layer][:, -1])
    torch.testing.assert_close(model.model.norm(found["resid_final"]), hidden[-1][:, -1])


@every_model
def test_parts_add_up_on_all_layers(build, tokens, name):
    model = build(name)
    _, _, errors = capture.capture(model, models.anatomy(model), tokens, 64)
    assert len(errors) == 6
    assert max(errors.values()) < 2e-6


def test_the_largest_error_of_any_layer_is_reported(build, tokens):
    model = build("olmoe")
    parts, ids = models.anatomy(model), first_batch(tokens)
    with torch.inference_mode():
        found, logits = capture.record(model, parts, ids)
        found["0.attention_out"] = found["0.attention_out"] * (1 + 5e-6)
        errors = capture.verify(model, parts, ids, found, logits)
        assert errors["sum of heads = attention output"] == pytest.approx(5e-6, rel=0.25)
        found["0.attention_out"] = found["0.attention_out"] * (1 + 5e-5)
        with pytest.raises(
            models.AnatomyError, match=r"layer 0: sum of heads .* relative error 5\.\d\de-05, allowed 1e-05"
        ):
            capture.verify(model, parts, ids, found, logits)


@every_moe
def test_expert_outputs_equal_the_experts_run_one_by_one(build, tokens, name):
    """Independent of the recorded activations: the experts module itself, given one expert with weight 1."""
    model = build(name)
    parts = models.anatomy(model)
    inputs = {}
    handles = [
        layer.ffn.register_forward_pre_hook(lambda m, args, i=layer.index: inputs.update({i: args[0][:, -1]}))
        for layer in parts.layers
    ]
    with torch.inference_mode():
        found, _ = capture.record(model, parts, first_batch(tokens))
        for handle in handles:
            handle.remove()
        for layer in parts.layers:
            here = {k.removeprefix(f"{layer.index}."): v for k, v in found.items() if k.startswith(f"{layer.index}.")}
            contributions = models.expert_contributions(layer, here)
            for slot in range(contributions.shape[1]):
                chosen = here["expert_ids"][:, slot : slot + 1].long()
                alone = layer.experts(inputs[layer.index], chosen, here["expert_weights"][:, slot : slot + 1])
                torch.testing.assert_close(contributions[:, slot], alone, rtol=1e-5, atol=1e-6)


@every_moe
@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_backend_is_recorded_bit_for_bit_and_they_agree(build, tokens, name, backend):
    model = copy.deepcopy(build(name))
    model.set_experts_implementation(backend)
    parts, ids = models.anatomy(model), first_batch(tokens)
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        found, logits = capture.record(model, parts, ids)
        reference, _ = capture.record(build(name), models.anatomy(build(name)), ids)
    assert torch.equal(logits, plain)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, reference[key], rtol=1e-4, atol=1e-5)


@every_moe
def test_routing_is_what_the_router_chose_at_every_position(build, tokens, name):
    model = build(name)
    parts = models.anatomy(model)
    ids = first_batch(tokens)
    chosen = {}
    handles = [
        layer.router.register_forward_hook(lambda m, a, out, i=layer.index: chosen.update({i: out}))
        for layer in parts.layers
    ]
    with torch.inference_mode():
        found, _ = capture.record(model, parts, ids)
    for handle in handles:
        handle.remove()
    for layer in parts.layers:
        logits, weights, index = (t.reshape(*ids.shape, -1) for t in chosen[layer.index])
        at = f"{layer.index}."
        assert torch.equal(found[f"{at}expert_ids"].long(), index[:, -1])
        assert torch.equal(found[f"{at}expert_weights"], weights[:, -1])
        assert torch.equal(found[f"{at}router_logits"], logits[:, -1])
        for row in range(len(ids)):
            by_hand = [int((index[row] == e).sum()) for e in range(layer.n_experts)]
            assert found[f"{at}expert_load"][row].tolist() == by_hand


@every_model
def test_a_batch_gives_what_single_prompts_give(build, tokens, name):
    model = build(name)
    parts = models.anatomy(model)
    together, table, _ = capture.capture(model, parts, tokens, 64)
    single, single_table, _ = capture.capture(model, parts, tokens, 1)
    assert table["prompt_id"].tolist() == single_table["prompt_id"].tolist()
    for key, tensor in together.items():
        torch.testing.assert_close(tensor, single[key], rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(table, single_table, rtol=1e-4)


@every_model
def test_clean_scores_come_from_an_unhooked_forward_pass(build, tokens, name):
    model = build(name)
    _, table, _ = capture.capture(model, models.anatomy(model), tokens, 64)
    for row in table.itertuples():
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row.token_ids])).logits[0, -1]
        log_probs = logits.log_softmax(-1)
        best = max(row.accepted_ids, key=lambda token: log_probs[token].item())
        assert row.target_id == best
        assert row.log_prob == pytest.approx(log_probs[best].item(), abs=1e-4)
        assert row.rank == int((logits >= logits[best]).sum())


def test_norm_scale_is_that_of_the_final_state(build, tokens):
    model = build("olmoe")
    parts = models.anatomy(model)
    tensors, _, _ = capture.capture(model, parts, tokens, 64)
    scaled = tensors["resid_final"] * tensors["norm_scale"][:, None] * model.model.norm.weight
    torch.testing.assert_close(model.model.norm(tensors["resid_final"]), scaled, rtol=1e-6, atol=1e-6)


def test_bf16_stays_bf16(build, tokens):
    model = copy.deepcopy(build("mixtral")).bfloat16()
    tensors, table, errors = capture.capture(model, models.anatomy(model), tokens, 64)
    assert tensors["1.expert_acts"].dtype == tensors["resid_final"].dtype == torch.bfloat16
    assert tensors["norm_scale"].dtype == torch.float32
    assert max(errors.values()) < 0.05
    assert table["log_prob"].dtype == "float32"


class Doubled(nn.Module):
    """An FFN whose output is not what its parts say."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return 2 * self.inner(hidden)


def test_a_model_whose_parts_do_not_add_up_is_refused(build, tokens):
    model = copy.deepcopy(build("llama"))
    model.model.layers[1].mlp = Doubled(model.model.layers[1].mlp)
    with pytest.raises(models.AnatomyError, match=r"layer 1: sum of experts \(or neurons\) = FFN output does not hold"):
        capture.capture(model, models.anatomy(model), tokens, 64)


def test_a_structure_that_is_not_understood_is_refused(build):
    model = copy.deepcopy(build("llama"))
    model.model.layers[2].extra_norm = copy.deepcopy(model.model.norm)
    with pytest.raises(models.AnatomyError, match="layer 2: 2 blocks and 3 norms found"):
        models.anatomy(model)


def test_no_hook_is_left_behind(build, tokens):
    model = build("qwen2_moe")

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    capture.capture(model, models.anatomy(model), tokens, 64)
    assert hooks() == before


@pytest.mark.parametrize("lengths", [[3, 4, 3, 5, 4, 3], [2], [7] * 5])
def test_batches_hold_every_row_once_and_one_length_each(lengths):
    import numpy as np

    found = list(capture.batches(np.array(lengths), 2))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    assert all(len(set(np.array(lengths)[rows])) == 1 and len(rows) <= 2 for rows in found)

"""The activation cache of the six architectures, against unhooked forward passes and brute force."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from moescope import anatomy, capture, models

from conftest import MOE_SHAPES, SHAPES

every_model = pytest.mark.parametrize("name", SHAPES)
every_moe = pytest.mark.parametrize("name", MOE_SHAPES)


def first_batch(tokens, device="cpu"):
    rows = next(capture.batches(tokens["length"].to_numpy(), 64))
    return capture.token_tensor(tokens, rows, torch.device(device))


@every_model
def test_anatomy_finds_the_real_modules(build, name):
    model = build(name)
    parts = anatomy.find(model)
    assert parts.final_norm.module is model.model.norm
    assert parts.unembedding is model.lm_head
    assert parts.is_moe == (name in MOE_SHAPES)
    for layer, block in zip(parts.layers, model.model.layers, strict=True):
        assert (layer.attention.module, layer.attention.out_proj) == (block.self_attn, block.self_attn.o_proj)
        assert (layer.block, layer.middle) == (block, block.post_attention_layernorm)
        assert layer.n_heads == model.config.num_attention_heads
        if name in MOE_SHAPES:
            assert (layer.experts.module, layer.experts.router) == (block.mlp.experts, block.mlp.gate)
            assert layer.dense is None
            assert layer.n_experts == MOE_SHAPES[name]["experts"]
        else:
            assert (layer.dense.down, layer.n_experts) == (block.mlp.down_proj, 0)
    shared = [s for layer in parts.layers for s in layer.shared]
    if name == "qwen2_moe":
        assert [s.down for s in shared] == [block.mlp.shared_expert.down_proj for block in model.model.layers]
        assert [s.gate for s in shared] == [block.mlp.shared_expert_gate for block in model.model.layers]
    else:
        assert not shared


@every_model
def test_recording_changes_no_bit(build, tokens, name):
    model = build(name)
    ids = first_batch(tokens)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits[:, -1]
        _, logits = capture.record(model, anatomy.find(model), ids)
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
        found, _ = capture.record(model, anatomy.find(model), ids)
    for layer in range(3):
        torch.testing.assert_close(found[f"{layer}.resid_pre"], hidden[layer][:, -1])
    torch.testing.assert_close(model.model.norm(found["resid_final"]), hidden[-1][:, -1])


@every_model
def test_every_position_is_recorded_as_if_the_prompt_ended_there(build, tokens, name):
    model = build(name)
    parts, ids = anatomy.find(model), first_batch(tokens)
    with torch.inference_mode():
        every, logits = capture.record(model, parts, ids, every_position=True)
        assert torch.equal(logits, capture.record(model, parts, ids)[1])
        for end in (1, 3, ids.shape[1]):
            shorter, _ = capture.record(model, parts, ids[:, :end])
            assert every.keys() == shorter.keys()
            for key, tensor in every.items():
                at = tensor.unflatten(0, ids.shape)
                if key.endswith("expert_load"):
                    at = at[:, :end].sum(1, dtype=torch.int16)
                elif key.endswith("expert_choices"):
                    at = at[:, :end, 0]
                elif key.endswith("router_margin"):
                    at = torch.stack([at[:, end - 1, 0], at[:, :end, 1].amin(1)], 1)
                else:
                    at = at[:, end - 1]
                torch.testing.assert_close(at, shorter[key], rtol=1e-4, atol=1e-5)


@every_model
def test_parts_add_up_on_all_layers(build, tokens, name):
    model = build(name)
    _, _, errors = capture.in_memory(model, anatomy.find(model), tokens, 64)
    assert len(errors) == 4
    assert max(errors.values()) < 2e-6


def test_the_largest_error_of_any_layer_is_reported(build, tokens):
    model = build("olmoe")
    parts, ids = anatomy.find(model), first_batch(tokens)
    with torch.inference_mode():
        found, logits = capture.record(model, parts, ids)
        # Increments far larger than the stream leave no room for its rounding in the tolerance.
        increment = found["0.resid_mid"] - found["0.resid_pre"]
        exact = found["0.head_in"]
        found["0.head_in"] = exact * (1 + 3e-6)
        errors = capture.verify(model, parts, ids, found, logits)
        size = increment.abs().max() + 4 * torch.finfo(torch.float32).eps / 1e-5 * found["0.resid_mid"].abs().max()
        expected = float(3e-6 * increment.abs().max() / size)
        assert errors["sum of heads = what attention adds to the residual stream"] == pytest.approx(expected, rel=0.3)
        found["0.head_in"] = exact * 1.01
        with pytest.raises(
            models.AnatomyError, match=r"layer 0: sum of heads .* relative error \d\.\d\de-03, allowed 1e-05"
        ):
            capture.verify(model, parts, ids, found, logits)


@every_moe
def test_expert_outputs_equal_the_experts_run_one_by_one(build, tokens, name):
    """Independent of the recorded activations: the experts module itself, given one expert with weight 1."""
    model = build(name)
    parts = anatomy.find(model)
    inputs = {}
    handles = [
        layer.middle.register_forward_hook(lambda m, args, out, i=layer.index: inputs.update({i: out[:, -1]}))
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
                alone = layer.experts.module(inputs[layer.index], chosen, here["expert_weights"][:, slot : slot + 1])
                torch.testing.assert_close(contributions[:, slot], alone, rtol=1e-5, atol=1e-6)


@every_moe
@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_backend_is_recorded_bit_for_bit_and_they_agree(build, tokens, name, backend):
    model = copy.deepcopy(build(name))
    model.set_experts_implementation(backend)
    parts, ids = anatomy.find(model), first_batch(tokens)
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        found, logits = capture.record(model, parts, ids)
        reference, _ = capture.record(build(name), anatomy.find(build(name)), ids)
    assert torch.equal(logits, plain)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, reference[key], rtol=1e-4, atol=1e-5)


@every_moe
def test_routing_is_what_the_router_chose_at_every_position(build, tokens, name):
    model = build(name)
    parts = anatomy.find(model)
    ids = first_batch(tokens)
    chosen = {}
    handles = [
        layer.experts.router.register_forward_hook(lambda m, a, out, i=layer.index: chosen.update({i: out}))
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
    together, _, _ = capture.in_memory(model, parts, tokens, 64)
    rows = next(capture.batches(tokens["length"].to_numpy(), 64))
    of_prompt = dict(zip(together["prompt_id"].tolist(), range(len(tokens)), strict=True))
    for row, prompt in enumerate(tokens.iloc[rows].itertuples()):
        for layer in parts.layers:
            index = chosen[layer.index][2].reshape(*ids.shape, -1)[row, prompt.subject_start : prompt.subject_end]
            by_hand = [int((index == e).sum()) for e in range(layer.n_experts)]
            assert together[f"{layer.index}.subject_load"][of_prompt[prompt.prompt_id]].tolist() == by_hand
            assert sum(by_hand) > 0


@every_model
def test_a_batch_gives_what_single_prompts_give(build, tokens, name):
    model = build(name)
    parts = anatomy.find(model)
    together, table, _ = capture.in_memory(model, parts, tokens, 64)
    single, single_table, _ = capture.in_memory(model, parts, tokens, 1)
    assert table["prompt_id"].tolist() == single_table["prompt_id"].tolist()
    for key, tensor in together.items():
        torch.testing.assert_close(tensor, single[key], rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(table, single_table, rtol=1e-4)


@every_model
def test_clean_scores_come_from_an_unhooked_forward_pass(build, tokens, name):
    model = build(name)
    _, table, _ = capture.in_memory(model, anatomy.find(model), tokens, 64)
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
    parts = anatomy.find(model)
    tensors, _, _ = capture.in_memory(model, parts, tokens, 64)
    scaled = tensors["resid_final"] * tensors["norm_scale"][:, None] * model.model.norm.weight
    torch.testing.assert_close(model.model.norm(tensors["resid_final"]), scaled, rtol=1e-6, atol=1e-6)


def test_bf16_stays_bf16(build, tokens):
    model = copy.deepcopy(build("mixtral")).bfloat16()
    tensors, table, errors = capture.in_memory(model, anatomy.find(model), tokens, 64)
    assert tensors["1.expert_acts"].dtype == tensors["resid_final"].dtype == torch.bfloat16
    assert tensors["norm_scale"].dtype == torch.float32
    assert max(errors.values()) < 0.05
    assert table["log_prob"].dtype == "float32"


class Around(nn.Module):
    """A module whose output is changed before it is used."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **kwargs):
        return self.change(self.inner(*args, **kwargs))


def test_a_constant_factor_after_a_block_is_found_if_the_model_says_it(build, tokens):
    """Granite's residual multiplier, for one; a number that stands nowhere in the model is not believed."""
    model = copy.deepcopy(build("llama"))
    block = model.model.layers[1]
    block.mlp = Around(block.mlp, lambda x: 0.22 * x)
    assert "no sum of linear maps" in anatomy.find(model).layers[1].whole
    model.config.residual_multiplier = 0.22
    parts = anatomy.find(model)
    assert [layer.dense.path.factor for layer in parts.layers] == [1.0, 0.22, 1.0]
    _, _, errors = capture.in_memory(model, parts, tokens, 64)
    assert max(errors.values()) < 2e-6


def test_an_ffn_that_is_no_sum_is_one_component(build, tokens):
    model = copy.deepcopy(build("olmoe"))
    block = model.model.layers[1]
    block.mlp = Around(block.mlp, torch.tanh)
    parts = anatomy.find(model)
    assert [layer.n_experts for layer in parts.layers] == [8, 0, 8]
    assert anatomy.levels(parts)["reasons"] == [parts.layers[1].whole]
    tensors, _, errors = capture.in_memory(model, parts, tokens, 64)
    assert max(errors.values()) < 2e-6
    torch.testing.assert_close(
        tensors["1.whole.0.out"], tensors["2.resid_pre"] - tensors["1.resid_mid"], rtol=1e-4, atol=1e-6
    )


def test_a_model_whose_parts_do_not_add_up_any_more_is_refused(build, tokens):
    model = copy.deepcopy(build("llama"))
    parts = anatomy.find(model)
    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, lambda x: 2 * x)
    with pytest.raises(models.AnatomyError, match=r"layer 1: sum of experts \(or neurons\) = .* does not hold"):
        capture.in_memory(model, parts, tokens, 64)


def test_a_structure_that_is_not_understood_is_refused(build):
    model = copy.deepcopy(build("llama"))
    handle = model.model.layers[2].register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(models.AnatomyError, match="layer 2: its output is not the residual stream plus outputs"):
        anatomy.find(model)
    handle.remove()
    anatomy.find(model)
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.sin()))
    with pytest.raises(models.AnatomyError, match="its logits are not the unembedding of the normed final state"):
        anatomy.find(model)


def test_no_hook_is_left_behind(build, tokens):
    model = build("qwen2_moe")

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    capture.in_memory(model, anatomy.find(model), tokens, 64)
    assert hooks() == before


@pytest.mark.parametrize("lengths", [[3, 4, 3, 5, 4, 3], [2], [7] * 5])
def test_batches_hold_every_row_once_and_one_length_each(lengths):
    import numpy as np

    found = list(capture.batches(np.array(lengths), 2))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    assert all(len(set(np.array(lengths)[rows])) == 1 and len(rows) <= 2 for rows in found)

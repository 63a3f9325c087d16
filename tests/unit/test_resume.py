"""Runs resumed at the readout position, against full forward passes with the same interventions."""

import copy

import pytest
import torch

from moescope import anatomy, capture, resume
from moescope.intervene import block_experts, block_ffn, block_heads, intervene, record_routing

import families
from conftest import SHAPES

every_model = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture
def ids(tokens):
    rows = max(capture.batches(tokens["length"].to_numpy(), 64), key=len)
    return capture.token_tensor(tokens, rows, torch.device("cpu"))


def at_end(ids):
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, -1] = True
    return at


def readout(parts, states):
    return parts.unembedding(parts.final_norm.module(states))


@every_model
def test_every_head_blocked_at_the_readout_is_what_full_passes_give(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    clean = resume.clean_run(model, parts, ids)
    entries = [i for i in range(3) for _ in range(4)]
    marks = {}
    for i in range(3):
        marks[i] = torch.zeros(len(ids), 4 * i + 4, 4, dtype=torch.bool)
        marks[i][:, -4:] = torch.eye(4, dtype=torch.bool)
        marks[i] = marks[i].flatten(0, 1)
    with torch.no_grad():
        found = readout(parts, resume.at_readout(parts, clean, entries, block_heads(marks)))
        for variant, layer in enumerate(entries):
            one = {layer: torch.eye(4, dtype=torch.bool)[variant % 4 : variant % 4 + 1]}
            with intervene(parts, block_heads(one, at=at_end(ids))):
                expected = capture.readout_logits(model, ids)
            torch.testing.assert_close(found[:, variant], expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(found[:, 0], capture.readout_logits(model, ids))


def test_a_run_can_be_resumed_again_and_again(build, ids):
    model = build("qwen2_moe")
    parts = anatomy.find(model)
    clean = resume.clean_run(model, parts, ids)
    target = torch.arange(len(ids))
    with torch.no_grad():
        first = resume.at_readout(parts, clean, [0, 2], block_ffn())
        assert torch.equal(resume.at_readout(parts, clean, [0, 2], block_ffn()), first)
        alone = resume.at_readout(parts, clean, [2], block_ffn())
        torch.testing.assert_close(alone[:, 0], first[:, 1])
        torch.testing.assert_close(
            resume.at_readout(parts, clean, [0, 1, 1]), clean.final.unsqueeze(1).expand(-1, 3, -1)
        )
    with pytest.raises(KeyError), intervene(parts):
        resume.at_readout(parts, clean, [0], lambda parts: {}["broken"])
    log_p, rank = resume.log_probs_and_ranks(parts, clean.final, target)
    logits = capture.readout_logits(model, ids).detach()
    torch.testing.assert_close(log_p, logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1))
    by_hand = [(row >= row[w]).sum().item() for row, w in zip(logits, target)]
    assert rank.tolist() == by_hand
    with pytest.raises(ValueError, match=r"entries \[1, 0\]: the layers that variants start at must not fall"):
        resume.at_readout(parts, clean, [1, 0])


def test_gradients_flow_through_what_is_put_in(build, ids):
    """The derivative of a resumed run by a head's output is that of a full pass, by finite differences."""
    model = copy.deepcopy(build("llama"))
    parts = anatomy.find(model)
    # Its norms stay in float32.
    clean = resume.clean_run(model.double(), parts, ids, check=False)
    value = torch.randn(len(ids), 4, 8, dtype=torch.float64, requires_grad=True)
    marks = {1: torch.ones(len(ids), 4, dtype=torch.bool)}

    def through(value):
        return resume.at_readout(parts, clean, [0], block_heads(marks, {1: value})).square().sum()

    [gradient] = torch.autograd.grad(through(value), value)
    step = torch.zeros_like(value)
    step[0, 2, 3] = 1e-2
    with torch.no_grad():
        slope = (through(value + step) - through(value - step)) / 2e-2
    assert abs(float(slope - gradient[0, 2, 3])) < 1e-2 * abs(float(slope))


@pytest.mark.parametrize("model_type", ["mimo_v2_flash", "gpt_oss", "deepseek_v3", "gemma4_text", "cohere2_moe"])
def test_resumed_families_give_what_full_passes_give(model_type):
    """Sliding windows shorter than the prompt, sinks, latent attention, post-norms, parallel blocks."""
    model, ids = families.build(model_type), families.IDS
    parts = anatomy.find(model)
    layer = next(layer for layer in parts.layers if layer.experts is not None)
    clean = resume.clean_run(model, parts, ids)
    with torch.no_grad(), record_routing(parts) as routing:
        capture.readout_logits(model, ids)
    chosen = routing[layer.index][0].view(*ids.shape, -1)[:, -1, :1].long()
    marks = {layer.index: torch.zeros(len(ids), layer.n_experts, dtype=torch.bool).scatter_(1, chosen, True)}
    with torch.no_grad():
        states = resume.at_readout(parts, clean, [layer.index], block_experts(marks))[:, 0]
        log_p, _ = resume.log_probs_and_ranks(parts, states, ids[:, 0])
        with intervene(parts, block_experts(marks, at=at_end(ids))):
            logits = capture.readout_logits(model, ids).float()
        clean_p, _ = resume.log_probs_and_ranks(parts, clean.final, ids[:, 0])
    expected = logits.log_softmax(-1).gather(1, ids[:, :1]).squeeze(1)
    torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-5)
    assert (log_p - clean_p).abs().max() > 1e-5


@pytest.mark.parametrize("model_type", ["qwen3_next", "gpt2", "mamba"])
def test_what_cannot_be_resumed_is_refused_in_a_sentence_and_left_as_it_was(model_type):
    model = families.build(model_type)
    parts = anatomy.find(model)
    with pytest.raises(resume.ResumeError, match=r"^(it|its) \w+"):
        resume.clean_run(model, parts, families.IDS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_seen_beside_a_residual_dimension_of_huge_entries(monkeypatch, dtype):
    """Trained models have entries that are a hundred times larger than the others, with small gains in the norms."""
    model = families.build("olmoe").to(dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 100 * model.model.embed_tokens.weight.std()
        for norm in [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]:
            norm.weight[3] = 0
    parts = anatomy.find(model)
    resume.clean_run(model, parts, families.IDS)
    seen = resume._mask
    monkeypatch.setattr(resume, "_mask", lambda *args: torch.zeros_like(seen(*args)))
    with pytest.raises(resume.ResumeError, match="resumed with nothing changed, its final state changes by"):
        resume.clean_run(model, parts, families.IDS)


def test_attention_that_counts_its_keys_is_refused_for_many_variants():
    """GPT-Neo's local attention makes its window from the number of keys."""
    model = families.build("gpt_neo")
    parts = anatomy.find(model)
    with pytest.raises(resume.ResumeError):
        resume.clean_run(model, parts, families.IDS, variants=200)

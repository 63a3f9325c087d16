"""Key neurons: a model worked out on paper, brute force, and the arithmetic of thresholds, unions and pieces."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap
from torch.nn.functional import silu
from transformers import MixtralConfig, MixtralForCausalLM

from moescope import anatomy, capture, utilization
from moescope.models import AnatomyError
from moescope.neurons import ffn_neurons
from moescope.samples import responses

import families


def sets_of(key_neurons):
    return {row.prompt_id: set(BitMap.deserialize(row.keys)) for row in key_neurons.itertuples()}


def mui(key_neurons, numbering):
    return len(set.union(*sets_of(key_neurons).values())) / numbering["width"].sum()


def samples(*rows):
    """A table of samples from (prompt tokens, response tokens)."""
    table = pd.DataFrame({"prompt_id": np.arange(len(rows), dtype="int32"), "token_ids": [list(p) for p, _ in rows]})
    return table.assign(target_ids=[list(r) for _, r in rows], target_id=[r[0] for _, r in rows])


@pytest.fixture(scope="module")
def on_paper():
    """One layer, two experts of two neurons, both used by every token; ReLU, no attention, no epsilon.

    Token i is embedded as 2 e_i, whose root mean square over 4 dimensions is 1: the FFN reads x = 2 e_i. Gate columns
    read relu(0.5 sum(x)) = 1, so that the activation of neuron k at token i is what `activations` says. Neurons 0 and
    1 of expert 0 and of expert 1 write e_0, e_1, e_2 and e_3. Router logits are (ln 3, 0) at token 0, (0, 0) at token
    1, (0, ln 3) at token 2: gate weights (3/4, 1/4), (1/2, 1/2), (1/4, 3/4).
    """
    sizes = {"hidden_size": 4, "intermediate_size": 2, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 64}
    torch.manual_seed(1)
    config = MixtralConfig(**sizes, **heads, hidden_act="relu", rms_norm_eps=0.0, initializer_range=1.0)
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    # The grouped backend wants rows of 16 bytes.
    model.set_experts_implementation("eager")
    model.model.norm.weight[:] = gain = torch.tensor([3.0, 1, 1, 1])
    # Parts are found by what they do, so before attention does nothing.
    parts = anatomy.find(model)
    assert torch.equal(parts.final_norm.gain, gain)
    activations = torch.tensor([[4.0, 4, 2, 2], [2, -6, 2, 2], [8, 8, 8, -4], [0, 0, 0, 0]])
    block, eye = model.model.layers[0], torch.eye(4)
    model.model.embed_tokens.weight[:4] = 2 * eye
    block.self_attn.o_proj.weight[:] = 0
    block.mlp.gate.weight[:] = torch.tensor([[math.log(3), 0, 0, 0], [0, 0, math.log(3), 0]]) / 2
    experts = block.mlp.experts
    for expert, neurons in enumerate(([0, 1], [2, 3])):
        experts.gate_up_proj[expert] = torch.cat([torch.full((2, 4), 0.5), activations.T[neurons] / 2])
        experts.down_proj[expert] = eye[:, neurons]
    model.lm_head.weight[2:4] = torch.tensor([[1.0, 2, 3, 4], [4, -3, 2, 1]])
    return model, parts


@pytest.mark.parametrize(
    ("options", "first", "second", "of_all"),
    [
        # gate * activation * W_U[y][k], neurons 0 to 3:
        #   sample 0: y = 2 read at token 0:  3/4 4 1 = 3    3/4 4 2 = 6      1/4 2 3 = 1.5  1/4 2 4 = 2
        #             y = 3 read at token 2:  1/4 8 4 = 8    1/4 8 -3 = -6    3/4 8 2 = 12   3/4 -4 1 = -3
        #   sample 1: y = 3 read at token 1:  1/2 2 4 = 4    1/2 -6 -3 = 9    1/2 2 2 = 2    1/2 2 1 = 1
        # A share of 1/4 of 4 neurons is one a token: {1} and {2}; {1}. 2 of 4 neurons are key.
        ({"share": 0.25}, {1, 2}, {1}, 2 / 4),
        # Two a token: {1, 0} and {2, 0}; {1, 0}.
        ({"share": 0.5}, {0, 1, 2}, {0, 1}, 3 / 4),
        # All with a positive score: neurons 1 and 3 have none for y = 3, but all four have one for y = 2.
        ({"share": 1.0}, {0, 1, 2, 3}, {0, 1, 2, 3}, 4 / 4),
        # A share below one neuron is one neuron; with one layer, by layer is by model.
        ({"share": 0.001}, {1, 2}, {1}, 2 / 4),
        ({"share": 0.25, "threshold": "layer"}, {1, 2}, {1}, 2 / 4),
        # Half of the positive sums 12.5, 20 and 16: 6 + 3, 12 and 9 reach 6.25, 10 and 8.
        ({"share": 0.5, "threshold": "score"}, {0, 1, 2}, {1}, 3 / 4),
        # The final norm's gain 3 on e_0: 9 beats 6, 24 beats 12, 12 beats 9; its scale changes no order.
        ({"share": 0.25, "score": "normed"}, {0}, {0}, 1 / 4),
        # |gate * activation| * 1: (3, 3, 0.5, 0.5) is a tie, of which the lower id is key; (2, 2, 6, 3); (1, 3, 1, 1).
        ({"share": 0.25, "score": "activation"}, {0, 2}, {1}, 3 / 4),
    ],
)
def test_mui_of_two_experts_is_what_paper_says(on_paper, options, first, second, of_all):
    key_neurons, expert_tokens = utilization.find(*on_paper, samples(([0], [2, 3]), ([1], [3])), 2, **options)
    assert sets_of(key_neurons) == {0: first, 1: second}
    assert key_neurons["tokens"].tolist() == [2, 1]
    numbering = utilization.units(on_paper[1])
    assert numbering.to_dict("list") == {"layer": [0, 0], "expert": [0, 1], "first": [0, 2], "width": [2, 2]}
    assert mui(key_neurons, numbering) == of_all
    assert expert_tokens[["prompt_id", "layer", "expert", "tokens"]].to_numpy().tolist() == [
        [0, 0, 0, 2],
        [0, 0, 1, 2],
        [1, 0, 0, 1],
        [1, 0, 1, 1],
    ]
    assert expert_tokens.dtypes.astype(str).to_dict() == {
        "prompt_id": "int32",
        "layer": "int16",
        "expert": "int16",
        "tokens": "int16",
    }


def test_scores_on_paper_are_exact_effects(on_paper):
    model, parts = on_paper
    blocks, scale = utilization._neurons(model, parts, [utilization.Piece(0, [0], [2])])
    [plain] = utilization.scores(parts, blocks, torch.tensor([2]), scale)
    torch.testing.assert_close(plain, torch.tensor([[3.0, 6, 1.5, 2]]))
    # The final state is 2 e_0 and what the neurons add: (3 + 2, 3, 0.5, 0.5).
    [normed] = utilization.scores(parts, blocks, torch.tensor([2]), scale, "normed")
    rms = math.sqrt((25 + 9 + 0.25 + 0.25) / 4)
    torch.testing.assert_close(normed, torch.tensor([[9.0, 6, 1.5, 2]]) / rms)
    logit = model(torch.tensor([[0]])).logits[0, 0, 2]
    embedded = 2 * 3 / rms  # dimension 0 of the embedding, gain 3, W_U[2][0] = 1
    torch.testing.assert_close(normed.sum() + embedded, logit)


def by_hand(model, tokens):
    """{(layer, expert, neuron): contribution} at the last position: no hooks, no batch, no padding."""
    ids, found = torch.tensor([tokens]), {}
    body, act = model.model, silu
    x = body.embed_tokens(ids)
    around = body.rotary_emb(x, torch.arange(len(tokens))[None])
    for index, layer in enumerate(body.layers):
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=around, attention_mask=None)[0]
        read, mlp = layer.post_attention_layernorm(x), layer.mlp
        here = read[0, -1]
        parts = {}
        if hasattr(mlp, "experts"):
            probabilities = (mlp.gate.weight @ here).softmax(0)
            weights, chosen = probabilities.topk(model.config.num_experts_per_tok)
            if getattr(model.config, "norm_topk_prob", True):
                weights = weights / weights.sum()
            for weight, expert in zip(weights, chosen.tolist()):
                gate, up = (mlp.experts.gate_up_proj[expert] @ here).chunk(2)
                parts[expert] = weight * act(gate) * up * mlp.experts.down_proj[expert]
            if hasattr(mlp, "shared_expert"):
                shared = mlp.shared_expert
                acts = act(shared.gate_proj.weight @ here) * (shared.up_proj.weight @ here)
                parts[-1] = torch.sigmoid(mlp.shared_expert_gate.weight @ here) * acts * shared.down_proj.weight
        else:
            parts[0] = act(mlp.gate_proj.weight @ here) * (mlp.up_proj.weight @ here) * mlp.down_proj.weight
        for expert, columns in parts.items():
            found |= {(index, expert, neuron): column for neuron, column in enumerate(columns.T)}
        out = mlp(read)
        torch.testing.assert_close(sum(p.sum(1) for p in parts.values()), out[0, -1], rtol=1e-4, atol=1e-6)
        x = x + out
    torch.testing.assert_close(model.lm_head(body.norm(x))[0, -1], model(ids).logits[0, -1], rtol=1e-4, atol=1e-4)
    return found, x[0, -1]


def random_samples(n, vocabulary, seed=0):
    draw = np.random.default_rng(seed)
    return samples(
        *[[draw.integers(1, vocabulary, draw.integers(1, most)).tolist() for most in (9, 6)] for _ in range(n)]
    )


@pytest.mark.parametrize("architecture", ["qwen2_moe", "mixtral", "olmoe", "qwen2"])
@pytest.mark.parametrize("score", utilization.SCORES)
@torch.no_grad()
def test_key_neurons_are_those_of_brute_force_over_tokens(build, tokenizer, architecture, score):
    model = build(architecture)
    parts, prompts = anatomy.find(model), random_samples(6, len(tokenizer))
    numbering = utilization.units(parts)
    total, first = int(numbering["width"].sum()), numbering.set_index(["layer", "expert"])["first"].to_dict()
    of_layer = numbering.groupby("layer")["width"].sum().to_dict()
    expected = {threshold: {i: set() for i in prompts["prompt_id"]} for threshold in utilization.THRESHOLDS}
    uses = {}
    for row in prompts.itertuples():
        for t, y in enumerate(row.target_ids):
            found, final = by_hand(model, row.token_ids + row.target_ids[:t])
            direction = model.lm_head.weight[y]
            if score == "normed":
                norm = model.model.norm
                direction = direction * norm.weight * torch.rsqrt(final.pow(2).mean() + norm.variance_epsilon)
            value = {
                (layer, first[layer, expert] + neuron): float(v.norm() if score == "activation" else v @ direction)
                for (layer, expert, neuron), v in found.items()
            }
            order = sorted((name for name in value if value[name] > 0), key=lambda name: (-value[name], name[1]))
            expected["model"][row.prompt_id] |= {i for _, i in order[: max(1, round(0.02 * total))]}
            for layer, size in of_layer.items():
                own = [i for at, i in order if at == layer]
                expected["layer"][row.prompt_id] |= set(own[: max(1, round(0.02 * size))])
            goal, reached = 0.02 * sum(value[name] for name in order), 0.0
            for name in order:
                if reached >= goal:
                    break
                expected["score"][row.prompt_id].add(name[1])
                reached += value[name]
            for layer, expert in {name[:2] for name in found}:
                key = (row.prompt_id, layer, expert)
                uses[key] = uses.get(key, 0) + 1
    for threshold, wanted in expected.items():
        key_neurons, expert_tokens = utilization.find(model, parts, prompts, 4, score, threshold, 0.02)
        assert sets_of(key_neurons) == wanted
        assert expert_tokens.set_index(["prompt_id", "layer", "expert"])["tokens"].to_dict() == uses


@pytest.mark.parametrize(
    "name", ["gpt2", "gemma2", "deepseek_v3", "gpt_oss", "granitemoe", "olmo2", "flex_olmo", "cohere", "glm4"]
)
@torch.no_grad()
def test_other_families_score_what_their_neurons_add(name):
    """Conv1D, post-norms, shared experts without a gate, expert biases, centred norms and logit scales."""
    model = families.build(name)
    parts, prompts = anatomy.find(model), random_samples(4, 28)
    first = utilization.units(parts).set_index(["layer", "expert"])["first"]
    total = int(utilization.units(parts)["width"].sum())
    final = parts.final_norm
    rows = parts.unembedding.weight * final.gain * parts.logit_scale
    rows = rows - rows.mean(1, keepdim=True) if final.centred else rows
    expected = {i: set() for i in prompts["prompt_id"]}
    for row in prompts.itertuples():
        for t, y in enumerate(row.target_ids):
            found, _ = capture.record(model, parts, torch.tensor([row.token_ids + row.target_ids[:t]]))
            value = torch.zeros(total)
            for layer in parts.layers:
                block = ffn_neurons(layer, capture.of_layer(found, layer))
                if block is not None:
                    place = torch.arange(block.activations.shape[1])
                    unit, neuron = block.names(torch.zeros_like(place), place)
                    vectors = block.contributions(torch.zeros_like(place), place)
                    ids = torch.tensor([first[layer.index, u] for u in unit.tolist()]) + neuron
                    value[ids] = vectors @ rows[y] * found["norm_scale"]
            best = value.topk(max(1, round(0.1 * total)))
            expected[row.prompt_id] |= set(best.indices[best.values > 0].tolist())
    assert sets_of(utilization.find(model, parts, prompts, 3, "normed", share=0.1)[0]) == expected


@pytest.mark.parametrize("architecture", ["qwen2_moe", "llama"])
def test_batches_their_order_padding_and_pieces_change_nothing(build, tokenizer, architecture):
    model = build(architecture)

    def hooks():
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    parts, prompts, before = anatomy.find(model), random_samples(8, len(tokenizer), seed=1), hooks()
    tables = utilization.find(model, parts, prompts, 12, share=0.05)
    assert tables[0]["prompt_id"].tolist() == prompts["prompt_id"].tolist()
    # One token in use holds at least one neuron: every response runs in pieces of one token.
    for batch_size, order, held in [(1, -1, 10**9), (3, 1, 10**9), (12, -1, 10**9), (12, 1, 1), (3, 1, 200)]:
        again = utilization.find(model, parts, prompts[::order], batch_size, share=0.05, held=held)
        for table, expected in zip(again, tables, strict=True):
            pd.testing.assert_frame_equal(table, expected)
    assert hooks() == before


def test_pieces_cover_every_response_token_once_and_bound_what_is_held():
    rows = [(i, [1] * (i % 3 + 1), list(range(i + 1))) for i in range(9)]
    pieces = utilization._pieces(rows, 4)
    for prompt_id, prompt, response in rows:
        mine = [piece for piece in pieces if piece.sample == prompt_id][::-1]
        assert [token for piece in mine for token in piece.targets] == response
        for piece in mine:
            text = prompt + response
            end = len(piece.token_ids)
            assert piece.token_ids == text[:end]
            assert piece.targets == text[end - len(piece.targets) + 1 : end + 1]
    batches = list(utilization._batches(pieces, 3, 6))
    assert [piece for batch in batches for piece in batch] == pieces
    assert all(batch and len(batch) <= 3 and sum(len(p.targets) for p in batch) <= 6 for batch in batches)


scored = st.integers(1, 4).flatmap(
    lambda n: st.lists(
        st.integers(1, 5).flatmap(
            lambda m: st.lists(st.lists(st.integers(-3, 3), min_size=m, max_size=m), min_size=n, max_size=n)
        ),
        min_size=1,
        max_size=3,
    )
)


@settings(max_examples=60, deadline=None)
@given(scored, st.integers(0, 6), st.floats(0.001, 1))
def test_thresholds_are_those_of_a_sorted_list(layers, unused, share):
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    neurons = [own.shape[1] + unused for own in scores]
    for threshold in utilization.THRESHOLDS:
        masks = utilization.key_mask(scores, neurons, threshold, share)
        for row in range(len(scores[0])):
            named = [(-float(x), i, j) for i, own in enumerate(scores) for j, x in enumerate(own[row]) if x > 0]
            if threshold == "layer":
                wanted = set()
                for i, size in enumerate(neurons):
                    wanted |= set(sorted(x for x in named if x[1] == i)[: max(1, round(share * size))])
            elif threshold == "model":
                wanted = set(sorted(named)[: max(1, round(share * sum(neurons)))])
            else:
                count, total = 0, sum(-x[0] for x in named)
                while named and sum(-x[0] for x in sorted(named)[:count]) < share * total:
                    count += 1
                wanted = set(sorted(named)[:count])
            found = {(i, j) for i, mask in enumerate(masks) for j in mask[row].nonzero()[:, 0].tolist()}
            assert found == {x[1:] for x in wanted}, threshold


tokens_of = partial(st.lists, st.integers(0, 3), min_size=1)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(tokens_of(max_size=3), tokens_of(max_size=4)), min_size=1, max_size=5), st.floats(0.01, 1))
def test_key_sets_are_unions_over_tokens_and_grow_with_share(on_paper, rows, share):
    prompts = samples(*rows)
    found = sets_of(utilization.find(*on_paper, prompts, 3, share=share)[0])
    more = sets_of(utilization.find(*on_paper, prompts, 3, share=min(1, 2 * share))[0])
    for i, (prompt, response) in enumerate(rows):
        # Without attention, a token's neurons depend on the token before it alone.
        tokens = samples(*[([before], [y]) for before, y in zip([prompt[-1], *response], response)])
        alone = sets_of(utilization.find(*on_paper, tokens, 4, share=share)[0])
        assert found[i] == set().union(*alone.values())
        assert len(found[i]) <= len(response) * max(1, round(share * 4))
        assert found[i] <= more[i] <= {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_numbers_of_neurons_cover_every_unit_without_gaps(name):
    parts = anatomy.find(families.build(name))
    table = utilization.units(parts)
    ids = np.concatenate([row.first + np.arange(row.width) for row in table.itertuples()])
    assert ids.tolist() == list(range(len(ids)))
    for layer in parts.layers:
        routed = list(range(layer.n_experts))
        shared = [-1 - i for i in range(len(layer.shared))]
        own = table[table["layer"] == layer.index]["expert"].tolist()
        assert own == (routed + shared or [0])


def test_responses_are_the_accepted_answer_that_begins_with_the_target():
    facts = pd.DataFrame(
        {
            "target_id": [5, 7, 9],
            "target_ids": [[5], [7, 8], [9]],
            "answer_ids": [[[4, 1], [5, 2, 3], [5, 6]], [[7, 8]], np.array([], dtype=object)],
        }
    )
    assert responses(facts) == [[5, 2, 3], [7, 8], [9]]
    assert responses(facts.drop(columns="answer_ids")) == [[5], [7, 8], [9]]


def test_what_cannot_be_measured_is_said(on_paper):
    model, parts = on_paper
    with pytest.raises(ValueError, match="score='lpi': not a way to find key neurons; use one of unembedding, normed"):
        utilization.find(model, parts, samples(([0], [2])), 2, score="lpi")
    with pytest.raises(ValueError, match="threshold='top': not a way to find key neurons"):
        utilization.find(model, parts, samples(([0], [2])), 2, threshold="top")
    with pytest.raises(ValueError, match="sample 0 has no prompt token"):
        utilization.find(model, parts, samples(([], [2])), 2)
    empty = samples(([0], [2])).assign(target_ids=[[]])
    with pytest.raises(ValueError, match="sample 0 has no response token"):
        utilization.find(model, parts, empty, 2)
    whole = replace(parts, layers=(replace(parts.layers[0], experts=None, whole="its FFN is a lookup"),))
    with pytest.raises(AnatomyError, match="no FFN can be taken apart into neurons: its FFN is a lookup"):
        utilization.units(whole)

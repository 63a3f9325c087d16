"""How clear the choice of experts was: against sorting by hand, routers by their definition, and choices that turn."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from moescope import anatomy, attribution, capture, miniature, tables

import families
from conftest import write_tensors

SOFTMAX = ("olmoe", "qwen2_moe", "mixtral")
every_softmax_router = pytest.mark.parametrize("name", SOFTMAX)
BF16 = 2**-8


def margin_by_hand(scores, k):
    """From a sorted list: how far the last chosen score lies above the first rejected one, in units of the larger."""
    ordered = sorted(map(float, scores), reverse=True)
    last, first = ordered[k - 1], ordered[k] if k < len(ordered) else -np.inf
    if first == -np.inf:
        return np.inf
    return 0.0 if last == first else (last - first) / max(abs(last), abs(first))


# The number itself.

finite = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
rejected = st.just(-np.inf)


@given(st.lists(finite, min_size=1, max_size=12), st.integers(1, 12))
def test_a_margin_is_that_of_the_sorted_scores(scores, k):
    k = min(k, len(scores))
    found = float(capture.margins(torch.tensor(scores), k))
    assert found == pytest.approx(margin_by_hand(scores, k), rel=1e-5, abs=1e-7)
    assert found >= 0
    assert found <= 2 or found == np.inf


@given(st.lists(finite, min_size=2, max_size=9), st.data())
def test_a_tie_has_no_margin_and_no_order_matters(scores, data):
    k = data.draw(st.integers(1, len(scores) - 1))
    ordered = sorted(scores, reverse=True)
    ordered[k] = ordered[k - 1]
    shuffled = data.draw(st.permutations(ordered))
    assert float(capture.margins(torch.tensor(shuffled), k)) == 0
    shuffled = data.draw(st.permutations(scores))
    assert torch.equal(capture.margins(torch.tensor(shuffled), k), capture.margins(torch.tensor(scores), k))


@given(st.lists(st.one_of(finite, rejected), min_size=2, max_size=9), st.data())
def test_an_expert_that_cannot_be_chosen_leaves_a_margin_without_end(scores, data):
    possible = sum(score > -np.inf for score in scores)
    k = data.draw(st.integers(1, len(scores)))
    found = float(capture.margins(torch.tensor(scores), k))
    assert (found == np.inf) == (k >= possible)
    if k <= possible:
        assert found == pytest.approx(margin_by_hand(scores, k), rel=1e-5, abs=1e-7)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 8), st.integers(0, 99))
def test_every_token_has_a_margin_of_its_own(batch, positions, experts, seed):
    scores = torch.randn(batch, positions, experts, generator=torch.Generator().manual_seed(seed))
    k = 1 + seed % (experts - 1)
    found = capture.margins(scores, k)
    assert found.shape == (batch, positions)
    by_hand = [[margin_by_hand(token, k) for token in row] for row in scores]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)


@given(st.lists(finite, min_size=2, max_size=9, unique=True), st.data())
def test_changes_of_less_than_half_the_margin_never_turn_a_choice(scores, data):
    """Every score may move by a share of itself below half the margin: what rounding does to scores of a dtype."""
    k = data.draw(st.integers(1, len(scores) - 1))
    margin = margin_by_hand(scores, k)
    shares = data.draw(st.lists(st.floats(-1, 1), min_size=len(scores), max_size=len(scores)))
    moved = [score + 0.499 * min(margin, 1) * share * abs(score) for score, share in zip(scores, shares)]

    def chosen(values):
        return set(sorted(range(len(values)), key=lambda i: -values[i])[:k])

    assert chosen(moved) == chosen(scores)
    # And half of it is all that may be: the last chosen and the first rejected score meet there.
    last, first = sorted(scores, reverse=True)[k - 1 : k + 1]
    size = max(abs(last), abs(first))
    assert last - 0.5001 * margin * size < first + 0.5001 * margin * size


# What a capture says of a router.


def routed(model):
    """Through hooks of its own: each router's input and output, by layer, for one forward pass."""
    seen = {}
    for i, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0], out)}))
    return seen


def recorded(model, ids):
    with torch.no_grad():
        return capture.record(model, anatomy.find(model), ids)[0]


def first_batch(tokens):
    rows = next(capture.batches(tokens["length"].to_numpy(), 16))
    return capture.token_tensor(tokens, rows, torch.device("cpu"))


@every_softmax_router
def test_margins_of_softmax_routers_are_those_of_their_own_scores(build, tokens, name):
    model = copy.deepcopy(build(name))
    ids, seen = first_batch(tokens), routed(model)
    found = recorded(model, ids)
    k = model.config.num_experts_per_tok
    for i in range(model.config.num_hidden_layers):
        scores = seen[i][1][0].double().softmax(-1).unflatten(0, ids.shape)
        by_hand = np.array([[margin_by_hand(token, k) for token in row] for row in scores])
        margins = found[f"{i}.router_margin"]
        assert margins.dtype == torch.float32
        np.testing.assert_allclose(margins[:, 0], by_hand[:, -1], atol=1e-5)
        np.testing.assert_allclose(margins[:, 1], by_hand.min(1), atol=1e-5)
        assert by_hand.min() > 0


@pytest.fixture
def grouped():
    """DeepSeek-V3: sigmoid scores with a correction for the choice alone, and one of two groups of four allowed."""
    config = miniature.shrink(AutoConfig.for_model("deepseek_v3"))
    config.n_group, config.topk_group, config.num_experts_per_tok = 2, 1, 3
    torch.manual_seed(0)
    model = miniature.auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
        for block in model.model.layers[1:]:
            block.mlp.gate.weight.normal_(0, 0.2)
            block.mlp.gate.e_score_correction_bias.uniform_(-0.3, 0.3)
    return model


def test_margins_of_a_router_with_a_bias_and_groups_are_those_of_what_it_chose_from(grouped):
    seen = routed(grouped)
    found = recorded(grouped, families.IDS)
    assert "0.router_margin" not in found  # a dense layer
    differs = 0
    for i in (1, 2, 3):
        logits, _, chosen = seen[i][1]
        bias = grouped.model.layers[i].mlp.gate.e_score_correction_bias
        by_hand = []
        for token, ids in zip(logits.double(), chosen):
            scores = [1 / (1 + float(torch.exp(-x))) + float(b) for x, b in zip(token, bias)]
            groups = [scores[:4], scores[4:]]
            best = max((0, 1), key=lambda group: sum(sorted(groups[group])[-2:]))
            allowed = sorted(groups[best], reverse=True)
            assert {int(e) // 4 for e in ids} == {best}
            assert sorted((scores[e] for e in ids), reverse=True) == pytest.approx(allowed[:3])
            by_hand.append(margin_by_hand(allowed, 3))
            differs += not np.isclose(by_hand[-1], margin_by_hand(token.sigmoid(), 3), rtol=0.01)
        by_hand = np.array(by_hand).reshape(families.IDS.shape)
        np.testing.assert_allclose(found[f"{i}.router_margin"][:, 0], by_hand[:, -1], atol=1e-5)
        np.testing.assert_allclose(found[f"{i}.router_margin"][:, 1], by_hand.min(1), atol=1e-5)
    # Scores without bias and groups would have said something else.
    assert differs > 60


@pytest.fixture
def phimoe():
    """A router that takes one maximum after the other, and calls no top-k."""
    return families.build("phimoe")


def test_where_no_top_k_is_seen_there_is_no_margin_rather_than_a_wrong_one(phimoe, tokens, tmp_path):
    parts = anatomy.find(phimoe)
    assert all(layer.n_experts for layer in parts.layers)
    prompts = tokens.assign(
        token_ids=[[t % 128 for t in ids] for ids in tokens["token_ids"]],
        accepted_ids=[[t % 128 for t in ids] for ids in tokens["accepted_ids"]],
    )
    tensors, table, _ = capture.in_memory(phimoe, parts, prompts, 64)
    assert not [name for name in tensors if name.endswith("router_margin")]
    write_tensors(tensors, tmp_path / "0.safetensors")
    _, _, experts, margins = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
    assert len(experts)
    assert margins.empty
    assert list(margins) == ["prompt_id", "layer", "margin", "smallest"]
    runs = {("facts", "phimoe"): {"prompts": table, "margins": margins}}
    assert tables.near_ties(runs, None).empty


def test_a_top_k_over_something_else_is_not_taken_for_the_routers(build, tokens):
    """Whatever else calls top-k in a layer, as sparse attention does, chose no experts."""
    model = copy.deepcopy(build("olmoe"))
    expected = recorded(model, first_batch(tokens))

    def decoy(module, args, output):
        torch.topk(torch.randn(args[0].shape[0] * args[0].shape[1], 40), 3)
        args[0].flatten(0, 1).topk(3)

    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_hook(decoy)
        block.mlp.gate.register_forward_hook(lambda m, args, out: (out[0].topk(3, largest=False), None)[1])
    found = recorded(model, first_batch(tokens))
    for i in range(3):
        assert torch.equal(found[f"{i}.router_margin"], expected[f"{i}.router_margin"])


# What a margin means.


def test_the_table_counts_the_prompts_below_each_precision():
    smallest, at_readout = [1e-9, 0.003, 0.0005, 0.2], [1e-3, 0.003, 0.3, np.inf]
    margins = pd.DataFrame({"prompt_id": [1, 2, 3, 4] * 2, "layer": [0] * 4 + [5] * 4})
    margins = margins.assign(margin=[*at_readout, 1, 1, 1, 1], smallest=[*smallest, 1, 1, 1, 0])
    prompts = pd.DataFrame({"prompt_id": [1, 2, 3, 4, 9], "subject": ["a", "a", "b", "c", "d"]})
    table = tables.near_ties({("facts", "m"): {"prompts": prompts, "margins": margins}}, None)
    assert table["layer"].tolist() == [0, 5]
    assert table[["prompts", "subjects"]].to_numpy().tolist() == [[4, 3]] * 2
    assert table["median_margin"].tolist() == [pytest.approx((0.003 + 0.3) / 2), 1]
    limits = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}
    for dtype, limit in limits.items():
        assert table[dtype].tolist() == [sum(m < limit for m in at_readout), 0]
        assert table[f"{dtype}_anywhere"].tolist() == [sum(m < limit for m in smallest), 1]
    assert table["bfloat16_anywhere"].tolist() == [3, 1]


@every_softmax_router
def test_a_router_input_moved_by_less_than_the_margin_chooses_the_same_and_by_more_does_not(build, tokens, name):
    """Two softmax scores with margin m have logits -log(1 - m) apart; that far the input may move towards a tie."""
    model = copy.deepcopy(build(name))
    parts, ids = anatomy.find(model), first_batch(tokens)
    k = model.config.num_experts_per_tok
    seen = routed(model)
    found = recorded(model, ids)
    for i in range(model.config.num_hidden_layers):
        logits = seen[i][1][0].unflatten(0, ids.shape)[:, -1]
        margin = found[f"{i}.router_margin"][:, :1].double()
        order = logits.argsort(-1, descending=True)
        weight = model.model.layers[i].mlp.gate.weight.double()
        towards = weight[order[:, k]] - weight[order[:, k - 1]]
        step = -torch.log1p(-margin) * towards / towards.pow(2).sum(-1, keepdim=True)
        last, first = order[:, k - 1], order[:, k]
        for share, turns in ((0.99, False), (1.01, True)):

            def move(module, args, share=share, step=step):
                x = args[0].clone().view(*ids.shape, -1)
                x[:, -1] += (share * step).to(x.dtype)
                return (x.view(args[0].shape),)

            handle = model.model.layers[i].mlp.gate.register_forward_pre_hook(move)
            with torch.no_grad():
                chosen = capture.record(model, parts, ids)[0][f"{i}.expert_ids"].long()
            handle.remove()
            has_last, has_first = ((chosen == e.unsqueeze(-1)).any(-1) for e in (last, first))
            # A third expert may have come up on the way; between these two it is clear.
            assert not (has_first & ~has_last).any() if not turns else not (has_last & ~has_first).any()
            same = (chosen.sort(-1).values == found[f"{i}.expert_ids"].long().sort(-1).values).all(-1)
            assert same.float().mean() > 0.5 if not turns else not same.any()


@pytest.fixture
def nearly_tied(build):
    """An OLMoE whose first router sees ones in three dimensions and has its third and fourth expert nearly tied.

    Their weights are (1 + 2^-8 - 2^-12) twice, and (1 + 2^-8 + 2^-12, 1 + 2^-8 - 2^-12 - 2^-10), less 3/2 each: the
    one sum is larger by 2^-11 than the other, but smaller by 2^-7 when the weights are rounded to bfloat16.
    """
    model = copy.deepcopy(build("olmoe"))
    up, down = 1 + 2**-8 + 2**-12, 1 + 2**-8 - 2**-12
    with torch.no_grad():
        # Entries of +1 and -1, so that the norm changes nothing.
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)).sign())
        embedding[:, :3] = 1
        block = model.model.layers[0]
        block.self_attn.o_proj.weight.zero_()
        block.post_attention_layernorm.weight.fill_(1)
        weight = block.mlp.gate.weight.zero_()
        weight[0, 0] = weight[1, 0] = 2.0
        weight[2, :3] = torch.tensor([down, down, -1.5])
        weight[3, :3] = torch.tensor([up, down - 2**-10, -1.5])
        weight[4:, 0] = -2.0
    return model


def test_a_near_tie_is_flagged_and_turns_in_bfloat16(nearly_tied, tokens):
    whole = recorded(nearly_tied, first_batch(tokens))
    half = recorded(copy.deepcopy(nearly_tied).bfloat16(), first_batch(tokens))
    margin = whole["0.router_margin"]
    assert (margin > 2**-13).all()
    assert (margin < BF16).all()
    assert {tuple(sorted(ids)) for ids in whole["0.expert_ids"].tolist()} == {(0, 1, 2)}
    assert {tuple(sorted(ids)) for ids in half["0.expert_ids"].tolist()} == {(0, 1, 3)}
    # A clear choice does not turn.
    with torch.no_grad():
        nearly_tied.model.layers[0].mlp.gate.weight[2, 0] += 0.1
    whole = recorded(nearly_tied, first_batch(tokens))
    half = recorded(copy.deepcopy(nearly_tied).bfloat16(), first_batch(tokens))
    assert (whole["0.router_margin"] > 10 * BF16).all()
    assert torch.equal(whole["0.expert_ids"].sort(-1).values, half["0.expert_ids"].sort(-1).values)

"""Every intervention against models whose weights or routers were really changed, and the identities that must hold."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope import anatomy, capture, models
from moescope.intervene import (
    HOW,
    block_attention,
    block_experts,
    block_ffn,
    block_heads,
    block_neurons,
    block_shared,
    force_experts,
    intervene,
    keep_experts,
    keep_top,
    record_routing,
    replace_experts,
    replace_states,
    replay,
    restore_experts,
)

from conftest import MOE_SHAPES, SHAPES

USED = 1
"""An expert that each of these models uses in layer 1."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
every_moe = pytest.mark.parametrize("name", MOE_SHAPES)
every_model = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture
def ids(tokens):
    rows = max(capture.batches(tokens["length"].to_numpy(), 64), key=len)
    return capture.token_tensor(tokens, rows, torch.device("cpu"))


def logits_of(model, ids, *edits):
    with torch.no_grad(), intervene(anatomy.find(model), *edits):
        return model(input_ids=ids).logits


def some(parts, rows, seed=0):
    """A quarter of the experts of each layer, drawn for each row; enough are left for every router."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {layer.index: torch.rand(rows, layer.n_experts, generator=generator).argsort(1) for layer in parts.layers}
    return {index: order < order.shape[1] // 4 for index, order in drawn.items()}


def one_used(parts, routing, ids):
    """An expert that the readout position of each row uses, in each layer."""
    none = {i: torch.zeros(len(ids), parts.layers[i].n_experts, dtype=torch.bool) for i in routing}
    return {
        i: marks.scatter_(1, routing[i][0].view(*ids.shape, -1)[:, -1, :1].long(), True) for i, marks in none.items()
    }


def flags(parts, unit, value):
    return {layer.index: torch.full((1, unit(layer)), value) for layer in parts.layers}


def rerouted(model, marks):
    """A copy whose routers choose, by hand, among the experts that are not marked."""
    edited = copy.deepcopy(model)

    def choose(gate, marked):
        def hook(module, args, out):
            rows = marked.repeat_interleave(len(out[0]) // len(marked), 0)
            probabilities = out[0].softmax(-1, dtype=torch.float).masked_fill(rows, -1)
            ids = probabilities.argsort(-1, descending=True)[:, : out[2].shape[1]]
            weights = probabilities.gather(1, ids)
            if getattr(module, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            return out[0], weights, ids

        gate.register_forward_hook(hook)

    for i, layer in enumerate(edited.model.layers):
        choose(layer.mlp.gate, marks[i])
    return edited


@every_moe
def test_reroute_is_a_router_without_these_experts(build, ids, name):
    model = build(name)
    marks = some(anatomy.find(model), len(ids))
    with torch.no_grad():
        expected = rerouted(model, marks)(input_ids=ids).logits
    torch.testing.assert_close(logits_of(model, ids, block_experts(marks, "reroute")), expected, **CLOSE)
    assert (expected - logits_of(model, ids)).abs().max() > 1e-3


@every_moe
def test_reroute_without_a_blocked_expert_in_the_chosen_set_is_clean(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    clean = logits_of(model, ids)
    with torch.no_grad():
        found, _ = capture.record(model, parts, ids, every_position=True)
    for layer in parts.layers:
        chosen = found[f"{layer.index}.expert_ids"].long()
        unused = {layer.index: torch.ones(len(chosen), layer.n_experts, dtype=torch.bool).scatter_(1, chosen, False)}
        assert unused[layer.index].any(1).all()
        for how in HOW:
            assert torch.equal(logits_of(model, ids, block_experts(unused, how)), clean)


@every_moe
def test_reroute_says_when_too_few_experts_are_left(build, ids, name):
    model = build(name)
    parts, clean = anatomy.find(model), logits_of(model, ids)
    with pytest.raises(ValueError, match="layer 0: the router chose an expert that is hidden from it: fewer than"):
        logits_of(model, ids, block_experts(flags(parts, lambda layer: layer.n_experts, True), "reroute"))
    assert torch.equal(logits_of(model, ids), clean)
    with pytest.raises(ValueError, match="how='mean': not a way to block experts; use one of zero, drop"):
        block_experts({}, "mean")


@every_moe
def test_drop_and_renormalise_keeps_the_sum_of_the_weights(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    marks = some(parts, len(ids))
    with record_routing(parts) as before:
        logits_of(model, ids)
    renormalised = block_experts(marks, "drop_and_renormalise")
    with torch.no_grad(), intervene(parts, renormalised), record_routing(parts) as after:
        model(input_ids=ids)
    # In the first layer the choice is still that of the clean run.
    chosen, weights = before[0]
    hit = marks[0].repeat_interleave(ids.shape[1], 0).gather(1, chosen.long())
    kept = after[0][1]
    assert not kept[hit].any()
    left = (~hit).any(1)
    torch.testing.assert_close(kept.sum(1)[left], weights.sum(1)[left])
    ratio = (kept / weights)[left & hit.any(1)]
    spread = ratio.amax(1) - torch.where(ratio == 0, torch.inf, ratio).amin(1)
    assert spread.max() < 1e-5
    assert torch.equal(kept[~hit.any(1)], weights[~hit.any(1)])


@every_moe
def test_replay_of_the_clean_routing_is_clean_and_holds_it_under_another_change(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    clean = logits_of(model, ids)
    with record_routing(parts) as routing:
        logits_of(model, ids)
    assert torch.equal(logits_of(model, ids, replay(routing)), clean)
    heads = {0: torch.ones(1, parts.layers[0].n_heads, dtype=torch.bool)}
    with torch.no_grad(), intervene(parts, block_heads(heads)), record_routing(parts) as free:
        moved = model(input_ids=ids).logits
    with torch.no_grad(), intervene(parts, block_heads(heads), replay(routing)), record_routing(parts) as held:
        direct = model(input_ids=ids).logits
    assert any(not torch.equal(free[i][0], routing[i][0]) for i in routing)
    assert all(torch.equal(held[i][j], routing[i][j]) for i in routing for j in (0, 1))
    assert not torch.equal(moved, direct)
    with pytest.raises(ValueError, match=r"layer 0: recorded and present routing have the shapes \(\d+, \d+\) and"):
        logits_of(model, ids[:1], replay(routing))


@every_moe
def test_keeping_all_and_forcing_what_is_chosen_are_clean(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    clean = logits_of(model, ids)
    assert torch.equal(logits_of(model, ids, keep_experts(flags(parts, lambda layer: layer.n_experts, True))), clean)
    with record_routing(parts) as routing:
        logits_of(model, ids)
    best = {i: torch.zeros(len(x), parts.layers[i].n_experts, dtype=torch.bool) for i, (x, _) in routing.items()}
    for i, (chosen, _) in routing.items():
        best[i].scatter_(1, chosen[:, :1].long(), True)
    assert torch.equal(logits_of(model, ids, force_experts(best)), clean)


@every_moe
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_forced_experts_are_chosen_at_the_expense_of_the_weakest(build, ids, name, seed):
    model = build(name)
    parts = anatomy.find(model)
    k = model.config.num_experts_per_tok
    layer = parts.layers[0]
    order = torch.rand(len(ids), layer.n_experts, generator=torch.Generator().manual_seed(seed)).argsort(1)
    marks = {0: torch.zeros(len(ids), layer.n_experts, dtype=torch.bool).scatter_(1, order[:, : 1 + seed % k], True)}
    with record_routing(parts) as before:
        logits_of(model, ids)
    with torch.no_grad(), intervene(parts, force_experts(marks)), record_routing(parts) as after:
        model(input_ids=ids)
    per_token = marks[0].repeat_interleave(ids.shape[1], 0)
    for wanted, old, weights, new, new_weights in zip(per_token, *before[0], *after[0], strict=True):
        forced = set(wanted.nonzero().flatten().tolist())
        others = sorted((float(w), e) for e, w in zip(old.tolist(), weights, strict=True) if e not in forced)
        kept = {e for _, e in others[len(forced - set(old.tolist())) :]}
        assert set(new.tolist()) == forced | kept
        assert torch.equal(new_weights, weights)
        assert all(new[old == e].tolist() == [e] for e in kept | (forced & set(old.tolist())))


def test_more_forced_experts_than_a_token_has_places_are_refused(build, ids):
    model = build("mixtral")
    with pytest.raises(ValueError, match="layer 0: more experts are forced on than the 2 of a token"):
        logits_of(model, ids, force_experts(flags(anatomy.find(model), lambda layer: layer.n_experts, True)))


@every_moe
def test_own_outputs_in_the_place_of_experts_change_nothing_and_others_are_what_replaces_them(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    clean = logits_of(model, ids)
    with torch.no_grad():
        found, _ = capture.record(model, parts, ids, every_position=True)
    of = {i: {k.split(".", 1)[1]: x for k, x in found.items() if k.startswith(f"{i}.")} for i in range(3)}
    layer, here = parts.layers[1], of[1]
    chosen, outputs = here["expert_ids"].long(), models.expert_outputs(parts.layers[1], of[1])
    every = torch.zeros(len(chosen), layer.n_experts, outputs.shape[-1])
    every.scatter_(1, chosen.unsqueeze(-1).expand_as(outputs), outputs)
    marks = {1: some(parts, len(ids))[1]}
    per_token = marks[1].repeat_interleave(ids.shape[1], 0)
    torch.testing.assert_close(logits_of(model, ids, replace_experts(marks, {1: every})), clean, **CLOSE)
    own = {1: (every * per_token.unsqueeze(-1)).sum(1)}
    torch.testing.assert_close(logits_of(model, ids, restore_experts(marks, own)), clean, **CLOSE)
    # Mean over all tokens that use the expert, by hand: the FFN's output with these terms exchanged.
    uses = torch.zeros(len(chosen), layer.n_experts).scatter_(1, chosen, 1.0)
    mean = every.sum(0) / uses.sum(0).clamp_min(1).unsqueeze(-1)
    swap = ((mean - every) * (uses * per_token).unsqueeze(-1)).sum(1)
    after = here["resid_post"] + swap
    states = {1: after.view(*ids.shape, -1)}
    expected = logits_of(model, ids, replace_states(states, {1: torch.ones_like(ids, dtype=torch.bool)}))
    torch.testing.assert_close(logits_of(model, ids, replace_experts(marks, {1: mean})), expected, **CLOSE)
    assert (expected - clean).abs().max() > 1e-4


@every_model
def test_a_blocked_head_is_a_head_without_output_weights(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    assert torch.equal(
        logits_of(model, ids, block_heads(flags(parts, lambda x: x.n_heads, False))), logits_of(model, ids)
    )
    marks = {1: torch.zeros(len(ids), 4, dtype=torch.bool)}
    marks[1][::2, 2] = True
    edited = copy.deepcopy(model)
    size = edited.model.layers[1].self_attn.o_proj.in_features // 4
    with torch.no_grad():
        edited.model.layers[1].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0
    found, expected = logits_of(model, ids, block_heads(marks)), logits_of(edited, ids)
    torch.testing.assert_close(found[::2], expected[::2], **CLOSE)
    assert torch.equal(found[1::2], logits_of(model, ids)[1::2])
    every = flags(parts, lambda layer: layer.n_heads, True)
    torch.testing.assert_close(
        logits_of(model, ids, block_heads(every)), logits_of(model, ids, block_attention()), **CLOSE
    )


@every_model
def test_heads_and_blocks_take_values_in_the_place_of_their_own(build, ids, name):
    model = build(name)
    parts, clean = anatomy.find(model), logits_of(model, ids)
    with torch.no_grad():
        found, _ = capture.record(model, parts, ids, every_position=True)
    heads = {1: found["1.head_in"]}
    every = {1: torch.ones(len(heads[1]), 4, dtype=torch.bool)}
    assert torch.equal(logits_of(model, ids, block_heads(every, heads)), clean)
    whole = {1: found["1.resid_mid"] - found["1.resid_pre"]}
    rows = {1: torch.ones(len(ids), dtype=torch.bool)}
    torch.testing.assert_close(logits_of(model, ids, block_attention(rows, whole)), clean, **CLOSE)
    other = {1: whole[1].mean(0)}
    at = torch.ones_like(ids, dtype=torch.bool)
    states = {0: found["0.resid_post"].view(*ids.shape, -1)}
    assert torch.equal(logits_of(model, ids, replace_states(states, {0: at})), clean)
    assert (logits_of(model, ids, block_attention(rows, other)) - clean).abs().max() > 1e-4


@every_model
def test_blocked_neurons_are_columns_without_weights(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    layer, edited, expected = parts.layers[1], copy.deepcopy(model), {}
    units = [(1, USED if layer.experts is not None else 0)] + ([(1, -1)] if layer.shared else [])
    for unit in units:
        expert = unit[1]
        if layer.experts is None:
            down = edited.model.layers[1].mlp.down_proj.weight
        else:
            mlp = edited.model.layers[1].mlp
            down = mlp.shared_expert.down_proj.weight if expert < 0 else mlp.experts.down_proj[expert]
        expected[unit] = torch.zeros(len(ids), down.shape[-1], dtype=torch.bool)
        expected[unit][:, ::3] = True
        with torch.no_grad():
            down[:, ::3] = 0
    torch.testing.assert_close(logits_of(model, ids, block_neurons(expected)), logits_of(edited, ids), **CLOSE)
    assert (logits_of(edited, ids) - logits_of(model, ids)).abs().max() > 1e-4
    none = {unit: torch.zeros_like(marks) for unit, marks in expected.items()}
    assert torch.equal(logits_of(model, ids, block_neurons(none)), logits_of(model, ids))
    if layer.experts is not None:
        all_of = {(1, USED): torch.ones(1, expected[1, USED].shape[1], dtype=torch.bool)}
        marks = {1: torch.zeros(1, layer.n_experts, dtype=torch.bool)}
        marks[1][:, USED] = True
        one, other = (logits_of(model, ids, edit) for edit in (block_neurons(all_of), block_experts(marks)))
        torch.testing.assert_close(one, other, **CLOSE)


@every_model
def test_an_intervention_at_the_readout_position_leaves_earlier_positions_bit_for_bit(build, ids, name):
    model = build(name)
    parts, clean = anatomy.find(model), logits_of(model, ids)
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, -1] = True
    edits = [block_heads(flags(parts, lambda x: x.n_heads, True), at=at), block_attention(at=at), block_ffn(at=at)]
    others = []
    if parts.is_moe:
        with record_routing(parts) as routing:
            logits_of(model, ids)
        marks = one_used(parts, routing, ids)
        edits += [block_experts(marks, how, at) for how in HOW if how != "reroute"] + [keep_top(1, at)]
        # Other experts are called with other groups of tokens, which rounds anew.
        others = [block_experts(marks, "reroute", at), force_experts(some(parts, 1), at)]
    if any(layer.shared for layer in parts.layers):
        edits.append(block_shared(flags(parts, lambda layer: len(layer.shared), True), at=at))
    for edit in edits:
        found = logits_of(model, ids, edit)
        assert torch.equal(found[:, :-1], clean[:, :-1])
        assert (found[:, -1] - clean[:, -1]).abs().max() > 1e-4
    for edit in others:
        found = logits_of(model, ids, edit)
        torch.testing.assert_close(found[:, :-1], clean[:, :-1], rtol=1e-6, atol=1e-6)
        assert (found[:, -1] - clean[:, -1]).abs().max() > 1e-4


@every_moe
@pytest.mark.parametrize("backend", ["eager", "batched_mm"])
def test_backends_agree(build, ids, name, backend):
    model = copy.deepcopy(build(name))
    parts = anatomy.find(model)
    marks = some(parts, len(ids))
    edits = [block_experts(marks, how) for how in HOW] + [
        keep_top(1),
        block_neurons({(1, USED): torch.ones(1, 1).bool()}),
    ]
    before = [logits_of(model, ids, edit) for edit in edits]
    model.set_experts_implementation(backend)
    for edit, expected in zip(edits, before, strict=True):
        torch.testing.assert_close(logits_of(model, ids, edit), expected, **CLOSE)


@every_moe
def test_no_edit_leaves_a_trace_after_an_exception_in_the_forward_pass(build, ids, name):
    model = build(name)
    parts, clean = anatomy.find(model), logits_of(model, ids)
    marks = some(parts, len(ids))
    with record_routing(parts) as routing:
        logits_of(model, ids)
    heads = flags(parts, lambda layer: layer.n_heads, True)
    edits = [*(block_experts(marks, how) for how in HOW), replay(routing), block_heads(heads), block_ffn(), keep_top(1)]
    zeros, every = {i: torch.zeros(1, 32) for i in marks}, torch.ones_like(ids, dtype=torch.bool)
    edits += [
        block_neurons({(1, USED): torch.ones(1, 1).bool()}),
        replace_experts(marks, {i: torch.zeros(99, 32) for i in marks}),
        restore_experts(marks, zeros),
        force_experts(some(parts, 1)),
        block_attention(),
        block_shared(flags(parts, lambda layer: len(layer.shared), True)),
        replace_states({1: torch.zeros(*ids.shape, 32)}, {1: every}),
    ]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    hook = model.model.layers[2].register_forward_hook(lambda *_: {}["broken"])
    try:
        for edit in edits:
            with pytest.raises(KeyError, match="broken"):
                logits_of(model, ids, edit)
    finally:
        hook.remove()
    assert torch.equal(logits_of(model, ids), clean)
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    with pytest.raises(ValueError, match="tokens do not divide into"):
        logits_of(
            model, ids, block_experts({0: torch.zeros(len(ids) * ids.shape[1] + 1, parts.layers[0].n_experts).bool()})
        )
    assert torch.equal(logits_of(model, ids), clean)


@every_moe
def test_a_mean_over_no_prompt_reaches_nobody(build, ids, name):
    """Experts that are not marked may have NaN as their mean."""
    model = build(name)
    parts, clean = anatomy.find(model), logits_of(model, ids)
    nothing = {1: torch.full((parts.layers[1].n_experts, 32), torch.nan)}
    none = {1: torch.zeros(1, parts.layers[1].n_experts, dtype=torch.bool)}
    assert torch.equal(logits_of(model, ids, replace_experts(none, nothing)), clean)
    of_tokens = {1: torch.full((ids.numel(), 32), torch.nan)}
    assert torch.equal(logits_of(model, ids, restore_experts(none, of_tokens)), clean)


def test_own_values_in_the_place_of_shared_experts_neurons_and_ffns_are_clean(build, ids):
    model = build("qwen2_moe")
    parts, clean = anatomy.find(model), logits_of(model, ids)
    with torch.no_grad():
        found, _ = capture.record(model, parts, ids, every_position=True)
    acts = found["1.shared.0.acts"]
    out = parts.layers[1].shared[0].down(acts).detach().unsqueeze(1)
    shared = {1: torch.ones(len(acts), 1, dtype=torch.bool)}
    torch.testing.assert_close(logits_of(model, ids, block_shared(shared, {1: out})), clean, **CLOSE)
    neurons = {(1, -1): torch.ones_like(acts, dtype=torch.bool)}
    assert torch.equal(logits_of(model, ids, block_neurons(neurons, {(1, -1): acts})), clean)
    of_expert = torch.zeros(ids.numel(), found["1.expert_acts"].shape[-1])
    token, slot = (found["1.expert_ids"] == USED).nonzero(as_tuple=True)
    of_expert[token] = found["1.expert_acts"][token, slot]
    routed = {(1, USED): torch.ones_like(of_expert, dtype=torch.bool)}
    torch.testing.assert_close(logits_of(model, ids, block_neurons(routed, {(1, USED): of_expert})), clean, **CLOSE)
    with pytest.raises(ValueError, match="layer 1: its FFN has 2 parts; replace them one by one"):
        logits_of(model, ids, block_ffn({1: shared[1][:1, 0]}, {1: out[0]}))
    dense = build("llama")
    with torch.no_grad():
        found, _ = capture.record(dense, anatomy.find(dense), ids, every_position=True)
    ffn = {1: found["1.resid_post"] - found["1.resid_mid"]}
    one = block_ffn({1: torch.ones(1, dtype=torch.bool)}, ffn)
    torch.testing.assert_close(logits_of(dense, ids, one), logits_of(dense, ids), **CLOSE)


def test_states_and_positions_of_different_shapes_are_refused(build, ids):
    states, at = {1: torch.zeros(*ids.shape, 32)}, {1: torch.ones(1, ids.shape[1], dtype=torch.bool)}
    with pytest.raises(ValueError, match="layer 1: states and positions of"):
        logits_of(build("llama"), ids, replace_states(states, at))

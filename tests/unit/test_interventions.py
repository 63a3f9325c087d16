"""Blocking and keeping, against clean runs, removed blocks and models whose weights were really zeroed."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import ablations, anatomy, attribution, capture
from moescope.intervene import block_experts, block_ffn, block_shared, intervene, keep_top
from moescope.toy import Shape
from moescope.toy import build as build_toy

from conftest import MOE_SHAPES, SHAPES, write_tensors

every_moe = pytest.mark.parametrize("name", MOE_SHAPES)


@pytest.fixture
def ids(tokens):
    return capture.token_tensor(tokens, next(capture.batches(tokens["length"].to_numpy(), 64)), torch.device("cpu"))


def logits_of(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def marks(parts, rows, blocked=(), everything=False):
    found = {layer.index: torch.full((rows, layer.n_experts), everything) for layer in parts.layers}
    for layer, expert in blocked:
        found[layer][:, expert] = True
    return found


def all_shared(parts):
    return {layer.index: torch.ones(1, len(layer.shared), dtype=torch.bool) for layer in parts.layers}


@every_moe
def test_blocking_nothing_or_an_unused_expert_changes_no_bit(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    clean = logits_of(model, ids)
    with intervene(parts, block_experts(marks(parts, len(ids)))):
        assert torch.equal(logits_of(model, ids), clean)
    many = {**MOE_SHAPES[name], "experts": 64}
    model = build_toy(Shape(architecture=name, hidden=32, heads=4, kv_heads=2, **many), model.config.vocab_size, seed=1)
    parts = anatomy.find(model.eval())
    with torch.inference_mode():
        found, _ = capture.record(model, parts, ids)
    unused = [(i, int(e)) for i in range(3) for e in (found[f"{i}.expert_load"].sum(0) == 0).nonzero().flatten()]
    assert unused
    clean = logits_of(model, ids)
    with intervene(parts, block_experts(marks(parts, len(ids), unused))):
        assert torch.equal(logits_of(model, ids), clean)
    used = (0, int(found["0.expert_load"].sum(0).argmax()))
    with intervene(parts, block_experts(marks(parts, len(ids), [used]))):
        assert not torch.equal(logits_of(model, ids), clean)


@every_moe
def test_blocking_everything_equals_removing_the_ffn(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    with intervene(parts, block_experts(marks(parts, len(ids), everything=True)), block_shared(all_shared(parts))):
        blocked = logits_of(model, ids)
    with intervene(parts, block_ffn()):
        assert torch.equal(logits_of(model, ids), blocked)
    without = copy.deepcopy(model)
    for layer in without.model.layers:
        for weight in layer.mlp.parameters():
            torch.nn.init.zeros_(weight)
    torch.testing.assert_close(logits_of(without, ids), blocked, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(blocked, logits_of(model, ids), atol=1e-3)


@pytest.mark.parametrize("name", [n for n in SHAPES if n not in MOE_SHAPES])
def test_ffns_of_dense_models_are_removed_too(build, ids, name):
    model = build(name)
    without = copy.deepcopy(model)
    for layer in without.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    with intervene(anatomy.find(model), block_ffn()):
        torch.testing.assert_close(logits_of(model, ids), logits_of(without, ids), rtol=1e-5, atol=1e-6)


@every_moe
def test_blocking_equals_zeroing_the_experts_own_weights(build, ids, name):
    """Each row of a batch has experts of its own blocked; the reference edits a copy of the model."""
    model = build(name)
    parts = anatomy.find(model)
    sets = [[(0, 0)], [(1, 2), (2, 1)], [], [(0, 1), (0, 2), (0, 3)]]
    mark = marks(parts, len(ids))
    for row in range(len(ids)):
        for layer, expert in sets[row % len(sets)]:
            mark[layer][row, expert] = True
    with intervene(parts, block_experts(mark)):
        found = logits_of(model, ids)
    for row in range(len(ids)):
        edited = copy.deepcopy(model)
        for layer, expert in sets[row % len(sets)]:
            with torch.no_grad():
                edited.model.layers[layer].mlp.experts.down_proj[expert] = 0
        torch.testing.assert_close(found[row], logits_of(edited, ids[row : row + 1])[0], rtol=1e-4, atol=1e-5)


@every_moe
def test_keeping_all_is_clean_and_keeping_one_is_the_router_with_one(build, ids, name):
    model = build(name)
    parts = anatomy.find(model)
    k = model.config.num_experts_per_tok
    with intervene(parts, keep_top(k)):
        kept_all = logits_of(model, ids)
    assert torch.equal(kept_all, logits_of(model, ids))
    with intervene(parts, keep_top(1)):
        found = logits_of(model, ids)
    by_hand = copy.deepcopy(model)
    for layer in by_hand.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda m, a, out: (out[0], out[1] * (out[1] == out[1].max(-1, keepdim=True).values), out[2])
        )
    torch.testing.assert_close(found, logits_of(by_hand, ids), rtol=1e-5, atol=1e-6)


def test_shared_experts_are_zeroed_alone(build, ids):
    model = build("qwen2_moe")
    edited = copy.deepcopy(model)
    for layer in edited.model.layers:
        torch.nn.init.zeros_(layer.mlp.shared_expert.down_proj.weight)
    parts = anatomy.find(model)
    with intervene(parts, block_shared(all_shared(parts))):
        torch.testing.assert_close(logits_of(model, ids), logits_of(edited, ids), rtol=1e-5, atol=1e-6)


def test_nothing_is_left_after_an_exception_and_blocks_nest(build, ids):
    model = build("qwen2_moe")
    parts = anatomy.find(model)
    clean = logits_of(model, ids)
    with pytest.raises(KeyError), intervene(parts, block_ffn()):
        raise KeyError
    assert torch.equal(logits_of(model, ids), clean)
    one, other = marks(parts, len(ids), [(0, 0)]), marks(parts, len(ids), [(1, 1)])
    both = marks(parts, len(ids), [(0, 0), (1, 1)])
    with intervene(parts, block_experts(both)):
        expected = logits_of(model, ids)
    with intervene(parts, block_experts(one)), intervene(parts, block_experts(other)):
        assert torch.equal(logits_of(model, ids), expected)


@pytest.fixture
def run(build, tokens, tmp_path):
    def of(name):
        model = build(name)
        parts = anatomy.find(model)
        tensors, table, _ = capture.in_memory(model, parts, tokens, 64)
        write_tensors(tensors, tmp_path / "0.safetensors")
        _, _, experts, _ = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
        table = table.sort_values("prompt_id", ignore_index=True)
        load = ablations.expert_load(parts, [tmp_path / "0.safetensors"], table)
        return model, parts, table, experts, load

    return of


@every_moe
def test_blocking_table_equals_one_prompt_at_a_time(run, name):
    model, parts, table, experts, load = run(name)
    half = ablations.split_subjects(table, seed=0)
    sets, ranking = ablations.choose_sets(experts, load, table, half, [1, 3], 2, seed=0)
    found = ablations.measure_blocking(model, parts, table, half, sets, batch_size=16)
    assert len(found) == len(table) * 2 * 3
    found = found.set_index(["prompt_id", "n_blocked", "draw"])
    for (index, row), chosen in ((pair, s) for pair in list(table.iterrows())[::7] for s in sets):
        if (chosen.relation, chosen.half) != (row["relation"], half[index]):
            continue
        edited = copy.deepcopy(model)
        for layer, expert in chosen.experts:
            with torch.no_grad():
                edited.model.layers[layer].mlp.experts.down_proj[expert] = 0
        log_probs = logits_of(edited, torch.tensor([row["token_ids"]]))[0, -1].log_softmax(-1)
        measured = found.loc[(row["prompt_id"], chosen.n_blocked, chosen.draw)]
        assert measured["log_prob"] == pytest.approx(log_probs[row["target_id"]].item(), abs=1e-4)
        assert measured["rank"] == int((log_probs >= log_probs[row["target_id"]]).sum())
    assert set(ranking.columns) == {"relation", "half", "order", "layer", "expert", "mean_lpi", "frequency"}


def test_selection_never_sees_the_measured_half(run):
    _, _, table, experts, load = run("olmoe")
    half = ablations.split_subjects(table, seed=0)
    for relation in table["relation"].unique():
        rows = table[table["relation"] == relation]
        assert (rows.groupby("subject").apply(lambda r: half[r.index].min() == half[r.index].max())).all()
        assert set(half[rows.index]) == {0, 1}
    sets, _ = ablations.choose_sets(experts, load, table, half, [2], 3, seed=0)
    for measured in (0, 1):
        changed = experts.copy()
        seen = changed["prompt_id"].isin(table["prompt_id"][half == measured])
        changed.loc[seen, "lpi"] = -changed.loc[seen, "lpi"] + 100
        other_load = load.copy()
        other_load[half == measured] += 1
        after, _ = ablations.choose_sets(changed, other_load, table, half, [2], 0, seed=0)
        keep = [s.experts for s in sets if s.half == measured and s.draw == -1]
        assert [s.experts for s in after if s.half == measured] == keep


def test_the_best_experts_have_the_largest_mean_lpi(run):
    _, _, table, experts, load = run("mixtral")
    half = ablations.split_subjects(table, seed=0)
    sets, ranking = ablations.choose_sets(experts, load, table, half, [3], 0, seed=0)
    for chosen in sets:
        rows = table[(table["relation"] == chosen.relation) & (half != chosen.half)]
        part = experts[experts["prompt_id"].isin(rows["prompt_id"]) & (experts["expert"] >= 0)]
        mean = part.groupby(["layer", "expert"])["lpi"].sum() / len(rows)
        assert list(chosen.experts) == mean.sort_values(ascending=False).index[:3].tolist()
        first = ranking[(ranking["relation"] == chosen.relation) & (ranking["half"] == chosen.half)].iloc[0]
        assert first["mean_lpi"] == pytest.approx(mean.max(), rel=1e-5)


@given(st.data())
def test_a_random_control_is_matched_in_layer_and_disjoint(data):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    every = [(layer, e) for layer in range(layers) for e in range(experts)]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=len(every), unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    drawn = ablations.matched_draw(chosen, rng.random((layers, experts)), rng)
    assert len(set(drawn)) == len(drawn) == min(len(chosen), len(every) - len(chosen))
    assert not set(drawn) & set(chosen)
    of_layer = np.bincount([layer for layer, _ in chosen], minlength=layers)
    if (2 * of_layer <= experts).all():
        assert np.bincount([layer for layer, _ in drawn], minlength=layers).tolist() == of_layer.tolist()


def test_controls_are_near_in_frequency():
    frequency = np.linspace(0, 1, 40)[None]
    rng = np.random.default_rng(0)
    drawn = {ablations.matched_draw([(0, 20)], frequency, rng)[0][1] for _ in range(200)}
    assert drawn == {18, 19, 21, 22}


@every_moe
def test_keep_only_table(run, name):
    model, parts, table, _, _ = run(name)
    k = model.config.num_experts_per_tok
    found = ablations.measure_keep_only(model, parts, table, [1, k], batch_size=16)
    shared = [False, True] if name == "qwen2_moe" else [False]
    assert set(found["shared"]) == set(shared)
    of = {key: rows.set_index("prompt_id") for key, rows in found.groupby(["shared", "routed"])}
    assert set(of) == {(s, n) for s in shared for n in (0, 1, k, -1)}
    clean = table.set_index("prompt_id")
    whole = of[shared[-1], -1]
    assert (whole["rank"] == clean["rank"]).all()
    np.testing.assert_allclose(whole["log_prob"], clean["log_prob"], atol=1e-5)
    pd.testing.assert_frame_equal(of[shared[-1], k].drop(columns="routed"), whole.drop(columns="routed"))
    assert not np.allclose(of[shared[-1], 0]["log_prob"], clean["log_prob"], atol=1e-3)

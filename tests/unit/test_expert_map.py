"""The exhaustive expert map against full forward passes with weights zeroed or experts blocked, one by one."""

import copy
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from moescope import anatomy, capture, expert_map
from moescope.facts import steps
from moescope.intervene import block_experts, block_shared, intervene
from moescope.resume import ResumeError

import families
from conftest import MOE_SHAPES

every_moe = pytest.mark.parametrize("name", MOE_SHAPES)
BOTH = ("readout", "all")


@pytest.fixture(scope="module")
def known(build, tokens):
    """Model, parts and some prompts with their targets."""

    def of(name, answer="first_token", every=3):
        model = build(name)
        parts = anatomy.find(model)
        _, table, _ = capture.in_memory(model, parts, tokens.iloc[::every].reset_index(drop=True), 64, answer)
        return model, parts, table

    return of


def scores_of(model, ids, target):
    with torch.inference_mode():
        log_probs = model(input_ids=ids).logits[:, -1].double().log_softmax(-1)
    own = log_probs.gather(1, target[:, None])
    return own[:, 0].numpy(), (log_probs >= own).sum(1).numpy()


def naive(model, parts, table):
    """Each expert of the model blocked in turn in full forward passes of one prompt at a time."""
    found = {}
    for prompt in table.itertuples():
        ids, target = torch.tensor([prompt.token_ids]), torch.tensor([prompt.target_id])
        readout = torch.zeros(ids.shape, dtype=torch.bool)
        readout[:, -1] = True
        for layer in parts.layers:
            for positions, at in {"readout": readout, "all": None}.items():
                for unit in range(layer.n_experts + len(layer.shared)):
                    marks = torch.zeros(1, layer.n_experts + len(layer.shared), dtype=torch.bool)
                    marks[:, unit] = True
                    routed, shared = marks.split([layer.n_experts, len(layer.shared)], 1)
                    edits = block_experts({layer.index: routed}, at=at), block_shared({layer.index: shared}, at=at)
                    with intervene(parts, *edits):
                        (log_prob,), (rank,) = scores_of(model, ids, target)
                    expert = unit if unit < layer.n_experts else layer.n_experts - 1 - unit
                    found[prompt.prompt_id, positions, layer.index, expert] = log_prob, rank
    return found


def used_by(model, parts, table):
    """(prompt, positions, layer, expert) of every expert that is used, from a recorded forward pass of each prompt."""
    found = set()
    for prompt in table.itertuples():
        recorded, _ = capture.record(model, parts, torch.tensor([prompt.token_ids]))
        for layer in parts.layers:
            shared = [-1 - i for i in range(len(layer.shared))]
            if layer.experts is not None:
                last = recorded[f"{layer.index}.expert_ids"][0].tolist()
                ever = recorded[f"{layer.index}.expert_load"][0].nonzero()[:, 0].tolist()
                found |= {(prompt.prompt_id, "readout", layer.index, e) for e in last + shared}
                found |= {(prompt.prompt_id, "all", layer.index, e) for e in ever + shared}
    return found


def agree(found, expected, tolerance=1e-5):
    for row in found.itertuples(index=False):
        log_prob, rank = expected[row.prompt_id, row.positions, row.layer, row.expert]
        assert row.log_prob == pytest.approx(log_prob, abs=tolerance)
        assert row.rank == rank


@every_moe
def test_the_map_has_every_used_expert_and_equals_full_forward_passes(known, name):
    model, parts, table = known(name)
    found = expert_map.measure(model, parts, table, 16, BOTH)
    rows = list(found[["prompt_id", "positions", "layer", "expert"]].itertuples(index=False, name=None))
    with torch.inference_mode():
        assert set(rows) == used_by(model, parts, table)
    assert len(set(rows)) == len(rows)
    agree(found, naive(model, parts, table))
    clean = table.set_index("prompt_id")["log_prob"]
    assert (found["log_prob"] - found["prompt_id"].map(clean)).abs().max() > 1e-3
    types = ["int32", "str", "int16", "int16", "int32", "float32"]
    assert found.dtypes.astype(str).tolist() == types


def test_blocking_equals_zeroing_the_experts_own_weights(known):
    model, parts, table = known("qwen2_moe", every=11)
    found = expert_map.measure(model, parts, table, 16, ["all"])
    at = table.set_index("prompt_id")
    for row in found.sample(60, random_state=0).itertuples(index=False):
        edited = copy.deepcopy(model)
        mlp = edited.model.layers[row.layer].mlp
        with torch.no_grad():
            (mlp.experts.down_proj[row.expert] if row.expert >= 0 else mlp.shared_expert.down_proj.weight).zero_()
        prompt = at.loc[row.prompt_id]
        target = torch.tensor([prompt["target_id"]])
        (log_prob,), _ = scores_of(edited, torch.tensor([prompt["token_ids"]]), target)
        assert row.log_prob == pytest.approx(log_prob, abs=1e-5)


FAMILIES = ["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoeshared", "flex_olmo", "qwen3_moe"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dense_first_layers_shared_experts_factors_windows_and_norms(model_type, caplog):
    """Families whose layers are called in other ways; a norm behind the experts is measured by full forward passes."""
    model = families.build(model_type)
    parts = anatomy.find(model)
    ids = torch.randint(4, 28, (6, 7), generator=torch.Generator().manual_seed(0))
    ids[1:4, :4] = ids[0, :4]
    table = pd.DataFrame({"prompt_id": np.arange(6, dtype="int32"), "token_ids": ids.tolist()})
    table = table.assign(target_ids=[[5 + i] for i in range(6)], target_id=5 + np.arange(6))
    found = expert_map.measure(model, parts, table, 4, BOTH)
    agree(found, naive(model, parts, table))
    assert ("a norm follows the experts of layer 0" in caplog.text) == (model_type == "flex_olmo")
    assert ("measured by full forward passes" in caplog.text) == (model_type == "flex_olmo")
    if model_type in ("deepseek_v3", "glm4_moe", "granitemoeshared"):
        assert (found["expert"] < 0).any()


@every_moe
def test_of_several_answer_tokens_log_probs_are_summed_and_the_worst_rank_counts(known, name):
    model, parts, table = known(name, "all_tokens", every=5)
    assert (table["target_ids"].str.len() > 1).any()
    found = expert_map.measure(model, parts, table, 16, BOTH)
    answers = steps(table)
    one_by_one = answers.rename(columns={"prompt_id": "of"}).assign(prompt_id=np.arange(len(answers)))
    expected = naive(model, parts, one_by_one)
    of_prompt = one_by_one.groupby("of")["prompt_id"].agg(list)
    for row in found.itertuples(index=False):
        scores = [expected[i, row.positions, row.layer, row.expert] for i in of_prompt[row.prompt_id]]
        assert row.log_prob == pytest.approx(sum(log_prob for log_prob, _ in scores), abs=2e-5)
        assert row.rank == max(rank for _, rank in scores)
    uses = used_by(model, parts, one_by_one)
    assert set(found[["prompt_id", "positions", "layer", "expert"]].itertuples(index=False, name=None)) == {
        (one_by_one["of"][i], *rest) for i, *rest in uses
    }


@every_moe
def test_batches_blocks_and_the_order_of_prompts_do_not_matter(known, name, monkeypatch):
    model, parts, table = known(name)
    whole = expert_map.measure(model, parts, table, 64, BOTH)
    others = [expert_map.measure(model, parts, table.sample(frac=1, random_state=0), 5, BOTH)]
    monkeypatch.setattr(expert_map, "MAX_STATES", 300)
    monkeypatch.setattr(expert_map, "BLOCK", 3)
    others.append(expert_map.measure(model, parts, table, 64, BOTH))
    for other in others:
        pd.testing.assert_frame_equal(other, whole, rtol=0, atol=1e-5)


def test_what_cannot_be_resumed_is_measured_in_full_and_logged(known, monkeypatch, caplog):
    model, parts, table = known("qwen2_moe", every=5)
    whole = expert_map.measure(model, parts, table, 16, BOTH)

    def refuse(*args, **kwargs):
        raise ResumeError("no keys")

    monkeypatch.setattr(expert_map, "clean_run", refuse)
    with caplog.at_level(logging.WARNING):
        found = expert_map.measure(model, parts, table, 16, BOTH)
    assert [r.message for r in caplog.records] == [
        "cannot be started from the middle (no keys): measured by full forward passes"
    ]
    pd.testing.assert_frame_equal(found, whole, rtol=0, atol=1e-5)


def test_a_clean_run_that_does_not_come_back_is_refused(known, monkeypatch):
    model, parts, table = known("olmoe", every=5)
    ids = torch.tensor(table[table["length"] == table["length"].max()]["token_ids"].tolist())
    clean_run = expert_map.clean_run

    def spoilt(*args, **kwargs):
        clean = clean_run(*args, **kwargs)
        clean.cache.layers[1].values[:, :, 0] += 1
        return clean

    monkeypatch.setattr(expert_map, "clean_run", spoilt)
    with pytest.raises(ResumeError, match="started again with nothing blocked, its final state changes by"):
        expert_map.start(model, parts, ids)


def test_prompts_that_begin_alike_share_their_beginning():
    ids = torch.tensor([[1, 2, 3], [1, 2, 4], [2, 2, 3], [1, 2, 3]])
    tree = expert_map.Tree.of(ids)
    assert len(tree.row) == 7
    for row in range(4):
        for position in range(3):
            node = tree.node[row, position]
            assert tree.depth[node] == position
            assert torch.equal(ids[tree.row[node], : position + 1], ids[row, : position + 1])
    assert torch.equal(tree.node[0], tree.node[3])
    assert torch.equal(tree.node[0, :2], tree.node[1, :2])


def test_unknown_positions_are_named(known):
    model, parts, table = known("olmoe", every=5)
    with pytest.raises(ValueError, match=r"\['last'\] are not known; use readout or all"):
        expert_map.measure(model, parts, table, 16, ["last"])

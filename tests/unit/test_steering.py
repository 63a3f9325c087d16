"""Heads blocked and gates traced to them, against forward passes with hooks of this file and weights really zeroed."""

import copy
import math
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from moescope import ablations, anatomy, attribution, capture, steering
from moescope.lens import Readout, log_prob
from moescope.models import expert_contributions, gate_probabilities, head_contributions

import families
from conftest import MOE_SHAPES, write_tensors

ALL = [*MOE_SHAPES, "qwen2"]
every_moe = pytest.mark.parametrize("name", MOE_SHAPES)
CHANGES = list(steering.HEAD_ROUTER)


@contextmanager
def hooked(model, heads=(), positions=slice(None), routing=None):
    """By hand: inputs of these heads' columns set to 0, and the router's choice recorded, or replaced by `routing`."""
    seen = {}
    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            width = layer.self_attn.o_proj.in_features // model.config.num_attention_heads

            def zero(module, args, index=index, width=width):
                x = args[0].clone()
                for _, head in (one for one in heads if one[0] == index):
                    x[:, positions, head * width : (head + 1) * width] = 0
                return (x,)

            def choice(module, args, output, index=index):
                seen[index] = output
                return output if routing is None else (output[0], *routing[index][1:])

            stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(zero).remove)
            if hasattr(layer.mlp, "gate"):
                stack.callback(layer.mlp.gate.register_forward_hook(choice).remove)
        yield seen


@torch.no_grad()
def by_hand(model, token_ids, target, **how):
    """(log-probability, rank, what the routers gave) of one prompt."""
    with hooked(model, **how) as seen:
        log_p = model(input_ids=torch.tensor([list(token_ids)])).logits[0, -1].log_softmax(-1)
    return log_p[target].item(), int((log_p >= log_p[target]).sum()), seen


def chosen(seen, layer):
    """(logits, set of chosen experts) at the readout position; routers give logits, weights, ids."""
    logits, _, ids = seen[layer]
    return logits[-1], set(ids[-1].tolist())


@torch.no_grad()
def expert_lpis(model, parts, token_ids, target, scale, **how):
    """LPIs of the chosen experts in each layer: differences of log-probabilities, of what is recorded under hooks."""
    readout, found = Readout.of(parts), {}
    with hooked(model, **how):
        tensors, _ = capture.record(model, parts, torch.tensor([list(token_ids)]))
    for layer in parts.layers:
        here = {k.removeprefix(f"{layer.index}."): v for k, v in tensors.items() if k.startswith(f"{layer.index}.")}
        before, added = here["resid_mid"], expert_contributions(layer, here)[0]
        after = log_prob(readout, before + added, scale.repeat(len(added)), torch.tensor([target] * len(added)))
        found[layer.index] = float((after - log_prob(readout, before, scale.view(1), torch.tensor([target]))).sum())
    return found


@pytest.fixture
def run(build, tokens, tmp_path):
    def of(name, every=1):
        model = build(name)
        parts = anatomy.find(model)
        tensors, table, _ = capture.in_memory(model, parts, tokens, 64)
        write_tensors(tensors, tmp_path / "0.safetensors")
        _, heads, experts, _ = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
        scale = dict(zip(tensors["prompt_id"].tolist(), tensors["norm_scale"]))
        return model, parts, table.iloc[::every].reset_index(drop=True), heads, experts, scale

    return of


@pytest.mark.parametrize("name", ALL)
def test_the_sweep_equals_forward_passes_with_hooks_by_hand(run, name):
    model, parts, table, _, experts, scales = run(name)
    head_map, head_router = steering.sweep(model, parts, table, batch_size=64)
    assert len(head_map) == len(table) * 3 * 4
    assert len(head_router) == (len(table) * 4 * (3 + 2 + 1) if name in MOE_SHAPES else 0)
    types = dict(zip(head_router, head_router.dtypes.astype(str)))
    keys = {"prompt_id": "int32"} | dict.fromkeys(["layer", "head", "router_layer"], "int16")
    assert list(types.items()) == list((keys | dict.fromkeys(CHANGES, "float32")).items())
    effect = head_map.set_index(["prompt_id", "layer", "head"])
    change = head_router.set_index(["prompt_id", "layer", "head", "router_layer"]).sort_index()
    routed = experts[experts["expert"] >= 0].groupby(["prompt_id", "layer"])["lpi"].sum()
    for row in table.iloc[::9].itertuples():
        what = row.token_ids, row.target_id
        clean = by_hand(model, *what)[2]
        for layer, head in [(0, 1), (1, 3), (2, 0)]:
            blocked = {"heads": [(layer, head)], "positions": -1}
            log_p, rank, seen = by_hand(model, *what, **blocked)
            found = effect.loc[row.prompt_id, layer, head]
            assert (found["rank"], found["log_prob"]) == (rank, pytest.approx(log_p, abs=2e-5))
            lpis = expert_lpis(model, parts, *what, scales[row.prompt_id], **blocked) if seen else {}
            for router in seen.keys() & range(layer, 3):
                (old, first), (new, second) = chosen(clean, router), chosen(seen, router)
                shift = (new - new.mean()) - (old - old.mean())
                values = [
                    shift.square().mean().sqrt().item(),
                    len(first & second) / len(first | second),
                    old.softmax(-1)[list(first)].sum().item(),
                    new.softmax(-1)[list(first)].sum().item(),
                    routed[row.prompt_id, router],
                    lpis[router],
                ]
                found = change.loc[(row.prompt_id, layer, head, router), CHANGES].tolist()
                assert found == pytest.approx(values, abs=2e-5, rel=1e-4)


def test_the_sweep_does_not_depend_on_the_batch_size_nor_on_lpis(run):
    model, parts, table, *_ = run("olmoe", every=3)
    one, two = steering.sweep(model, parts, table, 64), steering.sweep(model, parts, table, 3, with_lpi=False)
    pd.testing.assert_frame_equal(one[0], two[0], atol=1e-5)
    assert two[1][["lpi_before", "lpi_after"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(one[1].iloc[:, :-2], two[1].iloc[:, :-2], atol=1e-5)


def test_answer_tokens_are_joined(run):
    model, parts, table, *_ = run("mixtral", every=9)
    twice = table.assign(target_ids=[[ids[0], 7] for ids in table["target_ids"]])
    second = table.assign(
        token_ids=[[*ids, targets[0]] for ids, targets in zip(table["token_ids"], table["target_ids"])],
        target_ids=[[7]] * len(table),
    )
    found, first, then = (steering.sweep(model, parts, x, 64) for x in (twice, table, second))
    np.testing.assert_allclose(found[0]["log_prob"], first[0]["log_prob"] + then[0]["log_prob"], rtol=1e-5)
    assert (found[0]["rank"] == np.maximum(first[0]["rank"], then[0]["rank"])).all()
    for name, weight in zip(CHANGES, [0.5, 0.5, 0.5, 0.5, 1, 1]):
        np.testing.assert_allclose(found[1][name], weight * (first[1][name] + then[1][name]), atol=1e-5)
    assert (steering.sweep(model, parts, twice, 64, with_lpi=False)[1]["lpi_after"].isna()).all()


def family(model_type):
    """A miniature with prompts of random tokens, and its experts table from the cache."""
    model = families.build(model_type)
    parts = anatomy.find(model)
    rows = {"prompt_id": np.arange(4, dtype="int32"), "token_ids": families.IDS.tolist(), "accepted_ids": [[5]] * 4}
    tokens = pd.DataFrame(rows).assign(length=6, subject_start=-1, subject_end=-1)
    return model, parts, *capture.in_memory(model, parts, tokens, 64)[:2]


@pytest.mark.parametrize(
    "model_type", ["cohere2_moe", "deepseek_v3", "flex_olmo", "granitemoehybrid", "jamba", "lfm2_moe"]
)
def test_clean_values_of_other_families_are_those_of_the_cache(model_type, tmp_path):
    """Parallel blocks, dense first layers with shared experts, post-norms, layers without heads, some not resumed."""
    model, parts, tensors, table = family(model_type)
    write_tensors(tensors, tmp_path / "0.safetensors")
    _, heads, experts, _ = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
    head_map, head_router = steering.sweep(model, parts, table, 64)
    keys = ["prompt_id", "layer", "head"]
    assert head_map[keys].values.tolist() == heads.sort_values(keys)[keys].values.tolist()
    assert (head_router["layer"] <= head_router["router_layer"]).all()
    first = min(layer.index for layer in parts.layers if layer.n_heads)
    assert set(head_router["router_layer"]) == {x.index for x in parts.layers if x.n_experts and x.index >= first}
    routed = experts[experts["expert"] >= 0].groupby(["prompt_id", "layer"])["lpi"].sum()
    expected = routed.loc[pd.MultiIndex.from_frame(head_router[["prompt_id", "router_layer"]])]
    np.testing.assert_allclose(head_router["lpi_before"], expected, rtol=1e-4, atol=1e-5)
    if model_type == "cohere2_moe":
        assert (head_router["logit_change"][head_router["layer"] == head_router["router_layer"]] < 1e-6).all()


def test_a_model_that_is_not_resumed_gives_what_whole_forward_passes_do(caplog):
    model, parts, _, table = family("lfm2_moe")
    head_map, _ = steering.sweep(model, parts, table, 64)
    assert "whole forward pass" in caplog.text
    found = head_map.set_index(["prompt_id", "layer", "head"])["log_prob"]
    for layer, head in [(1, 2), (3, 0)]:
        out = parts.layers[layer].attention.out_proj
        width = out.in_features // 4

        def zero(module, args, head=head, width=width):
            x = args[0].clone()
            x[:, -1, head * width : (head + 1) * width] = 0
            return (x,)

        handle = out.register_forward_pre_hook(zero)
        with torch.no_grad():
            log_p = model(input_ids=families.IDS).logits[:, -1].log_softmax(-1)
        handle.remove()
        np.testing.assert_allclose(found.xs((layer, head), level=["layer", "head"]), log_p[:, 5], atol=1e-5)


def test_models_without_heads_have_tables_without_rows():
    model, parts, _, table = family("bamba")
    table = table.assign(relation="r", subject=list("aabb"))
    heads = pd.DataFrame({name: np.empty(0, kind) for name, kind in (*steering.KEYS.items(), ("lpi", "float32"))})
    assert [len(found) for found in steering.sweep(model, parts, table, 64)] == [0, 0]
    half = ablations.split_subjects(table, 0)
    sets, ranking = steering.choose_heads(parts, heads, table, half, [2], 3, seed=0)
    assert (sets, len(ranking)) == ([], 0)
    found = steering.measure_head_blocking(model, parts, table, half, sets, 64)
    np.testing.assert_allclose(found["log_prob"], table["log_prob"], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_blocked_sets_equal_zeroed_weights_and_replaced_routing(run, name):
    """At all positions; forced, every router gives what it gave in the clean run."""
    model, parts, table, heads, experts, scales = run(name)
    half = ablations.split_subjects(table, 0)
    sets, _ = steering.choose_heads(parts, heads, table, half, [1, 4], 2, seed=0)
    found = steering.measure_head_blocking(model, parts, table, half, sets, batch_size=16)
    moe = name in MOE_SHAPES
    assert len(found) == len(table) * (1 + 2 * 3 * (2 if moe else 1))
    clean = found[found["n_blocked"] == 0]
    assert clean["prompt_id"].tolist() == table["prompt_id"].tolist()
    np.testing.assert_allclose(clean["log_prob"], table["log_prob"], atol=1e-5)
    assert clean["rank"].tolist() == table["rank"].tolist()
    if moe:
        routed = experts[experts["expert"] >= 0].groupby("prompt_id")["lpi"].sum()
        np.testing.assert_allclose(clean["expert_lpi"], routed.loc[clean["prompt_id"]], rtol=1e-4, atol=1e-5)
        assert (clean["overlap"] == 1).all()
    else:
        assert found[list(steering.HEAD_BLOCKING)].isna().all(axis=None)
    found = found.set_index(["prompt_id", "n_blocked", "draw", "forced"]).sort_index()
    for (index, row), one in ((pair, s) for pair in list(table.iterrows())[::11] for s in sets):
        if (one.relation, one.half) != (row["relation"], half[index]):
            continue
        edited = copy.deepcopy(model)
        for layer, head in one.heads:
            with torch.no_grad():
                edited.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : (head + 1) * 8] = 0
        what = row["token_ids"], row["target_id"]
        before = by_hand(model, *what)[2]
        for forced in (False, True) if moe else (False,):
            log_p, rank, seen = by_hand(edited, *what, routing=before if forced else None)
            measured = found.loc[(row["prompt_id"], one.n_blocked, one.draw, forced)]
            assert (measured["rank"], measured["log_prob"]) == (rank, pytest.approx(log_p, abs=1e-4))
            if moe:
                pairs = [(chosen(before, layer)[1], *chosen(seen, layer)) for layer in range(3)]
                gate = np.mean([logits.softmax(-1)[list(old)].sum().item() for old, logits, _ in pairs])
                overlap = np.mean([len(old & new) / len(old | new) for old, _, new in pairs])
                how = {"routing": before} if forced else {}
                lpi = sum(expert_lpis(model, parts, *what, scales[row["prompt_id"]], heads=one.heads, **how).values())
                expected = [gate, overlap, lpi]
                assert measured[list(steering.HEAD_BLOCKING)].tolist() == pytest.approx(expected, abs=1e-4)


def test_sets_of_no_head_change_nothing_forced_or_not_and_equal_sets_are_equal(run):
    model, parts, table, *_ = run("qwen2_moe", every=2)
    half = ablations.split_subjects(table, 0)
    pairs = {(relation, h) for relation, h in zip(table["relation"], half)}
    same = [((0, 1), (2, 3)), ((2, 3), (0, 1))]
    sets = [steering.HeadSet(r, h, 1, 0, ()) for r, h in pairs]
    sets += [steering.HeadSet(r, h, 2, draw, heads) for r, h in pairs for draw, heads in enumerate(same)]
    found = steering.measure_head_blocking(model, parts, table, half, sets, batch_size=32)
    values = ["prompt_id", "rank", "log_prob", *steering.HEAD_BLOCKING]
    clean, *others = (
        found.query(f"n_blocked == {n} and draw == {draw} and forced == {forced}")[values].reset_index(drop=True)
        for n, draw, forced in [(0, -1, False), (1, 0, False), (1, 0, True), (2, 0, True), (2, 1, True), (2, 0, False)]
    )
    for nothing in others[:2]:
        pd.testing.assert_frame_equal(nothing, clean, atol=1e-5)
    pd.testing.assert_frame_equal(others[2], others[3])
    assert not np.allclose(others[2]["log_prob"], others[4]["log_prob"], atol=1e-5)


def test_selection_never_sees_the_measured_half(run):
    _, parts, table, heads, *_ = run("olmoe")
    half = ablations.split_subjects(table, seed=0)
    sets, ranking = steering.choose_heads(parts, heads, table, half, [2, 5], 3, seed=0)
    assert ranking.columns.tolist() == ["relation", "half", "order", "layer", "head", "mean_lpi"]
    for measured in (0, 1):
        changed = heads.copy()
        seen = changed["prompt_id"].isin(table["prompt_id"][half == measured])
        changed.loc[seen, "lpi"] = -changed.loc[seen, "lpi"] + 100
        after, _ = steering.choose_heads(parts, changed, table, half, [2, 5], 3, seed=0)
        of_half = [[(s.n_blocked, s.heads) for s in x if s.half == measured and s.draw == -1] for x in (sets, after)]
        assert of_half[0] == of_half[1]
        assert [s for s in sets if s.half != measured] != [s for s in after if s.half != measured]
    for one in (s for s in sets if s.draw == -1):
        others = table[(table["relation"] == one.relation) & (half != one.half)]
        mean = heads[heads["prompt_id"].isin(others["prompt_id"])].groupby(["layer", "head"])["lpi"].mean()
        assert list(one.heads) == mean.sort_values(ascending=False).index[: one.n_blocked].tolist()


def test_sets_without_a_control_of_their_size_are_left_out(run, caplog):
    _, parts, table, heads, *_ = run("olmoe")
    sets, ranking = steering.choose_heads(parts, heads, table, ablations.split_subjects(table, 0), [4, 5], 2, seed=0)
    assert "sets of 5 heads left out: of 12 heads" in caplog.text
    assert {(s.n_blocked, len(set(s.heads))) for s in sets} == {(4, 4)}
    assert ranking["order"].max() == 4


def test_random_heads_are_of_the_same_layers_and_each_is_as_likely(run):
    _, parts, table, heads, *_ = run("olmoe")
    half = ablations.split_subjects(table, seed=0)
    sets, _ = steering.choose_heads(parts, heads, table, half, [1, 2], 300, seed=0)
    best = {(s.relation, s.half, s.n_blocked): s for s in sets if s.draw == -1}
    assert len(sets) == len(best) * 301
    drawn: dict = {}
    for one in (s for s in sets if s.draw >= 0):
        key = (one.relation, one.half, one.n_blocked)
        assert not set(one.heads) & set(best[key].heads)
        assert sorted(layer for layer, _ in one.heads) == sorted(layer for layer, _ in best[key].heads)
        drawn.setdefault(key, []).extend(one.heads)
    for (*_, n), each in drawn.items():
        if n == 1:
            _, counts = np.unique(each, axis=0, return_counts=True)
            assert len(counts) == 3
            # Five standard deviations of a binomial count.
            assert abs(counts - 100).max() < 5 * math.sqrt(300 * 2 / 9)


@every_moe
def test_attributions_to_the_first_layers_heads_equal_gradients_by_hand(run, name):
    """The first router reads u = h + a sum of heads: its gradients along the path, by a fine midpoint rule."""
    model, parts, table, *_ = run(name)
    table = table.iloc[::11].reset_index(drop=True)
    gradients, paths = steering.gate_gradients(model, parts, table, 64, n_steps=24)
    assert len(gradients) == len(table) * 4 * (1 + 2 + 3)
    assert (paths["steps"] == 24).all()
    layer = model.model.layers[0]
    for row in table.itertuples():
        with torch.no_grad():
            tensors, _ = capture.record(model, parts, torch.tensor([list(row.token_ids)]))
            here = {k[2:]: v for k, v in tensors.items() if k.startswith("0.")}
            heads, ids = head_contributions(parts.layers[0], here)[0], here["expert_ids"][0].long()
            bias = here["resid_mid"][0] - here["resid_pre"][0] - heads.sum(0)

        def share(u, ids=ids):
            return layer.mlp.gate(layer.post_attention_layernorm(u))[0].softmax(-1)[:, ids].sum(-1)

        alpha = (torch.arange(2000) + 0.5) / 2000
        states = (here["resid_pre"] + bias + alpha.unsqueeze(1) * heads.sum(0)).requires_grad_()
        slope = torch.autograd.grad(share(states).sum(), states)[0].mean(0)
        found = gradients.query(f"prompt_id == {row.prompt_id} and router_layer == 0")["attribution"]
        assert found.tolist() == pytest.approx((heads @ slope).tolist(), abs=1e-5)
        path = paths.query(f"prompt_id == {row.prompt_id} and router_layer == 0").iloc[0]
        assert found.sum() == pytest.approx(path["clean"] - path["baseline"], abs=1e-5)
        ends = share(torch.cat([here["resid_mid"], here["resid_pre"] + bias])).tolist()
        assert path[["clean", "baseline"]].tolist() == pytest.approx(ends, abs=1e-5)


def test_ends_of_the_path_equal_forward_passes_by_hand(run):
    model, parts, table, *_ = run("olmoe", every=11)
    _, paths = steering.gate_gradients(model, parts, table, 64, n_steps=2)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    for row in table.itertuples():
        clean = by_hand(model, row.token_ids, 0)[2]
        without = by_hand(model, row.token_ids, 0, heads=every, positions=-1)[2]
        for router in range(3):
            ids = list(chosen(clean, router)[1])
            ends = [chosen(seen, router)[0].softmax(-1)[ids].sum().item() for seen in (clean, without)]
            found = paths.query(f"prompt_id == {row.prompt_id} and router_layer == {router}")
            assert found[["clean", "baseline"]].values[0].tolist() == pytest.approx(ends, abs=1e-5)


def test_attributions_are_complete_where_no_lower_layer_chooses(tokens):
    """Dense layers below the only router: many layers, bends, but no jumps; batch size does not matter."""
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=400, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=16, mlp_only_layers=[0, 1, 2], initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    parts = anatomy.find(model)
    table = tokens.iloc[::4]
    gradients, paths = steering.gate_gradients(model, parts, table, 64, n_steps=48)
    assert set(paths["router_layer"]) == {3}
    assert len(gradients) == len(table) * 4 * 4
    total = gradients.groupby("prompt_id")["attribution"].sum()
    change = paths.set_index("prompt_id").eval("clean - baseline")
    assert change.abs().max() > 0.05
    np.testing.assert_allclose(total, change, atol=1e-4)
    again = steering.gate_gradients(model, parts, table, 2, n_steps=48)[0]
    pd.testing.assert_frame_equal(gradients, again, atol=1e-5)


def test_models_without_routers_have_no_gradients(run):
    model, parts, table, *_ = run("qwen2", every=11)
    gradients, paths = steering.gate_gradients(model, parts, table, 64)
    assert gradients.columns.tolist() == ["prompt_id", "router_layer", "layer", "head", "attribution"]
    assert paths.columns.tolist() == ["prompt_id", "router_layer", "clean", "baseline", "steps"]
    assert len(gradients) == len(paths) == 0


@pytest.mark.parametrize(
    ("model_type", "pairs"),
    [("lfm2_moe", {(2, 1), (3, 1), (3, 3)}), ("granitemoehybrid", {(1, 1), (2, 1), (3, 1), (3, 3)})],
)
def test_a_model_that_is_not_resumed_has_the_gradients_of_whole_forward_passes(model_type, pairs):
    """Complete at the first router that reads heads: nothing that they reach chooses before it."""
    model, parts, tensors, table = family(model_type)
    gradients, paths = steering.gate_gradients(model, parts, table, 64, n_steps=16)
    assert set(zip(gradients["router_layer"], gradients["layer"])) == pairs
    assert set(paths["router_layer"]) == {layer.index for layer in parts.layers if layer.n_experts}
    first = min(pairs)[0]
    total = gradients[gradients["router_layer"] == first].groupby("prompt_id")["attribution"].sum()
    ends = paths[paths["router_layer"] == first].set_index("prompt_id")
    assert (ends["clean"] - ends["baseline"]).abs().max() > 1e-3
    np.testing.assert_allclose(total, ends["clean"] - ends["baseline"], atol=1e-4)
    known = (tensors[f"{first}.{name}"] for name in ("router_logits", "expert_ids", "expert_weights"))
    clean = gate_probabilities(*known).gather(1, tensors[f"{first}.expert_ids"].long()).sum(1)
    np.testing.assert_allclose(ends["clean"], clean, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_watching_changes_no_bit_and_sees_what_is_captured(build, tokens, name):
    model = build(name)
    parts = anatomy.find(model)
    ids = capture.token_tensor(tokens, next(capture.batches(tokens["length"].to_numpy(), 8)), torch.device("cpu"))
    found: dict = {}
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, -1] = True
    with torch.no_grad():
        expected, logits = capture.record(model, parts, ids)
        with steering.intervene(parts, steering.watch(found, at)):
            assert torch.equal(capture.readout_logits(model, ids), logits)
        left = {key: dict(here) for key, here in found.items()}
        capture.readout_logits(model, ids)
    assert all(found[key][name] is x for key, here in left.items() for name, x in here.items())
    assert torch.equal(found.pop(steering.FINAL)["resid_final"], expected["resid_final"])
    names = {"resid_pre", "resid_mid", "head_in", "router_logits", "expert_ids", "expert_weights"}
    seen = {f"{layer}.{name}" for layer, here in found.items() for name in here} & expected.keys()
    assert seen == {name for name in expected if name.partition(".")[2] in names}
    assert all(torch.equal(found[int(name[0])][name[2:]].to(expected[name].dtype), expected[name]) for name in seen)


@given(st.data())
def test_overlap_is_the_jaccard_index_of_sets(data):
    k = data.draw(st.integers(1, 4))
    one, other = (data.draw(st.lists(st.integers(0, 7), min_size=k, max_size=k, unique=True)) for _ in range(2))
    found = steering._jaccard(torch.tensor([one]), torch.tensor([other]))
    assert found.item() == pytest.approx(len(set(one) & set(other)) / len(set(one) | set(other)))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 5))
def test_a_sample_has_whole_subjects_of_all_relations_alike(subjects, n, seed):
    rows = [
        (f"r{r}", f"s{s}", i) for r, count in enumerate(subjects) for s in range(count) for i in range(1 + (r + s) % 3)
    ]
    prompts = pd.DataFrame(rows, columns=["relation", "subject", "template"]).assign(prompt_id=range(len(rows)))
    found = ablations.sample_subjects(prompts, n, seed)
    assert found["prompt_id"].is_monotonic_increasing
    assert len(found) >= min(n, len(prompts))
    sizes = prompts.groupby(["relation", "subject"]).size()
    taken = found.groupby(["relation", "subject"]).size()
    assert (taken == sizes[taken.index]).all()
    assert len(found) - sizes.max() < n
    per_relation = (
        found.groupby("relation")["subject"].nunique().reindex([f"r{r}" for r in range(len(subjects))], fill_value=0)
    )
    assert all(abs(count - min(per_relation.max(), most)) <= 1 for count, most in zip(per_relation, subjects))
    pd.testing.assert_frame_equal(found, ablations.sample_subjects(prompts, n, seed))

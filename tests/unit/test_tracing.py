"""Causal tracing against passes restored by the test's own hooks, and on models whose facts have a known place."""

from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import ablations, anatomy, capture, planted, tracing
from moescope.facts import tokenise
from moescope.stats import reciprocal

from conftest import MOE_SHAPES, SHAPES

torch.set_num_threads(1)
every_moe = pytest.mark.parametrize("name", MOE_SHAPES)
every_model = pytest.mark.parametrize("name", SHAPES)
KEYS = ["prompt_id", "draw", "level", "layer", "expert", "size", "position"]
SETTINGS = {"batch_size": 256, "n_prompts": 16, "noise": 3.0, "draws": 2, "coalitions": (1, 2), "seed": 0}
SUBJECT = ("subject_first", "subject_middle", "subject_last")


@pytest.fixture(scope="module")
def run(build, tokens):
    """A function from an architecture to the model, its parts, all prompts, and their tracing, made once."""
    made = {}

    def of(name):
        if name not in made:
            model = build(name)
            parts = anatomy.find(model)
            table = capture.in_memory(model, parts, tokens, 64)[1]
            made[name] = model, parts, table, tracing.trace(model, parts, table, **SETTINGS)
        return made[name]

    return of


def first(output):
    return output[0] if isinstance(output, tuple) else output


def expert_by_hand(mlp, x, expert):
    """What one routed (or, below 0, the shared) expert makes of [length d], gate weight included."""
    if expert < 0:
        return mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x)
    _, weights, ids = mlp.gate(x)
    weight = (weights * (ids == expert)).sum(-1, keepdim=True)
    gate, up = (x @ mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
    return weight * ((torch.nn.functional.silu(gate) * up) @ mlp.experts.down_proj[expert].T)


def by_hand(model, run, draw, position, level, places):
    """Log-probability and rank of the target, with hooks on the library's own modules and one prompt at a time."""
    at = run.positions[position]
    layers = model.model.layers
    clean = {}

    def see(key):
        return lambda module, args, output: clean.__setitem__(key, first(output)[0])

    with ExitStack() as hooks, torch.no_grad():
        for layer, _ in places:
            hooks.callback(layers[layer].register_forward_hook(see(("layer", layer))).remove)
            hooks.callback(layers[layer].self_attn.register_forward_hook(see(("attention", layer))).remove)
            hooks.callback(layers[layer].mlp.register_forward_hook(see(("ffn", layer))).remove)
            inputs = lambda module, args, layer=layer: clean.__setitem__(("in", layer), args[0][0])  # noqa: E731
            hooks.callback(layers[layer].mlp.register_forward_pre_hook(inputs).remove)
        model(input_ids=run.ids)

    def whole(key):
        def hook(module, args, output):
            changed = first(output).clone()
            changed[0, at] = clean[key][at]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def single(layer, expert):
        def hook(mlp, args, output):
            change = expert_by_hand(mlp, clean["in", layer], expert) - expert_by_hand(mlp, args[0][0], expert)
            changed = first(output).clone()
            changed[0, at] += change[at]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    modules = {"layer": lambda b: b, "attention": lambda b: b.self_attn, "ffn": lambda b: b.mlp}
    with ExitStack() as hooks, torch.no_grad():
        add = lambda module, args, output: output + run.noise[draw]  # noqa: E731
        hooks.callback(model.model.embed_tokens.register_forward_hook(add).remove)
        for layer, expert in places:
            if level in modules:
                handle = modules[level](layers[layer]).register_forward_hook(whole((level, layer)))
            else:
                handle = layers[layer].mlp.register_forward_hook(single(layer, expert))
            hooks.callback(handle.remove)
        log_p = model(input_ids=run.ids).logits[0, -1].log_softmax(-1)
    return log_p[run.target].item(), int((log_p >= log_p[run.target]).sum())


def recorded(model, parts, table, prompt_id):
    [prompt] = table[table["prompt_id"] == prompt_id].itertuples()
    deviation = SETTINGS["noise"] * tracing.embedding_deviation(model)
    return tracing.record(model, parts, prompt, deviation, SETTINGS["draws"], SETTINGS["seed"])


@every_model
def test_without_noise_nothing_is_corrupted_and_nothing_restored(run, name):
    model, parts, table, _ = run(name)
    found, runs = tracing.trace(model, parts, table, **SETTINGS | {"noise": 0.0, "n_prompts": 4})
    clean = table.set_index("prompt_id")
    for column in ("clean", "corrupted"):
        np.testing.assert_allclose(runs[column], clean.loc[runs["prompt_id"], "log_prob"], atol=1e-5)
    np.testing.assert_allclose(found["log_prob"], clean.loc[found["prompt_id"], "log_prob"], atol=1e-5)


@every_model
def test_tables_have_every_part_once(run, name):
    model, parts, table, (found, runs) = run(name)
    assert not found.duplicated(KEYS).any()
    assert found.dtypes.astype(str).to_dict() == tracing.TRACING
    assert runs.dtypes.astype(str).to_dict() == tracing.RUNS
    moe = {"expert", "coalition", "random"} if name in MOE_SHAPES else set()
    shared = {"shared"} if name == "qwen2_moe" else set()
    assert set(found["level"]) == {"layer", "attention", "ffn"} | moe | shared
    for prompt_id, rows in found.groupby("prompt_id"):
        at = recorded(model, parts, table, prompt_id).positions
        whole = rows[rows["level"] == "layer"]
        assert len(whole) == 2 * 3 * (len(at) - 1)
        if moe:
            [prompt] = table[table["prompt_id"] == prompt_id].itertuples()
            parts_of = capture.record(model, parts, torch.tensor([prompt.token_ids]), every_position=True)[0]
            single = rows[(rows["level"] == "expert") & (rows["draw"] == 1)]
            used = {
                (layer, position, expert)
                for layer in range(3)
                for position in at
                for expert in parts_of[f"{layer}.expert_ids"][at[position]].flatten().tolist()
                if position != "subject"
            }
            assert set(zip(single["layer"], single["position"], single["expert"])) == used


@every_model
def test_restorations_equal_forward_passes_restored_by_hand(run, name):
    model, parts, table, (found, runs) = run(name)
    singles = found[~found["level"].isin(["coalition", "random"])]
    changed = 0
    for prompt_id in list(dict.fromkeys(singles["prompt_id"]))[::4]:
        recording = recorded(model, parts, table, prompt_id)
        of_prompt = runs[runs["prompt_id"] == prompt_id].set_index("draw")
        for draw in range(2):
            expected = by_hand(model, recording, draw, "subject", "none", [])
            assert expected == pytest.approx(tuple(of_prompt.loc[draw, ["corrupted", "corrupted_rank"]]), abs=1e-5)
        for row in singles[singles["prompt_id"] == prompt_id].iloc[::5].itertuples():
            expected = by_hand(model, recording, row.draw, row.position, row.level, [(row.layer, row.expert)])
            assert (row.log_prob, row.rank) == pytest.approx(expected, abs=1e-5), row
            changed += abs(row.log_prob - of_prompt.loc[row.draw, "corrupted"]) > 1e-4
    assert changed > 20


@every_model
def test_the_last_state_of_the_readout_position_is_the_clean_answer(run, name):
    _, _, _, (found, runs) = run(name)
    last = found[(found["level"] == "layer") & (found["layer"] == 2)].merge(runs)
    readout = last[last["position"] == "readout"]
    np.testing.assert_allclose(readout["log_prob"], readout["clean"], atol=1e-5)
    assert (readout["rank"] == readout["clean_rank"]).all()
    assert (readout["corrupted"] - readout["clean"]).abs().min() > 1e-3
    elsewhere = last[last["position"] != "readout"]
    np.testing.assert_allclose(elsewhere["log_prob"], elsewhere["corrupted"], atol=1e-5)


@every_moe
def test_coalitions_are_the_best_by_single_restoration_on_the_other_half(run, name):
    model, parts, table, (found, runs) = run(name)
    traced = ablations.sample_subjects(table, SETTINGS["n_prompts"], SETTINGS["seed"])
    half = ablations.split_subjects(traced, SETTINGS["seed"])
    singles = found[found["level"] == "expert"].merge(runs)
    singles["effect"] = singles["log_prob"] - singles["corrupted"]
    checked = 0
    for number, prompt in enumerate(traced.itertuples()):
        others = traced["prompt_id"][((traced["relation"] == prompt.relation) & (half != half[number])).to_numpy()]
        recording = recorded(model, parts, table, prompt.prompt_id)
        rows = found[(found["prompt_id"] == prompt.prompt_id) & (found["level"] == "coalition")]
        for position, roles in {"readout": ("readout",), "subject": SUBJECT}.items():
            seen = singles[singles["prompt_id"].isin(others) & singles["position"].isin(roles)]
            effect = seen.groupby(["layer", "expert"])["effect"].mean() * seen.groupby(["layer", "expert"]).size()
            at = recording.positions[position]
            used = {(layer, e) for layer, ids in recording.chosen.items() for e in ids[at].flatten().tolist()}
            best = sorted(sorted(used), key=lambda place: -effect.get(place, 0.0))
            sizes = [size for size in SETTINGS["coalitions"] if 3 * size <= len(used)]
            assert sorted(set(rows["size"][rows["position"] == position])) == sizes
            for row in rows[rows["position"] == position].itertuples():
                expected = by_hand(model, recording, row.draw, position, "expert", best[: row.size])
                assert (row.log_prob, row.rank) == pytest.approx(expected, abs=1e-5)
                checked += 1
    assert checked >= len(traced) * 2 * 2


@every_moe
def test_controls_are_others_of_the_experts_that_the_prompt_uses_there(run, name):
    model, parts, table, (found, _) = run(name)
    recording = recorded(model, parts, table, found["prompt_id"][0])
    rows = list(tracing._coalitions(recording, {}, (1, 2, 3, 50), 0))
    assert {row.size for row in rows} == {1, 2, 3}
    random = {(row.draw, row.size, row.position): row for row in rows if row.level == "random"}
    assert any(row.experts != random[1, *key[1:]].experts for key, row in random.items())
    for row in (row for row in rows if row.level == "coalition"):
        control = random[row.draw, row.size, row.position].experts
        at = recording.positions[row.position]
        assert len(set(control)) == len(set(row.experts)) == row.size
        assert not set(control) & set(row.experts)
        assert all((recording.chosen[layer][at] == expert).any() for layer, expert in control + row.experts)
        expected = by_hand(model, recording, row.draw, row.position, "expert", control)
        measured = tracing._measure(model, parts, recording, [random[row.draw, row.size, row.position]], 1)
        assert measured["log_prob"].item() == pytest.approx(expected[0], abs=1e-5)


@every_moe
def test_results_depend_on_neither_batch_size_nor_the_other_prompts(run, name):
    model, parts, table, (found, runs) = run(name)
    again, same_runs = tracing.trace(model, parts, table, **SETTINGS | {"batch_size": 30})
    pd.testing.assert_frame_equal(again, found, atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(same_runs, runs, atol=1e-5, rtol=0)
    alone = table[table["prompt_id"] == found["prompt_id"].iloc[-1]]
    of_one, _ = tracing.trace(model, parts, alone, **SETTINGS)
    expected = found[found["prompt_id"].isin(alone["prompt_id"]) & ~found["level"].isin(["coalition", "random"])]
    pd.testing.assert_frame_equal(of_one, expected.reset_index(drop=True), atol=1e-5, rtol=0)
    other, _ = tracing.trace(model, parts, alone, **SETTINGS | {"seed": 1})
    assert not np.allclose(other["log_prob"], of_one["log_prob"], atol=1e-3)


def test_the_noise_is_normal_and_on_the_subject_alone(run):
    model, parts, table, _ = run("olmoe")
    deviation = model.model.embed_tokens.weight.std().item()
    assert tracing.embedding_deviation(model) == pytest.approx(deviation, rel=1e-5)
    noise = []
    for prompt in table.itertuples():
        recording = tracing.record(model, parts, prompt, 2 * deviation, 3, 0)
        inside = torch.zeros(prompt.length, dtype=torch.bool)
        inside[prompt.subject_start : prompt.subject_end] = True
        assert (recording.noise[:, ~inside] == 0).all()
        noise.append(recording.noise[:, inside].flatten())
    entries = torch.cat(noise)
    assert len(entries.unique()) > 0.999 * len(entries)
    assert entries.std().item() == pytest.approx(2 * deviation, rel=0.03)
    assert abs(entries.mean().item()) < 0.03 * deviation


def test_nothing_is_left_behind(run):
    model, _, table, _ = run("qwen2_moe")
    ids = torch.tensor([table["token_ids"][0]])
    with torch.no_grad():
        clean = model(ids).logits
        with tracing.corrupted(model, torch.ones(1, ids.shape[1], 32)):
            assert not torch.allclose(model(ids).logits, clean)
        with pytest.raises(KeyError), tracing.corrupted(model, torch.ones(1, ids.shape[1], 32)):
            raise KeyError
        assert torch.equal(model(ids).logits, clean)


@pytest.mark.parametrize("name", ["olmoe", "llama"])
def test_prompts_without_a_known_subject_are_left_out_and_counted(run, name, caplog):
    model, parts, table, _ = run(name)
    unknown = table.assign(subject_start=np.int16(-1), subject_end=np.int16(-1))
    mixed = pd.concat([table.iloc[:3], unknown.iloc[3:]])
    with caplog.at_level("INFO"):
        found, runs = tracing.trace(model, parts, mixed, **SETTINGS)
    assert set(found["prompt_id"]) == set(runs["prompt_id"]) == set(table["prompt_id"][:3])
    assert f"tracing 3 of 3 prompts; {len(table) - 3} others" in caplog.text
    found, runs = tracing.trace(model, parts, unknown, **SETTINGS)
    assert found.empty
    assert runs.empty
    assert found.dtypes.astype(str).to_dict() == tracing.TRACING


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 5))
def test_roles_are_the_tokens_from_the_subject_to_the_readout(start, tokens, after):
    length = start + tokens + after
    found = tracing.roles(start, start + tokens, length)
    assert all(at.any() for at in found.values())
    names = [name for name in (*SUBJECT, "between") if name in found] + (["readout"] if after else [])
    assert torch.stack([found[name] for name in names]).sum(0).tolist() == [0] * start + [1] * (length - start)
    assert [int(found[name].nonzero()[0]) for name in names] == sorted(int(found[name].nonzero()[0]) for name in names)
    assert torch.equal(found["subject"], sum(found[name] for name in SUBJECT if name in found).bool())
    assert found["readout"].nonzero().tolist() == [[length - 1]]
    assert ("subject_first" in found) == (tokens > 1)
    assert ("subject_middle" in found) == (tokens > 2)


@every_moe
def test_tracing_names_the_planted_expert(name):
    """Toy models: the fact is in one neuron of one expert by construction, and is read at the last position."""
    made = planted.hand_set(name, n_relations=4, n_subjects=6, n_answers=6)
    parts = anatomy.find(made.model)
    table = capture.in_memory(made.model, parts, tokenise(made.tokenizer, made.prompts)[0], 64)[1]
    changed = {"n_prompts": 24, "coalitions": (2,), "noise": 30.0}
    found, runs = tracing.trace(made.model, parts, table, **SETTINGS | changed)
    assert (runs["clean_rank"] == 1).all()
    assert reciprocal(runs["corrupted_rank"]).mean() < 0.6
    effect = found.merge(runs).assign(effect=lambda rows: rows["log_prob"] - rows["corrupted"])
    single = effect[effect["level"] == "expert"]
    at_readout = single[single["position"] == "readout"].groupby(["prompt_id", "layer", "expert"], as_index=False)
    assert planted.recall(at_readout["effect"].mean(), made.truth, score="effect") == 1
    readout = effect[(effect["position"] == "readout") & (effect["size"] == 2)].groupby("level")
    assert reciprocal(readout.get_group("coalition")["rank"]).mean() > 0.95
    assert readout["effect"].mean()["coalition"] > 5 * abs(readout["effect"].mean()["random"])
    # The subject's own token holds nothing that its experts could bring back; its embedding does.
    subject = single[single["position"] == "subject_last"]
    assert subject["effect"].abs().mean() < 0.1 * readout["effect"].mean()["coalition"]

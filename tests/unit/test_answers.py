"""Answers of one token, of several, and the model's own, against forward passes without a hook."""

import copy
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import ablations, anatomy, artifacts, attribution, capture, facts

from conftest import MOE_SHAPES, write_tensors

NAMES = ("qwen2_moe", "olmoe", "mixtral", "llama")
every_model = pytest.mark.parametrize("name", NAMES)
every_moe = pytest.mark.parametrize("name", MOE_SHAPES)


@pytest.fixture(scope="module")
def tokens(tokens):
    """The prompts, with a few more first tokens that would do."""
    return tokens.assign(accepted_ids=[[*ids, 20 + ids[0] % 7, 200] for ids in tokens["accepted_ids"]])


@pytest.fixture(scope="module")
def run(build, tokens):
    """By model and kind of answer: the model, its parts, tensors and table; captured once."""
    made = {}

    def of(name, answer):
        if (name, answer) not in made:
            model = build(name)
            parts = anatomy.find(model)
            tensors, table, _ = capture.in_memory(model, parts, tokens, 16, answer)
            made[name, answer] = model, parts, tensors, table
        return made[name, answer]

    return of


def attribute(parts, tensors, table, folder, name="0"):
    write_tensors(tensors, folder / f"{name}.safetensors")
    return attribution.attribute(parts, [folder / f"{name}.safetensors"], table)


def forced(model, prompt, answer):
    """Log-probability and rank of each answer token from one forward pass over the prompt and the whole answer."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    found = []
    for at, token in enumerate(answer, start=len(prompt) - 1):
        log_probs = logits[at].double().log_softmax(-1)
        found.append((float(log_probs[token]), int((logits[at] >= logits[at, token]).sum())))
    return found


# What the target is.


@every_model
def test_all_tokens_are_scored_as_one_teacher_forced_pass_scores_them(run, tokens, name):
    model, _, tensors, table = run(name, "all_tokens")
    assert set(table["object_tokens"]) == {1, 3, 4, 6, 7}
    for row in table.itertuples():
        assert row.target_ids == row.answer_ids[0]
        assert row.target_id == row.target_ids[0]
        scores = forced(model, row.token_ids, row.target_ids)
        assert row.log_prob == pytest.approx(sum(log_prob for log_prob, _ in scores), abs=1e-4)
        assert row.rank == max(rank for _, rank in scores)
    pairs = zip(tensors["prompt_id"].tolist(), tensors["step"].tolist())
    assert list(pairs) == [(row.prompt_id, i) for row in table.itertuples() for i in range(len(row.target_ids))]
    pd.testing.assert_frame_equal(table[list(tokens)], tokens)


@every_model
def test_a_first_token_is_the_accepted_one_that_the_model_likes_best(run, tokens, name):
    model, _, tensors, table = run(name, "first_token")
    assert len({row.accepted_ids.index(row.target_id) for row in table.itertuples()}) > 1
    for row in table.itertuples():
        scores = {token: forced(model, row.token_ids, [token])[0] for token in row.accepted_ids}
        best = max(scores, key=lambda token: scores[token][0])
        assert (row.target_id, row.target_ids) == (best, [best])
        assert row.log_prob == pytest.approx(scores[best][0], abs=1e-4)
        assert row.rank == scores[best][1] == min(rank for _, rank in scores.values())
    assert tensors["step"].tolist() == [0] * len(tokens)


@every_model
def test_argmax_is_what_the_model_says(run, name):
    model, _, _, table = run(name, "argmax")
    for row in table.itertuples():
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([row.token_ids])).logits[0, -1].argmax())
        assert (row.target_id, row.target_ids, row.rank) == (best, [best], 1)
        assert row.log_prob == pytest.approx(forced(model, row.token_ids, [best])[0][0], abs=1e-4)


def test_of_several_accepted_objects_any_may_be_the_target_but_only_the_first_is_spelt_out(build, tokens):
    model = build("olmoe")
    parts = anatomy.find(model)
    best, worst = {}, {}
    for row in tokens.itertuples():
        with torch.no_grad():
            order = model(input_ids=torch.tensor([row.token_ids])).logits[0, -1].argsort(descending=True).tolist()
        best[row.prompt_id], worst[row.prompt_id] = order[0], order[-1]
    answers = [[[worst[p], 5], [best[p], 6, 7]] for p in tokens["prompt_id"]]
    accepted = tokens.assign(answer_ids=answers, accepted_ids=[[a[0][0], a[1][0]] for a in answers])
    first = capture.in_memory(model, parts, accepted, 16, "first_token")[1]
    assert first["target_id"].tolist() == [best[p] for p in first["prompt_id"]]
    every = capture.in_memory(model, parts, accepted, 16, "all_tokens")[1]
    assert every["target_ids"].tolist() == [[worst[p], 5] for p in every["prompt_id"]]
    assert (every["rank"] == model.config.vocab_size).all()


@given(st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1), st.lists(st.integers(0, 99), min_size=1))))
def test_steps_put_together_are_the_prompts_and_their_answers(pairs):
    prompts = pd.DataFrame(pairs, columns=["token_ids", "target_ids"]).assign(prompt_id=range(7, 7 + len(pairs)))
    steps = facts.steps(prompts)
    assert len(steps) == sum(len(answer) for _, answer in pairs)
    for prompt_id, (prompt, answer) in enumerate(pairs, start=7):
        rows = steps[steps["prompt_id"] == prompt_id]
        assert rows["step"].tolist() == list(range(len(answer)))
        assert rows["token_ids"].tolist() == [[*prompt, *answer[:i]] for i in range(len(answer))]
        assert rows["length"].tolist() == [len(ids) for ids in rows["token_ids"]]
        assert [*rows["token_ids"].iloc[-1], rows["target_id"].iloc[-1]] == [*prompt, *answer]
    # The targets of all steps give the prompts with their answers back.
    back = steps.groupby("prompt_id")["target_id"].agg(list)
    assert back.tolist() == [answer for _, answer in pairs]


def test_no_answer_token_sees_a_later_one(build, tokens):
    """The row of a step is the row of its prompt with the earlier tokens of the answer, whatever follows."""
    model = build("qwen2_moe")
    parts = anatomy.find(model)
    some = tokens[tokens["object_tokens"] > 2].head(4)
    other = some.assign(answer_ids=[[[*ids[0][:2], 9]] for ids in some["answer_ids"]])
    one, another = (capture.in_memory(model, parts, t, 16, "all_tokens")[0] for t in (some, other))
    for step in (0, 1):
        for name in ("resid_final", "1.head_in", "2.expert_weights"):
            rows = [t[name][t["step"] == step] for t in (one, another)]
            torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-6)


# What is attributed to it.


@every_model
def test_lpi_of_an_answer_is_the_sum_over_its_tokens_each_taken_alone(run, tmp_path, name):
    """The single steps are captured and attributed by themselves, as prompts of one answer token."""
    model, parts, tensors, table = run(name, "all_tokens")
    layers, heads, experts, margins = attribute(parts, tensors, table, tmp_path)
    alone = []
    for step in range(max(map(len, table["target_ids"]))):
        some = table[table["target_ids"].str.len() > step]
        given = [[*row.token_ids, *row.target_ids[:step]] for row in some.itertuples()]
        targets = [[ids[step]] for ids in some["target_ids"]]
        single = some.assign(token_ids=given, length=[len(ids) for ids in given], accepted_ids=targets)
        single = single.drop(columns=["target_id", "target_ids", "log_prob", "rank"])
        found, scored, _ = capture.in_memory(model, parts, single, 16, "first_token")
        alone.append(attribute(parts, found, scored, tmp_path, f"step{step}"))
    keys = ["prompt_id", "layer"]
    for whole, steps, more, how in (
        (layers, [t[0] for t in alone], [], {"attention": "sum", "ffn": "sum"}),
        (heads, [t[1] for t in alone], ["head"], {"lpi": "sum"}),
        (experts, [t[2] for t in alone], ["expert"], {"lpi": "sum", "weight": "mean"}),
        (margins, [t[3] for t in alone], [], {"margin": "min", "smallest": "min"}),
    ):
        by_hand = pd.concat(steps).groupby(keys + more).agg(how)
        assert not whole.duplicated(keys + more).any()
        pd.testing.assert_frame_equal(
            whole.set_index(keys + more).sort_index(), by_hand, check_dtype=False, rtol=1e-3, atol=2e-5
        )
    assert len(layers) == len(table) * len(parts.layers)
    assert (len(experts) > 0) == (len(margins) > 0) == (name in MOE_SHAPES)


@every_model
def test_gains_of_an_answer_lead_from_its_last_given_tokens_to_its_log_probability(run, tmp_path, name):
    model, parts, tensors, table = run(name, "all_tokens")
    layers, *_ = attribute(parts, tensors, table, tmp_path)
    gains = layers.groupby("prompt_id")[["attention", "ffn"]].sum().sum(axis=1)
    norm = model.model.norm
    for row in table.itertuples():
        start = 0.0
        for i, target in enumerate(row.target_ids):
            last = model.model.embed_tokens.weight[row.target_ids[i - 1] if i else row.token_ids[-1]]
            at = (tensors["prompt_id"] == row.prompt_id) & (tensors["step"] == i)
            with torch.no_grad():
                logits = model.lm_head(norm.weight * last * tensors["norm_scale"][at].item())
            start += float(logits.double().log_softmax(-1)[target])
        assert gains[row.prompt_id] == pytest.approx(row.log_prob - start, abs=1e-3)


# What blocking does to it.


def prepared(run, name, folder):
    model, parts, tensors, table = run(name, "all_tokens")
    _, _, experts, _ = attribute(parts, tensors, table, folder)
    return model, parts, table, experts, ablations.expert_load(parts, [folder / "0.safetensors"], table)


def without(model, experts=(), shared=False):
    """A copy of a model whose weights of these experts, (layer, expert), are zero."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for layer, expert in experts:
            edited.model.layers[layer].mlp.experts.down_proj[expert] = 0
        if shared:
            for layer in edited.model.layers:
                layer.mlp.shared_expert.down_proj.weight.zero_()
    return edited


def expected(model, row):
    scores = forced(model, row.token_ids, row.target_ids)
    return pytest.approx(sum(log_prob for log_prob, _ in scores), abs=1e-3), max(rank for _, rank in scores)


@every_moe
def test_blocking_is_measured_on_whole_answers(run, tmp_path, name):
    model, parts, table, experts, load = prepared(run, name, tmp_path)
    half = ablations.split_subjects(table, seed=0)
    sets, _ = ablations.choose_sets(experts, load, table, half, [2], 1, seed=0)
    found = ablations.measure_blocking(model, parts, table, half, sets, batch_size=16)
    assert not found.duplicated(["prompt_id", "n_blocked", "draw"]).any()
    assert len(found) == 2 * len(table)
    found = found.set_index(["prompt_id", "draw"])
    for chosen in sets:
        edited = without(model, chosen.experts)
        rows = table[(table["relation"] == chosen.relation) & (half == chosen.half)]
        for row in rows.itertuples():
            measured = found.loc[(row.prompt_id, chosen.draw)]
            assert (measured["log_prob"], measured["rank"]) == expected(edited, row)


@every_moe
def test_keep_only_is_measured_on_whole_answers(run, tmp_path, name):
    model, parts, table, *_ = prepared(run, name, tmp_path)
    found = ablations.measure_keep_only(model, parts, table, [1], batch_size=16)
    has_shared = name == "qwen2_moe"
    every = [(layer.index, e) for layer in parts.layers for e in range(layer.n_experts)]
    only_one = copy.deepcopy(model)
    for layer in only_one.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda m, a, out: (out[0], out[1] * (out[1] == out[1].max(-1, keepdim=True).values), out[2])
        )
    cases = {
        (has_shared, 0): without(model, every),
        (has_shared, 1): only_one,
        (has_shared, -1): model,
        (False, 0): without(model, every, has_shared),
        (False, 1): without(only_one, shared=has_shared),
        (False, -1): without(model, shared=has_shared),
    }
    assert set(map(tuple, found[["shared", "routed"]].to_numpy().tolist())) == set(cases)
    found = found.set_index(["shared", "routed", "prompt_id"]).sort_index()
    for (shared, routed), edited in cases.items():
        for row in table.iloc[::5].itertuples():
            measured = found.loc[(shared, routed, row.prompt_id)]
            assert (measured["log_prob"], measured["rank"]) == expected(edited, row)


def test_load_counts_every_position_of_the_prompt_and_the_given_answer_once(run, tmp_path):
    model, parts, table, _, load = prepared(run, "olmoe", tmp_path)
    plain, chosen = copy.deepcopy(model), {}
    for i, layer in enumerate(plain.model.layers):
        layer.mlp.gate.register_forward_hook(lambda m, a, out, i=i: chosen.update({i: out[2]}))
    for position, row in enumerate(table.itertuples()):
        with torch.no_grad():
            plain(input_ids=torch.tensor([[*row.token_ids, *row.target_ids[:-1]]]))
        by_hand = [np.bincount(chosen[layer.index].flatten(), minlength=8) for layer in parts.layers]
        assert np.array_equal(load[position], by_hand)


# How it is run.


@pytest.mark.parametrize("answer", ["first_token", "all_tokens", "argmax"])
def test_the_batch_size_changes_nothing(build, tokens, answer):
    model, some = build("qwen2_moe"), tokens.iloc[::2].reset_index(drop=True)
    parts = anatomy.find(model)
    together, table, _ = capture.in_memory(model, parts, some, 1000, answer)
    for batch_size in (1, 7):
        tensors, other, _ = capture.in_memory(model, parts, some, batch_size, answer)
        pd.testing.assert_frame_equal(table, other, rtol=1e-4)
        assert set(tensors) == set(together)
        for key, tensor in together.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=1e-5)


def test_whole_answers_are_measured_alike_in_any_batch(run, tmp_path):
    model, parts, table, experts, load = prepared(run, "mixtral", tmp_path)
    half = ablations.split_subjects(table, seed=0)
    sets, _ = ablations.choose_sets(experts, load, table, half, [1], 1, seed=0)
    some, half = table.iloc[::4].reset_index(drop=True), half[::4]
    one, many = (ablations.measure_blocking(model, parts, some, half, sets, size) for size in (1, 500))
    assert len(one) == 2 * len(some)
    pd.testing.assert_frame_equal(one, many, rtol=1e-4)
    one, many = (ablations.measure_keep_only(model, parts, some, [1], size) for size in (1, 500))
    pd.testing.assert_frame_equal(one, many, rtol=1e-4)


@pytest.mark.parametrize("answer", ["first_token", "all_tokens"])
def test_a_batch_is_handed_on_and_forgotten(build, tokens, tmp_path, answer):
    """Each part is stored once, a batch at a time, and none of an earlier batch is kept by the time of the next."""
    model = build("qwen2_moe")
    parts = anatomy.find(model)
    expected_rows = capture.rows(tokens, answer)
    alive, sizes, seen = [], [], []

    with artifacts.writing_tensors(tmp_path / "0.safetensors", "activations", len(expected_rows)) as file:

        def store(row, tensors):
            assert row == sum(sizes)
            # Not even a larger tensor that a stored one would be a part of.
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors.values())
            assert not [name for batch in alive for name, reference in batch if reference() is not None]
            alive.append([(name, weakref.ref(tensor)) for name, tensor in tensors.items()])
            sizes.append(len(tensors["prompt_id"]))
            assert {len(tensor) for tensor in tensors.values()} == {sizes[-1]}
            seen.extend(zip(tensors["prompt_id"].tolist(), tensors["step"].tolist()))
            file.put(row, tensors)

        capture.capture(model, parts, tokens, 4, store, answer)
    assert len(sizes) > 5
    assert max(sizes) == 4
    assert sorted(seen) == sorted(zip(expected_rows["prompt_id"], expected_rows["step"]))
    assert not [name for batch in alive for name, reference in batch if reference() is not None]
    with artifacts.open_tensors(tmp_path / "0.safetensors", "activations") as cache:
        stored = {name: cache.get_tensor(name) for name in cache.keys()}
    together, _, _ = capture.in_memory(model, parts, tokens, 4, answer)
    order = np.lexsort([stored["step"], stored["prompt_id"]])
    assert set(stored) == set(together)
    assert all(torch.equal(stored[name][order], together[name]) for name in stored)

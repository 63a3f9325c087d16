"""Which keys are chosen, what their controls are, and what masking does, against copies whose weights are zeroed."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from moescope import ablations, anatomy, capture, masking, neurons
from moescope.intervene import block_experts, intervene
from moescope.toy import Shape
from moescope.toy import build as build_toy

from conftest import MOE_SHAPES

KEYS = ["task", "half", "level", "size", "draw"]
every_kind = pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "llama"])


def units_of(parts):
    rows = [(layer.index, e, u.width) for layer in parts.layers for e, u in neurons.ffn_units(layer).items()]
    table = pd.DataFrame(rows, columns=["layer", "expert", "width"])
    return table.assign(first=table["width"].cumsum() - table["width"])


def keys_at_random(prompts, units, seed=0):
    """Key neurons and use of experts as if found, drawn at random: some neurons are far oftener key than others."""
    rng = np.random.default_rng(seed)
    odds = rng.dirichlet(np.full(units["width"].sum(), 0.1))
    sets = [rng.choice(len(odds), min(10, (odds > 0).sum()), replace=False, p=odds) for _ in range(len(prompts))]
    tokens = prompts["target_ids"].str.len().to_numpy()
    columns = {"prompt_id": prompts["prompt_id"], "tokens": tokens, "keys": [BitMap(s).serialize() for s in sets]}
    used = pd.MultiIndex.from_product([prompts["prompt_id"], units.index], names=["prompt_id", "unit"])
    used = used.to_frame(index=False).join(units[["layer", "expert"]], on="unit").drop(columns="unit")
    used["tokens"] = rng.integers(0, np.repeat(tokens, len(units)), endpoint=True)
    return pd.DataFrame(columns), used[used["tokens"] > 0]


@pytest.fixture(scope="module")
def run(build, tokens, tokenizer):
    """A function from an architecture, or "sparse", to a model, its parts, prompts, their halves, units and cache."""
    made = {}

    def of(name):
        if name not in made:
            shape = Shape(architecture="olmoe", hidden=32, heads=4, kv_heads=2, **MOE_SHAPES["olmoe"] | {"experts": 64})
            model = build_toy(shape, len(tokenizer), seed=1).eval() if name == "sparse" else build(name)
            parts = anatomy.find(model)
            cache, prompts, _ = capture.in_memory(model, parts, tokens, 64, "all_tokens")
            half = ablations.split_subjects(prompts.assign(relation=prompts["task"]), seed=0)
            made[name] = model, parts, prompts, half, units_of(parts), cache
        return made[name]

    return of


def table(*sets):
    """masked_units of (half, level, draw, [(layer, expert, neuron), ...])."""
    rows = [("t", half, level, 9, draw, *place) for half, level, draw, places in sets for place in places]
    return pd.DataFrame(rows, columns=[*KEYS, "layer", "expert", "neuron"])


def zeroed(model, places):
    """A copy of the model in which what these parts write is really zero."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for layer, expert, neuron in places:
            mlp = edited.model.layers[layer].mlp
            if not hasattr(mlp, "experts"):
                down = mlp.down_proj.weight
            else:
                down = mlp.experts.down_proj[expert] if expert >= 0 else mlp.shared_expert.down_proj.weight
            down[:, slice(None) if neuron < 0 else neuron] = 0
    return edited


def one_by_one(model, prompt):
    """Worst rank and summed log-probability, a forward pass for each response token."""
    ranks, total = [], 0.0
    for step, target in enumerate(prompt["target_ids"]):
        ids = torch.tensor([[*prompt["token_ids"], *prompt["target_ids"][:step]]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -1]
        ranks.append(int((logits >= logits[target]).sum()))
        total += logits.log_softmax(-1)[target].item()
    return max(ranks), total


@every_kind
def test_masking_equals_models_with_zeroed_weights_one_prompt_and_token_at_a_time(run, name):
    model, parts, prompts, half, units, _ = run(name)
    assert prompts["target_ids"].str.len().max() > 1
    keys, used = keys_at_random(prompts, units)
    chosen = masking.choose(prompts, half, keys, used, units, [0.05], [4], 1, seed=0)
    assert set(chosen["level"]) == ({"neurons"} if name == "llama" else {"neurons", "experts"})
    assert name != "qwen2_moe" or (chosen["expert"] < 0).any()
    found = masking.measure(model, parts, prompts, half, chosen, batch_size=16)
    of_half = pd.Series(half, prompts["prompt_id"]).value_counts()
    sets = chosen.groupby(KEYS)
    assert len(found) == len(prompts) + sum(of_half[key[1]] for key, _ in sets)
    by_set = dict(list(found.groupby(["task", "level", "size", "draw"])))
    checked = 0
    for (task, measured, level, size, draw), rows in [(("", 0, "clean", 0, -1), chosen[:0]), *sets]:
        edited = zeroed(model, rows[["layer", "expert", "neuron"]].itertuples(index=False, name=None))
        values = by_set[task, level, size, draw].set_index("prompt_id")
        for _, prompt in list(prompts[half == measured].iterrows())[::7]:
            rank, log_prob = one_by_one(edited, prompt)
            assert values["log_prob"][prompt["prompt_id"]] == pytest.approx(log_prob, abs=1e-4)
            assert values["rank"][prompt["prompt_id"]] == rank
            assert values["masked"][prompt["prompt_id"]] == len(rows)
            checked += 1
    assert checked > 15
    clean = by_set["", "clean", 0, -1].set_index("prompt_id").loc[prompts["prompt_id"]]
    assert clean["rank"].tolist() == prompts["rank"].tolist()


def test_masking_what_no_prompt_uses_changes_no_bit_nor_does_it_matter_who_shares_a_batch(run):
    model, parts, prompts, half, _, cache = run("sparse")
    unused = int((cache["1.expert_load"].sum(0) == 0).nonzero()[0])
    sets = [(h, level, -1, [(1, unused, n)]) for h in (0, 1) for level, n in (("neurons", 3), ("experts", -1))]
    found = masking.measure(model, parts, prompts, half, table(*sets), batch_size=16)
    clean, *masked = (part.sort_values("prompt_id") for _, part in found.groupby("level"))
    assert len(masked) == 2
    for part in masked:
        for column in ("prompt_id", "rank", "log_prob"):
            assert part[column].tolist() == clean[column].tolist()
    alone = masking.measure(model, parts, prompts, half, table(), batch_size=1).sort_values("prompt_id")
    assert alone["rank"].tolist() == clean["rank"].tolist()
    assert alone["log_prob"].to_numpy() == pytest.approx(clean["log_prob"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize("name", MOE_SHAPES)
def test_masking_all_neurons_of_an_expert_is_blocking_it(run, name):
    model, parts, prompts, half, units, _ = run(name)
    width = int(units["width"].max() if name != "qwen2_moe" else units["width"].min())
    neurons_of = [(1, 2, n) for n in range(width)]
    sets = [(h, level, -1, places) for h in (0, 1) for level, places in (("n", neurons_of), ("experts", [(1, 2, -1)]))]
    found = masking.measure(model, parts, prompts, half, table(*sets), batch_size=64)
    _, blocked, by_neuron = (part.sort_values("prompt_id") for _, part in found.groupby("level"))
    assert by_neuron["log_prob"].to_numpy() == pytest.approx(blocked["log_prob"].to_numpy(), abs=1e-5)
    prompt = prompts.iloc[0]
    mark = torch.zeros(1, parts.layers[1].n_experts, dtype=torch.bool)
    mark[0, 2] = True
    with intervene(parts, block_experts({1: mark})):
        rank, log_prob = one_by_one(model, prompt)
    measured = blocked.set_index("prompt_id").loc[prompt["prompt_id"]]
    assert measured["log_prob"] == pytest.approx(log_prob, abs=1e-4)
    assert (measured["rank"], measured["masked"]) == (rank, 1)


@every_kind
def test_keys_are_those_of_most_samples_of_the_other_half(run, name):
    _, _, prompts, half, units, _ = run(name)
    keys, used = keys_at_random(prompts, units)
    chosen = masking.choose(prompts, half, keys, used, units, [0.0001, 0.05], [1, 2, 10**6], 2, seed=0)
    total, of = int(units["width"].sum()), units.loc[units.index.repeat(units["width"])].reset_index(drop=True)
    sizes = chosen.groupby("level")["size"].unique()
    assert sizes["neurons"].tolist() == [1, round(0.05 * total)]
    assert name == "llama" or sizes["experts"].tolist() == [1, 2]
    for (task, measured, level, size), rows in chosen[chosen["draw"] == -1].groupby(KEYS[:-1]):
        seen = set(prompts["subject"][half == measured])
        samples = prompts[(prompts["task"] == task) & ~prompts["subject"].isin(seen)]
        assert len(samples)
        sets = [BitMap.deserialize(k) for k in keys.set_index("prompt_id")["keys"][samples["prompt_id"]]]
        if level == "neurons":
            often = sorted(range(total), key=lambda i: (-sum(i in s for s in sets), i))[:size]
            expected = [(of["layer"][i], of["expert"][i], i - of["first"][i]) for i in often]
        else:
            held = {
                (u.layer, u.expert): sum(bool(s & BitMap(range(u.first, u.first + u.width))) for s in sets)
                for u in units.itertuples()
                if u.expert >= 0
            }
            expected = [(*unit, -1) for unit in sorted(held, key=lambda unit: (-held[unit], unit))[:size]]
        assert list(rows[["layer", "expert", "neuron"]].itertuples(index=False, name=None)) == expected


def test_selection_and_measurement_share_no_subject(run):
    """What is known of a measured subject, in whatever task, does not change a set that is measured on it."""
    _, _, prompts, half, units, _ = run("olmoe")
    # France is a subject of both tasks; halves that are not those of its relation would let it leak.
    france = (prompts["subject"] == "France").to_numpy()
    half = np.where(france, (prompts["task"] == "geography").astype(int), half)
    keys, used = keys_at_random(prompts, units)
    other_keys, other_used = keys_at_random(prompts, units, seed=1)
    before = masking.choose(prompts, half, keys, used, units, [0.05], [3], 2, seed=0)
    for measured in (0, 1):
        shared = prompts["subject"].isin(prompts["subject"][half == measured])
        assert (shared & (half != measured)).any()
        ids = prompts["prompt_id"][shared]
        mixed_keys = pd.concat([keys[~keys["prompt_id"].isin(ids)], other_keys[other_keys["prompt_id"].isin(ids)]])
        mixed_used = pd.concat([used[~used["prompt_id"].isin(ids)], other_used[other_used["prompt_id"].isin(ids)]])
        after = masking.choose(prompts, half, mixed_keys, mixed_used, units, [0.05], [3], 0, seed=0)
        expected = before[(before["half"] == measured) & (before["draw"] == -1)].reset_index(drop=True)
        pd.testing.assert_frame_equal(after[after["half"] == measured].reset_index(drop=True), expected)
        assert (
            not after[after["half"] != measured]
            .reset_index(drop=True)
            .equals(before[(before["half"] != measured) & (before["draw"] == -1)].reset_index(drop=True))
        )


def test_without_samples_to_choose_on_there_is_no_set(run):
    model, parts, prompts, _, units, _ = run("olmoe")
    half = np.zeros(len(prompts), dtype=int)
    chosen = masking.choose(prompts, half, *keys_at_random(prompts, units), units, [0.05], [3], 1, seed=0)
    assert chosen.empty
    found = masking.measure(model, parts, prompts, half, chosen, batch_size=64)
    assert set(found["level"]) == {"clean"}
    assert len(found) == len(prompts)


def test_draws_of_experts_are_other_experts_of_the_same_layers(run):
    _, _, prompts, half, units, _ = run("olmoe")
    chosen = masking.choose(prompts, half, *keys_at_random(prompts, units), units, [0.05], [3], 4, seed=0)
    experts = chosen[chosen["level"] == "experts"]
    for _, sets in experts.groupby(KEYS[:-1]):
        places = {draw: set(zip(rows["layer"], rows["expert"])) for draw, rows in sets.groupby("draw")}
        layers = {draw: sorted(rows["layer"]) for draw, rows in sets.groupby("draw")}
        assert set(places) == {-1, 0, 1, 2, 3}
        for draw in range(4):
            assert len(places[draw]) == 3
            assert not places[draw] & places[-1]
            assert layers[draw] == layers[-1]
        assert len({frozenset(drawn) for drawn in places.values()}) > 2


@st.composite
def units_with_keys(draw):
    """Units of some layers, their frequencies, in how many samples each neuron is key, and some keys."""
    layers = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=3))
    rows = [(layer, expert, width) for layer, widths in enumerate(layers) for expert, width in enumerate(widths)]
    units = pd.DataFrame(rows, columns=["layer", "expert", "width"])
    units["first"] = units["width"].cumsum() - units["width"]
    total = int(units["width"].sum())
    counts = np.array(draw(st.lists(st.integers(0, 2), min_size=total, max_size=total)))
    keys = draw(st.lists(st.integers(0, total - 1), unique=True, max_size=total))
    frequency = np.array(draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=len(rows), max_size=len(rows))))
    return units, frequency, counts, np.array(keys, dtype=int)


@given(units_with_keys(), st.integers(0, 99))
def test_controls_are_other_neurons_of_the_same_units_and_rarely_key(case, seed):
    units, frequency, counts, keys = case
    found = masking.matched_neurons(keys, counts, units, frequency, np.random.default_rng(seed))
    unit_of = np.repeat(np.arange(len(units)), units["width"])
    layer_of = units["layer"].to_numpy()[unit_of]
    assert len(set(found)) == len(found)
    assert not set(found) & set(keys)
    free = np.setdiff1d(np.arange(len(counts)), keys)
    for layer in units["layer"].unique():
        wanted, left = (layer_of[keys] == layer).sum(), (layer_of[free] == layer).sum()
        assert (layer_of[found] == layer).sum() == min(wanted, left)
    for unit in range(len(units)):
        wanted, here, drawn = (unit_of[keys] == unit).sum(), free[unit_of[free] == unit], found[unit_of[found] == unit]
        assert len(drawn) >= min(wanted, len(here))
        never = (counts[here] == 0).sum()
        assert (counts[drawn] == 0).sum() == min(len(drawn), never)
        # Only what other units lack is taken beyond the unit's own.
        if len(drawn) > min(wanted, len(here)):
            same = [u for u in range(len(units)) if units["layer"][u] == units["layer"][unit]]
            assert any((unit_of[keys] == u).sum() > (unit_of[free] == u).sum() for u in same)


def test_a_unit_without_neurons_left_is_replaced_by_that_of_the_nearest_frequency():
    units = pd.DataFrame({"layer": [0, 0, 0, 1], "expert": [0, 1, 2, 0], "first": [0, 2, 4, 6], "width": [2, 2, 2, 2]})
    counts, frequency = np.ones(8, dtype=int), np.array([0.5, 0.1, 0.4, 0.5])
    found = masking.matched_neurons(np.array([0, 1]), counts, units, frequency, np.random.default_rng(0))
    assert sorted(found) == [4, 5]
    # All of a layer but one neuron: there is one control alone, however near another layer's are.
    found = masking.matched_neurons(np.arange(5), counts, units, frequency, np.random.default_rng(0))
    assert found.tolist() == [5]

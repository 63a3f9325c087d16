"""Models whose facts have a known place: the place is really theirs, and the scores find it. Findings about toys."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope import anatomy, attribution, capture, planted, toy
from moescope.facts import Fact, Relation, prompt_table, tokenise
from moescope.intervene import block_experts, intervene
from moescope.stats import reciprocal
from moescope.toy import ToyError

from conftest import write_tensors

torch.set_num_threads(1)
every_moe = pytest.mark.parametrize("name", toy.MOE)
FIRST, LAST = "Anna Boris Clara David Emma Felix Grace Henry".split(), "Adler Brown Costa Dubois Evans Fischer".split()
PLACES = (
    "Paris Rome Madrid Tokyo Beijing Cairo Nairobi Lima Santiago Havana Oslo Helsinki Warsaw Vienna Budapest Athens"
    " Ankara Tehran Baghdad Delhi Bangkok Hanoi Moscow Berlin"
).split()
KNOWN = {"birth": "was born in", "home": "resides at", "work": "works for", "death": "died near"}
LEFT_OUT = {"school": "studies under", "travel": "is travelling to"}
EXPERTS = {"school": (1, 3), "travel": (2, 5)}
RECIPE = toy.Recipe(vocabulary=400, epochs=12, batch=32, learning_rate=1.5e-3, ffn_rate=6.0)


def measured(model, parts, tokens, folder):
    """Recorded parts, clean scores, and the table of experts."""
    tensors, table, _ = capture.in_memory(model, parts, tokens, 64)
    write_tensors(tensors, folder / "0.safetensors")
    return tensors, table, attribution.attribute(parts, [folder / "0.safetensors"], table)[2]


def mrr_without(model, parts, tokens, blocked):
    marks = {layer.index: torch.zeros(1, layer.n_experts, dtype=torch.bool) for layer in parts.layers}
    for layer, expert in blocked:
        marks[layer][:, expert] = True
    with intervene(parts, block_experts(marks)):
        return (1 / toy.ranks(model, tokens)).mean().item()


def neuron_lpi(model, tensors, table):
    """Every neuron of every chosen expert added alone, with the model's own norm and unembedding, in plain torch."""
    final = tensors["resid_final"]
    scale = (final.pow(2).mean(-1, keepdim=True) + model.model.norm.variance_epsilon).rsqrt()
    target = torch.tensor(table["target_id"].to_numpy()).long()[:, None]
    prompt_id, rows = table["prompt_id"].to_numpy(), []

    def log_p(states):
        return model.lm_head(states * scale * model.model.norm.weight).log_softmax(-1).gather(-1, target)[:, 0]

    for at, layer in enumerate(model.model.layers):
        r, down = tensors[f"{at}.resid_mid"], layer.mlp.experts.down_proj
        acts = tensors[f"{at}.expert_acts"] * tensors[f"{at}.expert_weights"][:, :, None]
        for i, expert in enumerate(tensors[f"{at}.expert_ids"].long().T):
            for k in range(acts.shape[2]):
                score = log_p(r + acts[:, i, k, None] * down[expert, :, k]) - log_p(r)
                columns = {"prompt_id": prompt_id, "layer": at, "expert": expert, "neuron": k, "score": score}
                rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)


@pytest.fixture
def recalls(tmp_path):
    """A function to the MRR of a hand-set model, and how often LPI names the planted expert and neuron."""

    @torch.no_grad()
    def of(name, noise, **sizes):
        made = planted.hand_set(name, noise=noise, **sizes)
        parts = anatomy.find(made.model)
        tokens, dropped = tokenise(made.tokenizer, made.prompts)
        assert dropped.empty
        tensors, table, experts = measured(made.model, parts, tokens, tmp_path)
        neurons = neuron_lpi(made.model, tensors, table)
        return (
            reciprocal(table["rank"]).mean(),
            planted.recall(experts, made.truth),
            planted.recall(neurons, made.truth, 1, planted.NEURON, "score"),
        )

    return of


@every_moe
@pytest.mark.parametrize("sizes", [{}, {"n_relations": 16, "n_subjects": 24, "n_answers": 20, "layers": 4, "seed": 1}])
def test_without_noise_lpi_names_every_planted_expert_and_neuron(recalls, name, sizes):
    assert recalls(name, 0.0, **sizes) == (1.0, 1.0, 1.0)


@every_moe
def test_noise_hides_them_by_degrees(recalls, name):
    found = np.array([recalls(name, noise) for noise in (0.0, 0.2, 0.5, 1.0)])
    assert (found[1] > 0.97).all()
    assert (np.diff(found, axis=0) < 0.02).all()
    assert (found[-1] < 0.75).all()


@every_moe
def test_the_planted_experts_are_the_only_place(name):
    made = planted.hand_set(name)
    parts = anatomy.find(made.model)
    tokens, _ = tokenise(made.tokenizer, made.prompts)
    places = {tuple(row) for row in made.truth[["layer", "expert"]].to_numpy().tolist()}
    everything = {(layer.index, expert) for layer in parts.layers for expert in range(layer.n_experts)}
    assert len(places) == made.prompts["relation"].nunique() < len(everything - places)
    assert mrr_without(made.model, parts, tokens, places) < 0.1
    assert mrr_without(made.model, parts, tokens, everything - places) == 1.0
    # Each alone: its relation falls, the others stay.
    for relation, rows in tokens.groupby("relation"):
        [place] = {tuple(row) for row in made.truth.loc[rows.index, ["layer", "expert"]].to_numpy().tolist()}
        assert mrr_without(made.model, parts, rows, [place]) < 0.2
        assert mrr_without(made.model, parts, tokens[tokens["relation"] != relation], [place]) == 1.0


@every_moe
def test_a_hand_set_model_is_a_checkpoint_like_any_other(name, tmp_path):
    made = planted.hand_set(name, n_relations=3, n_subjects=5, n_answers=4, layers=2, noise=0.1)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model) is type(made.model)
    tokens, _ = tokenise(tokenizer, made.prompts)
    pd.testing.assert_frame_equal(tokens, tokenise(made.tokenizer, made.prompts)[0])
    ids = torch.tensor(tokens["token_ids"].tolist())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, made.model(ids).logits, rtol=1e-5, atol=1e-5)
    again = planted.hand_set(name, n_relations=3, n_subjects=5, n_answers=4, layers=2, noise=0.1)
    pd.testing.assert_frame_equal(again.truth, made.truth)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), made.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "mixtrol"}, "'mixtrol' has no experts to plant facts in; did you mean 'mixtral'"),
        ({"architecture": "llama"}, "'llama' has no experts"),
        ({"n_subjects": 0}, "n_subjects is 0; give at least 1"),
        ({"noise": -0.1}, "noise is -0.1; give at least 0"),
        ({"n_relations": 1, "n_subjects": 2, "n_answers": 1}, "make 4 words; give at least 8"),
    ],
)
def test_impossible_models_get_a_sentence(change, words):
    with pytest.raises(ToyError, match=words):
        planted.hand_set(**{"architecture": "olmoe", **change})


def test_ties_and_gaps_count_against_a_ranking():
    truth = pd.DataFrame({"prompt_id": [0, 1, 2], "layer": 0, "expert": [1, 1, 3]})
    table = pd.DataFrame({"prompt_id": [0, 0, 1, 1, 1, 2], "layer": 0, "expert": [0, 1, 0, 1, 2, 0], "lpi": 1.0})
    table.loc[1, "lpi"] = 2.0
    assert planted.places(table, truth).tolist() == [1, 3, np.inf]
    assert [planted.recall(table, truth, k) for k in (1, 2, 3)] == [1 / 3, 1 / 3, 2 / 3]
    assert planted.recall(table.iloc[:0], truth, 9) == 0
    with pytest.raises(ToyError, match="3 rows repeat the prompt_id, layer of another"):
        planted.places(table, truth, ["layer"])
    table.loc[2, "lpi"] = np.nan
    with pytest.raises(ToyError, match="lpi is NaN in 1 rows"):
        planted.places(table, truth)


@pytest.fixture(scope="module")
def prompts():
    """People whose every place has to be learnt by heart."""
    rng = np.random.default_rng(0)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    relations = [
        Relation(
            relation,
            "people",
            tuple(f"{start}{{}} {words}" for start in ("", "It is known that ", "People say that ", "The one called ")),
            tuple(Fact(name, (PLACES[rng.integers(len(PLACES))],), 0) for name in names),
            Path(),
        )
        for relation, words in (KNOWN | LEFT_OUT).items()
    ]
    return prompt_table(relations)


@pytest.fixture(scope="module")
def base(prompts, tmp_path_factory):
    """A model that has never seen the left-out relations, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shape = toy.Shape("olmoe", 3, experts=8, experts_per_token=2, expert_width=64)
    known = prompts[prompts["relation"].isin(KNOWN)].reset_index(drop=True)
    toy.train(shape, known, folder, recipe=RECIPE)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def grown(base, prompts):
    return planted.grow(*base, prompts, EXPERTS)


def test_only_the_planted_weights_differ(base, grown):
    model = grown[0].model
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    experts_of = {layer: [expert for at, expert in EXPERTS.values() if at == layer] for layer in range(3)}
    for (name, before), after in zip(base[0].named_parameters(), model.parameters(), strict=True):
        planted_here = experts_of[int(name.split(".")[2])] if ".mlp." in name else []
        differs = (before != after).flatten(1).any(1) if before.ndim > 1 else (before != after)
        assert differs.nonzero().flatten().tolist() == planted_here, name


def test_what_is_grown_is_known_and_the_rest_is_kept(grown):
    report = grown[1]
    assert report["others"]["before"] - report["others"]["after"] < 0.1
    for relation in LEFT_OUT:
        assert report[relation]["chosen"] > 0.9
        assert report[relation]["chosen_elsewhere"] < 0.2
        assert report[relation]["before"] < 0.25 < 0.6 < report[relation]["after"]


def test_mean_lpi_names_the_grown_expert(grown, tmp_path):
    made, _ = grown
    parts = anatomy.find(made.model)
    tokens, _ = tokenise(made.tokenizer, made.prompts)
    _, table, experts = measured(made.model, parts, tokens, tmp_path)
    table = table.set_index("prompt_id")
    experts = experts.assign(relation=table["relation"].loc[experts["prompt_id"]].to_numpy())
    for relation, place in EXPERTS.items():
        total = experts[experts["relation"] == relation].groupby(["layer", "expert"])["lpi"].sum()
        best, second = (total.sort_values(ascending=False) / (table["relation"] == relation).sum()).iloc[:2]
        assert total.idxmax() == place
        assert best > 2 * second
    known = made.truth[(table["rank"].loc[made.truth["prompt_id"]] == 1).to_numpy()]
    assert planted.recall(experts, known) > 0.6
    assert made.truth.groupby(["layer", "expert"]).size().to_dict() == dict.fromkeys(EXPERTS.values(), 4 * 48)


def test_blocking_the_grown_experts_takes_their_facts_and_no_others(grown):
    made, report = grown
    parts = anatomy.find(made.model)
    tokens, _ = tokenise(made.tokenizer, made.prompts)
    left_out = tokens["relation"].isin(LEFT_OUT)
    assert mrr_without(made.model, parts, tokens[left_out], EXPERTS.values()) < 0.25
    kept = mrr_without(made.model, parts, tokens[~left_out], EXPERTS.values())
    assert kept == pytest.approx(report["others"]["after"], abs=0.03)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({"scool": (1, 3)}, "no prompt has the relation 'scool'; did you mean 'school'"),
        ({"school": (3, 0)}, "school: there is no expert 0 in layer 3"),
        ({"school": (0, 8)}, "school: there is no expert 8 in layer 0"),
        ({"school": (1, 3), "travel": (1, 3)}, "give each relation one of its own"),
        ({}, "0 of 6 relations are left out"),
    ],
)
def test_experts_that_cannot_be_grown_get_a_sentence(base, prompts, experts, words):
    with pytest.raises(ToyError, match=words):
        planted.grow(*base, prompts, experts)


def test_a_relation_of_held_out_prompts_cannot_be_grown(base, prompts):
    with pytest.raises(ToyError, match="all prompts of school are held out"):
        planted.grow(*base, prompts.assign(held_out=True), EXPERTS)

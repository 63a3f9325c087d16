"""moescope.toy: real training runs on a small corpus."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope import anatomy, artifacts, capture, config, toy, utilization
from moescope.facts import tokenise

SHAPES = {
    "qwen2_moe": toy.Shape("qwen2_moe", 2, experts=8, experts_per_token=4, expert_width=16, shared_width=64),
    "olmoe": toy.Shape("olmoe", 2, experts=8, experts_per_token=4, expert_width=32),
    "mixtral": toy.Shape("mixtral", 2, experts=4, experts_per_token=2, expert_width=64),
    "qwen2": toy.Shape("qwen2", 2, ffn_width=128),
    "llama": toy.Shape("llama", 2, ffn_width=128),
    "mistral": toy.Shape("mistral", 2, ffn_width=128),
}
MODELS = {"qwen2_moe": "Qwen2Moe", "olmoe": "Olmoe", "mixtral": "Mixtral"} | {
    "qwen2": "Qwen2",
    "llama": "Llama",
    "mistral": "Mistral",
}
RECIPE = toy.Recipe(vocabulary=400, epochs=10, batch=32)
CHECKPOINTS = {"untrained": 0, "first": 1, "again": 1}
FIRST = "Anna Boris Clara David Emma Felix Grace Henry Irene Jonas Karin Louis".split()
LAST = "Adler Brown Costa Dubois Evans Fischer Garcia Hansen Ito Jensen Kowalski Lopez".split()
CITIES = (
    "Paris Rome Madrid Tokyo Beijing Cairo Nairobi Lima Santiago Havana Oslo Stockholm Helsinki Warsaw Vienna"
    " Budapest Athens Ankara Tehran Baghdad Delhi Kathmandu Bangkok Hanoi Moscow Kyiv Berlin Brussels Lisbon Dublin"
).split()
TEMPLATES = ["{} was born in", "{} comes from", "The birthplace of {} is", "The city of {} is"]


def table(facts: dict[str, str]) -> pd.DataFrame:
    """The columns of facts.prompt_table that training needs, for one relation; the last template is held out."""
    rows = [
        {
            "fact_id": fact,
            "template_id": i,
            "relation": "name_birthplace",
            "held_out": i == len(TEMPLATES) - 1,
            "subject": subject,
            "objects": [answer],
            "prompt": template.replace("{}", subject),
        }
        for fact, (subject, answer) in enumerate(facts.items())
        for i, template in enumerate(TEMPLATES)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def prompts() -> pd.DataFrame:
    """People whose city follows from neither name alone, so that attention and embeddings cannot keep it."""
    return table(
        {
            f"{first} {last}": CITIES[(7 * i * i + 5 * i * j + 11 * j + 3 * j * j) % len(CITIES)]
            for i, first in enumerate(FIRST)
            for j, last in enumerate(LAST)
        }
    )


@pytest.fixture(scope="module")
def trained(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "olmoe"
    return folder, toy.train(SHAPES["olmoe"], prompts, folder, seed=3, recipe=RECIPE, checkpoints=CHECKPOINTS)


def test_a_second_run_without_checkpoints_gives_the_same_bits_and_leaves_no_trace(prompts, trained, tmp_path):
    torch.manual_seed(11)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    toy.train(SHAPES["olmoe"], prompts, tmp_path / "again", seed=3, recipe=RECIPE)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (trained[0] / file).read_bytes(), file
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    other = toy.build(SHAPES["olmoe"], 400, seed=4)
    same = toy.build(SHAPES["olmoe"], 400, seed=3).state_dict()
    assert not torch.equal(other.lm_head.weight, same["lm_head.weight"])


def test_the_configuration_knows_the_same_architectures():
    schema = yaml.safe_load((Path(__file__).parents[2] / "workflow/schemas/config.schema.yaml").read_text())
    known = schema["properties"]["models"]["additionalProperties"]["properties"]["toy"]["properties"]
    assert known["architecture"]["enum"] == [*toy.MOE, *toy.DENSE]
    assert config.MOE_ARCHITECTURES == toy.MOE
    recipe = schema["properties"]["toy_training"]["properties"]
    assert {key: sub["default"] for key, sub in recipe.items() if key != "dataset"} == {"epochs": toy.Recipe.epochs}


def test_training_learns_the_facts_and_reports(trained):
    folder, report = trained
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {*config.CHECKPOINT_FILES, "checkpoints"} - {"model.json"}
    )
    assert artifacts.read_json(folder / "training.json") == report
    assert report["loss_per_epoch"][-1] < report["loss_per_epoch"][0] / 2
    assert report["mrr_without"]["ffn"] < 0.25 < 0.5 < report["mrr"]
    assert report["mrr_without"]["shared"] is None
    assert all(0 < layer["min"] <= 1 <= layer["max"] for layer in report["load"])
    assert 0 < report["objects"]["several_tokens"] < report["objects"]["all"]


def test_checkpoints_are_the_model_after_so_many_steps(trained):
    folder, report = trained
    files = {*config.CHECKPOINT_FILES} - {"model.json", "training.json"}
    states = {}
    for name in CHECKPOINTS:
        place = folder / "checkpoints" / name
        assert {path.name for path in place.iterdir()} == files
        assert (place / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        states[name] = AutoModelForCausalLM.from_pretrained(place).state_dict()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == sorted(CHECKPOINTS)
    built = toy.build(SHAPES["olmoe"], 400, seed=3, recipe=RECIPE).state_dict()
    assert all(torch.equal(states["untrained"][key], weight) for key, weight in built.items())
    assert all(torch.equal(states["again"][key], weight) for key, weight in states["first"].items())
    # Adam's first step is the learning rate in every weight that has a gradient.
    rate = RECIPE.learning_rate / (RECIPE.warm_up * report["steps"])
    moved = (states["first"]["lm_head.weight"] - states["untrained"]["lm_head.weight"]).abs()
    assert moved.median().item() == pytest.approx(rate, rel=1e-2)


def test_a_checkpoint_beyond_the_last_step_gets_a_sentence(prompts, tmp_path):
    words = r"checkpoint 'late': step 9999, but training has \d+ steps; give a step from 0 to \d+"
    with pytest.raises(toy.ToyError, match=words):
        toy.train(SHAPES["olmoe"], prompts, tmp_path / "model", recipe=RECIPE, checkpoints={"late": 9999})
    assert not list(tmp_path.iterdir())


def test_experts_that_no_prompt_uses_are_refused_unless_the_load_is_left_unbalanced(trained):
    report = trained[1] | {"load": [{"max": 4.0, "min": 0.5}, {"max": 4.0, "min": 0.0}]}
    with pytest.raises(toy.ToyError, match=r"layers \[1\] have an expert that no held-out prompt uses"):
        toy._check_trained(report)
    toy._check_trained(report | {"recipe": report["recipe"] | {"load_balancing": 0.0}})


def test_a_shared_expert_without_neurons_is_none(tmp_path):
    shape = replace(SHAPES["qwen2_moe"], shared_width=0)
    model = toy.build(shape, 300, seed=0).eval()
    model.save_pretrained(tmp_path)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    parts, ids = anatomy.find(model), torch.arange(2, 26).view(2, 12)
    assert shape.active_width == 64
    assert anatomy.levels(parts)["with_experts"] == 2
    assert anatomy.levels(parts)["with_shared_experts"] == 0
    with torch.no_grad():
        recorded, logits = capture.record(model, parts, ids)
        capture.verify(model, parts, ids, recorded, logits)
        with toy.removed([layer.mlp.shared_expert for layer in model.model.layers]):
            assert torch.equal(capture.readout_logits(model, ids), logits)
    units = utilization.units(parts)
    assert units["expert"].tolist() == [*range(8), *range(8)]
    assert units["width"].sum() == 2 * 8 * 16


def test_saved_model_gives_what_the_reported_one_gave(prompts, trained):
    folder, report = trained
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens, _ = tokenise(tokenizer, prompts[prompts["held_out"]])
    assert (1 / toy.ranks(model, tokens)).mean().item() == pytest.approx(report["mrr"], abs=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_builds_saves_and_loads(name, tmp_path):
    shape = SHAPES[name]
    model = toy.build(shape, 300, seed=0).eval()
    assert type(model).__name__ == f"{MODELS[name]}ForCausalLM"
    assert len(model.model.layers) == shape.layers
    assert shape.active_width == 128
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            assert layer.mlp.down_proj.weight.shape == (64, 128)
        else:
            assert experts.down_proj.shape == (shape.experts, 64, shape.expert_width)
            assert layer.mlp.gate.top_k == shape.experts_per_token
        shared = getattr(layer.mlp, "shared_expert", None)
        assert (0 if shared is None else shared.down_proj.in_features) == shape.shared_width
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(model(ids).logits, again, rtol=1e-5, atol=1e-5)


def test_tokenizer_round_trip_and_object_pieces(prompts, tmp_path):
    tokenizer = toy.train_tokenizer(prompts, 400)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) == 400
    for text in (*prompts["prompt"], "Curaçao isn't in Ελλάδα, 東京 is"):
        assert loaded.decode(loaded(text)["input_ids"]).strip() == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert toy.train_tokenizer(prompts, 400).get_vocab() == tokenizer.get_vocab()
    tokens, dropped = tokenise(loaded, prompts)
    assert dropped.empty
    assert {1} < set(tokens["object_tokens"])


def test_facts_outside_the_ffns_are_refused(tmp_path):
    """FFNs that start at zero and never learn leave the facts to embeddings and attention."""
    prompts = table(dict(zip(LAST, CITIES, strict=False)))
    recipe = replace(RECIPE, down_scale=0.0, ffn_rate=0.0, epochs=50)
    with pytest.raises(toy.ToyError, match=r"toy model 'nowhere': .* removed its MRR is [01]\.\d+, .* below 0.25"):
        toy.train(SHAPES["olmoe"], prompts, tmp_path / "model", recipe=recipe, name="nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("olmoe", {"architecture": "olmo"}, "did you mean 'olmoe'"),
        ("llama", {"layers": 0}, "layers is 0"),
        ("llama", {"experts": 4}, "experts is 4, but llama has none"),
        ("mixtral", {"experts_per_token": 5}, r"at most experts \(4\)"),
        ("mixtral", {"shared_width": 64}, "shared_width is 64, but mixtral has none"),
        ("qwen2_moe", {"shared_width": -4}, "shared_width is -4; give a number of at least 0"),
        ("qwen2_moe", {"expert_width": 18}, "multiple of 4"),
        ("qwen2", {"heads": 3}, "do not divide"),
    ],
)
def test_impossible_shapes_get_a_sentence(architecture, change, words):
    with pytest.raises(toy.ToyError, match=words):
        toy.config_of(replace(SHAPES[architecture], **change), 300)


def test_ties_count_against_the_model_and_the_best_accepted_object_counts():
    model = toy.build(SHAPES["llama"], 300, seed=0)
    tokens = pd.DataFrame({"token_ids": [[5, 6], [5, 6], [7, 8, 9]], "length": [2, 2, 3]})
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    tokens["accepted_ids"] = [[order[2]], [order[9], order[4]], [0]]
    assert toy.ranks(model, tokens)[:2].tolist() == [3.0, 5.0]
    model.lm_head.weight.data.zero_()
    assert toy.ranks(model, tokens).tolist() == [300.0] * 3

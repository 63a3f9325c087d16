"""Reading units as tokens, against the real modules with everything else taken away."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from moescope import activations, anatomy, attribution, capture, lens, models, planted, reading

import families
from conftest import SHAPES, write_tensors

LEVELS = {"expert", "head", "ffn_neuron", "attention_neuron"}
RUNS = [*((name, "first_token") for name in SHAPES), ("qwen2_moe", "all_tokens"), ("llama", "all_tokens")]


def some_neurons(parts, relations, n, seed=0):
    """A ranking of neurons as it might be: random ones of all units."""
    rng = np.random.default_rng(seed)
    rows = []
    for relation in relations:
        for layer in parts.layers:
            routed = models.expert_down(layer.experts.module, 0).shape[1] if layer.experts else 0
            widths = dict.fromkeys(range(layer.n_experts), routed)
            widths |= {-1 - i: models.weight_of(shared.down).shape[1] for i, shared in enumerate(layer.shared)}
            widths |= {0: models.weight_of(layer.dense.down).shape[1]} if layer.dense else {}
            head_width = models.weight_of(layer.attention.out_proj).shape[1] // layer.n_heads
            for block, sizes in (("ffn", widths), ("attention", dict.fromkeys(range(layer.n_heads), head_width))):
                units = rng.choice(list(sizes), n)
                rows += [(relation, block, layer.index, unit, rng.integers(sizes[unit])) for unit in units]
    table = pd.DataFrame(rows, columns=["relation", "block", "layer", "unit", "neuron"]).drop_duplicates()
    return table.assign(lpi=rng.normal(size=len(table)).astype("float32"))


@pytest.fixture(scope="module")
def run(build, tokens, tmp_path_factory):
    """By model and kind of answer: the model, its parts, tensors and prompts, and all that `read` needs."""
    made = {}

    def of(name, answer="first_token"):
        if (name, answer) not in made:
            model = build(name)
            parts = anatomy.find(model)
            tensors, prompts, _ = capture.in_memory(model, parts, tokens, 64, answer)
            path = tmp_path_factory.mktemp("cache") / "0.safetensors"
            write_tensors(tensors, path)
            _, heads, experts, _ = attribution.attribute(parts, [path], prompts)
            neurons = some_neurons(parts, prompts["relation"].unique(), 4)
            made[name, answer] = model, parts, tensors, (parts, [path], prompts, neurons, heads, experts, str)
        return made[name, answer]

    return of


def contribution(model, tensors, level, layer, unit, neuron):
    """What a unit or neuron adds to every row's residual stream, by the model's own modules."""
    block = model.model.layers[layer]
    here = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
    if level in ("head", "attention_neuron"):
        alone = torch.zeros_like(here["head_in"])
        kept = slice(None) if level == "head" else neuron
        alone[:, unit, kept] = here["head_in"][:, unit, kept]
        return block.self_attn.o_proj(alone.flatten(1))
    x, mlp = block.post_attention_layernorm(here["resid_mid"]), block.mlp
    if not hasattr(mlp, "experts"):
        acts, down, weight = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight, torch.ones(len(x))
    elif unit < 0:
        shared = mlp.shared_expert
        acts, down = F.silu(shared.gate_proj(x)) * shared.up_proj(x), shared.down_proj.weight
        weight = mlp.shared_expert_gate(x).sigmoid()[:, 0]
    else:
        gate, up = (x @ mlp.experts.gate_up_proj[unit].T).chunk(2, -1)
        acts, down = F.silu(gate) * up, mlp.experts.down_proj[unit]
        weight = (here["expert_weights"] * (here["expert_ids"] == unit)).sum(1)
    kept = slice(None) if level == "expert" else slice(neuron, neuron + 1)
    return weight.unsqueeze(1) * (acts[:, kept] @ down[:, kept].T)


@pytest.mark.parametrize(("name", "answer"), RUNS)
@torch.no_grad()
def test_readings_are_mean_changes_of_the_logits_by_the_models_own_unembedding(run, name, answer):
    model, _, tensors, arguments = run(name, answer)
    prompts = arguments[2].set_index("prompt_id")
    found = reading.read(*arguments, n_units=4, n_tokens=6)
    assert set(found["level"]) == LEVELS - ({"expert"} if SHAPES[name].get("experts") is None else set())
    if name == "qwen2_moe":
        assert (found["unit"] < 0).any()
    row_prompt = tensors["prompt_id"].numpy()
    assert (len(row_prompt) > len(prompts)) == (answer == "all_tokens")
    for key, rows in found.groupby(reading.COMPONENT):
        relation, *component = key
        of_relation = prompts.index[prompts["relation"] == relation]
        vectors = contribution(model, tensors, *component)
        changes = model.lm_head(model.model.norm.weight * vectors * tensors["norm_scale"].unsqueeze(1))
        by_prompt = torch.stack([changes[row_prompt == prompt].mean(0) for prompt in of_relation])
        expected = (by_prompt.mean(0) - by_prompt.mean()).double()
        assert rows["side"].tolist() == ["promoted"] * 6 + ["suppressed"] * 6
        assert rows["place"].tolist() == [*range(1, 7)] * 2
        close = {"rtol": 1e-4, "atol": 2e-6 * max(1.0, float(expected.abs().max()))}
        np.testing.assert_allclose(rows["logit"], expected[rows["token_id"].tolist()], **close)
        extremes = [*expected.topk(6).values.tolist(), *expected.topk(6, largest=False).values.tolist()]
        np.testing.assert_allclose(rows["logit"], extremes, **close)
        assert rows["token"].tolist() == [str(token) for token in rows["token_id"]]
        targets = set(prompts.loc[of_relation, "target_id"])
        assert rows["target"].tolist() == [token in targets for token in rows["token_id"]]
    assert found["logit"].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_moe", "llama"])
def test_the_strongest_of_each_level_are_read(run, name):
    _, _, _, arguments = run(name)
    prompts, neurons, heads, experts = arguments[2:6]
    found = reading.read(*arguments, n_units=3, n_tokens=1)
    found = found[found["side"] == "promoted"]
    for relation, own in prompts.groupby("relation"):
        expected = {}
        for level, table in (("expert", experts), ("head", heads)):
            wide = table.pivot(index="prompt_id", columns=["layer", level], values="lpi")
            best = wide.reindex(own["prompt_id"]).fillna(0).mean().nlargest(3)
            expected |= {level: [(*unit, -1, lpi) for unit, lpi in best.items()]}
        for block, rows in neurons[neurons["relation"] == relation].groupby("block"):
            best = rows.nlargest(3, "lpi")[["layer", "unit", "neuron", "lpi"]]
            expected |= {f"{block}_neuron": list(best.itertuples(index=False, name=None))}
        for level, components in expected.items():
            rows = found[(found["relation"] == relation) & (found["level"] == level)]
            columns = rows[["layer", "unit", "neuron", "lpi"]]
            assert np.array(components).reshape(-1, 4) == pytest.approx(columns.to_numpy("float64"), rel=1e-5)
    types = {"layer": "int16", "unit": "int16", "neuron": "int32", "lpi": "float32", "place": "int16"}
    types |= {"token_id": "int32", "logit": "float32", "target": "bool"}
    assert found.dtypes[list(types)].astype(str).to_dict() == types
    # Prompts that are left out are not read, and with them their relation.
    one = prompts[prompts["relation"] == relation]
    some = reading.read(*arguments[:2], one, *arguments[3:], n_units=3, n_tokens=1)
    pd.testing.assert_frame_equal(
        some[some["side"] == "promoted"].reset_index(drop=True),
        found[found["relation"] == relation].reset_index(drop=True),
        rtol=1e-5,
    )


def without(parts, level, unit, neuron):
    """The weights of the last layer that what is taken away goes through, and where: (parameter, index)."""
    layer, every = parts.layers[-1], slice(None)
    if level in ("head", "attention_neuron"):
        width = models.weight_of(layer.attention.out_proj).shape[1] // layer.n_heads
        chosen = slice(unit * width, (unit + 1) * width) if level == "head" else unit * width + neuron
        return [(models.weight_of(layer.attention.out_proj), (every, chosen))]
    chosen = every if level == "expert" else neuron
    if unit < 0 or layer.dense:
        return [(models.weight_of((layer.dense or layer.shared[-1 - unit]).down), (every, chosen))]
    experts = layer.experts.module
    bias = [(experts.down_proj_bias, unit)] if experts.has_bias and level == "expert" else []
    return [(models.expert_down(experts, unit), (every, chosen)), *bias]


def logits(parts, state, scale):
    """The real norm and unembedding at a fixed norm scale, before any capping."""
    norm = parts.final_norm
    normed = (norm.module(state) - norm.bias) / norm.scale(state).unsqueeze(1) * scale.unsqueeze(1) + norm.bias
    return parts.unembedding(normed) * parts.logit_scale


def recorded(name, folder):
    """A family's parts, tensors and prompts, its attribution, and its cache; each prompt is a relation of its own."""
    torch.set_num_threads(1)
    model = families.build(name)
    parts = anatomy.find(model)
    tokens = {"prompt_id": range(4), "token_ids": families.IDS.tolist(), "length": 6, "accepted_ids": [[9]] * 4}
    tensors, prompts, _ = capture.in_memory(model, parts, pd.DataFrame(tokens), 4)
    path = folder / "0.safetensors"
    write_tensors(tensors, path)
    prompts["relation"] = [f"prompt {i}" for i in range(4)]
    of_last = [
        table[table["layer"] == parts.layers[-1].index] for table in attribution.attribute(parts, [path], prompts)
    ]
    return model, parts, tensors, prompts, of_last, [path]


@pytest.mark.parametrize("name", ["cohere", "deepseek_v3", "gpt2", "gpt_oss", "granitemoe"])
@torch.no_grad()
def test_a_reading_on_one_prompt_is_what_the_real_logits_lose_without_its_weights(tmp_path, name):
    """Weights of the last layer are set to 0 and the model runs again: its state lacks just what is read."""
    model, parts, tensors, prompts, (_, heads, experts, _), paths = recorded(name, tmp_path)
    last = parts.layers[-1]
    neurons = some_neurons(parts, prompts["relation"], 6)
    neurons = neurons[neurons["layer"] == last.index]
    found = reading.read(parts, paths, prompts, neurons, heads, experts, str, n_units=4, n_tokens=5)
    assert set(found["level"]) == LEVELS - (set() if last.n_experts else {"expert"})
    scale, nonzero = tensors["norm_scale"], 0
    for (level, unit, neuron), rows in found.groupby(["level", "unit", "neuron"]):
        weights = without(parts, level, unit, neuron)
        kept = [weight[at].clone() for weight, at in weights]
        for weight, at in weights:
            weight[at] = 0
        edited = capture.record(model, parts, families.IDS)[0]
        for (weight, at), value in zip(weights, kept):
            weight[at] = value
        # The FFN answers to what attention lacks: that is no part of the contribution.
        state = f"{last.index}.resid_mid" if level in ("head", "attention_neuron") else "resid_final"
        lost = logits(parts, tensors[state], scale) - logits(parts, edited[state], scale)
        lost -= lost.mean(1, keepdim=True)
        for row in rows.itertuples():
            expected = lost[int(row.relation.split()[1]), row.token_id].item()
            assert row.logit == pytest.approx(expected, rel=1e-3, abs=2e-6)
            nonzero += abs(row.logit) > 1e-4
    assert nonzero > len(found) / 4


@torch.no_grad()
def test_readings_of_all_parts_add_up_behind_post_norms_too(tmp_path):
    _, parts, tensors, prompts, (_, heads, experts, _), paths = recorded("flex_olmo", tmp_path)
    last = parts.layers[-1]
    assert last.attention.path.norms
    assert last.experts.path.norms
    prompts["relation"] = "all"
    width, head_width = last.experts.module.down_proj.shape[2], tensors[f"{last.index}.head_in"].shape[2]
    sizes = {"ffn": (last.n_experts, width), "attention": (last.n_heads, head_width)}
    every = [(block, *at) for block, size in sizes.items() for at in np.ndindex(size)]
    neurons = pd.DataFrame(every, columns=["block", "unit", "neuron"])
    neurons = neurons.assign(relation="all", layer=last.index, lpi=0.0)
    vocabulary = len(parts.unembedding.weight)
    found = reading.read(parts, paths, prompts, neurons, heads, experts, str, n_units=10**6, n_tokens=vocabulary)
    found = found[found["side"] == "promoted"]
    total = {level: rows.groupby("token_id")["logit"].sum().to_numpy() for level, rows in found.groupby("level")}
    at, scale = [f"{last.index}.resid_pre", f"{last.index}.resid_mid", "resid_final"], tensors["norm_scale"]
    before, middle, after = (logits(parts, tensors[name], scale).mean(0) for name in at)
    for change, levels in ((middle - before, ("head", "attention_neuron")), (after - middle, ("expert", "ffn_neuron"))):
        for level in levels:
            np.testing.assert_allclose(total[level], change - change.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral"])
def test_a_planted_neuron_promotes_the_answer_of_its_fact(tmp_path, architecture):
    """Hand-set models at toy size: which neuron writes which answer is known by construction."""
    torch.set_num_threads(1)
    made = planted.hand_set(architecture, n_relations=4, n_subjects=8, n_answers=8)
    parts = anatomy.find(made.model)
    tokens, _ = planted.tokenise(made.tokenizer, made.prompts)
    tensors, prompts, _ = capture.in_memory(made.model, parts, tokens, 64)
    write_tensors(tensors, tmp_path / "0.safetensors")
    _, heads, experts, _ = attribution.attribute(parts, [tmp_path / "0.safetensors"], prompts)
    neurons = made.truth.merge(prompts).rename(columns={"expert": "unit"}).assign(block="ffn", lpi=1.0)
    decode = made.tokenizer.convert_ids_to_tokens
    paths = [tmp_path / "0.safetensors"]
    found = reading.read(parts, paths, prompts, neurons, heads, experts, decode, n_units=8, n_tokens=3)
    top = found[(found["side"] == "promoted") & (found["place"] == 1) & (found["level"] == "ffn_neuron")]
    facts = neurons.merge(top.drop(columns="lpi"), on=["relation", "layer", "unit", "neuron"])
    assert len(facts) == len(top) == len(neurons) == 32
    assert (facts["token"] == facts["objects"].str[0]).all()
    assert facts["target"].all()
    shares = reading.promoted_targets(found).set_index(["relation", "level"])
    assert (shares.loc[(slice(None), "ffn_neuron"), "share"] == 1).all()
    # The expert of a relation has the neurons of all of its facts: above all it promotes the most frequent answer.
    best = found.rename(columns={"unit": "expert"}).query("side == 'promoted' and place == 1 and level == 'expert'")
    best = best.merge(made.truth.merge(prompts)[["relation", "layer", "expert"]].drop_duplicates())
    assert len(best) == 4
    for row in best.itertuples():
        assert row.token_id in prompts.loc[prompts["relation"] == row.relation, "target_id"].mode().tolist()


@pytest.mark.parametrize("answer", ["first_token", "all_tokens"])
def test_shards_their_order_and_chunks_change_nothing(run, tmp_path, monkeypatch, answer):
    _, parts, tensors, (_, _, prompts, *tables) = run("qwen2_moe", answer)
    whole = reading.read(parts, run("qwen2_moe", answer)[3][1], prompts, *tables, n_units=3)
    order = np.random.default_rng(0).permutation(len(tensors["step"]))
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, rows in zip(paths, np.array_split(order, 3)):
        write_tensors({name: tensor[rows] for name, tensor in tensors.items()}, path)
    monkeypatch.setattr(reading, "ROWS", 4)
    asked, get = [], activations.Activations.get
    monkeypatch.setattr(activations.Activations, "get", lambda *args: asked.append(len(args[2])) or get(*args))
    split = reading.read(parts, paths, prompts.sample(frac=1, random_state=0), *tables, n_units=3)
    assert max(asked) == 4
    pd.testing.assert_frame_equal(whole, split, rtol=1e-4, atol=1e-6)


def test_softmax_does_not_see_a_constant_and_nor_does_a_reading(run):
    model, _, _, arguments = run("olmoe")
    before = reading.read(*arguments)
    weight = model.lm_head.weight
    try:
        model.lm_head.weight = Parameter(
            weight + torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        )
        after = reading.read(*arguments)
    finally:
        model.lm_head.weight = weight
    pd.testing.assert_series_equal(before["logit"], after["logit"], rtol=1e-3, atol=1e-5)
    promoted = before[before["side"] == "promoted"].groupby(reading.COMPONENT)["logit"].min()
    assert (promoted >= before[before["side"] == "suppressed"].groupby(reading.COMPONENT)["logit"].max()).all()


def test_tokens_are_what_the_caller_says(run):
    *_, arguments = run("llama")
    odd, asked = ["\n", "\x00", "$x$", 'a,"b"', " ", "", "\u2028"], []

    def decode(token):
        assert type(token) is int
        asked.append(token)
        return odd[token % len(odd)]

    found = reading.read(*arguments[:-1], decode)
    assert found["token"].tolist() == [odd[token % len(odd)] for token in found["token_id"]]
    assert sorted(asked) == sorted(found["token_id"].unique())


def test_a_model_without_what_is_asked_for_gives_an_empty_table(run):
    parts, paths, prompts, neurons, heads, experts, decode = run("llama")[3]
    found = reading.read(parts, paths, prompts, neurons[:0], heads[:0], experts, decode)
    assert list(found) == list(reading.read(parts, paths, prompts, neurons, heads, experts, decode))
    assert found.empty
    assert reading.promoted_targets(found).empty


def test_promoted_targets_are_counted_by_hand():
    rows = [
        # relation, level, unit, side, target
        ("a", "head", 0, "promoted", True),
        ("a", "head", 0, "promoted", True),
        ("a", "head", 0, "suppressed", True),
        ("a", "head", 1, "promoted", False),
        ("a", "head", 1, "suppressed", True),
        ("a", "expert", 0, "promoted", True),
        ("a", "expert", 0, "promoted", False),
        ("b", "head", 0, "promoted", False),
    ]
    readings = pd.DataFrame(rows, columns=["relation", "level", "unit", "side", "target"]).assign(layer=0, neuron=-1)
    found = reading.promoted_targets(readings)
    columns = ["relation", "level", "units", "share", "targets"]
    expected = [("a", "expert", 1, 1.0, 1.0), ("a", "head", 2, 0.5, 1.0), ("b", "head", 1, 0.0, 0.0)]
    pd.testing.assert_frame_equal(found, pd.DataFrame(expected, columns=columns))


def test_the_norm_scale_is_the_one_that_is_asked_for(run):
    _, parts, _, arguments = run("mixtral")
    final = parts.final_norm
    wide, narrow = (replace(parts, final_norm=replace(final, eps=eps)) for eps in (0.5, lens.REFERENCE_EPS))
    reference = reading.read(wide, *arguments[1:], norm="reference")
    pd.testing.assert_frame_equal(reference, reading.read(narrow, *arguments[1:]))
    assert not np.allclose(reference["logit"], reading.read(wide, *arguments[1:])["logit"], rtol=1e-2)

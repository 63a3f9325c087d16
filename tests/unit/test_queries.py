"""Query components, against keys and shares written by hand from the weights, and against a planted head."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

from moescope import anatomy, capture, checkpoints, neurons, planted, queries
from moescope.models import AnatomyError

import families
from conftest import SHAPES

torch.set_num_threads(1)
# Families, and the parts of their layers that cannot be understood: of which layers, and why.
OTHERS = {
    "deepseek_v3": ("attention", 4, "not the outputs of one linear map"),
    "gpt_oss": ("FFN", 4, "no product of a pre-activation and a function of another one"),
    "nemotron_h": ("attention", 1, "shows no attention weights"),
    "apertus": None,
    "cohere2_moe": None,
    "flex_olmo": None,
    "gemma2": None,
    "gpt2": None,
    "gptj": None,
    "granitemoe": None,
    "opt": None,
    "phi3": None,
}
UNITS = ["embedding", "expert", "head", "rest"]
SCORES = list(queries.SCORES)


def some_values(parts, found, prompt_id, per_prompt=6, seed=0):
    """Tables of value neurons: random ones that each prompt uses, with made-up LPIs, some of them negative."""
    rng, tables = np.random.default_rng(seed), []
    for make, name in ((neurons.ffn_neurons, "expert"), (neurons.attention_neurons, "head")):
        rows = [(0, 0, 0, 0, -1.0)]
        blocks = [make(layer, capture.of_layer(found, layer)) for layer in parts.layers]
        blocks = [block for block in blocks if block is not None]
        for row, prompt in enumerate(prompt_id):
            for block in rng.choice(np.array(blocks, dtype=object), size=per_prompt if blocks else 0):
                used = block.activations[row].nonzero()[:, 0]
                place = used[rng.integers(len(used), size=1)]
                unit, neuron = block.names(torch.tensor([row]), place)
                rows.append((prompt, block.layer, int(unit), int(neuron), rng.uniform(-0.2, 1)))
        table = pd.DataFrame(rows, columns=["prompt_id", "layer", name, "neuron", "lpi"])
        table = table.astype({"prompt_id": "int32", "layer": "int16", name: "int16", "neuron": "int32", "lpi": "f4"})
        tables.append(table.sort_values(["prompt_id", "lpi"], ascending=[True, False], ignore_index=True))
    return tables


def one_value(layer, unit, neuron, name="expert"):
    """The table of one value neuron of prompt 0 with an LPI of 1, and an empty one of the other kind."""
    row = {"prompt_id": 0, "layer": layer, name: unit, "neuron": neuron, "lpi": 1.0}
    table = pd.DataFrame([row])
    other = pd.DataFrame(columns=["prompt_id", "layer", {"expert": "head"}.get(name, "expert"), "neuron", "lpi"])
    return (table, other.astype("float32")) if name == "expert" else (other.astype("float32"), table)


@pytest.fixture(scope="module")
def made(build, tokens):
    """A function from a name to (model, parts, prompts, FFN and attention value neurons)."""

    def of(name):
        model = build(name) if name in SHAPES else families.build(name)
        parts = anatomy.find(model)
        prompts = pd.DataFrame({"prompt_id": range(4), "token_ids": families.IDS.tolist(), "length": 6})
        if name in SHAPES:
            prompts = tokens.iloc[::4][["prompt_id", "token_ids", "length"]].reset_index(drop=True)
            found = capture.in_memory(model, parts, tokens[tokens["prompt_id"].isin(prompts["prompt_id"])], 64)[0]
        else:
            with torch.no_grad():
                found, _ = capture.record(model, parts, families.IDS)
        return model, parts, prompts, *some_values(parts, found, sorted(prompts["prompt_id"]))

    return of


def error_of_sums(table, value_layers):
    """How far the scores of units, embedding and rest are from the value neurons' LPI, relative to their sizes."""
    scores = table[table["level"].isin(UNITS)].set_index("prompt_id")[SCORES].astype(float)
    total, size = scores.groupby("prompt_id").sum(), scores.abs().groupby("prompt_id").sum()
    lpi = value_layers.groupby(["prompt_id", "block"])["lpi"].sum().unstack()
    lpi = lpi.reindex(index=total.index, columns=["ffn", "attention"]).fillna(0)
    assert (lpi > 0).any(axis=None)
    return (np.abs(total.to_numpy() - lpi.to_numpy()) / size.clip(1e-9).to_numpy()).max()


@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
def test_scores_add_up_to_the_lpi_of_the_value_neurons(made, name):
    model, parts, prompts, ffn, attention = made(name)
    table, value_layers, reasons = queries.attribute(model, parts, prompts, ffn, attention, 64, 4)
    assert set(table["prompt_id"]) == set(prompts["prompt_id"])
    assert error_of_sums(table, value_layers) < 2e-6
    part, layers, why = OTHERS.get(name) or ("", 0, "")
    assert len(reasons) == layers
    assert all(key.endswith(part) and why in sentence for key, sentence in reasons.items())
    # The first four of each prompt with a positive LPI, of the blocks that are understood.
    for block, values in (("ffn", ffn), ("attention", attention)):
        first = values[values["lpi"] > 0].groupby("prompt_id").head(4)
        understood = [f"layer {at}, {'FFN' if block == 'ffn' else block}" not in reasons for at in first["layer"]]
        expected = first[understood].groupby(["prompt_id", "layer"])["lpi"].sum()
        found = value_layers[value_layers["block"] == block].set_index(["prompt_id", "layer"])["lpi"]
        pd.testing.assert_series_equal(found, expected, check_index_type=False)
    assert table.dtypes.astype(str).to_dict() == queries.QUERIES
    assert value_layers.dtypes.astype(str).to_dict() == queries.VALUE_LAYERS
    assert not table.duplicated(list(queries.KEYS)).any()


def test_a_block_that_is_one_component_is_a_unit_without_a_number(made):
    model, parts, prompts, ffn, attention = made("nemotron_h")
    table, _, _ = queries.attribute(model, parts, prompts, ffn, attention, 64)
    whole = table[(table["level"] == "head") & (table["unit"] == queries.NO_UNIT)]
    layers = [layer.index for layer in parts.layers if layer.attention and not layer.n_heads]
    assert sorted(whole["layer"].unique()) == layers
    assert (whole[SCORES] != 0).any().all()


ACTIVATIONS = dict.fromkeys([*SHAPES, "deepseek_v3", "flex_olmo", "granitemoe", "phi3", "cohere2_moe"], "silu")
ACTIVATIONS |= {"gemma2": "gelu_pytorch_tanh", "gpt2": "gelu_new", "gptj": "gelu_new", "nemotron_h": "relu2"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_reads_the_stream_gives_every_activation_at_every_position(made, name):
    """From the stream, through the norm and the rows of a neuron, and the family's activation function by its name."""
    model, parts, *_ = made(name)
    act = ACT2FN[ACTIVATIONS[name]]
    with torch.no_grad(), anatomy._eager_attention(model):
        readers, _, _ = queries.find_readers(model, parts)
        found, seen = queries._record(model, parts, readers, families.IDS)
    checked = set()
    for (at, block, unit), reader in readers.items():
        here = capture.of_layer(found, parts.layers[at])
        stream = here["resid_mid" if reader.middle else "resid_pre"]
        x = reader.read(stream)
        if block == "attention":
            directions, bias = queries._rows_of(reader.linear(0), reader.rows)
            values = torch.einsum("hkd,btd->bthk", directions, x.view(4, 6, -1)) + bias
            activation = torch.einsum("bht,bthk->bhk", seen[at], values)
            expected = here["head_in"].unflatten(0, (4, 6))[:, -1]
        else:
            slots = [(0, slice(None), here.get("acts", here.get(f"shared.{-1 - unit}.acts")))]
            if unit == 0 and parts.layers[at].experts:
                slots = [(int(e), row, here["expert_acts"][row, 0]) for row, e in enumerate(here["expert_ids"][:, 0])]
            pairs = [(queries._rows_of(reader.linear(e), reader.rows), x[rows]) for e, rows, _ in slots]
            inner = [
                torch.einsum("fkd,...d->f...k", directions, x) + bias.view(len(bias), *[1] * (x.ndim - 1), -1)
                for (directions, bias), x in pairs
            ]
            activation = torch.stack([act(p[0]) * (p[1] if len(p) == 2 else 1) for p in inner])
            expected = torch.stack([acts for *_, acts in slots])
        torch.testing.assert_close(activation, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        checked.add(block)
    assert checked == ({"ffn"} if name == "deepseek_v3" else {"ffn", "attention"})


def held(norm, stream, vectors):
    """The part of a norm's output that is linear in what is normed, at the scale that the stream has."""
    if isinstance(norm, nn.LayerNorm):
        scale = (stream.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
        return (vectors - vectors.mean(-1, keepdim=True)) * scale * norm.weight
    return vectors * (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight


def spied(model, ids, modules):
    """The inputs of modules and the attention weights of every layer in a forward pass of the plain model."""
    seen, handles = {}, []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda m, args: seen.update({m: args[0].clone()})))
    with torch.no_grad(), anatomy._eager_attention(model):
        attentions = model(input_ids=ids, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return seen, attentions


def scores_by_hand(writes, share):
    """share of what each component writes: {(level, layer, unit): score}."""
    return {key: float(share(vectors)) for key, vectors in writes.items()}


def agree(table, by_hand, column):
    """Whether every component of the table has the score found by hand, or 0."""
    rows = table[table["level"].isin(UNITS)]
    found = {tuple(row): score for *row, score in rows[["level", "layer", "unit", column]].itertuples(index=False)}
    assert set(by_hand) <= set(found)
    size = sum(map(abs, by_hand.values()))
    for key, score in found.items():
        assert score == pytest.approx(by_hand.get(key, 0.0), rel=1e-4, abs=2e-6 * size), key
    assert sum(by_hand.values()) == pytest.approx(1, abs=1e-5 * size)


@torch.no_grad()
def test_gated_neurons_and_heads_share_as_the_bilinear_form_of_the_weights_says(build):
    """Llama: the derivative of log(ratio x gate x up) along what a component writes, halved; all else is held."""
    model, ids = build("llama"), torch.tensor([[5, 40, 77, 12, 200]])
    layers, norm = model.model.layers, "post_attention_layernorm"
    spy = [m for x in layers for m in (x.self_attn.o_proj, x.mlp.down_proj, x.input_layernorm, getattr(x, norm))]
    seen, attentions = spied(model, ids, spy)
    writes = {("embedding", -1, queries.NO_UNIT): model.model.embed_tokens(ids)[0]}
    for at, layer in enumerate(layers):
        for head in range(4):
            own = slice(8 * head, 8 * head + 8)
            writes["head", at, head] = seen[layer.self_attn.o_proj][0, :, own] @ layer.self_attn.o_proj.weight[:, own].T
        writes["expert", at, 0] = layer.mlp.down_proj(seen[layer.mlp.down_proj])[0]
    prompts = pd.DataFrame({"prompt_id": [0], "token_ids": [ids[0].tolist()], "length": 5})
    parts, at, layer = anatomy.find(model), 2, layers[2]

    neuron = int(seen[layer.mlp.down_proj][0, -1].abs().argmax())
    stream = seen[layer.post_attention_layernorm][0, -1]
    rows = torch.stack([layer.mlp.gate_proj.weight[neuron], layer.mlp.up_proj.weight[neuron]])
    ratio = nn.functional.sigmoid(rows[0] @ layer.post_attention_layernorm(stream))

    def activation(vector):
        gate, up = rows @ held(layer.post_attention_layernorm, stream, vector)
        return ratio * gate * up

    assert activation(stream) == pytest.approx(float(seen[layer.mlp.down_proj][0, -1, neuron]), rel=1e-5)

    def share(vectors):
        _, slope = torch.func.jvp(activation, (stream,), (vectors[-1],))
        return slope / activation(stream) / 2

    below = {key: v for key, v in writes.items() if key[1] < at or key[:2] == ("head", at)}
    table, value_layers, _ = queries.attribute(model, parts, prompts, *one_value(at, 0, neuron), 8)
    agree(table, scores_by_hand(below, share), "via_ffn")
    assert (table["via_attention"] == 0).all()
    assert value_layers.to_numpy().tolist() == [[0, "ffn", at, 1.0]]

    head, j = 3, 5
    stream, row = seen[layer.input_layernorm][0], layer.self_attn.v_proj.weight[head // 2 * 8 + j]

    def value(vectors):
        return attentions[at][0, head, -1] @ (held(layer.input_layernorm, stream, vectors) @ row)

    below = {key: v for key, v in writes.items() if key[1] < at}
    table, _, _ = queries.attribute(model, parts, prompts, *one_value(at, head, j, "head"), 8)
    agree(
        table,
        scores_by_hand(below, lambda v: value(v) / seen[layer.self_attn.o_proj][0, -1, 8 * head + j]),
        "via_attention",
    )
    assert (table["via_ffn"] == 0).all()


@torch.no_grad()
def test_plain_neurons_share_as_the_weights_say_with_all_biases_and_positions_in_the_rest():
    """GPT-2: one factor, norms that centre, biases everywhere, positional embeddings, fused and transposed weights."""
    model, ids = families.build("gpt2"), families.IDS[:1]
    layers = model.transformer.h
    seen, attentions = spied(model, ids, [m for x in layers for m in (x.attn.c_proj, x.mlp.c_proj, x.ln_1, x.ln_2)])
    rest = ("rest", -1, queries.NO_UNIT)
    constants = {-1: model.transformer.wpe.weight[:6]}
    writes = {("embedding", -1, queries.NO_UNIT): model.transformer.wte(ids)[0]}
    for at, layer in enumerate(layers):
        for head in range(4):
            own = slice(8 * head, 8 * head + 8)
            writes["head", at, head] = seen[layer.attn.c_proj][0, :, own] @ layer.attn.c_proj.weight[own]
        writes["expert", at, 0] = layer.mlp.c_proj(seen[layer.mlp.c_proj])[0]
        constants[at] = layer.attn.c_proj.bias.expand(6, -1)
    prompts = pd.DataFrame({"prompt_id": [0], "token_ids": ids.tolist(), "length": 6})
    parts, at, layer = anatomy.find(model), 2, layers[2]

    neuron = int(seen[layer.mlp.c_proj][0, -1].abs().argmax())
    stream, row = seen[layer.ln_2][0], layer.mlp.c_fc.weight[:, neuron]
    whole = layer.mlp.c_fc(layer.ln_2(stream))[-1, neuron]

    def share(vectors):
        return held(layer.ln_2, stream, vectors)[-1] @ row / whole

    below = {key: v for key, v in writes.items() if key[1] < at or key[:2] == ("head", at)}
    by_hand = scores_by_hand(below, share)
    bias = (layer.ln_2.bias @ row + layer.mlp.c_fc.bias[neuron]) / whole
    by_hand[rest] = float(bias) + sum(float(share(v)) for i, v in constants.items() if i <= at)
    table, _, _ = queries.attribute(model, parts, prompts, *one_value(at, 0, neuron), 8)
    agree(table, by_hand, "via_ffn")

    head, j = 1, 6
    stream, column = seen[layer.ln_1][0], 2 * 32 + 8 * head + j
    row, pattern = layer.attn.c_attn.weight[:, column], attentions[at][0, head, -1]
    whole = seen[layer.attn.c_proj][0, -1, 8 * head + j]

    def value_share(vectors):
        return pattern @ (held(layer.ln_1, stream, vectors) @ row) / whole

    by_hand = scores_by_hand({key: v for key, v in writes.items() if key[1] < at}, value_share)
    bias = (layer.ln_1.bias @ row + layer.attn.c_attn.bias[column]) / whole
    by_hand[rest] = float(bias) + sum(float(value_share(v)) for i, v in constants.items() if i < at)
    table, _, _ = queries.attribute(model, parts, prompts, *one_value(at, head, j, "head"), 8)
    agree(table, by_hand, "via_attention")


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "llama", "flex_olmo", "granitemoe"])
def test_the_neurons_of_a_unit_add_up_to_it(made, name):
    model, parts, prompts, ffn, attention = made(name)
    table, _, _ = queries.attribute(model, parts, prompts, ffn, attention, 64, n_neurons=10**6)
    keys = ["prompt_id", "layer", "unit"]
    for level in ("expert", "head"):
        units = table[table["level"] == level].set_index(keys)[SCORES]
        sums = table[table["level"] == f"{level}_neuron"].groupby(keys)[SCORES].sum()
        sums = sums.reindex(units.index).fillna(0)
        np.testing.assert_allclose(sums, units, atol=1e-5 * units.abs().max().max())
        assert (units != 0).any().all()


def test_the_neurons_with_the_largest_scores_are_listed(made):
    model, parts, prompts, ffn, attention = made("qwen2_moe")
    every, _, _ = queries.attribute(model, parts, prompts, ffn, attention, 64, n_neurons=10**6)
    few, _, _ = queries.attribute(model, parts, prompts, ffn, attention, 64, n_neurons=3)
    for level in ("expert_neuron", "head_neuron"):
        sums, best = (t[t["level"] == level].assign(sum=lambda x: x[SCORES].sum(axis=1)) for t in (every, few))
        expected = sums.groupby("prompt_id")["sum"].nlargest(3).to_numpy()
        np.testing.assert_allclose(best.groupby("prompt_id")["sum"].nlargest(3), expected, rtol=1e-6)
        assert len(best) == 3 * len(prompts)
    assert (
        few[few["level"].isin(UNITS)]
        .reset_index(drop=True)
        .equals(every[every["level"].isin(UNITS)].reset_index(drop=True))
    )


@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "mistral"])
def test_the_size_of_a_batch_changes_nothing(made, name):
    model, parts, prompts, ffn, attention = made(name)
    together = queries.attribute(model, parts, prompts, ffn, attention, 64)
    single = queries.attribute(model, parts, prompts, ffn, attention, 1)
    size = together[0][SCORES].abs().max().max()
    pd.testing.assert_frame_equal(single[0], together[0], rtol=1e-3, atol=1e-5 * size)
    pd.testing.assert_frame_equal(single[1], together[1])


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral"])
def test_the_head_that_copies_the_subject_raises_the_planted_neurons(architecture):
    """Hand-set models at toy size: a planted neuron's gate reads the subject, which head 0 of layer 0 copies to the
    readout position, and its up projection reads the relation, which is embedded there: half and half.
    """
    made = planted.hand_set(architecture, n_relations=4, n_subjects=8, n_answers=8)
    parts = anatomy.find(made.model)
    tokens, _ = planted.tokenise(made.tokenizer, made.prompts)
    table, _, reasons = queries.attribute(
        made.model, parts, tokens, made.truth.assign(lpi=1.0), one_value(0, 0, 0)[1], 64
    )
    assert not reasons
    embedding = table[table["level"] == "embedding"].set_index("prompt_id")["via_ffn"]
    heads = table[table["level"] == "head"].pivot_table("via_ffn", "prompt_id", ["layer", "unit"])
    assert len(heads) == len(made.truth)
    assert (heads.idxmax(axis=1) == (0, 0)).all()
    assert heads[0, 0].to_numpy() == pytest.approx(0.5, abs=0.15)
    assert embedding.to_numpy() == pytest.approx(0.5, abs=0.15)
    assert heads.drop(columns=[(0, 0)]).abs().max().max() < 0.15


def test_half_precision_adds_up_to_its_rounding(made):
    model, _, prompts, ffn, attention = made("olmoe")
    half = copy.deepcopy(model).bfloat16()
    exact, _, _ = queries.attribute(model, anatomy.find(model), prompts, ffn, attention, 64)
    table, value_layers, reasons = queries.attribute(half, anatomy.find(half), prompts, ffn, attention, 64)
    assert not reasons
    assert 1e-6 < error_of_sums(table, value_layers) < 0.02
    assert np.corrcoef(*(t.query("level == 'head'")["via_attention"] for t in (exact, table)))[0, 1] > 0.9


def test_a_model_on_disk_gives_what_it_gives_in_memory(made, tokenizer, tmp_path):
    model, parts, prompts, ffn, attention = made("qwen2_moe")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spread, _ = checkpoints.load(tmp_path, device="auto", max_memory={"cpu": 0})
    assert "disk" in spread.hf_device_map.values()
    plain, _, _ = queries.attribute(model, parts, prompts, ffn, attention, 64)
    found, _, _ = queries.attribute(spread, anatomy.find(spread), prompts, ffn, attention, 64)
    pd.testing.assert_frame_equal(found, plain, rtol=1e-3, atol=1e-4)


def test_a_model_without_keys_gives_no_rows(made):
    model, parts, prompts, *_ = made("jetmoe")
    ffn, attention = one_value(0, 0, 0)
    table, value_layers, reasons = queries.attribute(model, parts, prompts, ffn, attention, 64)
    assert (len(table), len(value_layers), len(reasons)) == (0, 0, 8)
    assert table.dtypes.astype(str).to_dict() == queries.QUERIES
    assert value_layers.dtypes.astype(str).to_dict() == queries.VALUE_LAYERS


def test_a_prompt_without_value_neurons_scores_0_and_values_of_others_are_left_out(made):
    model, parts, prompts, ffn, attention = made("olmoe")
    first, second, third = sorted(prompts["prompt_id"])[:3]
    ffn, attention = (table[table["prompt_id"] != first] for table in (ffn, attention))
    table, value_layers, _ = queries.attribute(
        model, parts, prompts[prompts["prompt_id"].isin([first, second])], ffn, attention, 64
    )
    assert (table[table["prompt_id"] == first][SCORES] == 0).all(axis=None)
    assert (table[table["prompt_id"] == second][SCORES] != 0).any(axis=None)
    assert set(value_layers["prompt_id"]) == {second}
    assert third in set(ffn["prompt_id"])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 2), st.integers(0, 5), st.sampled_from(["relu2", "silu", "gelu"]), st.randoms()
)
def test_which_pre_activations_feed_a_neuron_is_found_in_any_order(width, factors, idle, act, random):
    order = list(range(factors * width + idle))
    random.shuffle(order)
    feeding = torch.tensor(order[: factors * width]).view(factors, width)

    def activate(inner):
        return ACT2FN[act](inner[:, feeding[0]]) * (inner[:, feeding[1]] if factors == 2 else 1)

    rows = queries._feeding(activate, len(order))
    assert torch.equal(rows.sort(0).values, feeding.sort(0).values)


def test_activations_of_unknown_structure_have_no_keys(build):
    model = copy.deepcopy(build("mistral"))
    first, second, _ = (layer.mlp for layer in model.model.layers)
    first.act_fn = nn.Softmax(-1)
    second.down_proj.register_forward_pre_hook(lambda module, args: args[0].detach())
    with torch.no_grad(), anatomy._eager_attention(model):
        readers, _, reasons = queries.find_readers(model, anatomy.find(model))
    assert reasons == {
        "layer 0, FFN": "activations that are not each a function of one or two pre-activations",
        "layer 1, FFN": "activations that no linear map beside their down projection feeds",
    }
    assert [at for at, block, _ in readers if block == "ffn"] == [2]


@pytest.mark.parametrize("block", queries.UNIT)
@pytest.mark.parametrize("name", ["qwen2_moe", "llama", "gpt2"])
def test_keys_that_do_not_give_the_activations_are_refused(made, name, block):
    model, parts, prompts, *values = made(name)
    ids = torch.tensor(prompts["token_ids"].to_list()[:1])
    with torch.no_grad(), anatomy._eager_attention(model):
        readers, factor, _ = queries.find_readers(model, parts)
        own = queries._chosen(values[block == "attention"], block, 10, readers)
        own = own[own["prompt_id"] == prompts["prompt_id"][0]].assign(row=0)
        assert len(queries._queries(model, parts, readers, factor, ids, own, 5))
        wrong = {key: replace(reader, rows=reader.rows.roll(1, -1)) for key, reader in readers.items()}
        with pytest.raises(AnatomyError, match=r"layer \d, .*: keys do not give the activations of its value neurons"):
            queries._queries(model, parts, wrong, factor, ids, own, 5)


def test_scores_that_do_not_add_up_are_refused():
    units = pd.DataFrame({"row": [0, 0, 1], "via_ffn": [0.5, 1.5, 0.0], "via_attention": [0.0, 0.0, -1.0]})
    values = pd.DataFrame({"row": [0, 1, 1], "block": ["ffn", "attention", "attention"], "lpi": [2.0, 3.0, -4.0]})
    queries._check_sums(units, values, 1e-5)
    with pytest.raises(AnatomyError, match=r"do not add up to LPI: relative error 5\.00e-03, allowed 1e-05"):
        queries._check_sums(units, values.assign(lpi=[2.01, 3.0, -4.0]), 1e-5)

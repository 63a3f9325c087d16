"""Models whose weights lie on disk, or in half precision, or in a model that also sees, give what a plain one gives."""

import copy
import gc

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moescope import ablations, anatomy, attribution, capture, checkpoints, miniature
from moescope.intervene import block_ffn, intervene
from moescope.models import AnatomyError, weights_of

import families
from conftest import write_tensors

# An MoE with shared experts and a dense one: the whole on disk, or the first layers in memory.
PLACES = [("qwen2_moe", 0), ("qwen2_moe", "120KB"), ("llama", 0), ("llama", "120KB")]
KEYS = ("layer", "head", "expert")


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def pair(request, build, tokenizer, tmp_path_factory):
    """The same checkpoint loaded twice: as it comes, and with layers on disk."""
    name, memory = request.param
    folder = save(build(name), tokenizer, tmp_path_factory.mktemp(name) / "saved")
    plain, _ = checkpoints.load(folder)
    spread, _ = checkpoints.load(folder, device="auto", max_memory={"cpu": memory})
    assert "disk" in spread.hf_device_map.values()
    assert ("cpu" in spread.hf_device_map.values()) == bool(memory)
    yield plain, spread
    del spread
    gc.collect()


def on_disk(model):
    """Names of the weights that are not in memory."""
    return {name for name, weight in model.named_parameters() if weight.is_meta}


def names_of(model, parts):
    """Every module of an anatomy by its name in the model, and the numbers beside them."""
    name = {module: key for key, module in model.named_modules()} | {None: None}

    def path(part):
        return part.path.factor, [name[norm.module] for norm in part.path.norms]

    found = [name[parts.final_norm.module], name[parts.unembedding], parts.logit_scale, parts.softcap]
    for layer in parts.layers:
        attention = layer.attention
        found.append((name[layer.block], name[layer.middle], layer.n_heads, layer.n_experts, layer.whole))
        found.append((name[attention.module], name[attention.out_proj], path(attention)))
        if layer.experts:
            found.append((name[layer.experts.module], name[layer.experts.router], path(layer.experts)))
        for dense in (layer.dense, *layer.shared):
            found.append(dense and (name[dense.down], name[dense.gate], path(dense)))
    return found


def test_layers_on_disk_are_found_captured_and_attributed_like_others(pair, tokens, tmp_path):
    plain, spread = pair
    before = on_disk(spread)
    assert any("down_proj" in name for name in before)
    parts, spread_parts = anatomy.find(plain), anatomy.find(spread)
    assert names_of(spread, spread_parts) == names_of(plain, parts)
    torch.testing.assert_close(spread_parts.final_norm.gain, parts.final_norm.gain)
    tables, tensors = [], []
    for model, found in ((plain, parts), (spread, spread_parts)):
        captured, table, errors = capture.in_memory(model, found, tokens, 16, "all_tokens")
        assert max(errors.values()) < 1e-5
        path = tmp_path / f"{len(tables)}.safetensors"
        write_tensors(captured, path)
        tensors.append(captured)
        tables.append([table, *attribution.attribute(found, [path], table)])
    assert set(tensors[0]) == set(tensors[1])
    for name, tensor in tensors[0].items():
        assert tensors[1][name].device.type == "cpu"
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-5, atol=1e-6)
    for one, other in zip(*tables):
        pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)
    # Weights were read where they lie, and are not left in memory.
    assert on_disk(spread) == before


def test_ffns_on_disk_are_taken_away_like_others(pair, tokens):
    rows = next(capture.batches(tokens["length"].to_numpy(), 16))
    ids = capture.token_tensor(tokens, rows, torch.device("cpu"))
    before, logits = on_disk(pair[1]), []
    for model in pair:
        with torch.no_grad(), intervene(anatomy.find(model), block_ffn()):
            logits.append(capture.readout_logits(model, ids))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[0], capture.readout_logits(pair[0], ids), atol=1e-3)
    assert on_disk(pair[1]) == before


@pytest.mark.parametrize("pair", PLACES[:2], indirect=True, ids=lambda place: f"{place[0]}-{place[1]}")
def test_experts_on_disk_are_blocked_like_others(pair, tokens, tmp_path):
    plain, spread = pair
    before = on_disk(spread)
    parts = anatomy.find(plain)
    tensors, table, _ = capture.in_memory(plain, parts, tokens, 16)
    write_tensors(tensors, tmp_path / "0.safetensors")
    _, _, experts, _ = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
    load = ablations.expert_load(parts, [tmp_path / "0.safetensors"], table)
    half = ablations.split_subjects(table, seed=0)
    sets, _ = ablations.choose_sets(experts, load, table, half, [2], 1, seed=0)
    some, half = table.iloc[::3].reset_index(drop=True), half[::3]
    blocked, kept = [], []
    for model in pair:
        found = anatomy.find(model)
        blocked.append(ablations.measure_blocking(model, found, some, half, sets, 64))
        kept.append(ablations.measure_keep_only(model, found, some, [1], 64))
    pd.testing.assert_frame_equal(*blocked, rtol=1e-4)
    pd.testing.assert_frame_equal(*kept, rtol=1e-4)
    assert not np.allclose(blocked[0].groupby("prompt_id")["log_prob"].min(), some["log_prob"], atol=1e-3)
    assert on_disk(spread) == before


def test_weights_come_into_memory_for_as_long_as_they_are_read(pair):
    plain, spread = pair
    names = on_disk(spread)
    modules = {name.rpartition(".")[0] for name in names}
    for key in sorted(modules):
        module, same = spread.get_submodule(key), plain.get_submodule(key)
        with weights_of(module, None):
            for name, weight in module.named_parameters(recurse=False):
                assert torch.equal(weight, same.get_parameter(name))
        assert on_disk(spread) == names
    module = spread.get_submodule(next(key for key in modules if key.endswith("o_proj")))
    with pytest.raises(KeyError), weights_of(module):
        raise KeyError
    assert on_disk(spread) == names


# Half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "mistral"])
def test_half_precision_is_recorded_as_it_is_and_attributed_in_float32(build, tokens, tmp_path, name, dtype):
    model = copy.deepcopy(build(name)).to(dtype)
    parts = anatomy.find(model)
    tensors, table, errors = capture.in_memory(model, parts, tokens, 16)
    assert max(errors.values()) < capture.TOLERANCE[dtype]
    stored = {key: tensor.dtype for key, tensor in tensors.items() if tensor.is_floating_point()}
    exact = {key for key, kind in stored.items() if kind == torch.float32}
    assert {key.split(".")[-1] for key in exact} == {"norm_scale"} | ({"router_margin"} if parts.is_moe else set())
    assert {stored[key] for key in stored.keys() - exact} == {dtype}
    write_tensors(tensors, tmp_path / "0.safetensors")
    tables = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
    for column, kind in (pair for found in tables for pair in found.dtypes.items()):
        assert kind == ("int32" if column == "prompt_id" else "int16" if column in KEYS else "float32"), column
    # The same numbers in float32: nothing of the attribution was rounded to half precision.
    wide = copy.deepcopy(model).float()
    write_tensors({key: t.float() if key in stored else t for key, t in tensors.items()}, tmp_path / "1.safetensors")
    for one, other in zip(tables, attribution.attribute(anatomy.find(wide), [tmp_path / "1.safetensors"], table)):
        pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_about_what_float32_says(build, tokens, dtype):
    """Not the same, but nearly: a cast that lost the model would not be seen otherwise."""
    _, exact, _ = capture.in_memory(build("qwen2_moe"), anatomy.find(build("qwen2_moe")), tokens, 16, "all_tokens")
    half = copy.deepcopy(build("qwen2_moe")).to(dtype)
    _, table, _ = capture.in_memory(half, anatomy.find(half), tokens, 16, "all_tokens")
    assert np.corrcoef(exact["log_prob"], table["log_prob"])[0, 1] > 0.99


def test_a_residual_stream_kept_in_float32_is_checked_with_the_precision_of_the_weights():
    """FalconMamba adds up in float32 whatever its weights are in."""
    model = families.build("falcon_mamba").bfloat16()
    parts = anatomy.find(model)
    with torch.no_grad():
        found, logits = capture.record(model, parts, families.IDS)
        errors = capture.verify(model, parts, families.IDS, found, logits)
    assert found["resid_final"].dtype == torch.float32
    assert max(errors.values()) < capture.TOLERANCE[torch.bfloat16]


def test_a_model_that_overflows_in_half_precision_is_refused_with_the_mend():
    with pytest.raises(AnatomyError, match=r"logits are not finite in float16; set dtype to bfloat16 or float32"):
        anatomy.find(families.build("mamba").half())


# A model that also sees.


def test_an_image_text_model_with_experts_is_loaded_and_captured_as_a_text_model(tokenizer, tokens, tmp_path):
    name = "qwen3_vl_moe"
    assert name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    config = miniature.shrink(AutoConfig.for_model(name))
    config.text_config.vocab_size = len(tokenizer)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, token, 0)
    torch.manual_seed(0)
    made = checkpoints.auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    folder = save(made, tokenizer, tmp_path / "saved")
    model, loaded = checkpoints.load(folder)
    assert type(model) is type(made)
    assert model.get_submodule("model.visual") is not None
    assert loaded.get_vocab() == tokenizer.get_vocab()
    parts = anatomy.find(model)
    text = model.model.language_model
    assert [layer.block for layer in parts.layers] == list(text.layers)
    assert [layer.experts.module for layer in parts.layers] == [block.mlp.experts for block in text.layers]
    tensors, table, errors = capture.in_memory(model, parts, tokens, 16, "all_tokens")
    assert max(errors.values()) < 1e-5
    assert float(tensors["3.expert_acts"].abs().min()) > 0
    for row in table.iloc[::4].itertuples():
        with torch.no_grad():
            logits = made(input_ids=torch.tensor([[*row.token_ids, *row.target_ids]])).logits[0]
        steps = logits[len(row.token_ids) - 1 : -1].double().log_softmax(-1)
        by_hand = sum(float(step[token]) for step, token in zip(steps, row.target_ids))
        assert row.log_prob == pytest.approx(by_hand, abs=1e-4)
    write_tensors(tensors, tmp_path / "0.safetensors")
    layers, heads, experts, margins = attribution.attribute(parts, [tmp_path / "0.safetensors"], table)
    assert len(layers) == len(margins) == len(table) * len(parts.layers)
    assert set(heads["head"]) == set(range(config.text_config.num_attention_heads))
    assert set(experts["expert"]) <= set(range(config.text_config.num_experts))

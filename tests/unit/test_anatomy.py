"""What the finder finds, against the modules' own names; and LPI against the modules themselves, called by hand.

A family is described here once, by hand: which module writes what, through which norms, times which factor. Neither
the finder nor any sum of contributions takes part in what is expected.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from moescope import anatomy, attribution, capture
from moescope.models import AnatomyError

import families
from conftest import write_tensors

IDS = families.IDS
TARGETS = [3, 50, 77, 120]


@dataclass(frozen=True)
class Writer:
    """A module of a layer whose output is added: through these norms, times the sigmoid of a gate."""

    module: str
    down: str = ""
    norms: tuple[str, ...] = ()
    gate: str = ""


@dataclass(frozen=True)
class Layer:
    """A decoder layer in the names of its own modules; an empty name is a part that it does not have."""

    attention: str = "self_attn"
    out_proj: str = "self_attn.o_proj"
    attention_norms: tuple[str, ...] = ()
    middle: str = "post_attention_layernorm"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    expert_norms: tuple[str, ...] = ()
    shared: tuple[Writer, ...] = ()
    dense: Writer | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Family:
    """A model: its layers, and the readout as its configuration says it."""

    layer: Callable[[object, int], Layer]
    stack: str = "model.layers"
    norm: str = "model.norm"
    logit_scale: Callable[[object], float] = lambda config: 1.0
    softcap: Callable[[object], float] = lambda config: 0.0


MOE = Layer()
DENSE = Layer(experts="", router="", dense=Writer("mlp", "mlp.down_proj"))
ONE_BLOCK = Layer(middle="", experts="", router="")
GATED = Writer("mlp.shared_expert", "mlp.shared_expert.down_proj", gate="mlp.shared_expert_gate")
GRANITE = replace(MOE, experts="block_sparse_moe.experts", router="block_sparse_moe.router", factor=0.22)
SANDWICH = replace(
    DENSE,
    attention_norms=("post_attention_layernorm",),
    middle="pre_feedforward_layernorm",
    dense=Writer("mlp", "mlp.down_proj", ("post_feedforward_layernorm",)),
)


def dense_first(config, i):
    shared = Writer("mlp.shared_experts", "mlp.shared_experts.down_proj")
    return replace(MOE, shared=(shared,)) if i else DENSE


def jamba(config, i):
    attention = i % config.attn_layer_period == config.attn_layer_offset
    whole = {} if attention else {"attention": "mamba", "out_proj": ""}
    if i % config.expert_layer_period == config.expert_layer_offset:
        ffn = replace(MOE, experts="feed_forward.experts", router="feed_forward.router")
    else:
        ffn = replace(DENSE, dense=Writer("feed_forward", "feed_forward.down_proj"))
    return replace(ffn, middle="pre_ff_layernorm", **whole)


def qwen3_next(config, i):
    linear = config.layer_types[i] == "linear_attention"
    return replace(MOE, shared=(GATED,), **({"attention": "linear_attn", "out_proj": ""} if linear else {}))


def nemotron_h(config, i):
    shared = Writer("mixer.shared_experts", "mixer.shared_experts.down_proj")
    none = {"attention": "", "out_proj": ""}
    return {
        "linear_attention": replace(ONE_BLOCK, attention="mixer", out_proj=""),
        "full_attention": replace(ONE_BLOCK, attention="mixer", out_proj="mixer.o_proj"),
        "mlp": replace(ONE_BLOCK, dense=Writer("mixer", "mixer.down_proj"), **none),
        "moe": replace(ONE_BLOCK, experts="mixer.experts", router="mixer.gate", shared=(shared,), **none),
    }[config.layers_block_type[i]]


def gemma4(config, i):
    both = ("post_feedforward_layernorm_2", "post_feedforward_layernorm")
    dense = Writer("mlp", "mlp.down_proj", ("post_feedforward_layernorm_1", "post_feedforward_layernorm"))
    experts = {"experts": "experts", "router": "router.proj", "expert_norms": both}
    return replace(SANDWICH, dense=None, shared=(dense,), **experts)


FAMILIES = {
    "olmoe": Family(lambda config, i: MOE),
    "qwen2_moe": Family(lambda config, i: replace(MOE, shared=(GATED,))),
    # Latent attention, and a dense first layer.
    "deepseek_v3": Family(dense_first),
    # A router with a bias that is a module of its own.
    "ernie4_5_moe": Family(dense_first),
    # Biases everywhere, gate and up interleaved, weights the other way round.
    "gpt_oss": Family(lambda config, i: replace(MOE, router="mlp.router")),
    # Norms behind the blocks.
    "flex_olmo": Family(
        lambda config, i: replace(
            MOE,
            attention_norms=("post_attention_layernorm",),
            middle="mlp",
            expert_norms=("post_feedforward_layernorm",),
        )
    ),
    # Norms before and behind, capped logits; with experts, two norms one after the other.
    "gemma2": Family(lambda config, i: SANDWICH, softcap=lambda config: config.final_logit_softcapping),
    "gemma4_text": Family(gemma4, softcap=lambda config: config.final_logit_softcapping),
    # Attention and FFN side by side, a final LayerNorm, scaled logits.
    "cohere2_moe": Family(lambda config, i: replace(MOE, middle=""), logit_scale=lambda config: config.logit_scale),
    # A factor on what each block adds, divided logits.
    "granitemoe": Family(lambda config, i: GRANITE, logit_scale=lambda config: 1 / config.logits_scaling),
    "granitemoeshared": Family(
        lambda config, i: replace(GRANITE, shared=(Writer("shared_mlp", "shared_mlp.output_linear"),)),
        logit_scale=lambda config: 1 / config.logits_scaling,
    ),
    # Blocks that look back without attention weights are one component.
    "jamba": Family(jamba, norm="model.final_layernorm"),
    "qwen3_next": Family(qwen3_next),
    # One block in a layer.
    "nemotron_h": Family(nemotron_h, norm="model.norm_f"),
    # Conv1D, LayerNorm with a bias.
    "gpt2": Family(
        lambda config, i: replace(
            DENSE, attention="attn", out_proj="attn.c_proj", middle="ln_2", dense=Writer("mlp", "mlp.c_proj")
        ),
        stack="transformer.h",
        norm="transformer.ln_f",
    ),
}
# Families of config/MODELS.md whose heads can be told apart.
PAGE = Path(__file__).parents[2] / "config/MODELS.md"
ROWS = [[cell.strip() for cell in line.split("|")] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
WITH_HEADS = [row[1] for row in ROWS if "/" in row[3]]
# A norm over all heads: what one head does scales the others.
NORMED = ("bitnet",)
every_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def built(name):
    torch.set_num_threads(1)
    model = families.build(name)
    return model, anatomy.find(model)


def layers_of(name, model):
    """The layers as described: (layer of the model, a function from its names to its modules, description)."""
    family = FAMILIES[name]
    for i, block in enumerate(model.get_submodule(family.stack)):

        def module(path, block=block):
            return block.get_submodule(path) if path else None

        yield block, module, family.layer(model.config, i)


# Which module is what.


@every_family
def test_every_part_is_the_module_of_that_name(name):
    model, parts = built(name)
    family = FAMILIES[name]
    assert parts.final_norm.module is model.get_submodule(family.norm)
    assert parts.unembedding is model.lm_head
    assert parts.logit_scale == pytest.approx(family.logit_scale(model.config))
    assert parts.softcap == family.softcap(model.config)
    described = list(layers_of(name, model))
    assert len(parts.layers) == len(described) == model.config.num_hidden_layers
    for found, (block, module, layer) in zip(parts.layers, described):
        assert (found.block, found.middle) == (block, module(layer.middle))

        def goes_through(part, names, module=module, layer=layer):
            assert part.path.factor == pytest.approx(layer.factor)
            assert [norm.module for norm in part.path.norms] == [module(n) for n in names]

        assert (found.attention is None) == (not layer.attention)
        if layer.attention:
            assert (found.attention.module, found.attention.out_proj) == (
                module(layer.attention),
                module(layer.out_proj),
            )
            assert found.n_heads == (model.config.num_attention_heads if layer.out_proj else 0)
            assert bool(found.attention.whole) == (not layer.out_proj)
            goes_through(found.attention, layer.attention_norms)
        assert (found.experts is None) == (not layer.experts)
        if layer.experts:
            assert (found.experts.module, found.experts.router) == (module(layer.experts), module(layer.router))
            assert found.n_experts == len(module(layer.experts).down_proj)
            goes_through(found.experts, layer.expert_norms)
        written = [(found.dense, layer.dense)] if layer.dense else []
        assert (found.dense is None) == (layer.dense is None)
        for part, writer in [*written, *zip(found.shared, layer.shared, strict=True)]:
            assert (part.down, part.gate) == (module(writer.down), module(writer.gate))
            goes_through(part, writer.norms)
        assert not found.whole
        assert not found.whole_ffn


# Which slice is which head.


def value_rows(layer, config):
    """By group of heads that share values: the heads, and the rows of the value projection that are theirs."""
    n, module = layer.n_heads, layer.attention.module
    width = layer.attention.out_proj.weight.numel() // config.hidden_size // n
    groups = getattr(config, "num_key_value_heads", None) or n
    kinds = {path.split(".")[-1]: part for path, part in module.named_modules()}
    kind = next(k for k in ("v_proj", "Wv", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn") if k in kinds)
    linear = kinds[kind] if hasattr(kinds[kind], "weight") else kinds[kind].linear
    rows = max(linear.weight.shape) if isinstance(linear, Conv1D) else len(linear.weight)
    # Only values, or queries, keys and values one after the other.
    starts = [rows - (groups - g) * width for g in range(groups)]
    if kind == "kv_b_proj":
        # Latent attention: of each head the keys, then the values.
        starts = [(h + 1) * rows // n - width for h in range(n)]
    elif kind == "query_key_value":
        starts = [(3 * h + 2) * width for h in range(n)]
    elif config.model_type == "codegen":
        # Of each head the query, the value, the key.
        starts = [(3 * h + 1) * width for h in range(n)]
    each = n // len(starts)
    assert each * len(starts) == n
    return linear, {
        tuple(range(i * each, (i + 1) * each)): start + torch.arange(width) for i, start in enumerate(starts)
    }


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_head_is_what_its_values_make(name):
    """With the values of one group of heads taken away, the slices of these heads are zero, and no other one is.

    Asked of the first layer with heads, since later ones change with what they read.
    """
    torch.set_num_threads(1)
    model = families.build(name)
    layer = next(layer for layer in anatomy.find(model).layers if layer.n_heads)
    linear, rows = value_rows(layer, model.config.get_text_config())
    seen = []
    layer.attention.out_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0][:, -1].unflatten(-1, (layer.n_heads, -1)))
    )

    def slices():
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        return seen.pop()

    whole = slices()
    assert (whole != 0).all()
    assert sorted(h for heads in rows for h in heads) == list(range(layer.n_heads))
    for heads, its in rows.items():
        kept = [parameter.detach().clone() for parameter in linear.parameters()]
        with torch.no_grad():
            (linear.weight.T if isinstance(linear, Conv1D) else linear.weight)[its] = 0
            if linear.bias is not None:
                linear.bias[its] = 0
        without = slices()
        with torch.no_grad():
            for parameter, before in zip(linear.parameters(), kept):
                parameter.copy_(before)
        for h in range(layer.n_heads):
            if h in heads:
                assert not without[:, h].any()
            elif name in NORMED:
                torch.testing.assert_close(
                    without[:, h] / without[:, h, :1], whole[:, h] / whole[:, h, :1], rtol=1e-3, atol=1e-3
                )
            else:
                assert torch.equal(without[:, h], whole[:, h])


def test_heads_that_are_mixed_are_not_taken_for_slices():
    """Differential attention subtracts one head from another and norms the pair: four heads make two."""
    parts = anatomy.find(families.build("diffllama"))
    assert [layer.n_heads for layer in parts.layers] == [0] * 4
    assert anatomy.levels(parts)["reasons"] == ["heads that are mixed before the output projection"]


def test_a_layer_that_scales_the_residual_stream_itself_is_refused():
    """What a part adds would be scaled again by every later layer. Gemma 4 can do that; 1 is only its first value."""
    model = families.build("gemma4_text")
    anatomy.find(model)
    model.model.layers[2].layer_scalar.fill_(0.5)
    with pytest.raises(
        AnatomyError, match="layer 2: its output is not the residual stream plus outputs of its modules"
    ):
        anatomy.find(model)


# LPI, from states that are put together by hand.


class ByHand:
    """A model's own modules in float64: one forward pass, whose states at the last token are added up by hand."""

    def __init__(self, name):
        self.family = FAMILIES[name]
        self.model = copy.deepcopy(built(name)[0]).double()
        self.model.set_experts_implementation("eager")
        self.seen = {}
        for module in self.model.modules():
            module.register_forward_hook(self.keep, with_kwargs=True)
        with torch.no_grad():
            self.logits = self.model(input_ids=IDS, use_cache=False).logits[:, -1]
        for module in self.model.modules():
            module._forward_hooks.clear()
            module._forward_hooks_with_kwargs.clear()
        self.norm = self.model.get_submodule(self.family.norm)
        self.final = self.inputs(self.norm)[0]

    def keep(self, module, args, kwargs, output):
        self.seen[module] = [*args, *kwargs.values()], output if isinstance(output, tuple) else (output,)

    def inputs(self, module):
        return [last(x) for x in self.seen[module][0] if isinstance(x, torch.Tensor)]

    def output(self, module):
        return last(self.seen[module][1][0])

    def held(self, norm, vector, real):
        """A norm of this vector with the scale that it really had: that of `real`."""
        bias = norm(torch.zeros_like(vector))
        return (norm(vector) - bias) * (self.scale(norm, real) / self.scale(norm, vector)) + bias

    def scale(self, norm, x):
        centred = isinstance(norm, torch.nn.LayerNorm) or "LayerNorm" in type(norm).__name__
        x = x - x.mean(-1, keepdim=True) if centred else x
        eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def through(self, layer, names, module, vector):
        """What of a vector reaches the residual stream of a layer: post-norms with their scales held, and a factor."""
        for name in names:
            vector = self.held(module(name), vector, self.inputs(module(name))[0]) - module(name)(vector * 0)
        return layer.factor * vector

    def log_p(self, state):
        """log p(w | state), with the scale of the real final state."""
        logits = self.model.lm_head(self.held(self.norm, state, self.final))
        logits = logits * self.family.logit_scale(self.model.config)
        cap = self.family.softcap(self.model.config)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return logits.log_softmax(-1)[range(len(TARGETS)), TARGETS]


def last(x):
    """The last token of each prompt, whether or not prompts and tokens are one dimension."""
    return x.reshape(*IDS.shape, -1)[:, -1] if x[..., 0].numel() == IDS.numel() else x


@pytest.fixture(scope="module")
def attributed(tmp_path_factory):
    """By family: the tables, from a cache."""

    def of(name):
        model, parts = built(name)
        tokens = pd.DataFrame({"prompt_id": range(4), "token_ids": IDS.tolist(), "length": np.int16(6)})
        tokens["accepted_ids"] = [[target] for target in TARGETS]
        tensors, table, errors = capture.in_memory(model, parts, tokens, 3)
        assert max(errors.values()) < 1e-5
        path = tmp_path_factory.mktemp(name) / "0.safetensors"
        write_tensors(tensors, path)
        return attribution.attribute(parts, [path], table)

    return of


@every_family
def test_lpi_is_that_of_states_put_together_from_the_models_own_modules(attributed, name):
    """Layers, heads, routed and shared experts: the model's norm, unembedding and cap on what the modules give."""
    layers, heads, experts, _ = attributed(name)
    hand = ByHand(name)
    # The readout that is put together here is the model's.
    torch.testing.assert_close(hand.log_p(hand.final), hand.logits.double().log_softmax(-1)[range(4), TARGETS])
    layers = layers.set_index(["layer", "prompt_id"])
    heads, experts = heads.set_index(["layer", "head"]), experts.set_index(["layer", "prompt_id", "expert"])
    compared = {"layers": 0, "heads": 0, "experts": 0}

    def agree(found, state, base, level):
        with torch.no_grad():
            expected = hand.log_p(state) - hand.log_p(base)
        compared[level] += len(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=5e-6)

    for i, (block, module, layer) in enumerate(layers_of(name, hand.model)):
        before, after = hand.inputs(block)[0], hand.output(block)
        adds = layer.attention_norms[-1] if layer.attention_norms else layer.attention
        middle = before + layer.factor * hand.output(module(adds)) if adds else before
        agree(layers.loc[i]["attention"], middle, before, "layers")
        agree(layers.loc[i]["ffn"], after, middle, "layers")
        if layer.out_proj:
            out_proj, x = module(layer.out_proj), hand.inputs(module(layer.out_proj))[0]
            width = x.shape[-1] // hand.model.config.num_attention_heads
            for head in range(hand.model.config.num_attention_heads):
                alone = torch.zeros_like(x)
                alone[:, head * width : (head + 1) * width] = x[:, head * width : (head + 1) * width]
                vector = out_proj(alone) - out_proj(torch.zeros_like(x))
                vector = hand.through(layer, layer.attention_norms, module, vector)
                agree(heads.loc[(i, head), "lpi"], before + vector, before, "heads")
        if layer.experts:
            states, ids, weights = hand.inputs(module(layer.experts))
            for slot in range(ids.shape[1]):
                at = slice(slot, slot + 1)
                vector = module(layer.experts)(states, ids[:, at], weights[:, at])
                vector = hand.through(layer, layer.expert_norms, module, vector)
                rows = experts.loc[[(i, prompt, int(ids[prompt, slot])) for prompt in range(4)]]
                agree(rows["lpi"], middle + vector, middle, "experts")
                np.testing.assert_allclose(rows["weight"], weights[:, slot], rtol=1e-4)
        for number, writer in enumerate(layer.shared):
            gate = hand.output(module(writer.gate)).sigmoid() if writer.gate else torch.ones(4, 1)
            vector = hand.through(layer, writer.norms, module, gate * hand.output(module(writer.module)))
            rows = experts.loc[[(i, prompt, -1 - number) for prompt in range(4)]]
            agree(rows["lpi"], middle + vector, middle, "experts")
            np.testing.assert_allclose(rows["weight"], gate[:, 0], rtol=1e-4)
    assert compared == {"layers": len(layers) * 2, "heads": len(heads), "experts": len(experts)}
    # Divided logits make small effects.
    assert np.abs(layers.to_numpy()).max() > 1e-3

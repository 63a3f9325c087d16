"""A tiny random model of the same structure as a given one, to ask within seconds whether its parts can be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moescope.anatomy import check_kind, find, levels
from moescope.capture import record, verify
from moescope.checkpoints import FAILURES, auto_class

LAYERS = 4
LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "decoder_layers")
# What a size becomes, by the field's names for it. A size that is 0, missing or smaller stays as it is.
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads", "n_heads", "n_head"), 4),
    **dict.fromkeys(("n_inner", "ffn_dim", "decoder_ffn_dim", "dff"), 48),
    "decoder_attention_heads": 4,
    "rotary_dim": 4,
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 3),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "moe_latent_size", "router_hidden_size"), 16),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "o_groups", "zero_expert_num", "n_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    "ple_embed_dim": 32,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a miniature: every kind of layer at least once, every flag kept, small sizes."""
    return type(config).from_dict(_small_config(config.to_dict()))


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """An untrained miniature in float32, its weights drawn from `seed`.

    They hide nothing: large ones, and gains and biases that are not 1 and 0, which a trained model would not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = shrink(config)
        model = auto_class(small).from_config(small, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        with torch.no_grad():
            if weight.ndim >= 2:
                weight.mul_(5)
            elif weight.numel() > 1:
                weight.mul_(torch.empty(weight.shape).uniform_(0.5, 1.5, generator=generator))
                weight.add_(torch.empty(weight.shape).uniform_(-0.05, 0.05, generator=generator))
    return model


@torch.no_grad()
def foresee(config: PreTrainedConfig, moe: bool) -> dict[str, Any]:
    """What of a model can be told apart (anatomy.levels), found in a miniature before any of its weights is loaded.

    Raises AnatomyError for a structure that is not understood, and for a dense model where an MoE is asked for. Where
    no miniature can be built, the result says so, and the model is checked when it first runs.
    """
    try:
        model = build(config)
        ids = torch.arange(4, 16).reshape(2, 6)
        model(input_ids=ids, use_cache=False)
    except FAILURES as error:
        return {"not_foreseen": f"no miniature of {config.model_type} could be built ({type(error).__name__})"}
    parts = find(model)
    verify(model, parts, ids, *record(model, parts, ids))
    check_kind(parts, moe)
    return levels(parts)


def _small_config(values: Mapping[str, Any]) -> dict[str, Any]:
    small = {key: _small(key, value, values) for key, value in values.items()}
    layers = next((values[key] for key in LAYER_COUNTS if isinstance(values.get(key), int)), None)
    lists = [value for key, value in values.items() if key.endswith(("layer_types", "layers_block_type")) and value]
    layers = layers if layers is not None else len(lists[0]) if lists else None
    if layers is None:
        return small
    per_layer = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == layers}
    special = {int(key): value for key, value in (values.get("per_layer_config") or {}).items()}
    kinds = [(*(str(v[i]) for v in per_layer.values()), str(special.get(i))) for i in range(layers)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept = sorted([*kept, *[i for i in range(layers) if i not in kept][: max(LAYERS - len(kept), 0)]])
    small |= {key: [value[i] for i in kept] for key, value in per_layer.items()}
    small |= {key: len(kept) for key in LAYER_COUNTS if isinstance(values.get(key), int)}
    if special:
        small["per_layer_config"] = {
            f"{new:02}": {key: _small(key, value, values | special[old]) for key, value in special[old].items()}
            for new, old in enumerate(kept)
            if old in special
        }
    if small.get("first_k_dense_replace"):
        small["first_k_dense_replace"] = 1
    return small


def _small(key: str, value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and key.endswith("config") and key != "per_layer_config":
        return _small_config(value)
    if key == "rope_parameters" and isinstance(value, Mapping):
        return _small_rope(value, values)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key.endswith("_token_id"):
        return min(value, SIZES["vocab_size"] - 1)
    if values.get("qk_rope_head_dim") and key.endswith("head_dim") and key != "v_head_dim":
        # A latent head is a rotary and another part, and some families name their sum head_dim: all in proportion.
        return max(1, value * SIZES["qk_rope_head_dim"] // values["qk_rope_head_dim"])
    if key == "num_key_value_heads" and value == values.get("num_attention_heads"):
        return min(value, SIZES["num_attention_heads"])
    return min(value, SIZES.get(key, value))


def _small_rope(rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary sections (for text, height and width) that fill a small head as they fill the real one."""
    small = {key: _small_rope(part, values) if isinstance(part, Mapping) else part for key, part in rope.items()}
    if sections := rope.get("mrope_section"):
        head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        total = sum(sections) * SIZES["head_dim"] // head
        rest = total // len(sections)
        small["mrope_section"] = [total - rest * (len(sections) - 1), *[rest] * (len(sections) - 1)]
    return small

"""Families beyond the six: tiny random models of the real classes, whose anatomy is found by structure alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moescope import anatomy, capture, models

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MOE = ["ernie4_5_moe", "exaone_moe", "glm4_moe", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "minimax_m2"]
MOE += ["qwen3_moe", "solar_open"]
DENSE = ["apertus", "arcee", "ernie4_5", "gemma", "glm", "granite", "helium", "phi3", "qwen3", "seed_oss", "smollm3"]


def tiny(name):
    known = {key: value for key, value in SMALL.items() if hasattr(AutoConfig.for_model(name), key)}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **known)).float().eval()


@pytest.mark.parametrize("name", [*MOE, *DENSE])
def test_the_parts_of_other_families_add_up(name):
    model = tiny(name)
    # Norm gains of 1 (or 0, where the gain is the parameter plus 1) would hide a wrong gain.
    torch.nn.init.uniform_(next(model.model.norm.parameters()), 0.5, 1.5)
    parts = anatomy.find(model)
    ids = torch.arange(3, 27).reshape(4, 6)
    with torch.no_grad():
        found, logits = capture.record(model, parts, ids)
        errors = capture.verify(model, parts, ids, found, logits)
    assert parts.is_moe == (name in MOE)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "flex_olmo", "cohere", "bloom", "falcon_mamba"])
def test_families_that_are_not_understood_are_refused_with_a_sentence(name):
    """Sandwich norms, post-norms, parallel blocks, LayerNorm and state-space layers: never silently wrong."""
    model = tiny(name)
    ids = torch.arange(3, 27).reshape(4, 6)

    def use():
        parts = anatomy.find(model)
        with torch.no_grad():
            capture.verify(model, parts, ids, *capture.record(model, parts, ids))

    with pytest.raises(models.AnatomyError, match=r"layer 0|Bloom|FalconMamba"):
        use()

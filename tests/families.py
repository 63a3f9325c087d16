"""The support matrix, measured: a miniature of every causal language model of the installed transformers.

PYTHONPATH=scripts python tests/families.py > config/MODELS.md
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from moescope import anatomy, capture, checkpoints, miniature, resume
from moescope.intervene import HOW, block_experts, block_ffn, block_shared, intervene, record_routing, replay
from moescope.models import Anatomy, AnatomyError

SOURCES = Path(transformers.__file__).parent / "models"
EXPERTS = re.compile(r"use_experts_implementation|class \w*(?:Experts|MoE|Moe|Router)\w*\(")
# Decoders of encoder-decoder models, which checkpoints.load refuses.
DECODERS = re.compile(
    r"^(Bart|BigBirdPegasus|Blenderbot|MBart|Marian|MvpFor|PLBart|Pegasus|Prophet|SpeechT5|TrOCR|Whisper)"
)
IDS = torch.arange(4, 28).reshape(4, 6)
# What a family's own default configuration leaves out, or the reason to look at it: real checkpoints say it.
ASKED: dict[str, dict] = {
    "deepseek_v2": {"num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_shared_experts": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 6.0, "embedding_multiplier": 12.0},
    "granitemoe": {"residual_multiplier": 0.22, "logits_scaling": 6.0, "embedding_multiplier": 12.0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16, "residual_multiplier": 0.22},
    "granitemoeshared": {"shared_intermediate_size": 48, "residual_multiplier": 0.22},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3, "head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "step3p7": {"text_config": {"sliding_window": 64}},
}


@dataclass(frozen=True)
class Row:
    """What was found for one family: its levels in words, or why not."""

    model_type: str
    layers: str = ""
    heads: str = ""
    experts: str = ""
    shared: str = ""
    neurons: str = ""
    resumes: str = ""
    note: str = ""

    @property
    def verified(self) -> bool:
        """Whether all of its layers add up."""
        return bool(self.layers)


def model_types() -> list[str]:
    """Every model type that is a decoder of its own: text models, and those image-text models with experts."""
    found: dict[str, str] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        if DECODERS.search(name) or model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            continue
        family = model_type_to_module_name(model_type)
        if family not in found or model_type.endswith("_text"):
            found[family] = model_type
    for model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        family = model_type_to_module_name(model_type)
        if family not in found and has_experts(model_type):
            found[family] = model_type
    return sorted(found.values())


@cache
def has_experts(model_type: str) -> bool:
    """Whether the family's source has experts, through the interface or in code of its own."""
    folder = SOURCES / model_type_to_module_name(model_type)
    return any(EXPERTS.search(path.read_text()) for path in folder.glob("modeling_*.py"))


def build(model_type: str) -> torch.nn.Module:
    """The miniature of a family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return miniature.build(AutoConfig.for_model(model_type, **ASKED.get(model_type, {})))


@torch.no_grad()
def measure(model_type: str) -> tuple[Row, dict[str, float]]:
    """The row of a family, and the errors of its checks.

    Those are: each verified equation; batch against single prompts; the change that blocking experts that are never
    used makes; and what is recorded with another experts backend than the default one, each verified by itself.
    """
    try:
        model = build(model_type)
        model(input_ids=IDS, use_cache=False)
    except checkpoints.FAILURES as error:
        return Row(model_type, note=f"no miniature ({type(error).__name__})"), {}
    try:
        parts = anatomy.find(model)
        found, logits = capture.record(model, parts, IDS)
        errors = capture.verify(model, parts, IDS, found, logits)
    except AnatomyError as error:
        return Row(model_type, note=str(error)), {}
    single = torch.cat([capture.record(model, parts, row)[1] for row in IDS.split(1)])
    errors["batch = single"] = float((single - logits).abs().max() / logits.abs().max())
    unused = {
        layer.index: found[f"{layer.index}.expert_load"].sum(0).eq(0).expand(len(IDS), -1)
        for layer in parts.layers
        if layer.experts
    }
    with intervene(parts, block_experts(unused)):
        errors["never-used experts blocked"] = float((capture.readout_logits(model, IDS) - logits).abs().max())
    errors["interventions that change nothing"] = max(_unchanged(model, parts, logits), default=0.0)
    errors["all experts blocked = FFN blocked"] = _experts_are_the_ffn(model, parts)
    for backend in ("eager", "batched_mm") if parts.is_moe else ():
        model.set_experts_implementation(backend)
        other, other_logits = capture.record(model, parts, IDS)
        capture.verify(model, parts, IDS, other, other_logits)
        names = [name for name in found if not name.endswith("router_margin")]
        errors[f"{backend} = default backend"] = max(_difference(other[name], found[name]) for name in names)
    try:
        resume.clean_run(model, parts, IDS)
        resumes = "yes"
    except resume.ResumeError:
        resumes = "no"
    return row_of(model_type, anatomy.levels(parts), resumes), errors


def _unchanged(model: torch.nn.Module, parts: Anatomy, logits: torch.Tensor) -> Iterator[float]:
    """Change of the logits by interventions that have nothing to do, or replay what happens anyhow."""
    with record_routing(parts) as routing:
        capture.readout_logits(model, IDS)
    none = {i: torch.zeros(len(IDS), parts.layers[i].n_experts, dtype=torch.bool) for i in routing}
    for edit in [replay(routing), *(block_experts(none, how) for how in HOW)] if routing else []:
        with intervene(parts, edit):
            yield float((capture.readout_logits(model, IDS) - logits).abs().max())


def _experts_are_the_ffn(model: torch.nn.Module, parts: Anatomy) -> float:
    """Difference of the logits between all experts of the MoE layers blocked and their FFN blocks blocked."""
    layers = [layer for layer in parts.layers if layer.experts is not None and not layer.whole_ffn and not layer.dense]
    experts = {layer.index: torch.ones(1, layer.n_experts, dtype=torch.bool) for layer in layers}
    shared = {layer.index: torch.ones(1, len(layer.shared), dtype=torch.bool) for layer in layers}
    with intervene(parts, block_experts(experts), block_shared(shared)):
        one = capture.readout_logits(model, IDS)
    with intervene(parts, block_ffn({layer.index: torch.ones(1, dtype=torch.bool) for layer in layers})):
        return float((capture.readout_logits(model, IDS) - one).abs().max())


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.float(), other.float()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))


def row_of(model_type: str, found: dict, resumes: str) -> Row:
    """A row of the table from anatomy.levels, and whether clean runs can be resumed."""
    keys = ("with_heads", "with_experts", "with_shared_experts", "with_dense_neurons")
    of = (f"{found[key]}/{found['layers']}" if found[key] else "" for key in keys)
    return Row(model_type, str(found["layers"]), *of, resumes, note="; ".join(found["reasons"]))


def line(row: Row) -> str:
    cells = (
        row.model_type,
        row.layers,
        row.heads,
        row.experts,
        row.shared,
        row.neurons,
        row.resumes,
        row.note.replace("|", "/"),
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The table as Markdown."""
    rows = [measure(model_type)[0] for model_type in model_types()]
    moe, dense = ([row for row in rows if has_experts(row.model_type) is wanted] for wanted in (True, False))
    counts = Counter(
        "experts"
        if row.experts
        else "layers"
        if row.verified
        else "no miniature"
        if "no mini" in row.note
        else "refused"
        for row in moe
    )
    head = ["| model type | layers | heads | experts | shared | neurons | resumes | note |", "| --- " * 8 + "|"]
    table = {kind: "\n".join([*head, *map(line, part)]) for kind, part in (("moe", moe), ("dense", dense))}
    return TEXT.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        n_moe=len(moe),
        n_dense=len(dense),
        n_dense_verified=sum(row.verified for row in dense),
        **{name.replace(" ", "_"): counts[name] for name in ("experts", "layers", "refused", "no miniature")},
        **table,
    )


TEXT = """# Models

Any causal language model whose parts add up can be studied; there is no list of names in the code. Before the weights
of a hub or folder model are loaded, a miniature of it (its own configuration with small sizes, random weights) is built
and taken apart; the real weights are checked again on the first prompts. What miniatures of the default configurations
show, for every causal language model of transformers {transformers} (torch {torch}), and for those image-text models
with experts that it has no causal one of (a trained constant can still make a difference: gemma4 is refused where its
layer_scalar is not 1):

- {n_moe} families with experts: {experts} add up down to their routed experts, {layers} down to layers only, {refused}
  are refused, {no_miniature} have no miniature, since their default configuration is not complete (a real one may be);
- {n_dense} families without: {n_dense_verified} add up.

The columns say in how many layers of the miniature heads, routed experts, shared experts and dense neurons can be told
apart; where a block cannot be, it is one component, and the note says why. Whatever is listed with layers adds up to
1e-5 of what is compared; the recorded and the plain forward pass agree bit for bit; a batch gives what single prompts
give; the experts backends eager, batched_mm and grouped_mm record the same to 1e-5; blocking experts that no token uses
changes nothing, nor does any way of blocking with nothing to block, or a replay of the routing, bit for bit; blocking
all experts and shared ones is blocking the FFN. Where clean runs can be resumed at the readout position, maps of every
head start there, and so do maps of every expert unless a norm follows the experts; elsewhere they take full forward
passes. The tests measure all of this again and compare this page:
`PYTHONPATH=scripts:tests python tests/families.py > config/MODELS.md` writes it.

## With experts

{moe}

## Without

{dense}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.stdout.write(page())

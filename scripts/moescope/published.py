"""Numbers that the KA paper prints for real checkpoints, to stand beside ours (method.md, section 8).

Source: Li et al. 2025, Decoding Knowledge Attribution in Mixture-of-Experts (ACL 2025 long 1093, arXiv
2505.24593), Tables 1, 2 and 5, as printed there, rounded to two or three digits. The paper's prompts come
from the relation files of LRE (Hernandez et al. 2024). On other facts or wordings a difference from these
numbers is a difference between prompts too. They are for reading only: nothing is fitted to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moescope.facts import did_you_mean

N_BLOCKED = (1, 5, 10)
"""Blocked experts in Table 5: a relation's best by mean LPI."""

RELATIONS = {"country_capital_city": "country_capital"}
"""Names of LRE's relation files that the paper shortens; all other relations have one name."""


@dataclass(frozen=True)
class Published:
    """What is printed for one model.

    `efficiency` (Table 1): by metric as in tables.METRICS; gains in nats, the peak position as a share of the
    layers (the paper prints percent). `keep_only` (Table 2): HIT@10 and MRR by whether shared experts are kept
    and how many routed ones. `blocking` (Table 5): MRR by relation, clean and with N_BLOCKED experts blocked.
    """

    efficiency: Mapping[str, float]
    keep_only: Mapping[tuple[bool, int], tuple[float, float]] = field(default_factory=dict)
    blocking: Mapping[str, tuple[float, float, float, float]] = field(default_factory=dict)


def numbers(name: str) -> Published:
    """The numbers of a model by its name here. Raises ValueError, a sentence, if there are none."""
    if name not in MODELS:
        raise ValueError(f"'{name}' is no model with published numbers{did_you_mean(name, MODELS)}")
    return MODELS[name]


def blocked_mrr(model: Published, relation: str, n_blocked: int) -> tuple[float, float] | None:
    """Clean and blocked MRR of a relation, under the paper's name or LRE's; None if it is not printed."""
    row = model.blocking.get(RELATIONS.get(relation, relation))
    return (row[0], row[1 + N_BLOCKED.index(n_blocked)]) if row and n_blocked in N_BLOCKED else None


def _table_1(hit: float, mrr: float, ffn: float, attention: float, peak: float, efficiency: float) -> dict[str, float]:
    return {
        "hit_at_10": hit,
        "mrr": mrr,
        "ffn_gain": ffn,
        "attention_gain": attention,
        "peak_position": round(peak / 100, 3),
        "layer_efficiency": efficiency,
    }


MODELS: Mapping[str, Published] = {
    "Llama-7B": Published(_table_1(0.90, 0.70, 5.16, 4.03, 77.6, 0.161)),
    "Qwen1.5-7B": Published(_table_1(0.79, 0.62, 6.49, 4.14, 90.2, 0.203)),
    "Mistral-7B": Published(_table_1(0.88, 0.71, 6.74, 2.96, 83.2, 0.211)),
    "Qwen1.5-MoE": Published(
        _table_1(0.85, 0.63, 7.36, 3.18, 84.8, 0.307),
        {
            (False, 1): (0.00, 0.00),
            (False, 2): (0.00, 0.00),
            (True, 0): (0.03, 0.01),
            (True, 1): (0.82, 0.59),
            (True, 2): (0.83, 0.63),
            (True, 4): (0.85, 0.63),
        },
        {
            "name_birthplace": (0.85, 0.84, 0.83, 0.81),
            "country_capital": (0.71, 0.68, 0.68, 0.40),
            "country_language": (0.94, 0.92, 0.92, 0.92),
            "fruit_inside_color": (0.74, 0.68, 0.63, 0.60),
            "object_superclass": (0.83, 0.82, 0.80, 0.79),
        },
    ),
    "OLMoE": Published(
        _table_1(0.83, 0.64, 4.98, 4.40, 84.6, 0.311),
        blocking={
            "name_birthplace": (0.82, 0.80, 0.80, 0.60),
            "country_capital": (1.00, 1.00, 0.76, 0.76),
            "country_language": (0.96, 0.92, 0.87, 0.68),
            "fruit_inside_color": (0.76, 0.60, 0.52, 0.41),
            "object_superclass": (0.80, 0.75, 0.70, 0.66),
        },
    ),
    "Mixtral-8x7B": Published(_table_1(0.90, 0.73, 6.79, 3.03, 83.3, 0.212)),
}

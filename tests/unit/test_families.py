"""The support matrix of config/MODELS.md, measured again: a miniature of every causal language model."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from moescope import anatomy, capture

import families

PAGE = Path(__file__).parents[2] / "config/MODELS.md"
LINES = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
ROWS = {line.split(" | ")[0].strip("| "): line for line in LINES if not line.startswith(("| ---", "| model type"))}
MOST = 1e-5


def test_the_page_lists_every_family_of_the_installed_library_and_counts_them():
    assert f"of transformers {transformers.__version__} (torch {torch.__version__.split('+')[0]})" in PAGE.read_text()
    assert ROWS.keys() == set(families.model_types())
    moe, routed = map(int, re.search(r"- (\d+) families with experts: (\d+) add up", PAGE.read_text()).groups())
    dense, verified = map(int, re.search(r"- (\d+) families without: (\d+) add up", PAGE.read_text()).groups())
    cells = [row.split(" | ") for row in ROWS.values()]
    assert (moe, dense) == (sum(map(families.has_experts, ROWS)), len(ROWS) - moe)
    assert routed == sum(row[3] != "" for row in cells) >= 45
    readme = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    assert f"of {moe} families with experts {routed} add up down to their routed experts" in readme
    assert f"and {verified} dense ones do" in readme
    assert verified == sum(row[1] != "" and not families.has_experts(row[0].strip("| ")) for row in cells) >= 10


@pytest.mark.parametrize("model_type", families.model_types())
def test_a_family_is_what_the_page_says_and_adds_up(model_type):
    """Works down to these levels, or is refused with this sentence: no family is silently wrong."""
    torch.set_num_threads(1)
    row, errors = families.measure(model_type)
    assert families.line(row) == ROWS[model_type]
    if row.verified:
        assert errors.pop("never-used experts blocked") == 0.0
        assert errors.pop("interventions that change nothing") == 0.0
        assert max(errors.values()) < MOST, errors


@pytest.mark.parametrize(
    "model_type", ["cohere2_moe", "deepseek_v3", "flex_olmo", "gemma2", "gpt_oss", "granitemoe", "olmoe", "qwen3_next"]
)
def test_half_precision_and_huge_entries_of_the_residual_stream_hide_nothing(model_type):
    """Trained models have residual dimensions thousands of times larger than an increment, and run in bfloat16."""
    model = families.build(model_type)
    found = anatomy.levels(anatomy.find(model))
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 3] += 2000 * embedding.std()
    parts = anatomy.find(model.bfloat16())
    assert anatomy.levels(parts) == found
    with torch.no_grad():
        capture.verify(model, parts, families.IDS, *capture.record(model, parts, families.IDS))

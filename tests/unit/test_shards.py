"""A data set cut into shards gives the bits that it gives in one piece, however many shards there are."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import (
    ablations,
    anatomy,
    artifacts,
    attribution,
    capture,
    expert_map,
    masking,
    routing,
    samples,
    steering,
    tracing,
    utilization,
)
from moescope.activations import opened

torch.set_num_threads(1)
BATCH_SIZE = 5
SHARDS = (2, 3, 7)
"""Of 16 prompts there are four blocks, and of two relations two: some of seven shards have none."""
RUNS = [("qwen2_moe", "all_tokens"), ("llama", "first_token")]


@st.composite
def tables_of_prompts(draw):
    n = draw(st.integers(0, 40))
    lengths = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    table = pd.DataFrame({"prompt_id": draw(st.permutations(range(n))), "length": lengths}).astype(int)
    if draw(st.booleans()):
        table["target_ids"] = [[0] * draw(st.integers(1, 3)) for _ in range(n)]
    return table


@given(tables_of_prompts(), st.integers(1, 9), st.integers(1, 9))
def test_blocks_are_a_partition_by_length_and_those_of_a_share_are_blocks_of_the_whole(prompts, batch_size, shards):
    found = samples.blocks(prompts, batch_size)
    assert sorted(row for block in found for row in block) == list(range(len(prompts)))
    assert all(len(block) == batch_size for block in found[:-1])
    assert all(1 <= len(block) <= batch_size for block in found)
    given_tokens = prompts["target_ids"].map(len) if "target_ids" in prompts else 0
    keys = list(zip(prompts["length"] + given_tokens, prompts["prompt_id"]))
    assert [keys[row] for block in found for row in block] == sorted(keys)
    # By the names of prompts: neither the number of shards nor the order of rows changes what is in a block.
    named = [prompts["prompt_id"].iloc[block].tolist() for block in found]
    shuffled = prompts.sample(frac=1, random_state=0)
    assert [shuffled["prompt_id"].iloc[b].tolist() for b in samples.blocks(shuffled, batch_size)] == named
    shares = [samples.share(prompts, batch_size, shard, shards) for shard in range(shards)]
    of_shares = [own["prompt_id"].iloc[b].tolist() for own in shares for b in samples.blocks(own, batch_size)]
    assert sorted(of_shares) == sorted(named)
    assert all(own.equals(prompts.loc[own.index]) for own in shares)


def test_shards_of_a_table_without_prompts_must_be_the_same():
    one, other = pd.DataFrame({"layer": [0, 1]}), pd.DataFrame({"layer": [0, 2]})
    assert samples.gathered({"a": one, "b": one.copy()}).equals(one)
    with pytest.raises(ValueError, match="b: differs from a, which every shard has alike; delete both and run again"):
        samples.gathered({"a": one, "b": other})


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request, build, tokens, tmp_path_factory):
    """A model, its prompts, and what is chosen from all of them before any shard is measured."""
    name, answer = request.param
    model, tokens = build(name), tokens[tokens["object_tokens"] < 4]
    parts, folder = anatomy.find(model), tmp_path_factory.mktemp("shards")
    cache, prompts = captured(model, parts, tokens, folder, answer, 1)
    assert prompts["target_ids"].str.len().max() > 1 or answer == "first_token"
    _, heads, experts, _ = attribution.attribute(parts, cache, prompts)
    half = ablations.split_subjects(prompts, 0)
    head_sets, _ = steering.choose_heads(parts, heads, prompts, half, [2], 1, 0)
    keys = utilization.find(model, parts, prompts, BATCH_SIZE, share=0.05)
    masked = masking.choose(prompts, half, *keys, utilization.units(parts), [0.05], [1], 1, 0)
    sets = []
    if parts.is_moe:
        load = ablations.expert_load(parts, cache, prompts)
        sets, _ = ablations.choose_sets(experts, load, prompts, half, [1, 2], 1, 0)
    return SimpleNamespace(**locals())


def captured(model, parts, tokens, folder, answer, shards):
    """The cache of all shards in files, and its prompts as they are gathered."""
    paths, tables = [], []
    for shard in range(shards):
        paths.append(folder / f"{shard}-of-{shards}.safetensors")
        n = len(capture.rows(samples.share(tokens, BATCH_SIZE, shard, shards), answer))
        with artifacts.writing_tensors(paths[-1], "activations", n) as file:
            tables.append(capture.capture(model, parts, tokens, BATCH_SIZE, file.put, answer, shard, shards)[0])
    return paths, through_files(tables, "prompts", folder)


def through_files(shards, kind, folder):
    """The shards of a table written, read and put together."""
    read = {}
    for number, table in enumerate(shards):
        artifacts.write_table(table, folder / f"{number}.parquet", kind, {})
        read[f"{number}"] = artifacts.read_table(folder / f"{number}.parquet", kind)
    return samples.gathered(read)


def test_the_cache_has_the_same_bits(run):
    for shards in SHARDS:
        paths, prompts = captured(run.model, run.parts, run.tokens, run.folder, run.answer, shards)
        pd.testing.assert_frame_equal(prompts, run.prompts, check_exact=True)
        index = artifacts.tensor_index(paths, "activations")["shards"]
        assert len({frozenset(tensors) for tensors in index.values()}) == 1
        rows = [tensors["prompt_id"][0][0] for tensors in index.values()]
        assert (0 in rows) == (shards == 7)
        every = attribution.attribute(run.parts, paths, prompts)
        for found, expected in zip(every, attribution.attribute(run.parts, run.cache, run.prompts)):
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
        found, expected = routing.summarise(paths, prompts), routing.summarise(run.cache, run.prompts)
        for kind, table in found.items():
            pd.testing.assert_frame_equal(table, expected[kind], check_exact=True)
        if run.parts.is_moe:
            assert np.array_equal(ablations.expert_load(run.parts, paths, prompts), run.load)
        with artifacts.open_tensors(run.cache[0], "activations") as file:
            names = file.keys()
        with opened(run.cache, run.prompts) as one, opened(paths, prompts) as other:
            for name in names:
                assert torch.equal(*(x.get(name, np.arange(len(x))) for x in (one, other))), name


def measures(run):
    """By kinds of tables, a function from the number of a shard and that of shards to these tables."""
    model, parts, prompts, half = run.model, run.parts, run.prompts, run.half
    of_blocks = {
        ("head_map", "head_router"): lambda block: steering.sweep(model, parts, block, BATCH_SIZE),
        ("head_blocking",): lambda block: [
            steering.measure_head_blocking(model, parts, block, half[block.index], run.head_sets, BATCH_SIZE)
        ],
        ("key_neurons", "expert_tokens"): lambda block: utilization.find(model, parts, block, BATCH_SIZE, share=0.05),
    }
    if parts.is_moe:
        of_blocks |= {
            ("blocking",): lambda block: [
                ablations.measure_blocking(model, parts, block, half[block.index], run.sets, BATCH_SIZE)
            ],
            ("keep_only",): lambda block: [ablations.measure_keep_only(model, parts, block, [1], BATCH_SIZE)],
            ("expert_map",): lambda block: [expert_map.measure(model, parts, block, BATCH_SIZE, expert_map.POSITIONS)],
            ("gate_gradients", "gate_paths"): lambda block: steering.gate_gradients(model, parts, block, BATCH_SIZE, 3),
        }
    for kinds, measure in of_blocks.items():
        chosen = ablations.sample_subjects(prompts, 14, 0) if "gate_paths" in kinds else prompts
        yield kinds, partial(samples.in_blocks, measure, chosen, BATCH_SIZE)

    def mask(shard, shards):
        own = samples.share(prompts, BATCH_SIZE, shard, shards)
        return [masking.measure(model, parts, own, half[own.index], run.masked, BATCH_SIZE)]

    yield ("masking",), mask
    # Six prompts, twice the noise, one draw, one expert at a time, seed 0.
    yield ("tracing", "tracing_runs"), partial(tracing.trace, model, parts, prompts, BATCH_SIZE, 6, 2.0, 1, [1], 0)


def test_every_measure_gives_the_same_bits(run, tmp_path):
    for kinds, measure in measures(run):
        whole = measure(0, 1)
        for shards in SHARDS:
            pieces = [measure(shard, shards) for shard in range(shards)]
            for number, kind in enumerate(kinds):
                of_kind = [tables[number] for tables in pieces]
                assert all(list(table) == list(whole[number]) for table in of_kind), kind
                found = through_files(of_kind, kind, tmp_path)
                pd.testing.assert_frame_equal(found, whole[number], check_exact=True, obj=kind)
                if len(found):
                    assert (0 in map(len, of_kind)) == (shards == 7 or (shards > 2 and kind.startswith("tracing")))

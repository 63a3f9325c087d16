"""The split of router logits against the models' own logits, and associations against brute force."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import anatomy, attribution, capture, router_attribution
from moescope.router_attribution import benjamini_hochberg, correlations, exchangeable, standardised

import families
from conftest import MOE_SHAPES, write_tensors

every_moe = pytest.mark.parametrize("name", MOE_SHAPES)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def run(build, tokens, tmp_path_factory):
    """A function from an architecture and what the target is to the model, its parts, its cache and its results."""
    made = {}

    def of(name, answer="first_token"):
        if (name, answer) not in made:
            model, path = build(name), tmp_path_factory.mktemp(f"{name}-{answer}") / "0.safetensors"
            parts = anatomy.find(model)
            tensors, table, _ = capture.in_memory(model, parts, tokens, 16, answer)
            write_tensors(tensors, path)
            made[name, answer] = model, parts, tensors, table, [path]
        return made[name, answer]

    return of


def by_layer(tensors, parts):
    """The tensors of each layer, without its number."""
    return [
        {name.removeprefix(f"{i}."): tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
        for i in range(len(parts.layers))
    ]


def recorded(model_type, change=lambda model: None):
    """The miniature of a family, its parts, and what its layers do at the readout position of four prompts."""
    torch.set_num_threads(1)
    model = families.build(model_type)
    change(model)
    parts = anatomy.find(model)
    with torch.no_grad():
        return model, parts, by_layer(capture.record(model, parts, families.IDS)[0], parts)


@every_moe
def test_the_split_sums_to_the_logits_that_the_model_gives(run, tokens, name):
    """transformers returns router logits itself: those of all positions, from a forward pass without hooks."""
    model, parts, tensors, _, _ = run(name)
    readings, reasons = router_attribution.find_readings(model, parts)
    assert (list(readings), reasons) == ([0, 1, 2], {})
    here = by_layer(tensors, parts)
    for row in (0, len(tokens) - 1):
        ids = torch.tensor([tokens.set_index("prompt_id")["token_ids"].loc[int(tensors["prompt_id"][row])]])
        with torch.no_grad():
            plain = model(input_ids=ids, output_router_logits=True).router_logits
        for layer, reading in readings.items():
            logits = router_attribution.split(reading, parts, here)[2][row]
            torch.testing.assert_close(logits.sum(0), plain[layer].view(*ids.shape, -1)[0, -1], **EXACT)


@pytest.mark.parametrize(
    ("model_type", "routers", "kinds"),
    [
        # Dense layers first; experts beside shared ones; scaled residuals; post-norms alone; biases everywhere;
        # LayerNorm with a bias; both blocks read the same norm; linear attention; one block a layer.
        ("deepseek_v3", [1, 2, 3], {"head", "ffn", "expert", "shared"}),
        ("qwen2_moe", [0, 1, 2, 3], {"head", "expert", "shared"}),
        ("granitemoe", [0, 1, 2, 3], {"head", "expert"}),
        ("flex_olmo", [0, 1, 2, 3], {"head", "expert"}),
        ("minimax_m3_vl_text", [0, 1, 2, 3], {"head", "expert", "shared"}),
        ("gpt_oss", [0, 1, 2, 3], {"head", "attention", "expert"}),
        ("phimoe", [0, 1, 2, 3], {"head", "expert"}),
        ("cohere2_moe", [0, 1, 2, 3], {"head", "expert"}),
        ("qwen3_next", [0, 1, 2, 3], {"head", "attention", "expert", "shared"}),
        ("nemotron_h", [1], {"attention"}),
    ],
)
def test_the_split_sums_to_the_logits_in_families_of_every_kind(model_type, routers, kinds):
    model, parts, here = recorded(model_type)
    readings, reasons = router_attribution.find_readings(model, parts)
    assert (sorted(readings), reasons) == (routers, {})
    for layer, reading in readings.items():
        names, units, logits = router_attribution.split(reading, parts, here)
        assert logits.shape == (len(families.IDS), len(names), parts.layers[layer].n_experts)
        assert units.shape == logits.shape[:2]
        expected = here[layer]["router_logits"].float()
        assert expected.abs().max() > 0.1
        assert (logits.sum(1) - expected).abs().max() < 1e-5 * expected.abs().max()
        # Where both blocks read the same state, the heads of the router's own layer are not seen.
        last = max((at for kind, at in names if kind in ("head", "attention")), default=-1)
        assert last == layer - (model_type in ("cohere2_moe", "nemotron_h"))
    assert {kind for kind, _ in names} == kinds | {"embedding", "bias"}
    assert bool(readings[routers[0]].constant.any()) == (model_type in ("gpt_oss", "phimoe"))


def test_one_source_by_hand(run):
    model, parts, tensors, _, _ = run("olmoe")
    reading = router_attribution.find_readings(model, parts)[0][2]
    names, units, logits = router_attribution.split(reading, parts, by_layer(tensors, parts))
    block, below = model.model.layers[2], model.model.layers[1]
    middle = tensors["2.resid_mid"].double()
    scale = (middle.pow(2).mean(1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    weight = block.mlp.gate.weight.double() * block.post_attention_layernorm.weight.double()
    head = tensors["1.head_in"][:, 3].double() @ below.self_attn.o_proj.weight.double()[:, 24:].T
    at = names.index(("head", 1)) + 3
    assert (units[:, at] == 3).all()
    torch.testing.assert_close(logits[:, at].double(), head * scale @ weight.T, **EXACT)
    # The expert with the second-largest gate weight of layer 1, whichever that is in a prompt.
    at = names.index(("expert", 1)) + 1
    assert torch.equal(units[:, at], tensors["1.expert_ids"][:, 1])
    down = below.mlp.experts.down_proj.double()[units[:, at].long()]
    out = torch.einsum("ndk,nk->nd", down, tensors["1.expert_acts"][:, 1].double())
    expected = out * tensors["1.expert_weights"][:, 1:2] * scale @ weight.T
    torch.testing.assert_close(logits[:, at].double(), expected, **EXACT)


@every_moe
@pytest.mark.parametrize("answer", ["first_token", "all_tokens"])
def test_the_table_is_the_split_of_chosen_minus_all(run, name, answer):
    model, parts, tensors, table, paths = run(name, answer)
    # A prompt that is left out, and chunks that do not hold all prompts, change nothing in the others.
    found = router_attribution.attribute(model, parts, paths, table.iloc[1:])
    assert {column: str(dtype) for column, dtype in found.dtypes.items()} == router_attribution.SPLIT
    assert set(found["prompt_id"]) == set(table["prompt_id"].iloc[1:])
    prompt_id = tensors["prompt_id"].numpy()
    n_steps = pd.Series(prompt_id).value_counts()
    if answer == "all_tokens":
        assert n_steps.max() > 1
    frames = []
    for layer, reading in router_attribution.find_readings(model, parts)[0].items():
        names, units, logits = router_attribution.split(reading, parts, by_layer(tensors, parts))
        chosen = torch.zeros(len(logits), 1, logits.shape[2])
        chosen.scatter_(
            2, tensors[f"{layer}.expert_ids"].long().unsqueeze(1), 1 / MOE_SHAPES[name]["experts_per_token"]
        )
        pull = (logits * chosen).sum(2) - logits.mean(2)
        for i, (source, at) in enumerate(names[:-1]):
            keys = {"prompt_id": prompt_id, "router_layer": layer, "source": source, "layer": at}
            frames.append(pd.DataFrame(keys | {"unit": units[:, i], "logit": pull[:, i]}))
    keys = ["prompt_id", "router_layer", "source", "layer", "unit"]
    expected = pd.concat(frames).groupby(keys)["logit"].sum().reset_index()
    expected["logit"] /= expected["prompt_id"].map(n_steps)
    expected = expected[expected["prompt_id"] != table["prompt_id"].iloc[0]]
    both = [frame.sort_values(keys, ignore_index=True) for frame in (found, expected)]
    pd.testing.assert_frame_equal(*both, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_chunks_of_prompts_change_nothing(run, monkeypatch):
    model, parts, _, table, paths = run("qwen2_moe")
    whole = router_attribution.attribute(model, parts, paths, table)
    monkeypatch.setattr(router_attribution, "MAX_LOGITS", 4 * 32 * 5)
    keys = ["prompt_id", "router_layer", "source", "layer", "unit"]
    parts_of = router_attribution.attribute(model, parts, paths, table)
    both = [frame.sort_values(keys, ignore_index=True) for frame in (whole, parts_of)]
    pd.testing.assert_frame_equal(*both, rtol=1e-4, atol=1e-6)


def test_the_bias_of_a_router_is_a_source():
    model, parts, here = recorded("gpt_oss")
    reading = router_attribution.find_readings(model, parts)[0][1]
    names, _, logits = router_attribution.split(reading, parts, here)
    assert names[-1] == ("bias", 1)
    torch.testing.assert_close(logits[:, -1], model.model.layers[1].mlp.router.bias.expand(len(logits), -1))


def test_a_layer_that_is_not_understood_is_refused_with_a_reason(run, tmp_path, caplog):
    """Of gemma4 the router scales the normed state entry by entry; of the others one layer's logits are changed."""
    model, parts, _ = recorded("gemma4_text")
    readings, reasons = router_attribution.find_readings(model, parts)
    assert (readings, len(reasons)) == ({}, 4)
    model, parts, tensors, table, paths = run("mixtral")
    whole = router_attribution.attribute(model, parts, paths, table)
    assert not caplog.records
    changed = tensors | {"1.router_logits": tensors["1.router_logits"].clone()}
    changed["1.router_logits"][-1, 0] += 0.01
    write_tensors(changed, tmp_path / "0.safetensors")
    found = router_attribution.attribute(model, parts, [tmp_path / "0.safetensors"], table)
    pd.testing.assert_frame_equal(found, whole[whole["router_layer"] != 1].reset_index(drop=True))
    [record] = caplog.records
    assert record.message.startswith("layer 1: the router's logits are not split: its sources miss them by")


def test_in_half_precision_the_split_holds_to_its_rounding():
    model, parts, here = recorded("deepseek_v3", lambda model: model.bfloat16())
    readings, reasons = router_attribution.find_readings(model, parts)
    assert (sorted(readings), reasons) == ([1, 2, 3], {})
    for layer, reading in readings.items():
        logits = router_attribution.split(reading, parts, here)[2].sum(1)
        expected = here[layer]["router_logits"].float()
        assert (logits - expected).abs().max() < capture.TOLERANCE[torch.bfloat16] * expected.abs().max()


def test_a_dense_model_has_no_routers(run):
    model, parts, _, table, paths = run("qwen2")
    empty = router_attribution.attribute(model, parts, paths, table)
    _, heads, experts, _ = attribution.attribute(parts, paths, table)
    none = router_attribution.associate(parts, paths, table, heads, experts)
    for found, schema in ((empty, router_attribution.SPLIT), (none, router_attribution.ASSOCIATIONS)):
        assert found.empty
        assert {column: str(dtype) for column, dtype in found.dtypes.items()} == schema


@every_moe
def test_associations_against_correlations_pair_by_pair(run, name):
    _, parts, tensors, table, paths = run(name)
    _, heads, experts, _ = attribution.attribute(parts, paths, table)
    found = router_attribution.associate(parts, paths, table, heads, experts, permutations=19, seed=3)
    assert {column: str(dtype) for column, dtype in found.dtypes.items()} == router_attribution.ASSOCIATIONS
    n_experts = MOE_SHAPES[name]["experts"]
    assert (found["layer"] <= found["expert_layer"]).all()
    assert len(found) == 2 * 4 * n_experts * 6
    assert (found["prompts"] == len(table)).all()
    prompt_id = tensors["prompt_id"].numpy()
    relation = table.set_index("prompt_id")["relation"].loc[prompt_id].to_numpy()
    for what, layer, head, expert_layer, expert in [("gate", 0, 1, 2, 3), ("lpi", 1, 0, 1, 2), ("gate", 2, 3, 2, 0)]:
        x = heads.query("layer == @layer and head == @head").set_index("prompt_id")["lpi"].loc[prompt_id]
        y = tensors[f"{expert_layer}.router_logits"].float().softmax(-1)[:, expert].numpy()
        if what == "lpi":
            used = experts.query("layer == @expert_layer and expert == @expert").set_index("prompt_id")["lpi"]
            y = used.reindex(prompt_id).fillna(0).to_numpy()
            assert 0 < len(used) < len(table)
        keys = {"what": what, "layer": layer, "head": head, "expert_layer": expert_layer, "expert": expert}
        [one] = found[np.logical_and.reduce([found[key] == value for key, value in keys.items()])].itertuples()
        assert one.r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
        means = pd.DataFrame({"x": x.to_numpy(), "y": y}).groupby(relation).transform("mean")
        left = np.corrcoef(x.to_numpy() - means["x"], y - means["y"])[0, 1]
        assert one.r_within == pytest.approx(left, abs=1e-5)
    for what, pairs in found.groupby("what"):
        # An expert that no prompt uses has no LPI that could go with anything.
        counts = pairs.groupby(["expert_layer", "expert"])["r"].count()
        used = experts[experts["expert"] >= 0].groupby(["layer", "expert"]).size()
        assert set(counts.index[counts > 0]) == (set(used.index) if what == "lpi" else set(counts.index))
        for end in ("", "_within"):
            p, q = (pairs[f"{name}{end}"].to_numpy() for name in "pq")
            np.testing.assert_allclose(q, benjamini_hochberg(p), rtol=1e-6)
            assert np.array_equal(np.isnan(p), np.isnan(pairs[f"r{end}"]))
            assert np.nanmin(p) >= np.float32(1 / 20)


def test_gates_of_several_answer_tokens_are_averaged(run):
    _, parts, tensors, table, paths = run("olmoe", "all_tokens")
    with router_attribution.opened(paths, table) as cache:
        gates = router_attribution._gates(cache, parts.layers)
    probabilities = pd.DataFrame(tensors["1.router_logits"].softmax(-1).numpy(), index=tensors["prompt_id"].numpy())
    expected = probabilities.groupby(level=0).mean()
    np.testing.assert_allclose(gates[1].to_numpy(), expected.to_numpy(), rtol=1e-5)
    assert gates.index.tolist() == sorted(table["prompt_id"])


prompt_tables = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("rs")), min_size=1, max_size=20).map(
    lambda rows: pd.DataFrame(rows, columns=["subject", "relation"]).sort_values("relation", ignore_index=True)
)


@given(prompt_tables, st.booleans())
def test_exchangeable_blocks_are_whole_subjects_of_equal_make(prompts, within):
    blocks = exchangeable(prompts, within)
    assert sorted(np.concatenate([block.ravel() for block in blocks])) == list(range(len(prompts)))
    size = prompts.groupby("subject").size()
    for block in blocks:
        subjects = prompts["subject"].to_numpy()[block]
        assert (subjects == subjects[:, :1]).all()
        assert len(set(subjects[:, 0])) == len(block)
        assert (size[subjects[:, 0]] == block.shape[1]).all()
        if within:
            relations = prompts["relation"].to_numpy()[block]
            assert (relations == relations[:1]).all()
    # As few groups as possible: subjects of the same make are together.
    make = prompts.groupby("subject")["relation"].agg(tuple if within else len)
    assert len(blocks) == make.nunique()


def test_p_counts_permutations_at_least_as_strong():
    """Brute force with the same permutations; one of two subjects' places in a block is often the real one."""
    rng = np.random.default_rng(0)
    prompts = pd.DataFrame({"subject": list("aabbccdde"), "relation": "r"})
    x, y = (standardised(pd.DataFrame(rng.normal(size=(9, m)))) for m in (3, 2))
    y[:, 1] = torch.nan
    blocks = exchangeable(prompts, within=False)
    r, p, chance = correlations(x, y, blocks, 50, seed=1)
    draws, at_least = np.random.default_rng(1), np.zeros(3)
    for draw in range(50):
        order = np.arange(9)
        for block in blocks:
            order[block] = block[draws.permutation(len(block))]
        each = [np.corrcoef(x[order, i], y[:, 0])[0, 1] for i in range(3)]
        at_least += np.abs(each) >= np.abs(r[:, 0].numpy()) - 1e-6
        if draw == 0:
            assert chance[:, 0].tolist() == pytest.approx(each, abs=1e-6)
    assert p[:, 0].tolist() == pytest.approx((1 + at_least) / 51)
    assert r[:, 0].tolist() == pytest.approx([np.corrcoef(x[:, i], y[:, 0])[0, 1] for i in range(3)], abs=1e-6)
    assert r[:, 1].isnan().all()
    assert p[:, 1].isnan().all()
    # A subject that none matches stays, and the identity is as strong as itself.
    assert correlations(x, y, [np.arange(9)[None]], 10, seed=0)[1][:, 0].tolist() == [1, 1, 1]


def test_chunks_of_permutations_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = (standardised(pd.DataFrame(rng.normal(size=(12, 4)))) for _ in range(2))
    whole = correlations(x, y, [np.arange(12)[:, None]], 100, seed=1)
    monkeypatch.setattr(router_attribution, "MAX_LOGITS", 48 * 7)
    for one, other in zip(whole, correlations(x, y, [np.arange(12)[:, None]], 100, seed=1), strict=True):
        torch.testing.assert_close(one, other)


def test_prompts_about_one_subject_do_not_count_as_many():
    """Subjects differ in both, but by chance: whole subjects moved, 5% of p are below .05; prompts moved, far more."""
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(20), 4)
    x, y = (
        standardised(pd.DataFrame(rng.normal(size=(20, 20))[subject] + 0.1 * rng.normal(size=(80, 20)))) for _ in "xy"
    )
    prompts = pd.DataFrame({"subject": subject, "relation": "r"})
    _, whole, _ = correlations(x, y, exchangeable(prompts, within=False), 200, seed=0)
    _, single, _ = correlations(x, y, [np.arange(80)[:, None]], 200, seed=0)
    assert 0.02 < (whole < 0.05).float().mean() < 0.09
    assert (single < 0.05).float().mean() > 0.2


def test_what_relations_explain_is_gone_within_them():
    """A head and an expert of one relation, which go together in no other way, and a pair that does."""
    rng = np.random.default_rng(0)
    relation = pd.Series(np.repeat(["r", "s"], 40))
    shared, kind = rng.normal(size=80), (relation == "s").to_numpy(float)
    x = pd.DataFrame({"by relation": 3 * kind + rng.normal(size=80), "by prompt": shared + 3 * kind})
    y = pd.DataFrame({"by relation": 3 * kind + rng.normal(size=80), "by prompt": shared - 3 * kind})
    prompts = pd.DataFrame({"subject": np.arange(80), "relation": relation})
    r, p, _ = correlations(standardised(x), standardised(y), exchangeable(prompts, within=False), 500, seed=0)
    assert r[0, 0] > 0.5
    assert p[0, 0] == pytest.approx(1 / 501)
    blocks = exchangeable(prompts, within=True)
    r, p, _ = correlations(standardised(x, relation), standardised(y, relation), blocks, 500, seed=0)
    assert abs(r[0, 0]) < 0.3
    assert p[0, 0] > 0.02
    # The relation hides this one.
    assert r[1, 1] == pytest.approx(1, abs=1e-5)
    assert p[1, 1] == pytest.approx(1 / 501)


def test_a_column_that_rounding_alone_moves_is_constant():
    values = np.full((30, 2), 0.1)
    values[:, 1] = np.float32(0.3) * (1 + 1e-8 * np.arange(30))
    assert standardised(pd.DataFrame(values)).isnan().all()
    assert standardised(pd.DataFrame(np.zeros((3, 1)))).isnan().all()


p_values = st.lists(st.one_of(st.floats(1e-6, 1), st.just(float("nan"))), max_size=30).map(np.array)


@given(p_values)
def test_benjamini_hochberg_is_the_smallest_rate_that_rejects(p):
    q = benjamini_hochberg(p)
    known = ~np.isnan(p)
    assert np.array_equal(np.isnan(q), ~known)
    n = known.sum()
    for value, found in zip(p[known], q[known], strict=True):
        # Among all thresholds that reject it, the smallest estimated share of false rejections.
        thresholds = [t for t in p[known] if t >= value]
        assert found == pytest.approx(min([1.0, *(t * n / (p[known] <= t).sum() for t in thresholds)]))
        assert found >= value


def test_associations_are_repeatable_and_depend_on_the_seed_in_p_alone(run):
    _, parts, _, table, paths = run("mixtral")
    _, heads, experts, _ = attribution.attribute(parts, paths, table)
    one, same, other = (
        router_attribution.associate(parts, paths, table.sample(frac=1, random_state=s), heads, experts, 50, seed)
        for s, seed in ((0, 0), (1, 0), (0, 1))
    )
    pd.testing.assert_frame_equal(one, same)
    pd.testing.assert_series_equal(one["r"], other["r"])
    assert not one["p"].equals(other["p"])

"""The strongest neurons by the bounds, against all neurons by brute force and against planted ones."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from moescope import anatomy, bounds, capture, lens, neurons, planted, rankings

import families
from conftest import SHAPES, write_tensors

OTHERS = ["deepseek_v3", "flex_olmo", "gpt2", "gpt_oss", "granitemoe", "nemotron_h", "qwen3_next"]
SIDES = {"ffn": (neurons.ffn_neurons, "resid_mid"), "attention": (neurons.attention_neurons, "resid_pre")}
KINDS = {"neurons": ("ffn", "expert"), "attention_neurons": ("attention", "head")}
TOP, BOTTOM = 12, 5


@pytest.fixture(scope="module")
def run(build, tokens, tmp_path_factory):
    """A model's parts, its cache as a file, its prompts, and what is in the cache; made once."""
    made = {}

    def of(name, answer="first_token"):
        if (name, answer) not in made:
            torch.set_num_threads(1)
            model = build(name) if name in SHAPES else families.build(name)
            parts = anatomy.find(model)
            if name in SHAPES:
                tensors, prompts, _ = capture.in_memory(model, parts, tokens, 64, answer)
            else:
                with torch.no_grad():
                    tensors, logits = capture.record(model, parts, families.IDS)
                n = len(logits)
                tensors |= {"prompt_id": torch.arange(n, dtype=torch.int32) + 7, "step": torch.zeros(n).short()}
                tensors = {key: value for key, value in tensors.items() if not key.endswith("resid_post")}
                targets = [[target] for target in logits.argmin(-1).tolist()]
                relation = ["odd", "even"] * (n // 2) + ["odd"] * (n % 2)
                prompts = pd.DataFrame(
                    {"prompt_id": np.arange(n) + 7, "relation": relation, "target_ids": targets, "target_id": 0}
                )
            path = tmp_path_factory.mktemp("cache") / "0.safetensors"
            write_tensors(tensors, path)
            made[name, answer] = (parts, [path], prompts, tensors)
        return made[name, answer]

    return of


def brute_force(parts, tensors, prompts, side, norm="fixed"):
    """Every neuron of every row, one by one: prompt_id, layer, unit, neuron, lpi summed over answer tokens."""
    make, state = SIDES[side]
    readout = lens.Readout.of(parts, norm)
    target_ids = prompts.set_index("prompt_id")["target_ids"]
    pairs = zip(tensors["prompt_id"].tolist(), tensors["step"].tolist(), strict=True)
    target = torch.tensor([target_ids[prompt][step] for prompt, step in pairs])
    scale = lens.norm_scale(parts, tensors["resid_final"], norm)
    frames = []
    for layer in parts.layers:
        here = capture.of_layer(tensors, layer)
        if (block := make(layer, here)) is None:
            continue
        n, m = block.activations.shape
        row, place = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
        vectors = block.contributions(row, place).unflatten(0, (n, m))
        unit, neuron = block.names(row, place)
        columns = {
            "prompt_id": tensors["prompt_id"].repeat_interleave(m),
            "unit": unit,
            "neuron": neuron,
            "lpi": lens.lpi(readout, here[state], vectors, scale, target).flatten(),
            "activation": block.activations.flatten(),
        }
        frames.append(pd.DataFrame({name: x.detach().numpy() for name, x in columns.items()}).assign(layer=layer.index))
    keys = ["prompt_id", "layer", "unit", "neuron"]
    return pd.concat(frames).groupby(keys, as_index=False).agg(lpi=("lpi", "sum"), activation=("activation", "mean"))


def check_ranking(found, every, top, bottom):
    """One group: as many as there are, by falling LPI, and the values of brute force in the same order."""
    values = every.sort_values("lpi", ascending=False)["lpi"].to_numpy()
    high = values[values > bounds.GUARD][:top]
    low = values[values < -bounds.GUARD][-bottom:] if bottom else []
    wanted = np.concatenate([high, low])
    # What is within rounding of GUARD may be ranked or not.
    assert abs(len(found) - len(wanted)) <= (np.abs(np.abs(values) - bounds.GUARD) < 2e-7).sum()
    n = min(len(found), len(wanted))
    np.testing.assert_allclose(found["lpi"].to_numpy()[:n], wanted[:n], atol=2e-7, rtol=1e-4)
    assert found["exact"].all()
    both = found.merge(every, on=["layer", "unit", "neuron"], suffixes=("", "_brute"))
    assert len(both) == len(found)
    np.testing.assert_allclose(both["lpi"], both["lpi_brute"], atol=2e-7, rtol=1e-4)
    return both


@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
def test_the_strongest_neurons_are_those_of_brute_force(run, name):
    parts, paths, prompts, tensors = run(name)
    tables = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    for kind, (side, unit) in KINDS.items():
        every = brute_force(parts, tensors, prompts, side)
        found = tables[kind].rename(columns={unit: "unit"})
        assert set(found["prompt_id"]) == set(prompts["prompt_id"])
        groups = dict(list(every.groupby("prompt_id")))
        for prompt_id, own in found.groupby("prompt_id"):
            both = check_ranking(own, groups[prompt_id], TOP, BOTTOM)
            np.testing.assert_allclose(both["activation"], both["activation_brute"], rtol=1e-5)
        above = found["lpi"] > 0
        guard = 2 * bounds.GUARD * (1 + found["lpi"].abs())
        assert (found["lpi"] <= found["bound"] + guard)[above].all()
        assert (found["lpi"] >= found["bound"] - guard)[~above].all()


def test_of_equal_neurons_as_many_are_named_as_there_is_room_for(build, tokens, tmp_path):
    """Every neuron twice: with an odd number of them a pair is cut."""
    torch.set_num_threads(1)
    model = copy.deepcopy(build("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            for rows in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
                rows[1::2] = rows[::2]
    parts = anatomy.find(model)
    tensors, prompts, _ = capture.in_memory(model, parts, tokens, 64)
    write_tensors(tensors, tmp_path / "0.safetensors")
    found = rankings.attribute(parts, [tmp_path / "0.safetensors"], prompts, top=9, bottom=3)["neurons"]
    every = brute_force(parts, tensors, prompts, "ffn")
    for prompt_id, own in found.rename(columns={"expert": "unit"}).groupby("prompt_id"):
        check_ranking(own, every[every["prompt_id"] == prompt_id], 9, 3)
        pairs = own.groupby(["layer", own["neuron"] // 2]).size().value_counts()
        assert pairs.to_dict() == {2: 5, 1: 2}


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "llama", "deepseek_v3", "flex_olmo"])
def test_rankings_of_relations_are_of_mean_lpi_over_all_their_prompts(run, name):
    parts, paths, prompts, tensors = run(name)
    found = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)["relation_neurons"]
    for side in SIDES:
        every = brute_force(parts, tensors, prompts, side).merge(prompts[["prompt_id", "relation"]])
        for relation, own in every.groupby("relation"):
            n = (prompts["relation"] == relation).sum()
            of_neuron = own.groupby(["layer", "unit", "neuron"], as_index=False)
            mean = of_neuron.agg(lpi=("lpi", "sum"), users=("lpi", "size")).assign(lpi=lambda t, n=n: t["lpi"] / n)
            chosen = found[(found["relation"] == relation) & (found["block"] == side)]
            both = check_ranking(chosen, mean, TOP, BOTTOM)
            assert (both["used"] == both["users"]).all()
            assert (chosen["prompts"] == n).all()


def test_thousands_of_prompts_cost_a_relation_no_digits(run, tmp_path):
    """The same prompt over and over has its own LPIs as means."""
    parts, _, prompts, tensors = run("gpt2")
    n, row = 3000, {name: tensor[:1] for name, tensor in tensors.items()}
    many = {name: tensor.expand(n, *tensor.shape[1:]).contiguous() for name, tensor in row.items()}
    write_tensors(many | {"prompt_id": torch.arange(n, dtype=torch.int32)}, tmp_path / "0.safetensors")
    same = pd.DataFrame({"prompt_id": np.arange(n), "relation": "r", "target_ids": [prompts["target_ids"][0]] * n})
    tables = rankings.attribute(parts, [tmp_path / "0.safetensors"], same, top=TOP, bottom=BOTTOM)
    for kind, (side, _) in KINDS.items():
        own = tables[kind].query("prompt_id == 0")
        mean = tables["relation_neurons"][tables["relation_neurons"]["block"] == side]
        np.testing.assert_allclose(mean["lpi"], own["lpi"], rtol=2e-6)


@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "llama", "gpt_oss", "flex_olmo"])
def test_what_is_said_of_all_neurons_is_within_the_certified_error(run, name):
    parts, paths, prompts, tensors = run(name)
    tables = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    for side in SIDES:
        every = brute_force(parts, tensors, prompts, side)
        found = tables["concentration"].query("block == @side").set_index("prompt_id")
        for prompt_id, own in every.groupby("prompt_id"):
            x = np.sort(own["lpi"].clip(lower=0).to_numpy("float64"))[::-1]
            p = x[x > 0] / x.sum()
            exact = {
                "positive": x.sum(),
                "share": x[: max(1, int(np.ceil(len(x) / 100)))].sum() / x.sum(),
                "entropy": -(p * np.log(p)).sum(),
                "gini": np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()),
            }
            row = found.loc[prompt_id]
            assert row["neurons"] == len(x)
            for figure, value in exact.items():
                assert abs(row[figure] - value) <= row[f"{figure}_error"] + 2e-5 * (1 + abs(value)), figure
            assert row["positive_error"] <= 0.2 * row["positive"]
        sums = every.groupby(["prompt_id", "layer", "unit"], as_index=False)["lpi"].sum()
        both = tables["neuron_sums"].query("block == @side").merge(sums)
        assert len(both) == len(sums)
        assert ((both["neuron_sum"] - both["lpi"]).abs() <= both["error"] + 2e-6 * (1 + both["lpi"].abs())).all()


def test_following_all_tokens_leaves_nothing_to_evaluate(run, monkeypatch):
    parts, paths, prompts, _ = run("olmoe")
    few = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    monkeypatch.setattr(bounds, "LIKELY", (2**30, 2**30))
    monkeypatch.setattr(rankings, "lpi_of", None)
    found = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    np.testing.assert_allclose(found["neurons"]["lpi"], few["neurons"]["lpi"], atol=2e-7, rtol=1e-4)
    assert found["concentration"].filter(like="_error").max().max() < 1e-6


@pytest.mark.parametrize("name", ["qwen2_moe", "mistral"])
def test_evaluating_all_gives_the_same_and_leaves_no_error(run, name):
    parts, paths, prompts, _ = run(name)
    by_bounds = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    by_force = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM, exact="all")
    for kind in ("neurons", "attention_neurons", "relation_neurons"):
        assert by_force[kind]["exact"].all()
        np.testing.assert_allclose(by_force[kind]["lpi"], by_bounds[kind]["lpi"], atol=2e-7, rtol=1e-4)
    assert by_force["concentration"].filter(like="_error").max().max() < 1e-6
    assert by_force["neuron_sums"]["error"].max() == 0


def test_lpis_of_several_answer_tokens_are_summed(run):
    parts, paths, prompts, tensors = run("qwen2_moe", "all_tokens")
    assert prompts["target_ids"].str.len().max() > 1
    tables = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    every = brute_force(parts, tensors, prompts, "ffn")
    found = tables["neurons"].rename(columns={"expert": "unit"})
    for prompt_id, own in found.groupby("prompt_id"):
        check_ranking(own, every[every["prompt_id"] == prompt_id], TOP, BOTTOM)
    counts = every.groupby("prompt_id").size()
    concentration = tables["concentration"].query("block == 'ffn'").set_index("prompt_id")
    assert (concentration["neurons"] == counts).all()
    relation = prompts.set_index("prompt_id")["relation"]
    means = every.groupby([every["prompt_id"].map(relation), "layer", "unit", "neuron"])["lpi"].sum()
    best = tables["relation_neurons"].query("block == 'ffn'").groupby("relation").first()
    for name, row in best.iterrows():
        assert row["lpi"] == pytest.approx(means[name].max() / (relation == name).sum(), rel=1e-4)


def test_shards_chunks_and_order_change_nothing(run, tmp_path, monkeypatch):
    parts, paths, prompts, tensors = run("qwen2_moe")
    whole = rankings.attribute(parts, paths, prompts, top=TOP, bottom=BOTTOM)
    n = len(tensors["prompt_id"])
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tensor_split(3)
    pieces = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for piece, rows in zip(pieces, shuffled):
        write_tensors({name: tensor[rows] for name, tensor in tensors.items()}, piece)
    monkeypatch.setattr(rankings, "MAX_LOGITS", 8 * 64 * 64)
    monkeypatch.setattr(lens, "MAX_LOGITS", 1000)
    shards = rankings.attribute(parts, pieces, prompts, top=TOP, bottom=BOTTOM)
    for kind, table in whole.items():
        numbers = table.select_dtypes("float").columns
        pd.testing.assert_frame_equal(shards[kind].drop(columns=numbers), table.drop(columns=numbers))
        np.testing.assert_allclose(
            shards[kind][numbers.drop("bound", errors="ignore")],
            table[numbers.drop("bound", errors="ignore")],
            rtol=1e-3,
            atol=1e-5,
        )
    some = prompts.iloc[::3]
    part = rankings.attribute(parts, paths, some, top=TOP, bottom=BOTTOM)["neurons"]
    kept = whole["neurons"][whole["neurons"]["prompt_id"].isin(some["prompt_id"])].reset_index(drop=True)
    np.testing.assert_allclose(part["lpi"], kept["lpi"], atol=2e-7, rtol=1e-4)


@pytest.mark.parametrize("case", ["capped", "recomputed"])
def test_where_no_bound_holds_nothing_is_certain_unless_all_is_evaluated(run, case):
    name, norm = ("gemma2", "fixed") if case == "capped" else ("olmoe", "recomputed")
    parts, paths, prompts, tensors = run(name)
    assert bool(parts.softcap) == (case == "capped")
    every = brute_force(parts, tensors, prompts, "ffn", norm)
    for exact in ("top", "all"):
        tables = rankings.attribute(parts, paths, prompts, norm=norm, top=TOP, bottom=BOTTOM, exact=exact)
        found = tables["neurons"].rename(columns={"expert": "unit"})
        assert len(found)
        assert found["exact"].all() == (exact == "all")
        assert found["bound"].isna().all() == (exact == "top")
        assert tables["concentration"].empty == (exact == "top")
        both = found.merge(every, on=["prompt_id", "layer", "unit", "neuron"], suffixes=("", "_brute"))
        assert len(both) == len(found)
        np.testing.assert_allclose(both["lpi"], both["lpi_brute"], atol=2e-7, rtol=1e-4)
        if exact == "all":
            for prompt_id, own in found.groupby("prompt_id"):
                check_ranking(own, every[every["prompt_id"] == prompt_id], TOP, BOTTOM)


def test_the_recomputed_scale_is_that_of_every_state(run):
    """LPI with the usual logit lens, against the model's own norm and unembedding."""
    parts, _, prompts, tensors = run("olmoe")
    layer = parts.layers[1]
    here = capture.of_layer(tensors, layer)
    vectors = torch.randn(
        len(here["resid_mid"]), 3, here["resid_mid"].shape[1], generator=torch.Generator().manual_seed(0)
    )
    target = torch.tensor(prompts["target_id"].to_numpy(), dtype=torch.long)

    def log_p(x):
        logits = parts.unembedding(parts.final_norm.module(x)).log_softmax(-1)
        return logits.gather(-1, target.view(-1, *[1] * (x.ndim - 1)).expand(*x.shape[:-1], 1)).squeeze(-1)

    with torch.no_grad():
        expected = log_p(here["resid_mid"].unsqueeze(1) + vectors) - log_p(here["resid_mid"]).unsqueeze(1)
    readout = lens.Readout.of(parts, "recomputed")
    found = lens.lpi(readout, here["resid_mid"], vectors, torch.full((len(target),), torch.nan), target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    fixed = lens.log_prob(readout, here["resid_mid"], torch.full((len(target),), torch.nan), target)
    torch.testing.assert_close(fixed, log_p(here["resid_mid"]), rtol=1e-4, atol=1e-5)


def test_bounds_that_are_too_loose_are_admitted(run, monkeypatch):
    parts, paths, prompts, _ = run("olmoe")
    monkeypatch.setattr(bounds, "EXTRA", 10)
    monkeypatch.setattr(rankings, "intervals", lambda *args: [x.fill_(1.0) for x in bounds.intervals(*args)])
    tables = rankings.attribute(parts, paths, prompts, top=5, bottom=0)
    assert not tables["neurons"]["exact"].any()


def test_saturated_predictions_are_marked_and_not_ranked(run, tmp_path):
    """A target that is certain before every block: no neuron's LPI says anything."""
    parts, _, prompts, tensors = run("mixtral")
    readout = lens.Readout.of(parts)
    sure = int(prompts["prompt_id"].iloc[3])
    row = tensors["prompt_id"].tolist().index(sure)
    target = prompts.set_index("prompt_id").loc[sure, "target_ids"][0]
    towards = readout.weight[target] - readout.weight.mean(0)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in changed.items():
        if name.split(".")[-1] in ("resid_pre", "resid_mid"):
            tensor[row] = 1e4 * towards
    write_tensors(changed, tmp_path / "0.safetensors")
    tables = rankings.attribute(parts, [tmp_path / "0.safetensors"], prompts, top=TOP, bottom=BOTTOM)
    marked = tables["concentration"].query("saturated")
    assert marked["prompt_id"].unique().tolist() == [sure]
    assert len(marked) == 2
    for kind in KINDS:
        assert set(tables[kind]["prompt_id"]) == set(prompts["prompt_id"]) - {sure}


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral"])
def test_the_strongest_neuron_is_the_planted_one(architecture, tmp_path):
    """Hand-set models at toy size: each fact has one neuron by construction, of each prompt and of its relation."""
    torch.set_num_threads(1)
    made = planted.hand_set(architecture, n_relations=4, n_subjects=8, n_answers=8)
    parts = anatomy.find(made.model)
    tokens, _ = planted.tokenise(made.tokenizer, made.prompts)
    tensors, prompts, _ = capture.in_memory(made.model, parts, tokens, 64)
    write_tensors(tensors, tmp_path / "0.safetensors")
    tables = rankings.attribute(parts, [tmp_path / "0.safetensors"], prompts, top=8, bottom=1)
    assert planted.recall(tables["neurons"], made.truth, 1, planted.NEURON, "lpi") == 1.0
    # The eight facts of a relation are in eight neurons of one expert.
    relation = made.prompts.set_index("prompt_id")["relation"]
    truth = set(
        made.truth.assign(relation=made.truth["prompt_id"].map(relation))[["relation", *planted.NEURON]].itertuples(
            index=False, name=None
        )
    )
    best = tables["relation_neurons"].query("block == 'ffn' and lpi > 0").groupby("relation").head(8)
    assert set(best[["relation", "layer", "unit", "neuron"]].itertuples(index=False, name=None)) == truth

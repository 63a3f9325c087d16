"""Routing: the stage against every position's own choices, the tables against hand-made routing and brute force."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moescope import anatomy, capture, routing, routing_plots, routing_tables
from moescope.summaries import Bootstrap

import families
from conftest import DENSE_SHAPES, MOE_SHAPES, write_tensors

BOOTSTRAP = Bootstrap(bootstrap_draws=200, confidence=0.9, seed=0)
READOUT = {"positions": "readout"}


def run_of(choices, relation, subject, last_token=None, task=None, n_experts=None, subject_known=True):
    """Tables of a run in which prompt i chooses the experts choices[i] (of one layer) at its two positions."""
    choices = np.asarray(choices)
    n, k = choices.shape
    prompts = pd.DataFrame(
        {
            "prompt_id": np.arange(n, dtype="int32") * 3,
            "task": ["t"] * n if task is None else list(task),
            "relation": list(relation),
            "subject": list(subject),
            "token_ids": [[1, token] for token in (last_token if last_token is not None else [7] * n)],
        }
    )
    loads = pd.DataFrame({"prompt_id": np.repeat(prompts["prompt_id"], k), "layer": 0, "expert": choices.ravel()})
    loads = loads.assign(readout=1, subject=int(subject_known), all=2)
    gates = prompts[["prompt_id"]].assign(layer=0, experts=n_experts or choices.max() + 1, chosen=k)
    gates = gates.assign(gate_entropy=1.5, chosen_probability=0.75, gate_margin=np.arange(n) / n)
    return {"prompts": prompts, "loads": loads, "gates": gates}


def drawn_run(seed=0, facts=12, templates=3, n_experts=6, k=2, relations=3, by="fact"):
    """Random routing: each fact (or prompt) chooses k experts, whatever its relation."""
    rng = np.random.default_rng(seed)
    fact = np.repeat(np.arange(facts), templates)
    drawn = facts if by == "fact" else facts * templates
    choices = rng.random((drawn, n_experts)).argsort(1)[:, :k]
    relation = fact % relations
    return run_of(
        choices[fact] if by == "fact" else choices,
        [f"r{r}" for r in relation],
        [f"s{f // relations}" for f in fact],
        np.tile(np.arange(templates), facts),
        [f"t{min(r, 1)}" for r in relation],
        n_experts,
    )


def table(name, run, bootstrap=BOOTSTRAP):
    return routing_tables.SUMMARIES[name]({("facts", "moe"): run}, bootstrap)


def row(frame, **keys):
    found = frame[np.logical_and.reduce([frame[key] == value for key, value in keys.items()])]
    assert len(found) == 1
    return found.iloc[0]


def stage(model, tokens, folder, answer="first_token"):
    tensors, prompts, _ = capture.in_memory(model, anatomy.find(model), tokens, 64, answer)
    halves = torch.arange(len(tensors["prompt_id"])) % 2
    for half in (0, 1):
        write_tensors({name: x[halves == half] for name, x in tensors.items()}, folder / f"{half}.safetensors")
    return tensors, prompts, routing.summarise([folder / "0.safetensors", folder / "1.safetensors"], prompts)


@pytest.mark.parametrize("name", MOE_SHAPES)
def test_loads_are_what_each_position_chooses(build, tokens, tmp_path, name):
    model = build(name)
    parts = anatomy.find(model)
    _, prompts, found = stage(model, tokens, tmp_path)
    assert {kind: dict(frame.dtypes.astype(str)) for kind, frame in found.items()} == routing.SCHEMAS
    loads = found["loads"]
    assert not loads.duplicated(["prompt_id", "layer", "expert"]).any()
    assert (loads["all"] > 0).all()
    n_experts = MOE_SHAPES[name]["experts"]
    for prompt_id, mine in loads.groupby("prompt_id"):
        prompt = prompts.set_index("prompt_id").loc[prompt_id]
        with torch.inference_mode():
            ids = torch.tensor([list(prompt["token_ids"])])
            every, _ = capture.record(model, parts, ids, every_position=True)
        for layer in range(3):
            chosen = torch.nn.functional.one_hot(every[f"{layer}.expert_ids"].long(), n_experts).sum(1)
            subject = chosen[prompt["subject_start"] : prompt["subject_end"]]
            expected = torch.stack([chosen[-1], subject.sum(0), chosen.sum(0)], 1)
            at = mine[mine["layer"] == layer].set_index("expert")[["readout", "subject", "all"]]
            np.testing.assert_array_equal(at.reindex(range(n_experts), fill_value=0), expected)
    assert loads["prompt_id"].nunique() == len(prompts)


@pytest.mark.parametrize("name", MOE_SHAPES)
def test_gates_are_the_routers_softmax(build, tokens, tmp_path, name):
    tensors, _, found = stage(build(name), tokens, tmp_path)
    shape, k = MOE_SHAPES[name], MOE_SHAPES[name]["experts_per_token"]
    for layer, gates in found["gates"].groupby("layer"):
        p = tensors[f"{layer}.router_logits"].double().softmax(-1).numpy()
        ordered = -np.sort(-p, 1)
        assert gates["prompt_id"].tolist() == tensors["prompt_id"].tolist()
        assert (gates[["experts", "chosen"]] == [shape["experts"], k]).all(axis=None)
        np.testing.assert_allclose(gates["gate_entropy"], -(p * np.log2(p)).sum(1), rtol=1e-5)
        np.testing.assert_allclose(gates["chosen_probability"], ordered[:, :k].sum(1), rtol=1e-5)
        np.testing.assert_allclose(gates["gate_margin"], ordered[:, k - 1] - ordered[:, k], atol=1e-6)


def test_of_several_answer_tokens_only_the_prompts_own_positions_count(build, tokens, tmp_path):
    found = []
    for answer in ("first_token", "all_tokens"):
        (tmp_path / answer).mkdir()
        tensors, prompts, tables = stage(build("olmoe"), tokens, tmp_path / answer, answer)
        found.append(tables)
    assert len(tensors["prompt_id"]) > len(prompts)
    for kind in routing.SCHEMAS:
        pd.testing.assert_frame_equal(found[0][kind], found[1][kind], rtol=1e-4, atol=1e-6)


def test_only_the_prompts_that_are_asked_for(build, tokens, tmp_path):
    _, prompts, found = stage(build("mixtral"), tokens, tmp_path)
    some = prompts.iloc[::3]
    mine = routing.summarise(sorted(tmp_path.glob("*.safetensors")), some)
    for kind, frame in mine.items():
        whole = found[kind]
        whole = whole[whole["prompt_id"].isin(some["prompt_id"])]
        pd.testing.assert_frame_equal(frame, whole.reset_index(drop=True))


@pytest.mark.parametrize("name", DENSE_SHAPES)
def test_dense_models_have_no_rows(build, tokens, tmp_path, name):
    _, prompts, found = stage(build(name), tokens, tmp_path)
    assert all(len(frame) == 0 for frame in found.values())
    assert {kind: dict(frame.dtypes.astype(str)) for kind, frame in found.items()} == routing.SCHEMAS
    moe = drawn_run()
    for kind, make in routing_tables.SUMMARIES.items():
        alone = make({("facts", "dense"): {"prompts": prompts, **found}}, BOOTSTRAP)
        both = make({("facts", "dense"): {"prompts": prompts, **found}, ("facts", "moe"): moe}, BOOTSTRAP)
        assert len(alone) == 0
        assert list(alone) == list(both)
        pd.testing.assert_frame_equal(both, table(kind, moe))


def test_a_mixed_stack_has_rows_of_its_moe_layers_only(tmp_path):
    """Its first layer is dense, its router groups experts."""
    ids = families.IDS
    prompts = pd.DataFrame({"prompt_id": np.arange(len(ids), dtype="int32"), "token_ids": ids.tolist()})
    prompts = prompts.assign(length=ids.shape[1], accepted_ids=[[]] * len(ids), subject_start=0, subject_end=2)
    prompts = prompts.assign(task="t", relation=["a", "a", "b", "b"], subject=list("wxyz"))
    torch.set_num_threads(1)
    model = families.build("deepseek_v2")
    layers = [layer.index for layer in anatomy.find(model).layers if layer.experts]
    assert layers
    assert layers[0] > 0
    _, captured, found = stage(model, prompts, tmp_path)
    assert found["loads"]["layer"].unique().tolist() == found["gates"]["layer"].unique().tolist() == layers
    use = table("expert_use", {"prompts": captured, **found})
    assert use["layer"].unique().tolist() == layers
    # A position chooses k experts, so that frequencies add up to k.
    of_scope = use.groupby(["scope", "name", "positions", "layer"])["frequency"].sum()
    np.testing.assert_allclose(of_scope, found["gates"]["chosen"].iloc[0], rtol=1e-5)


def test_firmness_by_hand():
    probabilities = torch.tensor([[0.4, 0.4, 0.2, 0.0], [0.5, 0.5, 0.5, 0.5]])
    found = routing.firmness(probabilities, torch.tensor([[0, 2], [3, 1]], dtype=torch.int16))
    three = -(0.8 * np.log2(0.4) + 0.2 * np.log2(0.2))
    assert found["gate_entropy"].tolist() == pytest.approx([three, 2.0])
    assert found["chosen_probability"].tolist() == pytest.approx([0.6, 0.5])
    # The second choice of the first prompt is worse than an expert that was left out.
    assert found["gate_margin"].tolist() == pytest.approx([-0.2, 0.0])


counts_of_cells = arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(0, 9)).filter(
    lambda joint: joint.sum() > 0
)


def plug_in(joint):
    """Mutual information from its definition."""
    p = joint / joint.sum()
    found = 0.0
    for i, j in zip(*np.nonzero(p)):
        found += p[i, j] * np.log2(p[i, j] / (p[i].sum() * p[:, j].sum()))
    return found


@settings(deadline=None, max_examples=60)
@given(counts_of_cells, st.data())
def test_information_is_that_of_the_definition_within_its_bounds_and_blind_to_names(joint, data):
    cells, experts = joint.shape
    none = np.zeros(cells, int)
    found = routing_tables.information(joint, none)
    assert found == pytest.approx(plug_in(joint), abs=1e-9)
    of_label, of_expert = (routing_tables.entropy(joint.sum(axis) / joint.sum()) for axis in (1, 0))
    assert -1e-9 <= found <= min(of_label, of_expert) + 1e-9
    renamed = joint[data.draw(st.permutations(range(cells)))][:, data.draw(st.permutations(range(experts)))]
    assert routing_tables.information(renamed * 3, none) == pytest.approx(found, abs=1e-9)
    group = np.sort(data.draw(st.lists(st.integers(0, 2), min_size=cells, max_size=cells)))
    within = sum(joint[group == g].sum() * plug_in(joint[group == g]) for g in set(group) if joint[group == g].any())
    conditional = routing_tables.information(joint, group)
    assert conditional == pytest.approx(within / joint.sum(), abs=1e-9)
    # The chain rule: what groups say, and what cells say beyond them.
    between = np.add.reduceat(joint, np.unique(group, return_index=True)[1], 0)
    assert conditional + plug_in(between) == pytest.approx(found, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 7), st.integers(0, 10**6), st.data())
def test_expected_pairs_keep_how_often_each_expert_is_chosen(n_experts, seed, data):
    k = data.draw(st.integers(1, n_experts))
    rng = np.random.default_rng(seed)
    choices = np.zeros((200, n_experts))
    np.put_along_axis(choices, (rng.normal(size=n_experts) + rng.gumbel(size=(200, n_experts))).argsort(1)[:, :k], 1, 1)
    expected = routing_tables.expected_pairs(choices.sum(0), k)
    np.testing.assert_allclose(expected.sum(1), (k - 1) * choices.sum(0), rtol=0.02, atol=0.5)
    assert (np.diag(expected) == 0).all()
    np.testing.assert_allclose(expected, expected.T)


def test_expected_pairs_in_closed_form():
    even = routing_tables.expected_pairs(np.full(5, 12.0), 3)
    np.testing.assert_allclose(even[~np.eye(5, dtype=bool)], 20 * 3 * 2 / (5 * 4))
    both = routing_tables.expected_pairs(np.array([30.0, 30.0, 0.0]), 2)
    np.testing.assert_allclose(both, [[0, 30, 0], [30, 0, 0], [0, 0, 0]])


def test_routing_says_everything_about_the_relation():
    """Each relation has two experts of its own, and both end in the same tokens."""
    relation = np.repeat([0, 1], 40)
    names = np.array(["a", "b"])[relation]
    run = run_of(relation[:, None] * 2 + [0, 1], names, np.arange(80), np.tile([5, 6], 40), names)
    found = table("mutual_information", run)
    assert (found["label_entropy"] == 1).all()
    for label, given_token, bits in (
        ("relation", "", 1),
        ("task", "", 1),
        ("last_token", "", 0),
        ("relation", "last_token", 1),
    ):
        of = row(found, label=label, given=given_token)
        assert of["plug_in"] == pytest.approx(bits, abs=1e-9)
        assert of["estimate"] == pytest.approx(bits - of["shuffled"])
        assert of["shuffled_low"] <= of["shuffled"] <= of["shuffled_high"] < 0.1
        assert (of["prompts"], of["subjects"]) == (80, 80)
    used = table("routing", run)
    assert row(used, scope="all", metric="load_entropy", **READOUT)["estimate"] == pytest.approx(2)
    assert row(used, scope="relation", name="b", metric="load_entropy", **READOUT)["estimate"] == pytest.approx(1)
    assert row(used, scope="relation", name="b", metric="effective_experts", **READOUT)["estimate"] == pytest.approx(2)
    assert row(used, scope="task", name="a", metric="largest_load", positions="all")["estimate"] == pytest.approx(0.5)
    overlap = table("task_overlap", run)
    apart = row(overlap, scope="relation", metric="overlap", **READOUT)
    assert (apart["estimate"], apart["low"], apart["high"]) == (0, 0, 0)
    assert apart["shuffled_low"] > 0.6
    assert row(overlap, scope="task", metric="jaccard", positions="all")["estimate"] == 0


def test_what_the_last_token_explains_is_not_the_relations():
    """Experts follow the last token alone, which tells relations apart: all of the information is the token's."""
    relation = np.repeat([0, 1], 50)
    rng = np.random.default_rng(0)
    token = np.where(rng.random(100) < 0.9, relation, 1 - relation)
    found = table("mutual_information", run_of(token[:, None], relation, np.arange(100), token))
    assert row(found, label="relation", given="")["estimate"] > 0.3
    of_token = row(found, label="last_token", given="")
    assert of_token["plug_in"] == pytest.approx(of_token["label_entropy"])
    conditional = row(found, label="relation", given="last_token")
    assert conditional["plug_in"] == pytest.approx(0, abs=1e-9)
    assert conditional["shuffled"] == pytest.approx(0, abs=1e-9)
    joint = np.zeros((2, 2))
    np.add.at(joint, (token, relation), 1)
    expected = -sum(joint[t, r] / 100 * np.log2(joint[t, r] / joint[t].sum()) for t in (0, 1) for r in (0, 1))
    assert conditional["label_entropy"] == pytest.approx(expected)


def test_shuffles_keep_the_prompts_of_a_fact_together():
    """Facts choose at random, all prompts about one alike: plug-in values are large, and all of it is chance."""
    corrected = []
    for seed in range(5):
        found = table("mutual_information", drawn_run(seed, facts=48, templates=5, relations=6))
        for label in ("relation", "task"):
            of = row(found, label=label, given="")
            assert of["low"] < of["estimate"] < of["high"]
            corrected.append(of["estimate"] / of["shuffled"])
        # Shuffled prompt by prompt the bias would be (relations - 1)(experts - 1) / (2 n ln 2), too small by far.
        assert row(found, label="relation", given="")["shuffled"] > 2 * 5 * 5 / (2 * 240 * 2 * np.log(2))
    assert abs(np.mean(corrected)) < 0.25


def brute_force_draws(prompts, statistic):
    """A statistic of the prompts in each bootstrap draw, subjects repeated as often as they are drawn."""
    subjects = np.unique(prompts["subject"])
    rng = np.random.default_rng(BOOTSTRAP.seed)
    n = len(subjects)
    for times in rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP.bootstrap_draws):
        repeats = prompts["subject"].map(dict(zip(subjects, times)))
        yield statistic(prompts.loc[prompts.index.repeat(repeats)])


def test_entropies_and_frequencies_against_brute_force():
    run = drawn_run(3)
    chosen = run["loads"].groupby("prompt_id")["expert"].agg(list)

    def load(prompts):
        return np.bincount(np.concatenate(chosen[prompts["prompt_id"]].to_numpy()), minlength=6) / (2 * len(prompts))

    def bits(prompts):
        return -sum(p * np.log2(p) for p in load(prompts) if p > 0)

    draws = np.array(list(brute_force_draws(run["prompts"], bits)))
    low, high = np.quantile(draws - draws.mean() + bits(run["prompts"]), [0.05, 0.95])
    of = row(table("routing", run), scope="all", metric="load_entropy", **READOUT)
    assert of[["estimate", "low", "high"]].tolist() == pytest.approx([bits(run["prompts"]), low, high], abs=1e-5)
    use = table("expert_use", run)
    draws = [2 * load(prompts)[3] for prompts in brute_force_draws(run["prompts"], lambda prompts: prompts)]
    of = row(use, scope="all", expert=3, **READOUT)
    expected = [2 * load(run["prompts"])[3], *np.quantile(draws, [0.05, 0.95])]
    assert of[["frequency", "low", "high"]].tolist() == pytest.approx(expected, abs=1e-5)
    mine = run["prompts"][run["prompts"]["relation"] == "r1"]
    for number, (frequency, overall) in enumerate(zip(2 * load(mine), 2 * load(run["prompts"]))):
        found = use[(use["name"] == "r1") & (use["expert"] == number) & (use["positions"] == "all")]
        if frequency == 0:
            assert found.empty
        else:
            assert found["frequency"].item() == pytest.approx(frequency)
            assert found["lift"].item() == pytest.approx(frequency / overall)
            assert (found["prompts"].item(), found["subjects"].item()) == (len(mine), mine["subject"].nunique())


def test_overlap_against_brute_force():
    run = drawn_run(5, by="prompt")
    found = table("task_overlap", run)
    chosen = run["loads"].groupby("prompt_id")["expert"].agg(list)

    def overlaps(prompts, column, pair):
        rows = [chosen[prompts.loc[prompts[column] == name, "prompt_id"]] for name in pair]
        p, q = (np.bincount(np.concatenate(lists.to_numpy()), minlength=6) / len(lists) / 2 for lists in rows)
        best = [set(np.flatnonzero(x >= np.sort(x)[-2])) for x in (p, q)]
        return 1 - np.abs(p - q).sum() / 2, len(best[0] & best[1]) / len(best[0] | best[1])

    for scope, names in (("task", ["t0", "t1"]), ("relation", ["r0", "r1", "r2"])):
        for pair in combinations(names, 2):
            of = found[(found["one"] == pair[0]) & (found["other"] == pair[1])]
            expected = overlaps(run["prompts"], scope, pair)
            for positions in routing_tables.POSITIONS:
                overlap, jaccard = (row(of, metric=m, positions=positions) for m in ("overlap", "jaccard"))
                assert (overlap["estimate"], jaccard["estimate"]) == pytest.approx(expected)
                assert overlap["prompts"] == run["prompts"][scope].isin(pair).sum()
                # Nothing but chance tells these apart.
                assert overlap["high"] > overlap["shuffled_low"]
    draws = np.array(list(brute_force_draws(run["prompts"], lambda prompts: overlaps(prompts, "task", ["t0", "t1"]))))
    mine = found[(found["scope"] == "task") & (found["positions"] == "readout")].set_index("metric")
    draws[:, 0] += mine["estimate"]["overlap"] - draws[:, 0].mean()
    expected = np.quantile(draws, [0.05, 0.95], axis=0).T
    np.testing.assert_allclose(mine.loc[["overlap", "jaccard"], ["low", "high"]], np.minimum(expected, 1), atol=1e-5)


def test_experts_that_choose_each_other_are_found_and_measured_on_other_subjects():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 400)
    # Where one of 2 and 3 is chosen, so is the other; the rest choose a second one at random.
    partner = {2: 3, 3: 2}
    second = [partner.get(e, rng.choice([x for x in range(8) if x not in (e, 2, 3)])) for e in first]
    found = table("coactivation", run_of(np.stack([first, second], 1), ["r"] * 400, np.arange(400), n_experts=8))
    best = found.iloc[0]
    assert (best["order"], best["expert"], best["other"]) == (1, 2, 3)
    assert best["low"] > 2
    assert best["together"] > 3 * best["expected"]
    assert (best["prompts"], best["subjects"]) == (200, 200)
    # Independent choices: pairs stand out on the half that they are chosen on, not on the other.
    choices = rng.random((600, 8)).argsort(1)[:, :3]
    random = table("coactivation", run_of(choices, ["r"] * 600, np.arange(600), n_experts=8))
    assert len(random) == routing_tables.SHOWN
    assert random["estimate"].mean() == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("name", routing_tables.SUMMARIES)
def test_no_table_depends_on_the_order_of_rows(name):
    run = drawn_run(1)
    shuffled = {kind: frame.sample(frac=1, random_state=1).reset_index(drop=True) for kind, frame in run.items()}
    pd.testing.assert_frame_equal(table(name, run), table(name, shuffled))


def test_prompts_without_a_known_subject_have_no_rows_of_its_positions():
    run = drawn_run(2)
    gone = run["prompts"].loc[run["prompts"]["relation"] == "r0", "prompt_id"]
    run["loads"].loc[run["loads"]["prompt_id"].isin(gone), "subject"] = 0
    for name in ("routing", "expert_use"):
        found = table(name, run)
        assert set(found.loc[found["positions"] == "subject", "name"]) == {"all", "t1", "r1", "r2"}
        assert set(found.loc[found["positions"] == "all", "name"]) == {"all", "t0", "t1", "r0", "r1", "r2"}
        every, known = (found[(found["scope"] == "all") & (found["positions"] == p)] for p in ("all", "subject"))
        assert set(every["prompts"] - len(gone)) == set(known["prompts"])
    overlap = table("task_overlap", run)
    pairs = overlap[(overlap["positions"] == "subject")][["one", "other"]].drop_duplicates()
    assert pairs.to_numpy().tolist() == [["r1", "r2"]]
    assert overlap.notna().all(axis=None)


def test_a_router_that_is_not_known_has_a_load_but_no_gate():
    run = drawn_run(2)
    run["gates"][routing_tables.GATES] = np.nan
    found = table("routing", run)
    assert set(found["metric"]) == set(routing_tables.LOADS)
    assert found.notna().all(axis=None)


def test_saturation_is_read_off_the_share_of_the_largest():
    run = drawn_run(2)
    deeper = drawn_run(7)
    for kind in ("loads", "gates"):
        run[kind] = pd.concat([run[kind], deeper[kind].assign(layer=4)])
    for name, keys in (
        ("routing", ["scope", "name", "positions", "metric"]),
        ("mutual_information", ["label", "given"]),
    ):
        found = table(name, run)
        largest = found.groupby(keys)["estimate"].transform("max")
        some = largest > 0
        assert set(found["layer"]) == {0, 4}
        np.testing.assert_allclose(found.loc[some, "of_largest"], (found["estimate"] / largest)[some])
        assert found.loc[~some, "of_largest"].isna().all()


def test_blocks_of_draws_do_not_change_a_table(monkeypatch):
    run = drawn_run(4)
    whole = {name: table(name, run) for name in routing_tables.SUMMARIES}
    monkeypatch.setattr(routing_tables, "AT_ONCE", 100)
    for name, expected in whole.items():
        pd.testing.assert_frame_equal(table(name, run), expected)


@pytest.mark.parametrize("name", routing_plots.FIGURES)
@pytest.mark.parametrize("seed", [None, 0])
def test_figures_of_models_with_and_without_rows(name, seed):
    run = drawn_run(seed or 0)
    if seed is None:
        run |= {kind: run[kind].iloc[:0] for kind in ("loads", "gates")}
    figure = routing_plots.FIGURES[name]({name: table(name, run)}, ["moe", "dense"], "a note")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["moe", "dense"]
    drawn = len(panels["moe"].get_images()) + sum(len(line.get_xdata()) for line in panels["moe"].get_lines()[:-1])
    assert (drawn > 0) == (seed is not None)
    assert figure.texts[-1].get_text() == "a note"
    plt.close("all")


def test_shuffles_keep_the_facts_of_a_subject_together_and_groups_apart():
    rng = np.random.default_rng(0)
    subjects, group = pd.Series(rng.integers(0, 12, 60)), np.sort(rng.integers(0, 3, 60))
    orders = routing_tables._shuffles(subjects, group, 0)
    assert len({tuple(order) for order in orders}) == len(orders)
    for order in orders:
        assert sorted(order) == list(range(60))
        assert (group[order] == group).all()
        runs = pd.DataFrame({"group": group, "subject": subjects.to_numpy()[order]})
        changes = (runs != runs.shift()).any(axis=1).sum()
        assert changes == len(runs.drop_duplicates())

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope import facts

TASKS = ["geography", "object_attributes", "entity"]
GOOD = """task: geography
templates: ["The capital of {} is", "{} has the capital", "In {}, the capital is"]
held_out_template: "The capital city of {} is"
facts:
  France: Paris
  Norway: no
"""


def errors_of(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    with pytest.raises(facts.FactsError) as caught:
        facts.load_relations([folder / f"{name}.yaml" for name in files], TASKS)
    return [error.removeprefix(f"{folder}/") for error in caught.value.errors]


def test_a_good_file_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "country_capital.yaml"
    path.write_text(GOOD)
    [relation] = facts.load_relations([path], TASKS)
    assert relation.name == "country_capital"
    assert relation.templates[-1] == "The capital city of {} is"
    assert [(f.subject, f.objects, f.line) for f in relation.facts] == [
        ("France", ("Paris",), 5),
        ("Norway", ("no",), 6),
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("geography", "geografy"), "a.yaml:1: task: 'geografy' is not a known task; did you mean 'geography'?"),
        (("task:", "tsk:"), "a.yaml:1: tsk: not a known key; did you mean 'task'?"),
        (("facts:", "fact:"), "a.yaml: the key 'facts' is missing"),
        (
            ("The capital of {} is", "The capital is"),
            "a.yaml:2: template 'The capital is' needs the slot {} exactly once",
        ),
        (("The capital of {} is", "{} of {} is"), "a.yaml:2: template '{} of {} is' needs the slot {} exactly once"),
        (("capital is", "capital is {object}"), "a.yaml:2: template 'In {}, the capital is {object}' has a second"),
        (("capital is", "capital is [Y]"), "a.yaml:2: template 'In {}, the capital is [Y]' has a second placeholder"),
        (("capital is", "capital is ."), "text after the place of the object"),
        (("capital is", "capital is "), "text after the place of the object"),
        (('"The capital of {} is", ', ""), "a.yaml:2: templates: 2 given; at least 3"),
        (
            ("The capital of {} is", "The capital city of {} is"),
            "a.yaml:3: template 'The capital city of {} is' stands twice",
        ),
        (("France: Paris", "France:"), "a.yaml:5: fact 'France': empty subject or object"),
        (("France: Paris", "France: [Paris, '']"), "a.yaml:5: fact 'France': empty subject or object"),
        (("France: Paris", "'': Paris"), "a.yaml:5: fact '': empty subject or object"),
        (("France: Paris", "France: ' Paris'"), "a.yaml:5: fact 'France': spaces around"),
        (("France: Paris", "France: [Paris, Paris]"), "a.yaml:5: fact 'France': an accepted object stands twice"),
        (("Norway: no", "FRANCE: Lyon"), "a.yaml:6: duplicate fact 'FRANCE', first given on line 5"),
        (("France: Paris", "  - France: ["), "not valid YAML"),
        (("  France: Paris\n  Norway: no\n", "  []\n"), "a.yaml:5: facts: give a mapping"),
    ],
)
def test_each_error_is_a_sentence_with_file_and_line(tmp_path, change, error):
    found = errors_of(tmp_path, a=GOOD.replace(*change))
    assert any(error in sentence for sentence in found), found


def test_all_errors_of_all_files_come_at_once(tmp_path):
    found = errors_of(tmp_path, a=GOOD.replace("geography", "x").replace("Paris", "''"), b=GOOD.replace("facts", "y"))
    assert len([e for e in found if e.startswith("a.yaml")]) == 2
    assert [e for e in found if e.startswith("b.yaml")]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(facts.FactsError, match=r"nowhere\.yaml: no such fact file"):
        facts.load_relations([tmp_path / "nowhere.yaml"], TASKS)


def test_two_files_that_contradict_each_other(tmp_path):
    [found] = errors_of(tmp_path, a=GOOD, b=GOOD.replace("Paris", "Lyon").replace("  Norway: no\n", ""))
    assert "b.yaml:5: 'The capital of France is' -> 'Lyon' contradicts" in found
    assert "a.yaml:5 ('Paris')" in found


def test_the_same_fact_in_two_files_is_a_duplicate(tmp_path):
    found = errors_of(tmp_path, a=GOOD, b=GOOD)
    assert len(found) == 2
    assert all("duplicate fact" in error for error in found)


def test_prompt_table_has_a_row_for_each_fact_and_template(prompts):
    assert len(prompts) == (6 + 5) * 4
    assert prompts["prompt_id"].tolist() == list(range(44))
    assert prompts.groupby("fact_id")["held_out"].sum().eq(1).all()
    row = prompts[(prompts["subject"] == "New Zealand") & prompts["held_out"]].iloc[0]
    assert (row["prompt"], row["objects"], row["task"]) == (
        "In New Zealand, the capital city is",
        ["Wellington"],
        "geography",
    )
    for name, count in (("held_out", 11), ("training", 33), ("all", 44)):
        assert len(facts.select(prompts, name)) == count


def test_n_prompts_is_the_length_of_the_selection(fact_folder):
    relations = facts.load_relations(sorted(fact_folder.glob("*.yaml")), TASKS)
    table = facts.prompt_table(relations)
    for templates in ("held_out", "training", "all"):
        assert facts.n_prompts(relations, templates) == len(facts.select(table, templates))


def test_the_subjects_place_is_that_of_the_slot():
    fact = facts.Fact("land", ("Iceland",), 1)
    templates = ("The island of {} is", "{} is the island", "In the land {} is", "{}")
    table = facts.prompt_table([facts.Relation("r", "geography", templates, (fact,), Path("r.yaml"))])
    assert table["subject_at"].tolist() == [14, 0, 12, 0]
    assert table.columns[-1] == "subject_at"
    assert (table["subject_at"].dtype, table["template_id"].dtype) == ("int32", "int16")


def ranked(ranks):
    return pd.DataFrame({"prompt_id": range(len(ranks)), "rank": ranks}, index=range(5, 5 + len(ranks)))


@given(st.lists(st.integers(1, 50_000), min_size=1), st.integers(1, 100))
def test_known_prompts_are_those_that_the_model_ranks_high(ranks, rank):
    prompts = ranked([*ranks, 1])
    kept, unknown = facts.known(prompts, rank)
    assert (kept["rank"] <= rank).all()
    assert sorted([*kept["prompt_id"], *unknown["prompt_id"]]) == list(prompts["prompt_id"])
    reasons = [f"rank {found} in the clean run, more than {rank}" for found in ranks if found > rank]
    assert unknown["reason"].tolist() == reasons


def test_rank_0_keeps_every_prompt():
    kept, unknown = facts.known(ranked([3, 40_000]), 0)
    assert kept["rank"].tolist() == [3, 40_000]
    assert "reason" in unknown
    assert not len(unknown)


def test_a_model_that_knows_nothing_is_a_sentence():
    with pytest.raises(facts.FactsError) as caught:
        facts.known(ranked([37, 12]), 10)
    assert caught.value.errors == [
        "no prompt has rank 10 or better, the best of 2 is 12; allow a higher rank, or 0 for all prompts"
    ]
    with pytest.raises(facts.FactsError, match="there is no prompt"):
        facts.known(ranked([]), 0)


ids = st.lists(st.integers(0, 99), min_size=1, max_size=5)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5))
def test_steps_force_one_answer_token_after_the_other(pairs):
    prompts = pd.DataFrame(
        [(7 + i, np.array(prompt), np.array(targets)) for i, (prompt, targets) in enumerate(pairs)],
        columns=["prompt_id", "token_ids", "target_ids"],
    )
    table = facts.steps(prompts)
    assert len(table) == sum(len(targets) for _, targets in pairs)
    for row in table.itertuples():
        prompt, targets = pairs[row.prompt_id - 7]
        assert row.token_ids == prompt + targets[: row.step]
        assert (row.length, row.target_id) == (len(row.token_ids), targets[row.step])
    assert table.dtypes[["prompt_id", "step", "length", "target_id"]].tolist() == ["int32", "int16", "int16", "int32"]


def test_the_shipped_facts_are_sound():
    folder = Path(__file__).parents[2] / "config" / "facts"
    relations = facts.load_relations(sorted(folder.glob("*.yaml")), TASKS)
    assert sum(len(relation.facts) for relation in relations) >= 1000
    assert len(relations) >= 16
    assert {relation.task for relation in relations} == set(TASKS)
    assert {len(relation.templates) for relation in relations} == {5}
    subjects = {fact.subject for relation in relations for fact in relation.facts}
    objects = [{o for fact in relation.facts for o in fact.objects} for relation in relations]
    # Shared entities make routing a question: objects of one relation are subjects or objects of others.
    assert len(set().union(*objects) & subjects) >= 100
    assert sum(len(a & b) for i, a in enumerate(objects) for b in objects[:i]) >= 100

from pathlib import Path

import pytest

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


def test_targets_are_the_tokens_that_follow_in_context(tokenizer, prompts):
    tokens, dropped = facts.tokenise(tokenizer, prompts)
    assert not len(dropped)
    for row in tokens.itertuples():
        assert tokenizer.decode(row.token_ids).strip() == row.prompt
        for accepted, answer in zip(row.accepted_ids, row.objects):
            assert f" {answer}".startswith(tokenizer.decode([accepted]))
        subject = tokenizer.decode(row.token_ids[row.subject_start : row.subject_end])
        assert subject.strip() == row.subject
        assert row.length == len(row.token_ids)


def test_an_object_that_changes_the_prompts_tokens_is_dropped_and_counted(prompts):
    """A tokenizer that merges across the space before the object makes the prompt's own tokens change."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    texts = [f"{p} {o[0]}" for p, o in zip(prompts["prompt"], prompts["objects"])]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    merging = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokens, dropped = facts.tokenise(merging, prompts)
    assert len(dropped)
    assert len(tokens) + len(dropped) == len(prompts)
    assert dropped["reason"].str.contains("the tokens of the prompt change when").all()
    for row in tokens.itertuples():
        full = merging(f"{row.prompt} {row.objects[0]}")["input_ids"]
        assert full[: row.length] == row.token_ids


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

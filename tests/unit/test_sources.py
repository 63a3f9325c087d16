import csv
import errno
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import sources
from moescope.facts import FactsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPTS = Path(__file__).parents[2] / "scripts"
CAPITALS = [("France", "Paris"), ("Brazil", "Bras\\u00edlia"), ("Bolivia", "Sucre"), ("Bolivia", "La Paz")]


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lre(path, samples, templates=("The capital of {} is",), kind="factual"):
    path.parent.mkdir(parents=True, exist_ok=True)
    properties = {"relation_type": kind, "domain_name": "x", "range_name": "y", "symmetric": False}
    relation = {"name": path.stem, "prompt_templates": list(templates), "prompt_templates_zs": ["{}?"]}
    relation |= {"properties": properties, "samples": [{"subject": s, "object": o} for s, o in samples]}
    path.write_text(json.dumps(relation), encoding="utf-8")
    return path


def separated(path, rows, delimiter="\t"):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def refused(*args, folder, **more):
    with pytest.raises(FactsError) as caught:
        sources.read(*args, name="d", **more)
    return [error.replace(f"{folder}/", "") for error in caught.value.errors]


def facts_of(table):
    """The content of a table, whatever its order and numbers."""
    columns = ["task", "relation", "subject", "prompt", "subject_at"]
    cells = zip(*(table[column] for column in columns), table["objects"].map(frozenset))
    return set(cells)


def in_place(table):
    """Whether every known subject stands where subject_at says."""
    known = table[table["subject_at"] >= 0]
    return all(row.prompt[row.subject_at :].startswith(row.subject) for row in known.itertuples())


# The formats


def test_the_table_has_the_schema_of_the_prompt_table(tmp_path, prompts):
    table, _ = sources.read("lre", lre(tmp_path / "capital.json", CAPITALS), name="d")
    assert table.dtypes.to_dict() == prompts.dtypes.to_dict()
    assert list(table) == list(prompts)
    assert table["prompt_id"].tolist() == [0, 1, 2]


def test_lre_with_its_traps(tmp_path):
    lre(tmp_path / "factual/country_capital_city.json", [*CAPITALS, CAPITALS[0]], ["{}'s capital,", "In {}, it is "])
    lre(tmp_path / "commonsense/object_superclass.json", [("tiger", " animal")], ["A {} is in the category of a"])
    lre(tmp_path / "bias/name_religion.json", [("Ada", "none")], kind="bias")
    table, counts = sources.read("lre", tmp_path, name="d")
    assert list(dict.fromkeys(table["relation"])) == ["country_capital_city", "name_religion", "object_superclass"]
    assert table.groupby("relation")["task"].first().to_dict() == {
        "country_capital_city": "geography",
        "name_religion": "bias",
        "object_superclass": "object_attributes",
    }
    assert table["prompt"].tolist()[:2] == ["France's capital,", "In France, it is"]
    assert table["fact_id"].tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert table["template_id"].tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert table["objects"].tolist()[2:5] == [["Brasília"], ["Brasília"], ["Sucre", "La Paz"]]
    assert not table["held_out"].any()
    assert in_place(table)
    assert counts == {
        "records": 7,
        "rows": 8,
        "exact_duplicates": 1,
        "objects_merged": 1,
        "escapes_decoded": 1,
        "spaces_stripped": 2,
    }


def test_relations_are_picked_in_the_order_asked_for(tmp_path):
    for relation in sources.PRESETS["gated_lpi"]:
        lre(tmp_path / f"any/{relation}.json", [("a", "b")])
    assert len(sources.PRESETS["gated_lpi"]) == 12
    assert sources.PRESETS["gated_lpi"][:5] == sources.PRESETS["ka"]
    for names in (*sources.PRESETS.values(), ["work_location", "adj_antonym", "work_location"]):
        table, counts = sources.read("lre", tmp_path, name="d", relations=names)
        assert table["relation"].tolist() == list(dict.fromkeys(names))
        assert counts["prompts_shared_by_relations"] == 1
    assert refused("lre", tmp_path, relations=["work_locatoin"], folder=tmp_path.parent) == [
        f"{tmp_path.name}: relations: no relation 'work_locatoin'; did you mean 'work_location'?"
    ]


def test_the_subject_is_where_the_slot_is_and_not_where_its_letters_are(tmp_path):
    table, _ = sources.read("lre", lre(tmp_path / "r.json", [("a", "b"), ("{}", "c")], ["In a way, {} is"]), name="d")
    assert table["subject_at"].tolist() == [10, 10]
    assert table["prompt"].tolist() == ["In a way, a is", "In a way, {} is"]


def rewrite(case, prompt, subject, target, relation="P103"):
    target = {"str": target, "id": f"Q{case}"}
    asked = {"prompt": prompt, "relation_id": relation, "subject": subject, "target_true": target}
    asked["target_new"] = {"str": "English", "id": "Q1860"}
    return {
        "case_id": case,
        "pararel_idx": 2796,
        "requested_rewrite": asked,
        "paraphrase_prompts": ["It rained. Danielle Darrieux, a native"],
        "neighborhood_prompts": ["a"],
    }


ORIGINAL = [
    rewrite(0, "The mother tongue of {} is", "Danielle Darrieux", "French"),
    rewrite(1, "{} is a native speaker of", "Danielle Darrieux", "French"),
    rewrite(2, "{} plays the", "Dino", "guitar", "P1303"),
    rewrite(3, "{} plays the", "Dino", "piano", "P1303"),
]
TRACING = [
    ("The mother tongue of", " Danielle Darrieux", " is", " French", "P103"),
    ("", "Danielle Darrieux", " is a native speaker of", " French", "P103"),
    ("", "Dino", " plays the", " guitar", "P1303"),
    ("", "Dino", " plays the", " piano", "P1303"),
]


def tracing_rows():
    for prefix, subject, suffix, target, relation in TRACING:
        yield {
            "relation": f"{prefix} {{}}{suffix}",
            "relation_prefix": prefix,
            "relation_suffix": suffix,
            "prompt": prefix + subject + suffix,
            "relation_id": relation,
            "target_true": target,
            "target_false": " English",
            "subject": subject,
        }


@pytest.mark.parametrize("kind", [".json", ".parquet", ".jsonl"])
def test_counterfact_in_both_forms_holds_the_same_facts(tmp_path, kind):
    tables = []
    for form, rows in (("original", ORIGINAL), ("tracing", list(tracing_rows()))):
        path = tmp_path / f"{form}{kind}"
        if kind == ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        else:
            path.write_text(json.dumps(rows) if kind == ".json" else "\n\n".join(map(json.dumps, rows)))
        table, counts = sources.read("counterfact", path, name="counterfact")
        assert (counts["records"], counts["rows"], counts["objects_merged"]) == (4, 3, 1)
        assert table["task"].eq("counterfact").all()
        tables.append(table)
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["template_id"].tolist() == [0, 1, 0]
    assert tables[0]["subject_at"].tolist() == [21, 0, 0]
    assert tables[0]["objects"].tolist() == [["French"], ["French"], ["guitar", "piano"]]


def test_tracing_csv_where_the_subject_also_stands_before_its_place(tmp_path):
    row = {"relation": "r", "relation_prefix": "Rome or", "prompt": "Rome or Rome is in", "subject": " Rome"}
    path = separated(tmp_path / "c.csv", [{**row, "target_true": " Italy"}], ",")
    table, _ = sources.read("counterfact", path, name="c")
    assert table[["relation", "subject_at"]].values.tolist() == [["r", 8]]


def pararel(folder):
    patterns = ["[X] is the capital of [Y].", "[X], the capital of [Y] .", "[Y]'s capital is [X]", "([X], [Y])"]
    entries = [{"pattern": p, "lemma": "capital", "extended_lemma": "is-capital", "tense": "present"} for p in patterns]
    lines(folder / "data/pattern_data/graphs_json/P1376.jsonl", entries)
    lines(folder / "data/pattern_data/graphs_json/P47.jsonl", [{"pattern": "[Y] borders [X]."}])
    facts = [("London", "England"), ("London", "England"), ("Jerusalem", "Israel"), ("Jerusalem", "Judah")]
    records = [{"sub_label": s, "obj_label": o, "uuid": str(i)} for i, (s, o) in enumerate(facts)]
    for relation in ("P1376", "P47", "P9999"):
        lines(folder / f"data/trex_lms_vocab/{relation}.jsonl", records)
    return folder


def test_pararel_keeps_the_patterns_that_end_with_the_object(tmp_path):
    table, counts = sources.read("pararel", pararel(tmp_path), name="pararel")
    assert table["prompt"].tolist()[:2] == ["London is the capital of", "London, the capital of"]
    assert table["objects"].tolist() == [["England"], ["England"], ["Israel", "Judah"], ["Israel", "Judah"]]
    assert table["relation"].eq("P1376").all()
    assert table["task"].eq("pararel").all()
    assert in_place(table)
    assert counts == {
        "records": 4,
        "rows": 4,
        "exact_duplicates": 1,
        "objects_merged": 1,
        "templates_left_out": 3,
        "relations_left_out": 1,
    }
    assert sources.check("pararel", tmp_path, relations=["P1367"])[0].endswith("did you mean 'P1376'?")


def popqa(subject, prop, answer, question, answers):
    return {"id": 1, "subj": subject, "prop": prop, "obj": answer, "s_pop": 142, "question": question} | {
        "possible_answers": json.dumps(answers)
    }


POPQA = [
    popqa("It", "author", "Stephen King", "Who is the author of It?", ["King", "Stephen King", "R. Bachm\u00e4n"]),
    popqa("Emma", "author", "Jane Austen", "Who is the author of Emma?", ["Jane Austen"]),
    popqa("Rankin", "occupation", "politician", "What is George's occupation?", ["politician", "statesman"]),
    popqa("", "occupation", "politician", "What is ?", []),
]


@pytest.mark.parametrize("kind", [".tsv", ".csv", ".json", ".jsonl", ".parquet"])
def test_popqa_in_every_kind_of_file(tmp_path, kind):
    path = tmp_path / f"test{kind}"
    if kind in (".tsv", ".csv"):
        separated(path, POPQA, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        pd.DataFrame(POPQA).to_parquet(path)
    else:
        path.write_text("\ufeff" + (json.dumps(POPQA) if kind == ".json" else "\n".join(map(json.dumps, POPQA))))
    table, counts = sources.read("popqa", path, name="popqa")
    assert table["prompt"].tolist()[0] == "Q: Who is the author of It? A:"
    assert table["subject_at"].tolist() == [24, 24, -1]
    assert table["template_id"].tolist() == [0, 0, 0]
    assert table["objects"].tolist()[0] == ["Stephen King", "King", "R. Bachmän"]
    assert counts == {"records": 4, "rows": 3, "rows_left_out_empty": 1, "json_strings_parsed": 4}
    table, counts = sources.read("popqa", path, name="popqa", relations=["occupation"])
    assert table["relation"].unique().tolist() == ["occupation"]
    assert counts["records"] == 2


def test_a_table_of_any_columns_from_shards_in_a_folder(tmp_path):
    shards = tmp_path / "data"
    shards.mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/listing.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    first = {"who": ["Bach", "Abba", None], "year": [1685.0, 1972.0, None], "also": [["2.0"], [], None]}
    pd.DataFrame(first).assign(text="{} began in", kind="music").to_parquet(shards / "train-00000.parquet")
    second = pd.DataFrame({"who": ["Abba"], "year": [1973.5], "also": [None], "text": "{} began in", "kind": ["music"]})
    second.to_parquet(shards / "train-00001.parquet")
    columns = {"subject": "who", "object": "year", "aliases": "also", "template": "text", "relation": "kind"}
    table, counts = sources.read("table", tmp_path, name="bands", columns=columns)
    assert table["objects"].tolist() == [["1685", "2.0"], ["1972", "1973.5"]]
    assert set(table["task"]) == {"bands"}
    assert set(table["relation"]) == {"music"}
    assert counts == {"records": 4, "rows": 2, "rows_left_out_empty": 1, "objects_merged": 1}


def test_a_table_of_full_prompts(tmp_path):
    rows = [
        {"s": "Paris", "o": "France", "p": "Parisians live in Paris, in ", "a": '["Gaul"]', "t": "geo"},
        {"s": "NA", "o": "Namibia", "p": "The country with the code NA is", "a": "", "t": "geo"},
        {"s": "上海", "o": "中国", "p": "省上海市在", "a": "", "t": "geo"},
        {"s": "Oslo", "o": "Norway", "p": "This town lies in", "a": "Norge", "t": "geo"},
    ]
    columns = {"subject": "s", "object": "o", "prompt": "p", "aliases": "a", "task": "t"}
    table, counts = sources.read("table", separated(tmp_path / "t.csv", rows, ","), name="towns", columns=columns)
    assert table["subject_at"].tolist() == [18, 26, 1, -1]
    assert table["template_id"].tolist() == [0, 1, 2, 3]
    assert table["objects"].tolist() == [["France", "Gaul"], ["Namibia"], ["中国"], ["Norway", "Norge"]]
    assert set(table["relation"]) == {"towns"}
    assert set(table["task"]) == {"geo"}
    assert counts == {"records": 4, "rows": 4, "spaces_stripped": 1, "json_strings_parsed": 1}


def test_prompts_that_two_relations_share_are_kept_and_counted(tmp_path):
    records = [{"s": "Bo", "o": answer, "t": "{} is a", "r": answer} for answer in ("dog", "male", "dog")]
    columns = {"subject": "s", "object": "o", "template": "t", "relation": "r"}
    table, counts = sources.read("table", lines(tmp_path / "t.jsonl", records), name="d", columns=columns)
    assert table["fact_id"].tolist() == [0, 1]
    assert counts["prompts_shared_by_relations"] == 1
    assert counts["exact_duplicates"] == 1


# What holds for any input

COLUMNS = {"subject": "s", "object": "o", "template": "t", "relation": "r", "aliases": "a"}
WORD = st.sampled_from(["a", " a", "b", "\\u0061", "\\ud83d\\ude00", "😀", "\\\\u0062", ""])
RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            "s": WORD,
            "o": WORD,
            "r": st.sampled_from(["x", "y"]),
            "t": st.sampled_from(["{} is", "a {}", "{} is "]),
            "a": st.one_of(st.none(), WORD, st.lists(WORD, max_size=2), st.lists(WORD, max_size=2).map(json.dumps)),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), records=RECORDS)
def test_the_order_of_the_records_changes_only_numbers(tmp_path_factory, data, records):
    records = [*records, {"s": "a", "o": "b", "r": "x", "t": "{} is"}]
    folder = tmp_path_factory.mktemp("order")
    found = []
    for order in (records, data.draw(st.permutations(records)), [*records, records[-1]]):
        table, counts = sources.read("table", lines(folder / "t.jsonl", order), name="d", columns=COLUMNS)
        found.append((facts_of(table), counts))
        keys = table[["relation", "subject", "prompt", "subject_at"]]
        assert not keys.duplicated().any()
        assert not table.duplicated(["relation", "fact_id", "template_id"]).any()
        assert all(len(set(objects)) == len(objects) > 0 for objects in table["objects"])
        texts = [*table["subject"], *table["prompt"], *(o for objects in table["objects"] for o in objects)]
        assert all(text and text == text.strip() and "\\" not in text for text in texts)
        assert counts["rows"] == len(table) == len(found[-1][0])
        assert in_place(table)
        left_out = sum(counts.get(key, 0) for key in ("rows_left_out_empty", "exact_duplicates", "objects_merged"))
        assert counts["records"] == len(order)
        assert counts["records"] - left_out == len(table)
    assert found[0] == found[1]
    assert found[2][0] == found[0][0]
    assert found[2][1]["exact_duplicates"] == found[0][1].get("exact_duplicates", 0) + 1


@given(
    st.lists(st.one_of(st.text(max_size=3), st.sampled_from(["\\u", "\\", "00e9", "\\ud83d", "\\ude00", "\\u005c"])))
)
def test_decoded_text_holds_no_escape_and_can_be_written(parts):
    decoded = sources._decoded("".join(parts))
    assert not sources.ESCAPE.search(decoded)
    assert decoded.encode().decode() == decoded
    assert sources._decoded(decoded) == decoded


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='\\"')))
def test_text_that_was_escaped_comes_back(text):
    once = json.dumps(text)[1:-1]
    assert sources._decoded(once) == sources._decoded(json.dumps(once)[1:-1]) == sources._decoded(text) == text


# Bad input


MAPPED = {"subject": "s", "object": "o", "template": "t"}


@pytest.mark.parametrize(
    ("file", "text", "columns", "sentence"),
    [
        ("t.csv", "s,o,t\n", MAPPED, "t.csv: holds no record; give a file with facts"),
        ("t.csv", "", MAPPED, "t.csv: holds no record; give a file with facts"),
        ("t.json", "[]", MAPPED, "t.json: holds no record; give a file with facts"),
        ("t.tsv", "so\to\tt\n1\t2\t3\n", MAPPED, "t.tsv: columns.subject: no column 's'; did you mean 'so'?"),
        ("t.csv", "x,o,t\n1,2,3\n", MAPPED, "t.csv: columns.subject: no column 's'; known: x, o, t"),
        ("t.csv", "s,o,t\n1,2\n", MAPPED, "t.csv:2: 2 fields where the header has 3; quote a field"),
        ("t.tsv", 's\to\tt\n"A" B\t2\t3\n', MAPPED, "t.tsv:2: '\t' expected after '\"'; double the quotes inside"),
        ("t.csv", "s,o,t\nA,B,is\n", MAPPED, "t.csv:2: template 'is' needs the slot {} exactly once"),
        ("t.csv", "s,o,t\nA,B,{} {}\n", MAPPED, "t.csv:2: template '{} {}' needs the slot {} exactly once"),
        ("t.csv", "s,o,t\n,B,{}\nA, ,{}\n", MAPPED, "t.csv: no fact in it has a subject, an object and a prompt"),
        ("t.jsonl", '{"s": 1, "o": 2, "t": "{}"}\n{"s": 1,\n', MAPPED, "t.jsonl:2: not valid JSON (Expecting"),
        ("t.jsonl", '{"s": 1, "o": 2, "t": "{}"}\n[1]\n', MAPPED, "t.jsonl:2: not a JSON object"),
        ("t.jsonl", '{"s": [1], "o": 2, "t": "{}"}\n', MAPPED, "t.jsonl:1: [1] stands where text is needed"),
        ("t.json", '[{"s": 1, "o": 2, "t": "{}"},\n 7, {]', MAPPED, "t.json:2: not valid JSON (Expecting"),
        ("t.json", '[{"s": 1, "o": 2, "t": "{}"}, 7]', MAPPED, "t.json: record 2: not a JSON object"),
        ("t.json", '{"s": 1}', MAPPED, "t.json: not a list of records; give a JSON list of objects"),
        ("t.parquet", "nonsense", MAPPED, "t.parquet: cannot be read (Parquet magic bytes not found"),
        ("t.csv", b"s,o,t\n\xe9,B,{}\n", MAPPED, "t.csv: not UTF-8 text; save it as UTF-8"),
        ("t.txt", "s,o,t\n", MAPPED, "t.txt: no file of a known kind; give one of .csv, .tsv, .json, .jsonl, .parquet"),
        (
            *("t.csv", "s,o,t,a\nA,B,{},['b']\n", {**MAPPED, "aliases": "a"}),
            't.csv:2: [\'b\'] is not valid JSON; write a list as ["a", "b"]',
        ),
        (
            *("t.csv", "s,o,t,k\nA,B,{},x\nC,D,{},y\n", {**MAPPED, "task": "k"}),
            "t.csv: relation 'd' stands in 2 tasks; give each relation one",
        ),
        (
            "t.csv",
            "s,o,t\nA,B,{}\n",
            {**MAPPED, "subjekt": "s"},
            "t.csv: columns.subjekt: not a known key; did you mean",
        ),
        ("t.csv", "s,o,t\nA,B,{}\n", {"subject": "s", "template": "t"}, "t.csv: columns.object: missing; name the"),
        ("t.csv", "s,o,t\nA,B,{}\n", {"subject": "s", "object": "o"}, "t.csv: columns: give one of prompt"),
        ("t.csv", "s,o,t\nA,B,{}\n", {**MAPPED, "prompt": "t"}, "t.csv: columns: give one of prompt"),
    ],
)
def test_each_bad_table_has_its_sentence(tmp_path, file, text, columns, sentence):
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    [found] = refused("table", tmp_path / file, columns=columns, folder=tmp_path)
    assert found.startswith(sentence)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("format", "file", "content", "sentence"),
    [
        ("popqa", "p.tsv", "subj\tprop\tobj\tquestions\tpossible_answers\n" + "x\t" * 4 + "x", "'questions'?"),
        (
            "counterfact",
            "c.json",
            [{"prompt": "a", "subject": "b"}],
            "c.json: format counterfact: no column 'target_true'",
        ),
        (
            "counterfact",
            "c.json",
            [{"requested_rewrite": {"prompt": "{}"}}],
            "c.json: record 1: requested_rewrite needs",
        ),
        ("counterfact", "c.json", [rewrite(0, "She is", "b", "c")], "record 1: template 'She is' needs the slot"),
        ("lre", "r.json", {"prompt_templates": []}, "r.json: not a relation of LRE; it needs the lists"),
        ("lre", "r.json", {"prompt_templates": ["a"], "samples": [3]}, "r.json: template 'a' needs the slot"),
        ("lre", "r.json", {"prompt_templates": ["a"], "samples": [3]}, "r.json: sample 1: not a JSON object"),
        ("lre", "r.json", '{"prompt_templates":\n', "r.json:2: not valid JSON"),
        ("lre", "r.json", {"prompt_templates": [], "samples": [{"subject": "a", "object": "b"}]}, "no fact in it"),
        ("pararel", "r.json", "", "no relation has both graphs_json/P*.jsonl and trex_lms_vocab/P*.jsonl in it"),
        ("lrr", "r.json", "", "format: 'lrr' is not a known format; did you mean 'lre'?"),
    ],
)
def test_each_bad_data_set_has_its_sentence(tmp_path, format, file, content, sentence):
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    found = refused(format, tmp_path / file, folder=tmp_path)
    assert any(sentence in error for error in found), found


def test_all_errors_come_at_once_and_only_the_first_twenty_are_written_out(tmp_path):
    lines(tmp_path / "t.jsonl", [{"s": "a", "o": "b", "t": f"{i} is"} for i in range(24)])
    found = refused("table", tmp_path / "t.jsonl", columns=MAPPED, folder=tmp_path)
    assert found[19].startswith("t.jsonl:20: template '19 is'")
    assert found[20:] == ["and 4 more"]


def test_folders_that_cannot_be_read(tmp_path):
    lre(tmp_path / "a/r.json", CAPITALS)
    lre(tmp_path / "b/r.json", CAPITALS)
    (tmp_path / "b/t.csv").write_text("s,o\n")
    (tmp_path / "empty").mkdir()
    [twice] = refused("lre", tmp_path, folder=tmp_path)
    assert twice == "b/r.json: 'r' also stands in a/r.json; name the folder of one"
    [kinds] = refused("table", tmp_path / "b", columns=MAPPED, folder=tmp_path)
    assert kinds.startswith("b: holds files of several kinds (.csv, .json); give one of .csv")
    for format, sentence in (("lre", "no relation (*.json) in it"), ("popqa", "no file of a known kind")):
        assert refused(format, tmp_path / "empty", folder=tmp_path)[0].startswith(f"empty: {sentence}")
        [absent] = refused(format, tmp_path / "nowhere", folder=tmp_path)
        assert absent == "nowhere: no such file or folder; mend the path, or put the data set there"
    [mapped] = refused("lre", tmp_path / "a", columns={"subject": "s"}, folder=tmp_path)
    assert mapped == "a: columns: only the format table has them; remove them, or take that format"


def test_check_reads_no_more_than_it_must(tmp_path):
    good = '{"s": "a", "o": "b", "t": "{} is"}\n'
    (tmp_path / "t.jsonl").write_text(good * sources.LOOKED_AT + "broken\n" * 3)
    assert sources.check("table", tmp_path / "t.jsonl", relations=["any"], columns=MAPPED) == []
    assert len(refused("table", tmp_path / "t.jsonl", columns=MAPPED, folder=tmp_path)) == 3


def test_an_unknown_relation_of_a_table_is_named(tmp_path):
    path = separated(tmp_path / "test.tsv", POPQA)
    sentence = "test.tsv: relations: no relation 'autor'; did you mean 'author'?"
    assert refused("popqa", path, relations=["occupation", "autor"], folder=tmp_path) == [sentence]


# Downloads: a real client, against a cache made by hand and against a small Hub on this machine

FETCH = """
import json, sys
from pathlib import Path
from moescope import sources
from moescope.facts import FactsError
for repo, revision, files, folder in json.loads(sys.argv[1]):
    try:
        print(sources.fetch(repo, revision, files, Path(folder)))
    except FactsError as error:
        print(error)
"""


def fetched(cases, cache, **env):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HUB_CACHE": str(cache), "PYTHONPATH": str(SCRIPTS), "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
    cases = [[*case[:3], str(case[3])] for case in cases]
    command = [sys.executable, "-c", FETCH, json.dumps(cases)]
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_offline_the_cache_is_all_there_is(tmp_path):
    storage = tmp_path / "cache/datasets--org--facts"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs/main").write_text(COMMIT)
    (storage / "blobs").mkdir()
    (storage / "blobs/abc").write_text("subj\n")
    snapshot = storage / f"snapshots/{COMMIT}"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/test.tsv").symlink_to("../../../blobs/abc")
    (snapshot / "README.md").write_text("about")
    (tmp_path / "file").write_text("")
    cases = [
        ("org/facts", "main", "*.tsv", tmp_path / "a"),
        ("org/facts", COMMIT, "data/*", tmp_path / "b"),
        ("org/facts", "main", "*.parquet", tmp_path / "c"),
        ("org/facts", "v2", "*.tsv", tmp_path / "c"),
        ("org/other", "main", "*.tsv", tmp_path / "c"),
        ("no name!", "main", "*.tsv", tmp_path / "c"),
        ("org/facts", "main", "*.tsv", tmp_path / "file"),
    ]
    found = fetched(cases, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert found[:2] == [COMMIT, COMMIT]
    for folder in "ab":
        copied = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert copied == [tmp_path / folder / "data/test.tsv"]
        assert not copied[0].is_symlink()
        assert copied[0].read_text() == "subj\n"
    assert found[2] == "org/facts: no file of revision 'main' matches '*.parquet'; mend the pattern"
    assert found[3].startswith(
        "org/facts: revision 'v2' is not whole in the local cache, and the Hub cannot be reached"
    )
    assert found[4].startswith("org/other: revision 'main' is not whole in the local cache")
    assert found[5] == "no name!: not the name of a data set; give 'owner/name'"
    assert found[6].startswith("org/facts: the download failed (Not a directory); mend that")
    assert len(found) == len(cases)
    assert not (tmp_path / "c").exists()


class Hub(BaseHTTPRequestHandler):
    """The few answers of a Hub that a download asks for."""

    def do_GET(self):
        owner = "gated" if "/gated/" in self.path else "org" if "/org/" in self.path else ""
        if owner == "gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not owner:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/v2" in self.path:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "/revision/" in self.path:
            self.answer(200, json.dumps({"id": "org/facts", "sha": COMMIT, "siblings": []}).encode())
        elif "/tree/" in self.path:
            listed = [{"type": "file", "path": path, "size": 5, "oid": "abc"} for path in ("test.tsv", "big.bin")]
            self.answer(200, json.dumps(listed).encode())
        else:
            self.answer(200, b"subj\n", {"X-Repo-Commit": COMMIT, "ETag": '"abc"'})

    do_HEAD = do_GET

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_online_a_download_and_what_can_stop_it(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    repos = [("org/facts", "main", "*.tsv"), ("org/facts", "main", "*.csv"), ("org/facts", "v2", "*.tsv")]
    repos += [("gated/facts", "main", "*.tsv"), ("nobody/facts", "main", "*.tsv")]
    endpoint = f"http://127.0.0.1:{server.server_port}"
    found = fetched([(*repo, tmp_path / "here") for repo in repos], tmp_path / "cache", HF_ENDPOINT=endpoint)
    server.shutdown()
    server.server_close()
    assert found == [
        COMMIT,
        "org/facts: no file of revision 'main' matches '*.csv'; mend the pattern",
        "org/facts: no revision 'v2'; give a branch, a tag or a commit hash",
        "gated/facts: the data set is gated; accept its terms on its page and log in with 'hf auth login'",
        "nobody/facts: no such data set, or a private one; mend its name or log in with 'hf auth login'",
    ]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["test.tsv"]
    # With the Hub gone, what was fetched once is still there.
    again = fetched([("org/facts", "main", "*.tsv", tmp_path / "again")], tmp_path / "cache", HF_ENDPOINT=endpoint)
    assert again == [COMMIT]


def test_a_full_disk_is_called_so():
    assert sources._trouble(OSError(errno.ENOSPC, "No space left on device"), "main").startswith("the disk is full")

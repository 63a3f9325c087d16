"""Free-text tasks: templates over the columns of tables shaped like well-known ones, and their tokens."""

import json

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from moescope import artifacts, texts
from moescope.facts import FactsError

GSM8K = [
    {"question": "Tom has 3 pens.\nHe buys 2. How many?", "answer": "3 + 2 = <<3+2=5>>5\n#### 5"},
    {"question": "Half of 8?", "answer": "#### 4"},
]
MMLU = [
    {"question": "2 + 2?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": 1},
    {"question": "Capital of Italy?", "subject": "geography", "choices": ["Rome", "Oslo", "Bern", "Riga"], "answer": 0},
]
HUMAN_EVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a, b):\n    """Sum."""\n',
        "canonical_solution": "    if not a:\n\treturn b\n    return a + b\n\n",
    },
    {"task_id": "HumanEval/1", "prompt": "def one():\n", "canonical_solution": '    return "{1}"\n'},
]
LETTERED = "{question}\n{choices:lettered}\nAnswer:"


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def parquet(path, records):
    pd.DataFrame(records).to_parquet(path)
    return path


def refused(folder, path, **templates):
    with pytest.raises(FactsError) as caught:
        texts.read(path, name="t", **templates)
    return [error.replace(f"{folder}/", "") for error in caught.value.errors]


# The shapes of well-known tables


def test_gsm8k(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", GSM8K)
    templates = {"prompt": "Question: {question}\nAnswer:", "response": " {answer}"}
    assert texts.check(path, **templates) == []
    table, counts = texts.read(path, name="gsm8k", **templates)
    assert counts == {"records": 2, "rows": 2}
    assert table.dtypes.astype(str).to_dict() == {"text_id": "int32"} | dict.fromkeys(
        ["task", "relation", "subject", "prompt", "response"], "str"
    )
    assert table.to_dict("list") == {
        "text_id": [0, 1],
        "task": ["gsm8k"] * 2,
        "relation": ["gsm8k"] * 2,
        "subject": ["0", "1"],
        "prompt": ["Question: Tom has 3 pens.\nHe buys 2. How many?\nAnswer:", "Question: Half of 8?\nAnswer:"],
        "response": [" 3 + 2 = <<3+2=5>>5\n#### 5", " #### 4"],
    }


def test_mmlu_with_its_subjects_as_tasks(tmp_path):
    path = parquet(tmp_path / "test.parquet", MMLU)
    table, _ = texts.read(path, name="mmlu", prompt=LETTERED, response=" {answer:letter}", task="{subject}")
    assert table["prompt"][0] == "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    assert table["response"].tolist() == [" B", " A"]
    assert table["task"].tolist() == table["relation"].tolist() == ["elementary_mathematics", "geography"]


def test_human_eval_keeps_the_white_space_of_code(tmp_path):
    path = jsonl(tmp_path / "HumanEval.jsonl", HUMAN_EVAL)
    table, _ = texts.read(path, name="code", prompt="{prompt}", response="{canonical_solution}")
    assert table["prompt"].tolist() == [record["prompt"] for record in HUMAN_EVAL]
    assert table["response"].tolist() == [record["canonical_solution"] for record in HUMAN_EVAL]


def test_responses_that_the_model_is_to_write(tmp_path):
    table, _ = texts.read(jsonl(tmp_path / "t.jsonl", GSM8K), name="t", prompt="{question}")
    assert table["response"].tolist() == ["", ""]


def test_a_folder_of_files_is_one_task(tmp_path):
    for name, record in zip("ab", GSM8K):
        jsonl(tmp_path / f"{name}.jsonl", [record])
    table, _ = texts.read(tmp_path, name="t", prompt="{question}")
    assert table["prompt"].tolist() == [record["question"] for record in GSM8K]


# What becomes a sample


def test_duplicates_are_merged_and_gaps_left_out(tmp_path):
    records = [
        {"q": "a", "r": "1", "t": " x "},
        {"q": "a", "r": "1", "t": "y"},
        {"q": "a", "r": "2", "t": "y"},
        {"q": "b", "r": None, "t": "y"},
        {"q": "b", "r": " \n", "t": "y"},
        {"q": "b", "t": "y"},
        {"q": "b", "r": "1", "t": ""},
        {"q": "half \ud83d pair", "r": "\\u00e9", "t": "y"},
    ]
    table, counts = texts.read(jsonl(tmp_path / "t.jsonl", records), name="t", prompt="{q}", response="{r}", task="{t}")
    assert table["prompt"].tolist() == ["a", "a", "half � pair"]
    assert table["response"].tolist() == ["1", "2", "\\u00e9"]
    assert table["task"].tolist() == ["x", "y", "y"]
    assert counts == {"records": 8, "duplicates_merged": 1, "left_out_empty": 4, "rows": 3}


def test_a_sample_of_the_records_is_drawn_by_the_seed_alone_and_lies_in_a_larger_one(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"q": f"question {i // 2}"} for i in range(200)])
    whole = texts.read(path, name="t", prompt="{q}")[0].set_index("text_id")
    drawn = {}
    for samples in (1, 30, 60, 100, 1000):
        table, counts = texts.read(path, name="t", prompt="{q}", samples=samples, seed=3)
        assert len(table) == counts["rows"] == min(samples, 100)
        assert counts.get("not_drawn", 0) == 100 - len(table)
        assert table["text_id"].is_monotonic_increasing
        assert table.set_index("text_id").equals(whole.loc[table["text_id"]])
        drawn[samples] = set(table["text_id"])
    assert drawn[1] < drawn[30] < drawn[60] < drawn[100] == drawn[1000]
    assert max(drawn[30]) > 60
    other = texts.read(path, name="t", prompt="{q}", samples=30, seed=4)[0]
    assert set(other["text_id"]) != drawn[30]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}[].:!"), min_size=1, max_size=5)


@given(st.lists(st.tuples(text, name), max_size=3), text, st.data())
def test_a_template_of_columns_is_filled_as_str_format_fills_it(parts, end, data):
    double = {ord(brace): 2 * brace for brace in "{}"}
    template = "".join(f"{before.translate(double)}{{{column}}}" for before, column in parts) + end.translate(double)
    record = {column: data.draw(st.one_of(text, st.integers(), st.booleans())) for _, column in parts}
    # format_map: a column may have a name such as "0", which str.format takes for a place.
    expected = "".join(before + str(record[column]) for before, column in parts) + end
    assert texts._filled(texts._fields(template), record) == expected
    if not any(column.isdecimal() for column in record):
        assert template.format(**record) == expected


def test_entries_of_lists_and_objects(tmp_path):
    record = {"q": "x", "answers": {"text": ["first", "second"], "n": 2}, "Correct Answer": "y"}
    path = jsonl(tmp_path / "t.jsonl", [record, record | {"answers": {"text": []}}])
    templates = {"prompt": "{answers[text]:lettered}\n", "response": "{answers[text][1]} {Correct Answer}"}
    table, counts = texts.read(path, name="t", **templates)
    assert table[["prompt", "response"]].values.tolist() == [["A. first\nB. second\n", "second y"]]
    assert counts["left_out_empty"] == 1


# Bad input


@pytest.mark.parametrize(
    ("prompt", "more", "sentence"),
    [
        ("{questoin}", {}, "t.jsonl: prompt: no column 'questoin'; did you mean 'question'?"),
        ("{question}", {"response": "{x}"}, "t.jsonl: response: no column 'x'; known: question, answer"),
        ("{question}", {"task": "{subject}"}, "t.jsonl: task: no column 'subject'; known: question, answer"),
        ("{question", {}, "prompt: '{question': expected '}' before end of string; write {{ and }} for braces"),
        ("a } b", {}, "prompt: 'a } b': single '}' encountered in format string; write {{ and }} for braces"),
        ("{question.__class__}", {}, "prompt: '{question.__class__}' is no column; write {column}, {column[key]}"),
        ("{question[__class__]}", {}, "prompt: '{question[__class__]}' is no column; write {column}"),
        ("{question!r}", {}, "prompt: '{question!r}' is no column; write {column}"),
        ("{}", {}, "prompt: '{}' is no column; write {column}"),
        ("{question:letterd}", {}, "prompt: '{question:letterd}': 'letterd' is not a known form; did you mean"),
        ("{question:{answer}}", {}, "prompt: '{question:{answer}}': '{answer}' is not a known form; known: letter,"),
        ("Hello", {"response": " you"}, "prompt: 'Hello' names no column; write one in braces, such as {question}"),
    ],
)
def test_each_bad_template_has_its_sentence(tmp_path, prompt, more, sentence):
    path = jsonl(tmp_path / "t.jsonl", GSM8K)
    [found] = texts.check(path, prompt, **more)
    assert found.replace(f"{tmp_path}/", "").startswith(sentence)
    assert refused(tmp_path, path, prompt=prompt, **more) == [found.replace(f"{tmp_path}/", "")]
    # Before a download only the columns cannot be checked.
    assert texts.check(None, prompt, **more) == ([] if "no column '" in found else [found])


def test_all_errors_come_at_once(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", GSM8K)
    found = texts.check(path, "{a.b}{question", "{x}", "{y}")
    assert [error.replace(f"{tmp_path}/", "").split(":")[:2] for error in found] == [
        ["prompt", " '{a.b}{question'"],
        ["t.jsonl", " response"],
        ["t.jsonl", " task"],
    ]


@pytest.mark.parametrize(
    ("content", "templates", "sentence"),
    [
        ("", {}, "t.jsonl: holds no record; give a file"),
        ('{"q": "x"\n', {}, "t.jsonl:1: not valid JSON"),
        ('{"q": "x"}\n[1]\n', {}, "t.jsonl:2: not a JSON object"),
        ('{"q": null}\n', {}, "t.jsonl: no record has all that the templates ask for; mend"),
        ('{"q": ["x"]}\n', {}, "t.jsonl:1: column 'q': ['x'] stands where text is needed; mend"),
        ('{"q": "x"}\n', {"prompt": "{q:letter}"}, "t.jsonl:1: column 'q': 'x' is no number from 0 to 25; mend it"),
        ('{"q": 26}\n', {"prompt": "{q:letter}"}, "t.jsonl:1: column 'q': 26 is no number from 0 to 25"),
        ('{"q": true}\n', {"prompt": "{q:letter}"}, "t.jsonl:1: column 'q': True is no number from 0 to 25"),
        ('{"q": "x"}\n', {"prompt": "{q:lettered}"}, "t.jsonl:1: column 'q': 'x' is no list of up to 26; mend it"),
        ('{"q": [null]}\n', {"prompt": "{q:lettered}"}, "t.jsonl:1: column 'q': None stands where text is needed"),
        (f'{{"q": {list(range(27))}}}\n', {"prompt": "{q:lettered}"}, "t.jsonl:1: column 'q': [0, 1, 2"),
    ],
)
def test_each_bad_record_has_its_sentence(tmp_path, content, templates, sentence):
    (tmp_path / "t.jsonl").write_text(content)
    [found] = refused(tmp_path, tmp_path / "t.jsonl", **{"prompt": "{q}"} | templates)
    assert found.startswith(sentence)


def test_files_that_are_not_there(tmp_path):
    [absent] = texts.check(tmp_path / "nowhere", "{q}")
    assert absent == f"{tmp_path}/nowhere: no such file or folder; mend the path, or put the data set there"
    (tmp_path / "t.txt").write_text("q\n")
    [kind] = texts.check(tmp_path / "t.txt", "{q}")
    assert kind.startswith(f"{tmp_path}/t.txt: no file of a known kind; give one of .csv, .tsv, .json")


# Tokens


def byte_level(trim=False, around=False):
    """BPE on bytes. With trimmed offsets, a token's blank is not among its characters; `around` puts <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if around:
        specials = [(token, number) for number, token in enumerate(SPECIAL)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials, limit_alphabet=30, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return LlamaTokenizer(vocab=tokenizer.get_vocab(with_added_tokens=True), merges=merges, add_bos_token=True)


SPECIAL = ["<unk>", "<s>", "</s>"]
LINES = ["Question: what is 2 + 2? Answer: 4", "def add(a, b):\n    return a + b\n", "    if x:\n        return\n"] * 3
TOKENIZERS = {"plain": byte_level(), "trimmed": byte_level(trim=True), "around": byte_level(around=True)}
FEW = st.text(st.sampled_from(" \naé日retun"), max_size=12)


def samples(*pairs):
    columns = ["task", "relation", "subject", "prompt", "response"]
    table = pd.DataFrame([("t", "t", str(i), *pair) for i, pair in enumerate(pairs)], columns=columns, dtype="str")
    table.insert(0, "text_id", pd.RangeIndex(len(pairs)).astype("int32"))
    return table


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=40)
@given(prompt=FEW.filter(str.strip), response=FEW)
@example("def f():\n  ", "  return")
@example("def f():\n", "    return")
@example("a ", "a")
@example("a", " ")
@example("日", "本")
def test_the_response_begins_with_the_first_token_that_holds_a_byte_of_it(tokenizer, prompt, response):
    whole = prompt + response
    ids = [i for i in tokenizer(whole)["input_ids"] if i != tokenizer.eos_token_id]
    # Every character of a byte-level token is one byte.
    sizes = [len(token) * (token not in SPECIAL) for token in tokenizer.convert_ids_to_tokens(ids)]
    assert sum(sizes) == len(whole.encode())
    first = sum(sum(sizes[: i + 1]) <= len(prompt.encode()) for i in range(len(ids)))
    # A usable sample beside it, since none at all would be refused.
    table, dropped = texts.tokenise(tokenizer, samples((prompt, response), ("a", " b")))
    assert len(table) + len(dropped) == 2
    if first:
        row = table.iloc[0]
        assert row["token_ids"] == ids[:first]
        assert row["target_ids"] == ids[first:]
        assert row["length"] == first
        assert row["target_id"] == [*ids, -1][first] == (row["target_ids"] or [-1])[0]
        assert row["generated"] == (response == "")
    else:
        assert dropped["reason"].tolist() == ["no token of the prompt stands before the response"]


def test_a_token_that_spans_the_border_belongs_to_the_response():
    for name in ("plain", "trimmed"):
        [row] = texts.tokenise(TOKENIZERS[name], samples(("what is ", "is")))[0].itertuples()
        assert TOKENIZERS[name].decode(row.token_ids) == "what is"
        assert TOKENIZERS[name].decode(row.target_ids) == " is"


@pytest.mark.parametrize("prefix", ["", " "])
def test_special_tokens_in_front_belong_to_the_prompt_and_those_behind_to_nothing(prefix):
    tokenizer = llama()
    prompts, dropped = texts.tokenise(
        tokenizer, samples(("what is 2 + 2?", f"{prefix}é 4"), ("", "4"), ("what is", ""))
    )
    assert not len(dropped)
    assert prompts["token_ids"].str[0].tolist() == [tokenizer.bos_token_id] * 3
    assert tokenizer.decode(prompts["token_ids"][0][1:]) == "what is 2 + 2?"
    assert tokenizer.decode(prompts["token_ids"][0][1:] + prompts["target_ids"][0]) == f"what is 2 + 2?{prefix}é 4"
    # The blank that the tokenizer puts before a text stands for none of its characters.
    assert tokenizer.decode(prompts["target_ids"][1]) == "4"
    assert prompts["target_ids"][2] == []
    around = texts.tokenise(TOKENIZERS["around"], samples(("what is", " 4")))[0]
    assert 2 not in around["token_ids"][0] + around["target_ids"][0]
    assert around["token_ids"][0][0] == 1


def test_a_response_is_cut_to_its_most_tokens_and_to_what_the_model_takes():
    tokenizer = TOKENIZERS["plain"]
    table = samples(("what is", " 2 + 2?"), ("what is", ""), (" 2" * 30, " 4"), ("", "4"))
    whole, _ = texts.tokenise(tokenizer, table)
    full, length = whole["target_ids"][0], int(whole["length"][0])
    assert len(full) > 3
    for tokens, longest, kept in ((2, 99, 2), (64, length + 3, 3), (2, length + 3, 2), (64, length + 1, 1)):
        prompts, dropped = texts.tokenise(tokenizer, table, tokens, longest)
        assert prompts["target_ids"][0] == full[:kept]
        assert prompts["token_ids"][0] == whole["token_ids"][0]
        assert dropped["prompt_id"].tolist() == ([2, 3] if longest < 31 else [3])
        full_prompt = f"the prompt leaves no room for a response among the {longest} tokens that the model takes"
        assert set(dropped["reason"]) - {"no token of the prompt stands before the response"} <= {full_prompt}
    with pytest.raises(FactsError) as caught:
        texts.tokenise(tokenizer, table, 64, length)
    assert caught.value.errors[0].startswith(
        "none of the 4 samples can be used, for 3 of them because the prompt leaves"
    )


def test_a_response_that_the_tokenizer_does_not_keep_is_dropped():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    table = samples(("a", "é"), ("a", "b"))
    prompts, dropped = texts.tokenise(PreTrainedTokenizerFast(tokenizer_object=tokenizer), table)
    assert dropped[["prompt_id", "reason"]].values.tolist() == [[0, "the response has no token of its own"]]
    assert prompts["prompt_id"].tolist() == [1]


def test_the_tables_can_be_written_and_read(tmp_path):
    prompts, dropped = texts.tokenise(TOKENIZERS["plain"], samples(("what is", " 4"), ("what", ""), ("", "4")))
    assert prompts[["prompt_id", "length", "target_id", "generated"]].dtypes.astype(str).tolist() == [
        "int32",
        "int16",
        "int32",
        "bool",
    ]
    assert list(dropped) == ["prompt_id", "task", "relation", "subject", "prompt", "response", "reason"]
    for kind, table in (("prompts", prompts), ("dropped", dropped), ("texts", samples(("a", "b")))):
        artifacts.write_table(table, tmp_path / kind, kind, {})
        back = artifacts.read_table(tmp_path / kind, kind)
        assert back.map(lambda x: list(x) if hasattr(x, "tolist") else x).to_dict() == table.to_dict()

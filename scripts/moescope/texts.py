"""Free-text tasks: prompts with their responses from any table, and their tokens.

A template is a text with columns in braces, "Question: {question} Answer:"; {{ and }} stand for braces. Nothing of
Python can be reached from it: a column may only be followed by keys of its lists and objects, {answers[text][0]}, and
by one of FORMS, {choices:lettered}. The text of a sample is its prompt and its response, exactly as their templates
give them: no space is added between the two, and none is taken away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moescope import facts, sources
from moescope.facts import FactsError, did_you_mean

FORMS = ("letter", "lettered")
LONGEST = 2**15 - 1  # positions and lengths are int16
NOT_BEFORE = "no token of the prompt stands before the response"
NO_ROOM = "the prompt leaves no room for a response among the {} tokens that the model takes"
EMPTY = "the response has no token of its own"


class Field(NamedTuple):
    """A text and the column that follows it ("": none), with its keys and its form ("": as it stands)."""

    before: str
    column: str = ""
    keys: tuple[str, ...] = ()
    form: str = ""


def check(path: Path | None, prompt: str, response: str = "", task: str = "") -> list[str]:
    """What is wrong with the templates of a text task and with its files, as sentences; empty if all is well.

    Looks at what `sources.check` looks at; without a path, as before a download, at the templates alone.
    """
    notes = sources.Notes(Counter(), [])
    columns: dict[str, list[str]] = {}
    for name, template in {"prompt": prompt, "response": response, "task": task}.items():
        with sources.noted(name, notes):
            columns[name] = [field.column for field in _fields(template) if field.column]
    if not notes.errors and not columns["prompt"] + columns["response"]:
        notes.errors.append(f"prompt: '{prompt}' names no column; write one in braces, such as {{question}}")
    if path is not None and not path.exists():
        notes.errors.append(f"{path}: no such file or folder; mend the path, or put the data set there")
    elif path is not None:
        for file, header in sources.headers(path, notes).items():
            for name, column in ((name, column) for name, wanted in columns.items() for column in wanted):
                if column not in header:
                    notes.errors.append(f"{file}: {name}: no column '{column}'{sources.hint(column, header)}")
    return list(dict.fromkeys(notes.errors))


def read(
    path: Path, *, name: str, prompt: str, response: str = "", task: str = "", samples: int = 0, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The samples of a text task from a table of any kind (sources, format table), and what was left out.

    `prompt`, `response` and `task` are templates. An empty `response` leaves it to the model to write one; an empty
    `task` is the task's `name`. A record is left out where it lacks a value that a template asks for, or where what a
    template gives is blank. Samples with the same prompt and response are merged, and keep the task of the first.
    `samples` of them are drawn at random from `seed` (0: all), in the order of the file; fewer are a part of more.

    Columns: text_id (int32, the place among all merged samples, whatever is drawn), task, relation (both the task),
    subject (the text_id; every sample is a subject of its own), prompt and response (str; "" if it is to be generated).

    Counts, where not 0: records, left_out_empty, duplicates_merged, not_drawn and rows.

    Raises FactsError with the sentences of `check`, else with one for each record that cannot be read (20 at most).
    """
    sources.refuse(check(path, prompt, response, task))
    templates = [_fields(template) for template in (prompt, response, task)]
    notes = sources.Notes(Counter(), [])
    found: dict[tuple[str, str], str] = {}
    for where, record in sources.records(path, notes):
        notes.counts["records"] += 1
        with sources.noted(where, notes):
            asked, answer, of = filled = [sources.writable(_filled(fields, record)) for fields in templates]
            if any(fields and not text.strip() for fields, text in zip(templates, filled, strict=True)):
                notes.counts["left_out_empty"] += 1
            elif (asked, answer) in found:
                notes.counts["duplicates_merged"] += 1
            else:
                found[asked, answer] = of.strip() or name
    if not found and not notes.errors:
        notes.errors.append(f"{path}: no record has all that the templates ask for; mend the templates or the records")
    sources.refuse(notes.errors)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(found))[: samples or None])
    table = pd.DataFrame([(of, of, *texts) for texts, of in found.items()], dtype="str").iloc[drawn]
    table = table.set_axis(["task", "relation", "prompt", "response"], axis=1).reset_index(drop=True)
    table.insert(0, "text_id", drawn.astype("int32"))
    table.insert(3, "subject", table["text_id"].astype("str"))
    return table, dict(notes.counts | Counter(rows=len(table), not_drawn=len(found) - len(table)))


def tokenise(
    tokenizer: Any, texts: pd.DataFrame, tokens: int = 64, longest: int = LONGEST
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokenise each prompt and its response as one text, and cut the response to `tokens` tokens.

    `texts` is the table of `read`; `tokenizer` is any fast transformers tokenizer, called as it comes (see
    `facts.tokenise`). The response begins with the first token that stands for a character of it, so that no token of
    the prompt gives any of the response away: one that spans the border is a token of the response. `longest` is the
    number of tokens that the model takes; a response is cut to what fits.

    Returns (prompts, dropped). prompts: `texts` with text_id as prompt_id, and the columns token_ids (list[int]) and
    length (int16) of the prompt, target_ids (list[int], the response; empty where it is to be generated), target_id
    (int32, the first; -1 where there is none) and generated (bool). dropped: the others, with the column `reason`.
    Raises FactsError if none is left.
    """
    texts = texts.rename(columns={"text_id": "prompt_id"}).reset_index(drop=True)
    longest = min(longest, LONGEST)
    rows, reasons = [], {}
    encoded = facts._encode(tokenizer, (texts["prompt"] + texts["response"]).tolist())
    samples = zip(texts["prompt"], texts["response"], encoded, strict=True)
    for number, (prompt, response, (text, ids, offsets)) in enumerate(samples):
        first = _first_token(tokenizer, text, ids, offsets, len(prompt))
        room, targets = min(tokens, longest - first), ids[first:]
        flaws = {NOT_BEFORE: not first, NO_ROOM.format(longest): room < 1, EMPTY: response and not targets}
        flaw = next((sentence for sentence, holds in flaws.items() if holds), "")
        if flaw:
            reasons[number] = flaw
        else:
            rows.append((ids[:first], first, targets[:room], targets[0] if targets else -1, not response))
    if not rows:
        why = Counter(reasons.values()).most_common(1)
        because = f", for {why[0][1]} of them because {why[0][0]}" if why else ""
        raise FactsError([f"none of the {len(texts)} samples can be used{because}; mend the templates"])
    names = ["token_ids", "length", "target_ids", "target_id", "generated"]
    found = pd.DataFrame(rows, columns=names).astype({"length": "int16", "target_id": "int32"})
    dropped = texts.loc[list(reasons)].assign(reason=pd.Series(reasons, dtype="str"))
    return texts.drop(list(reasons)).reset_index(drop=True).join(found), dropped.reset_index(drop=True)


def _first_token(tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], at: int) -> int:
    """The first token that stands for a character at or after `at`."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > at), len(ids))
    if first:
        # Offsets may leave out the blanks at the end of a token, unless it is all blank.
        start, end = offsets[first - 1]
        token = tokenizer.decode(ids[first - 1], clean_up_tokenization_spaces=False)
        blanks = len(token) - len(token.rstrip(" "))
        if token.strip(" ") and not text[start:end].endswith(" ") and end + blanks > at:
            return first - 1
    return first


def _fields(template: str) -> list[Field]:
    """The parts of a template. Raises FactsError for one that is not written as the module says."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise FactsError([f"'{template}': {str(error).lower()}; write {{{{ and }}}} for braces themselves"]) from error
    return [_field(*part) for part in parts]


def _field(before: str, name: str | None, form: str | None, conversion: str | None) -> Field:
    if name is None:
        return Field(before)
    match = re.fullmatch(r"([^.\[\]]+)((?:\[[^_\[\]][^\[\]]*\])*)", name)
    if match is None or conversion:
        written = name + (f"!{conversion}" if conversion else "")
        raise FactsError(
            [f"'{{{written}}}' is no column; write {{column}}, {{column[key]}}, or {{{{ and }}}} for braces"]
        )
    if form and form not in FORMS:
        raise FactsError([f"'{{{name}:{form}}}': '{form}' is not a known form{did_you_mean(form, FORMS)}"])
    return Field(before, match[1], tuple(re.findall(r"\[(.+?)\]", match[2])), form or "")


def _filled(fields: Sequence[Field], record: Mapping[str, Any]) -> str:
    """A template with the values of a record; "" if the record lacks one. Raises FactsError for one that is no text."""
    values = [_value(field, record) if field.column else "" for field in fields]
    if any(value is None or value != value for value in values):
        return ""
    return "".join(field.before + _written(field, value) for field, value in zip(fields, values, strict=True))


def _value(field: Field, record: Mapping[str, Any]) -> Any:
    value = record.get(field.column)
    for key in field.keys:
        entries = {str(i): item for i, item in enumerate(value)} if isinstance(value, list) else value
        value = entries.get(key) if isinstance(entries, dict) else None
    return value


def _written(field: Field, value: Any) -> str:
    where = f"column '{field.column}'"
    if field.form == "letter":
        if not re.fullmatch("[0-9]+", str(value)) or int(value) >= len(ascii_uppercase):
            raise FactsError([f"{where}: {value!r:.60} is no number from 0 to 25; mend it, or leave out ':letter'"])
        return ascii_uppercase[int(value)]
    if field.form == "lettered":
        if not isinstance(value, list) or len(value) > len(ascii_uppercase):
            raise FactsError([f"{where}: {value!r:.60} is no list of up to 26; mend it, or leave out ':lettered'"])
        return "\n".join(
            f"{letter}. {_plain(item, where)}" for letter, item in zip(ascii_uppercase, value, strict=False)
        )
    return _plain(value, where)


def _plain(value: Any, where: str) -> str:
    if value is None or isinstance(value, list | dict | bytes):
        raise FactsError([f"{where}: {value!r:.60} stands where text is needed; mend the record, or the template"])
    return str(value)

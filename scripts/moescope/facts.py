"""Relations, templates and prompts: from fact files to tokenised prompts with their targets.

A fact file holds one relation:

    task: geography
    templates: [The capital of {} is, ...]
    held_out_template: The name of the capital of {} is
    facts: {France: Paris, South Africa: [Pretoria, Cape Town]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from moescope.artifacts import digest

SLOT = "{}"
MIN_TRAINING_TEMPLATES = 3
KEYS = ("task", "templates", "held_out_template", "facts")
CHANGED = "the tokens of the prompt change when '{}' follows"
EMPTY = "the object '{}' has no token of its own"
UNKNOWN = "the tokenizer does not know how the object '{}' begins"
MISPLACED = "the subject '{}' does not stand where subject_at says"
MENDS = {
    CHANGED: "end the templates with a whole word and without a space",
    EMPTY: "write the objects in characters that the tokenizer keeps",
    UNKNOWN: "write the objects in a script that the model was trained on",
    MISPLACED: "mend subject_at in the data set, or set it to -1",
}


class FactsError(ValueError):
    """Everything that is wrong with a set of fact files, one sentence a line."""

    def __init__(self, errors: Sequence[str]):
        super().__init__("\n".join(errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class Fact:
    """A subject with its accepted objects, the most usual one first."""

    subject: str
    objects: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Relation:
    """One predicate: its templates (the held-out one last) and its facts."""

    name: str
    task: str
    templates: tuple[str, ...]
    facts: tuple[Fact, ...]
    path: Path


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' when a known word is close, else '; known: ...'."""
    known = list(known)
    close = get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def malformed(path: Path, error: Exception) -> str:
    """What YAML's own error says, as a sentence with file and line."""
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error)
    return f"{path}{line}: not valid YAML ({problem}); mend the line or the one before it"


def load_relations(paths: Sequence[Path], tasks: Sequence[str]) -> list[Relation]:
    """Read fact files, in the order of `paths`.

    Raises FactsError with every error of every file: malformed YAML, unknown keys or tasks,
    empty strings, templates without the slot or with text after it, duplicate subjects, and
    prompts that two files answer (differently: a contradiction; alike: a duplicate).
    """
    errors: list[str] = []
    relations = [relation for path in paths if (relation := _read_relation(path, tasks, errors))]
    errors += _conflicts(relations)
    if errors:
        raise FactsError(errors)
    return relations


def prompt_table(relations: Sequence[Relation]) -> pd.DataFrame:
    """All prompts of a data set, one row per fact and template.

    Columns: prompt_id, fact_id (int32), task, relation (str), template_id (int16, within the
    relation, the held-out template last), held_out (bool), subject (str), objects (list[str],
    the most usual first), prompt (str, ends right before the object), subject_at (int32, character of
    the prompt at which the subject starts; -1 where a data set of another source does not know it).
    """
    rows = [
        (
            relation.task,
            relation.name,
            fact_id,
            template_id,
            template_id == len(relation.templates) - 1,
            fact.subject,
            list(fact.objects),
            template.replace(SLOT, fact.subject),
            template.index(SLOT),
        )
        for fact_id, (relation, fact) in enumerate((r, f) for r in relations for f in r.facts)
        for template_id, template in enumerate(relation.templates)
    ]
    columns = ["task", "relation", "fact_id", "template_id", "held_out", "subject", "objects", "prompt", "subject_at"]
    types = {"fact_id": "int32", "template_id": "int16", "subject_at": "int32"}
    table = pd.DataFrame(rows, columns=columns).astype(types)
    table.insert(0, "prompt_id", pd.RangeIndex(len(table)).astype("int32"))
    return table


def select(dataset: pd.DataFrame, templates: str) -> pd.DataFrame:
    """The prompts of the `held_out` or `training` templates, or `all` of them."""
    wanted = {"held_out": [True], "training": [False], "all": [True, False]}[templates]
    return dataset[dataset["held_out"].isin(wanted)]


def n_prompts(relations: Sequence[Relation], templates: str) -> int:
    """How many prompts `select` finds, before any is dropped in tokenisation."""
    per_fact = {"held_out": lambda n: 1, "training": lambda n: n - 1, "all": lambda n: n}[templates]
    return sum(per_fact(len(relation.templates)) * len(relation.facts) for relation in relations)


def dataset_digest(table: pd.DataFrame) -> str:
    """Digest of the content of a prompt table: equal for equal facts and templates."""
    return digest(table.to_json(orient="split").encode())


def tokenise(tokenizer: Any, prompts: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokenise each prompt with each accepted object in place (method.md, section 1, target).

    `tokenizer` is any fast transformers tokenizer, called as it comes: the special tokens that it puts in
    front belong to the prompt, those that it puts behind are left out, and no chat template is applied.
    An object follows its prompt after one space. Where that space is a token of its own, it ends the prompt:
    a blank would be a useless target. Returns (tokens, dropped). tokens: `prompts` with the columns

    - token_ids (list[int]) and length (int16) of the prompt;
    - answer_ids (list[list[int]]): all tokens of each accepted object in the context of its prompt, in the
      order of `objects`; the first object decides which tokens are the prompt's, and another one that does
      not follow these very tokens is left out;
    - accepted_ids (list[int]): the distinct first tokens of answer_ids;
    - object_tokens (int16): tokens of the first object;
    - subject_start, subject_end (int16): the subject's tokens within token_ids, end exclusive; both -1 where
      subject_at is -1 or not given, or where the tokenizer drops the subject.

    dropped: the prompts that cannot be used with their first object, and the column `reason`, a sentence.
    Raises FactsError if the tokenizer knows no character offsets, or if no prompt is left.
    """
    if not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        sentence = f"{name}: this tokenizer does not tell which characters a token stands for"
        raise FactsError([f"{sentence}; use a checkpoint with a fast one (tokenizer.json)"])
    texts, objects = prompts["prompt"].tolist(), prompts["objects"].tolist()
    places = prompts["subject_at"].tolist() if "subject_at" in prompts else [-1] * len(prompts)
    with_object = [f"{text} {o}" for text, accepted in zip(texts, objects, strict=True) for o in accepted]
    followed = iter(_encode(tokenizer, with_object))
    unknown = tokenizer.unk_token_id
    rows: list[tuple[Any, ...]] = []
    dropped: list[tuple[int, str, str]] = []
    columns = zip(prompts["subject"], objects, places, _encode(tokenizer, texts), strict=True)
    for position, (subject, accepted, at, (text, ids, offsets)) in enumerate(columns):
        answers = [_split(len(ids), *whole) for whole in islice(followed, len(accepted))]
        before, answer = answers[0]
        flaw = _flaw(ids, before, answer, unknown)
        if flaw:
            dropped.append((position, flaw, accepted[0]))
        elif at >= 0 and not text.startswith(subject, at):
            dropped.append((position, MISPLACED, subject))
        else:
            same = [a for start, a in answers if start == before and a and a[0] != unknown]
            first = list(dict.fromkeys(a[0] for a in same))
            span = _token_span(tokenizer, ids, offsets, at, at + len(subject))
            rows.append((position, before, len(before), same, first, len(answer), *span))
    if not rows:
        raise FactsError([_none_left(Counter(kind for _, kind, _ in dropped))])
    names = ["token_ids", "length", "answer_ids", "accepted_ids", "object_tokens", "subject_start", "subject_end"]
    types = dict.fromkeys(("length", "object_tokens", "subject_start", "subject_end"), "int16")
    found = pd.DataFrame([row for _, *row in rows], columns=names).astype(types)
    reasons = pd.Series([kind.format(word) for _, kind, word in dropped], dtype="str", name="reason")
    tokens = prompts.iloc[[position for position, *_ in rows]].reset_index(drop=True).join(found)
    return tokens, prompts.iloc[[position for position, *_ in dropped]].reset_index(drop=True).join(reasons)


def steps(prompts: pd.DataFrame) -> pd.DataFrame:
    """Every answer token of every prompt as a prompt of its own, the earlier answer tokens given.

    `prompts` has the columns prompt_id, token_ids and target_ids (list[int], the answer tokens). Returns, in
    their order: prompt_id (int32), step (int16, from 0), token_ids (list[int], the prompt and the answer
    tokens before this one), length (int16) and target_id (int32).
    """
    rows = []
    for prompt_id, prompt, targets in prompts[["prompt_id", "token_ids", "target_ids"]].itertuples(index=False):
        given = [int(token) for token in prompt]
        for step, target in enumerate(targets):
            rows.append((prompt_id, step, list(given), len(given), target))
            given.append(int(target))
    types = {"prompt_id": "int32", "step": "int16", "length": "int16", "target_id": "int32"}
    return pd.DataFrame(rows, columns=["prompt_id", "step", "token_ids", "length", "target_id"]).astype(types)


def known(prompts: pd.DataFrame, rank: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The prompts whose target has at most this `rank` in the clean run, and the others with their `reason`.

    `prompts` has the column rank; a `rank` of 0 keeps all. Raises FactsError if none is kept.
    """
    keep = prompts["rank"] <= rank if rank else pd.Series(True, index=prompts.index)
    if not keep.any():
        best = f"the best of {len(prompts)} is {prompts['rank'].min()}" if len(prompts) else "there is no prompt"
        raise FactsError([f"no prompt has rank {rank} or better, {best}; allow a higher rank, or 0 for all prompts"])
    kept, unknown = prompts[keep].reset_index(drop=True), prompts[~keep].reset_index(drop=True)
    reasons = [f"rank {found} in the clean run, more than {rank}" for found in unknown["rank"]]
    return kept, unknown.assign(reason=pd.Series(reasons, dtype="str"))


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[str, list[int], list[tuple[int, int]]]]:
    """Each text with its token ids and their character offsets, without the special tokens behind it."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    found = []
    for text, ids, offsets, special in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
    ):
        end = next((i for i in range(len(ids), 0, -1) if not special[i - 1]), 0)
        found.append((text, ids[:end], offsets[:end]))
    return found


def _split(
    prompt_length: int, text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """The tokens before the object and its own: it begins at the first token after the prompt that is no blank."""
    # Offsets may leave out the blank of a token: a token that is only a blank then stands for no character.
    blanks = takewhile(lambda span: not text[slice(*span)].strip(), offsets[prompt_length:])
    first = prompt_length + len(list(blanks))
    return ids[:first], ids[first:]


def _flaw(prompt: list[int], before: list[int], answer: list[int], unknown: int | None) -> str:
    """Why an object cannot be used after its prompt; empty if it can."""
    if before[: len(prompt)] != prompt:
        return CHANGED
    if not answer:
        return EMPTY
    return UNKNOWN if answer[0] == unknown else ""


def _token_span(
    tokenizer: Any, ids: list[int], offsets: list[tuple[int, int]], start: int, end: int
) -> tuple[int, int]:
    """The tokens that share a character with text[start:end]; -1, -1 if there are none, or if start is -1."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start] if start >= 0 else []
    # A blank that the tokenizer puts before a text counts as a part of the text's first character.
    while len(inside) > 1 and not tokenizer.decode(ids[inside[0]]).strip():
        inside.pop(0)
    return (inside[0], inside[-1] + 1) if inside else (-1, -1)


def _none_left(kinds: Counter[str]) -> str:
    if not kinds:
        return "there is no prompt to tokenise; choose other templates or relations"
    kind, count = kinds.most_common(1)[0]
    why = kind.format("...")
    return f"none of the {kinds.total()} prompts can be used, for {count} of them because {why}; {MENDS[kind]}"


def _read_relation(path: Path, tasks: Sequence[str], errors: list[str]) -> Relation | None:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except OSError:
        errors.append(f"{path}: no such fact file; create it or take its name out of the config")
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        errors.append(malformed(path, error))
        return None
    if not isinstance(root, yaml.MappingNode):
        errors.append(f"{path}: not a mapping; a fact file needs the keys {', '.join(KEYS)}")
        return None

    found = len(errors)
    fields = {_text(key): (value, key.start_mark.line + 1) for key, value in root.value}
    for key, (_, line) in fields.items():
        if key not in KEYS:
            errors.append(f"{path}:{line}: {key}: not a known key{did_you_mean(key, KEYS)}")
    for key in KEYS:
        if key not in fields:
            errors.append(f"{path}: the key '{key}' is missing")
    task = _text(fields["task"][0]) if "task" in fields else ""
    if "task" in fields and task not in tasks:
        line = fields["task"][1]
        errors.append(f"{path}:{line}: task: '{task}' is not a known task{did_you_mean(task, tasks)}")
    templates = _read_templates(path, fields, errors)
    facts = _read_facts(path, fields["facts"][0], errors) if "facts" in fields else ()
    if len(errors) > found:
        return None
    return Relation(path.stem, task, templates, facts, path)


def _read_templates(path: Path, fields: dict, errors: list[str]) -> tuple[str, ...]:
    nodes: list[yaml.Node] = []
    for key in ("templates", "held_out_template"):
        if key in fields:
            node = fields[key][0]
            nodes += node.value if isinstance(node, yaml.SequenceNode) else [node]
    templates = [(_text(node), node.start_mark.line + 1) for node in nodes]
    seen: set[str] = set()
    for template, line in templates:
        if template.count(SLOT) != 1:
            errors.append(f"{path}:{line}: template '{template}' needs the slot {SLOT} exactly once")
        elif set("{}[]") & set(template.replace(SLOT, "")):
            errors.append(
                f"{path}:{line}: template '{template}' has a second placeholder; the object follows by itself,"
                " so end it with the word before the object"
            )
        elif template != template.strip() or template[-1] in ".?!,;:":
            errors.append(
                f"{path}:{line}: template '{template}' has text after the place of the object;"
                " end it with the word before the object"
            )
        if template in seen:
            errors.append(f"{path}:{line}: template '{template}' stands twice; remove one")
        seen.add(template)
    if "templates" in fields and "held_out_template" in fields and len(templates) <= MIN_TRAINING_TEMPLATES:
        errors.append(
            f"{path}:{fields['templates'][1]}: templates: {len(templates) - 1} given;"
            f" at least {MIN_TRAINING_TEMPLATES} are needed beside the held-out one"
        )
    return tuple(template for template, _ in templates)


def _read_facts(path: Path, node: yaml.Node, errors: list[str]) -> tuple[Fact, ...]:
    if not isinstance(node, yaml.MappingNode) or not node.value:
        errors.append(f"{path}:{node.start_mark.line + 1}: facts: give a mapping of subject: object")
        return ()
    facts: list[Fact] = []
    first_line: dict[str, int] = {}
    for key, value in node.value:
        subject, line = _text(key), key.start_mark.line + 1
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        objects = tuple(_text(item) for item in nodes)
        if not subject.strip() or not objects or not all(o.strip() for o in objects):
            errors.append(f"{path}:{line}: fact '{subject}': empty subject or object; fill it in or remove the line")
        elif subject != subject.strip() or any(o != o.strip() for o in objects):
            errors.append(f"{path}:{line}: fact '{subject}': spaces around a subject or object; remove them")
        elif len(set(objects)) < len(objects):
            errors.append(f"{path}:{line}: fact '{subject}': an accepted object stands twice; remove one")
        if subject.casefold() in first_line:
            errors.append(
                f"{path}:{line}: duplicate fact '{subject}', first given on line"
                f" {first_line[subject.casefold()]}; merge the two"
            )
        first_line.setdefault(subject.casefold(), line)
        facts.append(Fact(subject, objects, line))
    return tuple(facts)


def _conflicts(relations: Sequence[Relation]) -> list[str]:
    """Prompts that two files answer, one sentence a fact."""
    errors = []
    owners: dict[str, tuple[Relation, Fact]] = {}
    for relation in relations:
        for fact in relation.facts:
            prompts = [template.replace(SLOT, fact.subject) for template in relation.templates]
            prompt = next((p for p in prompts if owners.get(p, (relation,))[0] is not relation), None)
            owners.update({p: (relation, fact) for p in prompts if p not in owners})
            if prompt is None:
                continue
            other, known = owners[prompt]
            here, there = f"{relation.path}:{fact.line}", f"{other.path}:{known.line}"
            if set(fact.objects) & set(known.objects):
                errors.append(f"{here}: duplicate fact: '{prompt}' stands in {there} too; remove one")
            else:
                errors.append(
                    f"{here}: '{prompt}' -> '{fact.objects[0]}' contradicts {there}"
                    f" ('{known.objects[0]}'); mend one, or list both as accepted objects of one fact"
                )
    return errors


def _text(node: yaml.Node) -> str:
    """A scalar as it is written; null (an empty value) as the empty string."""
    if not isinstance(node, yaml.ScalarNode):
        return ""
    return "" if node.tag == "tag:yaml.org,2002:null" and node.value in ("", "~", "null") else node.value

"""Relations, templates and prompts: from fact files to tokenised prompts with their targets.

A fact file holds one relation:

    task: geography
    templates: [The capital of {} is, ...]
    held_out_template: The name of the capital of {} is
    facts: {France: Paris, South Africa: [Pretoria, Cape Town]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from moescope.artifacts import digest

SLOT = "{}"
MIN_TRAINING_TEMPLATES = 3
KEYS = ("task", "templates", "held_out_template", "facts")


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

    Columns: prompt_id, fact_id (int32), task, relation (str), template_id (int8, within the
    relation, the held-out template last), held_out (bool), subject (str), objects (list[str],
    the most usual first), prompt (str, ends right before the object).
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
        )
        for fact_id, (relation, fact) in enumerate((r, f) for r in relations for f in r.facts)
        for template_id, template in enumerate(relation.templates)
    ]
    columns = ["task", "relation", "fact_id", "template_id", "held_out", "subject", "objects", "prompt"]
    table = pd.DataFrame(rows, columns=columns).astype({"fact_id": "int32", "template_id": "int8"})
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


def tokenise(tokenizer: Callable[..., Any], prompts: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokenise each prompt with each accepted object in place (method.md, section 1, target).

    `tokenizer` is a fast transformers tokenizer. Returns (tokens, dropped): `prompts` with the columns
    token_ids (list[int]), length (int16), accepted_ids (list[int]: the first token of each accepted
    object in the context of its prompt), object_tokens (int16: tokens of the first object),
    subject_start and subject_end (int16: the subject's span in token_ids, end exclusive); and the
    prompts that cannot be used, with the column `reason`.
    """
    texts = prompts["prompt"].tolist()
    encoded = tokenizer(texts, return_offsets_mapping=True)
    rows, dropped = [], []
    for position, (row, text) in enumerate(zip(prompts.itertuples(index=False), texts, strict=True)):
        ids = encoded["input_ids"][position]
        answers = [tokenizer(f"{text} {answer}")["input_ids"] for answer in row.objects]
        bad = next((o for o, a in zip(row.objects, answers, strict=True) if a[: len(ids)] != ids), None)
        empty = next((o for o, a in zip(row.objects, answers, strict=True) if len(a) <= len(ids)), None)
        span = _token_span(encoded["offset_mapping"][position], text, row.subject)
        if bad is not None:
            dropped.append((position, f"the tokens of the prompt change when '{bad}' follows"))
        elif empty is not None:
            dropped.append((position, f"the object '{empty}' has no token of its own"))
        else:
            accepted = list(dict.fromkeys(a[len(ids)] for a in answers))
            rows.append((position, ids, len(ids), accepted, len(answers[0]) - len(ids), *span))
    names = ["position", "token_ids", "length", "accepted_ids", "object_tokens", "subject_start", "subject_end"]
    found = pd.DataFrame(rows, columns=names)
    tokens = prompts.iloc[found.pop("position")].reset_index(drop=True).join(found)
    tokens = tokens.astype(dict.fromkeys(("length", "object_tokens", "subject_start", "subject_end"), "int16"))
    lost = pd.DataFrame(dropped, columns=["position", "reason"])
    return tokens, prompts.iloc[lost.pop("position")].reset_index(drop=True).join(lost)


def _token_span(offsets: Sequence[tuple[int, int]], text: str, subject: str) -> tuple[int, int]:
    start = text.index(subject)
    end = start + len(subject)
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    return inside[0], inside[-1] + 1


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

"""Facts from public data sets: LRE, CounterFact, ParaRel, PopQA, and any table with mapped columns.

Every format is first brought to the same few words (WORDS); cleaning, merging and numbering then follow once for all.

    lre          Hernandez et al. 2024, evandez/relations: one JSON file a relation
    counterfact  Meng et al. 2022: counterfact.json, or the form of counterfact-tracing
    pararel      Elazar et al. 2021, yanaiela/pararel: graphs_json/P*.jsonl and trex_lms_vocab/P*.jsonl
    popqa        Mallen et al. 2023, akariasai/PopQA: test.tsv
    table        CSV, TSV, JSON (a list of objects), JSONL or Parquet, with columns of any name
"""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moescope.facts import SLOT, FactsError, did_you_mean

FORMATS = ("lre", "counterfact", "pararel", "popqa", "table")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
WORDS = ("subject", "object", "prompt", "template", "relation", "task", "aliases")
PARAREL = ("graphs_json", "trex_lms_vocab")
POPQA = {"subject": "subj", "object": "obj", "relation": "prop", "prompt": "question", "aliases": "possible_answers"}
TRACING = {"subject": "subject", "object": "target_true", "prompt": "prompt"}
LOOKED_AT = 1000
MOST_ERRORS = 20
ESCAPE = re.compile(r"\\+u([0-9a-fA-F]{4})")

# The relations and tasks of Li et al. 2025 (ACL), and the relations of Wang et al. 2026 (Gated-LPI).
KA_TASKS = {
    "name_birthplace": "entity",
    "country_capital_city": "geography",
    "country_language": "geography",
    "fruit_inside_color": "object_attributes",
    "object_superclass": "object_attributes",
}
ALSO_GATED_LPI = (
    *("name_religion", "occupation_age", "occupation_gender", "work_location"),
    *("adj_antonym", "word_first_letter", "word_last_letter"),
)
PRESETS: Mapping[str, tuple[str, ...]] = {"ka": tuple(KA_TASKS), "gated_lpi": (*KA_TASKS, *ALSO_GATED_LPI)}

Raw = Iterator[tuple[str, dict[str, Any]]]  # each record with its place: file and line, or file and number


class Record(NamedTuple):
    """A fact as a source gives it: its objects, and each prompt with the place of the subject in it (or -1)."""

    task: str
    relation: str
    subject: str
    objects: tuple[str, ...]
    prompts: tuple[tuple[str, int], ...]


class Notes(NamedTuple):
    """What was mended (counts), and what could not be (sentences)."""

    counts: Counter[str]
    errors: list[str]


def read(
    format: str, path: Path, *, name: str, relations: Sequence[str] = (), columns: Mapping[str, str] = {}
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The prompts of a public data set, and what was mended on the way.

    `name` is the data set's name; it stands in for a task or a relation that the source does not give.
    `relations` picks relations and sets their order. `columns` maps WORDS to columns (format table only).

    lre: `path` is a folder with <relation>.json anywhere in it, or one such file; its prompt_templates, not
    their zero-shot forms. counterfact: the rewrite prompt alone; paraphrase, neighbourhood, attribute and
    generation prompts and the counterfactual targets are left out. pararel: only patterns that end with the
    object, of relations with both patterns and facts. popqa: the prompt is "Q: {question} A:", because a
    question alone does not lead to its answer; the first object is `obj`, and possible_answers are accepted
    too. table: needs `subject`, `object` and one of `prompt` (the full text) and `template` (with {}); a list
    of objects, or `aliases` (a list, or a JSON string of one), are several accepted objects. For counterfact,
    popqa and table a folder may hold several files of one kind, which are read in the order of their names.

    Columns: those of `facts.prompt_table` (held_out is False everywhere; template_id is int32 if int16 is too small),
    and subject_at (int32: characters before the subject in the prompt; -1 where the prompt does not hold it).
    One row is one fact (relation, subject) in one template; several objects of it become accepted objects.

    Counts, where not 0: records read, of the relations asked for, and rows returned; exact_duplicates,
    objects_merged and rows_left_out_empty (records); escapes_decoded, spaces_stripped and json_strings_parsed
    (strings); templates_left_out and relations_left_out (of pararel: with text after the object; without any
    template); prompts_shared_by_relations (prompts).

    Raises FactsError with the sentences of `check`, else with one for each record that cannot be read (20 at most).
    """
    refuse(check(format, path, relations=relations, columns=columns))
    notes = Notes(Counter(), [])
    records: list[Record] = []
    known: dict[str, None] = {}
    for where, raw in _raw_records(format, path, relations, notes):
        with noted(where, notes):
            fields = _in_our_words(format, raw, columns)
            relation = _clean(fields.get("relation", name), Counter())
            known[relation] = None
            if relations and relation not in relations:
                continue
            notes.counts["records"] += 1
            record = _record(fields, name, notes.counts)
            if record:
                records.append(record)
            else:
                notes.counts["rows_left_out_empty"] += 1
    if known and format not in ("lre", "pararel"):
        notes.errors.extend(_unknown(path, relations, known))
    tasks = Counter(relation for relation, _ in {(record.relation, record.task) for record in records})
    for relation in (relation for relation in known if tasks[relation] > 1):
        notes.errors.append(f"{path}: relation '{relation}' stands in {tasks[relation]} tasks; give each relation one")
    if not notes.errors and not records:
        notes.errors.append(f"{path}: no fact in it has a subject, an object and a prompt; give a data set with facts")
    refuse(notes.errors)
    table = _table(records, list(dict.fromkeys(relations)) or list(known), notes.counts)
    return table, {key: count for key, count in notes.counts.items() if count}


def check(format: str, path: Path, *, relations: Sequence[str] = (), columns: Mapping[str, str] = {}) -> list[str]:
    """What is wrong with a data set as far as can be seen cheaply, as sentences; empty if all is well.

    Looks at the files and their relations' names, and at the header of CSV, TSV and Parquet or the first 1000
    records of JSONL; a JSON table is read whole.
    """
    if format not in FORMATS:
        return [f"format: '{format}' is not a known format{did_you_mean(format, FORMATS)}"]
    notes = Notes(Counter(), [])
    if format == "table":
        notes.errors.extend(_mapping_errors(path, columns))
    elif columns:
        notes.errors.append(f"{path}: columns: only the format table has them; remove them, or take that format")
    if not path.exists():
        notes.errors.append(f"{path}: no such file or folder; mend the path, or put the data set there")
    elif format in ("lre", "pararel"):
        files = _relation_files(format, path, notes)
        notes.errors.extend(_unknown(path, relations, files) if files else [])
    else:
        for file, header in headers(path, notes).items():
            notes.errors.extend(_header_errors(format, file, header, columns))
    return notes.errors


def headers(path: Path, notes: Notes) -> dict[Path, list[str]]:
    """The names of the columns of a table file, or of each file of a folder of them, looked at as in `check`.

    What cannot be read, or holds no record, is left out and noted.
    """
    found: dict[Path, list[str]] = {}
    for file in _table_files(path, notes):
        errors = len(notes.errors)
        header = _header(file, notes)
        if header:
            found[file] = header
        elif len(notes.errors) == errors:
            notes.errors.append(f"{file}: holds no record; give a file with facts or texts")
    return found


def records(path: Path, notes: Notes) -> Raw:
    """The records of a table file, or of a folder of such files of one kind, in the order of their names."""
    for file in _table_files(path, notes):
        yield from _rows(file, notes)


def fetch(repo: str, revision: str, files: str, folder: Path) -> str:
    """Put the files of a Hugging Face data set repository that match the glob `files` into `folder`.

    Returns the commit hash that `revision` (a branch, tag or commit) stands for. What huggingface_hub's local
    cache holds is not downloaded again, and with HF_HUB_OFFLINE=1 nothing is. As in huggingface_hub, `*` also
    matches across folders. Raises FactsError with one sentence.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    try:
        snapshot = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=files))
        held = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
        wanted = list(filter_repo_objects(held, allow_patterns=files))
        for file in wanted:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / file, folder / file)
    except (OSError, ValueError, RuntimeError, hub.HTTPError) as error:
        raise FactsError([f"{repo}: {_trouble(error, revision)}"]) from error
    if not wanted:
        raise FactsError([f"{repo}: no file of revision '{revision}' matches '{files}'; mend the pattern"])
    return snapshot.name


def _trouble(error: Exception, revision: str) -> str:
    """Why a download failed, and the mend."""
    from huggingface_hub import errors as hub

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space, or set HF_HOME to a folder on a larger one"
    sentences = {
        hub.GatedRepoError: "the data set is gated; accept its terms on its page and log in with 'hf auth login'",
        hub.RepositoryNotFoundError: "no such data set, or a private one; mend its name or log in with 'hf auth login'",
        hub.RevisionNotFoundError: f"no revision '{revision}'; give a branch, a tag or a commit hash",
        hub.LocalEntryNotFoundError: f"revision '{revision}' is not whole in the local cache, and the Hub cannot be"
        " reached or HF_HUB_OFFLINE is set; fetch it once with a network, or copy the cache of a machine that has it",
        hub.HFValidationError: "not the name of a data set; give 'owner/name'",
    }
    failed = f"the download failed ({_first_line(error)}); mend that, or try again later"
    return next((sentence for kind, sentence in sentences.items() if isinstance(error, kind)), failed)


# From files to records in our words


def _raw_records(format: str, path: Path, relations: Sequence[str], notes: Notes) -> Raw:
    if format in ("lre", "pararel"):
        files = _relation_files(format, path, notes)
        reader = _lre if format == "lre" else _pararel
        for relation in dict.fromkeys(relations or files):
            yield from reader(relation, files[relation], notes)
    else:
        yield from records(path, notes)


def _lre(relation: str, files: Sequence[Path], notes: Notes) -> Raw:
    [file] = files
    with noted(file, notes):
        data = json.loads(file.read_text(encoding="utf-8-sig"))
        keys = ("prompt_templates", "samples")
        if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
            raise FactsError(["not a relation of LRE; it needs the lists 'prompt_templates' and 'samples'"])
        templates = []
        for template in data["prompt_templates"]:
            with noted(file, notes):
                templates.append(_halves(_clean(template, notes.counts)))
        properties = data.get("properties")
        kind = properties.get("relation_type") if isinstance(properties, dict) else None
        fixed = {"relation": relation, "task": KA_TASKS.get(relation, kind), "templates": templates}
        for where, sample in _numbered(f"{file}: sample", data["samples"], notes):
            yield where, {"subject": sample.get("subject"), "object": sample.get("object"), **fixed}


def _pararel(relation: str, files: Sequence[Path], notes: Notes) -> Raw:
    patterns, facts = files
    templates = []
    for where, raw in _rows(patterns, notes):
        with noted(where, notes):
            pattern = _clean(raw.get("pattern"), notes.counts).removesuffix(".").rstrip()
            before, slot, after = pattern.removesuffix(" [Y]").partition("[X]")
            if slot and pattern.endswith(" [Y]") and not re.search(r"\[[XY]\]", before + after):
                templates.append((before.lstrip(), after.rstrip()))
            else:
                notes.counts["templates_left_out"] += 1
    notes.counts["relations_left_out"] += not templates
    for where, raw in _rows(facts, notes) if templates else ():
        fields = {"subject": raw.get("sub_label"), "object": raw.get("obj_label")}
        yield where, {**fields, "relation": relation, "templates": templates}


def _in_our_words(format: str, raw: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The fields of a record under WORDS, and: templates (in halves), prefix (text before the subject), frame."""
    if format in ("lre", "pararel"):
        return raw
    if format == "counterfact" and "requested_rewrite" in raw:
        try:
            asked = raw["requested_rewrite"]
            fields = {"subject": asked["subject"], "object": asked["target_true"]["str"], "template": asked["prompt"]}
            return fields | {"relation": asked["relation_id"]}
        except (KeyError, TypeError) as error:
            needed = "requested_rewrite needs prompt, subject, relation_id and target_true.str; mend the record"
            raise FactsError([needed]) from error
    mapping = {"counterfact": TRACING, "popqa": POPQA, "table": columns}[format]
    fields = {word: raw.get(column) for word, column in mapping.items()}
    if format == "counterfact":
        relation = raw["relation_id"] if "relation_id" in raw else raw.get("relation")
        return fields | {"relation": relation, "prefix": raw.get("relation_prefix")}
    return fields | ({"frame": ("Q: ", " A:")} if format == "popqa" else {})


def _relation_files(format: str, path: Path, notes: Notes) -> dict[str, tuple[Path, ...]]:
    """Of each relation its file (LRE), or its patterns and its facts (ParaRel), sorted by name."""
    files: dict[str, tuple[Path, ...]]
    if format == "lre":
        found = [path] if path.is_file() else _visible(path, (".json",))
        files = {stem: (file,) for stem, file in _stems(found, notes).items()}
        missing = "no relation (*.json) in it; name the folder of LRE's relations"
    else:
        patterns, facts = (_stems(sorted(path.rglob(f"{folder}/P*.jsonl")), notes) for folder in PARAREL)
        files = {stem: (patterns[stem], facts[stem]) for stem in patterns if stem in facts}
        missing = "no relation has both graphs_json/P*.jsonl and trex_lms_vocab/P*.jsonl in it; name ParaRel's folder"
    if not files:
        notes.errors.append(f"{path}: {missing}")
    return dict(sorted(files.items()))


def _stems(files: Sequence[Path], notes: Notes) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            notes.errors.append(f"{file}: '{file.stem}' also stands in {found[file.stem]}; name the folder of one")
        found.setdefault(file.stem, file)
    return found


def _table_files(path: Path, notes: Notes) -> list[Path]:
    files = [path] if path.is_file() else _visible(path, SUFFIXES)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) == 1 and kinds[0] in SUFFIXES:
        return files
    found = f"holds files of several kinds ({', '.join(kinds)})" if len(kinds) > 1 else "no file of a known kind"
    notes.errors.append(f"{path}: {found}; give one of {', '.join(SUFFIXES)}, or a folder with files of one kind")
    return []


def _visible(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files anywhere in a folder but in hidden ones, such as the caches of git and huggingface_hub."""
    found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _rows(file: Path, notes: Notes) -> Raw:
    """The records of a CSV, TSV, JSON, JSONL or Parquet file."""
    with noted(file, notes):
        suffix = file.suffix.lower()
        if suffix == ".json":
            records = json.loads(file.read_text(encoding="utf-8-sig"))
            if not isinstance(records, list):
                raise FactsError(["not a list of records; give a JSON list of objects"])
            yield from _numbered(f"{file}: record", records, notes)
        elif suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
                yield from _numbered(f"{file}: row", rows, notes)
        else:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                yield from (_lines if suffix == ".jsonl" else _separated)(file, stream, notes)


def _numbered(what: str, records: Iterable[Any], notes: Notes) -> Raw:
    for number, record in enumerate(records, 1):
        if isinstance(record, dict):
            yield f"{what} {number}", record
        else:
            notes.errors.append(f"{what} {number}: not a JSON object; mend or remove it")


def _lines(file: Path, stream: TextIO, notes: Notes) -> Raw:
    for number, line in enumerate(stream, 1):
        with noted(f"{file}:{number}", notes):
            record = json.loads(line) if line.strip() else {}
            if not isinstance(record, dict):
                raise FactsError(["not a JSON object; mend or remove the line"])
            if record:
                yield f"{file}:{number}", record


def _separated(file: Path, stream: TextIO, notes: Notes) -> Raw:
    # strict: a stray quote is an error; else it would swallow the rows after it.
    reader = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header: list[str] = next(reader, [])
        for row in reader:
            if len(row) == len(header):
                yield f"{file}:{reader.line_num}", dict(zip(header, row, strict=True))
            elif row:
                sizes = f"{len(row)} fields where the header has {len(header)}"
                notes.errors.append(f"{file}:{reader.line_num}: {sizes}; quote a field that holds the separator")
    except csv.Error as error:
        notes.errors.append(f"{file}:{reader.line_num}: {error}; double the quotes inside a quoted field")


def _header(file: Path, notes: Notes) -> list[str]:
    """The names of a file's columns; empty if it has no record."""
    with noted(file, notes):
        if file.suffix.lower() == ".parquet":
            return pq.read_schema(file).names
    # Records of JSONL may leave out keys, so one record does not tell them all.
    most = {".json": None, ".jsonl": LOOKED_AT}.get(file.suffix.lower(), 1)
    rows = islice(_rows(file, notes), most)
    return list(dict.fromkeys(key for _, row in rows for key in row))


def _header_errors(format: str, file: Path, header: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    needed = [(f"columns.{word}", column) for word, column in columns.items() if word in WORDS]
    if format == "popqa":
        needed = [("format popqa", column) for column in POPQA.values()]
    elif format == "counterfact" and "requested_rewrite" not in header:
        relation = "relation" if "relation" in header else "relation_id"
        needed = [("format counterfact", column) for column in (*TRACING.values(), relation)]
    missing = [(where, column) for where, column in needed if column not in header]
    return [f"{file}: {where}: no column '{column}'{hint(column, header)}" for where, column in missing]


def _mapping_errors(path: Path, columns: Mapping[str, str]) -> Iterator[str]:
    for word in columns:
        if word not in WORDS:
            yield f"{path}: columns.{word}: not a known key{did_you_mean(word, WORDS)}"
    for word in ("subject", "object"):
        if word not in columns:
            yield f"{path}: columns.{word}: missing; name the column that holds it"
    if ("prompt" in columns) == ("template" in columns):
        yield f"{path}: columns: give one of prompt (its full text) and template (with {SLOT} for the subject)"


def _unknown(path: Path, relations: Sequence[str], known: Iterable[str]) -> list[str]:
    names = list(known)
    missing = [relation for relation in dict.fromkeys(relations) if relation not in names]
    return [f"{path}: relations: no relation '{relation}'{hint(relation, names)}" for relation in missing]


def hint(word: str, known: Sequence[str]) -> str:
    """As `did_you_mean`, but never with a list of thousands."""
    return did_you_mean(word, get_close_matches(word, known, n=1) or known[:20])


# From records to the table


def _record(fields: Mapping[str, Any], name: str, counts: Counter[str]) -> Record | None:
    """A record, cleaned; None if it lacks a subject, an object or a prompt."""
    relation = _clean(fields.get("relation", name), counts)
    subject = _clean(fields.get("subject"), counts)
    objects = [_clean(item, counts) for item in _listed(fields.get("object"))]
    aliases = [_clean(item, counts) for item in _listed(_parsed(fields.get("aliases"), counts))]
    text = _clean(fields.get("template") or fields.get("prompt"), counts)
    if not relation or not subject or not any(objects) or not (text or fields.get("templates")):
        return None
    if "prompt" in fields:
        before, after = fields.get("frame", ("", ""))
        prefix = _clean(fields.get("prefix"), Counter()) or before
        prompts = [(before + text + after, _place(before + text, subject, len(prefix)))]
    else:
        halves = fields["templates"] if "templates" in fields else [_halves(text)]
        prompts = [(before + subject + after, len(before)) for before, after in halves]
    accepted = dict.fromkeys(item for item in [*objects, *aliases] if item)
    task = _clean(fields.get("task"), counts) or name
    return Record(task, relation, subject, tuple(accepted), tuple(dict.fromkeys(prompts)))


def _table(records: Sequence[Record], order: Sequence[str], counts: Counter[str]) -> pd.DataFrame:
    """The prompt table: relations as in `order`, facts and templates as in the records."""
    unique = dict.fromkeys(records)
    distinct = {(record.relation, record.subject, record.prompts) for record in unique}
    counts["exact_duplicates"], counts["objects_merged"] = len(records) - len(unique), len(unique) - len(distinct)
    rows: dict[tuple[str, str, str, int], tuple[str, dict[str, None]]] = {}
    for record in unique:
        for prompt, at in record.prompts:
            _, objects = rows.setdefault((record.relation, record.subject, prompt, at), (record.task, {}))
            objects.update(dict.fromkeys(record.objects))
    facts: dict[tuple[str, str], int] = {}
    templates: dict[str, dict[tuple[str, ...], int]] = {relation: {} for relation in order}
    cells = []
    for (relation, subject, prompt, at), (task, objects) in rows.items():
        fact = facts.setdefault((relation, subject), len(facts))
        # A prompt that does not hold its subject is a template of its own.
        shape = (prompt[:at], prompt[at + len(subject) :]) if at >= 0 else (prompt,)
        template = templates[relation].setdefault(shape, len(templates[relation]))
        cells.append((task, relation, fact, template, False, subject, list(objects), prompt, at))
    rank = {relation: position for position, relation in enumerate(order)}
    cells.sort(key=lambda cell: (rank[cell[1]], cell[2], cell[3]))
    names = ["task", "relation", "fact_id", "template_id", "held_out", "subject", "objects", "prompt", "subject_at"]
    # Prompts written out in full can be that many templates.
    wide = "int32" if max(map(len, templates.values()), default=0) > 2**15 else "int16"
    table = pd.DataFrame(cells, columns=names).astype({"template_id": wide, "subject_at": "int32"})
    table["fact_id"] = pd.factorize(table["fact_id"])[0].astype("int32")
    table.insert(0, "prompt_id", pd.RangeIndex(len(table)).astype("int32"))
    shared = table.groupby("prompt")["relation"].nunique() > 1
    counts["rows"], counts["prompts_shared_by_relations"] = len(table), int(shared.sum())
    return table


def _halves(template: str) -> tuple[str, str]:
    """What stands before and after the slot of the subject."""
    if template.count(SLOT) != 1:
        raise FactsError([f"template '{template}' needs the slot {SLOT} exactly once; mend or remove it"])
    before, _, after = template.partition(SLOT)
    return before, after


def _place(text: str, subject: str, start: int) -> int:
    """Where the subject stands at or after `start`, not inside a longer word if it can be; -1 if nowhere."""
    at = first = text.find(subject, start)
    while at >= 0 and (text[:at][-1:].isalnum() or text[at + len(subject) :][:1].isalnum()):
        at = text.find(subject, at + 1)
    return at if at >= 0 else first


def _clean(value: Any, counts: Counter[str]) -> str:
    r"""A cell as text, without literal \uXXXX escapes and without spaces around it; a missing one is empty."""
    if isinstance(value, list | dict | bytes):
        raise FactsError([f"{value!r:.60} stands where text is needed; mend the record, or map another column"])
    if value is None or value != value:
        return ""
    # A column of whole numbers with a gap often comes as floats; 1969.0 is meant as 1969.
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    decoded = _decoded(text)
    counts["escapes_decoded"] += decoded != text
    counts["spaces_stripped"] += decoded.strip() != decoded
    return decoded.strip()


def _decoded(text: str) -> str:
    """Literal escapes as characters, also when escaped twice."""
    while ESCAPE.search(text):
        text = ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    return writable(text)


def writable(text: str) -> str:
    """A text with half a surrogate pair, which is no text and which no file can hold, as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parsed(value: Any, counts: Counter[str]) -> Any:
    """What a string of JSON holds; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise FactsError([f'{value:.60} is not valid JSON; write a list as ["a", "b"]']) from error
    counts["json_strings_parsed"] += 1
    return parsed


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextmanager
def noted(where: Path | str, notes: Notes) -> Iterator[None]:
    """What goes wrong inside becomes sentences of `notes`; `where` is a whole file, or a record in one."""
    try:
        yield
    except FactsError as error:
        notes.errors.extend(f"{where}: {sentence}" for sentence in error.errors)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if isinstance(where, Path) else ""
        notes.errors.append(f"{where}{line}: not valid JSON ({error.msg}); mend the line, or fetch the file again")
    except UnicodeDecodeError:
        notes.errors.append(f"{where}: not UTF-8 text; save it as UTF-8")
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        notes.errors.append(f"{where}: cannot be read ({_first_line(error)}); mend the file, or fetch it again")


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".")


def refuse(errors: Sequence[str]) -> None:
    errors = list(dict.fromkeys(errors))
    if errors:
        more = [f"and {len(errors) - MOST_ERRORS} more"] if len(errors) > MOST_ERRORS else []
        raise FactsError([*errors[:MOST_ERRORS], *more])

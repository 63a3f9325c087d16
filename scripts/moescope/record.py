"""The record of a run (results/provenance.json): what made its tables, and a configuration that makes them again."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from moescope.artifacts import digest, file_digest, names, read_json, table_provenance, versions

KIND = "provenance"
# Statements as the formatter leaves them: one a line, or several lines in brackets.
IMPORT = re.compile(r"^[ \t]*(?:from[ ]+([\w.]+)[ ]+)?import[ ]+(\([^)]*\)|.*)", re.MULTILINE)


def of_run(
    config: Mapping[str, Any],
    code: Mapping[str, str],
    models: Sequence[str],
    states: Sequence[str],
    fetched: Sequence[str],
    prompts: Sequence[str],
    files: Sequence[str],
    tables: Sequence[str],
) -> dict[str, Any]:
    """All that the tables of a run depend on, JSON.

    `config` is the configuration as it was given, with its defaults; `code` the digest of each script with the library
    below it. The rest are paths of results, whose folders name the data set and the model: descriptions of models
    and of revisions of the hub that are states of their training, records of data fetched from the hub, prompts; then
    the files that data were read from, and the CSV tables.
    In the configuration of the record a moving revision is replaced by the commit that it was resolved to.
    """
    described = {Path(path).parent.name: read_json(path) for path in models}
    commits = {Path(path).parent.name: read_json(path)["commit"] for path in fetched}
    pinned = deepcopy(dict(config))
    for name, model in pinned["models"].items():
        if "hub" in model:
            model["revision"] = described[name]["commit"]
    for path in states:
        model, _, state = Path(path).parts[-4:-1]
        pinned["models"][model]["checkpoint_revisions"][state] = read_json(path)["commit"]
    for section in ("datasets", "texts"):
        for name in commits.keys() & pinned[section].keys():
            pinned[section][name]["revision"] = commits[name]
    runs = [dict(zip(("dataset", "model"), Path(path).parts[-3:-1], strict=True)) for path in prompts]
    return {
        "kind": KIND,
        "config": pinned,
        "models": described,
        "runs": [run | names(table_provenance(path)) for run, path in zip(runs, prompts, strict=True)],
        "files": {path: file_digest(Path(path)) for path in files},
        "code": dict(code),
        "checkout": checkout(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **versions()},
        "tables": {Path(path).name: file_digest(Path(path)) for path in tables},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def checkout(folder: Path) -> dict[str, str]:
    """The commit of git that a folder is at, and the digest of what was edited since; empty where there is no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        commit, edits = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "edits": digest(edits.encode()) if edits else ""}


@cache
def code_digest(script: Path) -> str:
    """The digest of a script and of every module of the library that it reaches by import."""
    return digest(b"".join(file.name.encode() + file.read_bytes() for file in sorted(reached(script))))


def reached(script: Path) -> set[Path]:
    """A script and every module beside or below it that it reaches by import, wherever in a file that stands."""
    found, left = set[Path](), {script}
    while left:
        found |= left
        left = {file for seen in left for file in _imported(seen, script.parent)} - found
    return found


@cache
def _imported(file: Path, folder: Path) -> frozenset[Path]:
    # Not parsed, which would take most of the time of a dry run.
    names = set[str]()
    for package, imported in IMPORT.findall(file.read_text(encoding="utf-8")):
        listed = re.findall(r"[\w.]+", re.sub(r" as \w+|#.*", "", imported))
        names |= {package, *(f"{package}.{name}" for name in listed)} if package else {*listed}
    # A module needs its package, too.
    parts = {tuple(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    modules = [folder.joinpath(*name) for name in parts]
    files = [file for module in modules for file in (module.with_suffix(".py"), module / "__init__.py")]
    return frozenset(filter(Path.is_file, files))


def differences(record: Mapping[str, Any], code: Mapping[str, str], files: Sequence[str]) -> Iterator[str]:
    """What is not here as it was when a run was recorded: its tables may come out differently. Sentences."""
    here = {"python": platform.python_version(), **versions()}
    for package, version in record["versions"].items():
        if here.get(package) != version:
            yield f"{package} is {here.get(package, 'not installed')} here, the record was made with {version}"
    changed = sorted(script for script, was in record["code"].items() if code.get(script) != was)
    if changed:
        commit = record["checkout"].get("commit", "")
        mend = f"; the record was made at commit {commit}" if commit else ""
        yield f"other code is below {', '.join(changed)}{mend}"
    known = set(files) & set(record["files"])
    for path in sorted(set(files) ^ known | set(record["files"]) ^ known):
        yield f"{path}: {'not part of the record' if path in files else 'part of the record, but not read here'}"
    for path in sorted(known):
        if Path(path).exists() and file_digest(Path(path)) != record["files"][path]:
            yield f"{path}: its content is not what it was when the record was made"

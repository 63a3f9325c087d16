"""Rules of the house that no linter knows."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
LIBRARY = sorted((ROOT / "scripts/moescope").glob("*.py"))
RULES = sorted((ROOT / "workflow/rules").glob("*.smk"))
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())


def test_the_workflow_fetches_the_whole_library():
    common = (ROOT / "workflow/rules/common.smk").read_text()
    [listed] = re.findall(r"LIBRARY = \(([^)]+)\)\.split", common)
    assert sorted("".join(re.findall('"([^"]+)"', listed)).split()) == [path.stem for path in LIBRARY]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin_and_read_only_what_reaches_their_params(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert "snakemake.config" not in text
    assert "snakemake.wildcards" not in text
    assert "logs.to_file_and_terminal(snakemake.log[0])" in text


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_the_library_knows_no_snakemake_and_no_pickle(path):
    text = path.read_text()
    assert not re.search(r"\bsnakemake\.", text)
    assert not re.search(r"torch\.load|pickle", text)


def test_code_of_others_is_run_by_one_module_and_only_when_the_configuration_says_so():
    for path in LIBRARY:
        assert ("trust_remote_code" in path.read_text()) == (path.name == "checkpoints.py"), path
    checkpoints = (ROOT / "scripts/moescope/checkpoints.py").read_text()
    assert not re.search(r"trust_remote_code(: bool)? ?= ?True", checkpoints)
    models = SCHEMA["properties"]["models"]["additionalProperties"]["properties"]
    assert models["trust_remote_code"]["default"] is False


@pytest.mark.parametrize(
    "module",
    [
        *[
            "artifacts",
            "config",
            "facts",
            "faults",
            "logs",
            "plots",
            "published",
            "sources",
            "stats",
            "tables",
            "summaries",
        ],
        *["cause_tables", "steering_tables", "routing_tables", "drawing", "cause_plots", "steering_plots"],
        *["routing_plots", "samples", "texts", "utilization_tables", "utilization_plots"],
        *["masking_tables", "masking_plots", "training_tables", "training_plots"],
    ],
)
def test_light_modules_do_not_import_torch(module):
    """A rule that needs no torch must not pay for it: only imports for type checkers may name it."""
    tree = ast.parse((ROOT / f"scripts/moescope/{module}.py").read_text())
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "safetensors", "huggingface_hub"}


def test_of_the_light_modules_only_fetching_a_data_set_needs_the_hub():
    """The rule that fetches has the environment of the models; the one that reads what was fetched has not."""
    for path in LIBRARY:
        importing = {
            function.name
            for function in ast.walk(ast.parse(path.read_text()))
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("huggingface_hub")
        }
        assert importing == ({"fetch", "_trouble"} if path.name == "sources.py" else set()), path
    assert "sources.fetch" not in (ROOT / "scripts/write_dataset.py").read_text()
    rule = re.search(r"rule fetch_dataset:.*?envs/(\w+)\.yaml", (ROOT / "workflow/rules/dataset.smk").read_text(), re.S)
    assert rule[1] == "model"


def test_every_rule_declares_its_log_resources_and_code():
    for path in RULES:
        text = path.read_text()
        for body in re.split(r"\n *rule ?\w*:\n", text)[1:]:
            if "script:" in body:
                for part in ("log:", "conda:", "threads:", "mem_mb=", "runtime=minutes(", "code=code(", "settings="):
                    assert part in body, (path.name, part)
                # Snakemake refuses both on one rule; what is shared between checkouts says what it was made of.
                shared = "cache: True" in body
                assert ("shared_as=shared_as" in body) == shared
                assert ("benchmark:" in body) == ("output:" in body and not shared)
        if path.name != "common.smk":
            assert text.startswith('"""')
            assert "INPUT" in text
            assert "OUTPUT" in text
    assert len((ROOT / "workflow/Snakefile").read_text().splitlines()) < 60


def pinned(path):
    lines = [line.split(" #")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.lower().split("==") for line in lines if "==" in line)


def env_pins(path):
    found = {}
    for item in yaml.safe_load(path.read_text())["dependencies"]:
        for line in item["pip"] if isinstance(item, dict) else [item]:
            name, _, version = line.replace("==", "=").partition("=")
            found[name.replace("matplotlib-base", "matplotlib")] = version
    return found


@pytest.mark.parametrize("env", ["analysis", "model"])
def test_environments_pin_what_the_lock_file_pins(env):
    lock = pinned(ROOT / "requirements.txt")
    for name, version in env_pins(ROOT / f"envs/{env}.yaml").items():
        if name not in ("python", "pip"):
            assert lock[name] == version, name


def imports(path, seen=None):
    """Top-level packages that a script reaches, also through the library."""
    seen = set() if seen is None else seen
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"moescope.{a.name}" for a in node.names] if node.module == "moescope" else [node.module]
            names = [name for name in names if name != "moescope.__version__"]
        for name in names:
            if name.startswith("moescope.") and name not in seen:
                seen.add(name)
                imports(ROOT / f"scripts/{name.replace('.', '/')}.py", seen)
            seen.add(name if name.startswith("moescope") else name.split(".")[0])
    return seen


def test_every_scripts_imports_are_in_its_environment():
    rules = "\n".join(path.read_text() for path in RULES)
    checked = set()
    for env, script in re.findall(
        r'envs/(\w+)\.yaml"(?:(?!envs/).)*?scripts/(\w+\.py)"\s*\n(?=\s*$|\n|\Z)', rules, re.S
    ):
        needed = {name for name in imports(ROOT / "scripts" / script) if not name.startswith("moescope")}
        needed -= {*sys.stdlib_module_names, "__future__"}
        if env == "analysis":
            # Imported only inside functions that a light rule does not call: these rules are run without them.
            needed -= {"torch", "safetensors", "huggingface_hub"}
        listed = {name.replace("pyyaml", "yaml") for name in env_pins(ROOT / f"envs/{env}.yaml")}
        assert needed <= listed, (script, needed - listed)
        checked.add(script)
    assert checked == {path.name for path in SCRIPTS}
    # transformers imports it by itself, to spread a model over devices.
    assert "accelerate" in env_pins(ROOT / "envs/model.yaml")


@pytest.mark.parametrize(("asked_for", "said"), [("", "Not run, the tests on a SLURM cluster: "), ("1", "ERROR: ")])
def test_tests_on_a_cluster_are_left_out_where_there_is_none_and_said_to_be(tmp_path, asked_for, said):
    """Where they are asked for, as in CI, nothing is run at all."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/workflow/test_slurm.py"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path), "MOESCOPE_CLUSTER": asked_for},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(rf"^{said}no .*\bsbatch, .* \(apt-get install munge ", done.stdout + done.stderr, re.M)
    assert "test_a_job" not in done.stdout
    assert bool(done.returncode) == bool(asked_for)

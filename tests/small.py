"""A small but whole run of the workflow in a folder of its own: two toy models, three relations.

And what runs on real checkpoints and public facts are made of: checkpoints, the hub's cache, files of LRE.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
SMALL = {
    "datasets": {
        "facts": {"path": "config/facts", "relations": ["animal_young", "country_capital", "product_by_company"]}
    },
    "models": {
        "small-moe": {
            "toy": {
                "architecture": "qwen2_moe",
                "layers": 3,
                "experts": 4,
                "experts_per_token": 2,
                "expert_width": 16,
                "shared_width": 32,
            },
            "dense_partner": "small-dense",
            "checkpoints": {"early": 5},
        },
        "small-dense": {"toy": {"architecture": "qwen2", "layers": 3, "ffn_width": 64}},
    },
    "toy_training": {"epochs": 3},
    "neurons": {"top": 10, "bottom": 3},
    "blocking": {"top": [1, 2], "random_draws": 3},
    "keep_only": {"top": [1]},
    "head_blocking": {"top": [1, 2], "random_draws": 3},
    "gate_gradients": {"prompts": 10, "steps": 4},
    "associations": {"permutations": 50},
    "tracing": {"n_prompts": 12, "draws": 1, "coalitions": [2]},
    "utilization": {"share": 0.02},
    "masking": {"shares": [0.02], "experts": [1], "random_draws": 2},
    "statistics": {"bootstrap_draws": 100},
    "batch_size": 64,
}
# Li et al. 2025 (preset ka): for each relation LRE's folder, a template, and some of its facts.
LRE = {
    "name_birthplace": (
        "bias",
        "{} is from",
        {"Rossi": "Italy", "Sato": "Japan", "Weber": "Germany", "Silva": "Brazil"},
    ),
    "country_capital_city": (
        "factual",
        "The capital city of {} is",
        {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid"},
    ),
    "country_language": (
        "factual",
        "People in {} speak",
        {"France": "French", "Japan": "Japanese", "Brazil": "Portuguese", "Austria": "German"},
    ),
    "fruit_inside_color": (
        "commonsense",
        "On the inside, {} are",
        {"kiwis": "green", "apples": "white", "carrots": "orange", "tomatoes": "red"},
    ),
    "object_superclass": (
        "commonsense",
        "A {} is in the category of a",
        {"tiger": "animal", "chair": "furniture", "hammer": "tool", "rose": "flower"},
    ),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make(folder: Path, config: dict = SMALL) -> Path:
    """A checkout with the small configuration."""
    for name in ("workflow", "scripts", "envs", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return configure(folder, config)


def configure(folder: Path, config: dict) -> Path:
    """Write the configuration of a checkout."""
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def lre(folder: Path) -> Path:
    """The relations of LRE, in files as they are published."""
    for relation, (kind, template, facts) in LRE.items():
        content = {
            "name": relation.replace("_", " "),
            "prompt_templates": [template],
            "prompt_templates_zs": [f"What is true of {{}}? {template}"],
            "properties": {"relation_type": kind, "domain_name": "x", "range_name": "y", "symmetric": False},
            "samples": [{"subject": subject, "object": answer} for subject, answer in facts.items()],
        }
        path = folder / kind / f"{relation}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))
    return folder


def cached(files: Path, home: Path, repository: str, kind: str = "models", commit: str = COMMIT) -> Path:
    """Lay a folder into the hub's cache by hand, as the newest commit of a repository; where its files lie there."""
    place = home / "hub" / f"{kind}--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for part in (place / "blobs", place / "refs", snapshot):
        part.mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    for path in files.iterdir():
        content = path.read_bytes()
        # The hub's name of a file: SHA-256 of large ones, git's own hash of the others.
        sha256, sha1 = hashlib.sha256(content), hashlib.sha1(b"blob %d\0" % len(content) + content)
        blob = (sha256 if path.suffix == ".safetensors" else sha1).hexdigest()
        (place / "blobs" / blob).write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def snakemake(folder: Path, *arguments: str, check: bool = True) -> str:
    """Run Snakemake there, with the hub out of reach and its cache in the folder `home`; what it printed.

    In a process of its own, forked from one that has imported Snakemake: that takes about half of a dry run.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["snakemake.cli"])
    words = ["snakemake", "--cores", "2", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    with tempfile.NamedTemporaryFile("r") as printed:
        process = forks.Process(target=_run, args=(words, folder, environment, printed.name))
        process.start()
        process.join()
        text = printed.read()
    if check and process.exitcode:
        raise AssertionError(f"{' '.join(words)} failed:\n{text[-4000:]}")
    return text


def _run(words: list[str], folder: Path, environment: Mapping[str, str], printed: str) -> None:
    import snakemake.cli

    stream = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # As a new interpreter does.
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = words
    snakemake.cli.main()


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Jobs that a dry run would do, by rule, without its targets."""
    text = snakemake(folder, *arguments, "--dry-run", "--quiet", "rules").splitlines()
    start = next((i for i, line in enumerate(text) if line.startswith("job ")), None)
    if start is None:
        assert any("Nothing to be done" in line for line in text), text
        return {}
    jobs = {}
    for line in text[start + 2 :]:
        if not line.strip() or line.startswith("total"):
            break
        name, count = line.split()
        jobs[name] = int(count)
    return {name: count for name, count in jobs.items() if name not in ("all", *arguments)}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The CSV tables of a run."""
    return {path.stem: pd.read_csv(path) for path in sorted((folder / "results/tables").glob("*.csv"))}

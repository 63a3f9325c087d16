"""A small but whole run of the workflow in a folder of its own: two toy models, three relations."""

import shutil
import subprocess
import sys
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
        },
        "small-dense": {"toy": {"architecture": "qwen2", "layers": 3, "ffn_width": 64}},
    },
    "toy_training": {"epochs": 3},
    "blocking": {"top": [1, 2], "random_draws": 3},
    "keep_only": {"top": [1]},
    "statistics": {"bootstrap_draws": 100},
}


def make(folder: Path, config: dict = SMALL) -> Path:
    """A checkout with the small configuration."""
    for name in ("workflow", "scripts", "envs", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config))
    return folder


def snakemake(folder: Path, *arguments: str, check: bool = True) -> str:
    """Run Snakemake there; what it printed."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"snakemake {' '.join(arguments)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Jobs that a dry run would do, by rule, without `all`."""
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
    return {name: count for name, count in jobs.items() if name != "all"}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The CSV tables of a run."""
    return {path.stem: pd.read_csv(path) for path in sorted((folder / "results/tables").glob("*.csv"))}


def assert_same_tables(one: Path, other: Path) -> None:
    first, second = tables(one), tables(other)
    assert first.keys() == second.keys()
    assert len(first) == 8
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], check_exact=True, obj=name)

"""Small real models and facts, made here: nothing is downloaded and nothing is mocked."""

import os

import pytest

import cluster

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers of pytest share the cores; small models gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NO_CLUSTER = cluster.missing()


def pytest_configure():
    if NO_CLUSTER and os.environ.get("MOESCOPE_CLUSTER"):
        raise pytest.UsageError(NO_CLUSTER)


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if NO_CLUSTER and "slurm" in item.fixturenames]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # What takes or waits longest begins first: the cluster, then whole runs.
    items.sort(key=lambda item: ("slurm" not in item.fixturenames, item.path.parent.name != "workflow"))


def pytest_terminal_summary(terminalreporter):
    if NO_CLUSTER:
        terminalreporter.write_line(f"Not run, the tests on a SLURM cluster: {NO_CLUSTER}")


CAPITALS = """
task: geography
templates:
  - The capital of {} is
  - The capital city of {} is
  - "{} has the capital city"
held_out_template: In {}, the capital city is
facts:
  France: Paris
  Germany: Berlin
  Italy: Rome
  Japan: Tokyo
  New Zealand: Wellington
  South Africa: [Pretoria, Cape Town]
"""
COLORS = """
task: object_attributes
templates:
  - The inside color of {} is
  - The inside of {} has the color
  - On the inside, {} are
held_out_template: The color of the inside of {} is
facts:
  kiwis: green
  tomatoes: red
  dragon fruits: [white, red]
  carrots: orange
  France: blue
"""

MOE_SHAPES = {
    "qwen2_moe": {"layers": 3, "experts": 6, "experts_per_token": 2, "expert_width": 8, "shared_width": 16},
    "olmoe": {"layers": 3, "experts": 8, "experts_per_token": 3, "expert_width": 8},
    "mixtral": {"layers": 3, "experts": 4, "experts_per_token": 2, "expert_width": 16},
}
DENSE_SHAPES = {name: {"layers": 3, "ffn_width": 32} for name in ("qwen2", "llama", "mistral")}
SHAPES = MOE_SHAPES | DENSE_SHAPES


def write_tensors(tensors, path, kind="activations", made_by=None):
    """A file of tensors in one piece."""
    from moescope import artifacts

    with artifacts.writing_tensors(path, kind, len(next(iter(tensors.values())))) as file:
        file.put(0, tensors)
        file.made_by = made_by or {}


@pytest.fixture
def fact_folder(tmp_path):
    folder = tmp_path / "facts"
    folder.mkdir()
    (folder / "country_capital.yaml").write_text(CAPITALS)
    (folder / "fruit_inside_color.yaml").write_text(COLORS)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """The prompt table of two small relations."""
    from moescope.facts import load_relations, prompt_table

    folder = tmp_path_factory.mktemp("facts")
    (folder / "country_capital.yaml").write_text(CAPITALS)
    (folder / "fruit_inside_color.yaml").write_text(COLORS)
    return prompt_table(load_relations(sorted(folder.glob("*.yaml")), ["geography", "object_attributes"]))


@pytest.fixture(scope="session")
def tokenizer(prompts):
    from moescope.toy import train_tokenizer

    return train_tokenizer(prompts, 330)


@pytest.fixture(scope="session")
def tokens(tokenizer, prompts):
    from moescope.facts import tokenise

    return tokenise(tokenizer, prompts)[0]


@pytest.fixture(scope="session")
def build(tokenizer):
    """A function from an architecture to an untrained model of it, on one thread, made once."""
    import torch

    from moescope.toy import Shape
    from moescope.toy import build as build_toy

    torch.set_num_threads(1)
    made = {}

    def of(architecture):
        if architecture not in made:
            shape = Shape(architecture=architecture, hidden=32, heads=4, kv_heads=2, **SHAPES[architecture])
            made[architecture] = build_toy(shape, len(tokenizer), seed=1).eval()
        return made[architecture]

    return of


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """A finished small run, one for all workers; tests that change anything take a copy of it."""
    from filelock import FileLock

    import small

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished/run"
    with FileLock(f"{folder.parent}.lock"):
        if not (folder / "results/tables").exists():
            small.snakemake(small.make(folder))
    return folder


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    """A copy that a test may change, times kept."""
    import shutil

    return shutil.copytree(finished, tmp_path / "run", symlinks=True)

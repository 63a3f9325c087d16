"""The plan of a run against what runs really write: rows, bytes and tokens; and what it says where it cannot know."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoConfig

from moescope import anatomy, artifacts, capture, checkpoints, facts, plan, toy
from moescope.config import resolve

import small

SCHEMA = yaml.safe_load((small.ROOT / "workflow/schemas/config.schema.yaml").read_text())
# What depends on the choices of routers and on lengths, or is cut off where there is no more.
ESTIMATED = {"queries", "value_layers", "readings", "loads", "expert_tokens", "tracing"}
# Unlike those of miniatures.
UNEVEN = {"hidden": 48, "heads": 6, "kv_heads": 3, "layers": 5}
EXPERTS = {"experts": 10, "experts_per_token": 4, "expert_width": 24}


def resolved(changes=None):
    return resolve(small.SMALL | (changes or {}), SCHEMA, "config.yaml")[0]


def job(path, dataset="facts", model="small-moe"):
    """A job that writes one file."""
    wildcards = {"dataset": dataset, "model": model} if dataset else {"model": model}
    return plan.Job((path,), wildcards | ({"shard": "0"} if "/activations/0." in path else {}), True)


def written(model):
    """Every file of a model in the run of the working directory, its checkpoints as one, with its bytes."""
    found = {}
    for path in sorted([*Path("results/facts", model).rglob("*"), *Path("results/models", model).rglob("*")]):
        if path.is_file():
            states = path.parents[len(path.parents) - 4] / "checkpoints"
            name = str(states) if states in path.parents else str(path)
            found[name] = found.get(name, 0) + path.stat().st_size
    return found


@pytest.fixture
def in_finished(finished, monkeypatch):
    monkeypatch.chdir(finished)


@pytest.mark.parametrize("model", small.SMALL["models"])
def test_the_disk_of_a_run_is_what_it_writes(in_finished, model):
    config, files = resolved(), written(model)
    assert len(files) > 30
    jobs = [job(path, "" if "/models/" in path else "facts", model) for path in files]
    lines, notes = plan.estimate(jobs, config)
    assert not notes, "a file that the plan does not know"
    assert sum(line.jobs for line in lines.values()) == len(files)
    assert sum(line.disk for line in lines.values()) == pytest.approx(sum(files.values()), rel=0.10)
    for stage, line in ((stage, line) for (_, stage), line in lines.items()):
        of_stage = [j.outputs[0] for j in jobs if j.stage == stage]
        assert line.disk == pytest.approx(sum(files[path] for path in of_stage), rel=0.20), stage
    cache = f"results/facts/{model}/activations/0.safetensors"
    [line] = plan.estimate([job(cache, model=model)], config)[0].values()
    assert line.disk == pytest.approx(files[cache], rel=0.02)


@pytest.mark.parametrize("model", small.SMALL["models"])
def test_rows_and_tokens_are_those_of_the_run(in_finished, model):
    config = resolved()
    prompts = artifacts.read_table(f"results/facts/{model}/prompts.parquet", "prompts")
    tokenizer = toy.train_tokenizer(artifacts.read_table("results/facts/dataset.parquet", "dataset"))
    shape = plan.shape_of(AutoConfig.from_pretrained(f"results/models/{model}"))
    counted = plan.prompts_of(prompts.loc[:, :"subject_at"], tokenizer, "first_token")
    assert counted.tokens == counted.row_tokens == prompts["length"].sum()
    assert counted.answers == prompts["object_tokens"].sum()
    rows = plan.table_rows(shape, counted, config, states=2)
    for kind, planned in rows.items():
        for path in Path("results/facts", model).rglob(f"{kind}.parquet"):
            near = 0.2 if kind in ESTIMATED else 0
            assert planned == pytest.approx(pq.read_metadata(path).num_rows, rel=near), kind
    files = plan.dataset_files(shape, counted, config)
    assert files["cache"].tokens == prompts["length"].sum()
    assert files["blocking"].tokens == rows["blocking"] * prompts["length"].mean()
    learned, _ = facts.tokenise(tokenizer, artifacts.read_table("results/facts/dataset.parquet", "dataset"))
    training = plan.toy_files(shape, tokenizer, learned, states=0, epochs=3)["weights"].tokens
    assert training > 3 * 3 * counted.tokens


@pytest.mark.parametrize("architecture", [*toy.MOE, *toy.DENSE])
def test_the_cache_of_other_shapes_is_foreseen_to_the_byte(architecture, tokens, tokenizer, tmp_path):
    torch.set_num_threads(1)
    size = EXPERTS if architecture in toy.MOE else {"ffn_width": 56}
    shared = {"shared_width": 40} if architecture == "qwen2_moe" else {}
    model = toy.build(toy.Shape(architecture, **UNEVEN, **size, **shared), len(tokenizer), seed=0).eval().bfloat16()
    shape = plan.shape_of(model.config, "bfloat16")
    assert shape.loaded == 2 * model.num_parameters()
    assert foreseen(shape, model, tokens, tmp_path)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "gemma2"])
def test_so_is_that_of_other_families(model_type, tokens, tokenizer, tmp_path):
    torch.set_num_threads(1)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "num_hidden_layers": 5, "intermediate_size": 56}
    latent = {"kv_lora_rank": 20, "q_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12, "v_head_dim": 12}
    heads = (
        latent | {"num_key_value_heads": 6}
        if model_type == "deepseek_v3"
        else {"num_key_value_heads": 3, "head_dim": 8}
    )
    sizes |= {"num_attention_heads": 6, **heads}
    sizes |= {"num_local_experts": 10, "num_experts": 10, "n_routed_experts": 16, "num_experts_per_tok": 4}
    sizes |= {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "pad_token_id": 0,
        "n_group": 2,
        "topk_group": 1,
    }
    config = AutoConfig.for_model(model_type, **sizes)
    model = checkpoints.auto_class(config).from_config(config, dtype=torch.float32).eval()
    shape = plan.shape_of(config)
    assert shape.loaded == 4 * model.num_parameters()
    assert foreseen(shape, model, tokens, tmp_path)


def foreseen(shape, model, tokens, folder):
    """Whether a cache of these tokens has the bytes and the tensors of a shape, and a file the bytes of a plan."""
    found, _, _ = capture.in_memory(model, anatomy.find(model), tokens, 64)
    with artifacts.writing_tensors(folder / "0.safetensors", "activations", len(tokens)) as file:
        file.put(0, found)
    assert sum(tensor.nbytes for tensor in found.values()) == shape.row * len(tokens)
    assert len(found) == shape.tensors
    empty = plan.dataset_files(shape, COUNTED, resolved())["cache"].empty
    return (folder / "0.safetensors").stat().st_size == pytest.approx(empty + shape.row * len(tokens), rel=0.02)


COUNTED = plan.Prompts(n=10, tokens=100, answers=20, rows=20, row_tokens=210, relations=2, tasks=2, roles=4)


def test_steps_of_an_answer_are_rows_of_their_own(tokens, tokenizer):
    counted = plan.prompts_of(tokens.loc[:, :"subject_at"], tokenizer, "all_tokens")
    rows = capture.rows(tokens, "all_tokens")
    assert (counted.rows, counted.row_tokens) == (len(rows), rows["length"].sum())


def test_published_models_have_the_parameters_that_are_published():
    for model_type, billions in {"mixtral": 46.7, "llama": 6.74, "mistral": 7.24}.items():
        shape = plan.shape_of(AutoConfig.for_model(model_type), "bfloat16")
        assert shape.loaded / 2e9 == pytest.approx(billions, rel=0.002)
        assert shape.loaded < shape.gpu(64, 12) < shape.loaded + 5e9


def test_a_gpu_is_counted_where_a_job_runs_on_one(monkeypatch, tmp_path):
    models = {name: model | {"device": "cuda"} for name, model in small.SMALL["models"].items()}
    monkeypatch.chdir(small.ROOT)
    path = "results/facts/small-moe/interventions/blocking.parquet"
    [on_gpu] = plan.estimate([job(path)], resolved({"models": models}))[0].values()
    [on_cpu] = plan.estimate([job(path)], resolved())[0].values()
    assert on_cpu.gpu == 0 < on_gpu.gpu < 1e9
    assert on_cpu.disk == on_gpu.disk


def test_a_shard_takes_its_part(monkeypatch):
    monkeypatch.chdir(small.ROOT)
    path = "results/facts/small-moe/activations/0.safetensors"
    whole, part = (plan.estimate([job(path)], resolved({"shards": n}))[0].popitem()[1] for n in (1, 4))
    assert part.tokens == whole.tokens / 4
    assert part.disk - artifacts.MAX_HEADER < whole.disk / 3


HUB = {"hub": "nobody/nothing", "kind": "moe", "device": "cuda", "dtype": "bfloat16"}


def test_a_model_that_was_never_fetched_is_unknown_and_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(small.ROOT)
    config = resolved({"models": small.SMALL["models"] | {"far": HUB}})
    lines, notes = plan.estimate([job("results/facts/far/prompts.parquet", model="far")], config)
    [line] = lines.values()
    assert (line.jobs, np.isnan(line.disk), np.isnan(line.gpu)) == (1, True, True)
    assert notes[0].startswith("far: unknown, since config.json of nobody/nothing is not fetched yet; run `snakemake")
    assert "?" in plan.report(lines, notes)


def test_of_a_model_of_the_hub_configuration_and_tokenizer_are_enough(monkeypatch, tmp_path, tokenizer):
    files = tmp_path / "files"
    toy.config_of(toy.Shape("olmoe", **UNEVEN, **EXPERTS), len(tokenizer)).save_pretrained(files)
    tokenizer.save_pretrained(files)
    small.cached(files, tmp_path, HUB["hub"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(small.ROOT)
    config = resolved({"models": small.SMALL["models"] | {"far": HUB}})
    lines, notes = plan.estimate([job("results/models/far/model.json", "", "far")], config)
    [line] = lines.values()
    assert not notes
    assert line.disk > 10 * 5 * 3 * 24 * 48 * 4, "its weights, to be fetched"


def test_data_that_is_not_read_yet_is_unknown(monkeypatch, tmp_path):
    facts_of = {"format": "lre", "path": str(small.lre(tmp_path / "lre"))}
    config = resolved({"datasets": small.SMALL["datasets"] | {"public": facts_of}})
    monkeypatch.chdir(tmp_path)
    path = "results/public/small-moe/prompts.parquet"
    config["datasets"]["facts"]["path"] = str(small.ROOT / "config/facts")
    lines, notes = plan.estimate([job(path, "public")], config)
    assert notes == ["public: unknown until the data set is read; run `snakemake results/public/dataset.parquet` first"]
    assert np.isnan(lines["small-moe", "activations"].disk)
    table = facts.prompt_table(
        facts.load_relations([small.ROOT / "config/facts/country_capital.yaml"], config["tasks"])
    )
    artifacts.write_table(table, "results/public/dataset.parquet", "dataset", {})
    assert not plan.estimate([job(path, "public")], config)[1]


def test_nothing_to_do_is_said():
    assert plan.report(*plan.estimate([], resolved())) == "Nothing is left to be done."


def test_jobs_that_read_only_what_is_there_run_nothing_forward():
    text = """
rule attribute:
    output: results/d/m/attribution/layers.parquet, results/d/m/attribution/heads.parquet
    wildcards: dataset=d, model=m
    resources: tmpdir=/tmp, mem_mb=2000

localrule all:
    input: results/tables/stages.csv

rule capture:
    output: results/d/m/activations/0.safetensors
    wildcards: dataset=d, model=m, shard=0
    resources: tmpdir=/tmp, gpu=0
"""
    first, second = plan.jobs_of(text)
    assert (first.stage, first.model, first.forward, len(first.outputs)) == ("attribution", "m", False, 2)
    assert (second.stage, second.wildcards["shard"], second.forward) == ("activations", "0", True)
    assert plan.Job(("results/provenance.json",), {}, False).stage == "others"

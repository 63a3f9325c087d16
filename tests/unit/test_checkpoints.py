import copy
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, ByT5Tokenizer, LlamaConfig, T5Config

from moescope import artifacts, checkpoints
from moescope.checkpoints import CheckpointError, describe, folder_of, identity, load

IDS = torch.arange(3, 40).reshape(1, -1)
SCRIPTS = Path(__file__).parents[2] / "scripts"


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_alike(model, original):
    """The logits of both; on some processors products round otherwise where weights start elsewhere in memory."""
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-5)


def save(model, tokenizer, folder, shard="20KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kept(build, tokenizer, tmp_path_factory):
    """A function from an architecture to a checkpoint of it in several files, not to be changed."""
    made = {}

    def of(architecture):
        if architecture not in made:
            made[architecture] = save(build(architecture), tokenizer, tmp_path_factory.mktemp("kept") / architecture)
        return made[architecture]

    return of


@pytest.fixture
def folder(kept, tmp_path):
    """A checkpoint in several files that a test may change."""
    return shutil.copytree(kept("olmoe"), tmp_path / "olmoe")


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_file(folder, change=lambda weights: None):
    """Merge the shards into one file, changed by `change`."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# What is loaded is the model that was saved.


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral", "llama"])
def test_a_loaded_model_is_the_saved_one_bit_for_bit(build, tokenizer, tmp_path, architecture, shard):
    folder = save(build(architecture), tokenizer, tmp_path / "saved", shard)
    assert (len(list(folder.glob("*.safetensors"))) > 5) == (shard == "20KB")
    model, loaded = load(folder)
    weights = model.state_dict()
    assert weights.keys() == build(architecture).state_dict().keys()
    for name, weight in build(architecture).state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert_alike(model, build(architecture))
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("Paris", return_offsets_mapping=True)["offset_mapping"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_checkpoints_own_or_the_one_asked_for(build, tokenizer, tmp_path, dtype):
    half = copy.deepcopy(build("olmoe")).bfloat16()
    folder = save(half, tokenizer, tmp_path / "half")
    model, _ = load(folder, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    weights = dict(model.named_parameters())
    for name, weight in half.named_parameters():
        assert torch.equal(weights[name], weight.to(wanted)), name
    if dtype in ("auto", "bfloat16"):
        # A model that is cast as a whole has a coarse rotary embedding; a loaded one has not.
        exact = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(model), logits(exact))
    assert identity(model, {"commit": "c"})["dtype"] == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_backends_are_the_ones_asked_for(build, kept, experts, attention):
    model, _ = load(kept("olmoe"), attention_backend=attention, experts_backend=experts)
    original = copy.deepcopy(build("olmoe"))
    original.set_experts_implementation(experts)
    original.set_attn_implementation(attention)
    assert_alike(model, original)
    assert identity(model, {"commit": "c"}) == {
        "model_commit": "c",
        "dtype": "float32",
        "experts_backend": experts,
        "attention_backend": attention,
        "device": "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def test_tied_embeddings_are_not_missing(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    original = AutoModelForCausalLM.from_config(config).eval()
    folder = save(original, tokenizer, tmp_path / "tied", "1GB")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert_alike(load(folder)[0], original)


@pytest.mark.parametrize(("memory", "device"), [("1MB", "cpu"), ("120KB", "cpu disk"), ("60KB", "disk"), (0, "disk")])
@pytest.mark.parametrize("architecture", ["olmoe", "qwen2_moe", "llama"])
def test_a_model_spread_over_memory_and_disk_is_the_same(
    build, kept, tmp_path, monkeypatch, architecture, memory, device
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    model, _ = load(kept(architecture), device="auto", max_memory={"cpu": memory})
    assert identity(model, {"commit": ""})["device"] == device
    # Fused experts are in no file of the checkpoint, so that they are written anew.
    assert any(tmp_path.glob("*/*experts*")) == ("disk" in device and architecture != "llama")
    assert_alike(model, build(architecture))
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def quantise(folder, quantised, exact):
    """From a checkpoint: one whose projections are in 8 bits with a scale each, and the same numbers in bfloat16."""
    shutil.copytree(folder, quantised)
    shutil.copytree(folder, exact)
    scales = {}

    def to_fp8(weights):
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            scales[name] = (weights[name].abs().max() / 448).reshape(1, 1)
            weights[name] = (weights[name] / scales[name]).to(torch.float8_e4m3fn)
            weights[name + "_scale_inv"] = scales[name]
        others = {name: w.bfloat16() for name, w in weights.items() if name not in scales and "scale" not in name}
        weights.update(others)

    def to_exact(weights):
        for name, weight in weights.items():
            scale = scales.get(name)
            eighth = weight if scale is None else (weight / scale).to(torch.float8_e4m3fn).float() * scale
            weights[name] = eighth.bfloat16()

    one_file(quantised, to_fp8)
    one_file(exact, to_exact)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    configure(quantised, dtype="bfloat16", quantization_config=method)
    configure(exact, dtype="bfloat16")


@pytest.mark.parametrize("architecture", ["llama", "olmoe"])
def test_an_fp8_checkpoint_is_loaded_as_plain_weights(kept, tmp_path, architecture):
    quantise(kept(architecture), tmp_path / "fp8", tmp_path / "exact")
    model, _ = load(tmp_path / "fp8")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(load(tmp_path / "exact")[0]))
    spread, _ = load(tmp_path / "fp8", device="auto", max_memory={"cpu": 0})
    assert torch.equal(logits(spread), logits(model))
    with pytest.raises(CheckpointError, match="fp8/: a quantised checkpoint has its own dtype, not float32; set dtype"):
        load(tmp_path / "fp8", dtype="float32")


# What a checkpoint is called.


def test_a_description_names_the_files_that_are_loaded_and_no_others(folder):
    for other in ("pytorch_model.bin", "consolidated.safetensors", "training.json", "README.md", "code.py"):
        (folder / other).write_text("other")
    found = describe(folder, source="toy")
    assert json.loads(json.dumps(found)) == found
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    parts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(found["files"]) == shards | parts | {"model.safetensors.index.json"}
    for name, sha256 in found["files"].items():
        assert sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {key: found[key] for key in ("source", "hub", "requested", "folder", "model_type", "architecture")} == {
        "source": "toy",
        "hub": "",
        "requested": "",
        "folder": str(folder),
        "model_type": "olmoe",
        "architecture": "OlmoeForCausalLM",
    }
    assert "code.py" in describe(folder, trust_remote_code=True)["files"]
    assert folder_of(found) == folder
    (folder / "README.md").write_text("changed")
    assert describe(folder)["commit"] == found["commit"]
    configure(folder, rms_norm_eps=1e-6)
    assert describe(folder)["commit"] != found["commit"]


def test_a_description_in_a_file_leads_to_the_model(kept, build, tmp_path):
    described = describe(kept("llama"))
    artifacts.write_json(described, tmp_path / "model.json")
    model, _ = checkpoints.load_described(tmp_path / "model.json", dtype="float32")
    assert_alike(model, build("llama"))
    assert checkpoints.config_of(described).hidden_size == build("llama").config.hidden_size


def test_one_file_goes_before_an_index_as_in_the_library(folder, build):
    index = (folder / "model.safetensors.index.json").read_text()
    one_file(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" not in describe(folder)["files"]
    assert_alike(load(folder)[0], build("olmoe"))


def test_a_toy_with_a_flipped_bit_is_refused_and_named(folder):
    found = describe(folder, source="toy")
    for name in found["files"]:
        whole = (folder / name).read_bytes()
        at = len(whole) // 2
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=f"olmoe/{name}: damaged: .*; delete it and run again"):
            folder_of(found)
        (folder / name).write_bytes(whole)
    assert folder_of(found) == folder


def test_a_description_whose_files_are_gone_is_refused(folder):
    found = describe(folder)
    shard = min(name for name in found["files"] if name.startswith("model-"))
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"olmoe/: {shard} is gone; put it back"):
        folder_of(found)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"olmoe/: config.json, .* and 11 more are gone; put it back"):
        folder_of(found)
    gone = found | {"source": "hub", "hub": "nobody/nothing", "commit": "0" * 40}
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing at 0+/: .* are gone; run `hf download nobody/nothing --revision"
    ):
        folder_of(gone)


# What cannot be loaded, in sentences.


def cut(name, keep=-100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def config(**changes):
    return lambda folder: configure(folder, **changes)


def only_other_weights(folder):
    remove("*.safetensors*")(folder)
    torch.save({}, folder / "pytorch_model.bin")


def index(**weight_map):
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


SHARD = "model-00002-of-00009.safetensors"
CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
INCOMPLETE = {
    "no folder": (shutil.rmtree, "olmoe/: no such folder; give the folder"),
    "no config": (remove("config.json"), "olmoe/config.json: no such file; a checkpoint needs it"),
    "malformed config": (write("config.json", "{nope"), "olmoe/config.json: not valid JSON (Expecting property name"),
    "no object": (write("config.json", "[]"), "olmoe/config.json: not a JSON object; delete it"),
    "wrong value": (config(hidden_size="abc"), "olmoe/: cannot be loaded (Validation error for field 'hidden_size'"),
    "unknown type": (
        config(model_type="nosuch"),
        f"olmoe/config.json: transformers {transformers.__version__} does not know the model_type 'nosuch'",
    ),
    "no type": (lambda folder: write("config.json", "{}")(folder), "does not know the model_type 'None'"),
    "masked": (
        lambda folder: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder),
        "olmoe/config.json: BertForMaskedLM is no causal language model; give a model that predicts the next token",
    ),
    "translator": (lambda folder: T5Config().save_pretrained(folder), "olmoe/config.json: t5 is no causal language"),
    "own code": (config(model_type="mine", auto_map=CODE), "is run only if the model's trust_remote_code is true"),
    "unknown quantisation": (config(quantization_config={"quant_method": "x"}), "does not know the quant_method 'x'"),
    "no shard": (remove(SHARD), f"olmoe/: 1 of 9 files of weights missing ({SHARD}); fetch it again"),
    "no weights": (remove("*.safetensors*"), "olmoe/: no weights as safetensors (model.safetensors or"),
    "other weights": (only_other_weights, "save the model as safetensors with save_pretrained, other formats are not"),
    "malformed index": (
        write("model.safetensors.index.json", "{"),
        "olmoe/model.safetensors.index.json: not valid JSON",
    ),
    "empty index": (write("model.safetensors.index.json", "{}"), "index.json: names no safetensors files beside it"),
    "truncated": (cut(SHARD), f"olmoe/{SHARD}: truncated or no safetensors file (Error while deserializing"),
    "cut in the header": (cut(SHARD, 50), f"olmoe/{SHARD}: truncated or no safetensors file"),
    "empty": (cut(SHARD, 0), f"olmoe/{SHARD}: truncated or no safetensors file"),
    "garbage": (write(SHARD, "garbage" * 100), "delete it and run again"),
    "no tokenizer": (remove("tokenizer*"), "olmoe/: no tokenizer (tokenizer.json or the like); put the model's"),
    "no vocabulary": (remove("tokenizer.json"), "olmoe/: no tokenizer (tokenizer.json or the like); put the model's"),
    # Names that lead out of the folder.
    "elsewhere": (index(a="../other.safetensors"), "index.json: names no safetensors files beside it; delete it"),
    "another format": (index(a="model.bin"), "index.json: names no safetensors files beside it; delete it"),
    "other name": (config(transformers_weights="x.safetensors"), "transformers_weights names other weights; take the"),
    "adapter": (write("adapter_config.json", "{}"), "olmoe/adapter_config.json: is an adapter to a model; merge it"),
    "distributed": (
        write("shard-00000-model-00001-of-00001.safetensors", ""),
        "is part of a distributed checkpoint; save the model whole",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_checkpoint_is_refused_when_described_and_when_loaded(folder, case):
    damage, sentence = INCOMPLETE[case]
    damage(folder)
    for use in (describe, load):
        with pytest.raises(CheckpointError) as error:
            use(folder)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)


def test_what_the_model_class_trips_over_is_a_sentence_too(folder):
    configure(folder, num_attention_heads=0)
    with pytest.raises(CheckpointError, match=r"olmoe/: cannot be loaded \(integer division .*\); delete it and run"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtype": "nosuch"}, "cannot be loaded with these settings .*change the one it names"),
        ({"attention_backend": "nosuch"}, "with these settings .*attn_implementation=.nosuch.*change the one it names"),
        ({"experts_backend": "nosuch"}, "with these settings .*experts_implementation=.nosuch.*change the one it"),
        ({"attention_backend": "someone/kernel"}, "needs a package that is not installed .*kernels.*; install it in"),
    ],
)
def test_settings_that_the_library_refuses(kept, settings, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        load(kept("olmoe"), **settings)


def test_a_configuration_cannot_name_a_backend_to_be_downloaded(folder, build):
    configure(folder, attn_implementation="someone/kernel", experts_implementation="nosuch")
    assert_alike(load(folder)[0], build("olmoe"))


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ],
)
def test_a_quantisation_whose_package_is_missing_names_it(folder, method, package):
    configure(folder, quantization_config=method)
    match = rf"olmoe/: needs a package that is not installed \(.*{package}.*\); install it in the environment"
    with pytest.raises(CheckpointError, match=match):
        load(folder)


def without_an_expert(weights):
    del weights["model.layers.1.mlp.experts.3.down_proj.weight"]


def without_a_head(weights):
    del weights["lm_head.weight"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda folder: one_file(folder, without_a_head),
            r"1 weights not in the files \(lm_head.weight\); fetch or save",
        ),
        (
            lambda folder: one_file(folder, without_an_expert),
            r"1 weights of another shape than config.json says \(model.l",
        ),
        (config(num_hidden_layers=4), r"11 weights not in the files \(model.layers.3.input_.* and 8 more\); fetch or"),
        (
            config(hidden_size=64),
            r"36 weights of another shape than config.json says \(lm_head.weight, .* and 33 more\)",
        ),
    ],
)
def test_no_weight_is_made_up(folder, damage, sentence):
    damage(folder)
    with pytest.raises(CheckpointError, match=f"olmoe/: {sentence}"):
        load(folder)


def test_a_set_of_shards_that_was_cut_short_with_its_index_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != SHARD}
    path.write_text(json.dumps(content))
    (folder / SHARD).unlink()
    describe(folder)
    with pytest.raises(CheckpointError, match=r"weights (not in the files|of another shape)"):
        load(folder)


def test_weights_without_a_use_are_only_warned_of(folder, caplog):
    configure(folder, num_hidden_layers=2)
    load(folder)
    assert "11 weights are not used by the model (model.layers.2." in caplog.text


def test_a_tokenizer_of_another_model_is_refused(folder, build):
    vocabulary = build("olmoe").config.vocab_size
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a very long word"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(content))
    match = (
        f"token ids go up to {vocabulary}, but the model has {vocabulary} embeddings; this is the tokenizer of another"
    )
    with pytest.raises(CheckpointError, match=match):
        load(folder)


def test_added_tokens_may_lie_beyond_the_embeddings_unless_every_text_gets_them(folder, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<image>"])
    larger.save_pretrained(folder)
    model, loaded = load(folder)
    assert len(loaded) > model.config.vocab_size
    content = json.loads((folder / "tokenizer.json").read_text())
    last = len(tokenizer)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<image>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<image>": {"id": "<image>", "ids": [last], "tokens": ["<image>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"token ids go up to {last}, but"):
        load(folder)


def test_a_tokenizer_that_tells_no_offsets_is_refused(build):
    match = "the tokenizer: ByT5Tokenizer does not tell where in a text a token lies; convert the tokenizer to a token"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.check_tokenizer(build("olmoe").config, ByT5Tokenizer())


# In processes of their own: with the environment of a job, or with its limits.

CALLS = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from moescope import checkpoints
from moescope.checkpoints import CheckpointError, describe, fetch, folder_of, identity, load
torch.set_num_threads(1)
def logits(loaded):
    return loaded[0](torch.arange(3, 40).reshape(1, -1)).logits.tolist()
def limit(which, size):
    if which == "RLIMIT_AS":
        size += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(getattr(resource, which), (size, resource.getrlimit(getattr(resource, which))[1]))
results = []
for call in json.load(sys.stdin):
    try:
        results.append(eval(call))
    except CheckpointError as error:
        results.append(f"CheckpointError: {error}")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print("RESULTS" + json.dumps(results))
"""


def run(calls, **env):
    """Results of calls in a process of their own; a CheckpointError as its text."""
    ours = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "CUDA_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env = (
        inherited | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"} | {k: str(v) for k, v in env.items()}
    )
    command = [sys.executable, "-c", CALLS, str(SCRIPTS)]
    done = subprocess.run(command, input=json.dumps(calls), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULTS")[1])


def test_limits_of_a_job_are_sentences(kept, tokenizer, tmp_path):
    big = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=8
    )
    save(AutoModelForCausalLM.from_config(big, dtype=torch.bfloat16), tokenizer, tmp_path / "big", "1GB")
    load_big, small = f"load({str(tmp_path / 'big')!r}, dtype='float32')", str(kept("olmoe"))
    results = run(
        [
            f"load({small!r}, device='cuda')",
            f"identity(load({small!r}, device='auto')[0], {{'commit': ''}})['device']",
            f"limit('RLIMIT_AS', 400 * 2**20) or {load_big}",
            f"limit('RLIMIT_AS', 100 * 2**20) or {load_big}",
            f"limit('RLIMIT_FSIZE', 1000) or load({small!r}, device='auto', max_memory={{'cpu': 0}})",
        ],
        CUDA_VISIBLE_DEVICES="",
    )
    memory = f"CheckpointError: {tmp_path}/big/: not enough memory ("
    assert results[0] == (
        "CheckpointError: device: cuda, but this job sees no GPU; ask for one, or set device to cpu or auto"
    )
    assert results[1] == "cpu"
    assert results[2].startswith(memory)
    assert results[3].startswith(memory)
    assert results[2].endswith("); ask for more, set device to auto, or dtype to bfloat16")
    assert results[4].startswith(f"CheckpointError: {small}/: no space for offloaded weights (")
    assert results[4].endswith("); free some, or let TMPDIR name a larger disk")


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_checkpoint_is_run_only_when_asked_for(kept, build, tmp_path):
    folder = shutil.copytree(kept("llama"), tmp_path / "mine")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{MINE}")
    configure(folder, model_type="mine", auto_map=CODE, architectures=["Model"])
    with pytest.raises(CheckpointError, match="mine/: comes with Python code of its own, which is run only if"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    other = shutil.copytree(folder, tmp_path / "other")
    configure(other, auto_map={name: f"someone/else--{code}" for name, code in CODE.items()})
    calls = [f"{call}({str(x)!r}, trust_remote_code=True)" for call, x in (("describe", folder), ("load", other))]
    calls.append(f"logits(load({str(folder)!r}, trust_remote_code=True))")
    described, refused, result = run(calls, HF_HOME=tmp_path / "home")
    assert "mine.py" in described["files"]
    assert (described["model_type"], described["architecture"]) == ("mine", "Model")
    assert "auto_map takes code from another repository; copy the code here" in refused
    assert torch.equal(torch.tensor(result), logits(build("llama")))
    assert (tmp_path / "ran").exists()


# The hub, as a server here that speaks as it does.

COMMITS = ("1" * 40, "2" * 40)


def blob(name, content):
    """The name that the hub gives a file: SHA-256 of large ones, git's own hash of the others."""
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Repository org/model, of which `server.folders` are the commits and `server.main` is the newest."""

    protocol_version = "HTTP/1.1"
    refusals = {  # noqa: RUF012
        "org/gated": (403, {"X-Error-Code": "GatedRepo"}),
        "org/private": (401, {"X-Error-Code": "RepoNotFound"}),
        "org/missing": (404, {"X-Error-Code": "RepoNotFound"}),
        "org/forbidden": (403, {}),
        "org/unauthorised": (401, {}),
        "org/broken": (503, {}),
    }

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: -1 if self.server.cut and "ETag" in headers else None])
            self.close_connection = self.server.cut

    def do_GET(self):
        path = self.path.split("?")[0]
        for name, (status, headers) in self.refusals.items():
            if name in path:
                return self.answer(status, b"{}", **headers)
        kind, _, revision = path.partition("/org/model/")[2].partition("/")
        revision, _, name = revision.partition("/")
        if kind == "revision":
            revision = self.server.main if revision == "main" else revision
        folder = self.server.folders.get(revision)
        if folder is None:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if kind == "revision":
            return self.answer(200, json.dumps({"id": "org/model", "sha": revision, "siblings": []}).encode())
        if kind == "tree":
            entries = [self.entry(file, folder) for file in folder.rglob("*") if file.is_file()]
            return self.answer(200, json.dumps(entries).encode())
        content = (folder / name).read_bytes()
        self.server.served.append(name)
        return self.answer(200, content, ETag=f'"{blob(name, content)}"', X_Repo_Commit=revision)

    do_HEAD = do_GET

    @staticmethod
    def entry(path, folder):
        content = path.read_bytes()
        found = {"type": "file", "path": str(path.relative_to(folder)), "size": len(content), "oid": "0" * 40}
        name = blob(path.name, content)
        lfs = {"lfs": {"oid": name, "size": len(content), "pointerSize": 1}}
        return found | (lfs if len(name) == 64 else {"oid": name})


@pytest.fixture
def hub(kept, tmp_path):
    """A server with two commits of a repository; what it served is in `served`, its address in `address`.

    With `cut` it ends every file one byte too early.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.served, server.main, server.folders, server.cut = [], COMMITS[0], {}, False
    for commit, architecture in zip(COMMITS, ("olmoe", "llama")):
        server.folders[commit] = shutil.copytree(kept(architecture), tmp_path / "hub" / commit)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


DUPLICATES = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/params.json",
    "onnx/model.onnx",
    "x.gguf",
    "code.py",
)


def test_a_model_of_the_hub_is_fetched_once_and_then_needs_no_network(hub, build, tmp_path):
    for name in DUPLICATES:
        path = hub.folders[COMMITS[0]] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"other")
    (described,) = run(["fetch('org/model', 'main')"], HF_HOME=tmp_path / "home", HF_ENDPOINT=hub.address)
    local = describe(hub.folders[COMMITS[0]])
    assert described == local | {
        "source": "hub",
        "hub": "org/model",
        "requested": "main",
        "commit": COMMITS[0],
        "folder": "",
    }
    assert set(hub.served) == set(local["files"])
    cache = tmp_path / "home" / "hub" / "models--org--model"
    hub.served.clear()
    hub.main = COMMITS[1]
    calls = [
        "fetch('org/model', 'main')",
        f"fetch('org/model', {COMMITS[0]!r})['commit']",
        f"str(folder_of({described!r}))",
        f"logits(load(folder_of({described!r})))",
        "fetch('org/model', 'nosuch')",
    ]
    # Offline, `main` is what it was when it was last looked up.
    offline = run(calls, HF_HOME=tmp_path / "home", HF_HUB_OFFLINE=1)
    assert offline[:3] == [described, COMMITS[0], str(cache / "snapshots" / COMMITS[0])]
    torch.testing.assert_close(torch.tensor(offline[3]), logits(build("olmoe")), rtol=0, atol=1e-5)
    assert offline[4].startswith("CheckpointError: org/model: cannot be fetched, and is not whole in the local cache (")
    assert offline[4].endswith("; run again where the hub is reached")
    assert not hub.served
    unreachable = run(calls[:1], HF_HOME=tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable == [described]
    moved = run(calls[:4], HF_HOME=tmp_path / "home", HF_ENDPOINT=hub.address)
    assert (moved[0]["commit"], moved[0]["model_type"]) == (COMMITS[1], "llama")
    assert moved[1:] == offline[1:4]


def test_answers_of_the_hub_are_sentences(hub, tmp_path):
    sentences = {
        "org/gated": "org/gated: is gated; accept its terms on its page, then log in",
        "org/private": "org/private: not found on the hub, or private; check the name, or log in",
        "org/missing": "org/missing: not found on the hub, or private; check the name, or log in",
        "org/forbidden": "org/forbidden: the hub refuses access; log in",
        "org/unauthorised": "org/unauthorised: the hub refuses access; log in",
        "org/broken": "org/broken: cannot be fetched, and is not whole in the local cache (",
        "no//name": "no//name: not the name of a hub repository; write it as owner/name",
    }
    calls = [f"fetch({name!r})" for name in sentences]
    calls += ["fetch('org/model', 'nosuch')", f"fetch('org/model', {'3' * 40!r})"]
    calls.append("limit('RLIMIT_FSIZE', 5000) or fetch('org/model')")
    *results, full = run(calls, HF_HOME=tmp_path / "home", HF_ENDPOINT=hub.address)
    for sentence, result in zip(sentences.values(), results):
        assert result.startswith(f"CheckpointError: {sentence}")
    for result in results[len(sentences) :]:
        assert result == (
            "CheckpointError: org/model: the hub has no such revision of it; give a branch, a tag or a full commit hash"
        )
    assert full.startswith("CheckpointError: org/model: no space to download it (")
    assert full.endswith("); free some, or let HF_HOME name a larger disk")


def test_a_connection_that_breaks_is_a_sentence(hub, tmp_path):
    hub.cut = True
    (broken,) = run(["fetch('org/model')"], HF_HOME=tmp_path / "home", HF_ENDPOINT=hub.address)
    assert broken.startswith("CheckpointError: org/model: cannot be fetched, and is not whole in the local cache (")
    hub.cut = False
    (whole,) = run(["fetch('org/model')"], HF_HOME=tmp_path / "home", HF_ENDPOINT=hub.address)
    assert whole["commit"] == COMMITS[0]


def test_no_weights_are_downloaded_of_what_could_not_be_loaded(hub, tmp_path):
    configure(hub.folders[COMMITS[0]], model_type="mine", auto_map=CODE)
    configure(hub.folders[COMMITS[1]], model_type="nosuch")
    calls = [f"fetch('org/model', {commit!r})" for commit in COMMITS]
    code, unknown = run(calls, HF_HOME=tmp_path / "home", HF_ENDPOINT=hub.address)
    assert "trust_remote_code is true" in code
    assert "does not know the model_type 'nosuch'" in unknown
    assert not [name for name in hub.served if name.endswith("safetensors")]


def cached(folder, home, commit=COMMITS[0]):
    """Lay a checkpoint into a hub cache by hand: blobs, refs and snapshots."""
    repository = home / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / commit
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        name = blob(path.name, path.read_bytes())
        shutil.copy(path, repository / "blobs" / name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_a_cache_that_was_carried_here_is_checked_and_loaded_offline(kept, build, tmp_path):
    home = tmp_path / "home"
    snapshot = cached(kept("olmoe"), home)
    shard, config = snapshot / SHARD, snapshot / "config.json"

    def rewrite(path, content):
        return f"Path({str(path)!r}).write_bytes({content!r})"

    content, text = shard.read_bytes(), config.read_bytes()
    calls = [
        "fetch('org/model')",
        "logits(load(folder_of(results[0])))",
        rewrite(shard, content[:-1] + bytes([content[-1] ^ 1])),
        "fetch('org/model')",
        rewrite(shard, content) + " and " + rewrite(config, text.replace(b"1e-05", b"1e-06")),
        "fetch('org/model')",
        rewrite(shard, content[:-1]) + " and " + rewrite(config, text),
        "fetch('org/model')",
        f"Path({str(shard)!r}).resolve().unlink()",
        "fetch('org/model')",
        "folder_of(results[0])",
    ]
    results = run(calls, HF_HOME=home, HF_HUB_OFFLINE=1)
    described, result, _, changed, _, reconfigured, _, truncated, _, missing, gone = results
    assert described["commit"] == COMMITS[0]
    assert torch.equal(torch.tensor(result), logits(build("olmoe")))
    blob_of_shard = snapshot.parents[1] / "blobs" / blob(SHARD, content)
    assert changed.startswith(f"CheckpointError: {shard}: wrong hash: ")
    assert changed.endswith(f"instead of {blob_of_shard.name}; delete {blob_of_shard} and fetch it again")
    assert reconfigured.startswith(f"CheckpointError: {config}: wrong hash: ")
    assert truncated.startswith(f"CheckpointError: {shard}: truncated or no safetensors file (")
    assert truncated.endswith(f"delete {blob_of_shard} and run again")
    assert f"1 of 9 files of weights missing ({SHARD}); fetch it again" in missing
    assert gone.startswith(f"CheckpointError: {snapshot}/: {SHARD} is gone; run `hf download ")

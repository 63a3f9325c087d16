"""Checkpoints: fetching one from the hub, naming what exactly it is, and loading it.

A network is needed by `fetch` alone. What is loaded lies in one folder, as safetensors, and every
weight of the model comes from there: the library's own loading fills what is missing at random.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import resolve_revision, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from moescope.artifacts import digest, is_full, one_line, read_json, remake

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
# All that is loaded beside the weights. A repository may hold the same weights several times, in other formats.
PARTS = (
    *(CONFIG, INDEX, "generation_config.json", *VOCABULARY, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*"),
)
# The library would read these instead of the weights, or follow the name of another model in them.
FOREIGN = {
    "adapter_config.json": "is an adapter to a model; merge it into that model and save the whole",
    "shard-*-model-*.safetensors": "is part of a distributed checkpoint; save the model whole with save_pretrained",
}
NO_MEMORY = re.compile(r"allocate memory|out of memory", re.IGNORECASE)
NEEDS_CODE = (
    "comes with Python code of its own, which is run only if the model's trust_remote_code is true;"
    " read that code before you set it"
)
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
HUB = {
    GatedRepoError: f"is gated; accept its terms on its page, then {LOGIN}",
    HFValidationError: "not the name of a hub repository; write it as owner/name",
    RevisionNotFoundError: "the hub has no such revision of it; give a branch, a tag or a full commit hash",
    RepositoryNotFoundError: f"not found on the hub, or private; check the name, or {LOGIN}",
}
# Whatever a strange configuration makes the library's model classes raise.
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be had or loaded: one sentence with the mend."""


def fetch(hub: str, revision: str = "main", trust_remote_code: bool = False) -> dict[str, Any]:
    """Download a model of the hub into the local cache, and describe it (see `describe`).

    `revision` is a branch, a tag or a commit hash; it is looked up once. Without a network, the cache
    is all that is looked into. The configuration is checked before any weights are downloaded, and all
    files against the hashes that the hub named. Raises CheckpointError.
    """
    parts = [*PARTS, "*.py"] if trust_remote_code else list(PARTS)
    with _sentences_of_the_hub(hub):
        resolved = resolve_revision(hub, revision=revision)
        # Files at the top only: a folder within holds the weights once more in a format of its maker.
        folder = Path(snapshot_download(hub, revision=resolved, allow_patterns=parts, ignore_patterns="*/*"))
        with _sentences_of_loading(folder):
            _config(folder, trust_remote_code)
        snapshot_download(hub, revision=resolved, allow_patterns=WEIGHTS, ignore_patterns="*/*")
        if not (folder / WEIGHTS).exists():
            snapshot_download(hub, revision=resolved, allow_patterns=_weight_names(folder), ignore_patterns="*/*")
    description = describe(folder, trust_remote_code=trust_remote_code)
    for name in description["files"]:
        _check_against_cache(folder / name, description["files"][name])
    of_the_hub = {"source": "hub", "hub": hub, "requested": revision, "commit": resolved.resolved, "folder": ""}
    return description | of_the_hub


def describe(folder: str | Path, source: str = "folder", trust_remote_code: bool = False) -> dict[str, Any]:
    """What names a local checkpoint, all of it JSON: its origin, its architecture, and SHA-256 of its files.

    `commit` is the digest over the names and hashes of the files that are loaded: of the weights, the
    tokenizer and the configuration, not of what lies beside them. Raises CheckpointError for a
    checkpoint that cannot be complete.
    """
    folder = Path(folder)
    with _sentences_of_loading(folder):
        config = _config(folder, trust_remote_code)
        weights = _weights(folder)
    parts = [*PARTS, "*.py"] if trust_remote_code else PARTS
    names = {path.name for pattern in parts for path in folder.glob(pattern) if path.exists()}
    names |= {path.name for path in weights}
    files = {name: _sha256(folder / name) for name in sorted(names - ({INDEX} if WEIGHTS in names else set()))}
    return {
        "source": source,
        "hub": "",
        "requested": "",
        "commit": digest(json.dumps(files).encode()),
        "folder": str(folder),
        "model_type": config.model_type,
        "architecture": (config.architectures or [""])[0],
        "files": files,
    }


def folder_of(description: Mapping[str, Any]) -> Path:
    """Where the files of a description lie, for the hub in the local cache; the network is not asked.

    Raises CheckpointError if any of them is gone, or, of a toy, has another content than was described. The
    weights of other models take too long to be hashed at every load; their sizes are compared when they are read.
    """
    if description["source"] != "hub":
        folder, mend = Path(description["folder"]), "put it back, or run the rule that made it"
    else:
        config = try_to_load_from_cache(description["hub"], CONFIG, revision=description["commit"])
        name = f"{description['hub']} at {description['commit']}"
        folder, mend = (
            Path(config).parent if isinstance(config, str) else Path(name),
            (f"run `hf download {description['hub']} --revision {description['commit']}`"),
        )
    gone = [name for name in description["files"] if not (folder / name).exists()]
    if gone:
        raise CheckpointError(f"{folder}/: {_few(gone)} {'is' if len(gone) == 1 else 'are'} gone; {mend}")
    for name, sha256 in description["files"].items() if description["source"] == "toy" else ():
        if _sha256(folder / name) != sha256:
            raise CheckpointError(
                f"{folder / name}: damaged: its content is not what was written; {remake(folder / name)}"
            )
    return folder


def load(
    folder: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    attention_backend: str | None = None,
    experts_backend: str | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A causal language model in evaluation mode, without gradients, and its tokenizer, from a local folder.

    `device` is "cpu", "cuda" (the job's first GPU) or "auto": over the job's GPUs, then in memory, then
    on disk (in TMPDIR). `max_memory` bounds what "auto" may take: sizes such as "40GiB" for "0", "1", ...
    (GPUs) and "cpu"; a device that it leaves out gets nothing. A backend of None is the library's
    default. Raises CheckpointError for whatever cannot be loaded whole.
    """
    folder = Path(folder)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(f"device: {device}, but this job sees no GPU; ask for one, or set device to cpu or auto")
    transformers_logging.disable_progress_bar()
    with _sentences_of_loading(folder), ExitStack() as stack:
        config = _config(folder, trust_remote_code)
        _weights(folder)
        if dtype != "auto" and getattr(config, "quantization_config", None):
            # The library would convert the quantised weights and leave the others as they are.
            raise CheckpointError(
                f"{folder}/: a quantised checkpoint has its own dtype, not {dtype}; set dtype to auto"
            )
        tokenizer = _tokenizer(folder, trust_remote_code)
        check_tokenizer(config, tokenizer)
        placement: dict[str, Any] = {"device_map": {"cpu": None, "cuda": "cuda:0"}.get(device, device)}
        if device == "auto":
            bounds = {int(name) if name.isdigit() else name: size for name, size in (max_memory or {}).items()}
            offload = stack.enter_context(tempfile.TemporaryDirectory(prefix="moescope."))
            placement |= {"max_memory": bounds or None, "offload_folder": offload}
        model, found = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            # Also where they are None: a configuration may name a backend that would be downloaded.
            attn_implementation=attention_backend,
            experts_implementation=experts_backend,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # _check_whole names them
            output_loading_info=True,
            **placement,
        )
        _check_whole(folder, found)
        weakref.finalize(model, stack.pop_all().close)
    return model.eval().requires_grad_(False), tokenizer


def load_described(path: str | Path, **settings: Any) -> tuple[PreTrainedModel, Any]:
    """`load` for the model that a description file names."""
    return load(folder_of(read_json(path)), **settings)


def config_of(description: Mapping[str, Any], trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a described model."""
    folder = folder_of(description)
    with _sentences_of_loading(folder):
        return _config(folder, trust_remote_code)


def glimpse(description: Mapping[str, Any], trust_remote_code: bool = False) -> tuple[PreTrainedConfig, Any]:
    """The configuration of a described model, and its tokenizer; weights are not looked at."""
    config, folder = config_of(description, trust_remote_code), folder_of(description)
    with _sentences_of_loading(folder):
        return config, _tokenizer(folder, trust_remote_code)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model: of a model that reads images too, only text is ever given to it."""
    sees = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    text_only = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type not in sees
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def check_tokenizer(config: PreTrainedConfig, tokenizer: Any) -> None:
    """Raises CheckpointError for a tokenizer of another model, or one that cannot tell a token's place in a text.

    Added tokens may have no row in the embedding, if no text gets them by itself: some models ship such.
    """
    where = f"{tokenizer.name_or_path or 'the tokenizer'}: "
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{where}{type(tokenizer).__name__} does not tell where in a text a token lies;"
            " convert the tokenizer to a tokenizer.json"
        )
    rows = config.get_text_config().vocab_size
    added = set(tokenizer.added_tokens_decoder)
    last = max([i for i in tokenizer.get_vocab().values() if i not in added] + tokenizer("a")["input_ids"], default=0)
    if last >= rows:
        raise CheckpointError(
            f"{where}token ids go up to {last}, but the model has {rows} embeddings;"
            " this is the tokenizer of another model, put the right one there"
        )


def identity(model: PreTrainedModel, description: Mapping[str, Any]) -> dict[str, str]:
    """What names a loaded model, and what runs it, in the provenance of an artifact."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    devices = dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed.values())
    return {
        "model_commit": description["commit"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "experts_backend": str(getattr(model.config, "_experts_implementation", None)),
        "attention_backend": str(getattr(model.config, "_attn_implementation", None)),
        "device": " ".join(devices),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}/: no such folder; give the folder of a checkpoint")
    for pattern, mend in FOREIGN.items():
        for path in folder.glob(pattern):
            raise CheckpointError(f"{path}: {mend}")
    raw = _json(folder / CONFIG)
    # Without a vocabulary the library makes up an empty tokenizer.
    if not any(path for pattern in VOCABULARY for path in folder.glob(pattern)):
        raise CheckpointError(f"{folder}/: no tokenizer (tokenizer.json or the like); put the model's tokenizer there")
    version = f"transformers {transformers.__version__} does not know the"
    kind, own_code = str(raw.get("model_type")), raw.get("auto_map") or {}
    quantised = raw.get("quantization_config") or {}
    if kind not in CONFIG_MAPPING_NAMES and not own_code:
        raise CheckpointError(f"{folder / CONFIG}: {version} model_type '{kind}'; take a model that it knows")
    if kind not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        raise CheckpointError(f"{folder}/: {NEEDS_CODE}")
    if trust_remote_code and "--" in json.dumps(own_code):
        raise CheckpointError(f"{folder / CONFIG}: auto_map takes code from another repository; copy the code here")
    if quantised and not AutoHfQuantizer.supports_quant_method(quantised):
        # The library would take the quantised numbers for the weights.
        method = quantised["quant_method"]
        raise CheckpointError(f"{folder / CONFIG}: {version} quant_method '{method}'; take the model unquantised")
    if "transformers_weights" in raw:
        raise CheckpointError(f"{folder / CONFIG}: transformers_weights names other weights; take the key out")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    heads, sees = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    masked = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - set(heads.values())
    if (
        not (kind in heads or kind in sees or "AutoModelForCausalLM" in own_code)
        or getattr(config, "is_encoder_decoder", False)
        or masked & set(config.architectures or [])
    ):
        raise CheckpointError(
            f"{folder / CONFIG}: {(config.architectures or [kind])[0]} is no causal language model;"
            " give a model that predicts the next token"
        )
    how = AUTO_QUANTIZATION_CONFIG_MAPPING.get(quantised.get("quant_method", ""))
    if how is not None and "dequantize" in inspect.signature(how).parameters:
        # Plain weights can be read; the library would otherwise do this on some machines and not on others.
        config.quantization_config["dequantize"] = True
    return config


def _weight_names(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise CheckpointError(
            f"{folder}/: no weights as safetensors ({WEIGHTS} or {INDEX});"
            " save the model as safetensors with save_pretrained, other formats are not read"
        )
    weight_map = _json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder / INDEX}: names no safetensors files beside it; delete it and fetch it again")
    return names


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as its file describes it, where it names no class of its own.

    AutoTokenizer would take the class of the model's family instead (Qwen2's, say), which splits words in its own way.
    """
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class") if path.exists() else None
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _weights(folder: Path) -> list[Path]:
    paths = [folder / name for name in _weight_names(folder)]
    gone = [path.name for path in paths if not path.exists()]
    if gone:
        raise CheckpointError(
            f"{folder}/: {len(gone)} of {len(paths)} files of weights missing ({_few(gone)}); fetch it again"
        )
    for path in paths:
        try:
            # Compares the sizes that the header names with the size of the file.
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: truncated or no safetensors file ({one_line(error)}); delete {_it(path)} and run again"
            ) from error
    return paths


def _check_whole(folder: Path, found: Mapping[str, Collection[Any]]) -> None:
    missing, wrong = sorted(found["missing_keys"]), sorted(key for key, *_ in found["mismatched_keys"])
    for keys, what in ((missing, "not in the files"), (wrong, f"of another shape than {CONFIG} says")):
        if keys:
            raise CheckpointError(
                f"{folder}/: {len(keys)} weights {what} ({_few(keys)}); fetch or save the checkpoint again"
            )
    unused = sorted(found["unexpected_keys"])
    if unused:
        logging.warning("%s/: %d weights are not used by the model (%s)", folder, len(unused), _few(unused))


def _check_against_cache(path: Path, sha256: str) -> None:
    """Compare a file with the hash that the cache keeps it under: SHA-256 of a large file, git's own of a small one."""
    kept = path.readlink().name if path.is_symlink() else ""
    found = sha256 if len(kept) == 64 else _git_sha1(path) if len(kept) == 40 else kept
    if kept != found:
        raise CheckpointError(f"{path}: wrong hash: {found} instead of {kept}; delete {_it(path)} and fetch it again")


def _it(path: Path) -> str:
    """A file to be deleted: in the hub's cache not the link to it, which would be linked again."""
    return str(path.resolve()) if path.is_symlink() else "it"


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs it, save or fetch the model again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)}); delete it and fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object; delete it and fetch it again")
    return found


def _few(names: Collection[str], n: int = 3) -> str:
    return ", ".join(list(names)[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


@contextmanager
def _sentences_of_loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FAILURES as error:
        text = one_line(error) or type(error).__name__
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY.search(text):
            mend = f"not enough memory ({text}); ask for more, set device to auto, or dtype to bfloat16"
        elif is_full(error):
            mend = f"no space for offloaded weights ({text}); free some, or let TMPDIR name a larger disk"
        elif isinstance(error, ImportError):
            mend = f"needs a package that is not installed ({text}); install it in the environment of the model rules"
        elif "trust_remote_code" in text:
            mend = NEEDS_CODE
        elif "_implementation=" in text or "`dtype`" in text:
            mend = f"cannot be loaded with these settings ({text}); change the one it names"
        else:
            mend = f"cannot be loaded ({text}); delete it and run again"
        raise CheckpointError(f"{folder}/: {mend}") from error


@contextmanager
def _sentences_of_the_hub(hub: str) -> Iterator[None]:
    try:
        yield
    except (HFValidationError, RevisionResolutionError, HTTPError, OSError, RuntimeError) as error:
        text = one_line(error)
        mend = f"cannot be fetched, and is not whole in the local cache ({text}); run again where the hub is reached"
        if is_full(error):
            mend = f"no space to download it ({text}); free some, or let HF_HOME name a larger disk"
        elif isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            mend = f"the hub refuses access; {LOGIN}, with a token that may read it"
        mend = next((sentence for kind, sentence in HUB.items() if isinstance(error, kind)), mend)
        raise CheckpointError(f"{hub}: {mend}") from error

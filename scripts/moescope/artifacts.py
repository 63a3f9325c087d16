"""Reading and writing of artifacts: Parquet for tables, safetensors for tensors, both with provenance, and JSON.

A file appears whole or not at all: it is written beside its place, flushed to disk and renamed.
Each file names its kind and its schema version; a reader refuses what it does not know.
Each file holds a seal, the SHA-256 of the whole file with zeros in the seal's place; a reader refuses what has
another content than was sealed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moescope import __version__

if TYPE_CHECKING:
    from torch import Tensor

KEY = "moescope"
SEAL_KEY = "seal"
MARK = "moescope-sha256:"
UNSEALED = MARK + "0" * 64
PIECE = 2**22
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As libraries in Rust say it.
NO_SPACE = re.compile(rf"os error ({'|'.join(map(str, FULL))})\b")
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)
NAMES = (
    "dataset_digest",
    "model_commit",
    "dtype",
    "attention_backend",
    "experts_backend",
    "device",
    "torch",
    "transformers",
)
MAX_HEADER = 2**17
SAFETENSORS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
}
SCHEMAS = {
    "dataset": 2,
    "prompts": 2,
    "dropped": 2,
    "activations": 3,
    "layers": 1,
    "heads": 1,
    "experts": 1,
    "margins": 1,
    "neurons": 1,
    "attention_neurons": 1,
    "relation_neurons": 1,
    "concentration": 1,
    "neuron_sums": 1,
    "queries": 1,
    "value_layers": 1,
    "readings": 1,
    "unknown": 1,
    "blocking": 2,
    "blocked_experts": 1,
    "keep_only": 1,
    "expert_map": 1,
    "head_map": 1,
    "head_router": 1,
    "head_blocking": 1,
    "blocked_heads": 1,
    "gate_gradients": 1,
    "gate_paths": 1,
    "tracing": 1,
    "tracing_runs": 1,
    "associations": 1,
    "router_attribution": 1,
    "texts": 1,
    "units": 1,
    "key_neurons": 1,
    "expert_tokens": 1,
    "masking": 1,
    "masked_units": 1,
    "checkpoint": 1,
    "checkpoints": 1,
    "loads": 1,
    "gates": 1,
    "table": 1,
}


class ArtifactError(ValueError):
    """A file that cannot be read as what it should be."""


def provenance(
    settings: Mapping[str, Any], code: str, inherited: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """What made an artifact: settings and code digest of its rule, package versions, time (UTC), and `more`.

    From the provenance of an artifact that it was made from it inherits what names the data and the model.
    """
    return {
        **names(inherited or {}),
        "settings": dict(settings),
        "settings_digest": digest(json.dumps(settings, sort_keys=True).encode()),
        "code_digest": code,
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that results depend on, where they are installed."""
    found = {"moescope": __version__}
    for package in ("torch", "transformers", "numpy", "pandas", "pyarrow", "snakemake"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def names(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that names the data and the model."""
    return {key: made_by[key] for key in NAMES if key in made_by}


def digest(content: bytes) -> str:
    """Short name of a content: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """`digest` of a file's content, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to beside `path`; renamed to `path` when the block ends well, removed when it does not."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with sentences_of_the_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            with beside.open("rb") as stream:
                os.fsync(stream.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def sentences_of_the_disk(path: str | Path) -> Iterator[None]:
    """What cannot be written to `path` because of the disk is an ArtifactError with the mend."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            mend = "the disk is full; free space"
        elif getattr(error, "errno", None) in LOCKED:
            mend = "make its folder writable"
        else:
            raise
        raise ArtifactError(
            f"{path}: cannot be written ({one_line(error)}): {mend}, then run the same command"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a disk without space caused an error."""
    return getattr(error, "errno", None) in FULL or bool(NO_SPACE.search(str(error)))


@contextmanager
def sealing(path: str | Path) -> Iterator[Path]:
    """`replacing` for a file into which the block writes UNSEALED once: it is the seal's place."""
    with replacing(path) as beside:
        yield beside
        with beside.open("r+b") as stream:
            sha256, at, _ = _hash(stream)
            stream.seek(at + len(MARK))
            stream.write(sha256.encode())


def check_seal(path: str | Path) -> None:
    """Raises ArtifactError for a file whose content is not what was sealed; read once in a process."""
    path = Path(path)
    try:
        status = path.stat()
        sha256, seal = _sealed(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({one_line(error)}); {remake(path)}") from error
    if not seal:
        why = "cut short, not made by moescope, or made by an older version of it"
        raise ArtifactError(f"{path}: no seal inside: {why}; {remake(path)}")
    if seal != MARK + sha256:
        raise ArtifactError(f"{path}: damaged: its content is not what was written; {remake(path)}")


def remake(path: Path) -> str:
    """What makes a damaged file anew."""
    # The earlier states of a toy model are one output: Snakemake does not miss a single file of theirs.
    above = [folder for folder in path.parents if folder.name == "checkpoints"]
    return f"delete {f'{above[0]}/' if above else 'it'} and run again"


@cache
def _sealed(path: Path, *as_it_is: int) -> tuple[str, str]:
    with path.open("rb") as stream:
        sha256, _, seal = _hash(stream)
    return sha256, seal


def _hash(stream: BinaryIO) -> tuple[str, int, str]:
    """SHA-256 of a file with zeros in its seal, where the seal begins (-1: nowhere), and the seal."""
    sha256, done, at, found, data = hashlib.sha256(), 0, -1, b"", b""
    while piece := stream.read(PIECE):
        data += piece
        place = data.find(MARK.encode()) if at < 0 else -1
        if 0 <= place <= len(data) - len(UNSEALED):
            end = place + len(UNSEALED)
            at, found = done + place, data[place:end]
            data = data[:place] + UNSEALED.encode() + data[end:]
        # A seal may begin in this piece and end in the next.
        keep = len(UNSEALED) if at < 0 else 0
        ready = max(0, len(data) - keep)
        sha256.update(data[:ready])
        done, data = done + ready, data[ready:]
    sha256.update(data)
    return sha256.hexdigest(), at, found.decode(errors="replace")


def write_table(table: pd.DataFrame, path: str | Path, kind: str, made_by: Mapping[str, Any]) -> None:
    """Write a table as Parquet with its provenance in the file's metadata."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **_header(kind, made_by)})
    # A third smaller than by default: floats are split into streams of their bytes, integers into differences.
    floats = [field.name for field in arrow.schema if pa.types.is_floating(field.type)]
    integers = {field.name: "DELTA_BINARY_PACKED" for field in arrow.schema if pa.types.is_integer(field.type)}
    rest = [field.name for field in arrow.schema if field.name not in {*floats, *integers}]
    encodings: dict[str, Any] = {"use_byte_stream_split": floats, "column_encoding": integers, "use_dictionary": rest}
    with sealing(path) as beside:
        pq.write_table(arrow, beside, compression="zstd", **encodings)


def read_table(path: str | Path, kind: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Read a table of the given kind. Raises ArtifactError for a damaged file or an unknown kind or version."""
    check_seal(path)
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"{path}: not a readable Parquet file ({one_line(error)}); delete it and run again"
        ) from error
    _check_header(path, (table.schema.metadata or {}).get(KEY.encode()), kind)
    return table.to_pandas()


def table_provenance(path: str | Path) -> dict[str, Any]:
    """The provenance that a table's file carries. Raises ArtifactError for a damaged file."""
    check_seal(path)
    return json.loads(pq.read_schema(path).metadata[KEY.encode()])["provenance"]


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV for people and spreadsheets; six significant digits."""
    with replacing(path) as beside:
        table.to_csv(beside, index=False, float_format="%.6g")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises ArtifactError for a damaged file."""
    check_seal(path)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    del content[SEAL_KEY]
    return content


def write_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a JSON object, whole or not at all."""
    with sealing(path) as beside:
        beside.write_text(json.dumps({SEAL_KEY: UNSEALED, **content}, indent=2) + "\n", encoding="utf-8")


class TensorFile:
    """A safetensors file that is written batch by batch, so that memory does not grow with the number of rows.

    Every tensor has `rows` rows. `made_by` is its provenance, which may be known only at the end.
    """

    def __init__(self, stream: BinaryIO, kind: str, rows: int) -> None:
        self.made_by: Mapping[str, Any] = {}
        self._stream, self._kind, self._rows = stream, kind, rows
        self._layout: dict[str, dict[str, Any]] = {}
        self._start, self._done = 0, 0

    def put(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the rows of a batch, the first of which is `row`; the first batch fixes names, shapes and dtypes."""
        if not self._layout:
            self._lay_out(tensors)
        for name, tensor in tensors.items():
            place = self._layout[name]
            row_bytes = tensor.shape[1:].numel() * tensor.element_size()
            self._stream.seek(self._start + place["data_offsets"][0] + row * row_bytes)
            self._stream.write(_bytes(tensor))
        self._done += len(next(iter(tensors.values())))

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        offset = 0
        # Widest types first, as the format's own writer does: every tensor is then aligned.
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            size = tensor.shape[1:].numel() * tensor.element_size() * self._rows
            shape = [self._rows, *tensor.shape[1:]]
            place = {"dtype": SAFETENSORS[str(tensor.dtype)], "shape": shape, "data_offsets": [offset, offset + size]}
            self._layout[name] = place
            offset += size
        self._start = 8 + (len(json.dumps(self._layout)) + MAX_HEADER) // 8 * 8

    def close(self) -> None:
        """Write the header. Raises ArtifactError if rows are missing."""
        if self._done != self._rows:
            raise ArtifactError(f"{self._done} of {self._rows} rows were written; run again")
        metadata = {"__metadata__": _header(self._kind, self.made_by)}
        header = json.dumps(metadata | self._layout).encode().ljust(self._start - 8)
        self._stream.seek(0)
        self._stream.write(len(header).to_bytes(8, "little") + header)


@contextmanager
def writing_tensors(path: str | Path, kind: str, rows: int) -> Iterator[TensorFile]:
    """A safetensors file of tensors with `rows` rows, to be put in batch by batch; whole at the end or not there."""
    with sealing(path) as beside, beside.open("wb") as stream:
        file = TensorFile(stream, kind, rows)
        yield file
        file.close()


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def open_tensors(path: str | Path, kind: str) -> Iterator[Any]:
    """A lazily read safetensors file (`get_tensor(name)`, `keys()`). Raises ArtifactError like `read_table`."""
    from safetensors import SafetensorError, safe_open

    check_seal(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path}: not a readable safetensors file ({one_line(error)}); delete it and run again"
        ) from error
    with file as tensors:
        _check_header(path, (tensors.metadata() or {}).get(KEY), kind)
        yield tensors


def tensor_index(paths: Sequence[str | Path], kind: str) -> dict[str, Any]:
    """What a set of safetensors files holds: for each file its tensors (shape, dtype), and the provenance.

    Raises ArtifactError like `read_table`. Needs no torch.
    """
    shards, made_by = {}, {}
    for path in map(Path, paths):
        check_seal(path)
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        metadata = header.pop("__metadata__")
        _check_header(path, metadata.get(KEY), kind)
        shards[path.name] = {name: [tensor["shape"], tensor["dtype"]] for name, tensor in header.items()}
        made_by = json.loads(metadata[KEY])["provenance"]
    return {"kind": kind, "schema": SCHEMAS[kind], "provenance": made_by, "shards": shards}


def _header(kind: str, made_by: Mapping[str, Any]) -> dict[str, str]:
    header = {"kind": kind, "schema": SCHEMAS[kind], "provenance": dict(made_by)}
    return {KEY: json.dumps(header), SEAL_KEY: UNSEALED}


def _check_header(path: str | Path, header: str | bytes | None, kind: str) -> None:
    if header is None:
        raise ArtifactError(f"{path}: not made by moescope (no provenance inside); delete it and run again")
    found = json.loads(header)
    if found["kind"] != kind:
        raise ArtifactError(f"{path}: holds '{found['kind']}', not '{kind}'; delete it and run again")
    if found["schema"] != SCHEMAS[kind]:
        raise ArtifactError(
            f"{path}: schema version {found['schema']} of '{kind}', this code reads {SCHEMAS[kind]}; run it again"
        )
    made_for = found["provenance"].get("settings", {})
    for name in (made_for[key] for key in ("dataset", "model") if key in made_for):
        if name not in Path(path).parts:
            raise ArtifactError(f"{path}: was made for '{name}' and does not belong here; delete it and run again")


def one_line(error: Exception) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())

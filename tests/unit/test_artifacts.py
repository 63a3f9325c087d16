import json
from functools import cache

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moescope import artifacts
from moescope.artifacts import ArtifactError

from conftest import write_tensors

TABLE = pd.DataFrame({"a": [1, 2, 3], "b": [[1], [2, 3], []]})


def test_a_table_comes_back_with_its_provenance(tmp_path):
    made_by = artifacts.provenance({"k": 1}, "abc", {"dataset_digest": "d", "time": "old"}, extra=2)
    artifacts.write_table(TABLE, tmp_path / "t.parquet", "table", made_by)
    back = artifacts.read_table(tmp_path / "t.parquet", "table")
    assert back["a"].tolist() == [1, 2, 3]
    assert [list(x) for x in back["b"]] == [[1], [2, 3], []]
    found = artifacts.table_provenance(tmp_path / "t.parquet")
    assert found == made_by
    assert (found["code_digest"], found["settings"], found["dataset_digest"], found["extra"]) == (
        "abc",
        {"k": 1},
        "d",
        2,
    )
    assert found["time"] != "old"
    assert {"torch", "transformers", "pandas"} <= set(found["versions"])


def test_tensors_come_back_bit_for_bit_in_their_own_dtype(tmp_path):
    tensors = {"x": torch.randn(3, 4).bfloat16(), "y": torch.arange(6, dtype=torch.int16).reshape(2, 3).T}
    write_tensors(tensors, tmp_path / "t.safetensors")
    with artifacts.open_tensors(tmp_path / "t.safetensors", "activations") as back:
        for name, tensor in tensors.items():
            assert torch.equal(back.get_tensor(name), tensor)
            assert back.get_tensor(name).dtype == tensor.dtype
    index = artifacts.tensor_index([tmp_path / "t.safetensors"], "activations")
    assert index["shards"]["t.safetensors"] == {"x": [[3, 4], "BF16"], "y": [[3, 2], "I16"]}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("old")

    def fail():
        with artifacts.replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_never_sees_a_half_new_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with path.open() as reader:
        artifacts.write_csv(TABLE, path)
        assert reader.read() == "old"
    assert path.read_text().startswith("a,b")


def read_tensors(path):
    with artifacts.open_tensors(path, "activations") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


KINDS = {
    "t.parquet": (
        lambda path: artifacts.write_table(TABLE, path, "table", {"settings": {}}),
        lambda path: artifacts.read_table(path, "table"),
    ),
    "t.safetensors": (lambda path: write_tensors({"x": torch.arange(900)}, path), read_tensors),
    "t.json": (lambda path: artifacts.write_json({"steps": 5, "files": ["a"]}, path), artifacts.read_json),
}


@cache
def content(name, folder):
    path = folder / name
    KINDS[name][0](path)
    return path.read_bytes()


def refuse(path, damaged):
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    artifacts._sealed.cache_clear()  # The clock of the file system may be coarser than this test is fast.
    with pytest.raises(ArtifactError, match=rf"{path.name}: .*; delete it and run again") as refusal:
        KINDS[path.name][1](path)
    return str(refusal.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_empty_or_foreign_file_is_named_and_refused(tmp_path, name):
    whole = content(name, tmp_path)
    foreign = {
        "t.parquet": TABLE.to_parquet(),
        "t.safetensors": (2).to_bytes(8, "little") + b"{}",
        "t.json": b'{"steps": 5}',
    }
    for damaged in (b"", whole[: len(whole) // 2], b"hello" + whole[5:], foreign[name], b"PNG"):
        assert refuse(tmp_path / name, damaged)
    assert "not made by moescope, or made by an older version" in refuse(tmp_path / name, foreign[name])
    assert "damaged" in refuse(tmp_path / name, whole + b" ")
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: cannot be read"):
        KINDS[name][1](tmp_path / name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.booleans())
def test_any_flipped_bit_and_any_cut_is_refused(tmp_path, name, place, cut):
    whole = content(name, tmp_path)
    at, bit = divmod(place % (8 * len(whole)), 8)
    flipped = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    refuse(tmp_path / name, whole[:at] if cut else flipped)


@pytest.mark.parametrize("name", KINDS)
def test_every_single_bit_of_the_seal_counts(tmp_path, name):
    whole = content(name, tmp_path)
    start = whole.index(artifacts.MARK.encode())
    for at in range(start, start + len(artifacts.UNSEALED)):
        for bit in range(8):
            refuse(tmp_path / name, whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])


def test_a_sealed_file_is_read_by_any_other_program(tmp_path):
    for name in KINDS:
        content(name, tmp_path)
    assert pd.read_parquet(tmp_path / "t.parquet")["a"].tolist() == [1, 2, 3]
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], torch.arange(900))
    assert json.loads((tmp_path / "t.json").read_text()).items() >= {"steps": 5, "files": ["a"]}.items()
    assert artifacts.read_json(tmp_path / "t.json") == {"steps": 5, "files": ["a"]}


@pytest.mark.parametrize("padding", [0, 1, 40, 79, 80, 81, 100])
def test_a_seal_is_found_where_two_pieces_meet(tmp_path, monkeypatch, padding):
    monkeypatch.setattr(artifacts, "PIECE", 100)
    path = tmp_path / "t.json"
    artifacts.write_json({"x": "y" * 300}, path)
    assert artifacts.read_json(path) == {"x": "y" * 300}
    with artifacts.sealing(path) as beside:
        beside.write_text(" " * padding + json.dumps({"seal": artifacts.UNSEALED, "x": 1}))
    assert artifacts.read_json(path) == {"x": 1}
    path.write_text(path.read_text() + " ")
    with pytest.raises(ArtifactError, match="damaged"):
        artifacts.read_json(path)


def test_another_kind_version_or_place_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    artifacts.write_table(TABLE, path, "heads", {})
    with pytest.raises(ArtifactError, match="holds 'heads', not 'layers'"):
        artifacts.read_table(path, "layers")

    header = json.dumps({"kind": "heads", "schema": 999, "provenance": {}})
    table = pq.read_table(path).replace_schema_metadata({artifacts.KEY: header, "seal": artifacts.UNSEALED})
    with artifacts.sealing(path) as beside:
        pq.write_table(table, beside)
    with pytest.raises(ArtifactError, match="schema version 999"):
        artifacts.read_table(path, "heads")

    made_by = {"settings": {"dataset": "facts", "model": "one"}}
    for model in ("one", "other"):
        artifacts.write_table(TABLE, tmp_path / f"facts/{model}/t.parquet", "heads", made_by)
    assert len(artifacts.read_table(tmp_path / "facts/one/t.parquet", "heads")) == 3
    with pytest.raises(ArtifactError, match=r"other/t.parquet: was made for 'one' and does not belong here"):
        artifacts.read_table(tmp_path / "facts/other/t.parquet", "heads")


def test_a_damaged_state_of_training_is_made_anew_with_its_folder(tmp_path):
    path = tmp_path / "checkpoints/early/model.json"
    artifacts.write_json({}, path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=f"early/model.json: no seal .*; delete {tmp_path}/checkpoints/ and run"):
        artifacts.read_json(path)


def test_csv_has_six_digits_and_no_index(tmp_path):
    artifacts.write_csv(pd.DataFrame({"x": [1 / 3], "n": [7]}), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "x,n\n0.333333,7\n"


def test_tensors_written_in_batches_are_those_written_at_once(tmp_path):
    tensors = {"x": torch.randn(7, 3, 2), "n": torch.arange(7, dtype=torch.int16), "h": torch.randn(7, 5).bfloat16()}
    write_tensors(tensors, tmp_path / "once.safetensors", made_by={"a": 1})
    with artifacts.writing_tensors(tmp_path / "batches.safetensors", "activations", 7) as file:
        for rows in (slice(5, 7), slice(0, 3), slice(3, 5)):
            file.put(rows.start, {name: tensor[rows] for name, tensor in tensors.items()})
        file.made_by = {"a": 1}
    assert (tmp_path / "once.safetensors").read_bytes() == (tmp_path / "batches.safetensors").read_bytes()
    for name, tensor in load_file(tmp_path / "once.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_a_file_with_missing_rows_does_not_appear(tmp_path):
    def write():
        with artifacts.writing_tensors(tmp_path / "t.safetensors", "activations", 7) as file:
            file.put(0, {"x": torch.ones(6)})

    with pytest.raises(artifacts.ArtifactError, match="6 of 7 rows were written"):
        write()
    assert not list(tmp_path.iterdir())

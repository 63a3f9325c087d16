import json

import pandas as pd
import pytest
import torch

from moescope import artifacts

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
    artifacts.write_text("old", path)

    def fail():
        with artifacts.replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_never_sees_a_half_new_one(tmp_path):
    path = tmp_path / "t.txt"
    artifacts.write_text("old", path)
    with path.open() as reader:
        artifacts.write_text("something new", path)
        assert reader.read() == "old"
    assert path.read_text() == "something new"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello" + b[5:]])
def test_damaged_files_are_named_and_refused(tmp_path, damage):
    artifacts.write_table(TABLE, tmp_path / "t.parquet", "table", {})
    write_tensors({"x": torch.ones(9)}, tmp_path / "t.safetensors")
    for path in tmp_path.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(artifacts.ArtifactError, match=r"t.parquet: .* delete it and run again"):
        artifacts.read_table(tmp_path / "t.parquet", "table")
    with (
        pytest.raises(artifacts.ArtifactError, match=r"t.safetensors: .* delete it and run again"),
        artifacts.open_tensors(tmp_path / "t.safetensors", "activations"),
    ):
        pass


def test_foreign_unknown_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    TABLE.to_parquet(path)
    with pytest.raises(artifacts.ArtifactError, match="not made by moescope"):
        artifacts.read_table(path, "table")
    artifacts.write_table(TABLE, path, "heads", {})
    with pytest.raises(artifacts.ArtifactError, match="holds 'heads', not 'layers'"):
        artifacts.read_table(path, "layers")
    import pyarrow.parquet as pq

    header = json.dumps({"kind": "heads", "schema": 999, "provenance": {}})
    pq.write_table(pq.read_table(path).replace_schema_metadata({artifacts.KEY: header}), path)
    with pytest.raises(artifacts.ArtifactError, match="schema version 999"):
        artifacts.read_table(path, "heads")


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
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "once.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_a_file_with_missing_rows_does_not_appear(tmp_path):
    def write():
        with artifacts.writing_tensors(tmp_path / "t.safetensors", "activations", 7) as file:
            file.put(0, {"x": torch.ones(6)})

    with pytest.raises(artifacts.ArtifactError, match="6 of 7 rows were written"):
        write()
    assert not list(tmp_path.iterdir())

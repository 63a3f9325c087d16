"""Reading the activation cache: the rows of its shards that a table of prompts asks for, in order of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from moescope.artifacts import open_tensors


class Activations:
    """Tensors of the cache by name, for any rows. Rows are sorted by prompt_id and step (answer token).

    `prompt_id` int32 [n] and `target` long [n] (the token of that step) say what the rows are. Only what is asked for
    is read from disk.
    """

    def __init__(self, files: Sequence[Any], prompts: pd.DataFrame) -> None:
        targets = prompts.set_index("prompt_id")["target_ids"]
        pieces = []
        for number, file in enumerate(files):
            rows = pd.DataFrame({name: file.get_tensor(name).numpy() for name in ("prompt_id", "step")})
            pieces.append(rows.assign(file=number, row=np.arange(len(rows))))
        rows = pd.concat(pieces).query("prompt_id in @targets.index").sort_values(["prompt_id", "step"])
        self._files, self._file, self._row = files, rows["file"].to_numpy(), torch.tensor(rows["row"].to_numpy())
        self.prompt_id = rows["prompt_id"].to_numpy()
        pairs = zip(targets.loc[self.prompt_id], rows["step"], strict=True)
        self.target: Int[Tensor, " n"] = torch.tensor([ids[step] for ids, step in pairs], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.prompt_id)

    def get(self, name: str, rows: Int[np.ndarray, " r"]) -> Tensor:
        """One tensor of the cache at these rows (capture.capture lists the names)."""
        files = np.unique(self._file[rows])
        if len(files) == 1:
            return self._files[files[0]].get_tensor(name)[self._row[rows]]
        first = self._files[files[0]].get_tensor(name)
        out = first.new_empty(len(rows), *first.shape[1:])
        for number in files:
            own = np.flatnonzero(self._file[rows] == number)
            out[own] = self._files[number].get_tensor(name)[self._row[rows[own]]]
        return out

    def layer(self, index: int, rows: Int[np.ndarray, " r"]) -> dict[str, Tensor]:
        """All tensors of a layer at these rows, by their names without the layer."""
        at = f"{index}."
        names = [name for name in self._files[0].keys() if name.startswith(at)]
        return {name.removeprefix(at): self.get(name, rows) for name in names}

    def chunks(self, size: int) -> Iterator[Int[np.ndarray, " r"]]:
        """All rows in order, `size` or fewer at a time, but never less than a whole prompt."""
        ends = np.append(np.flatnonzero(np.diff(self.prompt_id)) + 1, len(self))
        start = 0
        while start < len(self):
            fits, next_one = np.searchsorted(ends, start + size, "right") - 1, np.searchsorted(ends, start, "right")
            end = int(ends[max(fits, next_one)])
            yield np.arange(start, end)
            start = end


@contextmanager
def opened(paths: Sequence[str | Path], prompts: pd.DataFrame) -> Iterator[Activations]:
    """The cache of one run; prompts of it that `prompts` (prompt_id, target_ids) lacks are left out."""
    with ExitStack() as stack:
        yield Activations([stack.enter_context(open_tensors(path, "activations")) for path in paths], prompts)

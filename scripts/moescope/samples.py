"""Samples: prompts with their responses, which for a fact are an answer of several tokens, and their shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int


def responses(prompts: pd.DataFrame) -> list[list[int]]:
    """The response tokens of each prompt: the accepted answer that begins with its target, else its target_ids.

    `prompts` has the columns target_id and target_ids, and for facts answer_ids (list of lists: the tokens of every
    accepted answer); of two such answers the first.
    """
    answers = prompts["answer_ids"] if "answer_ids" in prompts else [()] * len(prompts)
    rows = zip(answers, prompts["target_id"], prompts["target_ids"], strict=True)
    return [
        [int(token) for token in next((ids for ids in accepted if ids[0] == target), targets)]
        for accepted, target, targets in rows
    ]


def blocks(prompts: pd.DataFrame, batch_size: int) -> list[Int[np.ndarray, " b"]]:
    """Row numbers in blocks of `batch_size` prompts, the last one of what is left; none without prompts.

    Rows are in order of length (tokens, with target_ids where `prompts` has them), then prompt_id. Only prompts of one
    block run forward together, so that no result depends on what other blocks a job has.
    """
    tokens = prompts["length"].to_numpy(int)
    if "target_ids" in prompts:
        tokens = tokens + prompts["target_ids"].map(len).to_numpy(int)
    order = np.lexsort([prompts["prompt_id"], tokens])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def share(prompts: pd.DataFrame, batch_size: int, shard: int, shards: int) -> pd.DataFrame:
    """The prompts of a shard: those of every `shards`-th block. The blocks of a share are blocks of the whole."""
    return prompts.iloc[np.concatenate([np.arange(0), *blocks(prompts, batch_size)[shard::shards]])]


def in_blocks(
    measure: Callable[[pd.DataFrame], Sequence[pd.DataFrame]],
    prompts: pd.DataFrame,
    batch_size: int,
    shard: int = 0,
    shards: int = 1,
) -> list[pd.DataFrame]:
    """The tables that `measure` makes of the blocks of a shard, put together in order of prompt_id.

    `measure` gets the rows of one block, their index kept. A shard without blocks has tables without rows.
    """
    own = blocks(prompts, batch_size)[shard::shards]
    # Without blocks, one prompt says which columns there are.
    found = [measure(prompts.iloc[rows]) for rows in own or [np.arange(1)]]
    tables = [pd.concat(pieces) for pieces in zip(*found, strict=True)]
    return [in_order(table if own else table[:0]) for table in tables]


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in order of prompt_id, those of a prompt in the order they had."""
    return table.sort_values("prompt_id", kind="stable", ignore_index=True)


def gathered(shards: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The table whose shards these are, by path; one that says nothing of single prompts is the same in all of them.

    Raises ValueError where it is not.
    """
    (first, table), *others = shards.items()
    if "prompt_id" in table:
        return in_order(pd.concat(shards.values()))
    for path, other in others:
        if not other.equals(table):
            raise ValueError(f"{path}: differs from {first}, which every shard has alike; delete both and run again")
    return table

"""Samples: prompts with their responses, which for a fact are an answer of several tokens."""

from __future__ import annotations

import pandas as pd


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

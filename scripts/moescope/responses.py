"""Responses that a model writes itself, to be read like given ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel

from moescope.capture import batches, input_device, token_tensor
from moescope.facts import FactsError
from moescope.texts import LONGEST

ENDED = "the model ends its response at once"


def context(model: PreTrainedModel) -> int:
    """Tokens that a model takes, as far as its configuration says; at most texts.LONGEST."""
    return min(getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST), LONGEST)


def generate(
    model: PreTrainedModel, tokenizer: Any, prompts: pd.DataFrame, tokens: int, batch_size: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fill in the responses that are to be generated: at every step the token with the largest logit.

    `prompts` is the table of texts.tokenise. Prompts of equal length share a batch, so there is no padding and no
    mask. A response ends before the model's (else the tokenizer's) end token, which is no part of it, as given
    responses have none; and after `tokens` tokens, or where the model takes no more. Of the checkpoint's own settings
    of generation (sampling, penalties, ...) none but the end tokens count.

    Returns (prompts, dropped): `prompts` with response (str), target_ids and target_id filled in where `generated`;
    and those without a token, with the columns of the samples and `reason`. Raises FactsError if none is left.
    """
    waiting = np.flatnonzero(prompts["generated"])
    targets, texts = prompts["target_ids"].tolist(), prompts["response"].tolist()
    with _greedy(model, tokenizer) as ends:
        for batch in batches(prompts["length"].to_numpy()[waiting], batch_size):
            rows = waiting[batch]
            ids = token_tensor(prompts, rows, input_device(model))
            room = min(tokens, context(model) - ids.shape[1])
            # Wrapped by the library in a way that loses its type.
            whole = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room)
            for row, new in zip(rows, whole[:, ids.shape[1] :].tolist(), strict=True):
                targets[row] = list(takewhile(lambda token: token not in ends, new))
                texts[row] = _text(tokenizer, prompts["token_ids"].iloc[row][-1], targets[row])
    filled = prompts.assign(
        response=pd.Series(texts, prompts.index, dtype="str"),
        target_ids=targets,
        target_id=np.array([ids[0] if len(ids) else -1 for ids in targets], dtype="int32"),
    )
    empty = filled["target_id"] < 0
    if empty.all():
        raise FactsError([f"none of the {len(prompts)} samples can be used, for {ENDED}; mend the prompt's template"])
    dropped = filled[empty].drop(columns=["token_ids", "length", "target_ids", "target_id", "generated"])
    return filled[~empty].reset_index(drop=True), dropped.assign(reason=ENDED).reset_index(drop=True)


def _text(tokenizer: Any, before: int, ids: Sequence[int]) -> str:
    """What tokens stand for after the token `before`: on their own, some tokenizers leave out their first blank."""
    prompt, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in ([before], [before, *ids]))
    return whole.removeprefix(prompt)


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: Any) -> Iterator[set[int]]:
    """Within the context the model generates greedily, whatever its own settings; the tokens that end a response."""
    # The library would fill in all settings that are left open from the model's own.
    own = model.generation_config
    named = getattr(own, "eos_token_id", None)
    named = tokenizer.eos_token_id if named is None else named
    ends = [named] if isinstance(named, int) else list(named or [])
    pad = ends[0] if ends else None
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield set(ends)
    finally:
        model.generation_config = own

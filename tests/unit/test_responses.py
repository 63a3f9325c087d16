"""Responses that small models of real architectures write, against a loop over the largest logit."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moescope import responses, texts
from moescope.facts import FactsError

PROMPTS = ["The capital of France is", "In Japan, the capital city is", "kiwis", "The capital of Italy is", "tomatoes"]


@pytest.fixture
def waiting(tokenizer):
    """Prompts without responses, of several lengths, and one sample whose response is given."""
    columns = ["task", "relation", "subject", "prompt", "response"]
    rows = [("t", "t", str(i), prompt, "") for i, prompt in enumerate(PROMPTS)]
    table = pd.DataFrame([*rows, ("t", "t", "9", "The capital of Germany is", " Berlin")], columns=columns, dtype="str")
    table.insert(0, "text_id", np.array([0, 1, 2, 3, 4, 9], dtype="int32"))
    prompts, dropped = texts.tokenise(tokenizer, table)
    assert not len(dropped)
    assert prompts["length"].nunique() > 2
    return prompts


@torch.no_grad()
def likeliest(model, ids, n, ends=()):
    """The first n tokens after `ids`, each the one with the largest logit after all before it."""
    found = []
    for _ in range(n):
        token = int(model(input_ids=torch.tensor([[*ids, *found]]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
    return found


def ending(model, *ends):
    """A copy of a model with these end tokens."""
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    return model


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral", "qwen2"])
def test_responses_are_the_likeliest_tokens_whatever_the_batch_size(build, tokenizer, waiting, architecture):
    model = build(architecture)
    own = copy.deepcopy(model.generation_config)
    expected = [likeliest(model, ids, 6) for ids in waiting["token_ids"][:5]]
    for batch_size in (1, 2, 32):
        found, dropped = responses.generate(model, tokenizer, waiting, 6, batch_size)
        assert not len(dropped)
        assert found["target_ids"].tolist() == [*expected, waiting["target_ids"][5]]
        assert found["target_id"].tolist() == [ids[0] for ids in found["target_ids"]]
        assert found.dtypes.equals(waiting.dtypes)
        unchanged = ["prompt_id", "prompt", "token_ids", "length", "generated"]
        assert found[unchanged].equals(waiting[unchanged])
        for row in found.itertuples():
            assert row.prompt + row.response == tokenizer.decode(row.token_ids + row.target_ids).removeprefix(" ")
    assert model.generation_config == own


def test_an_end_token_ends_a_response_and_a_response_without_any_other_is_dropped(build, tokenizer, waiting):
    whole = [likeliest(build("olmoe"), ids, 6) for ids in waiting["token_ids"][:5]]
    for ends in ([whole[0][3]], [whole[1][0], whole[0][3]]):
        model = ending(build("olmoe"), *ends)
        expected = {i: likeliest(model, ids, 6, ends) for i, ids in enumerate(waiting["token_ids"][:5])}
        assert len(expected[0]) <= 3
        found, dropped = responses.generate(model, tokenizer, waiting, 6, 2)
        kept = {i: ids for i, ids in expected.items() if ids}
        assert dict(zip(found["prompt_id"], found["target_ids"])) == kept | {9: waiting["target_ids"][5]}
        assert dropped["prompt_id"].tolist() == [i for i in expected if i not in kept]
        assert (1 in dropped["prompt_id"].tolist()) == (len(ends) == 2)
        assert list(dropped) == ["prompt_id", "task", "relation", "subject", "prompt", "response", "reason"]
        assert set(dropped["reason"]) <= {"the model ends its response at once"}


def test_without_an_end_token_of_its_own_the_model_ends_at_that_of_the_tokenizer(build, tokenizer, waiting):
    first = likeliest(build("olmoe"), waiting["token_ids"][2], 1)[0]
    model, ended = copy.deepcopy(build("olmoe")), copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = None
    ended.eos_token = tokenizer.convert_ids_to_tokens(first)
    assert 2 in responses.generate(model, ended, waiting, 3, 8)[1]["prompt_id"].tolist()
    with pytest.raises(FactsError) as caught:
        responses.generate(model, ended, waiting[2:3], 3, 8)
    assert caught.value.errors[0].startswith(
        "none of the 1 samples can be used, for the model ends its response at once"
    )


def test_the_checkpoints_own_settings_of_generation_do_not_count(build, tokenizer, waiting):
    model = copy.deepcopy(build("olmoe"))
    expected, _ = responses.generate(model, tokenizer, waiting, 6, 8)
    hardly = {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5}
    settled = {"do_sample": True, "temperature": 9.0, "max_length": 3, "suppress_tokens": expected["target_ids"][0]}
    for key, value in (hardly | settled).items():
        setattr(model.generation_config, key, value)
    assert responses.generate(model, tokenizer, waiting, 6, 8)[0].equals(expected)


def test_a_response_ends_where_the_model_takes_no_more(build, tokenizer, waiting):
    model = copy.deepcopy(build("olmoe"))
    assert responses.context(model) == 128
    model.config.max_position_embeddings = longest = int(waiting["length"].max()) + 2
    found, _ = responses.generate(model, tokenizer, waiting, 6, 8)
    lengths = found["target_ids"].str.len()[:5]
    assert lengths.tolist() == [min(6, longest - length) for length in waiting["length"][:5]]
    assert set(lengths) >= {2, 6}


def test_given_responses_need_no_model(build, tokenizer, waiting):
    given = waiting[5:].reset_index(drop=True)
    found, dropped = responses.generate(build("olmoe"), tokenizer, given, 6, 8)
    assert found.equals(given)
    assert not len(dropped)
    samples = given.rename(columns={"prompt_id": "text_id"})[["text_id", "task", "relation", "subject", "prompt"]]
    unusable = pd.concat([samples.assign(response=""), samples.assign(prompt="", response="")])
    assert dropped.dtypes.equals(texts.tokenise(tokenizer, unusable)[1].dtypes)


def test_the_first_blank_of_a_response_is_kept_though_a_tokenizer_leaves_it_out_in_front():
    tokenizer = Tokenizer(models.BPE({"▁is": 0, "▁Rome": 1, "s": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.decode([1]) == "Rome"
    assert responses._text(wrapped, 0, [1, 2]) == " Romes"
    assert responses._text(wrapped, 0, [2]) == "s"
    assert responses._text(wrapped, 0, []) == ""

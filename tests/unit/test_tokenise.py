"""Prompts, targets and subjects in the tokens of real tokenizers of every common kind, trained here on a few lines."""

import json
import unicodedata

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from moescope import facts

LINES = 3 * [
    "The capital of France is Paris",
    "The capital of Japan is Tokyo, says the capital of France",
    "The first people on the moon landed in July",
    "The city of São Paulo is in Brazil, the city of Köln is in Germany",
    "日本 の 首都 は 東京 です",
    "The inside color of kiwis is green",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BLANK, DIGITS = "▁", list("0123456789")
SENTENCEPIECE = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
# A word with its blank, each digit alone, signs, blanks: as in Qwen's tokenizers.
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def wrapped(tokenizer, around=""):
    """A transformers tokenizer; `around` says which special tokens are put around a text."""
    if around:
        specials = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(before, trim=None, normalizer=None, around=""):
    """BPE on bytes. With trimmed offsets, a token's blank is not among its characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    if trim is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return wrapped(tokenizer, around)


def qwen(trim):
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    before = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return byte_level(before, trim, normalizers.NFC())


def trained_pieces():
    """Vocabulary and merges of a SentencePiece BPE; digits merge with nothing, rare characters are bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [*SPECIAL, *BYTES, BLANK, *DIGITS]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, limit_alphabet=40, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer.get_vocab(with_added_tokens=True), [tuple(pair) for pair in merges]


def llama(**settings):
    vocabulary, merges = trained_pieces()
    return LlamaTokenizer(vocab=vocabulary, merges=merges, **settings)


def llama_normalised():
    """Llama's tokenizer as its older files have it: a normalizer puts the blanks, and there is no pre-tokenizer."""
    vocabulary, merges = trained_pieces()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence(SENTENCEPIECE)
    return wrapped(tokenizer, "<s> $A")


def unigram(scheme, around=""):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=[BLANK], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer.model = models.Unigram([*pieces, *((byte, -20.0) for byte in BYTES)], 0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(SENTENCEPIECE[: 3 if scheme == "never" else 4])
    return wrapped(tokenizer, around)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
PREFIXED = pre_tokenizers.ByteLevel(add_prefix_space=True)
TOKENIZERS = {
    "byte-level": byte_level(GPT2),
    "byte-level trimmed": byte_level(GPT2, trim=True),
    "byte-level prefixed": byte_level(PREFIXED),
    "byte-level prefixed trimmed": byte_level(PREFIXED, trim=True),
    "byte-level <s>": byte_level(GPT2, around="<s> $A"),
    "byte-level <s> </s>": byte_level(GPT2, around="<s> $A </s>"),
    "byte-level </s>": byte_level(PREFIXED, around="$A </s> </s>"),
    "qwen": qwen(trim=False),
    "qwen trimmed": qwen(trim=True),
    "llama": llama(),
    "llama </s>": llama(add_eos_token=True),
    "llama unprefixed": llama(add_prefix_space=False),
    "llama legacy": llama(legacy=True),
    "llama normalised": llama_normalised(),
    "unigram always": unigram("always"),
    "unigram first": unigram("first", "<s> $A"),
    "unigram never": unigram("never", "<s> $A </s>"),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def table(template, subject, *objects, at=None):
    """A prompt table of one prompt."""
    row = {
        "prompt_id": 0,
        "subject": subject,
        "objects": list(objects),
        "prompt": template.replace("{}", subject),
        "subject_at": template.index("{}") if at is None else at,
    }
    return pd.DataFrame([row])


def tokenised(tokenizer, *arguments, **keywords):
    tokens, dropped = facts.tokenise(tokenizer, table(*arguments, **keywords))
    assert not len(dropped)
    return tokens.iloc[0]


def without_end(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    while ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def is_blank(tokenizer, token):
    return tokenizer.convert_ids_to_tokens(token) in ("Ġ", BLANK)


CHARACTERS = [*"aePist01967.'-,éöñØЖ日本東京首都한국🍇", "e\u0301"]
words = st.lists(st.sampled_from(CHARACTERS), min_size=1, max_size=6).map("".join)
names = st.lists(words, min_size=1, max_size=3).map(" ".join)
templates = st.sampled_from(["The capital of {} is", "{} is in", "In {}, the city is", "日本 の {} は", "Is{}is in"])


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(templates, names, st.lists(names, min_size=1, max_size=3, unique=True))
@example("The capital of {} is", "France", ["Paris"])
@example("{} is in", "日本", ["東京", "1969"])
@example("{} is in", "Apollo 11", ["1969", "July"])
def test_tokens_and_answer_are_those_of_the_whole_text(tokenizer, template, subject, objects):
    row = tokenised(tokenizer, template, subject, *objects)
    wholes = [without_end(tokenizer, f"{row['prompt']} {o}") for o in objects]
    assert row["token_ids"] + row["answer_ids"][0] == wholes[0]
    assert row["answer_ids"] == [
        whole[row["length"] :]
        for whole in wholes
        if whole[: row["length"]] == row["token_ids"] and not is_blank(tokenizer, whole[row["length"]])
    ]
    assert row["accepted_ids"] == list(dict.fromkeys(answer[0] for answer in row["answer_ids"]))
    assert row["object_tokens"] == len(row["answer_ids"][0])
    assert row["length"] == len(row["token_ids"])
    assert not is_blank(tokenizer, row["accepted_ids"][0])
    prompt = without_end(tokenizer, row["prompt"])
    assert row["token_ids"][: len(prompt)] == prompt
    assert all(is_blank(tokenizer, token) for token in row["token_ids"][len(prompt) :])
    # The unknown token has no way back to its text; no tokenizer here needs it.
    assert tokenizer.unk_token_id not in wholes[0]
    answer, span = row["answer_ids"][0], row["token_ids"][row["subject_start"] : row["subject_end"]]
    assert nfc(tokenizer.decode(answer)).strip() == nfc(objects[0])
    assert nfc(subject) in nfc(tokenizer.decode(span))
    # No token at either end of the span could be left out.
    assert nfc(subject) not in nfc(tokenizer.decode(span[1:]))
    assert nfc(subject) not in nfc(tokenizer.decode(span[:-1]))


def nfc(text):
    return unicodedata.normalize("NFC", text)


@every_tokenizer
def test_special_tokens_in_front_belong_to_the_prompt_and_those_behind_do_not(tokenizer):
    row = tokenised(tokenizer, "The capital of {} is", "France", "Paris")
    assert tokenizer.eos_token_id not in row["token_ids"] + row["answer_ids"][0]
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert (row["token_ids"][0] == tokenizer.bos_token_id) == begins
    assert row["subject_start"] > begins


@pytest.mark.parametrize("name", ["qwen", "qwen trimmed", "llama", "llama </s>", "llama normalised"])
def test_a_blank_before_the_object_ends_the_prompt(name):
    tokenizer = TOKENIZERS[name]
    template = "The first people on the {} landed in"
    year = tokenised(tokenizer, template, "moon", "1969", "July", "1970")
    month = tokenised(tokenizer, template, "moon", "July", "1969")
    assert is_blank(tokenizer, year["token_ids"][-1])
    assert year["token_ids"][:-1] == month["token_ids"]
    assert [tokenizer.decode(ids).strip() for ids in year["answer_ids"]] == ["1969", "1970"]
    assert [tokenizer.decode(ids).strip() for ids in month["answer_ids"]] == ["July"]
    # Both years begin with the same digit.
    assert len(year["accepted_ids"]) == 1
    assert year["object_tokens"] == 4


@every_tokenizer
@pytest.mark.parametrize(
    ("template", "subject", "before"),
    [
        ("The island is {}", "is", "The island is"),
        ("Is {} is", "s", "Is"),
        ("{} is {", "日", ""),
        ("本日 {}", "日", "本日"),
    ],
)
def test_the_subject_is_where_its_place_says_not_where_it_first_occurs(tokenizer, template, subject, before):
    row = tokenised(tokenizer, template, subject, "Paris")
    assert tokenizer.decode(row["token_ids"][: row["subject_start"]], skip_special_tokens=True).strip() == before
    assert subject in tokenizer.decode(row["token_ids"][row["subject_start"] : row["subject_end"]])


def test_a_subject_of_unknown_place_has_no_span():
    row = tokenised(TOKENIZERS["llama"], "The capital of {} is", "France", "Paris", at=-1)
    assert (row["subject_start"], row["subject_end"]) == (-1, -1)
    prompts = table("The capital of {} is", "France", "Paris").drop(columns="subject_at")
    assert facts.tokenise(TOKENIZERS["llama"], prompts)[0]["subject_start"].tolist() == [-1]


def test_a_checkpoints_own_truncation_padding_and_chat_template_are_not_applied():
    plain, settled = byte_level(GPT2), byte_level(GPT2)
    settled.backend_tokenizer.enable_truncation(4)
    settled.backend_tokenizer.enable_padding(length=50)
    settled.chat_template = "<s>{{ messages[0]['content'] }}</s>"
    arguments = ("The capital of {} is", "France", "Paris")
    assert tokenised(settled, *arguments).equals(tokenised(plain, *arguments))


def test_targets_of_a_toy_tokenizer(tokenizer, prompts):
    tokens, dropped = facts.tokenise(tokenizer, prompts)
    assert not len(dropped)
    for row in tokens.itertuples():
        assert tokenizer.decode(row.token_ids).strip() == row.prompt
        assert tokenizer.decode(row.answer_ids[0]).strip() == row.objects[0]
        subject = tokenizer.decode(row.token_ids[row.subject_start : row.subject_end])
        assert subject.strip() == row.subject
    small = tokens[["length", "object_tokens", "subject_start", "subject_end"]]
    assert (small.dtypes == "int16").all()


def test_an_object_that_changes_the_prompts_tokens_is_dropped_and_counted(prompts):
    """A tokenizer that merges across the space before an object makes the prompt's own tokens change."""
    texts = [f"{p} {o}" for p, objects in zip(prompts["prompt"], prompts["objects"]) for o in objects]
    pieces = [*sorted(set("".join(texts))), " P", "s P"]
    merging = wrapped(
        Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [(" ", "P"), ("s", " P")], unk_token=None))
    )
    tokens, dropped = facts.tokenise(merging, prompts)
    assert set(dropped["objects"].str[0]) == {"Paris", "Pretoria"}
    assert dropped["prompt"].str.endswith("s").all()
    assert len(tokens) + len(dropped) == len(prompts)
    assert set(dropped["reason"]) == {
        f"the tokens of the prompt change when '{city}' follows" for city in ("Paris", "Pretoria")
    }
    other = table("The capital of {} is", "France", "Tokyo", "Paris", "Rome")
    answers = facts.tokenise(merging, other)[0]["answer_ids"][0]
    assert ["".join(merging.convert_ids_to_tokens(ids)) for ids in answers] == ["Tokyo", "Rome"]
    for row in tokens.itertuples():
        assert merging(f"{row.prompt} {row.objects[0]}")["input_ids"] == row.token_ids + row.answer_ids[0]
    with pytest.raises(facts.FactsError) as caught:
        facts.tokenise(merging, dropped)
    assert caught.value.errors == [
        f"none of the {len(dropped)} prompts can be used, for {len(dropped)} of them because the tokens of the prompt"
        " change when '...' follows; end the templates with a whole word and without a space"
    ]


def only_known_characters():
    """A SentencePiece BPE that leaves out what it does not know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def whole_words():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "The": 1, "capital": 2, "of": 3, "is": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "answer", "at", "reason"),
    [
        (only_known_characters(), "Ωμέγα", None, "the object 'Ωμέγα' has no token of its own"),
        (whole_words(), "Paris", None, "the tokenizer does not know how the object 'Paris' begins"),
        (TOKENIZERS["llama"], "Paris", 3, "the subject 'France' does not stand where subject_at says"),
    ],
)
def test_a_useless_prompt_is_dropped_with_its_reason(tokenizer, answer, at, reason):
    useless = table("The capital of {} is", "France", answer, at=at)
    useful = table("The capital of {} is", "France", "of")
    tokens, dropped = facts.tokenise(tokenizer, pd.concat([useless, useful]))
    assert dropped["reason"].tolist() == [reason]
    assert tokens["objects"].tolist() == [["of"]]
    with pytest.raises(facts.FactsError, match=r"none of the 1 prompts can be used, for 1 of them because .*; "):
        facts.tokenise(tokenizer, useless)


@pytest.mark.parametrize(("tokenizer", "other"), [(only_known_characters(), "Ωμέγα"), (whole_words(), "Paris")])
def test_another_object_without_a_usable_token_is_left_out(tokenizer, other):
    alone = tokenised(tokenizer, "The capital of {} is", "France", "of")
    assert tokenised(tokenizer, "The capital of {} is", "France", "of", other)["answer_ids"] == alone["answer_ids"]


def test_a_tokenizer_without_offsets_and_a_set_without_prompts_are_sentences():
    with pytest.raises(facts.FactsError, match=r"ByT5Tokenizer: .*; use a checkpoint with a fast one"):
        facts.tokenise(ByT5Tokenizer(), table("The capital of {} is", "France", "Paris"))
    with pytest.raises(facts.FactsError, match="there is no prompt to tokenise; "):
        facts.tokenise(TOKENIZERS["llama"], table("{} is", "France", "Paris").iloc[:0])

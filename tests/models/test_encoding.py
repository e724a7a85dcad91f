"""Texts that are encoded in pieces have the ids of the whole texts, for each kind of tokenizer that is taken for it."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from selfplay.models import encoding
from selfplay.models.encoding import WORDS, Encoder, in_pieces

BITS = [
    *([" "] * 16), "  ", "\n", "\t", "\r\n", " \n", "'s", "'ll", "'", "—", "é", "e\u0301", "\u0301", " \u0308", "\u00a0", "\u3000",
    "\u200b", "\x1c", "\x85", "\u2028", "\0", "東京", "ﬁ", "1", "23", "4567", "²", "İ", "ß", "🙂", "<|user|>", "<s>", "word",
    "Word", "a", "::", "foo", "don't", "x,", "(y)",
]  # fmt: skip


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)


def tokenizer(pre_tokenizer, normalizer=None, *added):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level().alphabet(), special_tokens=["<|user|>", "<s>", "  "],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["".join(random.Random(0).choices(BITS, k=4000))], trainer)
    backend.add_tokens(list(added))
    return backend


def words(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


@pytest.mark.parametrize(
    "backend",
    [
        tokenizer(byte_level()),
        tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
        *(tokenizer(words(p), normalizers.NFC(), AddedToken("foo", lstrip=True, normalized=True)) for p in WORDS),
    ],
)
def test_a_text_has_the_ids_of_its_pieces(backend, monkeypatch):
    assert in_pieces(backend)
    monkeypatch.setattr(encoding, "MOST_PIECES", 64)  # so that it forgets them now and then
    encode, draw = Encoder(backend), random.Random(1)
    for _ in range(20):
        texts = ["", *("".join(draw.choices(BITS, k=draw.randrange(60))) for _ in range(30))]
        expected = [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in encode(texts)] == expected
    assert len(encode._known) > 30
    for _ in range(2):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            encode(["a new word", "half of a \ud800 pair"])
    assert encode(["a new word"])[0].tolist() == backend.encode("a new word").ids


def test_where_a_token_may_span_a_space_texts_stay_whole():
    plain = byte_level()
    refused = [
        tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer(byte_level(use_regex=False)),
        tokenizer(words(r"\p{L}+ \p{L}+|\s+")),
        tokenizer(pre_tokenizers.Metaspace()),
        tokenizer(plain, normalizers.NFKC()),
        tokenizer(plain, None, AddedToken("word a")),
        tokenizer(plain, None, AddedToken("foo", rstrip=True)),
        tokenizer(plain, None, AddedToken("foo", single_word=True)),
    ]
    texts = ["word a foo word a", " foo a"]
    for backend in refused:
        assert not in_pieces(backend)
        expected = [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in Encoder(backend)(texts)] == expected
    unlikely = tokenizer(plain)
    unlikely.model.dropout = 0.5
    assert not in_pieces(unlikely)

"""Contracts of the tokenizer: exact round trips, text that never becomes a special token, and a file that is checked."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import MIN_VOCAB, SPECIALS, StreamDecoder, Tokenizer

TEXT = ["The quick brown fox jumps over the lazy dog. It costs 1234567 crowns!\n", "naïve café ☕ 日本語 — done.\n"] * 20
TOKENIZER = Tokenizer.train(TEXT, 320)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(ANY_TEXT)
def test_any_unicode_comes_back_exactly(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(token < TOKENIZER.bos_id for token in ids)
    assert sum(TOKENIZER.token_bytes()[token] for token in ids) == len(text.encode())


@pytest.mark.parametrize("name", SPECIALS)
def test_text_never_becomes_a_special_token(name: str) -> None:
    text = f"{name}a {name}{name} b"
    ids = TOKENIZER.encode(text, bos=True)
    assert ids[0] == TOKENIZER.bos_id
    assert not set(ids[1:]) & set(TOKENIZER.specials.values())
    assert TOKENIZER.decode(ids[1:]) == text
    assert TOKENIZER.encode_batch([text], bos=True) == [ids]


def test_ids_are_bytes_then_merges_then_specials() -> None:
    assert TOKENIZER.vocab_size == 320
    assert [TOKENIZER.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [TOKENIZER.special(name) for name in SPECIALS] == list(range(311, 320))
    assert TOKENIZER.token_bytes()[311:] == [0] * 9 and min(TOKENIZER.token_bytes()[:311]) == 1
    with pytest.raises(UserError, match=r"did you mean '<\|user_start\|>'"):
        TOKENIZER.special("<|user_strat|>")


def test_numbers_are_split_into_at_most_two_digits() -> None:
    tokenizer = Tokenizer.train(["1234567890 " * 200], 300)
    assert max(len(tokenizer.decode([token])) for token in tokenizer.encode("1234567890")) == 2


@pytest.mark.parametrize("size", [0, 255, MIN_VOCAB - 1, (1 << 20) + 1])
def test_vocab_size_out_of_bounds_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=rf"vocab_size={size} is out of bounds \[265, 1048576\]"):
        Tokenizer.train(TEXT, size)


def test_smallest_vocabulary_is_bytes_and_specials() -> None:
    tokenizer = Tokenizer.train(TEXT, MIN_VOCAB)
    assert tokenizer.vocab_size == MIN_VOCAB
    assert tokenizer.encode("é") == list("é".encode())


def test_text_that_runs_out_of_pairs_gives_a_smaller_vocabulary() -> None:
    tokenizer = Tokenizer.train(["hello world"], 5000)
    assert MIN_VOCAB < tokenizer.vocab_size < 290
    assert tokenizer.decode(tokenizer.encode("hello world, déjà vu")) == "hello world, déjà vu"


def test_training_needs_text() -> None:
    with pytest.raises(UserError, match="no text to train"):
        Tokenizer.train(["", ""], 300)


def test_training_is_repeatable() -> None:
    assert Tokenizer.train(iter(TEXT), 320).sha256 == TOKENIZER.sha256


@pytest.mark.parametrize("unit", [" ", "\n", "a", "^", "ab1! ", "é", "\u3000", "word "])
def test_endless_runs_neither_crash_nor_change(unit: str) -> None:
    text = unit * (1_500_000 // len(unit))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_cutting_long_text_does_not_change_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXT) * 4
    whole = TOKENIZER.encode(text)
    monkeypatch.setattr("bio_inspired_nanochat.tokenizer._SEGMENT", 100)
    assert TOKENIZER.encode(text) == whole
    assert TOKENIZER.encode_batch([text, "", text], threads=3) == [whole, [], whole]


def test_lone_surrogates_become_replacement_characters() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"
    Tokenizer.train(["a\ud800b"] * 3, 270)


def test_broken_utf8_decodes_with_replacement_characters() -> None:
    assert TOKENIZER.decode([0xE2, 0x82, ord("x"), 0xFF]) == "\ufffdx\ufffd"


@pytest.mark.parametrize("token", [-1, 320, 10**9])
def test_foreign_id_is_refused(token: int) -> None:
    with pytest.raises(UserError, match=rf"token id {token} is outside of the vocabulary \[0, 319\]"):
        TOKENIZER.decode([65, token])


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(ids: list[int]) -> None:
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.push(token) for token in ids] + [decoder.flush()]
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_stream_waits_for_the_rest_of_a_character() -> None:
    decoder = TOKENIZER.stream_decoder()
    assert [decoder.push(byte) for byte in "€".encode()] == ["", "", "€"]
    assert decoder.flush() == ""
    assert decoder.push(0xE2) == "" and decoder.flush() == "\ufffd"
    assert decoder.push(65) == "A"


def test_file_round_trip(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "sub" / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "sub" / "tokenizer.json")
    assert loaded.sha256 == TOKENIZER.sha256 and loaded.vocab_size == 320
    assert loaded.encode(TEXT[1]) == TOKENIZER.encode(TEXT[1])


def _damage(content: dict, how: str) -> object:
    ranks = content["ranks"]
    if how == "foreign":
        return {"model": {"type": "BPE"}}
    if how == "version":
        return {**content, "version": 2}
    if how == "no ranks":
        return {**content, "ranks": None}
    if how == "base64":
        return {**content, "ranks": [*ranks[:-1], "!!"]}
    if how == "swapped":
        return {**content, "ranks": [*ranks[:-2], ranks[-1], ranks[-2]]}
    if how == "missing byte":
        return {**content, "ranks": ranks[1:]}
    if how == "twice":
        return {**content, "ranks": [*ranks, ranks[-1]]}
    if how == "empty":
        return {**content, "ranks": [*ranks, base64.b64encode(b"").decode()]}
    if how == "specials":
        return {**content, "specials": content["specials"][1:]}
    assert how == "pattern"
    return {**content, "pattern": "(unclosed"}


@pytest.mark.parametrize(
    "how", ["foreign", "version", "no ranks", "base64", "swapped", "missing byte", "twice", "empty", "specials", "pattern"]
)
def test_damaged_file_is_refused_by_name(tmp_path: Path, how: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_damage(json.loads(TOKENIZER.to_json()), how)))
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"\x80\x04pickle", TOKENIZER.to_json().encode()[:2000], b"[1]", b"[" * 100_000])
def test_unreadable_file_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(path)


def test_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist.*scripts.tok_train"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)

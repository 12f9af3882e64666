"""Text to tokens and back: against the tokenizers package, and for any text at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tinygiant.runtime.errors import BundleError
from tinygiant.runtime.tokenizer import StreamingDetokenizer, Tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# Text that likes to spell control tokens, whole, in halves and overlapping.
FRAGMENTS = st.sampled_from([*CONTROL, "<", "<|im_", "end|>", "<<think>", "think>", "\u0338", "\n"])
TEXT = st.lists(st.one_of(FRAGMENTS, st.text(max_size=5)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def reference(tokenizer_file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tokenizer_file))


def normalized(text: str, reference: tokenizers.Tokenizer) -> str:
    return str(reference.normalizer.normalize_str(text))


@given(text=st.text())
def test_text_comes_back(text: str, tokenizer: Tokenizer, reference: tokenizers.Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == normalized(text, reference)


@given(text=st.text(alphabet=st.characters(exclude_characters="<>", exclude_categories=["Cs"])))
def test_plain_text_gets_the_reference_tokens(
    text: str, tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@given(text=TEXT)
def test_control_tokens_cannot_be_reached_from_text(
    text: str, tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    ids = tokenizer.encode(text)
    assert not {tokenizer.token_id(control) for control in CONTROL} & set(ids)
    assert tokenizer.decode(ids) == normalized(text, reference)


def test_markup_is_the_reference_encoding(
    tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    text = "<|im_start|>user\nWhat?<|im_end|>\n<think>\nhm</think>"
    ids = tokenizer.encode_markup(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_id("</think>") in ids
    assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, 600)))
def test_decoding_any_ids_equals_the_reference(
    ids: list[int], tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, 600)))
def test_streamed_pieces_join_to_the_whole(ids: list[int], tokenizer: Tokenizer) -> None:
    stream = StreamingDetokenizer(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)


@given(text=st.text(min_size=1))
def test_streaming_never_splits_a_character(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    stream, whole = StreamingDetokenizer(tokenizer), tokenizer.decode(ids)
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert whole.startswith(shown)  # never a replacement character that goes away again
    assert shown == whole
    assert stream.finish() == ""


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f3b5")
    assert len(ids) == 4
    stream = StreamingDetokenizer(tokenizer)
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "\U0001f3b5"]
    for token_id in ids[:2]:
        stream.push(token_id)
    assert stream.finish() == "\ufffd"


def test_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, tokenizer.max_id + 1, 10**9]) == ""


def test_control_token_ids(tokenizer: Tokenizer, reference: tokenizers.Tokenizer) -> None:
    assert tokenizer.token_id("<|im_end|>") == reference.token_to_id("<|im_end|>")
    with pytest.raises(BundleError, match="no control token <nothing>"):
        tokenizer.token_id("<nothing>")


def test_truncation_and_padding_in_the_file_are_switched_off(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    reference.enable_truncation(3)
    reference.enable_padding(length=50)
    reference.save(str(tmp_path / "tokenizer.json"))
    text = "Which sound comes first?"
    assert (
        Tokenizer.from_file(tmp_path / "tokenizer.json").decode(
            Tokenizer.from_file(tmp_path / "tokenizer.json").encode(text)
        )
        == text
    )


@pytest.mark.parametrize("content", ["", "{}", "[", '{"version": "1.0", "model": null}', "\ud800"])
def test_what_is_not_a_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(BundleError, match="not a tokenizer") as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_loses_text_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    data = json.loads(tokenizer_file.read_text())
    path = tmp_path / "tokenizer.json"
    for change in ({"decoder": None}, {"pre_tokenizer": None}):
        path.write_text(json.dumps(data | change))
        if "decoder" in change:  # our own decoding does not depend on the file's
            assert Tokenizer.from_file(path).decode([1]) == "<|im_start|>"
        else:
            with pytest.raises(BundleError, match="byte-level"):
                Tokenizer.from_file(path)

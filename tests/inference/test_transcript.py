from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.corpus.tokenizer import ChatTokenizer
from stages.inference.transcript import Transcript

END = 256


def decode_bytes(ids: Sequence[int]) -> str:
    """The hardest tokenizer: a token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def write(text: bytes, stop: Sequence[str] = (), ended: bool = True) -> tuple[Transcript, list[str]]:
    transcript = Transcript(decode_bytes, end_token_id=END, stop=stop)
    pieces = []
    for token_id in [*text, *([END] if ended else [])]:
        pieces.append(transcript.push(token_id))
        if transcript.finish_reason:
            return transcript, pieces
    pieces.append(transcript.close("length"))
    return transcript, pieces


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_whole_characters_and_join_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    transcript, pieces = write(text.encode(), stop)
    ends = [index for index in map(text.find, stop) if index >= 0]
    # The first stop string to be complete ends the answer, even where a longer one begins earlier.
    complete = [text.find(s) + len(s) for s in stop if s in text]
    expected = text if not ends else text[: min(text.find(s) for s in stop if s in text[: min(complete)])]
    assert "".join(pieces) == transcript.text == expected
    assert transcript.finish_reason == "stop"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=30))
def test_any_bytes_are_released_in_the_end(text: bytes) -> None:
    transcript, pieces = write(text, ended=False)
    assert "".join(pieces) == transcript.text
    assert transcript.finish_reason == "length"
    assert transcript.token_ids == list(text)
    if text.decode("utf-8", errors="replace").encode() == text:
        assert transcript.text == text.decode()


def test_what_may_become_a_stop_string_is_held_until_it_cannot() -> None:
    _, pieces = write(b"a\n\nb\n!", stop=["\n\n\n"])
    assert pieces == ["a", "", "", "\n\nb", "", "\n!", ""]
    transcript, pieces = write(b"ab\n\n\nc", stop=["\n\n\n"])
    assert (transcript.text, pieces[-1], len(pieces)) == ("ab", "", 5)
    transcript, _ = write(b"ab\n\n", stop=["\n\n\n"], ended=False)
    assert (transcript.text, transcript.finish_reason) == ("ab\n\n", "length")


@pytest.mark.parametrize(
    "text", ["Hello,  world!\n", "从前有座山，山上有座庙。", "é👩‍👩‍👧🎉 naïve", "x = {\n    1: 'a'\n}"]
)
def test_a_real_tokenizer_streams_what_it_decodes_at_once(smollm2: Path, text: str) -> None:
    tokenizer = ChatTokenizer.load(smollm2)
    ids = tokenizer._ids([text])[0]
    transcript = Transcript(tokenizer.decode, end_token_id=tokenizer.end_token_id)
    pieces = [transcript.push(token_id) for token_id in [*ids, tokenizer.end_token_id]]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)

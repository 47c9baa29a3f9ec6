"""chat.json: a student is asked as it was trained, or says that it does not know how."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.corpus.chat import CHAT_FILE, chat_document, read_thinking
from stages.errors import StageError


@pytest.mark.parametrize("thinking", [True, False])
def test_what_is_written_is_read(tmp_path: Path, thinking: bool) -> None:
    (tmp_path / CHAT_FILE).write_bytes(chat_document(thinking=thinking))
    assert read_thinking(tmp_path) is thinking


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff"])
def test_a_folder_that_does_not_say_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / CHAT_FILE).write_bytes(content)
    with pytest.raises(StageError, match=CHAT_FILE) as caught:
        read_thinking(tmp_path)
    assert caught.value.hint

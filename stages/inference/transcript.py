"""The text of one answer while its tokens arrive.

Text is released only when it can no longer change: never half of a character, and never the beginning of what may
still become a stop string. All released pieces joined are the text of the answer, streamed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

_UNFINISHED = "�"

FinishReason = Literal["stop", "length"]


class Transcript:
    def __init__(self, decode: Callable[[Sequence[int]], str], *, end_token_id: int, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._end_token_id = end_token_id
        self._stop = tuple(stop)
        self._context, self._read = 0, 0  # ids before `_read` are text already; those from `_context` set the spacing
        self._held, self._pending = "", 0
        self.token_ids: list[int] = []
        """Without the end token."""
        self.text = ""
        self.finish_reason: FinishReason | None = None

    @property
    def characters(self) -> int:
        """Whole characters written so far, released or not: where the text of the next token begins."""
        return len(self.text) + len(self._held) + self._pending

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is certain now."""
        assert self.finish_reason is None
        if token_id == self._end_token_id:
            return self.close("stop")
        self.token_ids.append(token_id)
        return self._release(self._new_text(whole=False))

    def close(self, reason: FinishReason) -> str:
        """No more tokens come: release what is held, up to a stop string."""
        released = self._release(self._new_text(whole=True))
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text += self._held
            released, self._held = released + self._held, ""
        return released

    def _new_text(self, *, whole: bool) -> str:
        """Text of the ids that are not text yet; nothing while a character is incomplete, unless no more come."""
        before = self._decode(self.token_ids[self._context : self._read])
        now = self._decode(self.token_ids[self._context :])
        if now.endswith(_UNFINISHED) and not whole:
            self._pending = max(0, len(now.rstrip(_UNFINISHED)) - len(before))
            return ""
        self._pending = 0
        self._context, self._read = self._read, len(self.token_ids)
        return now[len(before) :]

    def _release(self, text: str) -> str:
        self._held += text
        found = [index for index in map(self._held.find, self._stop) if index >= 0]
        if found:
            released, self._held = self._held[: min(found)], ""
            self.finish_reason = "stop"
        else:
            certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
            released, self._held = self._held[:certain], self._held[certain:]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

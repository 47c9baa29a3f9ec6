"""Answers on their way to whoever asked: sent as fast as they are read, and given up where they are not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from stages.inference.server.ticket import Ticket

_SLICE = 1 << 16
"""Bytes of a whole answer that are handed over at once: what a connection holds for a caller who does not read."""

_log = logging.getLogger(__name__)


class Delivery(StreamingResponse):
    """Gives the places of its answers back however it ends, and also where it never began.

    Until then they count as taken, so that what callers let lie in memory has the bound of the queue. `patience` is how
    many seconds a part may wait for a caller who reads nothing.
    """

    def __init__(
        self, parts: AsyncIterator[bytes], ticket: Ticket, patience: float, media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(parts, media_type=media_type, headers=headers)
        self._ticket, self._patience = ticket, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            async with asyncio.timeout(self._patience):
                await send(message)

        try:
            await super().__call__(scope, receive, sending)
        except TimeoutError:
            _log.warning("nothing of an answer was read for %g s: its connection is closed", self._patience)
        finally:
            self._ticket.cancel()


async def slices(whole: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(whole), _SLICE):
        yield whole[start : start + _SLICE]

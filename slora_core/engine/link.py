"""The engine's messages as its owner's event loop reads them from their socket.

Knows bytes and messages; what they mean, and what is to be done at the end of the connection, is
`engine.process`'s to say.
"""

import asyncio
import logging
from collections.abc import Callable

from slora_core.engine.protocol import MessageCutter

logger = logging.getLogger(__name__)


class EngineLink(asyncio.Protocol):
    """Args:
    on_message: called with each message.
    on_garbage: called with the reason where one cannot be read; nothing after it makes sense.
    on_end: called once, when the other end has closed and all that it sent has been handed over.
    """

    def __init__(
        self,
        on_message: Callable[[object], None],
        on_garbage: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        self._cutter = MessageCutter()
        self._on_message = on_message
        self._on_garbage = on_garbage
        self._on_end = on_end

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._cutter.push(data)
        except Exception as error:
            logger.exception("a message of the engine could not be read")
            self._on_garbage(f"a message of the engine could not be read: {error}")
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_end()

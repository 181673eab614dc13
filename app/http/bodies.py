"""Reading of request bodies: how large, how long it may take, and how much at once.

Owns the limits, so that neither a client that sends slowly nor many that send much cost others
anything. It knows no format.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from app.http.errors import BodyTimeoutError, BodyTooLargeError
from slora_core.errors import OverloadedError

# Of each body, bytes that do not count among those in flight: ordinary requests are not refused
# for the sake of large ones.
FREE_BYTES = 2**16


class BodyReader:
    """Args:
    max_bytes: of one body.
    timeout_s: from the first look at a request to its body's end.
    max_inflight_bytes: of all bodies that are being read or parsed, beyond `FREE_BYTES` each.
    """

    def __init__(self, max_bytes: int, timeout_s: float, max_inflight_bytes: int) -> None:
        self._num_inflight_bytes = 0
        self.set_limits(max_bytes, timeout_s, max_inflight_bytes)

    def set_limits(self, max_bytes: int, timeout_s: float, max_inflight_bytes: int) -> None:
        """For bodies that come from now on."""
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._max_inflight_bytes = max_inflight_bytes

    @asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, which counts as in flight until the context ends.

        Raises:
            BodyTooLargeError, BodyTimeoutError: its own fault.
            OverloadedError: too much is in flight.
            ClientDisconnect: nobody is there any more.
        """
        parts: list[bytes] = []
        try:
            await self._read_into(parts, request)
            yield b"".join(parts)
        finally:
            self._num_inflight_bytes -= _num_counted(sum(map(len, parts)))

    async def _read_into(self, parts: list[bytes], request: Request) -> None:
        """Append a body's parts, each of which is counted as in flight by then."""
        num_bytes = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                async for part in request.stream():
                    before, num_bytes = num_bytes, num_bytes + len(part)
                    if num_bytes > self._max_bytes:
                        raise BodyTooLargeError(f"the body has more than {self._max_bytes} bytes")
                    more = _num_counted(num_bytes) - _num_counted(before)
                    if self._num_inflight_bytes + more > self._max_inflight_bytes:
                        raise OverloadedError(
                            f"bodies of more than {self._max_inflight_bytes} bytes are being read "
                            "already; try again"
                        )
                    self._num_inflight_bytes += more
                    parts.append(part)
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body did not come within {self._timeout_s:g} s; {num_bytes} bytes of it did"
            ) from None


def _num_counted(num_bytes: int) -> int:
    return max(0, num_bytes - FREE_BYTES)

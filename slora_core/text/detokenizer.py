"""The text of one running request, made from its token ids as they come, up to a stop string.

Owns what is held back of it, since it may yet become a stop string. It knows one request only; the
ingress makes one for each and feeds it the engine's tokens.
"""

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Text of one request's tokens as they come, as of `incremental_decoder`."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class StopMatcher:
    """Cuts a growing text before the stop string that is complete first.

    Of stop strings that end at the same character, the longest counts. However the text is cut
    into pieces, the result is the same.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched = False

    def push(self, piece: str, may_match: bool = True) -> str:
        """Text that is certain to stay, at most up to a stop string.

        Without `may_match` a stop string that is complete by now stays in the text.
        """
        if not self._stop:
            return piece
        text = self._held + piece
        found = self._first_match(text, len(self._held)) if may_match else None
        if found is not None:
            self.matched = True
            self._held = ""
            return text[:found]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_seen: int) -> int | None:
        """Start of the stop string that ends first past `num_seen`, the longest of those."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, num_seen + 1 - len(stop)))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stop) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0


class Detokenizer:
    """Text of one request; `stopped` once a stop string was found, and then nothing follows.

    Args:
        min_tokens: stop strings that its first so many tokens complete do not count.
    """

    def __init__(self, decoder: TextDecoder, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stop)
        self._has_stop = bool(stop)
        self._min_tokens = min_tokens
        # Tokens taken, the one that completed a stop string included.
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._matcher.matched

    def push(self, token_ids: Sequence[int]) -> str:
        """New text of these tokens; tokens after a stop string are not counted."""
        if not self._has_stop:
            self.num_tokens += len(token_ids)
            return self._decoder.push(token_ids)
        text = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            text += self._match(self._decoder.push([token_id]))
        return text

    def finish(self) -> str:
        """The last text; empty after a stop string."""
        if self.stopped:
            return ""
        text = self._match(self._decoder.finish())
        return text if self.stopped else text + self._matcher.finish()

    def _match(self, piece: str) -> str:
        return self._matcher.push(piece, may_match=self.num_tokens > self._min_tokens)

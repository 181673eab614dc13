"""The text of one running request, made from its token ids as they come.

Owns what is held back: bytes of an unfinished character, and text that may yet become a stop
string. It knows one request only; the ingress makes one for each and feeds it the engine's tokens.
"""

from collections.abc import Callable, Sequence

# Tokens decoded again with each new one before the window is cut.
WINDOW_TOKENS = 32
# A character has at most 4 bytes, so at most 3 tokens of an unfinished one can be at the end.
MAX_UNFINISHED = 3
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """Decodes a growing list of token ids, each part of the text once.

    Concatenated, the pieces equal `decode` of all ids at once (for byte-level tokenizers; one
    with byte fallback may turn back on characters inside a run of invalid bytes). Only a short
    window of recent tokens is decoded at each step, so the cost is linear.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        # Characters of the window's text that were given out.
        self._num_emitted = 0
        self._cut_at = WINDOW_TOKENS

    def push(self, token_ids: Sequence[int]) -> str:
        """New text, without what may be an unfinished character."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        num_final = len(text)
        while num_final > len(text) - MAX_UNFINISHED and text[:num_final].endswith(REPLACEMENT):
            num_final -= 1
        piece = text[self._num_emitted : num_final]
        self._num_emitted = max(self._num_emitted, num_final)
        if len(self._window) >= self._cut_at:
            self._cut(text)
        return piece

    def finish(self) -> str:
        """The rest; an unfinished character becomes a replacement character."""
        piece = self._decode(self._window)[self._num_emitted :]
        self._window.clear()
        self._num_emitted = 0
        return piece

    def _cut(self, text: str) -> None:
        """Drop tokens from the front of the window, where the text splits at a token boundary.

        Not every boundary will do: it may lie inside a character, and some tokenizers strip the
        space before the first word. So a cut counts only if the two parts give the same text.
        """
        for start in range(len(self._window) - MAX_UNFINISHED - 1, len(self._window) // 2, -1):
            head, tail = self._decode(self._window[:start]), self._decode(self._window[start:])
            if head + tail == text and len(head) <= self._num_emitted:
                self._window = self._window[start:]
                self._num_emitted -= len(head)
                self._cut_at = max(WINDOW_TOKENS, 2 * len(self._window))
                return
        self._cut_at = 2 * len(self._window)


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

    def __init__(self, decode: Decode, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = IncrementalDecoder(decode)
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

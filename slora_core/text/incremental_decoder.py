"""Text of a growing list of token ids, each part of it once, in the context of what came before.

A token's text may depend on those before it: characters are cut between tokens, and some decoders
strip the space at the beginning of a text. It knows one request's tokens and nothing of stops.
"""

from collections.abc import Collection, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes, so at most 3 tokens of an unfinished one can be at the end.
MAX_UNFINISHED = 3
# Tokens of the prompt that its continuation is decoded after.
MAX_CONTEXT = 16
# Tokens held back, in which nothing is a whole character, before some are given up as invalid.
MAX_HELD = 32


class IncrementalDecoder:
    """Concatenated, the pieces equal what all ids at once decode to after the prompt.

    (For byte-level tokenizers; one with byte fallback may turn back on characters inside a run of
    invalid bytes.) The cost is linear: what is decoded at once is short. Special tokens are left
    out.

    Args:
        backend: a tokenizer of `tokenizers`.
        prompt_ids: what the text follows on; a special token at its end begins a text anew.
        special_ids: of the tokenizer.
    """

    def __init__(
        self, backend: Any, prompt_ids: Sequence[int] = (), special_ids: Collection[int] = ()
    ) -> None:
        self._backend = backend
        # Tokens that were given out last, or of the prompt, and what came since: at first the bytes
        # of a character that the prompt ends within, which is this text's where it becomes whole.
        end = _after_last(prompt_ids[-MAX_CONTEXT:], special_ids)
        self._context, unfinished = self._split(end)
        self._held: list[int] = []
        self._give_up_at = MAX_HELD
        self._stream = self._stream_after(self._context)
        for token_id in unfinished:
            self._push(token_id)
        # And what they are where it does not, which the prompt has shown already.
        self._shown = self._text_after(self._context, unfinished)

    def push(self, token_ids: Sequence[int]) -> str:
        """New text, without what may be an unfinished character."""
        return self._unshown("".join(map(self._push, token_ids)))

    def _push(self, token_id: int) -> str:
        self._held.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:
            # Bytes that were a character are none any more, with what follows them. The library has
            # no class of its own for it.
            return self._start_anew(self._held)
        if piece is not None:
            self._given_out(self._held)
            return piece
        return self._give_up_invalid() if len(self._held) >= self._give_up_at else ""

    def finish(self) -> str:
        """The rest; an unfinished character becomes a replacement character."""
        held, self._held = self._held, []
        return self._unshown(self._text_after(self._context, held))

    def _unshown(self, piece: str) -> str:
        if piece and self._shown:
            shown, self._shown = self._shown, ""
            return piece.removeprefix(shown)
        return piece

    def _split(self, token_ids: list[int]) -> tuple[list[int], list[int]]:
        """Tokens up to a whole character, and those of one that is unfinished.

        Where byte fallback makes of bytes that begin within a character no character at all, the
        first part begins with a whole one too.
        """
        for end in range(len(token_ids), max(0, len(token_ids) - MAX_UNFINISHED - 1), -1):
            for start in range(min(end, MAX_UNFINISHED + 1)):
                if not self._decode(token_ids[start:end]).endswith(REPLACEMENT):
                    return token_ids[start:end], token_ids[end:]
        return [], token_ids if len(token_ids) <= MAX_UNFINISHED else []

    def _stream_after(self, context: list[int]) -> DecodeStream:
        return DecodeStream(ids=context, skip_special_tokens=True)

    def _given_out(self, token_ids: list[int]) -> None:
        self._context, self._held, self._give_up_at = token_ids, [], MAX_HELD

    def _start_anew(self, token_ids: list[int]) -> str:
        """New text of tokens, as of a text of their own: nothing looks back before them."""
        self._stream = self._stream_after([])
        self._context, self._held, self._give_up_at = [], token_ids, MAX_HELD
        piece = self._stream.step(self._backend, token_ids)
        if piece is None:
            return ""
        self._given_out(token_ids)
        return piece

    def _give_up_invalid(self) -> str:
        """Text of the first of the tokens held, which no later ones will make whole.

        Empty where there is no place to cut them.
        """
        held, whole = self._held, self._decode(self._held)
        for start in range(len(held) - MAX_UNFINISHED, len(held) // 2, -1):
            head, tail = held[:start], held[start:]
            if self._decode(head) + self._decode(tail) == whole:
                return self._text_after(self._context, head) + self._start_anew(tail)
        self._give_up_at = 2 * len(held)
        return ""

    def _text_after(self, context: list[int], token_ids: list[int]) -> str:
        before, whole = self._decode(context), self._decode(context + token_ids)
        return whole[len(before) :] if whole.startswith(before) else self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=True)


def _after_last(token_ids: Sequence[int], special_ids: Collection[int]) -> list[int]:
    """The tokens behind the last special one."""
    for index in range(len(token_ids) - 1, -1, -1):
        if token_ids[index] in special_ids:
            return list(token_ids[index + 1 :])
    return list(token_ids)

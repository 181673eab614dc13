"""Encoding of texts that may be far too long: a beginning decides, and the rest is not encoded.

A tokenizer takes a second for a megabyte. What it would refuse is refused only where it is certain
that the whole text has too many tokens, by two bounds: a token has at most so many characters, and
the words at the beginning of a text stay as they are, whatever follows. It knows no requests.
"""

from typing import Any

# Characters of the first beginning that is encoded, for each token that is allowed; an English text
# has four or five a token.
CHARS_PER_TOKEN = 8
MIN_CHARS = 8192
# What a normalizer may make of a text's length: NFKC turns up to 3 characters into one.
MAX_SHRINKING = 4
# Words at the end of a beginning that may be others in the whole text: one that is cut, and what a
# pattern with lookahead decides by it.
UNCERTAIN_WORDS = 2


class BoundedEncoder:
    """`backend` is a tokenizer of `tokenizers`; safe to call from several threads."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        shrinking = 1 if backend.normalizer is None else MAX_SHRINKING
        # Characters that one token may stand for; None: any number, in a word that is unknown.
        self._max_token_chars = None if _has_unknown(backend) else longest * shrinking
        self._keeps_spaces = _keeps_spaces(backend)
        added = backend.get_added_tokens_decoder().values()
        self._longest_added = max((len(token.content) for token in added), default=1)

    def encode(
        self, text: str, max_tokens: int | None = None, add_special_tokens: bool = True
    ) -> list[int] | None:
        """Token ids of a text; None where they are certainly more than `max_tokens`."""
        if max_tokens is not None:
            if self._is_beyond(text, max_tokens):
                return None
            num_chars = max(MIN_CHARS, max_tokens * CHARS_PER_TOKEN)
            while num_chars < len(text):
                if self._num_certain(text[:num_chars]) > max_tokens:
                    return None
                num_chars *= 4
        return self._encoding(text, add_special_tokens).ids

    def _is_beyond(self, text: str, max_tokens: int) -> bool:
        """Whether its characters alone are too many."""
        if self._max_token_chars is None:
            return False
        most = max_tokens * self._max_token_chars
        if len(text) <= most:
            return False
        return self._keeps_spaces or sum(map(len, text.split())) > most

    def _num_certain(self, beginning: str) -> int:
        """Tokens that a text has which begins so, at least."""
        encoding = self._encoding(beginning, add_special_tokens=False)
        words = encoding.word_ids
        last = next((word for word in reversed(words) if word is not None), 0)
        # From here on there may be a special token that is cut, and takes the spaces before it.
        end = len(beginning[: max(0, len(beginning) + 1 - self._longest_added)].rstrip())
        return sum(
            word is not None and word <= last - UNCERTAIN_WORDS and offsets[1] <= end
            for word, offsets in zip(words, encoding.offsets, strict=True)
        )

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        # Unlike encode, encode_batch lets other threads run.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding


def _has_unknown(backend: Any) -> bool:
    """Whether characters outside the vocabulary, however many, become one token."""
    model = backend.model
    return not getattr(model, "byte_fallback", False) and (
        getattr(model, "unk_token", None) is not None or not hasattr(model, "byte_fallback")
    )


def _keeps_spaces(backend: Any) -> bool:
    """Whether spaces are tokens, and none of them part of a special token beside them."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return False
    return len(backend.encode(" " * MIN_CHARS, add_special_tokens=False).ids) > 1

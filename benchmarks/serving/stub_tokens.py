"""What a stubbed engine says: token ids that follow from the request alone.

Whoever knows a request knows its answer, so that a client can check each text, however many
engines it came from. Pure functions; `stub_engine` gives these tokens, benchmarks and tests
expect them.
"""

from array import array
from collections.abc import Collection, Sequence
from hashlib import blake2b

from slora_core.requests import Request, SamplingParams


class StubVocabulary:
    """The token ids that answers are made of: all but those that end a text."""

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._ends = sorted(eos_token_ids)
        self._num_ids = vocab_size - len(self._ends)

    def token(self, key: bytes, index: int) -> int:
        """Token `index` of the answer that `answer_key` names."""
        digest = blake2b(index.to_bytes(8), key=key, digest_size=8).digest()
        token_id = int.from_bytes(digest) % self._num_ids
        for end in self._ends:
            token_id += token_id >= end
        return token_id

    def answer(self, request: Request) -> list[int]:
        """All `max_tokens` tokens of a request's answer, those that it came with included."""
        key = answer_key(request.prompt_ids, request.adapter_id, request.sampling)
        return [self.token(key, index) for index in range(request.sampling.max_tokens)]


def answer_key(
    prompt_ids: Sequence[int], adapter_id: str | None, sampling: SamplingParams
) -> bytes:
    """Names an answer: prompt, adapter and, where it is sampled, the seed are all that counts."""
    seed = None if sampling.greedy else sampling.seed
    return blake2b(f"{adapter_id} {seed} ".encode() + array("q", prompt_ids).tobytes()).digest()

"""What a request is, what a step plans of it, and what comes back: plain data, no tensors.

Shared by scheduling (which decides) and execution (which computes); neither knows the other.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from slora_core.errors import InvalidRequestError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one request are chosen.

    Raises:
        InvalidRequestError: a value outside its range; `param` names it.
    """

    max_tokens: int = 16
    # 0 is greedy; the other sampling fields then have no effect.
    temperature: float = 1.0
    # Keep the smallest set of tokens that holds top_p of the probability top_k left, in (0, 1].
    top_p: float = 1.0
    # Keep the k most probable tokens; 0 keeps all.
    top_k: int = 0
    # Keep tokens at least min_p times as probable as the most probable one, in [0, 1].
    min_p: float = 0.0
    # Key of the request's random numbers, an int64.
    seed: int = 0
    # Go on past end-of-sequence tokens (stop_token_ids still end the request).
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    # Ends the text where one appears; matched by `detokenizer`, not by the engine.
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**63, "0 (all) or more, a signed 64-bit integer"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("seed", -(2**63) <= self.seed < 2**63, "a signed 64-bit integer"),
        )
        for name, ok, allowed in checks:
            if not ok:
                raise InvalidRequestError(
                    f"{name} is {getattr(self, name)}; it must be {allowed}", name
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are cut before one is sampled."""
        cuts = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return cuts and not self.greedy


class FinishReason(StrEnum):
    """Why a request ended; STOP covers end-of-sequence, stop token ids and stop strings."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(eq=False)
class Request:
    """One generation request and how far it has come, steps in flight included.

    Tokens are those of `prompt_ids + output_ids`, then `num_pending` that steps in flight sample.
    Token `i` has its KV in the pool for i in [0, num_computed), once the steps launched have run.
    `page_ids` is the block table: page `i` holds tokens [i * page_tokens, (i + 1) * page_tokens).
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    # Content hash of the adapter; None is the base model.
    adapter_id: str | None = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    page_ids: list[int] = field(default_factory=list)
    # Of its pages, the first ones that the prefix cache has, and the first that it found there.
    num_prefix_pages: int = 0
    num_matched_pages: int = 0
    # Slot of the adapter while the request runs; None for the base model or a waiting request.
    adapter_slot: int | None = None
    # Its index in [0, max_running_requests) for as long as it holds pages; -1 while it waits.
    row: int = -1
    num_preemptions: int = 0
    # Tokens sampled by steps in flight, which the host does not know yet.
    num_pending: int = 0
    # Steps in flight with a chunk of it.
    num_inflight: int = 0
    # Finished or aborted; what a step in flight still samples for it is discarded.
    ended: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def awaits_last_token(self) -> bool:
        """Whether a step in flight samples the last of its max_tokens: nothing is left to plan."""
        return self.num_pending > 0 and self.num_tokens >= self.max_total_tokens

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt and output, less those that are pending."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return self.prompt_ids[start:end] + self.output_ids[: max(0, end - num_prompt)]


class ScheduledChunk(NamedTuple):
    """Tokens [start, end) of one request, computed in one step.

    Holds as it was planned what commits of earlier steps change in the request. A tuple because a
    step has hundreds of them and a frozen dataclass takes three times as long to make.
    """

    request: Request
    start: int
    end: int
    # Whether the chunk ends at the request's last token, so that the next one is sampled.
    samples: bool
    # Whether its one token is sampled by a step in flight: the device knows it, the host does not.
    input_pending: bool
    # The adapter's slot, -1 for the base model.
    slot: int

    @property
    def is_decode(self) -> bool:
        """One token that follows computed ones: a decode row rather than a prefill chunk."""
        return self.end - self.start == 1 and self.start > 0

    @property
    def token_index(self) -> int:
        """Index in the request's output of the token that a chunk samples."""
        return self.end - len(self.request.prompt_ids)


@dataclass(frozen=True)
class AdapterLoad:
    """A copy of an adapter's host pages into pool pages, due before the step that carries it."""

    adapter_id: str
    slot: int
    page_ids: list[int]


@dataclass
class StepPlan:
    """What one step computes, decided by the scheduler."""

    chunks: list[ScheduledChunk] = field(default_factory=list)
    adapter_loads: list[AdapterLoad] = field(default_factory=list)
    # More could run if a request was preempted, for which no step may be in flight.
    blocked: bool = False

    def add(self, request: Request, end: int) -> ScheduledChunk:
        """Compute the request's tokens from what it has up to `end`."""
        num_tokens, slot = request.num_tokens, request.adapter_slot
        chunk = ScheduledChunk(
            request,
            request.num_computed,
            end,
            samples=end == num_tokens,
            input_pending=end > num_tokens - request.num_pending,
            slot=-1 if slot is None else slot,
        )
        self.chunks.append(chunk)
        return chunk

    def sort(self) -> None:
        """Order chunks as rows of the batch: decodes first, each part by adapter, base first."""
        self.chunks.sort(key=lambda chunk: (not chunk.is_decode, chunk.slot))


@dataclass(frozen=True)
class RequestOutput:
    """New tokens of one request after one step, and how it ended if it did."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None

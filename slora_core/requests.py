"""What a request is, what a step plans of it, and what comes back: plain data, no tensors.

Shared by scheduling (which decides) and execution (which computes); neither knows the other.
"""

import uuid
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self

from slora_core.errors import InvalidRequestError, SLoRAError


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
    # No end-of-sequence token, stop token id or stop string ends the request before it has so many.
    min_tokens: int = 0
    # Go on past end-of-sequence tokens (stop_token_ids still end the request).
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    # Ends the text where one appears; matched by `detokenizer`, not by the engine.
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"0 to max_tokens, which is {self.max_tokens}",
            ),
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


# Tokens that a suspect has to give to be none any more: as many as steps may be in flight, so that
# it has been through each step in which the engine may have ended.
TRIAL_TOKENS = 2


class FinishReason(StrEnum):
    """Why a request ended; STOP covers end-of-sequence, stop token ids and stop strings."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class Request:
    """One prompt to continue, as it goes from the ingress to the scheduler.

    With `output_ids` it continues an answer that began elsewhere: they are computed like a prompt
    and not given out again, and the next token is drawn with the index that it has in the answer.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    # Content hash of the adapter; None is the base model.
    adapter_id: str | None = None
    # Tokens of the answer that the client has already; fewer than max_tokens.
    output_ids: list[int] = field(default_factory=list)
    _: KW_ONLY
    # No two at one time share it: where a request is sent once more, it has another one.
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    # The base model that the prompt is for, where whoever sends it says; "" is any.
    model_key: str = ""
    # Requests with the same one begin alike, so that one replica should have them; "" is none.
    conversation: str = ""
    # Who asks, for fairness and limits. Unused yet, as the priority, of which higher goes first.
    tenant: str | None = None
    priority: int = 0
    # Headers of the trace that its hops belong to; None: it is not traced. No matter to the engine.
    trace: Mapping[str, str] | None = None
    # Seconds since the epoch: when the client asked, and when its answer is worth nothing any more,
    # at which the ingress ends it.
    arrived_at: float | None = None
    deadline: float | None = None
    # How often it was sent again because the engine that held it had ended; such a request starts
    # before those that are new to the engine.
    num_moves: int = 0
    # The last of these ended by itself while it computed the request: it is computed apart from
    # other suspects until it has given TRIAL_TOKENS tokens more.
    is_suspect: bool = False


@dataclass(eq=False)
class RequestState:
    """A request in the engine and how far it has come, steps in flight included.

    Tokens are those of `prompt_ids + output_ids`, then `num_pending` that steps in flight sample.
    Token `i` has its KV in the pool for i in [0, num_computed), once the steps launched have run.
    `page_ids` is the block table: page `i` holds tokens [i * page_tokens, (i + 1) * page_tokens).
    """

    request: Request
    num_computed: int = 0
    page_ids: list[int] = field(default_factory=list)
    # Of its pages, the first ones that the prefix cache has, and the first that it found there.
    num_prefix_pages: int = 0
    num_matched_pages: int = 0
    # Slot of the adapter while the request runs; None for the base model or a waiting request.
    adapter_slot: int | None = None
    # Its index in the device's tables, in [0, max_running_requests), for as long as it holds pages;
    # -1 while it waits.
    table_idx: int = -1
    num_preemptions: int = 0
    # Tokens of its prompt that the prefix cache had when it first started.
    num_cached_tokens: int = 0
    # Tokens sampled by steps in flight, which the host does not know yet.
    num_pending: int = 0
    # Steps in flight with a chunk of it.
    num_inflight: int = 0
    # Whether a step with a chunk of it was launched, ever.
    has_begun: bool = False
    # Finished, refused or aborted; what a step in flight still samples for it is discarded.
    ended: bool = False

    def __post_init__(self) -> None:
        # The request's own fields that a step reads of every row.
        self.request_id = self.request.request_id
        self.prompt_ids = self.request.prompt_ids
        self.sampling = self.request.sampling
        self.adapter_id = self.request.adapter_id
        # The whole answer so far, what came with the request included.
        self.output_ids = list(self.request.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_ids) + self.sampling.max_tokens

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

    request: RequestState
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

    def add(self, request: RequestState, end: int) -> ScheduledChunk:
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


class LoadFigures(NamedTuple):
    """What an engine replica holds at one moment, as it tells whoever it sends tokens to."""

    replica_id: str
    # Requests in all, and of them those that have no token yet.
    num_requests: int
    num_waiting: int
    # Tokens of the prompts of those that wait.
    queued_tokens: int
    # Pages that are free or hold only idle prefixes, of all; a moment old.
    free_page_share: float


class Delta(NamedTuple):
    """New tokens of one request on their way out; the last has a finish reason or an error.

    A tuple because every token that is streamed is carried by one, pickled and made several times.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    # A value rather than raised, since it comes from another process. `DeltaStream` gives the
    # tokens before it as a delta of their own; `StepOutput.deltas` makes one of both.
    error: SLoRAError | None = None
    # In the delta of an answer's first token: tokens of the prompt found in the prefix cache.
    num_cached_tokens: int = 0
    # Of the replica that sends it, in the first delta and in the last.
    load: LoadFigures | None = None

    @classmethod
    def of(
        cls,
        request_id: str,
        token_ids: list[int],
        ending: FinishReason | SLoRAError | None,
        num_cached_tokens: int = 0,
    ) -> Self:
        if isinstance(ending, SLoRAError):
            return cls(request_id, token_ids, None, ending, num_cached_tokens)
        return cls(request_id, token_ids, ending, None, num_cached_tokens)

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class StepOutput:
    """What one step gave, as flat lists: `token_ids[i]` is the new token of `request_ids[i]`.

    Requests that ended are in `endings`, with or without a token. Lists and one dict because a
    step of 256 rows is then pickled in microseconds.
    """

    request_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    # Why each request that ended did: a finish reason, or the error that its client is told.
    endings: dict[str, FinishReason | SLoRAError] = field(default_factory=dict)
    # Tokens of their prompts found in the prefix cache, of requests that got their first token; of
    # none where none were found.
    cached_tokens: dict[str, int] = field(default_factory=dict)
    # When it was sent, seconds since the epoch.
    at: float | None = field(default=None, compare=False)

    def __bool__(self) -> bool:
        return bool(self.request_ids or self.endings)

    def add(self, request_id: str, token_id: int, ending: FinishReason | None = None) -> None:
        self.request_ids.append(request_id)
        self.token_ids.append(token_id)
        if ending is not None:
            self.endings[request_id] = ending

    def deltas(self) -> list[Delta]:
        """The same by request, in the order in which each got its first token."""
        tokens: dict[str, list[int]] = {}
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            tokens.setdefault(request_id, []).append(token_id)
        for request_id in self.endings:
            tokens.setdefault(request_id, [])
        return [
            Delta.of(
                request_id,
                token_ids,
                self.endings.get(request_id),
                self.cached_tokens.get(request_id, 0),
            )
            for request_id, token_ids in tokens.items()
        ]

    def extend(self, later: "StepOutput") -> None:
        """Add what a later step gave."""
        self.request_ids.extend(later.request_ids)
        self.token_ids.extend(later.token_ids)
        self.endings.update(later.endings)
        self.cached_tokens.update(later.cached_tokens)

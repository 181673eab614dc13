"""What passes between the ingress and the engine replicas.

Plain data that pickles small; it knows neither HTTP nor Ray.
"""

from dataclasses import dataclass, field

from app.registry.registry import AdapterRecord
from slora_core.errors import SLoRAError
from slora_core.requests import SamplingParams


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to continue."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    # None is the base model.
    record: AdapterRecord | None = None
    # A replica that just failed this request; the router tries it last.
    avoid_replica: str | None = None


@dataclass(frozen=True)
class TokenChunk:
    """Tokens since the last chunk; the last chunk of a request has a finish reason or an error."""

    token_ids: list[int] = field(default_factory=list)
    # A value of `FinishReason`: "stop", "length" or "abort".
    finish_reason: str | None = None
    # Data rather than raised: a raised error costs the traceback's pickling and loses its type.
    error: SLoRAError | None = None
    # The replica that reports the error.
    replica_id: str | None = None

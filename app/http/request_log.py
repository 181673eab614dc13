"""The log's one line of each HTTP request, written when it is over.

Owns what is in it: numbers, ids and names of models, and no word of a prompt or an answer. Each
value is also a field of the record, which Serve writes as such where its `logging_config` says
JSON. What fails on the way is logged where it does, under an id that begins with the answer's.
"""

import logging
import time
from typing import Any

from app.http.exchange import Exchange
from app.ray_private import NOT_ON_TERMINAL

logger = logging.getLogger(__name__)

# What becomes of a request whose client has left before its end.
LEFT = "left"


def log_exchange(exchange: Exchange) -> None:
    """Write the line; what only reads, and succeeds, is told at level DEBUG: probes come often."""
    is_ordinary = exchange.method == "GET" and exchange.status == 200
    level = logging.DEBUG if is_ordinary else logging.INFO
    if logger.isEnabledFor(level):
        fields = fields_of(exchange)
        text = " ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
        logger.log(level, "request: %s", text, extra={**fields, **NOT_ON_TERMINAL})


def fields_of(exchange: Exchange) -> dict[str, Any]:
    """What the line has, by name."""
    total_s = time.monotonic() - exchange.began_at
    fields: dict[str, Any] = {
        "request_id": exchange.request_id,
        "http_method": exchange.method,
        "http_route": exchange.route,
        "http_status": exchange.status,
        "outcome": None if exchange.error is None else exchange.error.type,
        "total_s": round(total_s, 4),
    }
    if exchange.answer is not None:
        fields |= _fields_of_answer(exchange)
    elif exchange.status == 499:
        fields["outcome"] = LEFT
    return fields


def _fields_of_answer(exchange: Exchange) -> dict[str, Any]:
    answer = exchange.answer
    assert answer is not None
    courses = [generation.course for generation in answer.generations]
    error = exchange.error or answer.error
    reasons = [course.finish_reason or LEFT for course in courses]
    record = courses[0].record
    began = [c.first_token_at for c in courses if c.first_token_at is not None]
    usage = answer.usage()
    return {
        "answer_id": answer.id,
        "model": answer.model,
        # None is the base model.
        "adapter_version": None if record is None else record.version,
        "outcome": ",".join(dict.fromkeys(reasons)) if error is None else error.type,
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "first_token_s": round(min(began) - exchange.began_at, 4) if began else None,
        "moves": sum(course.num_moves for course in courses),
    }

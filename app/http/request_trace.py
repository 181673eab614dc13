"""What the span of an HTTP request says, set when the request is over.

Names of attributes are OpenTelemetry's, for HTTP and for generative models, where it has one.
"""

from app.http.exchange import Exchange
from app.http.responses import Answer


def end_span(exchange: Exchange) -> None:
    """End it, as failed where the server could not answer."""
    span = exchange.span
    if span.carrier is not None:
        span.rename(f"{exchange.method} {exchange.route or ''}".strip())
        span.set("http.request.method", exchange.method)
        span.set("http.route", exchange.route)
        span.set("http.response.status_code", exchange.status)
        span.set("slora.request_id", exchange.request_id)
        if exchange.answer is not None:
            _set_answer(exchange, exchange.answer)
    error = exchange.error or (exchange.answer.error if exchange.answer else None)
    span.end(error.type if error is not None and error.status >= 500 else None)


def _set_answer(exchange: Exchange, answer: Answer) -> None:
    span, usage = exchange.span, answer.usage()
    courses = [generation.course for generation in answer.generations]
    is_chat = exchange.route is not None and "chat" in exchange.route
    record = courses[0].record
    span.set("gen_ai.operation.name", "chat" if is_chat else "text_completion")
    span.set("gen_ai.request.model", answer.model)
    span.set("gen_ai.response.id", answer.id)
    reasons = [str(c.finish_reason) for c in courses if c.finish_reason is not None]
    span.set("gen_ai.response.finish_reasons", reasons or None)
    span.set("gen_ai.usage.input_tokens", usage.prompt_tokens)
    span.set("gen_ai.usage.output_tokens", usage.completion_tokens)
    span.set("slora.cached_tokens", usage.prompt_tokens_details.cached_tokens)
    span.set("slora.adapter_version", None if record is None else record.version)
    span.set("slora.moves", sum(course.num_moves for course in courses))

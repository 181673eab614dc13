"""Figures of a load run, and a table of them for people.

Reads the records of `load_generator`; knows neither servers nor files.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.load_generator import RequestRecord

PERCENTILES = (50, 90, 99)
# A first token later than this breaks S-LoRA's SLO.
DEFAULT_SLO_S = 6.0


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": _rounded(percentile(values, percent)) for percent in PERCENTILES}


def summarize(records: Sequence[RequestRecord], slo_s: float = DEFAULT_SLO_S) -> dict[str, Any]:
    """All figures of a run; times in seconds.

    ttft: from sending to the first piece of text. inter_token: of each request, first piece to
    last over the tokens after the first. pause: between two pieces of one request, which hold
    several tokens where a server gathers them. slo_attainment: share of all requests, whatever
    became of them, whose first token came in time. Times are of answered requests only.
    """
    answered = [record for record in records if record.is_answered]
    refused = [record for record in records if record.error == "refused"]
    errors = Counter(r.error for r in records if r.error is not None and r.error != "refused")
    wall_s = max((record.end_s or 0.0 for record in records), default=0.0)
    num_output_tokens = sum(record.num_output_tokens for record in answered)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in answered)
    first_token_s = [r.first_token_s for r in answered if r.first_token_s is not None]
    per_second = 1 / wall_s if wall_s else 0.0
    return {
        "num_requests": len(records),
        "num_answered": len(answered),
        "num_aborted": len(refused),
        "num_errors": errors.total(),
        "errors": dict(sorted(errors.items())),
        "num_models": len({record.model for record in records}),
        "wall_s": _rounded(wall_s),
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
        "requests_per_s": _rounded(len(answered) * per_second),
        "output_tokens_per_s": _rounded(num_output_tokens * per_second),
        "total_tokens_per_s": _rounded((num_prompt_tokens + num_output_tokens) * per_second),
        "slo_s": slo_s,
        "slo_attainment": _rounded(
            sum(_meets(record, slo_s) for record in records) / len(records) if records else 0.0
        ),
        "ttft_s": percentiles(first_token_s),
        "inter_token_s": percentiles(_inter_token_s(answered)),
        "pause_s": percentiles([pause for record in answered for pause in _pauses(record)]),
        "latency_s": percentiles([r.end_s - r.sent_s for r in answered if r.end_s and r.sent_s]),
        # How late the client itself was: large values mean that it is the client that was slow.
        "client_lag_s": percentiles([r.sent_s - r.due_s for r in records if r.sent_s is not None]),
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    counts = (
        f"{summary['num_answered']} of {summary['num_requests']} requests answered, "
        f"{summary['num_aborted']} aborted, {summary['num_errors']} lost, "
        f"{summary['num_models']} models asked, {summary['wall_s']:.1f} s"
    )
    lines = [
        counts,
        f"  throughput       {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} output tokens/s, "
        f"{summary['total_tokens_per_s']:.1f} tokens/s with prompts",
        f"  SLO attainment   {summary['slo_attainment']:.1%} (first token within "
        f"{summary['slo_s']:g} s)",
        "                   " + "".join(f"{f'p{p}':>11}" for p in PERCENTILES),
    ]
    for label, key in (
        ("first token", "ttft_s"),
        ("between tokens", "inter_token_s"),
        ("between pieces", "pause_s"),
        ("whole answer", "latency_s"),
        ("client's lag", "client_lag_s"),
    ):
        lines.append(f"  {label:<17}" + "".join(_ms(v) for v in summary[key].values()))
    lines += [f"  lost: {number} x {kind}" for kind, number in summary["errors"].items()]
    return "\n".join(lines)


def _meets(record: RequestRecord, slo_s: float) -> bool:
    first_token_s = record.first_token_s
    return record.is_answered and first_token_s is not None and first_token_s <= slo_s


def _inter_token_s(answered: Sequence[RequestRecord]) -> list[float]:
    return [
        (record.piece_s[-1] - record.piece_s[0]) / (record.num_output_tokens - 1)
        for record in answered
        if record.num_output_tokens > 1 and record.piece_s
    ]


def _pauses(record: RequestRecord) -> list[float]:
    return [b - a for a, b in zip(record.piece_s, record.piece_s[1:], strict=False)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _ms(seconds: float | None) -> str:
    return f"{'-':>11}" if seconds is None else f"{seconds * 1000:>8.1f} ms"

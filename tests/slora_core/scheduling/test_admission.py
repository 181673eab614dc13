"""The peak estimate against a simulation that grows every request token by token."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slora_core.config import EngineConfig
from slora_core.memory.page_pool import pages_for
from slora_core.requests import Request, RequestState, SamplingParams
from slora_core.scheduling.admission import PeakEstimate, expected_total_tokens


def _request(num_prompt: int, max_tokens: int, num_output: int = 0) -> RequestState:
    sampling = SamplingParams(max_tokens=max_tokens)
    return RequestState(Request([1] * num_prompt, sampling, output_ids=[1] * num_output))


@pytest.mark.parametrize(
    "assumed,num_output,expected",
    [
        # None assumes max_tokens, however far it is.
        (None, 0, 110),
        (None, 99, 110),
        # The assumption, as long as it is not proved wrong; then one token more than there is.
        (20, 0, 30),
        (20, 19, 30),
        (20, 20, 31),
        (20, 60, 71),
        (0, 0, 11),
        # Never more than max_tokens.
        (200, 0, 110),
        (20, 99, 110),
    ],
)
def test_expected_total_tokens(assumed: int | None, num_output: int, expected: int) -> None:
    config = EngineConfig(admission_output_tokens=assumed)
    assert expected_total_tokens(_request(10, 100, num_output), config) == expected


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, 30), (20, 30), (50, 60), (100, 110)])
def test_a_request_is_not_expected_to_end_before_its_min_tokens(min_tokens, expected) -> None:
    config = EngineConfig(admission_output_tokens=20)
    sampling = SamplingParams(max_tokens=100, min_tokens=min_tokens)
    assert expected_total_tokens(RequestState(Request([1] * 10, sampling)), config) == expected


def test_nothing_but_max_tokens_ends_a_request() -> None:
    config = EngineConfig(admission_output_tokens=20)
    for stops, expected in (({}, 110), ({"stop_token_ids": (5,)}, 30), ({"stop": ("x",)}, 30)):
        sampling = SamplingParams(max_tokens=100, ignore_eos=True, **stops)
        request = RequestState(Request([1] * 10, sampling))
        assert expected_total_tokens(request, config) == expected


def _simulated_peak(requests: list[RequestState], config: EngineConfig) -> int:
    """Most pages held at once when all requests grow in lockstep and free when they end."""
    live = [(request.num_tokens, expected_total_tokens(request, config)) for request in requests]
    peak = 0
    while live:
        live = [(num_tokens + 1, end) for num_tokens, end in live]
        peak = max(peak, sum(pages_for(n, config.page_tokens) for n, _ in live))
        live = [(num_tokens, end) for num_tokens, end in live if num_tokens < end]
    return peak


requests_drawn = st.lists(
    st.builds(
        lambda prompt, max_tokens, done: _request(prompt, max_tokens, min(done, max_tokens - 1)),
        st.integers(1, 70),
        st.integers(1, 60),
        st.integers(0, 60),
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(requests_drawn, st.sampled_from([1, 4, 16]), st.sampled_from([None, 0, 3, 30]))
@example([_request(20, 1), _request(1, 20)], 4, None)
def test_peak_bounds_the_simulation_tightly(
    requests: list[RequestState], page_tokens: int, assumed: int | None
) -> None:
    config = EngineConfig(page_tokens=page_tokens, admission_output_tokens=assumed)
    peak = PeakEstimate(requests, config).pages()
    simulated = _simulated_peak(requests, config)
    # Each request wastes less than a page.
    assert simulated <= peak <= simulated + len(requests)
    if page_tokens == 1:
        assert peak == simulated
    # One after another, and the last as a candidate: the same.
    estimate = PeakEstimate([], config)
    for request in requests[1:]:
        estimate.add(request)
    assert estimate.pages(*requests[:1]) == peak
    assert estimate.pages() <= peak


def test_peak_is_below_the_sum_where_short_requests_end_early() -> None:
    config = EngineConfig(page_tokens=1, admission_output_tokens=None)
    requests = [_request(100, 1), _request(10, 100)]
    # Both run for one token (101 + 11); then the second goes on alone up to 110.
    assert PeakEstimate(requests, config).pages() == 112
    assert PeakEstimate([], config).pages() == 0

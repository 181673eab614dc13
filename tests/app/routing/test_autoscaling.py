"""The policy over recorded figures, and as Serve calls it."""

import math
from types import SimpleNamespace

import pytest

from app.routing.autoscaling import Load, LoadPolicy

POLICY = LoadPolicy(
    target_requests=64,
    target_queued_tokens=2048,
    target_running_tokens=None,
    target_page_share=0.8,
)
IDLE = Load(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("load", "current", "wanted"),
    [
        # Within the targets.
        (Load(50, 0, 9000, 0.6), 1, 1),
        # A queue of requests, of long prompts, pages that run out.
        (Load(130, 0, 0, 0.5), 1, 3),
        (Load(5, 5000, 0, 0.5), 1, 3),
        (Load(5, 0, 0, 0.95), 1, 2),
        (Load(90, 100, 0, 2.6), 3, 4),
        # Two could just do it, but would be beyond 0.7 of their targets.
        (Load(120, 0, 0, 1.0), 3, 3),
        (Load(85, 0, 0, 1.0), 3, 2),
        # One less at a time.
        (Load(10, 0, 0, 0.1), 5, 4),
        (IDLE, 5, 4),
        # The last one goes only when there is nothing at all.
        (Load(1, 0, 0, 0), 1, 1),
        (IDLE, 1, 0),
        (IDLE, 0, 0),
    ],
)
def test_the_scarcest_target_decides(load, current, wanted):
    assert POLICY.num_replicas(load, current) == wanted


def test_running_tokens_where_they_have_a_target():
    policy = LoadPolicy(64, 2048, 10_000, 0.8)
    assert policy.num_replicas(Load(1, 0, 25_000, 0.1), 1) == 3
    assert POLICY.num_replicas(Load(1, 0, 25_000, 0.1), 1) == 1


def test_a_wavering_load_holds():
    """Whatever made it ask for n replicas does not make n ask for fewer at once."""
    for num_requests in range(65, 1000):
        wanted = POLICY.num_replicas(Load(num_requests, 0, 0, 0), 1)
        assert wanted == math.ceil(num_requests / 64)
        for part in (0.8, 0.9, 1.0):
            fewer = Load(part * num_requests, 0, 0, 0)
            assert POLICY.num_replicas(fewer, wanted) == wanted


def test_as_serve_calls_it():
    from ray.serve._private.autoscaling_state import _resolve_policy_callable

    from app.args import SLoRAArgs
    from app.scaling import engine_scaling

    args = SLoRAArgs(max_replicas=4, target_requests=10)
    policy = _resolve_policy_callable(engine_scaling(args)["autoscaling_config"].policy)
    context = SimpleNamespace(
        total_num_requests=12.0,
        target_num_replicas=1,
        aggregated_metrics={
            "queued_tokens": {"a": 4000.0, "b": 4200.0},
            "running_tokens": {"a": 1e9},
            "used_page_share": {"a": 0.1, "b": 0.1},
        },
    )
    # 8200 tokens over four steps of 512.
    assert policy(context) == (5, {})
    context.aggregated_metrics = None
    assert policy(context) == (2, {})

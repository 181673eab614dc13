"""How many engine replicas the load needs: the policy of Serve's own autoscaler.

Owns the arithmetic; Serve adds the bounds, the delays and the start of a first replica. Serve
pickles this module by value into its controller, so it imports nothing of this project.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# What a replica's `record_autoscaling_stats` tells: tokens of prompts that wait for their first
# token, tokens of requests that hold pages, and the share of the pool's pages that they hold.
QUEUED_TOKENS = "queued_tokens"
RUNNING_TOKENS = "running_tokens"
USED_PAGE_SHARE = "used_page_share"

# A replica goes only where the others are then at this part of their targets.
ROOM_AFTER = 0.7
# Less than this of one replica's target is nothing: averages never quite reach it.
NOTHING = 1e-3


class Load(NamedTuple):
    """What all replicas have together; of the page share, the sum."""

    num_requests: float
    queued_tokens: float
    running_tokens: float
    used_page_share: float


class LoadPolicy:
    """Made once by Serve from its `policy_kwargs` and asked ten times a second.

    Args: what one replica should have of each, None: no matter.
    """

    def __init__(
        self,
        target_requests: float,
        target_queued_tokens: float,
        target_running_tokens: float | None,
        target_page_share: float,
    ) -> None:
        self._targets = Load(
            target_requests,
            target_queued_tokens,
            math.inf if target_running_tokens is None else target_running_tokens,
            target_page_share,
        )

    def __call__(self, context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
        """Replicas that there should be; no state is kept between calls."""
        metrics = context.aggregated_metrics or {}
        load = Load(
            context.total_num_requests,
            _sum(metrics, QUEUED_TOKENS),
            _sum(metrics, RUNNING_TOKENS),
            _sum(metrics, USED_PAGE_SHARE),
        )
        return self.num_replicas(load, context.target_num_replicas), {}

    def num_replicas(self, load: Load, current: int) -> int:
        """As many as the scarcest of the targets asks for; of too many, one less at a time."""
        needed = max(have / target for have, target in zip(load, self._targets, strict=True))
        if needed > current:
            return math.ceil(needed)
        enough = 0 if needed < NOTHING else math.ceil(needed / ROOM_AFTER)
        return max(current - 1, enough) if enough < current else current


def _sum(metrics: Mapping[str, Mapping[Any, float]], name: str) -> float:
    return sum(metrics.get(name, {}).values())

"""Arguments of the application that say how many replicas there are.

Owns names, units, defaults and the reasons for them, as `args`, whose fields these are.
"""

from typing import Self

from pydantic import BaseModel, Field, model_validator


class ScalingArgs(BaseModel):
    """How many engine and ingress replicas there are, and what adds or removes some."""

    # Engine replicas, each with a copy of the base model and a pool of its own; with autoscaling,
    # those of the start.
    num_replicas: int = Field(default=1, ge=1)
    # Autoscaling: between how many engine replicas the load decides. `max_replicas` None: it does
    # not, there are always num_replicas. `min_replicas` None: num_replicas; 0 lets an idle server
    # give up its last one, and the first request then waits for a start.
    min_replicas: int | None = Field(default=None, ge=0)
    max_replicas: int | None = Field(default=None, ge=1)
    # What a replica should hold; where the replicas together hold more, one is added. Requests,
    # running and waiting; None: max_running_requests, beyond which they only wait.
    target_requests: float | None = Field(default=None, gt=0.0)
    # Tokens of prompts that have no first token yet; None: four steps of max_batched_tokens, so
    # that the last of them waits for about so long.
    target_queued_tokens: float | None = Field(default=None, gt=0.0)
    # Tokens of requests that are computed, prompts and answers; None: only pages limit them.
    target_running_tokens: float | None = Field(default=None, gt=0.0)
    # Share of the pool that running requests hold. Above 0.8 little is left for adapters and
    # prefixes, and requests are preempted.
    target_page_share: float = Field(default=0.8, gt=0.0, le=1.0)
    # Seconds for which load must ask for more, or fewer, replicas before they come or go, one at a
    # time. A new one takes 10 to 60 s to be of use, so it should come soon; what leaves too early
    # must start again. `scale_to_zero_delay_s`, of the last one, None: scale_down_delay_s.
    scale_up_delay_s: float = Field(default=5.0, ge=0.0)
    scale_down_delay_s: float = Field(default=300.0, ge=0.0)
    scale_to_zero_delay_s: float | None = Field(default=None, ge=0.0)
    # Seconds over which load is averaged before it is compared, and between two reports of a
    # replica or ingress: some of them make an average.
    autoscaling_window_s: float = Field(default=15.0, gt=0.0)
    autoscaling_report_s: float = Field(default=2.0, gt=0.0)
    # Processes that take HTTP requests; one serves some thousand tokens a second.
    num_ingress_replicas: int = Field(default=1, ge=1)
    # Up to how many of them load may add, and the requests that one should hold. None: none are
    # added. 100 streams at 20 tokens a second are what one process serves with ease.
    max_ingress_replicas: int | None = Field(default=None, ge=1)
    target_ingress_requests: float = Field(default=100.0, gt=0.0)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas is None:
            if self.min_replicas is not None:
                raise ValueError(
                    f"min_replicas is {self.min_replicas} without max_replicas; set both, or "
                    "num_replicas alone"
                )
        elif not self.least_replicas <= self.num_replicas <= self.max_replicas:
            raise ValueError(
                f"num_replicas is {self.num_replicas}; it must be from min_replicas, "
                f"{self.least_replicas}, to max_replicas, {self.max_replicas}"
            )
        most = self.max_ingress_replicas
        if most is not None and most < self.num_ingress_replicas:
            raise ValueError(
                f"max_ingress_replicas is {most}; it must be at least num_ingress_replicas, "
                f"{self.num_ingress_replicas}"
            )
        return self

    @property
    def least_replicas(self) -> int:
        """`min_replicas`, or the default."""
        return self.num_replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        """Engine replicas that there may be."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas

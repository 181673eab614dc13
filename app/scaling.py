"""The arguments of Serve's deployments that say how many replicas there are.

Owns the translation of `scaling_args` for Serve's autoscaler; `build` uses it.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from app.args import SLoRAArgs

# Steps of prompts that may wait in a replica before it is too much for it.
QUEUED_STEPS = 4


def engine_scaling(args: SLoRAArgs) -> dict[str, Any]:
    """Of the engine replicas."""
    if args.max_replicas is None:
        return {"num_replicas": args.num_replicas}
    targets = {
        "target_requests": args.target_requests or args.num_running_requests,
        "target_queued_tokens": args.target_queued_tokens or QUEUED_STEPS * args.num_batched_tokens,
        "target_running_tokens": args.target_running_tokens,
        "target_page_share": args.target_page_share,
    }
    policy = AutoscalingPolicy(
        policy_function="app.routing.autoscaling:LoadPolicy", policy_kwargs=targets
    )
    config = _config(
        args,
        min_replicas=args.least_replicas,
        initial_replicas=args.num_replicas,
        max_replicas=args.max_replicas,
        downscale_to_zero_delay_s=args.scale_to_zero_delay_s,
        policy=policy,
    )
    return {"autoscaling_config": config}


def ingress_scaling(args: SLoRAArgs) -> dict[str, Any]:
    """Of the ingress replicas: by their requests alone, Serve's own policy."""
    if args.max_ingress_replicas is None:
        return {"num_replicas": args.num_ingress_replicas}
    config = _config(
        args,
        min_replicas=args.num_ingress_replicas,
        max_replicas=args.max_ingress_replicas,
        target_ongoing_requests=args.target_ingress_requests,
    )
    return {"autoscaling_config": config}


def autoscaling_reports(args: SLoRAArgs) -> dict[str, Any]:
    """Actor options with which a replica reports its load as often as the arguments say.

    Serve reads both intervals, 10 s each, from the environment of the processes that report.
    """
    if args.max_replicas is None and args.max_ingress_replicas is None:
        return {}
    interval = str(args.autoscaling_report_s)
    reporters = ("REPLICA", "HANDLE")
    names = [f"RAY_SERVE_{reporter}_AUTOSCALING_METRIC_PUSH_INTERVAL_S" for reporter in reporters]
    return {"runtime_env": {"env_vars": dict.fromkeys(names, interval)}}


def _config(args: SLoRAArgs, **fields: Any) -> AutoscalingConfig:
    return AutoscalingConfig(
        upscale_delay_s=args.scale_up_delay_s,
        downscale_delay_s=args.scale_down_delay_s,
        look_back_period_s=args.autoscaling_window_s,
        **fields,
    )

"""The application's import path: `app.build:build`, with the arguments of `app.args`.

Owns which deployments there are, what they ask of Ray and who holds whose handle.
"""

from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from app.args import SLoRAArgs, parse_args
from app.http.server import IngressServer, model_limits, sampling_defaults
from app.models.geometry import adapter_geometry
from app.models.source import resolve_revision
from app.registry.client import REGISTRY_DEPLOYMENT
from app.registry.deployment import RegistryServer
from app.replica.server import EngineServer
from app.routing.serve_router import AffinityRouter
from app.scaling import autoscaling_reports, engine_scaling, ingress_scaling
from app.serve_run import ended_by_failure
from app.start_checks import check_machine
from slora_core.text.template_sandbox import TemplateSourceError, check_template

# Ray only counts CPUs; ingress and registry wait most of the time.
CPUS_PER_INGRESS = 0.2
CPUS_PER_REGISTRY = 0.1
# Each watcher of the registry has one call waiting in it.
MAX_REGISTRY_CALLS = 1000
# A replica whose engine died fails three checks before it is replaced: within about 3 s.
HEALTH_CHECK_PERIOD_S = 1.0
# How soon the router learns a new replica's number and a dead engine.
ROUTING_STATS_PERIOD_S = 0.5


def build(args: dict[str, Any]) -> Application:
    """What a Serve config file imports: the application of its `args`.

    Raises:
        ValueError: arguments that are wrong or that this machine cannot serve.
    """
    with ended_by_failure():
        parsed = parse_args(args)
        # `serve run` without a config file builds before it starts Ray.
        if ray.is_initialized():
            check_machine(parsed)
        return application(parsed)


def application(args: SLoRAArgs) -> Application:
    """The application of these arguments.

    The model is fetched here where it must be, so that the progress is seen where the application
    is started.

    Raises:
        UnsupportedModelError: the model, before any replica starts.
        ValueError: arguments that do not fit the model or this machine's files.
    """
    args = with_absolute_paths(args)
    revision = resolve_revision(args.model, args.model_revision)
    args = args.model_copy(update={"model_revision": revision})
    # Both read the model's config: page size and context are checked against it.
    adapter_geometry(args)
    model_limits(args)
    sampling_defaults(args)
    if args.adapters_dir is not None and not Path(args.adapters_dir).is_dir():
        raise ValueError(f"adapters_dir: the directory {args.adapters_dir} does not exist")
    registry = serve.deployment(RegistryServer).options(
        name=REGISTRY_DEPLOYMENT,
        max_ongoing_requests=MAX_REGISTRY_CALLS,
        # The calls that wait in it at a stop are long polls of processes that are gone.
        graceful_shutdown_timeout_s=1.0,
        # Their access log would be all that the log says.
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": CPUS_PER_REGISTRY},
    )
    engine = serve.deployment(EngineServer).options(
        name="engine",
        **engine_scaling(args),
        max_ongoing_requests=args.num_ongoing_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        ray_actor_options={
            "num_cpus": args.cpus_per_replica,
            "num_gpus": args.gpus_per_replica,
            **autoscaling_reports(args),
        },
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter,
            request_router_kwargs={
                "spill_queue_len": args.spill_queue_len,
                "spill_factor": args.spill_factor,
            },
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
        ),
    )
    ingress = serve.deployment(IngressServer).options(
        name="ingress",
        **ingress_scaling(args),
        # The engine's own limits decide; the ingress must not refuse before them.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        ray_actor_options={"num_cpus": CPUS_PER_INGRESS, **autoscaling_reports(args)},
    )
    registry_app = registry.bind(args)
    return ingress.bind(args, engine.bind(args, registry_app), registry_app)


def with_absolute_paths(args: SLoRAArgs) -> SLoRAArgs:
    """The arguments with relative directories resolved here, where the user wrote them."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().resolve())

    model = args.model
    if model is not None and Path(model).expanduser().is_dir():
        model = absolute(model)
    return args.model_copy(
        update={
            "model": model,
            "served_model_name": args.base_model_name,
            "chat_template": template_source(args.chat_template),
            "adapters_dir": absolute(args.adapters_dir),
            "allowed_adapter_roots": args.adapter_roots,
            "registry_state_path": absolute(args.registry_state_path),
            "packed_cache_dir": absolute(args.packed_cache_dir),
        }
    )


def template_source(given: str | None) -> str | None:
    """A chat template's source, which may be given as the file that holds it.

    Raises:
        ValueError: no such file, or no template.
    """
    if given is None:
        return None
    # A template that is one line of text without any Jinja would be no template.
    is_source = "{" in given or "\n" in given
    try:
        source = given if is_source else Path(given).expanduser().read_text()
        check_template(source)
    except OSError as error:
        raise ValueError(f"chat_template: cannot read {given}: {error.strerror}") from None
    except TemplateSourceError as error:
        raise ValueError(f"chat_template {error}") from None
    return source

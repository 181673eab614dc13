"""The application's import path: `app.build:build`, with the arguments of `app.args`.

Owns which deployments there are, what they ask of Ray and who holds whose handle. `app.build:app`
is the application of the default arguments, for `serve build`, which takes no builder.
"""

from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from app import in_place, ray_private
from app.args import SLoRAArgs, parse_args
from app.config_place import ConfigPlace, find_config_place, is_built_by_serve
from app.http.server import IngressServer, model_limits, sampling_defaults
from app.models.geometry import adapter_geometry
from app.models.source import resolve_revision
from app.registry.client import REGISTRY_DEPLOYMENT
from app.registry.deployment import RegistryServer
from app.replica.server import EngineServer
from app.routing.serve_router import AffinityRouter
from app.scaling import autoscaling_reports, engine_scaling, ingress_scaling
from app.serve_run import EXPECTED, as_line, ended_by_failure
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
        RayServeException: the same, and whatever else is no defect, in a process of Serve's: its
            status tells it as it is, and Serve would try four times after any other error.
    """
    try:
        with ended_by_failure():
            parsed = parse_args(args)
            # `serve run` without a config file builds before it starts Ray.
            if ray.is_initialized():
                check_machine(parsed)
            return application(parsed, find_config_place())
    except EXPECTED as error:
        if not is_built_by_serve():
            raise
        raise RayServeException(as_line(error)) from error


def __getattr__(name: str) -> Application:
    """`app`, made when it is asked for: an import alone must not fetch a model."""
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def application(
    args: SLoRAArgs,
    place: ConfigPlace | None = None,
    engine_server: type[EngineServer] = EngineServer,
) -> Application:
    """The application of these arguments, whose relative paths start at `place`, or here.

    `engine_server` is what its engine replicas are.

    The model is fetched here where it must be, so that the progress is seen where the application
    is started.

    Raises:
        UnsupportedModelError: the model, before any replica starts.
        ValueError: arguments that do not fit the model or this machine's files.
    """
    args = with_absolute_paths(args, place or ConfigPlace(Path.cwd()))
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
    engine = serve.deployment(engine_server).options(
        name=in_place.ENGINE,
        **engine_scaling(args),
        max_ongoing_requests=args.num_ongoing_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        max_surge_percent=args.max_surge_percent,
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
        name=in_place.INGRESS,
        **ingress_scaling(args),
        # The engine's own limits decide; the ingress must not refuse before them.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        # One that must go is there until another one serves.
        max_surge_percent=100,
        ray_actor_options={"num_cpus": CPUS_PER_INGRESS, **autoscaling_reports(args)},
    )
    registry_app = _changing_in_place(registry, args).bind(args)
    engine_app = _changing_in_place(engine, args).bind(args, registry_app)
    return _changing_in_place(ingress, args).bind(args, engine_app, registry_app)


def _changing_in_place(deployment: Deployment, args: SLoRAArgs) -> Deployment:
    """With replicas that stay where later arguments change nothing that they were started with."""
    with_settings = deployment.options(user_config=in_place.settings(deployment.name, args))
    version = in_place.code_version(deployment.name, args)
    return ray_private.with_code_version(with_settings, version)


def with_absolute_paths(args: SLoRAArgs, place: ConfigPlace) -> SLoRAArgs:
    """The arguments with relative paths resolved where the user wrote them.

    Raises:
        ValueError: names one that cannot be.
    """

    def absolute(name: str) -> str | None:
        path = getattr(args, name)
        return None if path is None else place.absolute(name, path)

    # What is no directory may be a hub id.
    is_path = args.model is not None and (
        place.holds(args.model) or args.model.startswith((".", "~", "/"))
    )
    adapters_dir = absolute("adapters_dir")
    roots = [place.absolute("allowed_adapter_roots", root) for root in args.allowed_adapter_roots]
    if adapters_dir is not None:
        roots.append(adapters_dir)
    return args.model_copy(
        update={
            "model": absolute("model") if is_path else args.model,
            "served_model_name": args.base_model_name,
            "chat_template": template_source(args.chat_template, place),
            "adapters_dir": adapters_dir,
            "allowed_adapter_roots": list(dict.fromkeys(roots)),
            "registry_state_path": absolute("registry_state_path"),
            "packed_cache_dir": absolute("packed_cache_dir"),
        }
    )


def template_source(given: str | None, place: ConfigPlace) -> str | None:
    """A chat template's source, which may be given as the file that holds it.

    Raises:
        ValueError: no such file, or no template.
    """
    if given is None:
        return None
    # A template that is one line of text without any Jinja would be no template.
    is_source = "{" in given or "\n" in given
    try:
        source = given if is_source else Path(place.absolute("chat_template", given)).read_text()
        check_template(source)
    except OSError as error:
        raise ValueError(f"chat_template: cannot read {given}: {error.strerror}") from None
    except TemplateSourceError as error:
        raise ValueError(f"chat_template {error}") from None
    return source

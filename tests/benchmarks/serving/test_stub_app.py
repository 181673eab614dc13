"""The application with stubbed engines is the product's but for the engine process."""

import pytest
from pydantic import ValidationError

from app.build import application
from app.registry.client import REGISTRY_DEPLOYMENT
from benchmarks.serving.stub_app import StubArgs, StubEngineServer, build, stub_spec
from tests.factories import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("build") / "tiny"))


def deployments(built):
    ingress = built._bound_deployment
    _, engine, registry = ingress.init_args
    return {d.name: d for d in (ingress, engine._bound_deployment, registry._bound_deployment)}


def test_only_the_engines_differ(model):
    stubbed = deployments(build({"model": model, "num_replicas": 2, "stub_step_s": 0.5}))
    real = deployments(application(StubArgs(model=model, num_replicas=2)))
    assert stubbed.keys() == real.keys() == {"ingress", "engine", REGISTRY_DEPLOYMENT}
    for name, deployment in stubbed.items():
        is_engine = name == "engine"
        assert (deployment.func_or_class is StubEngineServer) == is_engine
        if not is_engine:
            assert deployment.func_or_class is real[name].func_or_class
        assert deployment.num_replicas == real[name].num_replicas
    args = stubbed["engine"].init_args[0]
    assert isinstance(args, StubArgs) and args.stub_step_s == 0.5


def test_what_the_process_is_started_with(model):
    args = StubArgs(
        model=model, page_tokens=8, stub_step_s=0.5, stub_crash_token_id=3, stub_crash_at=2
    )
    spec = stub_spec(args)
    assert (spec.model_path, spec.engine.page_tokens) == (model, 8)
    assert (spec.step_s, spec.crash_token_id, spec.crash_at) == (0.5, 3, 2)


def test_an_argument_that_is_none(model):
    with pytest.raises(ValidationError, match="stub_steps"):
        build({"model": model, "stub_steps": 1})

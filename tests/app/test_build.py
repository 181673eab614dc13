import pytest
import yaml
from click.testing import CliRunner
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_cli

from app import build, in_place
from app.args import SLoRAArgs
from app.build import application, template_source, with_absolute_paths
from app.config_place import ConfigPlace
from app.http.server import model_limits
from app.registry.client import REGISTRY_DEPLOYMENT
from slora_core.errors import UnsupportedModelError
from tests.app.fakes import make_record
from tests.factories import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("build") / "tiny")


def test_an_application_is_built_without_ray(model):
    built = application(SLoRAArgs(model=str(model), num_replicas=3, num_ingress_replicas=2))
    ingress = built._bound_deployment
    args, engine_app, registry_app = ingress.init_args
    engine, registry = engine_app._bound_deployment, registry_app._bound_deployment
    assert (ingress.name, engine.name, registry.name) == ("ingress", "engine", REGISTRY_DEPLOYMENT)
    assert (ingress.num_replicas, engine.num_replicas, registry.num_replicas) == (2, 3, 1)
    # What waits is bounded in the ingress, wherever it waits.
    assert engine.max_queued_requests == -1
    # All of them know the same arguments, and one registry.
    assert args.served_model_name == "tiny"
    assert engine.init_args == (args, registry_app) and registry.init_args == (args,)


def test_serve_build_writes_a_config_of_the_default_application(model, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "parse_args", lambda values: SLoRAArgs(model=str(model), **values))
    written = tmp_path / "config.yaml"
    asked = CliRunner().invoke(serve_cli, ["build", "app.build:app", "-o", str(written)])
    assert asked.exit_code == 0, asked.output
    [app] = ServeDeploySchema.model_validate(yaml.safe_load(written.read_text())).applications
    assert app.import_path == "app.build:app"
    deployments = {deployment.name: deployment for deployment in app.deployments}
    assert set(deployments) == {"ingress", "engine", REGISTRY_DEPLOYMENT}
    assert deployments["engine"].user_config == in_place.settings("engine", SLoRAArgs())
    assert deployments["ingress"].max_surge_percent == 100
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        build.nothing  # noqa: B018


def test_what_does_not_fit_is_told_before_anything_starts(model, tmp_path):
    with pytest.raises(ValueError, match="adapters_dir: .*/none"):
        application(SLoRAArgs(model=str(model), adapters_dir=str(tmp_path / "none")))
    # A page of one token has 2 x 1 x 2 x 15 elements.
    odd = make_model(tmp_path / "odd", head_dim=30)
    with pytest.raises(ValueError, match="page_tokens"):
        application(SLoRAArgs(model=str(odd), page_tokens=1))
    with pytest.raises(ValueError, match="max_model_len is 513; the model's limit is 512 tokens"):
        application(SLoRAArgs(model=str(model), max_model_len=513))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UnsupportedModelError, match="/none does not exist"):
        application(SLoRAArgs(model=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        application(SLoRAArgs(model=str(tmp_path / "empty")))


def test_relative_paths_start_where_the_user_is(model):
    here = ConfigPlace(model.parent)
    args = with_absolute_paths(
        SLoRAArgs(model="tiny", adapters_dir="a", registry_state_path="s"), here
    )
    cached = with_absolute_paths(SLoRAArgs(model="tiny", packed_cache_dir="p"), here)
    parent = model.parent
    assert (args.model, args.base_model_name) == (str(model), "tiny")
    assert (args.adapters_dir, args.registry_state_path) == (f"{parent}/a", f"{parent}/s")
    assert args.allowed_adapter_roots == [f"{parent}/a"]
    assert cached.packed_cache_dir == f"{parent}/p" and args.packed_cache_dir is None
    hub = with_absolute_paths(SLoRAArgs(model="org/name"), here)
    assert (hub.model, hub.base_model_name) == ("org/name", "name")


def test_limits_of_model_and_pool(model):
    limits = model_limits(SLoRAArgs(model=str(model), max_model_len=100))
    assert (limits.context_len, limits.vocab_size, limits.page_tokens) == (100, 256, 16)
    assert limits.eos_token_ids == {2}
    # The context, what the pool has, what it has beside an adapter of two pages, and one at least.
    record = make_record("a")
    rooms = [(None, None), (None, 6), (None, 4), (record, 4), (record, 2)]
    assert [limits.output_room(10, *room) for room in rooms] == [90, 86, 54, 22, 1]


def test_a_chat_template_is_source_or_a_file_of_it(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    here = ConfigPlace(tmp_path)
    for given in (str(file), "mine.jinja", "{{ messages }}"):
        assert template_source(given, here) == "{{ messages }}"
    assert template_source(None, here) is None
    with pytest.raises(ValueError, match="chat_template: cannot read .*nowhere: No such file"):
        template_source("nowhere", here)
    with pytest.raises(ValueError, match="chat_template is not valid Jinja in line 1"):
        template_source("{% if %}", here)

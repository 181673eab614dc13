"""The config files that are shipped say what the application understands."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from app.args import parse_args

CONFIGS = Path(__file__).resolve().parents[2] / "serve_configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_is_of_serve_and_of_this_application(path):
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    [application] = config.applications
    assert application.import_path == "app.build:build"
    parse_args(application.args)
    assert config.http_options.host == "127.0.0.1"

"""Where relative paths start, by who has the application built."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from app import config_place
from app.args import SLoRAArgs
from app.build import with_absolute_paths
from app.config_place import ConfigPlace, find_config_place
from app.ray_private import ServeRun


@pytest.fixture
def in_task(monkeypatch, tmp_path):
    """This process stands for the one in which Serve builds; `in_task(...)` says of what."""

    def pretend(serve_run=None, **runtime_env):
        context = SimpleNamespace(get_task_id=lambda: "01", runtime_env=runtime_env)
        monkeypatch.setattr(config_place.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(config_place.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(config_place.ray_private, "find_serve_run", lambda: serve_run)
        monkeypatch.chdir(tmp_path)

    return pretend


def test_whoever_builds_is_where_the_paths_start(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config_place() == ConfigPlace(tmp_path)


def test_a_driver_is_where_the_paths_start(in_task, monkeypatch, tmp_path):
    in_task()
    driver = SimpleNamespace(get_task_id=lambda: None)
    monkeypatch.setattr(config_place.ray, "get_runtime_context", lambda: driver)
    assert find_config_place() == ConfigPlace(tmp_path)


def test_serve_run_on_a_cluster_that_was_started_elsewhere(in_task, tmp_path):
    called_in = tmp_path / "project"
    called_in.mkdir()
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=called_in) as process:
        in_task(ServeRun("01", process.pid, owns_cluster=False))
        assert find_config_place() == ConfigPlace(called_in)
        process.kill()


def test_a_working_dir_comes_first(in_task, tmp_path):
    in_task(ServeRun("01", os.getpid(), owns_cluster=False), working_dir=f"local://{tmp_path}")
    assert find_config_place() == ConfigPlace(tmp_path)


def test_serve_deploy_in_a_checkout(in_task, monkeypatch, tmp_path):
    in_task()
    place = find_config_place()
    root = Path(__file__).resolve().parents[2]
    assert place == ConfigPlace(root, is_guessed=True)
    assert (
        place.absolute("adapters_dir", "serve_configs/adapters") == f"{root}/serve_configs/adapters"
    )
    with pytest.raises(ValueError, match=f"adapters_dir: mine is relative, {root}/mine does not"):
        place.absolute("adapters_dir", "mine")
    # Nothing is written into a checkout for want of a better place.
    with pytest.raises(ValueError, match="registry_state_path: state.json is relative"):
        with_absolute_paths(SLoRAArgs(registry_state_path="state.json"), place)


def test_serve_deploy_of_an_installed_package_takes_absolute_paths_alone(
    in_task, monkeypatch, tmp_path
):
    in_task()
    monkeypatch.setattr(config_place, "_ROOT", tmp_path)
    place = find_config_place()
    assert place == ConfigPlace(None)
    for refused in (
        {"adapters_dir": "adapters"},
        {"allowed_adapter_roots": ["/a", "more"]},
        {"model": "./model"},
        {"chat_template": "mine.jinja"},
    ):
        [name] = refused
        with pytest.raises(ValueError, match=rf"^{name}: .* is relative, and .*working_dir"):
            with_absolute_paths(SLoRAArgs(**refused), place)
    given = SLoRAArgs(model="org/name", adapters_dir=str(tmp_path), chat_template="{{ messages }}")
    taken = with_absolute_paths(given, place)
    assert (taken.model, taken.adapters_dir) == ("org/name", str(tmp_path))


def test_a_home_directory_is_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ConfigPlace(None).absolute("adapters_dir", "~/a") == f"{tmp_path}/a"
    (tmp_path / "m").mkdir()
    assert ConfigPlace(None).holds("~/m") and not ConfigPlace(None).holds("m")

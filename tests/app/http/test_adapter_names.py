"""Which names and paths an adapter may be loaded by over HTTP, links followed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from tests.app.api_errors import error_of
from tests.app.http.adapter_world import AsyncRegistry, World, load
from tests.factories import make_random_adapter
from tests.mutations import CONFIG, WEIGHTS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("names"))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("s3://bucket/lora", "is a s3:// address; only directories are served yet"),
        ("gs://bucket/lora", "is a gs:// address; only directories are served yet"),
        ("https://x/lora", "is a https:// address; only directories are served yet"),
        ("org/some-lora", "id of a repository on the hub: only directories are served yet"),
        ("nowhere", "is not a directory"),
    ],
)
def test_what_kind_of_path_it_is_is_told(world, path, told):
    answer = world.load("x", path)
    assert told in error_of(answer, 400)["message"]


def test_a_name_with_the_settings_of_its_training(world):
    world.add("lr=2e-4,r=16")

    async def work(client):
        card = (await load(client, "lr=2e-4,r=16", "lr=2e-4,r=16")).json()
        assert card["id"] == "lr=2e-4,r=16"
        assert (await client.get("/v1/models/lr=2e-4,r=16")).json()["id"] == card["id"]
        body = {"model": card["id"], "prompt": "hi", "max_tokens": 2}
        return await client.post("/v1/completions", json=body)

    assert world.run(work).status_code == 200


@pytest.mark.parametrize("name", ["a/../b", "a//b", "a/", "a/.", "a/..", "../a", ".", "a/./b"])
def test_a_name_that_urls_lose_is_refused(world, name):
    error = error_of(world.load(name, "good"), 400)
    assert f"adapter name {name!r}" in error["message"] and error["param"] == "lora_name"


@pytest.mark.parametrize("name", ["a/b", "a..b", "team@x/run:2", "a...", "a/b.c+(1),x=~2-"])
def test_a_name_that_is_taken_has_a_card(world, name):
    async def work(client):
        assert (await load(client, name, "good", load_inplace=True)).status_code == 200
        return await client.get(f"/v1/models/{name}")

    assert world.run(work).json()["id"] == name


def test_a_snapshot_of_a_hub_cache_is_served_and_escapes_are_not(world, tmp_path):
    repository = world.root / "models--org--lora"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for index, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(world.good / name, repository / "blobs" / str(index))
        (snapshot / name).symlink_to(Path("../../blobs") / str(index))
    assert world.load("hub", snapshot).status_code == 200

    outside = tmp_path / "secret"
    outside.write_text(json.dumps({"peft_type": "LORA"}))
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(outside)
    assert world.load("escape", snapshot).status_code == 403
    # Nor by way of the blobs.
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../blobs/0")
    (repository / "blobs" / "0").unlink()
    (repository / "blobs" / "0").symlink_to(outside)
    assert world.load("escape", snapshot).status_code == 403
    # Nor of another repository.
    other = world.root / "models--org--other" / "snapshots" / "1"
    other.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (other / name).symlink_to(tmp_path / "models--org--lora" / "blobs" / name)
    assert world.load("escape", other).status_code == 403


def test_a_link_to_another_volume_that_is_an_allowed_root(tmp_path):
    world = World(tmp_path / "server")
    volume = make_random_adapter(tmp_path / "volume" / "a", world.model)
    (world.root / "link").symlink_to(volume)
    assert world.load("link").status_code == 403
    roots = [world.root, tmp_path / "volume"]
    inspector = AdapterInspector(world.geometry, roots)
    world.registry = AsyncRegistry(AdapterRegistry(inspector, LivingPools(1000)))
    assert world.load("link").status_code == 200


def test_a_folder_whose_name_is_no_text_is_no_answers_end(world):
    """A card with its path would have every list of models fail."""
    folder = os.fsencode(world.root) + b"/\xff"
    shutil.copytree(os.fsencode(world.good), folder)
    (world.root / "to-bytes").symlink_to(os.fsdecode(folder))
    assert "codec can't encode" in error_of(world.load("bytes", "to-bytes"), 403)["message"]
    shutil.rmtree(folder)
    assert world.run(lambda client: client.get("/v1/models")).status_code == 200

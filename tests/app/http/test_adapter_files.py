"""Loads over HTTP of what people have in their folders: served rightly, or a 400 that says why."""

import asyncio
import errno
import hashlib
import itertools
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from app.http.bodies import BodyReader
from app.http.limits import ModelLimits
from app.http.routes import Ingress, api_app
from app.http.service import CompletionService
from app.registry import inspector
from app.registry.follower import RegistryView
from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from slora_core.adapters import peft_weights
from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.text.base_text import BaseText
from slora_core.text.template_sandbox import MAX_SOURCE_CHARS
from slora_core.text.tokenizer import Tokenizer
from tests.app.api_errors import error_of
from tests.app.fakes import FakeEngine
from tests.factories import make_geometry, make_model, make_random_adapter
from tests.mutations import CONFIG, MUTATIONS, WEIGHTS, mutate
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer

NUM_MUTANTS = 200
MAX_LOAD_S = 2.0


class AsyncRegistry:
    """A real registry as the ingress calls it."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry

    async def changes_since(self, position=None):
        return self._registry.changes_since(position)

    async def load(self, name, path, replace):
        return await asyncio.to_thread(self._registry.load, name, path, replace)

    async def unload(self, name):
        await asyncio.to_thread(self._registry.unload, name)


class World:
    """A server over a real registry; every adapter lies under `root`."""

    def __init__(self, directory: Path, **rules) -> None:
        self.model = make_tokenizer(make_model(directory / "model", vocab_size=VOCAB_SIZE))
        self.root = directory / "root"
        self.geometry = make_geometry(self.model)
        base_text = BaseText(self.model, eos_token_ids=(2,))
        inspector = AdapterInspector(self.geometry, [self.root], AdapterRules(**rules), base_text)
        registry = AdapterRegistry(inspector, LivingPools(1000), reserved_names=["base"])
        self.registry = AsyncRegistry(registry)
        self.good = self.add("good")

    def add(self, name, **options) -> Path:
        return make_random_adapter(self.root / name, self.model, **options)

    def add_text(self, name, files) -> Path:
        """An adapter with further files in its folder, JSON where they are no text."""
        folder = self.add(name)
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file).write_text(text)
        return folder

    def run(self, work):
        self.engine = FakeEngine()

        async def main():
            limits = ModelLimits(100, VOCAB_SIZE, frozenset({2}), 16)
            view = RegistryView(self.registry)
            service = CompletionService(
                "base", "/base", limits, Tokenizer(self.model), view, self.engine
            )

            async def is_ready():
                return True

            ingress = Ingress(service, self.registry, is_ready, BodyReader(10_000, 5.0, 10_000))
            transport = httpx.ASGITransport(api_app(ingress, lambda app: nullcontext()))
            async with httpx.AsyncClient(transport=transport, base_url="http://slora") as client:
                return await work(client)

        return asyncio.run(main())

    def load(self, name, path=None):
        """Load it, in place of what has its name."""
        return self.run(lambda client: load(client, name, path or name, load_inplace=True))


async def load(client, name, path, **fields):
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return await client.post("/v1/load_lora_adapter", json=body)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("files"), base_names=frozenset({"org/base"}))


def is_as_in_the_files(folder, geometry, adapter_id):
    """Whether an adapter's identity and weights are those of its files, read apart."""
    config, weights = ((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config + weights)
    tensors = sorted(load_file(folder / WEIGHTS).items())
    found = read_peft_adapter(folder, geometry)[1]
    # By name, layers and modules are in the geometry's order: A and B of each, in turn.
    pairs = {name.rsplit(".lora_", 1)[0]: [] for name, _ in tensors}
    for name, tensor in tensors:
        pairs[name.rsplit(".lora_", 1)[0]].append(tensor)
    same = [
        torch.equal(lora.a, a) and torch.equal(lora.b, b)
        for (a, b), lora in zip(pairs.values(), found.values(), strict=True)
    ]
    return digest.hexdigest() == adapter_id and all(same)


def test_mutated_folders_are_refused_by_name_or_served_rightly(world):
    async def work(client):
        good = {"model": "good", "prompt": "hi", "max_tokens": 4}
        assert (await load(client, "good", "good")).status_code == 200
        statuses = dict.fromkeys((200, 400), 0)
        for seed in range(NUM_MUTANTS):
            folder = world.root / f"mutant-{seed}"
            shutil.copytree(world.good, folder)
            what = mutate(folder, seed)
            started = time.monotonic()
            answer = await load(client, folder.name, folder.name)
            assert time.monotonic() - started < MAX_LOAD_S, what
            assert answer.status_code in statuses, (what, answer.text)
            statuses[answer.status_code] += 1
            if answer.status_code == 400:
                error = answer.json()["error"]
                assert error["param"] == "lora_path" and len(error["message"]) > 20, what
                assert "internal" not in error["message"], what
            else:
                records = (await world.registry.changes_since()).records
                record = records[folder.name]
                assert is_as_in_the_files(folder, world.geometry, record.adapter_id), what
            assert (await client.post("/v1/completions", json=good)).status_code == 200, what
        return statuses

    statuses = world.run(work)
    # Some flips change a weight only, and some fields nothing.
    assert statuses[400] > NUM_MUTANTS * 0.6 and statuses[200] > NUM_MUTANTS * 0.05
    assert len(MUTATIONS) < NUM_MUTANTS / 10


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


def test_an_adapter_of_another_base_is_served_and_everybody_is_told(world, caplog):
    folder = world.add("foreign", base_model_name_or_path="org/other-7b")
    told = "it was trained for org/other-7b; the base model here is org/base"

    async def work(client):
        answer = await load(client, "foreign", folder)
        assert answer.status_code == 200 and answer.json()["warnings"] == [told]
        return (await client.get("/v1/models/foreign")).json()

    assert world.run(work)["warnings"] == [told]
    assert told in caplog.text


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


SHOUT = "{% for m in messages %}{{ m['content'] | upper }}!{% endfor %}"


class TestText:
    """What folders say of text."""

    @staticmethod
    def prompt_of(world, name):
        """The prompt of a chat on an adapter, as text, special tokens shown."""

        async def work(client):
            body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            [request] = world.engine.requests
            return Tokenizer(world.model)._backend.decode(
                request.prompt_ids, skip_special_tokens=False
            )

        return world.run(work)

    @pytest.mark.parametrize(
        "files",
        [
            {"chat_template.jinja": SHOUT},
            {"tokenizer_config.json": {"chat_template": SHOUT}},
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": SHOUT},
                    ]
                }
            },
        ],
    )
    def test_its_own_template(self, world, files):
        assert world.load("shouting", world.add_text("shouting", files)).status_code == 200
        assert self.prompt_of(world, "shouting") == "HI!"
        assert "assistant" in self.prompt_of(world, "good")

    def test_one_content_with_two_templates(self, world):
        for name, template in (("first", "1"), ("second", "2")):
            folder = world.add_text(name, {"chat_template.jinja": template})
            assert world.load(name, folder).status_code == 200
        assert (self.prompt_of(world, "first"), self.prompt_of(world, "second")) == ("1", "2")

    @pytest.mark.parametrize(
        ("template", "told"),
        [
            ("{% for m in messages %}", "in chat_template.jinja is not valid Jinja in line 1"),
            ("{{ messages | nosuch }}", "in chat_template.jinja is not valid Jinja in line 1"),
            ("x" * (MAX_SOURCE_CHARS + 1), "has 65537 characters; at most 65536"),
        ],
    )
    def test_a_broken_template_is_refused_at_the_load(self, world, template, told):
        folder = world.add_text("broken", {"chat_template.jinja": template})
        assert told in error_of(world.load("broken", folder), 400)["message"]

    def test_a_template_with_marks_for_training_is_served(self, world):
        template = "{%- generation -%}{{ messages[0].content }}{%- endgeneration -%}"
        folder = world.add_text("marked", {"chat_template.jinja": template})
        assert world.load("marked", folder).status_code == 200
        assert self.prompt_of(world, "marked") == "hi"

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ],
    )
    def test_a_template_that_reaches_or_runs_too_far_is_refused_when_it_runs(self, world, template):
        folder = world.add_text("sly", {"chat_template.jinja": template})
        assert world.load("sly", folder).status_code == 200

        async def work(client):
            body = {"model": "sly", "messages": [{"role": "user", "content": "hi"}]}
            return await client.post("/v1/chat/completions", json=body)

        assert "chat template refuses" in error_of(world.run(work), 400)["message"]

    @pytest.mark.parametrize(
        ("files", "ends"),
        [
            ({"generation_config.json": {"eos_token_id": [2, 40]}}, [2, 40]),
            ({"generation_config.json": {"eos_token_id": None}}, [2]),
            # The base's token 1 is "<s>".
            ({"tokenizer_config.json": {"eos_token": "<s>"}}, [1, 2]),
            ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, [2]),
            ({"generation_config.json": {"eos_token_id": VOCAB_SIZE}}, [2]),
            (
                {
                    "tokenizer_config.json": {
                        "eos_token": "<other>",
                        "added_tokens_decoder": {"1": {"content": "<other>"}},
                    },
                    "generation_config.json": {"eos_token_id": 1},
                },
                [2],
            ),
        ],
    )
    def test_its_own_ends_where_the_tokens_agree(self, world, files, ends):
        folder = world.add_text("ending", files)
        assert world.load("ending", folder).status_code == 200
        shutil.rmtree(folder)

        async def work(client):
            card = (await client.get("/v1/models/ending")).json()
            body = {"model": "ending", "prompt": "hi", "stop_token_ids": [9]}
            await client.post("/v1/completions", json=body)
            await client.post("/v1/completions", json={**body, "ignore_eos": True})
            return card["eos_token_ids"]

        assert world.run(work) == ends
        stops = [request.sampling.stop_token_ids for request in world.engine.requests]
        assert stops == [(9, *[i for i in ends if i != 2]), (9,)]

    @pytest.mark.parametrize(
        ("files", "told"),
        [
            (
                {"tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<tool>"}}}},
                "3 is '<tool>' and not '",
            ),
            ({"added_tokens.json": {"<tool>": VOCAB_SIZE}}, f"{VOCAB_SIZE} is '<tool>'"),
            (
                {"tokenizer.json": {"model": {"vocab": {"<pad>": 0, "<tool>": 3}}}},
                "3 is '<tool>' and not '",
            ),
        ],
    )
    def test_other_tokens_than_the_base_models_are_named(self, world, caplog, files, told):
        folder = world.add_text("tool", files)
        [warning] = world.load("tool", folder).json()["warnings"]
        shutil.rmtree(folder)
        assert warning.startswith("its tokenizer has other tokens than the base model's")
        assert told in warning and warning in caplog.text

    def test_a_copy_of_the_base_models_tokenizer_says_nothing(self, world):
        folder = world.add("copying")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (world.model / name).exists():
                shutil.copy(world.model / name, folder)
        assert world.load("copying", folder).json()["warnings"] == []


def test_a_base_without_a_template_says_which_argument_helps(tmp_path):
    world = World(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (world.model / name).unlink(missing_ok=True)
    make_tokenizer(world.model, chat_template=None)
    assert (
        world.load("own", world.add_text("own", {"chat_template.jinja": SHOUT})).status_code == 200
    )

    async def work(client):
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        return await client.post("/v1/chat/completions", json=body)

    assert "its argument chat_template" in error_of(world.run(work), 400)["message"]
    assert TestText.prompt_of(world, "own") == "HI!"


def test_an_error_that_may_pass_is_503_with_a_time_to_try_again(world, monkeypatch):
    world.add("passing")

    def failing(path, flags):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(peft_weights, "_open_without_waiting", failing)
        answer = world.load("passing")
        assert "Input/output error; try again" in error_of(answer, 503)["message"]
        assert int(answer.headers["Retry-After"]) > 0
    stamps = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(inspector, "files_stamp", lambda directory: (next(stamps),))
        answer = world.load("passing")
        assert "changed while they were read; try again" in error_of(answer, 503)["message"]
    assert world.load("passing").status_code == 200


def test_an_error_that_lasts_is_a_400(world, monkeypatch):
    world.add("barred")

    def failing(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(peft_weights, "_open_without_waiting", failing)
    error = error_of(world.load("barred"), 400)
    assert error["message"].endswith("Permission denied") and error["param"] == "lora_path"

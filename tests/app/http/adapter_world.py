"""A server in this process that loads adapters over HTTP, from a folder of its own."""

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path

import httpx

from app.http.bodies import BodyReader
from app.http.limits import ModelLimits
from app.http.routes import Ingress, api_app
from app.http.service import CompletionService
from app.registry.follower import RegistryView
from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.whole_tensors import BaseModelTensors
from slora_core.text.base_text import BaseText
from slora_core.text.tokenizer import Tokenizer
from tests.app.fakes import FakeEngine
from tests.factories import make_geometry, make_model, make_random_adapter
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer


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
        known = AdapterRules(base_tensors=BaseModelTensors(self.model), **rules)
        inspector = AdapterInspector(self.geometry, [self.root], known, base_text)
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

            bodies = BodyReader(10_000, 5.0, 10_000)
            ingress = Ingress(service, self.registry, is_ready, bodies, lambda: None)
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

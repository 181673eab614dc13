"""A node's store with a registry and adapters, in asyncio and without Ray."""

import asyncio
from pathlib import Path

from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from app.store.memory import HostStore
from app.store.packed_files import PackedFiles
from app.store.packer import NodeStore
from tests.factories import make_geometry, make_random_adapter


class LocalRegistry:
    """The real registry, served by a poll instead of Serve."""

    def __init__(self, geometry, root):
        self.registry = AdapterRegistry(AdapterInspector(geometry, [root]), LivingPools(1000))
        self.is_down = False

    async def changes_since(self, position):
        return self.registry.changes_since(position)

    async def wait_for_change(self, position, timeout_s):
        async with asyncio.timeout(timeout_s):
            while self.registry.position == position and not self.is_down:
                await asyncio.sleep(0.005)
        if self.is_down:
            raise ConnectionError("down")
        return self.registry.changes_since(position)


class World:
    """One store with its registry and a directory of adapters; use on a running loop."""

    def __init__(
        self,
        tmp_path: Path,
        model: Path,
        capacity: int = 2**24,
        grace_s: float = 60,
        packed_bytes: int = 0,
    ):
        self.root = tmp_path
        self.model = model
        self.geometry = make_geometry(model)
        self.registry = LocalRegistry(self.geometry, tmp_path)
        self.host = HostStore(self.geometry, capacity, capacity)
        self.unused = asyncio.Event()
        self.files = PackedFiles(tmp_path / "packed", self.geometry, packed_bytes)
        self.store = NodeStore(self.host, self.files, self.registry, grace_s, self.unused.set)

    def add(self, name, replace=False, **options):
        path = make_random_adapter(self.root / name, self.model, **options)
        return self.registry.registry.load(name, path, replace)

    async def until(self, condition, timeout_s=10):
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def __aenter__(self):
        self.store.start()
        return self

    async def __aexit__(self, *_):
        self.host.check_integrity()
        self.store.close()


def run_world(scenario, *args, **options):
    """Run `scenario(world)` on a loop of its own."""

    async def main():
        async with World(*args, **options) as world:
            await asyncio.wait_for(scenario(world), 60)

    asyncio.run(main())

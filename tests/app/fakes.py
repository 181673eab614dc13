"""Stand-ins for the engine and the registry, so that the ingress runs without Ray."""

import asyncio

from app.registry.names_and_paths import check_name
from app.registry.registry import RegistrySnapshot
from app.registry.state import AdapterRecord
from slora_core.errors import AdapterExistsError, AdapterNotFoundError
from slora_core.requests import Delta, FinishReason
from tests.tiny_tokenizer import byte_ids


def make_record(name, version=1, **fields):
    values = {
        "name": name,
        "adapter_id": f"{name}-v{version}",
        "version": version,
        "path": f"/adapters/{name}",
        "max_rank": 8,
        "num_pages": 2,
        "nbytes": 1024,
        "loaded_at": 1.5,
    }
    return AdapterRecord(**{**values, **fields})


class FakeRegistry:
    """Holds records; `revision` moves at each change, as the real one's does."""

    def __init__(self, *names):
        self.records = {name: make_record(name) for name in names}
        self.revision = 0
        self.num_pool_pages = 6
        self.num_snapshots = 0
        self.changed = asyncio.Event()

    async def snapshot(self):
        self.num_snapshots += 1
        await asyncio.sleep(0.01)
        return RegistrySnapshot(self.revision, dict(self.records), self.num_pool_pages)

    async def wait_for_change(self, revision, timeout_s):
        while revision == self.revision:
            self.changed.clear()
            await self.changed.wait()
        return await self.snapshot()

    async def load(self, name, path, replace):
        check_name(name, {"base"})
        if name in self.records and not replace:
            raise AdapterExistsError(f"{name!r} exists")
        version = self.records[name].version + 1 if name in self.records else 1
        self.records[name] = make_record(name, version, path=path)
        self._change()
        return self.records[name]

    async def unload(self, name):
        if name not in self.records:
            raise AdapterNotFoundError(f"no adapter is named {name!r}")
        del self.records[name]
        self._change()

    def _change(self):
        self.revision += 1
        self.changed.set()


class FakeEngine:
    """Answers every request with `text`, `num_bytes` bytes a delta; records what it saw."""

    def __init__(self, text="hello world", num_bytes=3, finish_reason="length"):
        self.text = text
        self.num_bytes = num_bytes
        self.finish_reason = finish_reason
        self.requests = []
        self.num_closed_early = 0
        # Raised before delta number i.
        self.errors = {}
        # Of each prompt, as its first delta tells.
        self.num_cached_tokens = 0
        # Seconds before each delta.
        self.delay_s = 0.0

    async def generate(self, request, record, renew):
        self.requests.append(request)
        ids = byte_ids(self.text.encode())
        starts = range(0, len(ids), self.num_bytes)
        finished = False
        try:
            for number, start in enumerate(starts):
                await asyncio.sleep(self.delay_s)
                if number in self.errors:
                    finished = True
                    raise self.errors[number]
                reason = None
                if start == starts[-1]:
                    finished = True
                    reason = FinishReason(self.finish_reason)
                token_ids = ids[start : start + self.num_bytes]
                num_cached = 0 if number else self.num_cached_tokens
                yield Delta(request.request_id, token_ids, reason, num_cached_tokens=num_cached)
        finally:
            self.num_closed_early += not finished

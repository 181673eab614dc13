"""Stand-ins for the engine and the registry, so that the ingress runs without Ray."""

import asyncio
from dataclasses import replace

from app.registry.changes import ChangeHistory, RegistryChanges
from app.registry.names_and_paths import check_name
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
    """Holds records and tells of their changes, as the real one does."""

    def __init__(self, *names):
        self.records = {name: make_record(name) for name in names}
        self.history = ChangeHistory()
        self.num_pool_pages = 6
        self.num_asked = 0
        self.changed = asyncio.Event()

    async def changes_since(self, position):
        self.num_asked += 1
        await asyncio.sleep(0.01)
        names = self.history.since(position)
        since = None if names is None else position
        names = self.records if names is None else names
        return RegistryChanges(
            self.history.position,
            since,
            {name: self.records[name] for name in names if name in self.records},
            frozenset(name for name in names if name not in self.records),
            self.num_pool_pages,
        )

    async def wait_for_change(self, position, timeout_s):
        while position == self.history.position:
            self.changed.clear()
            await self.changed.wait()
        return await self.changes_since(position)

    async def load(self, name, path, replace):
        check_name(name, {"base"})
        if name in self.records and not replace:
            raise AdapterExistsError(f"{name!r} exists")
        version = self.records[name].version + 1 if name in self.records else 1
        self.records[name] = make_record(name, version, path=path)
        self._change(name)
        return self.records[name]

    async def unload(self, name):
        if name not in self.records:
            raise AdapterNotFoundError(f"no adapter is named {name!r}")
        del self.records[name]
        self._change(name)

    def _change(self, name):
        self.history.note(name)
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
        # Of each request, until its first delta.
        self.num_moves = 0
        # Seconds before each delta.
        self.delay_s = 0.0

    async def generate(self, request, record, renew, course):
        self.requests.append(request)
        ids = byte_ids(self.text.encode())
        starts = range(0, len(ids), self.num_bytes)
        finished = False
        moved = replace(request, num_moves=self.num_moves)
        try:
            with course.attempt(request.request_id, moved, record):
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
                    course.tokens_came()
                    yield Delta(request.request_id, token_ids, reason, None, num_cached)
        finally:
            self.num_closed_early += not finished

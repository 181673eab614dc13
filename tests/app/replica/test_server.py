"""What an engine replica takes up while it runs, and what it refuses; no engine is started."""

import asyncio
from dataclasses import replace

from app.args import SLoRAArgs
from app.in_place import model_key
from app.replica.server import EngineServer
from slora_core.errors import OverloadedError
from slora_core.requests import Request, SamplingParams


def test_intervals_between_deltas_change_in_place():
    server = EngineServer.__new__(EngineServer)
    server._args = SLoRAArgs()
    assert (server._interval(1), server._interval(100)) == (0.03, 0.05)
    server.reconfigure({"flush_interval_s": 0.5, "max_pieces_per_s": 10.0})
    assert (server._interval(1), server._interval(100)) == (0.5, 10.0)


def test_a_prompt_for_another_base_model_is_refused():
    server = EngineServer.__new__(EngineServer)
    server._args = SLoRAArgs(model="org/new", model_revision="b")
    old = SLoRAArgs(model="org/new", model_revision="a")
    request = Request([1], SamplingParams(max_tokens=1), model_key=model_key(old))

    async def ask():
        return [delta async for delta in server.generate(request)]

    [refusal] = asyncio.run(ask())
    assert isinstance(refusal.error, OverloadedError) and refusal.error.retry_after_s == 5
    for taken in ("", model_key(server._args)):
        server._check_model(replace(request, model_key=taken))

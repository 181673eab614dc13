"""The engine in a process of its own: tokens, refusals, aborts, and every way it can end."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from app.store.memory import HostStore
from slora_core.adapters.peft_weights import load_packed_adapter, read_peft_adapter
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.engine.process import AsyncEngine
from slora_core.engine.protocol import Begun, EngineSpec, Failed, packed, receive_message
from slora_core.errors import (
    AdapterNotFoundError,
    EngineDeadError,
    InvalidRequestError,
    SLoRAError,
    StoreGoneError,
)
from slora_core.requests import FinishReason, Request, SamplingParams, StepOutput
from tests.factories import make_adapter, make_geometry, make_model, make_random_adapter

CONFIG = EngineConfig(num_pool_tokens=1024, page_tokens=8, max_batched_tokens=64)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPT = [5, 17, 99, 3, 42, 8]
# Long enough never to end by itself within a test.
ENDLESS = SamplingParams(max_tokens=490, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def in_process(model_dir: Path) -> Engine:
    return Engine.from_pretrained(model_dir, CONFIG)


@asynccontextmanager
async def running(model_dir: Path, inflight: int = 1) -> AsyncIterator[AsyncEngine]:
    config = replace(CONFIG, max_inflight_steps=inflight)
    engine = AsyncEngine(EngineSpec(str(model_dir), "safetensors", config, num_threads=1))
    await engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def collect(
    engine: AsyncEngine, sampling: SamplingParams, adapter_id: str | None = None
) -> tuple[list[int], FinishReason | SLoRAError | None]:
    """All tokens of a request, and how it ended."""
    tokens: list[int] = []
    ending = None
    with engine.generate(Request(PROMPT, sampling, adapter_id)) as stream:
        async for delta in stream:
            assert ending is None, "the stream goes on after its end"
            tokens += delta.token_ids
            ending = delta.error or delta.finish_reason
    return tokens, ending


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("inflight", [1, 2])
def test_tokens_equal_those_of_an_engine_in_this_process(
    model_dir: Path, in_process: Engine, inflight: int
) -> None:
    [expected] = in_process.generate([Request(PROMPT, GREEDY)])

    async def main() -> list[tuple[list[int], FinishReason | SLoRAError | None]]:
        async with running(model_dir, inflight) as engine:
            return await asyncio.gather(*(collect(engine, GREEDY) for _ in range(4)))

    assert asyncio.run(main()) == [(expected, FinishReason.LENGTH)] * 4


def test_an_interval_gathers_tokens_and_loses_none(model_dir: Path, in_process: Engine) -> None:
    [expected] = in_process.generate([Request(PROMPT, GREEDY)])
    asked: list[int] = []

    def interval_s(num_streams: int) -> float:
        asked.append(num_streams)
        return 60.0

    async def main() -> list[list[int]]:
        spec = EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1)
        engine = AsyncEngine(spec, interval_s)
        await engine.start()
        try:
            with engine.generate(Request(PROMPT, GREEDY)) as stream:
                return [delta.token_ids async for delta in stream]
        finally:
            engine.close()

    # The first at once, those after it as none had gone out yet, and all the rest at the end.
    deltas = asyncio.run(main())
    assert all(deltas) and sum(deltas, []) == expected
    assert 2 <= len(deltas) <= 3 < len(expected)
    assert set(asked) <= {1}


def test_adapter_comes_from_the_shared_slab(
    model_dir: Path, in_process: Engine, tmp_path: Path
) -> None:
    directory = make_adapter(tmp_path / "adapter", model_dir, seed=3, rank=8)
    geometry = in_process.geometry
    summary, weights = read_peft_adapter(directory, geometry)
    store = HostStore(geometry, capacity_bytes=1 << 24, extent_bytes=1 << 22)
    store.put(summary.adapter_id, summary.layout, weights)

    async def main() -> tuple[list[int], int]:
        async with running(model_dir) as engine:
            info = await engine.stats()
            assert info.num_adapter_loads == 0
            engine.add_adapter(store.lease(summary.adapter_id, os.getpid()))
            # Named by as many requests as there are.
            (tokens, _), (again, _) = await asyncio.gather(
                *(collect(engine, GREEDY, summary.adapter_id) for _ in range(2))
            )
            assert again == tokens
            await engine.release_adapter_source(summary.adapter_id)
            store.release(summary.adapter_id, os.getpid())
            resident = await engine.stats()
            engine.drop_adapter(summary.adapter_id)
            dropped = await engine.stats()
            assert resident.num_adapter_pages == summary.layout.num_pages
            await engine.check_integrity()
            return tokens, dropped.num_adapter_pages

    try:
        tokens, adapter_pages = asyncio.run(main())
    finally:
        store.close()
    in_process.add_adapter(load_packed_adapter(directory, geometry))
    [base], [expected] = (
        in_process.generate([Request(PROMPT, GREEDY, adapter_id)])
        for adapter_id in (None, summary.adapter_id)
    )
    assert tokens == expected != base
    assert adapter_pages == 0


def test_a_used_adapter_is_served_after_its_store_ended(model_dir: Path, tmp_path: Path) -> None:
    geometry = make_geometry(model_dir, page_tokens=CONFIG.page_tokens)
    adapters = [
        read_peft_adapter(make_random_adapter(tmp_path / str(i), model_dir, seed=i), geometry)
        for i in range(2)
    ]
    (hot, _), (other, _) = adapters
    stores = [HostStore(geometry, 1 << 24, 1 << 22) for _ in range(2)]
    for store in stores:
        for summary, weights in adapters:
            store.put(summary.adapter_id, summary.layout, weights)

    async def main() -> None:
        async with running(model_dir) as engine:

            async def ask(location: AdapterLocation) -> FinishReason | SLoRAError | None:
                engine.add_adapter(location)
                return (await collect(engine, GREEDY, location.adapter_id))[1]

            location = stores[0].lease(hot.adapter_id, os.getpid())
            engine.add_adapter(location)
            with engine.generate(Request(PROMPT, ENDLESS, hot.adapter_id)) as stream:
                await anext(stream)
                stores[0].close()
                # Has the reader forget the first store's memory.
                assert await ask(stores[1].lease(other.adapter_id, os.getpid())) == "length"
                assert await ask(location) == "length"
            await engine.release_adapter_source(hot.adapter_id)
            assert isinstance(await ask(location), StoreGoneError)
            # So do all that name it, until it is there.
            [_, ending] = await collect(engine, GREEDY, hot.adapter_id)
            assert isinstance(ending, StoreGoneError)
            assert await ask(stores[1].lease(hot.adapter_id, os.getpid())) == "length"

    asyncio.run(main())
    stores[1].close()


def test_a_refused_request_is_told_why_and_costs_others_nothing(model_dir: Path) -> None:
    async def main() -> None:
        async with running(model_dir) as engine:
            other = asyncio.create_task(collect(engine, GREEDY))
            tokens, error = await collect(engine, SamplingParams(max_tokens=2000))
            assert tokens == [] and isinstance(error, InvalidRequestError)
            assert "exceed the context of 512 tokens" in str(error)
            assert error.param == "max_tokens"
            tokens, error = await collect(engine, GREEDY, "unknown")
            assert tokens == [] and isinstance(error, AdapterNotFoundError)
            tokens, ending = await other
            assert len(tokens) == GREEDY.max_tokens and ending is FinishReason.LENGTH

    asyncio.run(main())


def test_closing_the_stream_aborts_and_frees_pages(model_dir: Path) -> None:
    async def main() -> None:
        async with running(model_dir) as engine:
            with engine.generate(Request(PROMPT, ENDLESS)) as stream:
                await anext(stream)
                assert (await engine.stats()).num_kv_pages > 0

            async def is_free() -> bool:
                stats = await engine.stats()
                return stats.num_running == stats.num_kv_pages == 0

            await until(is_free)
            assert (await engine.stats()).num_aborted == 1

    asyncio.run(main())


def test_abort_by_id_ends_the_stream_with_its_reason(model_dir: Path) -> None:
    async def main() -> FinishReason | None:
        async with running(model_dir) as engine:
            reason = None
            with engine.generate(Request(PROMPT, ENDLESS, request_id="r")) as stream:
                async for delta in stream:
                    engine.abort("r")
                    reason = delta.finish_reason
            return reason

    assert asyncio.run(main()) is FinishReason.ABORT


def test_killed_engine_fails_its_requests_and_later_ones(model_dir: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1))
        info = await engine.start()
        with engine.generate(Request(PROMPT, ENDLESS)) as stream:
            await anext(stream)
            assert engine.is_alive()
            os.kill(info.pid, signal.SIGKILL)
            deltas = [delta async for delta in stream]
        assert isinstance(deltas[-1].error, EngineDeadError)
        assert not any(delta.is_last for delta in deltas[:-1])
        assert not engine.is_alive()
        # Not its fault.
        assert not deltas[-1].error.is_suspect
        assert str(deltas[-1].error) == "the engine process ended by signal 9"
        with pytest.raises(EngineDeadError) as caught:
            engine.generate(Request(PROMPT, GREEDY))
        assert not caught.value.is_suspect
        await asyncio.wait_for(engine.wait_dead(), timeout=10)
        with pytest.raises(EngineDeadError):
            await engine.stats()
        engine.close()

    asyncio.run(main())


def test_an_engine_that_crashes_has_its_running_requests_for_suspects(model_dir: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1))
        info = await engine.start()
        with engine.generate(Request(PROMPT, ENDLESS)) as stream:
            await anext(stream)
            dying = asyncio.create_task(engine.wait_dead())
            os.kill(info.pid, signal.SIGSEGV)
            deltas = [delta async for delta in stream]
            # Somebody may still want to know.
            assert not dying.done()
        error = deltas[-1].error
        assert isinstance(error, EngineDeadError) and error.is_suspect
        assert str(error) == "the engine process ended by signal 11"
        await asyncio.wait_for(dying, timeout=10)
        engine.close()

    asyncio.run(main())


def test_at_a_death_each_request_is_told_whether_it_is_a_suspect(tmp_path: Path) -> None:
    async def main(*last: object) -> dict[str, bool]:
        engine = AsyncEngine(EngineSpec(str(tmp_path)))
        ours, theirs = socket.socketpair()
        await engine.connect(ours)
        streams = [engine.generate(Request(PROMPT, GREEDY, request_id=name)) for name in "abc"]
        for message in (Begun(["a", "b"]), *last):
            theirs.sendall(packed(message))
        theirs.close()
        told = {}
        for stream in streams:
            with stream:
                [delta] = [delta async for delta in stream]
            assert isinstance(delta.error, EngineDeadError)
            told[delta.request_id] = delta.error.is_suspect
        engine.close()
        return told

    # By nobody knows what, and by a defect that names its step.
    assert asyncio.run(main()) == {"a": True, "b": True, "c": False}
    assert asyncio.run(main(Failed("why", ("b",)))) == {"a": False, "b": True, "c": False}


def test_a_hung_engine_is_found_and_ended(model_dir: Path) -> None:
    """Stopped, so that it neither computes nor answers; a stop keeps it from its own death too."""

    async def main() -> None:
        spec = EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1, stall_s=1.0)
        engine = AsyncEngine(spec)
        info = await engine.start()
        with engine.generate(Request(PROMPT, ENDLESS)) as stream:
            await anext(stream)
            os.kill(info.pid, signal.SIGSTOP)
            deltas = [delta async for delta in stream]
        error = deltas[-1].error
        assert isinstance(error, EngineDeadError)
        assert str(error) == "the engine gave no sign of life for 1 s"
        assert not engine.is_alive()

        async def is_gone() -> bool:
            return not is_running(info.pid)

        await until(is_gone)
        engine.close()

    asyncio.run(main())


def test_an_idle_engine_and_one_that_computes_for_long_do_not_hang(model_dir: Path) -> None:
    async def main() -> None:
        spec = EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1, stall_s=1.0)
        engine = AsyncEngine(spec)
        await engine.start()
        await asyncio.sleep(1.5)
        with engine.generate(Request(PROMPT, ENDLESS)) as stream:
            started = time.monotonic()
            async for _ in stream:
                if time.monotonic() > started + 1.5:
                    break
        assert engine.is_alive()
        engine.close()

    asyncio.run(main())


def test_where_it_hangs_is_in_the_log(model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Wherever the signal meets the main thread, it is under the loop.
    main_thread = re.compile(r'engine/main\.py", line \d+ in run\n')

    async def main() -> str:
        engine = AsyncEngine(EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1))
        info = await engine.start()
        await engine.stats()  # answered by the loop: the start is over
        os.kill(info.pid, signal.SIGUSR1)
        written = ""
        async with asyncio.timeout(20):
            while not main_thread.search(written):
                await asyncio.sleep(0.05)
                written += capfd.readouterr().err
        engine.close()
        return written

    assert "Thread 0x" in asyncio.run(main())


def test_after_a_message_that_cannot_be_read_nothing_more_is(tmp_path: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineSpec(str(tmp_path)))
        ours, theirs = socket.socketpair()
        await engine.connect(ours)
        with engine.generate(Request(PROMPT, GREEDY, request_id="r")) as stream:
            assert receive_message(theirs).request_id == "r"
            message = packed(StepOutput(["r"], [7]))
            length, payload = message[:8], message[8:]
            theirs.sendall(length + b"x" * len(payload) + message)
            [delta] = [delta async for delta in stream]
        assert delta.token_ids == [] and isinstance(delta.error, EngineDeadError)
        assert not engine.is_alive()
        theirs.settimeout(5)
        assert theirs.recv(1) == b""
        theirs.close()
        engine.close()

    asyncio.run(main())


def test_failed_start_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineSpec(str(tmp_path), "safetensors", CONFIG))
        with pytest.raises(EngineDeadError, match=r"config\.json does not exist"):
            await engine.start()
        engine.close()

    asyncio.run(main())


@pytest.fixture
def owner(model_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns an engine with an endless request and prints the engine's pid."""
    code = f"""
    import asyncio
    from slora_core.engine.protocol import EngineSpec, packed, receive_message
    from slora_core.engine.process import AsyncEngine
    from slora_core.requests import Request
    from tests.slora_core.engine.test_process import CONFIG, ENDLESS, PROMPT

    async def main():
        engine = AsyncEngine(EngineSpec({str(model_dir)!r}, "safetensors", CONFIG))
        info = await engine.start()
        print(info.pid, flush=True)
        while True:
            with engine.generate(Request(PROMPT, ENDLESS)) as stream:
                async for _ in stream:
                    pass

    asyncio.run(main())
    """
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_engine_ends_with_its_owner(owner: subprocess.Popen[str], end: signal.Signals) -> None:
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert is_running(pid)
    owner.send_signal(end)
    owner.wait()

    async def is_gone() -> bool:
        return not is_running(pid)

    asyncio.run(until(is_gone))

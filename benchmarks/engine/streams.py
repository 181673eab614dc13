"""Requests that a benchmark runs at once, and whether the engine answers them as transformers does.

The engine runs in this process; its texts are compared with those of the tests' oracle. It
measures nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo.demo_tasks import TASKS, held_out_examples, messages
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams
from tests.oracle import GreedyOracle, assert_same_greedy


@dataclass(frozen=True)
class Stream:
    """One request of the benchmark; `adapter` None is the base model."""

    prompt_ids: list[int]
    adapter: str | None


class Candidate:
    """This repository's engine, in this process."""

    def __init__(
        self, model_dir: Path, adapter_dirs: dict[str, Path], config: EngineConfig
    ) -> None:
        self._engine = Engine.from_pretrained(model_dir, config)
        self._adapter_ids: dict[str | None, str | None] = {None: None}
        for name, path in adapter_dirs.items():
            packed = load_packed_adapter(path, self._engine.geometry)
            self._engine.add_adapter(packed)
            self._adapter_ids[name] = packed.adapter_id

    def generate(self, streams: Sequence[Stream], num_tokens: int) -> list[list[int]]:
        """Run all streams at once."""
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return self._engine.generate(
            [Request(s.prompt_ids, params, self._adapter_ids[s.adapter]) for s in streams]
        )


def task_streams(model_dir: Path, adapter_names: Sequence[str], num_streams: int) -> list[Stream]:
    """Held-out questions of the demo's tasks, base and adapters in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tasks = list(TASKS)
    adapters = [None, *adapter_names]
    streams = []
    for index in range(num_streams):
        adapter = adapters[index % len(adapters)]
        # An adapter that has no task here, or the base, is asked the tasks in turn.
        task = adapter if adapter in TASKS else tasks[index % len(tasks)]
        example = held_out_examples(task, index + 1)[index]
        prompt_ids = tokenizer.apply_chat_template(
            messages(example), add_generation_prompt=True, return_dict=False
        )
        streams.append(Stream(prompt_ids, adapter))
    return streams


def one_of_each(streams: Sequence[Stream]) -> tuple[Stream, Stream]:
    """The first stream of the base model and the first of an adapter, which are also run alone."""
    base = next(stream for stream in streams if stream.adapter is None)
    return base, next(stream for stream in streams if stream.adapter is not None)


def compare(
    oracle: GreedyOracle, candidate: Candidate, streams: Sequence[Stream], num_tokens: int
) -> None:
    """Compare the texts of all streams at once, and those of two streams alone.

    Raises:
        TextsDifferError: a text is not that of transformers.
    """
    for batch in (streams, *([stream] for stream in one_of_each(streams))):
        for stream, text in zip(batch, candidate.generate(batch, num_tokens), strict=True):
            expected = oracle.generate(stream.prompt_ids, num_tokens, stream.adapter)
            assert_same_greedy(oracle, stream.prompt_ids, text, expected, stream.adapter)

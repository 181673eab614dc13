"""vLLM's offline API as a peer of the engine: written for vLLM 0.26, dummy weights, LoRA slots.

Adapters are PEFT directories of random weights in a temporary directory; many adapters alias a few
of them under ids of their own, so that each takes a slot of its own. A step is not seen from
outside, so the time of decode steps is the difference of two runs.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.dummy_adapters import ADAPTER_STD
from benchmarks.engine.figures import SEED, Figures, round_robin, zipf
from benchmarks.engine.llama_reference import llama_config
from benchmarks.engine.rows import decode_rows, prefill_rows, trace_rows
from benchmarks.engine.workloads import SETTINGS, SHAPES, fixed_batch, trace
from slora_core.config import EngineConfig
from slora_core.requests import Request
from tests.factories import make_random_adapter

# Directories that adapters alias, a multiple of every setting's number of ranks.
NUM_COPIES = 64


class VllmBackend:
    WORKLOADS = ("decode", "prefill", "trace")

    def __init__(self, args: argparse.Namespace) -> None:
        # Whether there is a CUDA device was asked of the driver before, which no forked process can
        # do again: vLLM must start its engine as a process of its own. It reads this when it does.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        from vllm import LLM

        self._args = args
        shape = SHAPES[args.shape]
        self._vocab_size = shape.vocab_size
        self._files = tempfile.TemporaryDirectory()
        root = Path(self._files.name)
        config = llama_config(shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(root / "model")
        num_adapters = 0 if args.base_only else _most_adapters(args)
        self._adapters = self._write_adapters(config, min(num_adapters, NUM_COPIES), root)
        lora: dict[str, Any] = {}
        if num_adapters:
            max_loras = min(args.max_loras, num_adapters)
            lora = {
                "enable_lora": True,
                "max_loras": max_loras,
                "max_lora_rank": max(SETTINGS[args.setting].ranks),
                # All of them: a directory is read once.
                "max_cpu_loras": num_adapters,
            }
        options = {
            "load_format": "dummy",
            "dtype": args.dtype,
            "seed": SEED,
            "gpu_memory_utilization": EngineConfig().memory_utilization,
            "max_num_seqs": args.max_running_requests,
            "max_num_batched_tokens": args.max_batched_tokens,
            "enable_prefix_caching": False,
            **lora,
        }
        started = time.perf_counter()
        self._llm = LLM(model=str(root / "model"), skip_tokenizer_init=True, **options)
        self.settings: Figures = {"ready_s": round(time.perf_counter() - started, 1), **options}

    def rows(self, workload: str) -> Iterator[Figures]:
        args = self._args
        if workload == "decode":
            return decode_rows(self._decode, args)
        if workload == "prefill":
            return prefill_rows(self._prefill, args)
        return trace_rows(self._trace, args)

    def _decode(self, batch: int, num_adapters: int) -> Figures:
        """ms of a decode step: runs of all tokens less runs of the first, the best of two each."""
        first, last = (
            self._best(self._fixed(batch, num_adapters, num_tokens))
            for num_tokens in (1, self._args.decode_steps)
        )
        num_steps = self._args.decode_steps - 1
        return {"decode_step_ms": 1e3 * (last - first) / num_steps, "num_steps": num_steps}

    def _prefill(self, batch: int, num_adapters: int) -> Figures:
        """ms until `batch` prompts are computed and each has its first token; the best of two."""
        best = self._best(self._fixed(batch, num_adapters, 1))
        return {"prefill_ms": 1e3 * best, "tokens_per_s": batch * self._args.prompt_len / best}

    def _trace(self, num_requests: int, num_adapters: int) -> Figures:
        adapters = zipf(num_requests, num_adapters)
        requests = trace(adapters, self._args.lengths, self._vocab_size, SEED)
        # Compiles what is compiled when it is first used.
        self._run(requests[:32])
        seconds = self._run(requests)
        return {
            "num_requests": num_requests,
            "requests_per_s": num_requests / seconds,
            "output_tokens_per_s": sum(r.sampling.max_tokens for r in requests) / seconds,
            "seconds": seconds,
        }

    def _fixed(self, batch: int, num_adapters: int, num_tokens: int) -> list[Request]:
        adapters = round_robin(batch, num_adapters)
        return fixed_batch(adapters, self._args.prompt_len, num_tokens, self._vocab_size, SEED)

    def _best(self, requests: Sequence[Request]) -> float:
        self._run(requests)
        return min(self._run(requests) for _ in range(2))

    def _run(self, requests: Sequence[Request]) -> float:
        """Seconds of all requests at once, either all of the base model or all of adapters."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=r.sampling.max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        loras = [self._lora_request(r.adapter_id) for r in requests if r.adapter_id is not None]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=loras or None)
        seconds = time.perf_counter() - started
        for request, output in zip(requests, outputs, strict=True):
            assert len(output.outputs[0].token_ids) == request.sampling.max_tokens
        return seconds

    def _lora_request(self, adapter_id: str) -> Any:
        from vllm.lora.request import LoRARequest

        index = int(adapter_id.rpartition("-")[2])
        # Ids begin at 1.
        return LoRARequest(adapter_id, index + 1, str(self._adapters[index % len(self._adapters)]))

    def _write_adapters(self, config: Any, count: int, root: Path) -> list[Path]:
        setting = SETTINGS[self._args.setting]
        # An adapter's rank is that of its index, whatever directory it aliases.
        num_ranks = len(setting.ranks)
        return [
            make_random_adapter(
                root / f"adapter-{index}",
                config,
                seed=index,
                rank=setting.ranks[index % num_ranks],
                target_modules=setting.modules,
                scale=ADAPTER_STD,
                dtype=getattr(torch, self._args.dtype),
            )
            for index in range(-(-count // num_ranks) * num_ranks)
        ]


def _most_adapters(args: argparse.Namespace) -> int:
    """Of any case of the workloads that are asked for."""
    counts = {
        "decode": args.batches,
        "prefill": [args.streams],
        "trace": args.num_adapters,
    }
    return max(max(counts[workload]) for workload in args.workloads)

"""PEFT on transformers as a peer of the engine: a batch of one length, step by step, eagerly.

The model has the weights that the engine has, in their memory; all adapters of a measurement are
loaded. It schedules nothing, so it is measured on fixed batches only.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.engine.figures import SEED, Figures
from benchmarks.engine.llama_reference import make_llama
from benchmarks.engine.rows import decode_rows, prefill_rows
from benchmarks.engine.workloads import SETTINGS, SHAPES, AdapterSetting, adapter_id
from slora_core.models.weights import checkpoint_views, dummy_weights


class PeftBackend:
    WORKLOADS = ("decode", "prefill")

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._device = torch.device(args.device)
        self._setting: AdapterSetting = SETTINGS[args.setting]
        shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
        self._vocab_size = shape.vocab_size
        weights = dummy_weights(shape, args.device, dtype)
        llama = make_llama(shape, checkpoint_views(shape, weights))
        self._model = self._with_first_adapter(llama)
        self._num_adapters = 1
        self.settings: Figures = {"dtype": str(dtype)}

    def rows(self, workload: str) -> Iterator[Figures]:
        args = self._args
        if workload == "decode":
            return decode_rows(
                lambda batch, n: self._decode(batch, n, args.prompt_len, args.decode_steps), args
            )
        return prefill_rows(lambda batch, n: self._prefill(batch, n, args.prompt_len), args)

    def _decode(self, batch: int, num_adapters: int, prompt_len: int, num_steps: int) -> Figures:
        """ms of a decode step of `batch` requests, the first of which the prefill samples."""
        prompts = self._prompts(batch, prompt_len)
        with self._adapters(batch, num_adapters) as names:
            # The base model, the first of a batch size, finds no memory for a cache of each length.
            self._run(prompts, 3 if num_adapters else num_steps, names)
            seconds = self._run(prompts, num_steps, names)[1]
        return {"decode_step_ms": 1e3 * seconds / (num_steps - 1), "num_steps": num_steps - 1}

    def _prefill(self, batch: int, num_adapters: int, prompt_len: int) -> Figures:
        """ms until `batch` prompts are computed and each has its first token; the best of two."""
        prompts = self._prompts(batch, prompt_len)
        with self._adapters(batch, num_adapters) as names:
            self._run(prompts, 1, names)
            best = min(self._run(prompts, 1, names)[0] for _ in range(2))
        return {"prefill_ms": 1e3 * best, "tokens_per_s": batch * prompt_len / best}

    @torch.inference_mode()
    def _run(
        self, prompts: torch.Tensor, num_tokens: int, names: dict[str, list[str]]
    ) -> tuple[float, float]:
        """Seconds until the first of `num_tokens` greedy tokens, and from there to the last."""
        cache, ids, times = None, prompts, [self._now()]
        for _ in range(num_tokens):
            output = self._model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **names
            )
            cache, ids = output.past_key_values, output.logits.argmax(dim=-1)
            if len(times) == 1:
                times.append(self._now())
        return times[1] - times[0], self._now() - times[1]

    @contextmanager
    def _adapters(self, batch: int, num_adapters: int) -> Iterator[dict[str, list[str]]]:
        """Choose adapters for a batch, in turn; what each forward call is given."""
        while self._num_adapters < num_adapters:
            index = self._num_adapters
            with self._device:
                self._model.add_adapter(
                    adapter_id(index), self._lora_config(index), autocast_adapter_dtype=False
                )
            self._num_adapters += 1
        if num_adapters == 0:
            with self._model.disable_adapter():
                yield {}
        elif num_adapters == 1:
            self._model.set_adapter(adapter_id(0))
            yield {}
        else:
            yield {"adapter_names": [adapter_id(i % num_adapters) for i in range(batch)]}

    def _with_first_adapter(self, llama: Any) -> Any:
        from peft import get_peft_model

        torch.manual_seed(SEED)
        with self._device:
            model = get_peft_model(
                llama, self._lora_config(0), adapter_id(0), autocast_adapter_dtype=False
            )
        return model.eval()

    def _lora_config(self, index: int) -> Any:
        from peft import LoraConfig

        ranks = self._setting.ranks
        rank = ranks[index % len(ranks)]
        # Random, where PEFT's own B would be zeros.
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(self._setting.modules),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )

    def _prompts(self, batch: int, prompt_len: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        shape = (batch, prompt_len)
        return torch.randint(self._vocab_size, shape, generator=generator).to(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

"""What transformers and PEFT generate, and the comparison of an engine's texts with it.

The benchmarks' oracle: plain greedy `generate`, one stream at a time, fp32 on the CPU. It knows
nothing of the engine that is compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BASE = "base"
# Two tokens whose logits are as close as this may change places with the order of a sum.
NEAR_TIE = 1e-4


class OutputsDifferError(Exception):
    """The engine's text is not that of transformers."""


@dataclass(frozen=True)
class Stream:
    """One request of the benchmark; `model` is an adapter's name or `BASE`."""

    model: str
    prompt_ids: list[int]


class Reference:
    """transformers, and PEFT for the adapters, greedy in fp32, one stream at a time."""

    def __init__(self, model_dir: Path, adapter_dirs: dict[str, Path]) -> None:
        self._base = _load(model_dir)
        self._peft: Any = None
        for name, path in adapter_dirs.items():
            if self._peft is None:
                from peft import PeftModel

                # A base of its own: PEFT wraps the modules of the one it is given.
                self._peft = PeftModel.from_pretrained(_load(model_dir), path, adapter_name=name)
            else:
                self._peft.load_adapter(path, adapter_name=name)

    def generate(self, stream: Stream, num_tokens: int) -> list[int]:
        prompt = torch.tensor([stream.prompt_ids])
        with torch.inference_mode():
            output = self._model(stream.model).generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=num_tokens,
            )
        return output[0, len(stream.prompt_ids) :].tolist()

    def next_logits(self, model: str, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self._model(model)(torch.tensor([token_ids])).logits[0, -1]

    def _model(self, name: str) -> Any:
        if name == BASE:
            return self._base
        self._peft.set_adapter(name)
        return self._peft


def check_equal(reference: Reference, stream: Stream, ours: list[int], theirs: list[int]) -> bool:
    """Whether two texts are the same; a near tie at the first difference is forgiven.

    False where one was forgiven.

    Raises:
        OutputsDifferError: they differ, and not by a near tie.
    """
    if ours == theirs:
        return True
    at = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None
    )
    if at is None:
        raise OutputsDifferError(
            f"{stream.model}: {len(ours)} tokens here, {len(theirs)} of transformers"
        )
    logits = reference.next_logits(stream.model, stream.prompt_ids + theirs[:at])
    gap = abs(float(logits[ours[at]] - logits[theirs[at]]))
    if gap > NEAR_TIE:
        raise OutputsDifferError(
            f"{stream.model}: token {at} is {ours[at]} here and {theirs[at]} of transformers, "
            f"and their logits are {gap:.2g} apart; a near tie is at most {NEAR_TIE:g}"
        )
    return False


def _load(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    # Every stream has the same length, past the end of its text too.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model

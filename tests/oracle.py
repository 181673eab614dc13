"""Greedy truth from transformers and PEFT, and the comparison that allows for near ties.

Texts of two correct fp32 implementations may part where the two best logits all but tie. A first
difference is forgiven there only, by logits that transformers computes, and it is counted:
`tests/conftest.py` prints how often. Tests compare the engine with it, and benchmarks before they
measure; it knows nothing of the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Largest difference of two candidates' logits that counts as a tie.
NEAR_TIE = 1e-4


@dataclass
class ComparisonCount:
    """Texts compared in this process, and those that the near-tie clause let pass."""

    num_compared: int = 0
    num_forgiven: int = 0


comparisons = ComparisonCount()


class TextsDifferError(AssertionError):
    """Two greedy texts differ, and not by a near tie."""


class GreedyOracle:
    """One base model in transformers, fp32, and PEFT adapters that load when they are asked for.

    With `ignore_eos`, texts go on past the end-of-sequence token.
    """

    def __init__(
        self, model_dir: Path, adapters: Mapping[str, Path] | None = None, ignore_eos: bool = False
    ) -> None:
        self.adapters = dict(adapters or {})
        self._model_dir = model_dir
        self._ignore_eos = ignore_eos
        self._base = self._load_base()
        self._peft: Any = None
        self._texts: dict[tuple[tuple[int, ...], int, str | None], list[int]] = {}

    def generate(
        self, prompt_ids: Sequence[int], max_tokens: int, adapter: str | None = None
    ) -> list[int]:
        """What `generate` adds to the prompt, the end-of-sequence token included; kept."""
        key = tuple(prompt_ids), max_tokens, adapter
        if key not in self._texts:
            self._texts[key] = self.generate_anew(prompt_ids, max_tokens, adapter)
        return self._texts[key]

    def generate_anew(
        self, prompt_ids: Sequence[int], max_tokens: int, adapter: str | None = None
    ) -> list[int]:
        """As `generate`, computed at every call: what a benchmark measures."""
        ids = torch.tensor([prompt_ids])
        model = self._model(adapter)
        with torch.inference_mode():
            text = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return text[0, len(prompt_ids) :].tolist()

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """[tokens, vocab_size]: row i scores the token after token_ids[: i + 1]."""
        model = self._model(adapter)
        with torch.inference_mode():
            return model(input_ids=torch.tensor([token_ids])).logits[0]

    def _model(self, adapter: str | None) -> Any:
        if adapter is None:
            return self._base
        if self._peft is None:
            from peft import PeftModel

            # A base of its own: PEFT wraps the modules of the one it is given.
            self._peft = PeftModel.from_pretrained(
                self._load_base(), self.adapters[adapter], adapter_name=adapter
            ).eval()
        elif adapter not in self._peft.peft_config:
            self._peft.load_adapter(self.adapters[adapter], adapter_name=adapter)
        self._peft.set_adapter(adapter)
        return self._peft

    def _load_base(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=torch.float32).eval()
        if self._ignore_eos:
            model.generation_config.eos_token_id = None
        return model


def assert_same_greedy(
    oracle: GreedyOracle,
    prompt_ids: Sequence[int],
    actual: Sequence[int],
    expected: Sequence[int],
    adapter: str | None = None,
) -> None:
    """Check that two greedy texts are the same, but for a first difference at a near tie.

    After a forgiven difference `actual` is on its own: each of its tokens must still be one of
    the best for its own past, by the same measure.

    Raises:
        TextsDifferError: they are not.
    """
    comparisons.num_compared += 1
    actual, expected = list(actual), list(expected)
    if actual == expected:
        return
    name = adapter or "base"
    shared = min(len(actual), len(expected))
    first = next((i for i in range(shared) if actual[i] != expected[i]), None)
    if first is None:
        raise TextsDifferError(
            f"{name}: one text ends where the other goes on: {actual} != {expected}"
        )
    logits = oracle.logits([*prompt_ids, *actual], adapter)[len(prompt_ids) - 1 : -1]
    pair = logits[first, [actual[first], expected[first]]]
    gap = (pair[0] - pair[1]).abs().item()
    if gap > NEAR_TIE:
        raise TextsDifferError(
            f"{name}: token {first} is {actual[first]} instead of {expected[first]}, their logits "
            f"{gap:.6f} apart: {actual} != {expected}"
        )
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(actual).unsqueeze(1)).squeeze(1)
    if behind.max() > NEAR_TIE:
        raise TextsDifferError(f"{name}: not greedy after the near tie at token {first}: {actual}")
    comparisons.num_forgiven += 1

"""Greedy truth from transformers and PEFT, and the comparison that allows for near ties.

Texts of two correct fp32 implementations may part where the two best logits all but tie. A first
difference is forgiven there only, by logits that transformers computes, and it is counted:
`tests/conftest.py` prints how often.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class GreedyOracle:
    """One base model in transformers, fp32, and PEFT adapters that load when they are asked for."""

    def __init__(self, model_dir: Path, adapters: Mapping[str, Path] | None = None) -> None:
        from transformers import AutoModelForCausalLM

        self.adapters = dict(adapters or {})
        self._base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._peft: Any = None
        self._texts: dict[tuple[tuple[int, ...], int, str | None], list[int]] = {}

    def generate(
        self, prompt_ids: Sequence[int], max_tokens: int, adapter: str | None = None
    ) -> list[int]:
        """What `generate` adds to the prompt, the end-of-sequence token included."""
        key = tuple(prompt_ids), max_tokens, adapter
        if key not in self._texts:
            ids = torch.tensor([prompt_ids])
            with self._model(adapter) as model:
                text = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            self._texts[key] = text[0, len(prompt_ids) :].tolist()
        return self._texts[key]

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """[tokens, vocab_size]: row i scores the token after token_ids[: i + 1]."""
        with self._model(adapter) as model:
            return model(input_ids=torch.tensor([token_ids])).logits[0]

    @contextmanager
    def _model(self, adapter: str | None) -> Iterator[Any]:
        from peft import PeftModel

        with torch.no_grad():
            if adapter is None:
                if self._peft is None:
                    yield self._base
                    return
                with self._peft.disable_adapter():
                    yield self._peft
                return
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(
                    self._base, self.adapters[adapter], adapter_name=adapter
                ).eval()
            elif adapter not in self._peft.peft_config:
                self._peft.load_adapter(self.adapters[adapter], adapter_name=adapter)
            self._peft.set_adapter(adapter)
            yield self._peft


def assert_same_greedy(
    oracle: GreedyOracle,
    prompt_ids: Sequence[int],
    actual: Sequence[int],
    expected: Sequence[int],
    adapter: str | None = None,
) -> None:
    """Assert that two greedy texts are the same, but for a first difference at a near tie.

    After a forgiven difference `actual` is on its own: each of its tokens must still be one of
    the best for its own past, by the same measure.
    """
    comparisons.num_compared += 1
    actual, expected = list(actual), list(expected)
    if actual == expected:
        return
    shared = min(len(actual), len(expected))
    first = next((i for i in range(shared) if actual[i] != expected[i]), None)
    assert first is not None, f"one text ends where the other goes on: {actual} != {expected}"
    logits = oracle.logits([*prompt_ids, *actual], adapter)[len(prompt_ids) - 1 : -1]
    pair = logits[first, [actual[first], expected[first]]]
    gap = (pair[0] - pair[1]).abs().item()
    assert gap <= NEAR_TIE, (
        f"token {first} is {actual[first]} instead of {expected[first]}, their logits {gap:.6f} "
        f"apart: {actual} != {expected}"
    )
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(actual).unsqueeze(1)).squeeze(1)
    assert behind.max() <= NEAR_TIE, f"not greedy after the near tie at token {first}: {actual}"
    comparisons.num_forgiven += 1

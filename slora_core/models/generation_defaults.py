"""How a model's own files want its tokens chosen where a request is silent.

Reads `generation_config.json`; knows no requests.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slora_core.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Settings of transformers that change which tokens are chosen and are not supported, with the
# values at which they change nothing.
_UNSUPPORTED = {
    "repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """As of `SamplingParams`; by themselves OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


OPENAI_DEFAULTS = GenerationDefaults()


def generation_defaults(generation: Mapping[str, Any]) -> GenerationDefaults:
    """Of the fields of a generation config.

    `do_sample` is left aside, as clients of the OpenAI API expect: it switches off what the same
    file may say of temperatures, and is false where nobody thought of it.

    Raises:
        UnsupportedModelError: a value that no request could have.
    """
    ignored = [
        name for name, neutral in _UNSUPPORTED.items() if generation.get(name) not in neutral
    ]
    if ignored:
        logger.warning(
            "generation_config.json has %s, which is not supported and has no effect",
            ", ".join(ignored),
        )
    return GenerationDefaults(
        temperature=_number(generation, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(generation, "top_p", 1.0, 0.0, 1.0),
        # -1 is how some write "all".
        top_k=max(0, int(_number(generation, "top_k", 0, -1, 2**31))),
        min_p=_number(generation, "min_p", 0.0, 0.0, 1.0),
    )


def _number(
    generation: Mapping[str, Any], name: str, default: float, least: float, most: float
) -> float:
    value = generation.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (name == "top_p" and value == 0):
        raise UnsupportedModelError(
            f"{name} in generation_config.json is {value!r}; it must be a number from {least:g} to "
            f"{most:g}, or generation_config: openai leaves the file aside"
        )
    return value

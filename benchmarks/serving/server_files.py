"""Model and adapter directories that the benchmarks' servers read.

Numbered copies make many adapters of few: an adapter's identity is the hash of its files, so
copies that differ in a field without effect are different adapters to a server, each with pages
of its own. It starts nothing and knows no server.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slora_core.adapters.peft_config import CONFIG_FILE
from slora_core.adapters.peft_weights import WEIGHTS_FILE
from tests.factories import make_random_adapter

# Deviation of dummy adapters' weights: small, so that outputs stay finite in half precision.
DUMMY_SCALE = 0.01


def adapter_dirs(root: Path) -> list[Path]:
    """The adapters in a directory, by name."""
    return sorted(config.parent for config in root.glob(f"*/{CONFIG_FILE}"))


def number_adapters(sources: Sequence[Path], num_adapters: int, out: Path) -> list[str]:
    """Make `num_adapters` different adapters of the sources in turn; returns their names.

    Copy k of a source is `out`/<source's name>-<k>. Its weights are the source's file, hard-linked
    where the file system can; its config has the copy's number in `revision`.
    """
    names = []
    for index in range(num_adapters):
        source = sources[index % len(sources)]
        number = index // len(sources)
        directory = out / f"{source.name}-{number}"
        directory.mkdir(parents=True)
        _link_or_copy(source / WEIGHTS_FILE, directory / WEIGHTS_FILE)
        config = json.loads((source / CONFIG_FILE).read_text())
        config["revision"] = f"copy-{number}"
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        names.append(directory.name)
    return names


def numbered_order(names: Sequence[str]) -> list[str]:
    """Names with the numbers of `number_adapters` first, so that sources take turns.

    A power law over them then asks every source's adapters, as S-LoRA's does.
    """

    def key(name: str) -> tuple[int, str]:
        number = re.search(r"-(\d+)$", name)
        return (int(number[1]) if number else 0, name)

    return sorted(names, key=key)


def make_dummy_adapters(
    hf_config: Any, ranks: Sequence[int], target_modules: Sequence[str], out: Path
) -> list[Path]:
    """One random adapter of each rank, `out`/rank-<rank>."""
    import torch

    return [
        make_random_adapter(
            out / f"rank-{rank}",
            hf_config,
            seed=rank,
            rank=rank,
            target_modules=target_modules,
            scale=DUMMY_SCALE,
            dtype=torch.bfloat16,
        )
        for rank in ranks
    ]


def make_dummy_model(hf_config: dict[str, Any], out: Path) -> Path:
    """A model directory without weights: its config, and a tokenizer of as many words.

    Every token id decodes to text of its own, so that each token of random weights is seen by a
    client that streams.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(hf_config, indent=2))
    vocab = {f" t{token_id}": token_id for token_id in range(hf_config["vocab_size"])}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token=" t0"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False
    ).save_pretrained(out)
    return out


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(source, target)

"""Reading and writing of an adapter's tensors, past PEFT."""

from pathlib import Path

import torch


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, directory / "adapter_model.safetensors")

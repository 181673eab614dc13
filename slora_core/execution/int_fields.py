"""Named runs of integers that describe a step, sent to the device in one copy."""

from array import array
from collections.abc import Sequence

import torch

# Fields start at multiples of this many values, 16 bytes: kernels may load them by vectors.
_ALIGNMENT = 4


class IntFields:
    """Collects int32 fields one after the other; the order of `add` fixes the layout."""

    def __init__(self) -> None:
        self._values = array("i")
        self._bounds: dict[str, tuple[int, int]] = {}

    def add(self, name: str, values: Sequence[int], size: int | None = None, fill: int = 0) -> None:
        """Append a field, padded with `fill` to `size` values where a size is given."""
        start = len(self._values)
        self._values.extend(values)
        if size is not None:
            assert len(values) <= size, f"{name} has {len(values)} values and {size} places"
            self._values.extend([fill] * (size - len(values)))
        self._bounds[name] = (start, len(self._values))
        self._values.extend([0] * (-len(self._values) % _ALIGNMENT))

    def __len__(self) -> int:
        return len(self._values)

    def size(self, name: str) -> int:
        """Values of a field, padding included."""
        start, end = self._bounds[name]
        return end - start

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each field of a buffer that holds this layout."""
        return {name: buffer[start:end] for name, (start, end) in self._bounds.items()}

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """int32 [values] of each field on `device`."""
        return self.views(self._on_host(device).to(device, non_blocking=True))

    def copy_to(self, buffer: torch.Tensor) -> None:
        """Fill the front of a device buffer, int32; returns before the copy is done."""
        buffer[: len(self)].copy_(self._on_host(buffer.device), non_blocking=True)

    def _on_host(self, device: torch.device) -> torch.Tensor:
        values = torch.frombuffer(self._values, dtype=torch.int32)
        # Pinned, so that the copy does not wait for the device; torch keeps the memory until the
        # copy is done. A copy on the CPU, too: a step writes to its fields.
        return values.pin_memory() if device.type == "cuda" else values.clone()

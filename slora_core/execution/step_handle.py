"""The result of a launched step, on its way from the device to the host."""

import torch


class StepHandle:
    """The sampled tokens of a step that may still be running."""

    def __init__(self, tokens: torch.Tensor) -> None:
        """`tokens` int32 [chunks that sample], on the device; its copy to the host starts now."""
        self._event: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def token_ids(self) -> list[int]:
        """Wait for the step; the token of each chunk that samples, in the plan's order."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens

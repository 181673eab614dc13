"""What a mutation is, and what several of them do."""

import random
from collections.abc import Callable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Files of a folder by name.
Files = dict[str, bytes]
# Of the bytes of a good adapter's config and weights, the files that it has otherwise.
Mutation = Callable[[random.Random, bytes, bytes], Files]
# In place of a file's bytes.
MISSING, DIRECTORY = b"missing", b"directory"


def flipped(rng: random.Random, data: bytes, limit: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    return bytes(changed)

"""Damaged adapter folders, each a function of a seed: what a server must not fall over."""

import random
from pathlib import Path

from tests.mutations.files import FILE_MUTATIONS
from tests.mutations.kinds import CONFIG, DIRECTORY, MISSING, WEIGHTS
from tests.mutations.weights import WEIGHTS_MUTATIONS

MUTATIONS = WEIGHTS_MUTATIONS + FILE_MUTATIONS


def mutate(good: Path, target: Path, seed: int) -> str:
    """Write the folder of this seed; returns what was done to it."""
    rng = random.Random(seed)
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    config, weights = ((good / name).read_bytes() for name in (CONFIG, WEIGHTS))
    unchanged = {CONFIG: config, WEIGHTS: weights}
    files = unchanged
    # Two flips of one bit are none.
    while files == unchanged:
        files = unchanged | mutation(rng, config, weights)
    target.mkdir()
    for name, data in files.items():
        if data == DIRECTORY:
            (target / name).mkdir()
        elif data != MISSING:
            (target / name).write_bytes(data)
    return f"{mutation.__name__} (seed {seed})"

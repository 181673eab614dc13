"""Which part of a prompt decides where its conversation goes: keys of its first pages.

A prompt has a key for each of some depths, in pages, chained: two prompts have one in common
where they have all tokens before it in common. Requests go by the first key that is not shared by
too many (`hot_keys`), so a conversation keeps its replica as it grows, and conversations that only
share a system prompt do not all go to one. No state: several ingress replicas agree. Pure; the
router and the replicas, which count what is shared, call it.
"""

from array import array
from collections.abc import Container, Sequence
from hashlib import blake2b

# Pages of a prompt that are looked at: prompts that share so many are near enough.
MAX_DEPTH = 512


def _depths() -> tuple[int, ...]:
    """Every page at first, then eight depths each time that the depth doubles.

    What a conversation has of its own tells it from others once it is an eighth of what they share.
    """
    depths, depth = [], 1
    while depth <= MAX_DEPTH:
        depths.append(depth)
        depth += max(1, (1 << depth.bit_length() - 1) // 8)
    return tuple(depths)


DEPTHS = _depths()


def prefix_keys(adapter: str, prompt_ids: Sequence[int], page_tokens: int) -> list[str]:
    """The keys of a prompt's full pages, the shortest first; another adapter's are others."""
    digest = blake2b(adapter.encode(), digest_size=8)
    keys, start = [], 0
    for depth in DEPTHS:
        end = depth * page_tokens
        if end > len(prompt_ids):
            break
        digest.update(array("q", prompt_ids[start:end]).tobytes())
        # The digest of what came so far; the object goes on.
        keys.append(digest.hexdigest())
        start = end
    return keys


def routing_key(keys: Sequence[str], hot: Container[str]) -> str:
    """The first key behind all that are hot; empty where there is none."""
    first_own = 0
    for index, key in enumerate(keys):
        if key in hot:
            first_own = index + 1
    return keys[first_own] if first_own < len(keys) else ""

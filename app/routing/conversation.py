"""What names a conversation, so that its next turn can go where its KV is.

Every turn of a chat has the same messages up to the first of the user's, so these name it, whatever
system prompt it shares with others. A prompt without messages is named by its first pages. Nothing
is remembered, so that all ingresses give the same name. It knows no replicas.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

# Of a prompt without messages. A conversation whose first turn is shorter changes its name until it
# has so many, while there is little to be computed anew.
NUM_NAMING_TOKENS = 256


def conversation_of_chat(
    messages: Sequence[dict[str, Any]], template_kwargs: dict[str, Any]
) -> str:
    """The name of a chat of these messages, each with its "role"."""
    first_user = next(
        (index for index, message in enumerate(messages) if message["role"] == "user"),
        len(messages),
    )
    return _hash(json.dumps([template_kwargs, *messages[: first_user + 1]], sort_keys=True))


def conversation_of_prompt(prompt_ids: Sequence[int], page_tokens: int) -> str:
    """The name of a prompt of tokens; "" where it has no full page to be found again."""
    num_tokens = min(len(prompt_ids), NUM_NAMING_TOKENS) // page_tokens * page_tokens
    return _hash(str(prompt_ids[:num_tokens])) if num_tokens else ""


def _hash(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()

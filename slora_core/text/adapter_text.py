"""What an adapter's folder says of text beside the base model's files: plain data.

It travels with the adapter's registration; `folder_text` makes it, the ingress uses it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterText:
    """What goes beyond the base model's own files."""

    # End a text beside those of the base model.
    eos_token_ids: tuple[int, ...] = ()
    # Jinja source; None takes the base model's.
    chat_template: str | None = None

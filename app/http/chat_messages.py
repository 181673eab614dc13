"""The messages of a chat request, and what of one its chat template sees."""

from typing import Any, Literal

from pydantic import Field, StrictStr, field_validator, model_validator

from app.http.field_types import RequestModel

# Messages of a chat, and parts of one: each costs the ingress microseconds before it is a token.
MAX_MESSAGES = 2048


class TextPart(RequestModel):
    type: Literal["text"]
    text: StrictStr


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    # A text is a list of one part.
    content: list[TextPart] = Field(max_length=MAX_MESSAGES, fail_fast=True)
    # Tells participants of one role apart, where the template shows it.
    name: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _silent_assistant(cls, message: Any) -> Any:
        # An answer may have had no text, which its sender repeats as null or leaves out.
        if isinstance(message, dict) and message.get("role") == "assistant":
            return {"content": [], **message}
        return message

    @field_validator("content", mode="before")
    @classmethod
    def _content_as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of text parts")
        return value

    def as_template_input(self) -> dict[str, str]:
        """Role, plain text and the name if any; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "".join(part.text for part in self.content)}
        return message if self.name is None else {**message, "name": self.name}

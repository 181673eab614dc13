"""Chats whose answers a stubbed engine gives, asked of a server that has one, and checked.

It knows the demo model's tokenizer and the stub's tokens, and no server; `bench_server` measures
with it.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from app.args import DEMO_MODEL_NAME
from app.models.demo import ensure_demo_model
from benchmarks.serving.raw_client import RawAnswer, RawConnection, post, read_stream
from benchmarks.serving.stub_tokens import StubVocabulary
from slora_core.models.registry import load_model_config
from slora_core.requests import Request, SamplingParams
from slora_core.text.tokenizer import Tokenizer

# Tokens of a request of a client alone: a first one and some more.
SHORT_ANSWER = 4


class WrongTextError(Exception):
    """An answer that is not what the stub was to say."""


@dataclass(frozen=True)
class Prompt:
    """A chat, and the token ids that its answer begins with."""

    content: str
    token_ids: list[int]
    prompt_ids: list[int]

    def request(self, url: str, num_tokens: int) -> bytes:
        body = {
            "model": DEMO_MODEL_NAME,
            "messages": [{"role": "user", "content": self.content}],
            "temperature": 0,
            "max_tokens": num_tokens,
            "stream": True,
        }
        return post(url, "/v1/chat/completions", body)


async def make_prompts(tokenizer: Tokenizer, num_prompts: int, num_tokens: int) -> list[Prompt]:
    """Different chats, with answers of `num_tokens` tokens."""
    model = load_model_config(ensure_demo_model())
    vocabulary = StubVocabulary(model.vocab_size, model.eos_token_ids)
    prompts = []
    for index in range(num_prompts):
        content = f"Tell me of the sea, in {index + 3} sentences of plain words, and of its ships."
        prompt_ids = await tokenizer.encode_chat([{"role": "user", "content": content}])
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0)
        token_ids = vocabulary.answer(Request(prompt_ids, sampling))
        prompts.append(Prompt(content, token_ids, prompt_ids))
    return prompts


async def ask_in_turn(url: str, prompts: Sequence[Prompt], number: int) -> list[RawAnswer]:
    """One client, one request after the other."""
    connection = await RawConnection.open(url)
    requests = [prompt.request(url, SHORT_ANSWER) for prompt in prompts]
    try:
        return [await connection.ask(requests[i % len(requests)]) for i in range(number)]
    finally:
        connection.close()


async def ask_at_once(
    url: str, prompts: Sequence[Prompt], num_tokens: int, seconds: float
) -> list[list[RawAnswer]]:
    """A client for each prompt, which asks it again and again; nothing begins after `seconds`.

    Their first answers differ in length, so that they end one after another from then on.
    """
    end = time.monotonic() + seconds

    async def ask(index: int, prompt: Prompt) -> list[RawAnswer]:
        connection = await RawConnection.open(url)
        request = prompt.request(url, num_tokens)
        answers = []
        try:
            first = first_length(index, len(prompts), num_tokens)
            answers.append(await connection.ask(prompt.request(url, first)))
            while time.monotonic() < end:
                answers.append(await connection.ask(request))
        finally:
            connection.close()
        return answers

    return list(await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(prompts))))


def first_length(index: int, num_streams: int, num_tokens: int) -> int:
    """Tokens of a stream's first answer."""
    return max(1, num_tokens * (index + 1) // num_streams)


class Checker:
    """Compares answers with what the stub was to say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def num_pieces(self, prompt: Prompt, num_tokens: int, answers: Iterable[RawAnswer]) -> int:
        """Pieces of text that they came in.

        Raises:
            BadAnswerError, WrongTextError: of the first that is not right.
        """
        decoder = self._tokenizer.decoder(prompt.prompt_ids)
        expected = decoder.push(prompt.token_ids[:num_tokens]) + decoder.finish()
        num_pieces = 0
        for answer in answers:
            streamed = read_stream(answer.data)
            if (streamed.text, streamed.finish_reason) != (expected, "length"):
                raise WrongTextError(f"{streamed} instead of {expected!r} for {prompt.content!r}")
            num_pieces += streamed.num_pieces
        return num_pieces

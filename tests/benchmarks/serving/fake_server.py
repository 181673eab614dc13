"""A small HTTP server that streams as the OpenAI API does, and misbehaves where asked.

The model's name says what it does: see `FakeServer`.
"""

import asyncio
import json

# Requests that "together" waits for.
NUM_TOGETHER = 6


class FakeServer:
    """`async with FakeServer() as server`: requests go to `server.url`.

    Models: "ok" answers `max_tokens` tokens, one an event; "pairs" two an event; "slow" waits
    0.3 s before the first, "together" until so many requests are open; "stuck" never ends; "busy"
    is 503; "unknown" 404; "cut" closes the connection after two tokens, "short" ends its stream
    there; "sick" streams an error; "garbage" streams no JSON; "mute" tells no usage.
    """

    def __init__(self):
        self.bodies = []
        self.num_open = self.max_open = 0
        self._are_together = asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error):
        self._server.close()
        # Not wait_closed: connections may be stuck on purpose.

    async def _serve(self, reader, writer):
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        if self.num_open == NUM_TOGETHER:
            self._are_together.set()
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split()[0])
            body = json.loads(await reader.readexactly(length))
            self.bodies.append(body)
            await self._answer(body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            self.num_open -= 1
            writer.close()

    async def _answer(self, body, writer):
        model, num_tokens = body["model"], body["max_tokens"]
        if model in ("busy", "unknown"):
            status = "503 Service Unavailable" if model == "busy" else "404 Not Found"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nno".encode())
            return await writer.drain()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if model == "slow":
            await asyncio.sleep(0.3)
        elif model == "together":
            await self._are_together.wait()
        step = 2 if model == "pairs" else 1
        for start in range(0, num_tokens, step):
            if start == 2 and model in ("cut", "short", "sick", "garbage", "stuck"):
                return await self._misbehave(model, writer)
            reason = "length" if start + step >= num_tokens else None
            choice = {"index": 0, "text": " x" * step, "finish_reason": reason}
            await self._event(writer, {"choices": [choice]})
            await asyncio.sleep(0.01)
        if model != "mute":
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
            await self._event(writer, {"choices": [], "usage": usage})
        await self._end(writer)

    async def _misbehave(self, model, writer):
        if model == "sick":
            await self._event(writer, {"error": {"message": "engine died", "code": 503}})
            await self._end(writer)
        elif model == "garbage":
            await self._chunk(writer, b"data: {oops\n\n")
            await self._end(writer)
        elif model == "short":
            await self._chunk(writer, b"")
        elif model == "stuck":
            await asyncio.sleep(3600)

    async def _event(self, writer, event):
        await self._chunk(writer, f"data: {json.dumps(event)}\n\n".encode())

    async def _end(self, writer):
        await self._chunk(writer, b"data: [DONE]\n\n")
        await self._chunk(writer, b"")

    async def _chunk(self, writer, data):
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()

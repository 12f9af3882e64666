"""Wyoming's ``handle`` domain, for Home Assistant and its relatives: a question becomes an answer.

On one connection a client sends a clip (``audio-start``, ``audio-chunk`` and ``audio-stop`` events
with 16-bit PCM) and then any number of ``transcript`` events, each a question about the last clip;
each is answered by ``handled``, or by ``not-handled`` with the reason. ``context.choices`` in a
transcript's data is a list of possible answers. The queue is that of the HTTP server. Wyoming has
no token.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import io
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import soundfile
from wyoming.asr import Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.event import Event
from wyoming.handle import Handled, NotHandled
from wyoming.info import Attribution, Describe, HandleModel, HandleProgram, Info
from wyoming.server import AsyncEventHandler

from ..events import Finished
from .errors import ApiError
from .service import Service

__all__ = ["serving"]

_MAX_CONNECTIONS = 16
_MAX_EVENT_BYTES = 1 << 20  # a client's chunks are some KiB


@asynccontextmanager
async def serving(service: Service, listener: socket.socket) -> AsyncIterator[None]:
    """Serve Wyoming on a bound socket while the block runs."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(tasks) >= _MAX_CONNECTIONS:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _Handler(service, _BoundedReader(reader), writer).run()
        except (OSError, EOFError, KeyError, TypeError, AttributeError, RecursionError):
            writer.close()  # not Wyoming, or gone in the middle of an event
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(connected, sock=listener)
    try:
        yield
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _BoundedReader:
    """What the protocol reads from, without events of any size a client announces."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readline(self) -> bytes:
        return await self._reader.readline()

    async def readexactly(self, n_bytes: int) -> bytes:
        if n_bytes > _MAX_EVENT_BYTES:
            raise ValueError(f"an event of {n_bytes} bytes")
        return await self._reader.readexactly(n_bytes)

    def at_eof(self) -> bool:
        return self._reader.at_eof()


class _Handler(AsyncEventHandler):
    """One connection: the clip it has sent, and what it asks."""

    def __init__(
        self, service: Service, reader: _BoundedReader, writer: asyncio.StreamWriter
    ) -> None:
        super().__init__(reader, writer)  # type: ignore[arg-type]
        self._service = service
        self._format: AudioStart | None = None
        self._pcm = bytearray()
        self._refusal: str | None = None

    async def handle_event(self, event: Event) -> bool:
        """Answer one event; False ends the connection."""
        if Describe.is_type(event.type):
            await self.write_event(_info(self._service).event())
        elif AudioStart.is_type(event.type):
            self._format, self._pcm = AudioStart.from_event(event), bytearray()
            self._refusal = _refusal(self._format)
        elif AudioChunk.is_type(event.type):
            self._take(AudioChunk.from_event(event))
        elif Transcript.is_type(event.type):
            await self._answer(Transcript.from_event(event).text, event.data or {})
        elif not AudioStop.is_type(event.type):
            await self.write_event(NotHandled(f"unknown event {event.type[:40]!r}").event())
        return True

    def _take(self, chunk: AudioChunk) -> None:
        """Keep a chunk, up to the limits of the service."""
        limits = self._service.limits
        start = self._format
        if self._refusal is not None or start is None:
            return
        if (chunk.rate, chunk.width, chunk.channels) != (start.rate, start.width, start.channels):
            self._refusal = "the chunks differ in format from audio-start"
        elif len(self._pcm) + len(chunk.audio) > min(
            limits.max_body_bytes, limits.max_audio_s * start.rate * 2 * start.channels
        ):
            self._refusal = f"the clip is longer than {limits.max_audio_s:g} s, the limit here"
        else:
            self._pcm += chunk.audio
            return
        self._pcm.clear()

    async def _answer(self, question: Any, data: dict[str, Any]) -> None:
        reply: Handled | NotHandled
        try:
            text = await self._ask(str(question), data.get("context") or {})
            if text is None:
                return
            reply = Handled(text)
        except ApiError as error:
            reply = NotHandled(str(error))
        await self.write_event(reply.event())

    async def _ask(self, question: str, context: Any) -> str | None:
        """The answer; None if the client left."""
        if self._refusal is not None:
            raise ApiError(422, self._refusal)
        if self._format is None or not self._pcm:
            raise ApiError(422, "no clip; send audio-start, audio-chunk and audio-stop first")
        choices = context.get("choices") if isinstance(context, dict) else None
        if choices is not None and not (
            isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        ):
            raise ApiError(400, "context.choices must be a list of strings")
        clip = _wav(bytes(self._pcm), self._format)
        with self._service.engine.place() as place:
            start = self._service.start([clip], question, choices)
            async with place.run(start) as job:
                events = self._service.counted(job)
                try:
                    async for event in events:
                        if self.reader.at_eof():
                            return None
                        if isinstance(event, Finished):
                            return event.answer.text
                finally:
                    await events.aclose()
        return None


def _refusal(audio: AudioStart) -> str | None:
    if audio.width != 2 or not 1 <= audio.channels <= 8 or not 1_000 <= audio.rate <= 192_000:
        return (
            f"audio of {audio.rate} Hz, {8 * audio.width} bit, {audio.channels} channels; expected "
            "1000 to 192000 Hz, 16 bit, 1 to 8 channels"
        )
    return None


def _wav(pcm: bytes, audio: AudioStart) -> bytes:
    encoded = io.BytesIO()
    with soundfile.SoundFile(
        encoded, "w", audio.rate, audio.channels, subtype="PCM_16", format="WAV"
    ) as sound:
        sound.buffer_write(pcm[: len(pcm) // (2 * audio.channels) * 2 * audio.channels], "int16")
    return encoded.getvalue()


def _info(service: Service) -> Info:
    name = service.model.config.name
    attribution = Attribution(name="tinygiant", url="")
    version = importlib.metadata.version("tinygiant")
    model = HandleModel(
        name=name,
        attribution=attribution,
        installed=True,
        description="answers questions about the clip that was sent before",
        version=version,
        languages=["en"],
    )
    program = HandleProgram(
        name="tinygiant",
        attribution=attribution,
        installed=True,
        description="questions about sound, answered offline",
        version=version,
        models=[model],
    )
    return Info(handle=[program])

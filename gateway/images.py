"""Images in messages: checked, fetched, and put into the request as data, so that engines fetch nothing.

What an image is, its content says, not its label. Its size is read from its head before anything is decoded; then it is
decoded once, in a thread, so that an engine never meets one that can't be. Cheap checks come before expensive ones, and
all of what came along is checked before anything is fetched. Does not handle audio, video and files by id. Raises
BadRequest, which names the part; what decoders and other servers say about it is not reported.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from engine.base import GenerationRequest
from engine.messages import ImageUrl, Message, PlacedImage, images_of
from engine.supervisor import SupervisedEngine
from gateway.errors import BadRequest
from gateway.exchange.events import Event
from gateway.fair_slots import FairThreads, working_for
from gateway.meter import Meter
from gateway.outbound.fetch import Fetcher, FetchError
from gateway.settings.config import ImageSettings

Run = Callable[[GenerationRequest], AsyncGenerator[Event, None]]
Check = Callable[[], Awaitable[None]]

_MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # a JPEG with more pictures behind the first, as telephones make
    "WEBP": "image/webp",
    "GIF": "image/gif",
}
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_ACCEPT = "image/png, image/jpeg, image/webp, image/gif"
_FORM = "it must be an http(s) URL or a data URL in base64 (data:image/png;base64,...)"
_MAX_SCANS = 64
"""Of a JPEG. Each goes over all its pixels again, and a small file can hold thousands; cameras and tools write ten."""
_WORK_PIXELS = 262_144
"""More take some milliseconds to decode."""
_DECODERS = 2
"""Threads. Each may hold `max_pixels` decoded."""


@dataclass(slots=True)
class _Picture:
    """An image of the request, and what is known of it so far."""

    image: PlacedImage
    url: str
    content: bytes = b""
    pixels: int = 0

    @property
    def is_data(self) -> bool:
        return self.url[:5].lower() == "data:"

    def refusal(self, reason: str) -> BadRequest:
        param = f"{self.image.place}.image_url.url"
        return BadRequest(f"Invalid value for '{param}': {reason}.", param)


def with_images(run: Run, request: GenerationRequest, meter: Meter, images: Images) -> AsyncGenerator[Event, None]:
    """The events of `run` for `request` with its images as data.

    Before its first event it raises what `inlined` raises.
    """
    return _run_with_images(run, request, meter, images) if any(images_of(request.messages)) else run(request)


async def _run_with_images(
    run: Run, request: GenerationRequest, meter: Meter, images: Images
) -> AsyncGenerator[Event, None]:
    try:
        async with aclosing(run(await inlined(request, meter, images))) as events:
            async for event in events:
                yield event
    finally:
        await meter.leave()


async def inlined(request: GenerationRequest, meter: Meter, images: Images) -> GenerationRequest:
    """Return `request` with its images in it as data, which is the only form that engines may be given.

    Raises BadRequest, and what is raised for an engine that can't be loaded.
    """
    first = next(images_of(request.messages), None)
    if first is None:
        return request
    async with meter.noting_refusal():
        engine = meter.model.engine
        if isinstance(engine, SupervisedEngine):
            await engine.load()  # only a loaded engine knows whether it takes images
        if not engine.takes_images:
            message = f"The model {meter.model.id!r} does not take images, and '{first.place}' is one. Send text only."
            raise BadRequest(message, first.place)
        with working_for(meter.principal.key_id):
            return replace(request, messages=await images.inline(request.messages, meter.count, meter.note_work))


class Images:
    """Checks and fetches the images of requests. One instance bounds what the whole process decodes at once."""

    def __init__(self, settings: ImageSettings, fetcher: Fetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._threads = FairThreads(_DECODERS, "images")

    def close(self) -> None:
        """Let the threads end."""
        self._threads.close()

    async def inline(
        self,
        messages: list[Message],
        before_fetching: Check | None = None,
        before_work: Callable[[], None] = lambda: None,
    ) -> list[Message]:
        """Return `messages` with every image as a data URL that decodes. Raises BadRequest.

        Images given by URL are fetched after `before_fetching`, and only if that doesn't raise. `before_work` is called
        before many pixels are decoded, however few bytes they are in.
        """
        pictures = [_Picture(image, image.url) for image in images_of(messages)]
        if len(pictures) > self._settings.max_images:
            count = f"a request can hold at most {self._settings.max_images} images, and this one holds {len(pictures)}"
            raise BadRequest(f"Invalid value for 'messages': {count}.", "messages")
        given = [picture for picture in pictures if picture.is_data]
        named = [picture for picture in pictures if not picture.is_data]
        for picture in named:
            if not picture.url.lower().startswith(("http://", "https://")):
                raise picture.refusal(_FORM)
            if not self._settings.fetch:
                raise picture.refusal("this server fetches no images; send a data URL (data:image/png;base64,...)")
        await self._each(given, self._read_data_url)
        await self._each(given, self._read_head)
        self._check_pixels(pictures)
        if named and before_fetching is not None:
            await before_fetching()
        await self._fetch(named)
        await self._each(named, self._read_head)
        self._check_pixels(pictures)
        if sum(picture.pixels for picture in pictures) > _WORK_PIXELS:
            before_work()
        await self._each(pictures, _decode)
        await self._each(pictures, _write_data_url)
        return _replaced(messages, pictures)

    async def _each(self, pictures: list[_Picture], step: Callable[[_Picture], None]) -> None:
        """Run `step` on each picture, in a thread and one after the other: a request gets one thread at a time."""
        for picture in pictures:
            await self._threads.run(partial(step, picture))

    async def _fetch(self, pictures: list[_Picture]) -> None:
        """Fetch all at once. The first that fails ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                for picture in pictures:
                    group.create_task(self._fetch_one(picture))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch_one(self, picture: _Picture) -> None:
        try:
            fetched = await self._fetcher.fetch(picture.url, max_bytes=self._settings.max_image_bytes, accept=_ACCEPT)
        except FetchError as error:
            raise picture.refusal(str(error)) from error
        picture.content = fetched.content

    def _read_data_url(self, picture: _Picture) -> None:
        head, comma, body = picture.url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise picture.refusal(_FORM)
        most = self._settings.max_image_bytes
        too_large = picture.refusal(f"it is larger than {most} bytes")
        if len(body) > (most + 2) // 3 * 4:
            raise too_large
        try:
            picture.content = base64.b64decode(body, validate=True)
        except ValueError:
            raise picture.refusal("it is not valid base64") from None
        if len(picture.content) > most:
            raise too_large

    def _read_head(self, picture: _Picture) -> None:
        """Read what the image is and how large, and decode nothing."""
        try:
            with Image.open(io.BytesIO(picture.content), formats=_FORMATS) as image:
                picture.pixels = image.width * image.height
                scans = picture.content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        except Image.DecompressionBombError:
            raise self._too_many_pixels(picture) from None
        except Exception:  # decoders raise any error on untrusted data, and clients get none of it
            raise picture.refusal("it is not an image in PNG, JPEG, WebP or GIF format") from None
        if scans > _MAX_SCANS:
            raise picture.refusal(f"it has more than {_MAX_SCANS} scans")

    def _check_pixels(self, pictures: list[_Picture]) -> None:
        total = 0
        for picture in pictures:
            total += picture.pixels
            if total > self._settings.max_pixels:
                raise self._too_many_pixels(picture)

    def _too_many_pixels(self, picture: _Picture) -> BadRequest:
        return picture.refusal(f"a request's images can have at most {self._settings.max_pixels} pixels together")


def _decode(picture: _Picture) -> None:
    try:
        with Image.open(io.BytesIO(picture.content), formats=_FORMATS) as image:
            image.load()
    except Exception:  # as above
        raise picture.refusal("the image is damaged or incomplete") from None


def _write_data_url(picture: _Picture) -> None:
    """Write the URL again: what the client wrote in it, other parsers may read otherwise."""
    with Image.open(io.BytesIO(picture.content), formats=_FORMATS) as image:
        media_type = _MEDIA_TYPES[image.format or "PNG"]
    picture.url = f"data:{media_type};base64,{base64.b64encode(picture.content).decode()}"


def _replaced(messages: list[Message], pictures: list[_Picture]) -> list[Message]:
    """`messages` with the pictures' URLs in place of those they came with."""
    replaced = list(messages)
    for picture in pictures:
        image = picture.image
        message = replaced[image.message]
        content = message.get("content")
        parts = list(content) if isinstance(content, list) else []
        url: ImageUrl = {**image.content["image_url"], "url": picture.url}
        parts[image.part] = {"type": "image_url", "image_url": url}
        replaced[image.message] = {**message, "content": parts}
    return replaced

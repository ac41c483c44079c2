"""Images in messages: bounded in number, bytes and pixels, told by their content, and data when they leave."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gateway.errors import BadRequest
from gateway.images import Images
from gateway.outbound.fetch import Fetched, Fetcher, FetchFailed, TooLarge, UrlRefused
from gateway.settings.config import FetchSettings, ImageSettings
from tests.support.pictures import asking, data_url, image_part, picture

pytestmark = pytest.mark.anyio

URL = "messages[0].content[1].image_url.url"


class Shelf(Fetcher):
    """Hands out files by URL. One that is not there is waited for."""

    def __init__(self, **files: bytes | Exception) -> None:
        super().__init__(FetchSettings())
        self.files = {f"https://{name}.test/": file for name, file in files.items()}
        self.asked: list[str] = []
        self.left: list[str] = []

    async def fetch(self, text: str, *, max_bytes: int, accept: str = "*/*", admit: Any = None) -> Fetched:
        self.asked.append(text)
        if text not in self.files:
            try:
                await asyncio.Event().wait()
            finally:
                self.left.append(text)
        file = self.files[text]
        if isinstance(file, Exception):
            raise file
        assert "image/webp" in accept
        return Fetched(text, "text/plain", file)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def images(shelf: Shelf) -> Iterator[Images]:
    images = Images(ImageSettings(), shelf)
    yield images
    images.close()


def content_of(message: Any, part: int = 1) -> bytes:
    head, _, body = message["content"][part]["image_url"]["url"].partition(",")
    assert head.startswith("data:image/")
    return base64.b64decode(body)


async def refusal(images: Images, messages: list[Any], param: str | None = URL) -> str:
    with pytest.raises(BadRequest) as caught:
        await images.inline(messages)
    assert caught.value.param == param
    assert param is None or param in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("image_format", "media_type"),
    [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")],
)
async def test_image_is_named_by_its_content(images: Images, image_format: str, media_type: str) -> None:
    content = picture(image_format=image_format)

    for label in ("image/png", "image/jpeg", "application/octet-stream", "text/html;charset=utf-8", ""):
        message: Any = (await images.inline(asking(data_url(content, label))))[0]
        assert message["content"][1] == image_part(data_url(content, media_type))


async def test_messages_keep_everything_else(images: Images) -> None:
    url = data_url(picture())
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [image_part(url, detail="low"), {"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "red"},
        *asking(url, url),
    ]

    assert await images.inline(messages) == messages


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
async def test_image_of_any_mode_is_taken(images: Images, mode: str) -> None:
    await images.inline(asking(data_url(picture(mode=mode))))


async def test_animation_and_telephone_photograph_are_taken(images: Images) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for image_format, media_type in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("MPO", "jpeg")):
        file = io.BytesIO()
        frames[0].save(file, image_format, save_all=True, append_images=frames[1:])
        message: Any = (await images.inline(asking(data_url(file.getvalue()))))[0]
        assert message["content"][1]["image_url"]["url"].startswith(f"data:image/{media_type};")


@pytest.mark.parametrize(
    "url",
    [
        *("data:", "data:,", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64x,AAAA"),
        "data:image/png;charset=utf-8,AAAA",
        *("", "cat.png", "/etc/passwd", "file:///etc/passwd", "ftp://a.test/", "//a.test/", " http://a.test/"),
    ],
)
async def test_url_of_another_form_is_refused(images: Images, shelf: Shelf, url: str) -> None:
    assert "an http(s) URL or a data URL in base64 (data:image/png;base64,...)" in await refusal(images, asking(url))
    assert shelf.asked == []


@pytest.mark.parametrize("body", ["A", "AAA", "AA AA", "AAAA\n", "AA%3D%3D", "_-_-", "\u00e4AAA", "AAAA=AAA"])
async def test_bad_base64_is_refused(images: Images, body: str) -> None:
    assert "it is not valid base64" in await refusal(images, asking(f"data:image/png;base64,{body}"))


def svg() -> bytes:
    return b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>'


def other_formats() -> dict[str, bytes]:
    files = {name: picture(image_format=name) for name in ("BMP", "TIFF", "PPM", "ICO", "EPS", "PDF", "TGA")}
    return files | {"SVG": svg(), "text": b"hello", "empty": b"", "numpy": b"\x93NUMPY\x01\x00"}


@pytest.mark.parametrize("name", other_formats())
async def test_other_format_is_refused(images: Images, name: str) -> None:
    assert "it is not an image in PNG, JPEG, WebP or GIF format" in await refusal(
        images, asking(data_url(other_formats()[name]))
    )


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_damaged_image_is_refused_in_our_own_words(images: Images, image_format: str) -> None:
    content = picture(image_format=image_format, size=(64, 64))

    text = await refusal(images, asking(data_url(content[: len(content) * 2 // 3])))

    assert text.removeprefix(f"Invalid value for '{URL}': ") in (
        "the image is damaged or incomplete.",
        "it is not an image in PNG, JPEG, WebP or GIF format.",
    )


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_file_breaks_the_decoder_or_makes_it_talk(data: st.DataObject) -> None:
    """Whatever a stranger sends ends in an image or in one of two sentences of ours."""
    content = bytearray(picture(image_format=data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))))
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]

    async def inline() -> None:
        images = Images(ImageSettings(max_pixels=100_000), Shelf())
        try:
            await images.inline(asking(data_url(bytes(content))))
        except BadRequest as error:
            reason = str(error).removeprefix(f"Invalid value for '{URL}': ")
            assert reason.startswith(("it is not an image in", "the image is damaged", "a request's images can have"))
        finally:
            images.close()

    asyncio.run(inline())


async def test_too_many_images_are_refused(shelf: Shelf) -> None:
    url = data_url(picture())
    images = Images(ImageSettings(max_images=2), shelf)

    await images.inline([*asking(url), *asking(url)])
    text = await refusal(images, [*asking(url, "https://a.test/"), *asking(url)], "messages")

    assert "at most 2 images, and this one holds 3" in text
    assert shelf.asked == []


async def test_image_of_too_many_bytes_is_refused(shelf: Shelf) -> None:
    content = picture(size=(200, 200), image_format="JPEG")
    content += bytes(2000 - len(content))

    await Images(ImageSettings(max_image_bytes=2000), shelf).inline(asking(data_url(content)))
    for most in (1999, 1024):
        text = await refusal(Images(ImageSettings(max_image_bytes=most), shelf), asking(data_url(content)))
        assert f"larger than {most} bytes" in text


async def test_pixels_are_bounded_over_all_images_of_a_request(shelf: Shelf) -> None:
    images = Images(ImageSettings(max_pixels=100), shelf)
    url, wide = data_url(picture(size=(5, 10))), data_url(picture(size=(101, 1)))

    await images.inline(asking(url, url))
    assert "at most 100 pixels together" in await refusal(images, asking(wide))
    await refusal(images, asking(url, url, url), "messages[0].content[3].image_url.url")
    await refusal(images, [*asking(url, url), *asking(url)], "messages[1].content[1].image_url.url")


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has nothing to show for it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [6000, 11_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
async def test_bomb_is_refused_by_its_head(images: Images, side: int) -> None:
    assert "at most 16777216 pixels" in await refusal(images, asking(data_url(bomb(side, side))))


async def test_jpeg_of_very_many_scans_is_refused(images: Images) -> None:
    content = picture(image_format="JPEG", progressive=True)
    start = content.index(b"\xff\xda")
    many = content[:start] + content[start:-2] * 20 + content[-2:]

    await images.inline(asking(data_url(content)))
    assert "more than 64 scans" in await refusal(images, asking(data_url(many)))


async def test_images_by_url_are_fetched_all_at_once_and_become_data() -> None:
    shelf = Shelf(red=picture("red"), blue=picture("blue", "JPEG"))
    images = Images(ImageSettings(), shelf)

    message: Any = (await images.inline(asking("https://red.test/", "https://blue.test/")))[0]

    assert [content_of(message, part) for part in (1, 2)] == [picture("red"), picture("blue", "JPEG")]
    assert message["content"][2]["image_url"]["url"].startswith("data:image/jpeg;base64,")


async def test_first_fetch_that_fails_ends_the_others() -> None:
    shelf = Shelf(bad=FetchFailed("10.0.0.1 is not a public address"))

    text = await refusal(
        Images(ImageSettings(), shelf),
        asking("https://slow.test/", "https://bad.test/"),
        "messages[0].content[2].image_url.url",
    )

    assert text.endswith(": it could not be fetched.")
    assert shelf.left == ["https://slow.test/"]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (FetchFailed("status 500"), "it could not be fetched"),
        (TooLarge("it is larger than 5 bytes"), "it is larger than 5 bytes"),
        (UrlRefused("it names no valid host"), "it names no valid host"),
        (b"<html>", "it is not an image in PNG, JPEG, WebP or GIF format"),
    ],
)
async def test_what_can_not_be_fetched_is_refused(failure: Exception | bytes, reason: str) -> None:
    text = await refusal(Images(ImageSettings(), Shelf(a=failure)), asking("https://a.test/"))

    assert text == f"Invalid value for '{URL}': {reason}."


async def test_pixels_of_fetched_images_count() -> None:
    images = Images(ImageSettings(max_pixels=100), Shelf(a=picture(size=(11, 10))))

    await refusal(images, asking("https://a.test/"))


@pytest.mark.parametrize("content", [b"hello", picture(size=(4097, 4097))], ids=["no image", "too many pixels"])
async def test_nothing_is_fetched_for_a_request_that_fails_anyway(shelf: Shelf, images: Images, content: bytes) -> None:
    await refusal(images, asking("https://a.test/", data_url(content)), "messages[0].content[2].image_url.url")

    assert shelf.asked == []


async def test_nothing_is_fetched_where_that_is_off(shelf: Shelf) -> None:
    text = await refusal(Images(ImageSettings(fetch=False), shelf), asking("https://a.test/"))

    assert "send a data URL" in text
    assert shelf.asked == []


async def test_cancelling_ends_the_fetches(shelf: Shelf, images: Images) -> None:
    task = asyncio.create_task(images.inline(asking("https://a.test/", "https://b.test/")))
    while len(shelf.asked) < 2:
        await asyncio.sleep(0)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(shelf.left) == ["https://a.test/", "https://b.test/"]

"""From an HTTP request to pixels in vLLM: a tiny vision model with random weights, behind `shannon serve`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.support.engine.vision import TOKENS_PER_TILE, build_checkpoint
from tests.support.frames import chunks
from tests.support.gateway_process import UNLIMITED, GatewayProcess, serve
from tests.support.pictures import asking, data_url, image_part, picture

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PICTURES = {f"/{color}.png": picture(color, size=(64, 64)) for color in ("red", "green", "blue")}
RED, GREEN, BLUE = (data_url(content) for content in PICTURES.values())


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = PICTURES.get(self.path)
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The URL of a server that has PICTURES."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, site: str) -> Iterator[GatewayProcess]:
    """A gateway with the vision model, and the demo model beside it, which is loaded when it is asked for."""
    folder = tmp_path_factory.mktemp("vision")
    checkpoint = build_checkpoint(folder / "checkpoint")
    args = {"max_model_len": 1024, "max_num_seqs": 4}
    tree = {
        "engines": {
            "main": {
                "kind": "embedded",
                "model": str(checkpoint),
                "args": args | {"limit_mm_per_prompt": {"image": 3}},
            },
            "text": {"kind": "embedded", "model": "demo", "args": args, "lazy": True},
        },
        "models": {"shannon-chat": {"limits": UNLIMITED}, "shannon-complex": {"engine": "text", "limits": UNLIMITED}},
        "fetch": {"ports": [int(site.rpartition(":")[2])], "allowed_networks": ["127.0.0.0/8"]},
    }
    with serve(folder, tree) as gateway:
        gateway.wait_until_ready()
        yield gateway


def answer(gateway: GatewayProcess, *urls: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Return what the model says to the images, at temperature 0, and its usage."""
    response = gateway.chat(**({"messages": asking(*urls), "temperature": 0, "max_tokens": 12} | fields))
    assert response.status_code == 200, response.text
    completion = response.json()
    return completion["choices"][0]["message"]["content"], completion["usage"]


def test_other_images_get_other_answers_and_the_same_the_same(gateway: GatewayProcess) -> None:
    texts = [answer(gateway, url)[0] for url in (RED, GREEN, BLUE, RED, GREEN, BLUE)]

    assert len(set(texts)) == 3
    assert texts[:3] == texts[3:]


def test_answer_depends_on_pixels_not_on_the_file(gateway: GatewayProcess) -> None:
    red = answer(gateway, RED)[0]

    for image_format in ("JPEG", "WEBP", "GIF"):
        options = {"lossless": True} if image_format == "WEBP" else {"quality": 100} if image_format == "JPEG" else {}
        content = picture("red", image_format, (64, 64), **options)
        assert answer(gateway, data_url(content, "image/png"))[0] == red, image_format


def test_order_and_place_of_images_count(gateway: GatewayProcess) -> None:
    text = {"type": "text", "text": "and this?"}
    orders = [[RED, BLUE], [BLUE, RED], [RED, RED]]
    texts = [answer(gateway, *urls)[0] for urls in orders]
    parts = [image_part(RED), text, image_part(BLUE)]
    texts.append(answer(gateway, messages=[{"role": "user", "content": parts}])[0])

    assert len(set(texts)) == 4


def test_image_by_url_is_the_image(gateway: GatewayProcess, site: str) -> None:
    assert answer(gateway, f"{site}/blue.png")[0] == answer(gateway, BLUE)[0]


def test_image_that_can_not_be_fetched_is_refused(gateway: GatewayProcess, site: str) -> None:
    for url in (f"{site}/none.png", "http://10.0.0.1/", "http://127.0.0.1:1/"):
        response = gateway.chat(messages=asking(RED, url))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages[0].content[2].image_url.url"


def test_tokens_of_images_are_counted_exactly(gateway: GatewayProcess) -> None:
    """How many an image takes depends on its shape."""
    before = gateway.metric("vllm:prompt_tokens_total")
    urls = [RED, data_url(picture("red", size=(128, 64))), data_url(picture("red", size=(300, 300)))]
    usages = [answer(gateway, url)[1] for url in urls] + [answer(gateway, *urls)[1], answer(gateway)[1]]

    counted = [usage["prompt_tokens"] for usage in usages]
    assert sum(counted) == gateway.metric("vllm:prompt_tokens_total") - before
    alone = counted[-1]
    assert all(count - alone >= TOKENS_PER_TILE for count in counted[:-1])
    assert counted[1] < counted[0], "a wide one takes fewer"
    assert counted[3] - alone == sum(counted[:3]) - 3 * alone


def test_streamed_answer_is_the_whole_one(gateway: GatewayProcess) -> None:
    fields = {"messages": asking(RED), "temperature": 0, "max_tokens": 12, "stream": True}
    frames = chunks(gateway.chat(**fields).content)

    streamed = "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)
    assert streamed == answer(gateway, RED)[0]


def test_more_images_than_the_engine_takes_are_refused(gateway: GatewayProcess) -> None:
    response = gateway.chat(messages=asking(RED, RED, RED, RED))

    assert response.status_code == 400
    assert "3" in response.json()["error"]["message"]


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 3000), (3000, 3000)], ids=str)
def test_image_of_any_shape_is_answered_or_refused_without_a_decoders_words(
    gateway: GatewayProcess, size: tuple[int, int]
) -> None:
    response = gateway.chat(messages=asking(data_url(picture(size=size))), max_tokens=2)

    assert response.status_code in (200, 400), response.text
    assert " at 0x" not in response.text
    assert "Processor" not in response.text


def test_conversation_goes_on_about_its_image(gateway: GatewayProcess) -> None:
    question = [{"role": "user", "content": "and now?"}]
    url = f"{gateway.url}/v1/chat/completions"
    texts = []
    for number, image in enumerate((RED, GREEN, RED)):
        for messages in (asking(image), question):
            body = {"messages": messages, "temperature": 0, "max_tokens": 12}
            headers = gateway.authorization | {"X-Session-ID": f"talk-{number}"}
            completion = httpx.post(url, json=body, headers=headers, timeout=60).raise_for_status().json()
        texts.append(completion["choices"][0]["message"]["content"])

    assert texts[0] != texts[1]
    assert texts[0] == texts[2]


def test_text_model_beside_it_refuses(gateway: GatewayProcess) -> None:
    response = gateway.chat(model="shannon-complex", messages=asking(RED))

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[1]"
    assert gateway.chat(model="shannon-complex", messages=asking(), max_tokens=4).status_code == 200

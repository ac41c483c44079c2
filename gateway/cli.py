"""The `shannon` command. Its errors are one line on stderr and exit code 2; a failed engine is exit code 1."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from redis.exceptions import RedisError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from engine.weights.cache import WeightsError
from gateway import __version__
from gateway.access.configured_keys import BOOTSTRAP, BOOTSTRAP_FILE
from gateway.access.keys import KeyLimits, KeyRecord, Keys, KeySpec, make_key
from gateway.access.ledger import Ledger
from gateway.app import create_app
from gateway.components import build_authenticator, build_engines, build_store
from gateway.download import download
from gateway.errors import GatewayError, StoreError, StoreUnavailable, from_validation
from gateway.outbound import event_loop
from gateway.settings.config import Config, ConfigError, StoreSettings, load_config
from gateway.settings.data_dir import usable_data_dir
from gateway.settings.environment import hub_environment
from gateway.store.client import Store
from gateway.telemetry import logs, tracing
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.standard_streams import discard_output, lossy_output, prepare_streams

console = Console(stderr=True, highlight=False)
log = logging.getLogger("shannon")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    prepare_streams()
    args = _parser().parse_args(argv)
    try:
        code = int(args.run(args) or 0)
        sys.stdout.flush()
        return code
    except StoreUnavailable:
        message = "the store does not answer; is SHANNON_REDIS_URL right?"
    except (ConfigError, StoreError, GatewayError, RedisError, WeightsError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # its reader has what it wanted
        discard_output()
        return 141
    except OSError as error:
        if args.run is _serve:
            raise
        discard_output()
        message = (
            f"{error.filename}: {error.strerror}" if error.filename else f"can't continue: {error.strerror or error}"
        )
    with contextlib.suppress(OSError):  # there is nowhere left to say it
        console.print("[red]shannon:[/red]", escape(" ".join(message.splitlines())), soft_wrap=True)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("shannon", description="An OpenAI-compatible gateway with vLLM inside.")
    parser.add_argument("--version", action="version", version=f"shannon {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        type=Path,
        default=os.environ.get("SHANNON_CONFIG"),
        metavar="FILE",
        help="YAML file of the deployment (SHANNON_CONFIG)",
    )
    printed = argparse.ArgumentParser(add_help=False, parents=[common])
    printed.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the gateway", parents=[common])
    serve.add_argument("--host", help="address to listen on, or several with commas (SHANNON_HOST)")
    serve.add_argument("--port", help="port to listen on (SHANNON_PORT)")
    serve.set_defaults(run=_serve)

    models = commands.add_parser("models", help="list the models and their limits", parents=[printed])
    models.set_defaults(run=_models)

    weights = commands.add_parser(
        "download", help="bring models from a Hugging Face hub; the token is in HUGGINGFACE_TOKEN", parents=[printed]
    )
    weights.add_argument("models", nargs="*", metavar="MODEL", help="ORGANISATION/NAME (those of the deployment)")
    weights.add_argument("--revision", metavar="REV", help="branch, tag or commit (what the engine pins, else main)")
    weights.add_argument("--cache", type=Path, metavar="DIR", help="of the model cache (SHANNON_MODEL_CACHE)")
    weights.set_defaults(run=_download)

    doctor = commands.add_parser(
        "doctor", help="check this machine and the deployment, and say what to do", parents=[printed]
    )
    doctor.set_defaults(run=_doctor)

    usage = commands.add_parser("usage", help="show what keys have spent", parents=[printed])
    usage.add_argument("--key", metavar="ID", help="one key instead of all")
    usage.set_defaults(run=_with_store(_usage))

    _add_keys(commands.add_parser("keys", help="manage API keys"), printed)
    return parser


def _add_keys(keys: argparse.ArgumentParser, printed: argparse.ArgumentParser) -> None:
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key and show it, once", parents=[printed])
    create.add_argument("name", help="for people; appears in logs")
    create.add_argument("--tenant", default="default", help="sessions and caches are never shared between tenants")
    create.add_argument("--models", metavar="ID,ID", help="model ids it may use (all)")
    create.add_argument("--expires-in-days", type=float, metavar="N")
    for name in (field.replace("_", "-") for field in KeyLimits.model_fields):
        create.add_argument(f"--{name}", action="append", default=[], metavar="MODEL=N", help="in place of the model's")
    create.add_argument("--max-concurrent-requests", type=int, metavar="N", help="over all models")
    create.add_argument("--tokens-per-day", type=int, metavar="N", help="over all models, per UTC day")
    create.add_argument("--admin", action="store_true", help="may manage keys and see all usage")
    create.add_argument("--metrics", action="store_true", help="may read /metrics")
    create.add_argument(
        "--priority", choices=("high", "normal", "low"), default="normal", help="who is served first under load"
    )
    create.set_defaults(run=_with_store(_create_key))
    listing = actions.add_parser("list", help="list all keys", parents=[printed])
    listing.set_defaults(run=_with_store(_list_keys))
    for action, text, run in (
        ("show", "show one key", _show_key),
        ("rotate", "give a key a new secret; the old one is void within a second", _rotate_key),
        ("revoke", "revoke a key permanently, within a second", _revoke_key),
    ):
        parser = actions.add_parser(action, help=text, parents=[printed])
        parser.add_argument("id")
        parser.set_defaults(run=_with_store(run))


def _load(args: argparse.Namespace) -> Config:
    if args.config is None:
        raise ConfigError("name the deployment's file with --config or SHANNON_CONFIG")
    return load_config(Path(args.config))


def _serve(args: argparse.Namespace) -> int:
    with lossy_output():
        return _serve_until_stopped(args)


def _serve_until_stopped(args: argparse.Namespace) -> int:
    from gateway.serving.reload import Reload
    from gateway.serving.server import Server

    for name, value in (("SHANNON_HOST", args.host), ("SHANNON_PORT", args.port)):
        if value:
            os.environ[name] = value
    config = _load(args)
    environment = dict(os.environ)
    as_json = config.logging.format == "json"
    if not (environment.get(BOOTSTRAP) or environment.get(BOOTSTRAP_FILE) or as_json):  # logs are no place for a key
        environment[BOOTSTRAP] = make_key()
    logs.configure(config.logging.format, config.logging.level)
    os.environ.update(hub_environment(config.weights.cache_dir, os.environ))
    for name, value in (logs.vllm_environment(config.logging.format) | tracing.vllm_environment(os.environ)).items():
        os.environ.setdefault(name, value)
    started = time.monotonic()
    usable_data_dir(config.store.data_dir, bundled=not environment.get(config.store.url_env))
    engines = build_engines(config)
    store = build_store(config, environment)
    app = create_app(config, engines, store, build_authenticator(config, store, environment))
    key = None if as_json else environment.get(BOOTSTRAP) or f"$(cat {shlex.quote(environment[BOOTSTRAP_FILE])})"
    server = Server(
        app,
        host=config.server.hosts,
        port=config.server.port,
        on_ready=lambda url: _announce_ready(url, key, config.default_model, time.monotonic() - started),
        reload=Reload(app, Path(args.config), environment),
    )
    for name, engine in config.engines.items():
        if as_json:
            log.info("starting engine %s", name, extra={"fields": {"engine": name, "kind": engine.kind}})
        else:
            console.print(f"Starting engine [bold]{name}[/bold] ({engine.kind}) ...")
    try:
        event_loop.run(server.serve())
    except OSError as error:
        if server.started:
            raise
        raise ConfigError(f"can't start: {error}") from error  # out of memory, processes or open files
    gc.unfreeze()
    return server.exit_code


def _announce_ready(url: str, key: str | None, model: str, seconds: float) -> None:
    """Say that requests are served, and how to send one; to a log, without a key, only that."""
    # Some 500,000 objects of torch and vllm live for ever: left out of collections, which else stop the event loop
    # for tens of milliseconds each time they look at all of them.
    gc.collect()
    gc.freeze()
    if key is None:
        log.info("ready after %.1f s", seconds, extra={"fields": {"url": url}})
        return
    console.print(f"[green]Ready[/green] after {seconds:.1f} s.\n")
    print(f"  URL   {url}/v1")
    print(f"  Key   {key}\n")
    quote = '"' if key.startswith("$") else "'"
    print(f"  curl {url}/v1/chat/completions -H {quote}Authorization: Bearer {key}{quote} \\")
    print("    -H 'Content-Type: application/json' \\")
    print(f"""    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What are you?"}}]}}'\n""")
    sys.stdout.flush()


def _download(args: argparse.Namespace) -> int:
    config = None if args.config is None else _load(args)
    try:
        download(args.models, config, args.revision, args.cache, console, as_json=args.json)
    except KeyboardInterrupt:
        console.print("Interrupted. What has come stays; the same command continues from there.")
        return 130
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from gateway.doctor.examination import examine
    from gateway.doctor.report import show

    with console.status("Looking around ..."):  # vLLM takes seconds to import, a server that is away to give up on
        findings = event_loop.run(examine(None if args.config is None else Path(args.config)))
    show(findings, as_json=args.json)
    return int(any(finding.verdict == "failed" for finding in findings))


def _models(args: argparse.Namespace) -> None:
    rows = [
        {
            "id": model_id,
            "engine": model.engine,
            "requests_per_minute": model.limits.requests_per_minute,
            "tokens_per_minute": model.limits.tokens_per_minute,
            "max_tokens": model.defaults.max_tokens,
            "description": model.description,
        }
        for model_id, model in _load(args).models.items()
    ]
    _print(rows, args.json)


def _with_store(run: Callable[[Store, argparse.Namespace], Awaitable[None]]) -> Callable[[argparse.Namespace], None]:
    """Return a command that runs with the store open; the deployment's file is only needed if it says where it is."""

    async def with_store(args: argparse.Namespace) -> None:
        settings = StoreSettings() if args.config is None else _load(args).store
        # A person waits longer than a request may.
        store = Store(settings.model_copy(update={"command_timeout_ms": 2000}), os.environ, Metrics())
        await store.start()
        try:
            await run(store, args)
        finally:
            await store.close()

    return lambda args: event_loop.run(with_store(args))


async def _create_key(store: Store, args: argparse.Namespace) -> None:
    limits: dict[str, dict[str, int]] = {}
    for name in KeyLimits.model_fields:
        for given in getattr(args, name):
            model_id, _, number = given.partition("=")
            if not number.isdecimal():
                raise ConfigError(f"--{name.replace('_', '-')}: write MODEL=NUMBER, not {given!r}")
            limits.setdefault(model_id, {})[name] = int(number)
    days = args.expires_in_days
    if days is not None and not 0 < days < 36_525:
        raise ConfigError("--expires-in-days: must be more than 0 and less than a century")
    fields = {
        "name": args.name,
        "tenant": args.tenant,
        "models": args.models.split(",") if args.models else None,
        "limits": limits,
        "max_concurrent_requests": args.max_concurrent_requests,
        "tokens_per_day": args.tokens_per_day,
        "admin": args.admin,
        "metrics": args.metrics,
        "priority": args.priority,
        "expires_at": None if days is None else int(time.time() + days * 86_400),
    }
    try:
        spec = KeySpec.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, fields) from error
    _print_secret(*await Keys(store).create(spec), args.json)


async def _list_keys(store: Store, args: argparse.Namespace) -> None:
    records = [record.public() for record in await Keys(store).list()]
    if not args.json:
        shown = ("id", "name", "tenant", "models", "admin", "created_at", "expires_at", "revoked_at")
        records = [{name: record[name] for name in shown} for record in records]
    _print(records, args.json)


async def _show_key(store: Store, args: argparse.Namespace) -> None:
    _print([(await Keys(store).get(args.id)).public()], args.json)


async def _rotate_key(store: Store, args: argparse.Namespace) -> None:
    _print_secret(*await Keys(store).rotate(args.id), args.json)


async def _revoke_key(store: Store, args: argparse.Namespace) -> None:
    _print([(await Keys(store).revoke(args.id)).public()], args.json)


async def _usage(store: Store, args: argparse.Namespace) -> None:
    ledger = Ledger(store, StoreSettings().data_dir)
    ids = [args.key] if args.key else await ledger.key_ids()
    rows = [{"key_id": key_id} | row for key_id in ids for row in await ledger.totals(key_id)]
    _print(rows, args.json)


def _print_secret(record: KeyRecord, key: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record.public() | {"key": key}))
        return
    print(key, flush=True)
    console.print(f"This is the only time that key [bold]{record.id}[/bold] ({escape(record.name)}) is shown.")


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a JSON list, as a table, or one row as a list of its fields."""
    if as_json:
        print(json.dumps(rows))
        return
    out = Console(highlight=False)
    if not rows:
        out.print("None.")
        return
    if len(rows) == 1 and len(rows[0]) > 8:
        table = Table(show_header=False)
        for name, value in rows[0].items():
            table.add_row(name, _cell(name, value))
    else:
        # Ids are copied from here, so the others give way on a narrow terminal.
        table = Table(*(Column(name, no_wrap=name in ("id", "key_id")) for name in rows[0]))
        for row in rows:
            table.add_row(*(_cell(name, value) for name, value in row.items()))
    out.print(table)


def _cell(name: str, value: Any) -> str:
    if value is None or value in ({}, []):
        return "-"
    if name.endswith("_at"):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


if __name__ == "__main__":
    sys.exit(main())

"""The `shannon` command. Its errors are one line on stderr and exit code 2; a failed engine is exit code 1."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from gateway import __version__
from gateway.app import build_engines, build_keyring, create_app
from gateway.auth import new_key
from gateway.config import Config, ConfigError, load_config

console = Console(stderr=True, highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as error:
        console.print(f"[red]shannon:[/red] {error}", soft_wrap=True, markup=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("shannon", description="An OpenAI-compatible gateway with vLLM inside.")
    parser.add_argument("--version", action="version", version=f"shannon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start the gateway")
    serve.add_argument(
        "--config",
        type=Path,
        default=os.environ.get("SHANNON_CONFIG"),
        required="SHANNON_CONFIG" not in os.environ,
        metavar="FILE",
        help="YAML file of the deployment (SHANNON_CONFIG)",
    )
    serve.add_argument("--host", help="address to listen on (SHANNON_HOST)")
    serve.add_argument("--port", help="port to listen on (SHANNON_PORT)")
    serve.set_defaults(run=_serve)
    return parser


def _serve(args: argparse.Namespace) -> int:
    import uvloop

    from gateway.server import Server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    given = {"SHANNON_HOST": args.host, "SHANNON_PORT": args.port}
    environment = dict(os.environ) | {name: value for name, value in given.items() if value}
    if not environment.get("SHANNON_BOOTSTRAP_KEY"):
        environment["SHANNON_BOOTSTRAP_KEY"] = new_key()
    config = load_config(Path(args.config), environment)
    started = time.monotonic()
    _announce_start(config)
    engines = build_engines(config)
    app = create_app(config, engines, build_keyring(config, environment))
    key, model = environment["SHANNON_BOOTSTRAP_KEY"], config.default_model
    server = Server(
        app,
        host=config.server.host,
        port=config.server.port,
        on_ready=lambda url: _announce_ready(url, key, model, time.monotonic() - started),
    )
    uvloop.run(server.serve())
    return server.exit_code


def _announce_start(config: Config) -> None:
    for name, engine in config.engines.items():
        console.print(f"Starting engine [bold]{name}[/bold] ({engine.kind}, {engine.model}) ...")


def _announce_ready(url: str, key: str, model: str, seconds: float) -> None:
    console.print(f"[green]Ready[/green] after {seconds:.1f} s.\n")
    print(f"  URL   {url}/v1")
    print(f"  Key   {key}\n")
    print(f"  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\")
    print("    -H 'Content-Type: application/json' \\")
    print(f"""    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What are you?"}}]}}'\n""")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

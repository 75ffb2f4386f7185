"""Serve models over HTTP: the command `jaxvid serve`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.serve")

import argparse
import asyncio
import errno
import ipaddress
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from jaxvid import entry_point, parsers
from jaxvid.errors import InputError, import_or_explain
from jaxvid.model_path import check_model_path
from jaxvid.progress import print_above_bar
from jaxvid.serving.limits import Limits, Settings

if TYPE_CHECKING:
    from jaxvid.serving.http_server import HttpServer

PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
MAX_BATCH = 256
# While the event loop is busy, the thread of the networks waits this long for the GIL, several
# times per batch. Python's default is 5 ms.
SWITCH_SECONDS = 0.0005


def check_options(args: argparse.Namespace) -> Settings:
    """Return the settings of the server.

    Args:
        args: The parsed command line.

    Raises:
        InputError: An option is invalid. The message names it.
    """
    max_batch = Settings.max_batch if args.max_batch is None else args.max_batch
    if not 1 <= max_batch <= MAX_BATCH or max_batch & (max_batch - 1):
        raise InputError(f"--max_batch={max_batch}: must be a power of 2 up to {MAX_BATCH}")
    if args.decoders < 1:
        raise InputError(f"--decoders={args.decoders}: must be at least 1")
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port={args.port}: must be 0 to 65535")
    if not 0 <= args.max_wait <= 10:
        raise InputError(f"--max_wait={args.max_wait:g}: must be 0 to 10 seconds")
    if not 0 < args.max_upload <= 1e6:
        raise InputError(f"--max_upload={args.max_upload:g}: must be above 0 and at most 1e6 MB")
    if not 0 < args.deadline <= 86400:
        raise InputError(f"--deadline={args.deadline:g}: must be above 0 and at most 86400 seconds")
    token = args.token if args.token is not None else os.environ.get("JAXVID_TOKEN", "")
    if not token and not _is_loopback(args.host):
        raise InputError(
            f"--host {args.host}: other machines can reach this address; set a token with "
            "--token TOKEN or $JAXVID_TOKEN"
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError("--token: must consist of printable ASCII characters without spaces")
    for name in args.public_host:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise InputError(f"--public_host {name}: expected a name, e.g. videos.example.org")
    limits = Limits(upload_bytes=round(args.max_upload * 1e6), deadline_seconds=args.deadline)
    return Settings(
        token=token,
        public_hosts=tuple(name.lower() for name in args.public_host),
        allow_urls=args.allow_urls,
        num_decoders=args.decoders,
        max_batch=max_batch,
        measure_batches=args.max_batch is None,
        max_wait=args.max_wait,
        limits=limits,
    )


def _is_loopback(host: str) -> bool:
    """Return whether an address is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, but does not accept connections yet.

    Raises:
        InputError: The address is unknown or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: not an address of this machine ({error})") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        reason = {
            errno.EADDRINUSE: "is in use; choose another one, e.g. --port 0 for any free port",
            errno.EACCES: "needs root privileges; choose one above 1023",
        }.get(error.errno)
        if reason:
            raise InputError(f"--port {port}: {reason}") from None
        raise InputError(f"--host {host}: {error.strerror}; choose another address") from None
    return listener


def describe_address(host: str, listener: socket.socket) -> str:
    """Return the URL of the page."""
    port = listener.getsockname()[1]
    is_any = host in ("0.0.0.0", "::", "")
    name = "localhost" if is_any else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


async def run_until_stopped(server: "HttpServer", listener: socket.socket, url: str) -> NoReturn:
    """Serve until a signal arrives and the requests in progress are completed; end the process.

    The exit code is 0, or 128 + the signal if requests were not completed in time. A second signal
    ends the process at once.

    Args:
        server: The server.
        listener: Its listening socket.
        url: Address of the page, which is printed.

    Raises:
        Exception: A network cannot be compiled, or stdout cannot be written.
    """
    loop, service, received = asyncio.get_running_loop(), server.service, []

    def announce() -> None:
        try:
            print(f"serving {', '.join(service.models)} at {url}", flush=True)
        except (InputError, SystemExit) as error:
            service.failure = error
            server.stop()

    def stop(number: signal.Signals) -> None:
        if service.is_stopping:
            entry_point.exit_now(128 + number)
        if service.status == "compiling" and not service.num_requests():
            entry_point.exit_now(0)  # a compilation cannot be interrupted
        received.append(number)
        server.stop()
        if count := service.num_requests():
            print_above_bar(f"stopping; requests in progress: {count}; a second signal ends them")

    sys.setswitchinterval(SWITCH_SECONDS)
    # asyncio replaces the wake-up descriptor of `entry_point`.
    for number in entry_point.SIGNALS:
        loop.add_signal_handler(number, stop, number)
    await server.serve(listener, announce)
    if service.failure is not None:
        raise service.failure
    # Otherwise, Python would wait for the network's thread, which may still compute a batch.
    entry_point.exit_now(128 + received[0] if server.num_ended else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code if the server cannot be started."""
    args = parsers.serve().parse_args(argv)
    try:
        settings = check_options(args)
        for model in args.models:
            check_model_path(model)
        for package in PACKAGES:
            import_or_explain(package, "jaxvid[serve]", "jaxvid serve needs")
        listener = bind(args.host, args.port)
        from jaxvid.serving.app import make_app
        from jaxvid.serving.http_server import HttpServer
        from jaxvid.serving.model_loading import load_models

        app = make_app(load_models(args.models, args.dtype, args.engine), settings)
        server = HttpServer(app, settings.limits)
        url = describe_address(args.host, listener)
        asyncio.run(run_until_stopped(server, listener, url))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE

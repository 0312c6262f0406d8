"""`titan top`: a live view of a server, from its GET /load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from phase4_scheduler.top_frame import Reading

TIMEOUT = 2.0  # seconds that the server may take to answer


class AwayError(RuntimeError):
    """The server does not answer now; it may later."""


def top(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="TITAN_API_KEY", help="Sent as bearer token.")] = "",
    interval: Annotated[float, typer.Option(help="Seconds between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Watch a server: QPS, latencies, queue, KV memory, how busy it is; Ctrl-C ends it."""
    from rich.console import Console

    from phase0_prototype.errors import UserError
    from phase4_scheduler.top_frame import History, frame

    if not 0.05 <= interval <= 3600:
        raise UserError(f"--interval {interval:g}: give 0.05 to 3600 seconds")
    if not once:
        _watch(url, api_key, interval)
        return
    history = History()
    try:
        history.add(0.0, read_load(url, api_key))
    except AwayError as error:
        raise UserError(f"{error}; start a server (titan serve MODEL) or give --url") from None
    Console(highlight=False).print(frame(history, url))


def read_load(url: str, api_key: str = "", timeout: float = TIMEOUT) -> Reading:
    """What the server says at /load.

    Raises:
        AwayError: nobody answers, or not with success.
        UserError: the key is wrong, or what answers is no server of ours.
    """
    import http.client
    import json

    from phase0_prototype.errors import UserError
    from phase4_scheduler.bench.http_client import Address

    address = Address.of(url, option="--url")
    kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=timeout)  # asks the server itself, whatever proxies are set
    try:
        connection.request("GET", address.path("/load"), headers=_authorization(api_key))
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise AwayError(f"no answer from {url} ({reason.lower()})") from None
    finally:
        connection.close()
    if status in (401, 403):
        raise UserError(f"{url} answers {status}: give its key with --api-key or TITAN_API_KEY")
    if status >= 500:
        raise AwayError(f"{url} answers {status}")
    try:
        found = json.loads(body) if status == 200 else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "state" not in found:
        raise UserError(f"{url}/load answers {status} and is no statistics of a titan server: give --url")
    return found


def _watch(url: str, api_key: str, interval: float) -> None:
    """Draw until Ctrl-C: in place on a terminal, one frame below the other elsewhere."""
    import contextlib
    import time

    from rich.console import Console
    from rich.live import Live

    from phase4_scheduler.top_frame import History, frame

    console, history = Console(highlight=False), History()
    place = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
    with contextlib.suppress(KeyboardInterrupt), place or contextlib.nullcontext():
        while True:
            began, away = time.monotonic(), ""
            try:
                history.add(began, read_load(url, api_key))
            except AwayError as error:
                away = str(error)
            drawn = frame(history, url, away=away)
            if place:
                place.update(drawn, refresh=True)
            else:
                console.print(drawn)
            time.sleep(max(0.0, began + interval - time.monotonic()))


def _authorization(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def register(app: typer.Typer) -> None:
    """Add the command to `titan`."""
    app.command()(top)

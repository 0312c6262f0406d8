"""Server-sent events out of a stream of bytes (WHATWG HTML, section 9.2.6), however they are cut into pieces."""

from __future__ import annotations


class EventSplitter:
    """Gives the data of each event when the blank line that ends it has arrived.

    Of an event only the data count here: names, ids and comments are passed over.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events that these bytes complete, in order; several `data:` lines are joined by newlines."""
        if self._rest:
            data = self._rest + data
        held = b""
        if b"\r" in data:
            if data.endswith(b"\r"):  # perhaps half of a \r\n
                data, held = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = data.split(b"\n\n")
        self._rest = rest + held
        found = []
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:  # nearly all are like this
                found.append(event[6:])
            elif (joined := _data(event)) is not None:
                found.append(joined)
        return found


def _data(event: bytes) -> bytes | None:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None

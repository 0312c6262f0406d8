"""What a request is told when no engine can serve it."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine is not there: it starts, died, hung or is being stopped. It is not the request's fault.

    Attributes:
        retry_after: seconds after which it is worth trying again; None: never.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

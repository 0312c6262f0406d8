"""The engine's process: `python -m phase4_scheduler.core.main`, started by its client (process.py).

One line of JSON on standard input says what to load; that pipe stays open as the lifeline. Its signals are the
client's business: a service manager that stops a service signals every process of it, and the client still wants to
finish what runs.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from phase4_scheduler.core import lifeline, wire

USER_ERROR = 2  # exit status; others are crashes


class Order(msgspec.Struct, frozen=True):
    """What an engine's process is to do.

    Attributes:
        model: directory, shipped name or hub id; "null": no model (null_engine.py).
        settings: of the engine.
        use: which implementation of the course's parts.
        channels: directory of the sockets.
        parent: process id.
    """

    model: str
    settings: dict[str, Any]
    use: str
    channels: str
    parent: int


def main() -> int:
    """Load, serve until told to stop; returns the exit status."""
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="engine: %(message)s", stream=sys.stderr)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    lifeline.hold(sys.stdin.fileno(), order.parent)
    from phase4_scheduler.core.channels import EngineChannels

    channels = EngineChannels(Path(order.channels))
    try:
        _serve(order, channels, began)
    except Exception as error:
        mistake = bool(getattr(error, "is_user_error", False))
        if not mistake:
            traceback.print_exc()
        lines = str(error).splitlines() or [""]
        message = lines[0] if mistake else f"{type(error).__name__}: {lines[0]}"
        channels.send_control(wire.Fault(message, mistake))
        return USER_ERROR if mistake else 1
    finally:
        channels.close()
    return 0


def _serve(order: Order, channels: Any, began: float) -> None:
    from phase4_scheduler.core.core import EngineCore

    loop, info = _null(order) if order.model == "null" else _model(order)
    core = EngineCore(loop, info, channels)
    gc.collect()
    gc.freeze()  # a full collection would look at every object of torch, in the middle of a step
    channels.send_control(wire.Hello(info, os.getpid(), time.monotonic() - began))
    core.run()


def _model(order: Order) -> tuple[Any, wire.Info]:
    from module0_profiling.course.parts import Use, describe
    from phase0_prototype.cpu_memory import keep_freed_memory
    from phase0_prototype.hub import resolve_model
    from phase4_scheduler.core.sampling_defaults import sampling_defaults
    from phase4_scheduler.engine import build
    from phase4_scheduler.engine_config import ServingConfig

    config, use = ServingConfig.of(order.model, order.settings), Use.parse(order.use)
    engine = build(config, use)
    keep_freed_memory()
    spec = engine.model.kv_spec
    return engine.loop, wire.Info(
        model=order.model,
        max_model_len=engine.max_model_len,
        vocab_size=engine.config.vocab_size,
        eos_token_ids=list(engine.config.eos_token_ids),
        max_num_seqs=config.max_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_blocks=engine.kv.tables.num_blocks,
        block_size=engine.kv.block_size,
        dtype=str(spec.dtype).removeprefix("torch."),
        device=str(engine.device),
        weight_bytes=engine.model.weight_bytes,
        kv_bytes_per_token=spec.bytes_per_token,
        described=describe(use),
        sampling_defaults=sampling_defaults(resolve_model(order.model)),
    )


def _null(order: Order) -> tuple[Any, wire.Info]:
    from module0_profiling.course.parts import Use, describe
    from phase4_scheduler.null_engine import build_null

    use = Use.parse(order.use)
    engine = build_null(order.settings, use)
    config = engine.config
    return engine.loop, wire.Info(
        model=order.model,
        max_model_len=config.max_model_len,
        vocab_size=engine.vocab_size,
        eos_token_ids=list(engine.eos_token_ids),
        max_num_seqs=config.scheduling.max_num_seqs,
        max_num_batched_tokens=config.scheduling.max_num_batched_tokens,
        num_blocks=config.blocks,
        block_size=config.block_size,
        dtype="none",
        device="none",
        described=f"no model: tokens at a set rate; {describe(use)}",
    )


if __name__ == "__main__":
    sys.exit(main())

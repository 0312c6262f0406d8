"""Nothing outlives its parent, and nobody else is hurt (kill -9 of an API process left engines with their memory)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from phase4_scheduler.tests.engines import PATIENCE

PARENT = """
import asyncio, sys
from phase4_scheduler.async_llm import AsyncLLM
from phase0_prototype.sampling_params import SamplingParams

async def main():
    llm = AsyncLLM("null", {"step_seconds": float(sys.argv[1])})
    await llm.start()
    if sys.argv[2] == "ready":
        await llm.ready(60)
        llm.submit("hello", SamplingParams(max_tokens=1000))
    while llm.pid is None:
        await asyncio.sleep(0.01)
    print(llm.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
HELD = """
import os, sys, threading, time
from phase4_scheduler.core import lifeline
lifeline.hold(0, int(sys.argv[1]))
print("held", flush=True)
while sys.argv[2] == "spin":  # a loop that never rests
    pass
time.sleep(600)
"""


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("step", "when"), [("0.01", "ready"), ("600", "ready"), ("0.01", "starting")])
def test_an_engine_is_gone_soon_after_its_parent_was_killed(step, when):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    place = tempfile.mkdtemp(dir="/tmp")  # what a killed parent leaves
    command, environment = [sys.executable, "-c", PARENT, step, when], {**os.environ, "TMPDIR": place}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        engine = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        assert gone_within(engine, 3.0)
        assert bystander.poll() is None
    finally:
        for process in (parent, bystander):
            process.kill()
            process.wait()
        parent.stdout.close()
        shutil.rmtree(place)


@pytest.mark.parametrize("busy", ["spin", "sleep"])
def test_the_pipe_alone_is_enough(busy):
    """As on systems without a parent-death signal: the parent lives and closes its end."""
    child = subprocess.Popen(
        [sys.executable, "-c", HELD, str(os.getpid()), busy],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout.readline() == b"held\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(PATIENCE) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_parent_that_is_gone_already_is_noticed():
    child = subprocess.Popen(
        [sys.executable, "-c", HELD, "1", "sleep"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with child:
        assert child.wait(PATIENCE) == -signal.SIGKILL
        assert child.stdout.read() == b""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_the_signal_alone_is_enough():
    """As when a native function never gives Python's lock back: the pipe is held open by somebody else."""
    code = (
        "import os, subprocess, sys\n"
        "r, w = os.pipe()\n"
        "os.set_inheritable(w, True)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {HELD!r}, str(os.getpid()), 'sleep'], stdin=r, "
        "stdout=subprocess.PIPE, pass_fds=(w,), start_new_session=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert gone_within(int(done.stdout), 3.0)

"""What the benchmark measures with: servers that are halted and ended, the simulation, shares, the peer."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from module0_profiling.bench import Options
from module0_profiling.bench_gpu import CheckFailed
from phase4_scheduler import benchmark
from phase4_scheduler.measures import our_server, scheduling_cases, vllm_peer
from phase4_scheduler.measures.gpu_cases import covered
from phase4_scheduler.measures.scheduling_cases import COST, jobs, percentile
from phase4_scheduler.measures.servers import HOST, Launch, Server, answers, free_port
from phase4_scheduler.measures.simulated import Cost, Job, simulate
from phase4_scheduler.scheduler import Scheduler
from phase4_scheduler.scheduler_config import SchedulerConfig

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs signals that stop a process")
DRY = Options("cpu", 1, Path(), Console(quiet=True), dry=True)
DEADLINE = 20.0
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
from http.server import HTTPServer, SimpleHTTPRequestHandler
HTTPServer(("127.0.0.1", int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()
"""


def until(holds: Callable[[], bool]) -> bool:
    """Whether something came true in time."""
    deadline = time.monotonic() + DEADLINE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def family() -> Server:
    """A server whose process has a child."""
    port = free_port()
    return Server(Launch("a file server", (sys.executable, "-c", PARENT, str(port)), port, ready="/"))


@POSIX
def test_a_server_is_halted_and_resumed_with_all_its_processes() -> None:
    with family() as server:
        assert server.wait_until_ready(timeout=60) > 0
        processes = server.processes()
        assert len(processes) == 2
        with server.halted():
            assert until(lambda: all(p.status() == psutil.STATUS_STOPPED for p in processes))
            connection = http.client.HTTPConnection(HOST, server.launch.port, timeout=0.2)
            with pytest.raises(TimeoutError):  # the system accepts for it, and nobody answers
                connection.request("GET", "/")
                connection.getresponse()
            connection.close()
        assert until(lambda: all(p.status() != psutil.STATUS_STOPPED for p in processes))
        assert answers(server.url + "/")


@POSIX
def test_nothing_of_a_server_is_left_even_if_it_ends_while_it_is_halted() -> None:
    with family() as server:
        server.wait_until_ready(timeout=60)
        processes = server.processes()
        server.halt()
    assert until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))


@POSIX
def test_nothing_of_a_halted_server_is_left_when_its_measurement_is_killed() -> None:
    measurement = """
import sys, time
from phase4_scheduler.tests.test_measures import family
with family() as server:
    server.wait_until_ready(timeout=60)
    print(*(p.pid for p in server.processes()), flush=True)
    server.halt()
    print("halted", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", measurement], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in killed.stdout.readline().split()]
        assert killed.stdout.readline() == "halted\n"
        killed.kill()
    assert len(processes) == 2
    assert until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))


@POSIX
def test_a_server_that_fails_to_start_is_one_line_with_what_it_said_last() -> None:
    failing = Launch(
        "broken", (sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"), 1
    )
    with Server(failing) as server, pytest.raises(CheckFailed, match=r"broken ended with status 3: no such model"):
        server.wait_until_ready(timeout=60)


def test_our_server_is_the_command_of_this_environment_with_its_settings() -> None:
    launch = our_server.launch("null", {"step_seconds": 0.5})
    words = list(launch.arguments)
    assert words[: len(our_server.titan())] == list(our_server.titan())
    assert words[words.index("--settings") + 1] == '{"step_seconds": 0.5}'
    assert words[words.index("--port") + 1] == str(launch.port)
    assert "serve null" in str(launch)


def test_the_peer_says_how_to_get_it_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(vllm_peer.VARIABLE, str(tmp_path / "python"))
    said = vllm_peer.why_not()
    assert str(tmp_path / "python") in said and vllm_peer.VARIABLE in said and "\n" not in said


def test_the_peer_computes_on_every_core_that_it_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(vllm_peer.VARIABLE, str(tmp_path / "bin" / "python"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    launch = vllm_peer.launch(tmp_path / "model", 8123)
    bound = {
        core
        for part in launch.environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")
        for core in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    }
    here = psutil.Process()
    assert bound == set(here.cpu_affinity() if hasattr(here, "cpu_affinity") else range(psutil.cpu_count() or 1))
    assert launch.environment["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_peer.launch(tmp_path, 1, device="cuda").environment


def test_a_simulated_job_takes_as_many_steps_as_it_has_tokens() -> None:
    done = simulate([Job(1.0, 100, 5)], SchedulerConfig(), Cost(step=1.0, token=0.01), make=Scheduler)
    (outcome,) = done.outcomes
    assert done.steps == 5
    assert outcome.first == pytest.approx(1.0 + 100 * 0.01)
    assert outcome.last == pytest.approx(5.0 + 104 * 0.01)
    assert done.seconds == pytest.approx(1.0 + outcome.last)


def test_simulated_jobs_wait_for_a_place_and_not_for_the_clock() -> None:
    config = SchedulerConfig(max_num_seqs=1)
    cost = Cost(step=1.0, token=0.0)
    trace = [Job(0.0, 4, 10), Job(1.0, 4, 2), Job(100.0, 4, 1)]
    first, second, third = simulate(trace, config, cost, make=Scheduler).outcomes
    assert (first.first, first.last) == (1.0, 10.0)
    assert (second.first, second.last) == (10.0, 11.0)  # begins after ten steps, having arrived at 1
    assert (third.first, third.last) == (1.0, 1.0)  # nobody was there: the clock went on to its arrival


def test_a_trace_offers_the_load_that_it_is_asked_for() -> None:
    trace = jobs(4000, rate=5.0)
    assert 4000 / trace[-1].arrival == pytest.approx(5.0, rel=0.1)
    assert [job.arrival for job in trace] == sorted(job.arrival for job in trace)
    assert sum(job.output == scheduling_cases.SHORT for job in trace) / 4000 == pytest.approx(0.5, abs=0.05)


def test_static_batches_saturate_before_continuous_ones() -> None:
    static = scheduling_cases._part("scheduler", "phase4=framework").Scheduler
    config = SchedulerConfig(max_num_seqs=8)
    alike = jobs(80, 0.0)
    assert (
        simulate(alike, config, COST, make=static).seconds > 1.3 * simulate(alike, config, COST, make=Scheduler).seconds
    )


def test_the_policies_case_finds_what_each_policy_is_for() -> None:
    found = {f.name: f.value for f in scheduling_cases.policies(SimpleNamespace(size=lambda full, tiny: 400))}  # type: ignore[arg-type]
    assert found["sjf/short, mean wait"] < found["fcfs/short, mean wait"]
    assert found["priority/urgent, mean wait"] < found["fcfs/urgent, mean wait"]
    assert found["static batches/all, mean wait"] > found["fcfs/all, mean wait"]


def test_covered_time_counts_overlaps_once_and_gaps_not_at_all() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (6, 7), (8, 10)]) == pytest.approx(7 / 10)
    assert covered([(4, 9), (5, 6)]) == 1.0
    assert covered([]) == 0.0


def test_percentile_is_the_value_that_a_share_of_them_lies_below() -> None:
    assert percentile(range(100), 0.99) == 99 and percentile(range(100), 0.5) == 50
    assert percentile([7.0], 0.99) == 7.0


@pytest.mark.parametrize("case", ["scheduler_speed", "async_steps"])
def test_cases_without_a_model_measure_something(case: str) -> None:
    figures = benchmark.CASES[case](DRY)
    assert figures and all(figure.value > 0 for figure in figures)
    assert len({figure.name for figure in figures}) == len(figures)


def test_a_device_is_busier_one_step_ahead() -> None:
    options: Any = SimpleNamespace(rounds=1, size=lambda full, tiny: min(full, 20))
    found = {f.name: f.value for f in scheduling_cases.async_steps(options)}
    row = "5 ms of host"
    assert found[f"{row}/one ahead"] > found[f"{row}/one after the other"]


def test_the_module_names_every_case_and_every_gpu_case_exists() -> None:
    named = set(re.findall(r"^    (\w+)  +\w", benchmark.__doc__ or "", re.MULTILINE))
    assert named == set(benchmark.CASES)
    assert set(benchmark.SUITE.gpu) <= set(benchmark.CASES)
    checks = {case.name for case in benchmark.GPU_CHECKS}
    assert all(case.check in checks | {""} for case in benchmark.GPU_CASES)

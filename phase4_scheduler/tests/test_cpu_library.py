"""Building the CPU kernels: whatever is missing or wrong is one line, and the engine does without them."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.cpu_attention import CpuAttention
from phase4_scheduler.kernels import library
from phase4_scheduler.kernels.library import why_not_cpu_kernels
from phase4_scheduler.llm import LLM

needs_kernels = pytest.mark.skipif(why_not_cpu_kernels() is not None, reason=str(why_not_cpu_kernels()))
linux = pytest.mark.skipif(sys.platform != "linux", reason="they are built on Linux only")


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A PATH with nothing on it but what the test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "bin"


@linux
def test_without_a_compiler(path, tmp_path):
    assert why_not_cpu_kernels(tmp_path / "build") == "no C++ compiler is on PATH: install g++"


@linux
def test_a_compiler_with_another_openmp(path, tmp_path):
    program(path, "clang++", "exit 0")
    assert "brings an OpenMP of its own" in str(why_not_cpu_kernels(tmp_path / "build"))


@linux
def test_a_compiler_that_fails(path, tmp_path):
    program(path, "g++", 'echo "x.cpp: In f:" >&2; echo "x.cpp:1:2: error: no such thing" >&2; exit 1')
    why = why_not_cpu_kernels(tmp_path / "build")
    assert why == "g++ cannot build the CPU kernels: x.cpp:1:2: error: no such thing"
    assert list((tmp_path / "build").iterdir()) == []


@linux
def test_a_place_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file").write_text("no folder")
    program(path, "g++", "exit 0")
    why = why_not_cpu_kernels(tmp_path / "file" / "build")
    assert why is not None and why.startswith("cannot build the CPU kernels in ") and "\n" not in why


@linux
def test_a_library_that_does_not_load(tmp_path):
    file = library.file_of(tmp_path)
    file.write_text("no library")
    why = why_not_cpu_kernels(tmp_path)
    assert why is not None and f"delete {file}" in why and "\n" not in why


@needs_kernels
def test_many_may_build_at_once_and_a_changed_source_has_another_name(tmp_path, monkeypatch):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(library.library, [tmp_path] * 2))
    (first,) = tmp_path.iterdir()
    copy = tmp_path / "kernels"
    shutil.copytree(library.HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "numbers.h").write_text((copy / "numbers.h").read_text() + "// changed\n")
    monkeypatch.setattr(library, "HERE", copy)
    assert library.file_of(tmp_path) != first


@needs_kernels
def test_there_is_one_openmp_in_the_process():
    """Two would have two sets of threads that wait for work on the same cores."""
    code = (
        "import torch; from phase4_scheduler.kernels.library import BUILD, library; library(BUILD)\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in lines if 'omp.so' in line or 'omp5.so' in line or 'gomp-' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.fixture
def nowhere(monkeypatch):
    """A machine that can't build them."""
    monkeypatch.setattr("phase4_scheduler.engine.why_not_cpu_kernels", lambda: "there is no g++")


def tiny(**settings):
    use = {f"phase{n}": "solution" for n in range(5)}
    given = {"dtype": "float32", "device": "cpu", "use": ",".join(f"{k}={v}" for k, v in use.items()), **settings}
    return LLM("titan-tiny", **given)


@needs_kernels
def test_the_engine_attends_by_them_unless_told_otherwise():
    attends = {k: isinstance(tiny(**v).engine.runner.model.backend, CpuAttention) for k, v in {
        "default": {},
        "off": {"cpu_kernels": "off"},
        "torch": {"attention_backend": "torch"},
        "compiled": {"runner": "compile"},
        "8 bits": {"kv_cache_dtype": "fp8_e4m3"},
    }.items()}  # fmt: skip
    assert attends == {"default": True, "off": False, "torch": False, "compiled": False, "8 bits": False}


def test_without_them_the_engine_says_so_once_and_goes_on(nowhere, caplog):
    with caplog.at_level(logging.WARNING):
        (output,) = tiny().generate("def f(", SamplingParams(temperature=0, max_tokens=3))
        tiny()
    assert len(output.outputs[0].token_ids) == 3
    assert [r.getMessage() for r in caplog.records if "CPU kernels" in r.getMessage()] == [
        "without the CPU kernels a step takes longer: there is no g++"
    ]
    with pytest.raises(UserError, match=r"^cpu_kernels=on can't be: there is no g\+\+$"):
        tiny(cpu_kernels="on")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cpu_kernels": "maybe"}, "give auto, on or off"),
        ({"cpu_kernels": "on", "runner": "compile"}, "runner=compile compiles torch's own operators"),
        (
            {"attention_backend": "cpu", "cpu_kernels": "off"},
            "attention_backend=cpu needs the CPU kernels: cpu_kernels=off",
        ),
        ({"attention_backend": "cpu", "kv_cache_dtype": "fp8_e4m3"}, "caches in the model's dtype, not fp8_e4m3"),
    ],
    ids=str,
)
def test_what_can_not_be_is_one_line(settings, reason):
    if "kv_cache_dtype" in settings and why_not_cpu_kernels():
        pytest.skip(str(why_not_cpu_kernels()))
    with pytest.raises(UserError, match=reason) as refused:
        tiny(**settings)
    assert "\n" not in str(refused.value)

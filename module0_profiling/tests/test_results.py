"""Results: what is written comes back, with its provenance, and nothing false can be written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata

import pytest

from module0_profiling.results import (
    Figure,
    ResultError,
    commit_of,
    load,
    load_all,
    path_of,
    record,
    write_atomically,
)

FIGURES = (Figure("speed-up", 12.4, "x", spread=0.04, note="200 tokens"), Figure("forward tokens", 200, ""))


def test_a_result_comes_back_as_it_was_recorded(tmp_path):
    path = record("phase0", "kv-cache", FIGURES, command="python -m x", root=tmp_path)
    assert path == tmp_path / "reports" / "results" / "phase0" / "kv-cache.json"
    result = load("phase0", "kv-cache", tmp_path)
    assert result is not None
    assert result.figures == FIGURES
    assert (result.phase, result.name, result.command) == ("phase0", "kv-cache", "python -m x")
    assert result.figure("speed-up") == FIGURES[0]
    assert result.figure("nothing") is None


def test_provenance_says_machine_versions_and_date(tmp_path):
    record("phase0", "a", FIGURES, command="c", peers=["numpy", "no-such-peer"], root=tmp_path)
    result = load("phase0", "a", tmp_path)
    assert result.versions["python"] == platform.python_version()
    assert result.versions["torch"] == metadata.version("torch")
    assert result.versions["numpy"] == metadata.version("numpy")
    assert "no-such-peer" not in result.versions
    assert result.device["cpu"]["units"] == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True
    assert result.date.endswith("Z")
    assert result.commit == "unknown"  # tmp_path is no git checkout


def test_the_file_is_sorted_json_that_a_reader_can_follow(tmp_path):
    text = record("phase0", "a", FIGURES, command="c", root=tmp_path).read_text()
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert text.endswith("}\n")
    assert "\n" in text.strip()
    assert [figure["name"] for figure in data["figures"]] == ["speed-up", "forward tokens"]  # order is the author's


def test_missing_result_is_none_and_all_results_come_by_name(tmp_path):
    assert load("phase0", "a", tmp_path) is None
    assert load_all("phase0", tmp_path) == {}
    for name in ("b", "a"):
        record("phase0", name, FIGURES, command="c", root=tmp_path)
    assert list(load_all("phase0", tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"figures": [{"name": "x"}]}', '{"figures": 3}', "\x00\x01"],
    ids=["empty", "truncated", "list", "no figures", "half a figure", "wrong type", "binary"],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text):
    path = path_of("phase0", "broken", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for read in (lambda: load("phase0", "broken", tmp_path), lambda: load_all("phase0", tmp_path)):
        with pytest.raises(ResultError) as refused:
            read()
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "figures", "message"),
    [
        ("../escape", FIGURES, "letters"),
        ("a.b", FIGURES, "letters"),
        ("a", (), "no figures"),
        ("a", (FIGURES[0], FIGURES[0]), "two figures"),
        ("a", (Figure("x", float("nan"), "s"),), "failed measurement"),
        ("a", (Figure("x", 1.0, "s", spread=float("inf")),), "failed measurement"),
    ],
)
def test_what_cannot_be_true_is_not_recorded(tmp_path, name, figures, message):
    with pytest.raises(ResultError, match=message):
        record("phase0", name, figures, command="c", root=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_scrap(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_commit_is_dirty_for_code_but_not_for_reports_and_prose(tmp_path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "a.json").write_text("{}")
    (tmp_path / "README.md").write_text("prose")
    assert commit_of(tmp_path) == clean
    (tmp_path / "code.py").write_text("x = 2\n")
    assert commit_of(tmp_path) == f"{clean}-dirty"

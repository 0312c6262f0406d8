"""Predictions: sums by hand, what bounds them, what fits; calibration and overhead as they are kept; the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from module0_profiling import calibration, cli, engine_overhead, model_costs
from module0_profiling.calibration import Calibration, rate_at
from module0_profiling.catalogue import find
from module0_profiling.device import detect
from module0_profiling.engine_overhead import Overhead
from module0_profiling.hardware import Peaks, catalogue_peaks
from module0_profiling.model_costs import Formats
from module0_profiling.model_shape import ModelError, load_shape
from module0_profiling.predict import USABLE, Measured, Roofs, largest_batch, parse_numbers, predict

LLAMA = load_shape("llama3-8b")
ROUND = Peaks(1e12, 1e12, {"bfloat16": 1e15}, source="datasheet", fingerprint="a round device")
RATES = Calibration(
    dtype="bfloat16",
    method="by hand",
    from_memory={1: 2e10, 1024: 4e11},
    from_cache={10**5: {1: 1e10, 1024: 1e11}, 10**6: {1: 1e11, 1024: 1e12}},
    bandwidth=2e10,
    prefill={100: 1e11},
    decode={100: 1e10, 1000: 1e11},
    elementwise={kind: {1000: 1e9, 10**6: 1e10} for kind in calibration.KINDS},
    threads=2,
    fingerprint="by hand",
)


def test_a_decode_of_one_sequence_is_the_bytes_of_the_weights_and_the_cache_over_the_bandwidth() -> None:
    step = predict(LLAMA, Roofs(ROUND), 1, 1024)
    embedding = 128256 * 4096 * 2  # of the table, one row is read
    read = model_costs.weight_bytes(LLAMA) - embedding + model_costs.kv_bytes(LLAMA, 1024)
    assert step.bound_by == "memory"
    assert read / 1e12 < step.seconds < 1.01 * read / 1e12  # activations and norms are the rest
    assert step.tokens_per_second == pytest.approx(1 / step.seconds)


def test_a_long_prefill_is_its_arithmetic_over_the_matmul_rate() -> None:
    fast = replace(ROUND, read_bandwidth=1e14)  # so that operations between the products do not count
    step = predict(LLAMA, Roofs(fast), 1, 8192, tokens=8192)
    layers = 2 * (model_costs.parameters(LLAMA) - 2 * 128256 * 4096) * 8192  # FLOPs: two a weight and token
    assert step.bound_by == "compute"
    assert layers / 1e15 < step.seconds < 1.2 * layers / 1e15  # attention is the rest
    assert step.tokens_per_second == pytest.approx(8192 / step.seconds)


def test_efficiency_divides_and_overhead_adds_or_hides() -> None:
    plain = predict(LLAMA, Roofs(ROUND), 4, 512).seconds
    assert predict(LLAMA, Roofs(ROUND, efficiency=0.5), 4, 512).seconds == pytest.approx(2 * plain)
    engine = Overhead(layer=1e-3, step=2e-3, sequence=5e-4)
    added = 32 * 1e-3 + 2e-3 + 4 * 5e-4
    on_cpu = predict(LLAMA, Roofs(ROUND), 4, 512, engine=engine)
    assert on_cpu.seconds == pytest.approx(plain + added) and on_cpu.bound_by == "overhead"
    assert predict(LLAMA, Roofs(ROUND), 4, 512, engine=engine, overlap=True).seconds == pytest.approx(max(plain, added))


def test_two_devices_halve_the_weights_and_pay_for_the_link() -> None:
    one = predict(LLAMA, Roofs(ROUND), 1, 1024)
    two = predict(LLAMA, Roofs(ROUND, link=1e12), 1, 1024, ranks=2)
    slow = predict(LLAMA, Roofs(ROUND, link=1e6), 1, 1024, ranks=2)
    assert two.weights == pytest.approx(one.weights / 2, rel=0.01) and two.kv == one.kv / 2
    assert 0.5 * one.seconds < two.seconds < 0.51 * one.seconds
    assert slow.bound_by == "link"
    sent = 2 * 32 * 4096 * 2 + 64128 * 2  # each all-reduce of two ranks sends the tensor once; half of the logits
    assert slow.seconds - two.seconds == pytest.approx(sent / 1e6, rel=1e-3)
    with pytest.raises(ModelError, match="--link-gb-s"):
        predict(LLAMA, Roofs(ROUND), 1, 1024, ranks=2)


def test_a_rate_that_no_document_states_is_one_line_that_says_what_to_give() -> None:
    with pytest.raises(ModelError, match=r"no published or measured fp8 rate, only for bfloat16.*--tflops"):
        predict(LLAMA, Roofs(ROUND), 1, 1024, formats=Formats(weights="fp8"))


def test_what_fits_is_counted_against_the_usable_memory() -> None:
    free = USABLE * 24e9 - model_costs.weight_bytes(LLAMA)
    assert largest_batch(LLAMA, 24e9, 1024) == free // (131072 * 1024)
    assert largest_batch(LLAMA, 10e9, 1024) == 0
    most = largest_batch(LLAMA, 24e9, 1024)
    assert predict(LLAMA, Roofs(ROUND), most, 1024).fits(24e9) is True
    assert predict(LLAMA, Roofs(ROUND), most + 1, 1024).fits(24e9) is False
    assert predict(LLAMA, Roofs(ROUND), 1, 1024).fits(None) is None


def test_rates_between_sizes_lie_on_a_line_of_log_log_paper() -> None:
    assert rate_at({1: 10.0, 100: 1000.0}, 10) == pytest.approx(100)
    assert rate_at({1: 10.0, 100: 1000.0}, 0.1) == 10 and rate_at({1: 10.0, 100: 1000.0}, 1e9) == 1000
    assert rate_at({1: 10.0, 4: 20.0, 100: 5.0}, 4) == 20


def test_a_calibrated_machine_takes_each_rate_at_the_size_of_the_operation() -> None:
    shape = replace(load_shape("titan-tiny"), layers=1)
    machine = Measured(RATES, ridge=10, cached=True)
    parts = {operation.name: (operation, seconds) for operation, seconds, _ in predict(shape, machine, 1, 300).parts}
    down, seconds = parts["down"]
    assert down.work.flops == 2 * 640 * 256
    assert seconds == pytest.approx(2 * 640 * 256 / rate_at({10**5: 1e10, 10**6: 1e11}, 640 * 256))
    attention, seconds = parts["attention"]
    assert seconds == pytest.approx(attention.work.bytes / rate_at(RATES.decode, 300))
    two = replace(shape, layers=2)  # the last attends with its last token only
    prompt = {o.name: s for o, s, _ in predict(two, machine, 1, 50, tokens=50).parts}
    assert prompt["attention"] == pytest.approx(4 * 4 * 64 * (50 * 51 // 2) / 1e11)
    far = predict(shape, Measured(RATES, ridge=10, cached=False), 1, 300)
    assert {o.name: s for o, s, _ in far.parts}["down"] == pytest.approx(2 * 640 * 256 / 2e10, rel=0.01)


@pytest.mark.parametrize(
    ("text", "numbers"), [("8", [8]), ("1,8, 32", [1, 8, 32]), ("1..8", [1, 2, 4, 8]), ("3..10,4", [3, 6, 10, 4])]
)
def test_numbers_and_doubling_ranges(text: str, numbers: list[int]) -> None:
    assert list(parse_numbers(text, "--batch")) == numbers


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1..", "8..2", "1.5", "1,,2"])
def test_other_numbers_are_refused_with_the_options_name(text: str) -> None:
    with pytest.raises(ModelError, match=r"--batch .*1\.\.256"):
        parse_numbers(text, "--batch")


# What is measured here.


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and short measurements."""
    monkeypatch.setattr(calibration, "cache_path", lambda: tmp_path / "peaks.json")
    monkeypatch.setattr(engine_overhead, "cache_path", lambda: tmp_path / "peaks.json")
    monkeypatch.setattr(calibration, "SECONDS", 0.001)
    monkeypatch.setattr(calibration, "BUSY", 1e9)
    monkeypatch.setattr(calibration.Crowd, "SWITCHES", 1e9)  # other tests run beside this one
    return tmp_path


def test_a_calibration_is_measured_once_and_read_back_as_it_was(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = detect("cpu")
    found = calibration.calibrated(cpu)
    assert calibration._restored(json.loads((kept / "calibration.json").read_text()).popitem()[1]) == found
    monkeypatch.setattr(calibration, "calibrate", lambda *arguments: pytest.fail("it was measured twice"))
    assert calibration.calibrated(cpu) == found
    assert set(found.elementwise) == set(calibration.KINDS)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cpu": {}}', "from_memory", "elementwise", "decode"])
def test_a_damaged_calibration_is_as_good_as_none(kept: Path, damage: str) -> None:
    file = kept / "calibration.json"
    calibration._write({"key": RATES})
    assert calibration._read() == {"key": RATES}
    if damage in ("from_memory", "decode", "elementwise"):
        entries = json.loads(file.read_text())
        entries["key"][damage] = {"1": -1.0} if damage != "elementwise" else {"norm": {"1": 1.0}}
        damage = json.dumps(entries)
    file.write_text(damage)
    assert calibration._read() == {}


def test_what_was_measured_on_a_busy_machine_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BUSY", 0.75)
    cpu = detect("cpu")
    monkeypatch.setattr(calibration, "calibrate", lambda *arguments: replace(RATES, load=2.0 * max(1, cpu.units)))
    assert calibration.calibrated(cpu).load > 0
    assert not (kept / "calibration.json").exists()
    monkeypatch.setattr(calibration, "calibrate", lambda *arguments: RATES)
    monkeypatch.setattr(calibration.Crowd, "SWITCHES", -1)
    assert calibration.calibrated(cpu) == RATES and not (kept / "calibration.json").exists()


def test_the_newest_room_measures_the_overhead_of_its_engine(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_overhead.rooms, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        engine_overhead.rooms, "discover", lambda: tuple(sorted(p.name for p in tmp_path.glob("phase*")))
    )
    cpu = detect("cpu")
    assert engine_overhead.measured_overhead(cpu, RATES) == (Overhead(), "")
    for room, seconds in (("phase8_first", 1.0), ("phase9_second", 2.0)):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
        source = f"from module0_profiling.engine_overhead import Overhead\nmeasure = lambda *a: Overhead({seconds})\n"
        (tmp_path / room / "overhead.py").write_text(source)
    found = engine_overhead.measured_overhead(cpu, RATES)
    assert found == (Overhead(layer=2.0), "phase9_second")
    sys.modules["phase9_second.overhead"].measure = lambda *a: pytest.fail("measured twice")  # type: ignore[attr-defined]
    assert engine_overhead.measured_overhead(cpu, RATES) == found
    (kept / "overhead.json").write_text('{"broken": {"layer": "x"}}')
    assert engine_overhead._read() == {}


# The command.


def run(*arguments: str) -> str:
    """Standard output of `titan`; the status must be 0."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.make_app(), list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_deepseek_v3_on_an_h200_is_memory_bound_and_does_not_fit() -> None:
    printed = run("predict", "--model", "deepseek-v3", "--device", "h200", "--batch", "1,32", "--context", "4096")
    assert "DeepseekV3" not in printed and "deepseek-v3, decoding, bfloat16, H200 SXM" in printed
    assert "Weights: 1,342 GB" in printed
    assert "Largest batch at 4096 positions: 0" in printed
    step = predict(load_shape("deepseek-v3"), Roofs(catalogue_peaks(find("h200"))), 1, 4096)
    assert f"{step.seconds * 1e3:.3g}" in printed and "memory" in printed


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama3-70b", "llama3-405b", "mixtral-8x7b", "qwen3-235b-a22b"])
def test_every_published_model_is_predicted_from_datasheets(name: str) -> None:
    printed = run("predict", "--model", name, "--device", "b200", "--batch", "1..4", "--operations", "--tp", "2")
    assert "all-reduce" in printed and "latency of each all-reduce" in printed


def test_any_config_file_is_a_model_and_the_room_for_a_cache_is_said(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = run("predict", "--model", str(tmp_path), "--device", "4090", "--prefill", "256", "--batch", "2")
    assert "reading prompts of 256 tokens" in printed and "GeForce RTX 4090" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "nowhere"), "no such file, and not one of the bundled"),
        (("--device", "h1000"), "device 'h1000' is unknown: use here"),
        (("--device", "h200", "--batch", "0"), "--batch 0"),
        (("--device", "h200", "--dtype", "int3"), "--dtype int3 is unknown"),
        (("--device", "m3-max"), "--tflops"),
        (("--device", "h200", "--model", "llama3-8b", "--tp", "3"), "--tp 3 does not divide"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["titan", "predict", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert said in err and len(err.strip().splitlines()) == 1


def test_devices_are_listed_with_their_sources() -> None:
    printed = run("devices")
    assert "mi300x" in printed and "NVIDIA H200 datasheet" in printed

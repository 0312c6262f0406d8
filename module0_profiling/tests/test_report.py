"""Reports: every number comes from a result file, and what is missing says so."""

from __future__ import annotations

import pytest

from module0_profiling import plots, report
from module0_profiling.formatting import digits, markdown_table, value_with_unit
from module0_profiling.hardware import Peaks
from module0_profiling.report import Reporter, generate, main
from module0_profiling.results import Figure, load, path_of, record
from module0_profiling.roofline import Point, to_figures

GRID = tuple(
    Figure(f"{engine}/batch {batch}", value, "tokens/s", spread=0.03)
    for engine, batch, value in [("ours", 1, 12.34), ("ours", 8, 95.0), ("transformers", 1, 8.1)]
)


@pytest.fixture
def root(tmp_path):
    """A repository with one room, phase0_prototype, and one result, phase0/decode."""
    (tmp_path / "phase0_prototype").mkdir()
    record("phase0", "decode", GRID, command="python -m bench decode", root=tmp_path)
    return tmp_path


def page(root, template: str) -> str:
    """The report of phase0 from a template."""
    (root / "phase0_prototype" / "report.md.in").write_text(template)
    return Reporter(root).report("phase0").text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.34, "x", "12.3 x"),
        (1234.5, "tokens/s", "1,234 tokens/s"),
        (31.04e9, "bytes/s", "31.0 GB/s"),
        (2.5e12, "FLOP/s", "2.50 TFLOP/s"),
        (0.00814, "s", "8.14 ms"),
        (71, "s", "71 s"),
        (2e-9, "s", "2 ns"),
        (0.0, "s", "0 s"),
        (85.26, "%", "85.3 %"),
        (20100, "", "20,100"),
        (1e-5, "", "1.00e-05"),
        (14 << 20, "bytes", "14.7 MB"),
    ],
)
def test_values_are_written_for_people(value, unit, text):
    assert value_with_unit(Figure("f", value, unit)) == text


def test_whole_numbers_stay_whole():
    assert (digits(200), digits(100.0), digits(99.96)) == ("200", "100", "100")


def test_names_with_a_slash_become_a_grid_with_an_empty_cell_where_nothing_was_measured(root):
    lines = markdown_table(load("phase0", "decode", root)).splitlines()
    assert lines[:4] == [
        "|  | batch 1 | batch 8 |",
        "| --- | ---: | ---: |",
        "| ours | 12.3 tokens/s | 95 tokens/s |",
        "| transformers | 8.10 tokens/s |  |",
    ]
    assert "Largest spread between rounds: 3%." in lines
    assert "`python -m bench decode`" in lines[-1]


def test_a_list_has_spread_and_note_only_where_there_are_any(root):
    record("phase0", "gate", [Figure("speed-up", 12.0, "x")], command="c", root=root)
    assert markdown_table(load("phase0", "gate", root)).startswith(
        "| figure | value |\n| --- | ---: |\n| speed-up | 12 x"
    )
    record("phase0", "gate", [Figure("a|b", 12.0, "x", 0.5, "why")], command="c", root=root)
    assert "| a\\|b | 12 x | 50% | why |" in markdown_table(load("phase0", "gate", root))


def test_directives_are_replaced(root):
    text = page(
        root, "Fast: {{ figure:decode.ours/batch 1 }}.\n\n{{ table:decode layout=list }}\n\n{{machine:decode}}\n"
    )
    assert "Fast: 12.3 tokens/s." in text
    assert "| ours/batch 8 | 95 tokens/s | 3% |" in text
    assert "commit unknown; 20" in text
    assert "{{" not in text


def test_the_machine_line_names_the_processor_that_ran(root):
    path = record("phase0", "decode", GRID, command="c", device="cpu", root=root)
    before = path.read_text()
    path.write_text(before.replace('"gpu": null', '"gpu": {"kind": "cuda", "name": "NVIDIA H200", "units": 132}'))
    assert "H200" not in page(root, "{{ machine:decode }}")
    path.write_text(path.read_text().replace('"used": "cpu"', '"used": "gpu"'))
    assert "NVIDIA H200, 132 SMs" in page(root, "{{ machine:decode }}") or '"gpu": null' not in before


@pytest.mark.parametrize(
    "directive", ["table:nothing", "figure:nothing.x", "machine:nothing", "plot:nothing kind=bars"]
)
def test_what_was_not_measured_says_so_with_the_command_and_no_number(root, directive):
    text = page(root, f"{{{{ measure:nothing make it so }}}}\n{{{{ {directive} }}}}")
    assert text.endswith("-->\n\nnot measured yet (`make it so`)")
    assert page(root, f"{{{{ {directive} }}}}").endswith("not measured yet (`python -m phase0_prototype.benchmark`)")


def test_a_misspelt_figure_is_not_measured_and_a_note_lists_the_real_ones(root):
    (root / "phase0_prototype" / "report.md.in").write_text("{{ figure:decode.ours/batch 9 }}")
    changed, notes = generate(root)
    assert changed[0].read_text().endswith("not measured yet (`python -m phase0_prototype.benchmark`)")
    assert "'ours/batch 9'" in notes[0] and "ours/batch 8" in notes[0]


@pytest.mark.parametrize("directive", ["tabel:decode", "table", "figure:decode", "table:", "plot:decode kind=pie"])
def test_a_directive_that_does_not_exist_is_an_error_of_one_line(root, directive):
    with pytest.raises(report.ReportError) as refused:
        page(root, f"{{{{ {directive} }}}}")
    assert "\n" not in str(refused.value)


def test_a_phase_without_a_template_gets_all_its_tables(root):
    text = Reporter(root).report("phase0").text
    assert "## decode" in text and "| ours | 12.3 tokens/s |" in text


def test_a_template_without_results_is_a_page_too(tmp_path):
    room = tmp_path / "phase1_memory"
    room.mkdir()
    (room / "report.md.in").write_text("# Memory\n{{ table:buddy }}\n")
    assert generate(tmp_path)[0] == [tmp_path / "reports" / "phase1.md"]
    assert "not measured yet" in (tmp_path / "reports" / "phase1.md").read_text()


def test_regions_of_a_readme_are_filled_and_the_rest_is_left_alone(root):
    readme = root / "README.md"
    readme.write_text(
        "# Mine\n<!-- generated:table:phase0/decode -->\nstale\n<!-- /generated -->\n"
        "It makes <!-- generated:figure:phase0/decode.ours/batch 8 -->7<!-- /generated --> tokens.\n"
    )
    generate(root)
    text = readme.read_text()
    assert text.startswith("# Mine\n<!-- generated:table:phase0/decode -->\n|  | batch 1 |")
    assert "stale" not in text
    assert text.endswith(
        "It makes <!-- generated:figure:phase0/decode.ours/batch 8 -->95 tokens/s<!-- /generated --> tokens.\n"
    )
    assert generate(root) == ([], [])  # a second run changes nothing


def test_a_room_readme_may_leave_out_its_own_phase(root):
    readme = root / "phase0_prototype" / "README.md"
    readme.write_text("<!-- generated:table:decode -->\n<!-- /generated -->\n")
    generate(root)
    assert "| ours | 12.3 tokens/s | 95 tokens/s |" in readme.read_text()


def test_bars_are_drawn_linked_and_redrawn_only_when_the_data_changes(root):
    text = page(root, "{{ plot:decode kind=bars }}")
    svg = root / "reports" / "figures" / "phase0-decode.svg"
    assert text.endswith("![phase0 decode](figures/phase0-decode.svg)")
    assert svg.with_suffix(".png").stat().st_size > 1000
    drawn = svg.stat().st_mtime_ns
    page(root, "{{ plot:decode kind=bars }}")
    assert svg.stat().st_mtime_ns == drawn
    record("phase0", "decode", GRID[:2], command="c", root=root)
    page(root, "{{ plot:decode kind=bars }}")
    assert svg.stat().st_mtime_ns != drawn


def test_a_roofline_is_drawn_from_its_result(root):
    peaks = Peaks(25e9, 20e9, {"bfloat16": 2e12})
    record("phase0", "roofline", to_figures([Point("decode", 1.0, 2e10)], peaks), command="c", root=root)
    assert "figures/phase0-roofline.svg" in page(root, "{{ plot:roofline kind=roofline }}")
    with pytest.raises(report.ReportError, match="phase0/decode cannot be drawn"):
        page(root, "{{ plot:decode kind=roofline }}")


def test_a_plot_that_a_benchmark_drew_is_linked_when_it_is_there(root):
    assert "not measured yet" in page(root, "{{ plot:loss }}")
    plots.bar_plot({"loss": {"step 1": 2.0}}, "nats", root / "reports" / "figures" / "phase0-loss")
    assert "![phase0 loss](figures/phase0-loss.svg)" in page(root, "{{ plot:loss }}")


def test_check_fails_until_the_report_is_generated_and_changes_nothing(root, capsys):
    (root / "phase0_prototype" / "report.md.in").write_text("{{ plot:decode kind=bars }}\n{{ table:decode }}\n")
    arguments = ["--root", str(root)]
    assert main([*arguments, "--check"]) == 1
    assert "out of date: reports/phase0.md" in capsys.readouterr().out
    assert not (root / "reports" / "phase0.md").exists()
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    record("phase0", "decode", [*GRID, Figure("ours/batch 32", 301.0, "tokens/s")], command="c", root=root)
    assert main([*arguments, "--check"]) == 1


def test_check_sees_a_stale_plot_under_an_unchanged_page(root):
    (root / "phase0_prototype" / "report.md.in").write_text("{{ plot:decode kind=bars }}\n")
    main(["--root", str(root)])
    record("phase0", "decode", GRID[:2], command="c", root=root)
    assert main(["--root", str(root), "--check"]) == 1


def test_a_broken_result_stops_the_report_with_its_name(root, capsys):
    path_of("phase0", "decode", root).write_text("{")
    assert main(["--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "decode.json" in error and error.count("\n") == 1

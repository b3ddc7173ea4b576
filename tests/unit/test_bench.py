"""The benchmarks' arithmetic, what they say about it, and the command line; nothing is measured here."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.benchmarks import listing, report, stage, worker
from tools.benchmarks.choice import BENCHMARKS, choose
from tools.benchmarks.figures import (
    Finding,
    Growth,
    Measured,
    MeasurementError,
    Plan,
    Series,
    Spread,
    Verdict,
    amount,
    compared,
    paired,
    ratios,
    spread,
)
from tools.benchmarks.report import Outcome

TIMES = st.floats(min_value=1e-6, max_value=1e6)

# --- the arithmetic -------------------------------------------------------------------------------------------------


def test_the_median_and_the_middle_half_are_those_of_the_textbook() -> None:
    assert spread([5, 1, 4, 2, 3]) == Spread(3, 2, 4, 5)
    assert spread([1, 2, 3, 4]) == Spread(2.5, 1.75, 3.25, 4)
    assert spread([7]) == Spread(7, 7, 7, 1)


def test_one_outlier_moves_neither_the_median_nor_the_middle_half() -> None:
    assert spread([1, 2, 3, 4, 5]) == spread([1, 2, 3, 4, 1e9])


def test_nothing_measured_is_no_number() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


@given(st.lists(TIMES, min_size=1, max_size=50))
def test_the_median_lies_in_the_middle_half_and_that_among_the_values(values: list[float]) -> None:
    found = spread(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.low <= found.median + slack
    assert found.median <= found.high + slack
    assert found.high <= max(values) + slack


def test_the_ratio_is_taken_pair_by_pair() -> None:
    # The machine became ten times slower on the way: the ratio of the medians would be 5.5, or 0.6.
    assert ratios([(2, 1), (2, 1), (20, 10), (20, 10)]).median == 2
    assert ratios([(1, 2), (20, 10)]) == Spread(1.25, 0.875, 1.625, 2)


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1), st.sampled_from([2.0, 1024.0, 0.5]))
def test_a_machine_that_is_slower_throughout_gives_the_same_ratios(
    pairs: list[tuple[float, float]], slower: float
) -> None:
    assert ratios([(ours * slower, bare * slower) for ours, bare in pairs]) == ratios(pairs)


@pytest.mark.parametrize("bare", [0.0, -1.0])
def test_there_is_no_ratio_to_nothing(bare: float) -> None:
    with pytest.raises(ValueError, match="took no time"):
        ratios([(1, 1), (1, bare)])


def test_pairs_alternate_and_the_first_is_dropped() -> None:
    order: list[str] = []

    def side(name: str) -> int:
        order.append(name)
        return len(order)

    pairs = paired(lambda: side("A"), lambda: side("B"), 4)
    assert "".join(order) == "BA" + "ABBAABBA"
    assert pairs == [(3, 4), (6, 5), (7, 8), (10, 9)]


def test_a_side_that_fails_ends_the_measurement() -> None:
    def broken() -> float:
        raise MeasurementError("it does not work")

    with pytest.raises(MeasurementError, match="does not work"):
        paired(lambda: 1.0, broken, 3)
    with pytest.raises(ValueError, match="at least one"):
        paired(lambda: 1.0, lambda: 1.0, 0)


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("median", "goal", "verdict"),
    [
        (1.49, 1.5, Verdict.HOLDS),
        (1.5, 1.5, Verdict.HOLDS),
        (1.501, 1.5, Verdict.SHORT),
        (0.0, 2, Verdict.HOLDS),
        (1e9, None, Verdict.NO_GOAL),
    ],
)
def test_the_median_decides(median: float, goal: float | None, verdict: Verdict) -> None:
    assert amount("something", [median], "s", goal).verdict is verdict


def test_a_lucky_half_does_not_make_up_for_the_median() -> None:
    finding = compared("mount", "script", [(1, 1), (1, 1), (2, 1), (2, 1), (2, 1)], 1.5)
    assert finding.spread.low < 1.5
    assert finding.verdict is Verdict.SHORT


# --- the report -----------------------------------------------------------------------------------------------------

HOLDS = Finding("mount", "a script", Spread(1.25, 1.2, 1.3, 20), "x", 1.5)
SHORT = replace(HOLDS, what="list | 1000", spread=Spread(15.82, 15.0, 16.5, 20), goal=12)
GROWTH = Growth(
    "depth",
    "Time by depth",
    "images",
    "seconds",
    (
        Series("service", ((1, Spread(0.08, 0.07, 0.09, 3)), (128, Spread(0.5, 0.4, 0.6, 3)))),
        Series("script", ((1, Spread(0.02, 0.01, 0.03, 3)),)),
    ),
    logarithmic=False,
)
OUTCOMES = [
    Outcome("mount", Measured((HOLDS, SHORT), (amount("mount", [0.158], "s", 10),), remark="Both sides mount.")),
    Outcome("depth", Measured(growths=(GROWTH,))),
    Outcome("stream", failure="there is no\nOpenListing"),
]


def test_every_finding_and_every_failure_has_a_row() -> None:
    assert report.rows(OUTCOMES) == [
        ("mount", "a script", "1.25 x", "1.20 to 1.30", "20", "≤ 1.50 x", "holds"),
        ("list | 1000", "a script", "15.8 x", "15 to 16.5", "20", "≤ 12 x", "falls short"),
        ("stream", "", "", "", "", "", "not measured: there is no\nOpenListing"),
    ]
    assert report.summary(OUTCOMES) == "Goals: 1 hold, 1 fall short, 1 not measured"
    assert report.summary(OUTCOMES[:2]) == "Goals: 1 hold, 1 fall short"


def test_the_terminal_shows_goals_orientation_and_curves() -> None:
    lines = report.terminal(OUTCOMES).splitlines()
    assert any(line.startswith("list | 1000") and line.endswith("falls short") for line in lines)
    assert any(line.split() == ["128", "0.500"] for line in lines), lines  # no value of the script there
    assert any(line.startswith("mount") and "0.158 s" in line for line in lines)
    assert lines[-1] == report.summary(OUTCOMES)


def test_the_page_names_what_falls_short_and_links_the_plots() -> None:
    page = report.page(OUTCOMES, [("Python", "3.11.2")])
    assert "What falls short:\n\n- list | 1000: 15.8 x\n" in page
    assert "not measured: there is no OpenListing |" in page
    assert "(performance/depth.svg)" in page
    assert "Both sides mount." in page
    assert "| Python | 3.11.2 |" in page


def test_a_cell_cannot_break_its_table() -> None:
    page = report.page(OUTCOMES, [])
    (row,) = [line for line in page.splitlines() if line.startswith("| list")]
    assert row.replace("\\|", "").count("|") == 8
    (row,) = [line for line in page.splitlines() if line.startswith("| stream")]
    assert row.count("|") == 8


def test_a_page_where_all_goals_hold_does_not_speak_of_falling_short() -> None:
    page = report.page([Outcome("mount", Measured((HOLDS,)))], [])
    assert "What falls short" not in page
    assert "Goals: 1 hold, 0 fall short." in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.0, "2"),
        (1708.6, "1,709"),
        (15.82, "15.8"),
        (1.504, "1.50"),
        (0.158, "0.158"),
        (0.0301, "0.0301"),
        (0.00012345, "0.00012"),
        (-1.25, "-1.25"),
    ],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert report.number(value) == text


# --- the command line -----------------------------------------------------------------------------------------------


def test_without_names_everything_is_measured() -> None:
    choice = choose([])
    assert choice.names == tuple(BENCHMARKS)
    assert not choice.write
    assert not choice.plan.quick


def test_names_pairs_and_quick_are_taken() -> None:
    assert choose(["mount", "list", "mount", "--pairs", "7"]).names == ("mount", "list")
    assert choose(["mount", "--pairs", "7"]).plan == Plan(7, quick=False)
    assert choose(["--quick"]).plan.pairs < choose([]).plan.pairs
    assert choose(["--quick", "--pairs", "9"]).plan == Plan(9, quick=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing"], "there is no nothing; known are idle"),
        (["--pairs", "0"], "at least 1"),
        (["--pairs", "many"], "invalid int"),
        (["--write", "mount"], "a whole run"),
        (["--write", "--quick"], "a whole run"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        choose(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


# --- what is read from the kernel -----------------------------------------------------------------------------------


def test_sizes_of_a_status_file_are_bytes_and_counts_are_counts() -> None:
    text = "Name:\tVmRSS: 7 kB\nVmRSS:\t   36428 kB\nvoluntary_ctxt_switches:\t150\n"
    assert stage.status_number(text, "VmRSS") == 36428 * 1024
    assert stage.status_number(text, "voluntary_ctxt_switches") == 150
    with pytest.raises(MeasurementError, match="VmHWM"):
        stage.status_number(text, "VmHWM")


def test_this_process_has_a_size_and_wakes_up_now_and_then() -> None:
    assert stage.status(os.getpid(), "VmRSS") > 1_000_000
    assert stage.switches(os.getpid()) > 0


def test_the_machine_is_described_without_its_name() -> None:
    described = dict(stage.machine())
    assert described["Python"] == sys.version.split()[0]
    node = os.uname().nodename
    assert all(node not in value.split() for value in described.values())
    assert re.fullmatch(r"[\d.]+", described["QEMU"])
    assert re.search(r", Linux [\d.]+$", described["System"])


# --- what is measured is checked ------------------------------------------------------------------------------------


class Liar:
    """A worker that saw less than there is."""

    def ask(self, do: str, **arguments: object) -> dict[str, object]:
        del do, arguments
        return {"seconds": 0.001, "entries": 999}


def test_a_listing_that_is_not_whole_is_no_measurement() -> None:
    with pytest.raises(MeasurementError, match="999 entries of 1000"):
        listing._timed(Liar(), 1000, "list_files")  # type: ignore[arg-type]  # all that it is asked for


def test_the_shell_script_is_one_that_a_shell_accepts() -> None:
    script = Path(stage.__file__).with_name("mount_steps.sh")
    assert os.spawnlp(os.P_WAIT, "sh", "sh", "-n", str(script)) == 0


async def test_the_bare_sides_see_and_read_everything(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    for number in range(20):
        (directory / f"file-{number}").write_bytes(b"x" * number)
    (directory / "link").symlink_to("nowhere")
    large = tmp_path / "large"
    large.write_bytes(bytes(3_000_001))
    bare = worker.Bare()
    scanned, found = await bare.scan_directory(str(directory)), await bare.find(str(directory))
    assert scanned["entries"] == found["entries"] == 21
    assert found["status"] == 0
    assert (await bare.read_file(str(large)))["bytes"] == 3_000_001
    assert min(answer["seconds"] for answer in (scanned, found, await bare.open_file(str(large), count=3))) > 0

"""The benchmarks work: each quick one runs once, on a machine of its own within that of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tools.benchmarks.choice import BENCHMARKS
from tools.benchmarks.figures import MeasurementError, Plan
from tools.benchmarks.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAN = Plan(pairs=1, quick=True)


@pytest.fixture(scope="module")
def bench(private_namespace: None) -> Iterator[Stage]:  # noqa: ARG001 - for the order
    with Stage.open(quick=True) as opened:
        yield opened


# Without `idle`, which has to wait for time to pass.
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "idle"])
def test_a_benchmark_measures_something(bench: Stage, name: str) -> None:
    measured = BENCHMARKS[name](bench, PLAN)
    assert measured.findings or measured.growths
    for finding in (*measured.findings, *measured.orientation):
        assert finding.what
    ratios = [finding.spread.median for finding in measured.findings if finding.unit == "x"]
    assert all(ratio > 0 for ratio in ratios)


def test_a_script_that_fails_is_no_measurement_and_leaves_nothing(bench: Stage) -> None:
    """What it leaves is found by the fixtures around every test of this tier."""
    repository, partitions = bench.four_volumes
    start, size, _ = partitions[1]
    wrong = [partitions[0], (start, size, "ext4")]  # it is an XFS
    with pytest.raises(MeasurementError, match="shell script"):
        bench.steps(repository.images[-1], wrong)

"""Values of a catalogue that is not ours, and what they mean."""

from __future__ import annotations

from decimal import Decimal

import pytest

from sendense_restored.daemon.store.rows import LARGEST, Row
from sendense_restored.errors import CatalogUnavailable


def row(value: object) -> Row:
    return Row("backup_disks", {"id": 1, "value": value})


@pytest.mark.parametrize(
    "value",
    [
        *(1e300, -1e300, float("inf"), float("nan"), Decimal("1e400000"), Decimal("-1e400000"), Decimal("NaN")),
        *(Decimal("sNaN"), "1e300", "1e-99999999999999999999", "1e99999999999999999999", "nan", -1, 10**100),
    ],
)
def test_a_number_that_cannot_be_is_a_broken_row(value: object) -> None:
    with pytest.raises(CatalogUnavailable, match=r"column value of table backup_disks holds .* no number"):
        row(value).number("value", unit=1 << 30)


@pytest.mark.parametrize(("value", "meant"), [(0.5, 1 << 29), ("0.5", 1 << 29), (Decimal("1.5"), 3 << 29), (None, 0)])
def test_a_number_may_have_a_fraction(value: object, meant: int) -> None:
    assert row(value).number("value", unit=1 << 30) == meant


def test_the_largest_number_is_one() -> None:
    assert row(LARGEST).number("value") == LARGEST
    with pytest.raises(CatalogUnavailable):
        row(LARGEST).number("value", unit=2)

"""How long a mount stays, by a clock that the test moves."""

from __future__ import annotations

import math

import pytest

from sendense_restored.daemon.lease import FIRST_BACK_OFF, LONGEST_BACK_OFF, Holder, Lease
from tests.clock import FakeClock

ANNA, BERT, CAROL = Holder(1001), Holder(1002), Holder(1002, "carol")
ROOT = 0


class Leased:
    """A lease of ten hours and its clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.lease = Lease(self.clock, ends=self.clock.now() + 36_000)

    def left(self) -> float:
        return self.lease.expires - self.clock.now()


@pytest.fixture
def leased() -> Leased:
    return Leased()


def test_a_claim_lasts_its_time_to_the_second(leased: Leased) -> None:
    leased.lease.claim(ANNA, 600)
    leased.clock.advance(599)
    assert leased.lease.expired() == []
    leased.clock.advance(1)
    assert leased.lease.expired() == [ANNA]


def test_the_mount_lasts_as_long_as_the_last_claim(leased: Leased) -> None:
    leased.lease.claim(ANNA, 600)
    leased.lease.claim(BERT, 60)
    assert (leased.left(), leased.lease.next - leased.clock.now()) == (600, 60)
    leased.clock.advance(60)
    assert leased.lease.expired() == [BERT]


def test_use_renews_the_claims_of_the_one_who_uses(leased: Leased) -> None:
    for holder in (ANNA, BERT, CAROL):
        leased.lease.claim(holder, 600)
    leased.clock.advance(300)
    leased.lease.touch(BERT.uid)
    leased.clock.advance(300)
    assert leased.lease.expired() == [ANNA]
    leased.lease.touch(CAROL.uid, "carol")
    leased.clock.advance(300)
    assert leased.lease.expired() == [ANNA, BERT]


def test_a_visitor_keeps_everybodys(leased: Leased) -> None:
    for holder in (ANNA, BERT):
        leased.lease.claim(holder, 600)
    leased.clock.advance(599)
    leased.lease.touch(ROOT)
    leased.clock.advance(599)
    assert leased.lease.expired() == []


def test_a_claim_that_is_renewed_takes_the_new_time_and_keeps_its_beginning(leased: Leased) -> None:
    since = leased.lease.claim(ANNA, 600).since
    leased.clock.advance(100)
    again = leased.lease.claim(ANNA, 60)
    assert (again.since, again.expires) == (since, leased.clock.now() + 60)


@pytest.mark.parametrize("timeout", [0.0, -5.0, 1e-9])
def test_a_mount_that_is_held_is_not_looked_at_without_end(leased: Leased, timeout: float) -> None:
    leased.lease.claim(ANNA, timeout)
    with leased.lease.hold(ANNA.uid):
        assert leased.lease.next >= leased.clock.now() + 1


def test_whom_a_caller_speaks_for(leased: Leased) -> None:
    for holder in (ANNA, BERT, CAROL):
        leased.lease.claim(holder, 600)
    assert leased.lease.of(BERT.uid) == [BERT, CAROL]
    assert leased.lease.of(BERT.uid, "carol") == [CAROL]
    assert leased.lease.of(BERT.uid, "dave") == leased.lease.of(ROOT) == []
    assert leased.lease.uids == {1001, 1002}


def test_while_something_holds_it_nothing_runs_out(leased: Leased) -> None:
    leased.lease.claim(ANNA, 600)
    leased.lease.claim(BERT, 600)
    with leased.lease.hold(ANNA.uid), leased.lease.hold(ANNA.uid):
        leased.clock.advance(6000)
        assert (leased.lease.held, leased.lease.expired()) == (True, [])
        assert leased.lease.next == leased.clock.now() + 300  # to write down that it goes on
        assert leased.left() == 600
    assert leased.lease.expired() == [BERT]  # who did not use it all the while
    leased.clock.advance(600)
    assert leased.lease.expired() == [ANNA, BERT]


def test_no_use_moves_the_end_of_its_life(leased: Leased) -> None:
    leased.lease.claim(ANNA, math.inf)
    assert leased.lease.expires == leased.lease.next == leased.lease.ends
    with leased.lease.hold(ANNA.uid):
        assert leased.lease.expires == leased.lease.ends


def test_what_could_not_be_closed_is_tried_again_less_and_less_often(leased: Leased) -> None:
    leased.lease.claim(ANNA, 60)
    leased.clock.advance(60)
    waits = []
    for _ in range(8):
        assert leased.lease.expired() == [ANNA]
        leased.lease.postpone()
        assert leased.lease.expired() == []
        assert leased.lease.overdue
        waits.append(leased.left())
        leased.clock.advance(leased.lease.next - leased.clock.now())
    assert waits == [30, 60, 120, 240, 480, 900, 900, 900]
    assert (waits[0], waits[-1]) == (FIRST_BACK_OFF, LONGEST_BACK_OFF)
    leased.lease.touch(ANNA.uid)
    assert (leased.lease.overdue, leased.left()) == (False, 60)
    leased.clock.advance(60)
    leased.lease.postpone()
    assert leased.left() == FIRST_BACK_OFF


def test_the_time_in_which_it_could_not_be_used_is_nobodys(leased: Leased) -> None:
    leased.lease.claim(ANNA, 600)
    leased.clock.advance(100)
    began = leased.clock.now()
    leased.clock.advance(50)
    leased.lease.claim(BERT, 600)  # who came in the middle
    leased.clock.advance(250)
    leased.lease.paused(began)
    now = leased.clock.now()
    assert {holder: claim.expires - now for holder, claim in leased.lease.claims.items()} == {ANNA: 500, BERT: 600}


def test_a_step_of_the_wall_clock_moves_nothing(leased: Leased) -> None:
    leased.lease.claim(ANNA, 600)
    leased.clock.step_wall(-86_400)
    leased.clock.advance(599)
    assert leased.lease.expired() == []


def test_a_lease_without_claims_is_over(leased: Leased) -> None:
    assert leased.lease.expires == leased.clock.now()
    assert leased.lease.expired() == []


@pytest.mark.parametrize(("holder", "text"), [(Holder(7), "uid 7"), (Holder(7, "carol"), "uid 7 on behalf of carol")])
def test_a_holder_in_words(holder: Holder, text: str) -> None:
    assert str(holder) == text

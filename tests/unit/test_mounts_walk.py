"""A random walk through mounts and their ends, against a model that knows only what clients are promised."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from sendense_restored import config, errors
from sendense_restored.daemon.mounts import Mount, Mounts
from sendense_restored.daemon.session import State
from tests import simulator as sim

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from sendense_restored.daemon.volume import Journal

MOST = 3
VOLUMES = {"b1": 1, "b2": 2, "b3": 3}

uids = st.integers(1000, 1003)
backups = st.sampled_from(sorted(VOLUMES))
journals = st.sampled_from(["replay", "as-crashed"])


@dataclass
class Promised:
    """What the model knows of a mount."""

    mount: Mount
    key: tuple[str, str]
    claims: set[int] = field(default_factory=set)
    failed: bool = False
    busy: bool = False

    @property
    def outside(self) -> str:
        """The simulator's name of its first volume."""
        return f"{self.mount.id}/partition-1"


class Listener:
    """Waits for mounts to fail; that all is told rightly is tested elsewhere."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def added(self, mount: Mount) -> None: ...

    def changed(self, mount: Mount) -> None:
        del mount
        self._news.set()

    def removed(self, mount: Mount) -> None: ...

    async def failed(self, mount: Mount) -> None:
        async with asyncio.timeout(60):
            while mount.session.state is not State.FAILED:
                self._news.clear()
                await self._news.wait()


class Walk(RuleBasedStateMachine):
    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.around = contextlib.AsyncExitStack()
        self.listener = Listener()
        self.promised: dict[str, Promised] = {}
        self.run(self.begin())

    def run(self, work: Coroutine[object, object, None]) -> None:
        self.runner.run(work)

    async def begin(self) -> None:
        directory = Path(self.around.enter_context(tempfile.TemporaryDirectory()))
        self.simulator, self.store = await self.around.enter_async_context(sim.house(directory))
        for backup, volumes in VOLUMES.items():
            disk = tuple(f"mountable-fs{number}" for number in range(volumes))
            await sim.add_backup(self.store, backup, (disk,))
        limits = config.Mounts(directory=self.simulator.mounts, max=MOST)
        self.mounts = Mounts(config.Config(mounts=limits), self.store, self.simulator.machine, self.listener)

    def teardown(self) -> None:
        with self.runner:
            self.run(self.end())

    async def end(self) -> None:
        await self.mounts.stop()
        assert await self.store.mount_rows() == []
        await self.around.aclose()  # where the house finds nothing standing

    async def mount(self, uid: int, backup: str, journal: Journal) -> Mount:
        wish = await self.mounts.wish(backup, disk_index=0, all_disks=False, journal=journal)
        return await self.mounts.mount(wish, uid)

    def joinable(self, key: tuple[str, str]) -> Promised | None:
        return next((each for each in self.promised.values() if each.key == key and not each.failed), None)

    def full(self) -> bool:
        return sum(not each.failed for each in self.promised.values()) >= MOST

    def mounted(self, mount: Mount, key: tuple[str, str], uid: int) -> str:
        self.promised.setdefault(mount.id, Promised(mount, key)).claims.add(uid)
        return mount.id

    def closes(self, promised: Promised, uid: int) -> bool:
        """Whether an unmount by ``uid`` is to close the mount."""
        return promised.claims <= {uid} or uid not in promised.claims

    @rule(target=known, uid=uids, backup=backups, journal=journals)
    def mounts_it(self, uid: int, backup: str, journal: Journal) -> str:
        return self.runner.run(self._mounts_it(uid, backup, journal))

    async def _mounts_it(self, uid: int, backup: str, journal: Journal) -> str:
        key = backup, journal
        there = self.joinable(key)
        if there is None and self.full():
            with pytest.raises(errors.LimitReached):
                await self.mount(uid, backup, journal)
            return ""
        mount = await self.mount(uid, backup, journal)
        assert there is None or mount is there.mount
        return self.mounted(mount, key, uid)

    @rule(uid=uids, backup=backups, journal=journals, step=st.sampled_from(sim.BUILD_STEPS))
    def fails_to_mount(self, uid: int, backup: str, journal: Journal, step: str) -> None:
        self.run(self._fails_to_mount(uid, backup, journal, step))

    async def _fails_to_mount(self, uid: int, backup: str, journal: Journal, step: str) -> None:
        if self.joinable((backup, journal)) or self.full():
            return
        self.simulator.refuse[step] = errors.NoSpace("the simulator is full")
        with pytest.raises(errors.NoSpace):
            await self.mount(uid, backup, journal)
        self.simulator.refuse.clear()

    @rule(uid=uids, backup=backups, journal=journals, step=st.sampled_from(sim.BUILD_STEPS[1:]))
    def gives_up(self, uid: int, backup: str, journal: Journal, step: str) -> None:
        self.run(self._gives_up(uid, backup, journal, step))

    async def _gives_up(self, uid: int, backup: str, journal: Journal, step: str) -> None:
        key = backup, journal
        if self.joinable(key) or self.full():
            return
        gate = self.simulator.stop_at(step)
        mounting = asyncio.create_task(self.mount(uid, backup, journal))
        await gate.reached.wait()
        mounting.cancel()
        await asyncio.wait([mounting])
        gate.open()
        self.mounted(await self.mount(uid, backup, journal), key, uid)

    @rule(name=known, uid=uids)
    def unmounts_it(self, name: str, uid: int) -> None:
        self.run(self._unmounts_it(name, uid))

    async def _unmounts_it(self, name: str, uid: int) -> None:
        promised = self.promised.get(name)
        if promised is None:
            return
        if self.closes(promised, uid) and promised.busy and not promised.failed:
            with pytest.raises(errors.Busy):
                await self.mounts.unmount(promised.mount, uid, force=False)
            assert promised.mount.session.busy
            return
        closes = self.closes(promised, uid)
        await self.mounts.unmount(promised.mount, uid, force=False)
        promised.claims.discard(uid)
        if closes:
            del self.promised[name]

    @rule(name=consumes(known), uid=uids)
    def forces_it(self, name: str, uid: int) -> None:
        if promised := self.promised.pop(name, None):
            self.run(self.mounts.unmount(promised.mount, uid, force=True))

    @rule(target=known, name=known, leaving=uids, coming=uids)
    def one_leaves_while_another_comes(self, name: str, leaving: int, coming: int) -> str:
        return self.runner.run(self._one_leaves_while_another_comes(name, leaving, coming))

    async def _one_leaves_while_another_comes(self, name: str, leaving: int, coming: int) -> str:
        promised = self.promised.get(name)
        if promised is None or promised.failed:
            return ""
        closes = self.closes(promised, leaving)
        left, came = await asyncio.gather(
            self.mounts.unmount(promised.mount, leaving, force=False),
            self.mount(coming, *promised.key),  # type: ignore[arg-type]  # the second is a journal
            return_exceptions=True,
        )
        assert isinstance(came, Mount)
        if closes and promised.busy:
            assert isinstance(left, errors.Busy)
        else:
            assert left is None
            promised.claims.discard(leaving)
            if closes:
                del self.promised[name]
        assert (came is promised.mount) == (name in self.promised)
        return self.mounted(came, promised.key, coming)

    @rule(name=known, busy=st.booleans())
    def somebody_opens_or_closes_a_file(self, name: str, busy: bool) -> None:
        promised = self.promised.get(name)
        if promised is None or promised.failed:
            return
        promised.busy = busy
        (self.simulator.busy.add if busy else self.simulator.busy.discard)(promised.outside)

    @rule(name=known, part=st.sampled_from(["server", "reader", "driver"]))
    def loses_a_part(self, name: str, part: str) -> None:
        self.run(self._loses_a_part(name, part))

    async def _loses_a_part(self, name: str, part: str) -> None:
        promised = self.promised.get(name)
        if promised is None or promised.failed:
            return
        session = promised.mount.session
        if part == "server":
            device = session.volumes["partition-1"].device
            assert isinstance(device, sim.Device)
            device.attachment.die("it ended")
        elif part == "reader":
            (reader,) = (each for each in self.simulator.readers if each.mount == name)
            reader.die("it ended")
        else:
            mounted = session.volumes["partition-1"].mounted
            assert mounted is not None
            mounted.lost.set_result("it ended")
        await self.listener.failed(promised.mount)
        assert promised.mount.ending is not None
        await asyncio.wait([promised.mount.ending])
        assert session.error == "it ended"
        promised.failed = True

    @invariant()
    def as_promised(self) -> None:
        self.run(self._as_promised())

    async def _as_promised(self) -> None:
        assert {mount.id for mount in self.mounts} == set(self.promised)
        rows = {row.id: row.status.value for row in await self.store.mount_rows()}
        wanted: collections.Counter[str] = collections.Counter()
        for name, promised in self.promised.items():
            state = "failed" if promised.failed else "mounted"
            assert (promised.mount.session.state.value, rows.pop(name)) == (state, state)
            assert set(promised.mount.claims) == promised.claims
            assert {claim.uid for claim in await self.store.claims(name)} == promised.claims
            if promised.failed:
                continue
            volumes = VOLUMES[promised.key[0]]
            wanted.update(
                {"workplace": 1, "image": 1, "attachment": 1, "reader": 1, "device": volumes, "mount": volumes}
            )
            listing = await promised.mount.session.list((b"partition-1", b"etc"), limit=10, cursor="")
            assert [entry.name for entry in listing.entries] == ["hostname", "motd"]
        assert rows == {}
        assert collections.Counter(what.split()[0] for what in self.simulator.standing) == wanted
        serving = {name for name, promised in self.promised.items() if not promised.failed}
        assert {path.name for path in self.simulator.mounts.iterdir()} == serving


def _walk(*, walks: int, steps: int) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=walks, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=slow
        ),
    )


def test_a_walk() -> None:
    _walk(walks=12, steps=25)


@pytest.mark.long
def test_many_walks() -> None:
    _walk(walks=400, steps=60)

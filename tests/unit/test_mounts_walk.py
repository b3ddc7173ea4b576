"""A random walk through mounts and their ends, against a model that knows only what clients are promised.

Each step begins a moment later than the one before, so that no two deadlines fall on the same moment by chance. After
it, and at each deadline that time passes by, the house comes to rest; then the model draws its consequences, and the
two are compared: mounts, claims and times, rows, what stands on the host, what those who wait were told.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import os
import tempfile
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sendense_restored import config, errors
from sendense_restored.daemon.events import Actor
from sendense_restored.daemon.lease import Holder
from sendense_restored.daemon.resume import Resume
from sendense_restored.reader.protocol import Filters
from tests import simulator as sim
from tests.unit.house import ANNA, BERT, CARL, CORE_TASKS, DISKS, House, start
from tests.unit.promises import FULL, WHOLE, Client, Key, Model, Promised, Settings

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable
    from datetime import datetime

    from sendense_restored.daemon.mount import Mount
    from sendense_restored.daemon.session import State
    from sendense_restored.daemon.store import ClaimRow, Store

MOMENT = 1 / 64
"""Seconds between two steps; exact in binary and in microseconds."""
PEOPLE = [Holder(ANNA), Holder(BERT), Holder(CARL), Holder(CARL, "dora"), Holder(CARL, "emil")]
KEYS = [
    *(Key("b1", 0, "replay"), Key("b1", 0, "as-crashed"), Key("b1", 1, "replay"), Key("b1", None, "replay")),
    *(Key("b2", 0, "replay"), Key("b3", 1, "as-crashed"), Key("b4", None, "as-crashed")),
]
LONG_PATH = (b"many", *(bytes([letter]) * 250 for letter in b"abcdef"))
"""A directory whose listing is more than a pipe holds."""
TURNS = 12
"""Of the event loop, in which whoever was woken does what there is to do without waiting."""


class Request(NamedTuple):
    """What somebody asks for."""

    key: Key
    holder: Holder
    timeout: float | None
    wait: bool


people = st.sampled_from(PEOPLE)
keys = st.sampled_from(KEYS)
picks = st.integers(0, 11)
timeouts = st.sampled_from([None, None, 60.0, 200.0, 600.0, 3600.0])
requests = st.builds(Request, keys, people, timeouts, st.booleans())
crowds = st.lists(requests, min_size=1, max_size=4)
times = st.sampled_from([1, 15, 29, 31, 59, 61, 150, 150, 301, 301, 599, 601, 1300, 2900, 5000, 90_000])


class PausingResume(Resume):
    """One that tells which builds wait for their second attempt."""

    def __init__(self, *parts: Any) -> None:  # noqa: ANN401 - those of the other
        super().__init__(*parts)
        self.pausing: set[asyncio.Task[Any] | None] = set()
        self.one_pauses = asyncio.Event()

    async def _pause(self) -> None:
        self.pausing.add(asyncio.current_task())
        self.one_pauses.set()
        try:
            await super()._pause()
        finally:
            self.pausing.discard(asyncio.current_task())


class WalkHouse(House):
    """A house with a history of what it began, and what its listeners believe."""

    def __init__(self, simulator: sim.Simulator, store: Store, wanted: Settings) -> None:
        self.begun: dict[Key, collections.deque[str]] = collections.defaultdict(collections.deque)
        self.shown: dict[str, tuple[State, bool]] = {}
        self._wanted = wanted
        self._asked_of_the_store = 0
        self._count(store)
        super().__init__(simulator, store)

    def _count(self, store: Store) -> None:
        """Count what the store has been asked and has not answered yet."""
        run = store._records._run

        async def counted(*arguments: Any) -> Any:  # noqa: ANN401 - whatever it is
            self._asked_of_the_store += 1
            try:
                return await run(*arguments)
            finally:
                self._asked_of_the_store -= 1

        store._records._run = counted  # type: ignore[method-assign, assignment]  # stands in for it

    def begin(self) -> None:
        wanted = self._wanted
        self.settings = config.Config(
            mounts=config.Mounts(
                directory=self.simulator.mounts,
                max=wanted.most,
                max_per_holder=wanted.per_holder,
                idle_timeout=wanted.idle_timeout,
                max_lifetime=wanted.lifetime,
                evict_after=wanted.evict_after,
            ),
            limits=config.Limits(listings=wanted.listings),
        )
        super().begin()
        self.resume: PausingResume = PausingResume(
            self.mounts, self.store, self.simulator.machine, self.events, self.clock
        )
        self.sweep._resume = self.resume
        self.shown.clear()

    def added(self, mount: Mount) -> None:
        super().added(mount)
        assert mount.id not in self.shown
        self.shown[mount.id] = mount.session.state, mount.busy
        self.begun[key_of(mount)].append(mount.id)

    def changed(self, mount: Mount) -> None:
        super().changed(mount)
        self.shown[mount.id] = mount.session.state, mount.busy

    def removed(self, mount: Mount) -> None:
        super().removed(mount)
        del self.shown[mount.id]

    async def rest(self) -> None:
        """Wait until nothing goes on any more but what waits for time, for people or for the host."""
        async with asyncio.timeout(10):
            while True:
                if active := self._active():
                    pausing = asyncio.create_task(self.resume.one_pauses.wait(), name="walk")
                    await asyncio.wait([*active, pausing], return_when=asyncio.FIRST_COMPLETED)
                    pausing.cancel()
                    self.resume.one_pauses.clear()
                    continue
                for _ in range(TURNS):
                    await asyncio.sleep(0)
                if self._asked_of_the_store:
                    await self.store.mount_rows()  # what was asked before has been answered then
                elif not self.clock.advance(0) and not self._active():
                    return

    def _active(self) -> list[asyncio.Task[object]]:
        ending = CORE_TASKS - {"drain", "follow"}
        return [
            task
            for task in asyncio.all_tasks()
            if task.get_name().split()[0] in ending and task not in self.resume.pausing
        ]

    async def crash(self) -> None:
        """The same, and nothing of the old daemon runs any more when the new one begins."""
        ending = CORE_TASKS | {"client"}
        self.simulator.power_off()
        while tasks := [task for task in asyncio.all_tasks() if task.get_name().split()[0] in ending]:
            for task in tasks:
                if task.get_name() != "write events":
                    task.cancel()
            await asyncio.wait(tasks)
            for _ in range(TURNS):  # in which the end of one makes it begin another
                await asyncio.sleep(0)
        self.simulator.power_off()
        self.clock.forget()
        await self.events.flush()


def key_of(mount: Mount) -> Key:
    wish = mount.session.wish
    return Key(wish.backup.id, None if wish.all_disks else wish.disks[0].index, wish.journal)


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.around = contextlib.AsyncExitStack()
        self.clients: list[tuple[Client, asyncio.Task[Mount]]] = []
        self.house: WalkHouse
        self.model: Model

    @initialize(most=st.sampled_from([2, 2, 3]), per_holder=st.sampled_from([0, 0, 2]), asked=crowds)
    def begins(self, most: int, per_holder: int, asked: list[Request]) -> None:
        self.runner.run(self._begins(Settings(most, per_holder)))
        self.step(self._some_mount(asked))

    async def _begins(self, wanted: Settings) -> None:
        directory = Path(self.around.enter_context(tempfile.TemporaryDirectory()))
        numbers = itertools.count(1)  # names in the order of their making: each run of a walk goes the same way
        patched = self.around.enter_context(pytest.MonkeyPatch.context())
        patched.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers)))
        self.simulator, store = await self.around.enter_async_context(sim.house(directory))
        for backup in sorted({key.backup for key in KEYS}):
            await sim.add_backup(store, backup, DISKS)
        for disk in (directory / "repository").glob("*/*"):
            many = next(disk.glob("1-*")).joinpath(*map(os.fsdecode, LONG_PATH))
            many.mkdir(parents=True)
            for number in range(80):
                (many / str(number)).touch()
        self.house = WalkHouse(self.simulator, store, wanted)
        self.model = Model(
            self.house.clock,
            lambda key: self.house.begun[key].popleft(),
            lambda name: name in {mount.id for mount in self.house.mounts},
            wanted,
        )

    def teardown(self) -> None:
        with self.runner:
            if hasattr(self, "house"):
                self.runner.run(self._end())

    async def _end(self) -> None:
        self.simulator.refuse.clear()
        for _, task in self.clients:
            task.cancel()
        await self.house.mounts.stop()
        if self.clients:
            await asyncio.wait([task for _, task in self.clients])
        for mount in self.model.mounts.values():
            self.model.pipes += [pipe for pipe, _ in mount.streams]
        await self.streams_are_over()
        await self.house.events.close()
        await self.around.aclose()  # where the house finds nothing standing

    # --- how a step goes ----------------------------------------------------------------------------------------

    def step(self, work: Coroutine[object, object, None]) -> None:
        async def whole() -> None:
            await self.time_goes_on(MOMENT)
            await work
            await self.settle()

        self.runner.run(whole())

    async def settle(self) -> None:
        """Let house and model come to rest, and compare what those who asked were told."""
        await self.house.rest()
        self.model.go_on()
        await self.look_what_streams_wrote()
        for client, task in list(self.clients):
            assert task.done() == (client.told is not None), f"{client} against {task}"
            if client.told is None:
                continue
            self.clients.remove((client, task))
            if isinstance(client.told, str):
                assert task.result().id == client.told
            else:
                assert type(task.exception()) is client.told
        await self.streams_are_over()

    async def look_what_streams_wrote(self) -> None:
        streaming = {name: promised for name, promised in self.model.mounts.items() if promised.streams}
        for row, claims in await self.house.store.wished() if streaming else ():
            if promised := streaming.get(row.id):
                written_at = self.of(promised).written_at
                promised.wrote(self.by_the_clock(row.last_accessed_at), written_at, self.found(claims), self.now)

    @property
    def now(self) -> float:
        return self.house.clock.now()

    def by_the_clock(self, moment: datetime) -> float:
        return moment.timestamp() - self.house.clock.unix() + self.now

    def found(self, claims: Iterable[ClaimRow]) -> dict[Holder, tuple[float, float]]:
        """The timeouts of claims as they are written, and when those run out (clock)."""
        found = {}
        for claim in claims:
            assert claim.expires_at is not None
            found[Holder(claim.uid, claim.on_behalf_of)] = claim.timeout, self.by_the_clock(claim.expires_at)
        return found

    async def streams_are_over(self) -> None:
        """The threads of streams that have ended end, and their readers close them."""
        while self.model.pipes:
            os.close(self.model.pipes.pop())
        running = sum(len(mount.streams) for mount in self.model.mounts.values())
        walking = [thread for thread in threading.enumerate() if thread.name.endswith("(walk)")]
        if not running:
            for thread in walking:
                await asyncio.to_thread(thread.join)

    async def time_goes_on(self, seconds: float) -> None:
        """Deadline by deadline, the house's and the model's."""
        clock = self.house.clock
        end = clock.now() + seconds
        while clock.now() < end:
            following = clock.now() + clock.next if clock.next is not None else end
            clock.advance(max(min(following, self.model.next, end) - clock.now(), 0))
            await self.settle()

    def asks(self, key: Key, holder: Holder, timeout: float | None = None, wait: bool = False) -> Client:
        """Somebody asks for a mount; the model is told later."""
        client = Client(holder, key, timeout, wait=wait)
        self.clients.append((client, self.asking(key, holder, timeout, wait=wait)))
        return client

    def asking(
        self, key: Key, holder: Holder, timeout: float | None = None, *, wait: bool = False
    ) -> asyncio.Task[Mount]:
        work = self.house.mount(
            holder.uid,
            key.backup,
            disk=key.disk or 0,
            all_disks=key.disk is None,
            journal=key.journal,
            behalf=holder.on_behalf_of,
            idle_timeout=timeout,
            wait=wait,
        )
        task = cast("asyncio.Task[Mount]", start(work))
        task.set_name(f"client {holder}")
        return task

    def pick(self, number: int, *states: str) -> Promised | None:
        """One of the mounts."""
        found = [each for each in self.model.mounts.values() if not states or each.state in states]
        return found[number % len(found)] if found else None

    def of(self, promised: Promised) -> Mount:
        return self.house.mounts.get(promised.id)

    def somebody(self, promised: Promised, number: int) -> Holder:
        """Somebody who holds a claim, or anybody."""
        everybody = [*promised.claims, *promised.claims, *PEOPLE]
        return everybody[number % len(everybody)]

    def has_room(self, key: Key, holder: Holder) -> bool:
        """Whether a mount of it is begun at once if somebody asks."""
        return self.model.joinable(key) is None and self.model.has_turn(Client(holder, key, None))

    # --- people -------------------------------------------------------------------------------------------------

    @rule(request=requests)
    def somebody_mounts(self, request: Request) -> None:
        self.step(self._some_mount([request]))

    @rule(asked=crowds)
    def some_mount_at_once(self, asked: list[Request]) -> None:
        self.step(self._some_mount(asked))

    async def _some_mount(self, asked: list[Request]) -> None:
        clients = [self.asks(*each) for each in asked]
        await self.house.rest()
        self.model.ask(*clients)

    @rule(key=keys, holder=people, step=st.sampled_from(sim.BUILD_STEPS[1:]), fails=st.booleans())
    def a_mount_fails_or_is_given_up(self, key: Key, holder: Holder, step: str, fails: bool) -> None:
        if self.has_room(key, holder) and not self.model.broken:
            self.step(self._a_mount_fails(key, holder, step) if fails else self._somebody_gives_up(key, holder, step))

    async def _a_mount_fails(self, key: Key, holder: Holder, step: str) -> None:
        if not self.has_room(key, holder):  # the moment that has passed since may have changed that
            return
        self.simulator.refuse[step] = errors.NoSpace(FULL)
        self.model.broken = True
        await self._some_mount([Request(key, holder, None, wait=False)])
        self.simulator.refuse.clear()
        self.model.broken = False

    async def _somebody_gives_up(self, key: Key, holder: Holder, step: str) -> None:
        if not self.has_room(key, holder):
            return
        gate = self.simulator.stop_at(step)
        asking = self.asking(key, holder)
        await gate.reached.wait()
        asking.cancel()
        await asyncio.wait([asking])
        gate.open()
        await self.house.rest()
        self.model.ask(Client(holder, key, None))

    @precondition(lambda self: self.model.mounts)
    @rule(which=picks, who=picks, force=st.sampled_from([False, False, True]))
    def somebody_unmounts(self, which: int, who: int, force: bool) -> None:
        self.step(self._somebody_unmounts(which, who, force))

    async def _somebody_unmounts(self, which: int, who: int, force: bool) -> None:
        if (promised := self.pick(which)) is None:
            return
        holder = self.somebody(promised, who)
        unmounting = start(self.house.unmount(self.of(promised), holder.uid, behalf=holder.on_behalf_of, force=force))
        await asyncio.wait([unmounting])
        await self.house.rest()
        refused = self.model.unmount(promised, holder, force=force)
        assert type(unmounting.exception()) is (refused or type(None))

    @precondition(lambda self: self.model.mounts)
    @rule(which=picks, who=picks, coming=people, timeout=timeouts)
    def one_leaves_while_another_comes(self, which: int, who: int, coming: Holder, timeout: float | None) -> None:
        self.step(self._one_leaves_while_another_comes(which, who, coming, timeout))

    async def _one_leaves_while_another_comes(
        self,
        which: int,
        who: int,
        coming: Holder,
        timeout: float | None,  # noqa: ASYNC109 - not of this call
    ) -> None:
        promised = self.pick(which, "mounted")
        if promised is None or self.model.queue:
            return
        leaving = self.somebody(promised, who)
        unmounting = start(self.house.unmount(self.of(promised), leaving.uid, behalf=leaving.on_behalf_of))
        client = self.asks(promised.key, coming, timeout)
        await asyncio.wait([unmounting])
        await self.house.rest()
        refused = self.model.unmount(promised, leaving, force=False)
        assert type(unmounting.exception()) is (refused or type(None))
        self.model.ask(client)

    @precondition(lambda self: self.model.mounts)
    @rule(which=picks, who=picks)
    def somebody_reads(self, which: int, who: int) -> None:
        self.step(self._somebody_reads(which, who))

    async def _somebody_reads(self, which: int, who: int) -> None:
        if (promised := self.pick(which, "mounted")) is None:
            return
        holder = self.somebody(promised, who)
        path = (promised.key.volumes[-1].encode(), b"etc")
        listing = await self.of(promised).list(Actor(*holder), path, limit=10, cursor="")
        assert [entry.name for entry in listing.entries] == ["hostname", "motd"]
        self.model.touch(promised, holder)

    @precondition(lambda self: self.model.mounts)
    @rule(which=picks, who=picks)
    def somebody_lists_much(self, which: int, who: int) -> None:
        self.step(self._somebody_lists_much(which, who))

    async def _somebody_lists_much(self, which: int, who: int) -> None:
        if (promised := self.pick(which, "mounted")) is None:
            return
        holder = self.somebody(promised, who)
        path = (promised.key.volumes[0].encode(), *LONG_PATH)
        listing = self.of(promised).open_listing(Actor(*holder), path, Filters())
        self.model.touch(promised, holder)
        if len(promised.streams) >= self.model.settings.listings:
            with pytest.raises(errors.LimitReached):
                await listing
        else:
            self.model.stream(promised, holder, await listing)

    @precondition(lambda self: any(mount.streams for mount in self.model.mounts.values()))
    @rule(which=picks, whole=st.booleans())
    def somebody_has_seen_enough(self, which: int, whole: bool) -> None:
        self.step(self._somebody_has_seen_enough(which, whole))

    async def _somebody_has_seen_enough(self, which: int, whole: bool) -> None:
        found = [each for each in self.model.mounts.values() if each.streams]
        if not found:
            return
        promised = found[which % len(found)]
        pipe, _ = promised.streams[which % len(promised.streams)]
        following = [task for task in asyncio.all_tasks() if task.get_name() == f"follow a listing of {promised.id}"]
        if whole:
            await asyncio.to_thread(read_to_the_end, pipe)
        self.model.stream_ended(promised, pipe)
        while self.model.pipes:
            os.close(self.model.pipes.pop())
        await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)

    # --- the host -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.mounts)
    @rule(which=picks, volume=st.integers(0, 2), is_open=st.sampled_from([True, True, False]))
    def files_are_opened_or_closed(self, which: int, volume: int, is_open: bool) -> None:
        self.step(self._files_are_opened_or_closed(which, volume, is_open))

    async def _files_are_opened_or_closed(self, which: int, volume: int, is_open: bool) -> None:
        if (promised := self.pick(which, "mounted")) is None:
            return
        name = promised.key.volumes[volume % len(promised.key.volumes)]
        if is_open:
            promised.open_files.add(name)
            self.simulator.busy.add(f"{promised.id}/{name}")
        else:
            promised.open_files.discard(name)
            self.simulator.busy.discard(f"{promised.id}/{name}")

    @precondition(lambda self: self.model.draining)
    @rule(which=picks)
    def a_device_is_let_go(self, which: int) -> None:
        self.step(self._a_device_is_let_go(which))

    async def _a_device_is_let_go(self, which: int) -> None:
        if not self.model.draining:
            return
        draining = self.model.draining.pop(which % len(self.model.draining))
        (found,) = (each for each in self.house.mounts.places.draining if each.mount_id == draining.mount)
        (task,) = (task for task in asyncio.all_tasks() if task.get_name() == f"drain {draining.mount}")
        for device in found.devices:
            assert isinstance(device, sim.Device)
            device.let_go()
        await asyncio.wait([task])

    @precondition(lambda self: self.model.mounts)
    @rule(which=picks, who=picks, what=st.sampled_from(["server", "reader", "driver", "free", "detach"]), whole=picks)
    def something_breaks(self, which: int, who: int, what: str, whole: int) -> None:
        """A part is lost, or one cannot be taken away; or both."""
        if what in sim.CLOSE_STEPS:
            self.step(self._a_mount_cannot_be_taken_away(which, who, what))
        else:
            self.step(self._a_part_is_lost(which, what, whole=whole > 3))

    async def _a_part_is_lost(self, which: int, part: str, *, whole: bool) -> None:
        if (promised := self.pick(which, "mounted")) is None:
            return
        volume = self.of(promised).session.volumes[promised.key.volumes[-1]]
        if not whole:
            self.simulator.refuse["detach"] = OSError(5, "Input/output error")
        if part == "server":
            assert isinstance(volume.device, sim.Device)
            volume.device.attachment.die("it ended")
        elif part == "reader":
            (reader,) = (each for each in self.simulator.readers if each.mount == promised.id and each.stands)
            reader.die("it ended")
        else:
            assert volume.mounted is not None
            volume.mounted.lost.set_result("it ended")
        await self.house.rest()
        self.simulator.refuse.pop("detach", None)
        self.model.fails(promised, "it ended", remains=() if whole else ("workplace", "image", "attachment"))

    async def _a_mount_cannot_be_taken_away(self, which: int, who: int, step: str) -> None:
        promised = self.pick(which, "mounted")
        if promised is None or promised.streams or promised.open_files:
            return
        holder = self.somebody(promised, who)
        if not self.model.closes(promised, holder, force=False):
            return
        error = errors.Busy("the device is still in use") if step == "free" else OSError(5, "Input/output error")
        self.simulator.refuse[step] = error
        with pytest.raises(errors.Busy if step == "free" else errors.Failed):
            await self.house.unmount(self.of(promised), holder.uid, behalf=holder.on_behalf_of)
        await self.house.rest()
        del self.simulator.refuse[step]
        if step == "free":
            self.model.sticks(promised, remains=[what for what in WHOLE if what != "mount"])
        else:
            remains = [what for what in WHOLE if what not in {"mount", "device"}]
            self.model.fails(promised, "a part of the mount could not be taken away", remains=remains)

    async def the_storage_fails(self) -> None:
        self.model.broken = True
        self.simulator.refuse["open_image"] = errors.NoSpace(FULL)

    @precondition(lambda self: self.model.broken)
    @rule()
    def the_storage_is_mended(self) -> None:
        self.step(self._the_storage_is_mended())

    async def _the_storage_is_mended(self) -> None:
        self.model.broken = False
        self.simulator.refuse.clear()

    # --- time and the service -----------------------------------------------------------------------------------

    @rule(seconds=times)
    def time_passes(self, seconds: float) -> None:
        self.step(self.time_goes_on(seconds))

    @rule(seconds=times)
    def time_passes_until_the_sweep_runs(self, seconds: float) -> None:
        self.step(self._the_sweep_runs(seconds))

    async def _the_sweep_runs(self, seconds: float) -> None:
        await self.time_goes_on(seconds)
        ended = await self.house.sweep.run()
        await self.house.rest()
        assert ended == self.model.sweep()

    @precondition(lambda self: self.model.mounts)
    @rule(
        how=st.sampled_from(["", "", "", "mounts", "unmounts", "unmounts by force", "resumes"]),
        orderly=st.booleans(), seconds=st.sampled_from([0, 0, 10, 70, 700, 4000]), storage_fails=st.integers(0, 5),
        key=keys, holder=people, which=picks, who=picks,
        build_step=st.sampled_from(sim.BUILD_STEPS[1:]), step=st.sampled_from(["unmount", "free", "detach"]),
    )  # fmt: skip
    def the_service_ends(
        self, how: str, orderly: bool, seconds: float, storage_fails: int, key: Key, holder: Holder,
        which: int, who: int, build_step: str, step: str,
    ) -> None:  # fmt: skip
        """It is restarted, and every now and then the storage is not there; or it is killed in the middle."""
        if not how:
            self.step(self._the_service_is_restarted(orderly, seconds, storage_fails=storage_fails == 5))
        elif how == "mounts":
            self.step(self._it_is_killed_while_it_mounts(key, holder, build_step))
        elif how == "resumes":
            self.step(self._it_is_killed_while_it_resumes(build_step))
        else:
            self.step(self._it_is_killed_while_it_unmounts(which, who, step, force=how != "unmounts"))

    async def _the_service_is_restarted(self, orderly: bool, seconds: float, *, storage_fails: bool) -> None:
        if orderly:
            await self.house.mounts.stop()
            self.model.stop()
            for _ in range(TURNS):
                await asyncio.sleep(0)
            await self.house.events.flush()
            assert list(self.house.mounts) == []
            assert self.house.clock.next is None
            await self.settle_clients()
        await self.dies()
        self.house.clock.advance(seconds)
        if storage_fails:
            await self.the_storage_fails()
        await self.comes_back()

    async def settle_clients(self) -> None:
        for client, task in self.clients:
            assert task.done(), f"{task} waits for a service that has stopped"
            assert client.told is not None
            assert not isinstance(client.told, str)
            assert type(task.exception()) is client.told
        self.clients.clear()

    async def dies(self) -> None:
        """The daemon ends here; of what it did in good order before nothing may be left to be taken away."""
        await self.house.crash()
        self.clients.clear()
        self.simulator.busy.clear()
        self.house.begun.clear()
        self.model.die()
        await self.streams_are_over()

    async def comes_back(self) -> None:
        self.house.begin()
        assert await self.house.resume.load() == self.model.resume()
        for begun in self.house.begun.values():
            begun.clear()

    async def _it_is_killed_while_it_mounts(self, key: Key, holder: Holder, step: str) -> None:
        if not self.has_room(key, holder) or self.model.broken:
            return
        gate = self.simulator.stop_at(step)
        asking = self.asking(key, holder)
        await gate.reached.wait()
        self.model.ask(Client(holder, key, None))
        await self.dies()
        with contextlib.suppress(asyncio.CancelledError):
            asking.exception()
        gate.open()
        await self.comes_back()

    async def _it_is_killed_while_it_unmounts(self, which: int, who: int, step: str, *, force: bool) -> None:
        promised = self.pick(which, "mounted")
        if promised is None or promised.streams or promised.open_files:
            return
        holder = self.somebody(promised, who)
        if not self.model.closes(promised, holder, force=force):
            return
        if force and step == "unmount":
            step = "abandon"
        gate = self.simulator.stop_at(step)
        start(self.house.unmount(self.of(promised), holder.uid, behalf=holder.on_behalf_of, force=force)).set_name(
            "client who unmounts"
        )
        await gate.reached.wait()
        promised.state = "unmounting"
        await self.dies()
        gate.open()
        await self.comes_back()

    async def _it_is_killed_while_it_resumes(self, step: str) -> None:
        if self.model.broken:
            return
        await self.dies()
        gate = self.simulator.stop_at(step)
        await self.comes_back()
        resumed = [each for each in self.model.mounts.values() if each.state == "mounting"]
        if resumed:
            await gate.reached.wait()
            resumed[0].attempts += 1
            failed = [self.of(each) for each in self.model.mounts.values() if each.state == "failed"]
            if failed:
                await asyncio.wait([mount.building for mount in failed if mount.building is not None])
            await self.dies()
            gate.open()
            await self.comes_back()
        gate.open()

    # --- what is true after each step ---------------------------------------------------------------------------

    @invariant()
    def as_promised(self) -> None:
        if hasattr(self, "house"):
            self.runner.run(self._as_promised())

    async def _as_promised(self) -> None:
        house, model = self.house, self.model
        assert {mount.id for mount in house.mounts} == set(model.mounts)
        assert not any(house.begun.values())
        for promised in model.mounts.values():
            await self.is_as_promised(promised)
        assert house.shown == {mount.id: (mount.session.state, mount.busy) for mount in house.mounts}
        await self.is_written_as_promised()
        wanted = collections.Counter[str]()
        for promised in model.mounts.values():
            wanted.update(promised.standing)
        assert collections.Counter(what.split()[0] for what in self.simulator.standing) == +wanted
        serving = {promised.id for promised in model.mounts.values() if promised.standing["mount"]}
        stuck = {promised.id for promised in model.mounts.values() if promised.remains}
        assert {path.name for path in self.simulator.mounts.iterdir()} - stuck == serving
        self.room_is_as_promised()
        self.gone_are_as_promised()

    async def is_as_promised(self, promised: Promised) -> None:
        mount, now = self.of(promised), self.house.clock.now()
        assert str(mount.session.state) == promised.state
        assert mount.session.error == promised.error or (
            promised.error and mount.session.error.startswith(promised.error)
        )
        assert key_of(mount) == promised.key
        assert mount.session.created_at == promised.created
        lasts = promised.state != "failed"
        assert {
            holder: (claim.since, claim.timeout, lasts and claim.expires)
            for holder, claim in mount.lease.claims.items()
        } == {
            holder: (claim.since, claim.timeout, lasts and claim.expires) for holder, claim in promised.claims.items()
        }
        expires = self.house.clock.unix() + promised.expires(now) - now if lasts else 0.0
        assert mount.expires_at == int(expires)
        assert mount.streams == len(promised.streams)
        assert mount.session.standing == bool(promised.standing)
        assert mount.busy == (promised.met_open_file or bool(promised.streams))
        if promised.state == "mounted":
            assert mount.lease.used == promised.used
            listing = await mount.session.list((promised.key.volumes[-1].encode(), b"etc"), limit=10, cursor="")
            assert [entry.name for entry in listing.entries] == ["hostname", "motd"]

    async def is_written_as_promised(self) -> None:
        written = {row.id: (row, claims) for row, claims in await self.house.store.wished()}
        assert set(written) == set(self.model.mounts)
        for name, (row, claims) in written.items():
            promised = self.model.mounts[name]
            assert (str(row.status), row.resume_attempts) == (promised.state, promised.attempts)
            assert (row.backup_id, row.disk_index, row.journal) == promised.key
            assert self.found(claims) == {
                holder: (claim.timeout, claim.expires) for holder, claim in promised.written.items()
            }

    def room_is_as_promised(self) -> None:
        places, wanted = self.house.mounts.places, self.model.settings
        assert places.taken == self.model.taken <= wanted.most
        assert places.queued == len(self.model.queue)
        assert collections.Counter(each.mount_id for each in places.draining) == collections.Counter(
            each.mount for each in self.model.draining
        )
        if wanted.per_holder:
            assert all(self.model.held_by(holder) <= wanted.per_holder for holder in PEOPLE)

    def gone_are_as_promised(self) -> None:
        for name, (when, reason) in self.model.gone.items():
            with pytest.raises((errors.Expired, errors.MountNotFound)) as told:
                self.house.mounts.get(name)
            if self.house.clock.now() - when <= 86_400:
                assert type(told.value) is errors.Expired
                assert f"): {reason}" in told.value.message
            else:
                assert type(told.value) is errors.MountNotFound


def read_to_the_end(pipe: int) -> None:
    while os.read(pipe, 1 << 16):
        pass


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
@pytest.mark.parametrize("part", range(4))
def test_many_walks(part: int) -> None:
    """Ten thousand steps in all."""
    del part
    _walk(walks=50, steps=50)

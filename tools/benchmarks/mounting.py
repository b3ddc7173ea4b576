"""How long it takes to mount: four volumes, deep chains, many mounts, and what mounts cost in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import material
from .figures import Finding, Growth, Measured, Series, amount, compared, paired, spread
from .stage import Steps, status

if TYPE_CHECKING:
    from .figures import Plan
    from .stage import Running, Stage

_MB = 1_000_000
_FEW = 5  # how often a point of a curve is measured


def mount(stage: Stage, plan: Plan) -> Measured:
    """Four volumes over a chain of three images, against a shell script."""
    repository, partitions = stage.four_volumes
    image = repository.images[-1]
    with stage.daemon(repository) as running:
        (chain,) = running.chains.values()
        searching = paired(lambda: _once(running, chain[-1]), lambda: stage.steps(image, []), plan.pairs)
        told = paired(lambda: _once(running, chain[-1]), lambda: stage.steps(image, partitions), plan.pairs)
    script, knowing = "a shell script", "a script that is told where the partitions are"
    findings = [
        compared("mount, 4 volumes", script, [(ours.mount, bare.mount) for ours, bare in searching], 1.5),
        compared("unmount, 4 volumes", script, [(ours.unmount, bare.unmount) for ours, bare in searching], 1.5),
        compared("mount, 4 volumes", knowing, [(ours.mount, bare.mount) for ours, bare in told]),
    ]
    orientation = [
        amount("mount, 4 volumes", [ours.mount for ours, _ in searching], "s", 10),
        amount("unmount, 4 volumes", [ours.unmount for ours, _ in searching], "s"),
    ]
    return Measured(
        tuple(findings),
        tuple(orientation),
        remark="Mount: both sides make an overlay over a chain of three images (ext4, XFS, btrfs, ext4; all"
        " journals dirty), serve it with qemu-storage-daemon, find the partitions and what is in them"
        " (sfdisk, blkid), put a loop device over each and mount it read-only, journals replayed. The"
        " service besides checks the images, asks polkit, records the mount, jails every helper and starts a"
        " reader; it mounts the volumes at the same time, the script one after the other. Unmount: both take"
        " all of it away and wait until the image server is gone.",
    )


def depth(stage: Stage, plan: Plan) -> Measured:
    """Mount time by the number of images in the chain."""
    depths = (1, 2, 4, 8) if plan.quick else (1, 2, 4, 8, 16, 32, 64, 128)
    repository = material.deep(stage.fresh(), depths[-1])
    ours: list[tuple[int, list[float]]] = []
    bare: list[tuple[int, list[float]]] = []
    with stage.daemon(repository) as running:
        (chain,) = running.chains.values()
        for layers in depths:
            backup, image = chain[layers - 1], repository.images[layers - 1]
            # One file system that fills the disk.
            pairs = paired(
                lambda backup=backup: _once(running, backup),  # type: ignore[misc]
                lambda image=image: stage.steps(image, [(0, (64 << 20) // 512, "ext4")]),  # type: ignore[misc]
                min(plan.pairs, _FEW),
            )
            ours.append((layers, [mine.mount for mine, _ in pairs]))
            bare.append((layers, [theirs.mount for _, theirs in pairs]))
    series = (_series("service", ours), _series("shell script", bare))
    title = "Mount time by depth of the chain"
    return Measured(growths=(Growth("depth", title, "images in the chain", "seconds", series, logarithmic=False),))


def mounts(stage: Stage, plan: Plan) -> Measured:
    """Time of the n-th mount, and memory by the number of mounts."""
    count = 4 if plan.quick else 16
    repository = material.many(stage.fresh(), count)
    times: dict[int, list[float]] = {n: [] for n in range(1, count + 1)}
    memory: dict[int, list[float]] = {n: [] for n in range(count + 1)}
    for _ in range(min(plan.pairs, 3)):
        with stage.daemon(repository, f"[mounts]\nmax = {count}\n") as running:
            memory[0].append(_resident(running) / _MB)
            objects = []
            for number, (backup,) in enumerate(running.chains.values(), start=1):
                answer = running.member.ask("mount", backup=backup)
                objects.append(answer["mount"])
                times[number].append(float(answer["seconds"]))
                memory[number].append(_resident(running) / _MB)
            for made in objects:
                running.member.ask("unmount", mount=made)
    each = [(full - idle) / count for idle, full in zip(memory[0], memory[count], strict=True)]
    findings: list[Finding] = [
        amount("resident memory of the idle daemon", memory[0], "MB", 50),
        amount(f"the same for each mount, reader included ({count} mounts)", each, "MB", 20),
    ]
    curve = (_series("n-th mount", list(times.items())),)
    growing = (_series("daemon and readers", list(memory.items())),)
    return Measured(
        tuple(findings),
        growths=(
            Growth("mounts-time", "Time of the n-th mount", "mounts", "seconds", curve, logarithmic=False),
            Growth("mounts-memory", "Resident memory", "mounts", "MB", growing, logarithmic=False),
        ),
        remark="Memory is VmRSS of the daemon and of all readers (pages that they share count for each of them),"
        " without image servers.",
    )


def _once(running: Running, backup: str) -> Steps:
    answer = running.member.ask("mount", backup=backup)
    return Steps(float(answer["seconds"]), running.member.seconds("unmount", mount=answer["mount"]))


def _resident(running: Running) -> int:
    return sum(status(pid, "VmRSS") for pid in (running.pid, *running.readers()))


def _series(name: str, points: list[tuple[int, list[float]]]) -> Series:
    return Series(name, tuple((x, spread(values)) for x, values in points))

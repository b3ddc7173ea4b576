"""A reader that an attacker has taken over: confined like any other, and then anything but honest.

Started by ``Readers`` in place of the real one. What it does is named by the mount's id, ``ATTACK`` or
``ATTACK=ARGUMENT``; with ``unfiltered.`` before it, the system call filter alone is left out of the confinement, to
see what the other layers hold. It takes the roots as an honest reader does, waits for one request, and attacks.

Outcomes of attacks on the host are told as the names of a listing: an errno, or what was gained.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

from sendense_restored import linux
from sendense_restored.reader import confine, main, protocol, tree

if TYPE_CHECKING:
    from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
HOST_FILES = (b"/etc/shadow", b"/etc/passwd", b"/proc/1/environ", b"/dev/vda", b"/run", b"/usr/bin/python3")
# open_by_handle_at and its kin have no numbers in Python; these are x86_64's.
SYS_OPEN_BY_HANDLE_AT, SYS_PTRACE, SYS_PROCESS_VM_READV = 304, 101, 310
SYS_IO_URING_SETUP, SYS_CLONE3, SYS_MEMFD_CREATE, SYS_BPF, SYS_USERFAULTFD = 425, 435, 319, 321, 323
CLONE_THREAD, SIGCHLD = 0x10000, 17


class Attack:
    """What the attacker has in hand."""

    def __init__(self, sock: socket.socket, argument: str) -> None:
        self.sock = sock
        self.argument = argument
        self.roots: list[int] = []
        self.request: dict[str, Any] = {}
        self.fds: list[int] = []
        """What came with the request."""

    def open(self, directory: int, path: bytes, flags: int = os.O_RDONLY, *, resolve: int = 0) -> int:
        """Open without any rule about how a path resolves."""
        return linux.openat2(directory, path, flags, resolve=resolve)

    def tell(self, *outcomes: str) -> None:
        """Answer the request, which is for a listing, with outcomes."""
        names = sorted(f"{number:02} {outcome}" for number, outcome in enumerate(outcomes))
        entries = [protocol.Entry(name, "file", 0, 0, 0, "", {}) for name in names]
        for frame in protocol.listing_frames(self.request["id"], protocol.Listing(entries, "")):
            protocol.send(self.sock, frame)

    def say(self, message: object, *fds: int) -> None:
        protocol.send(self.sock, message if isinstance(message, bytes) else json.dumps(message).encode(), fds)

    def file(self) -> tuple[int, protocol.FileInfo]:
        """An honest answer to ``open``."""
        return tree.open_file(self.roots[0], (b"file",))


def outcome(act: Callable[[], object]) -> str:
    """What came of an act: an errno's name, or success."""
    try:
        return f"GAINED {act()}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


def call(number: int, *arguments: object) -> int:
    """A system call."""
    # As long: an int beyond the sixth argument would leave half of its place on the stack as it was.
    whole = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = libc.syscall(number, *whole)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


# --- on the host ------------------------------------------------------------------------------------------------


def host_files(attack: Attack) -> None:
    attack.tell(*[outcome(lambda path=path: attack.open(AT_FDCWD, path)) for path in HOST_FILES])  # type: ignore[misc]


def up_and_out(attack: Attack) -> None:
    """``..`` from the volume's root, one step and many; and what stands where it ends."""
    root = attack.roots[0]
    ways = [b"../" * steps + path for steps in (1, 3, 40) for path in (b"etc/shadow", b"../etc/shadow", b"proc")]
    outcomes = [outcome(lambda way=way: attack.open(root, way)) for way in ways]  # type: ignore[misc]
    top = attack.open(root, b"../" * 40 + b".", os.O_RDONLY | os.O_DIRECTORY)
    attack.tell(*outcomes, f"top: {sorted(os.listdir(top))}")  # noqa: PTH208 - a descriptor


def other_mounts(attack: Attack) -> None:
    """A volume of another mount, whose directory is beside ours."""
    root = attack.roots[0]
    ways = [b"../../" + attack.argument.encode() + b"/v/file", b"/" + attack.argument.encode() + b"/v/file"]
    attack.tell(*[outcome(lambda way=way: attack.open(root, way)) for way in ways])  # type: ignore[misc]


def write(attack: Attack) -> None:
    """Into the volume, by all kinds of opening, and beside it."""
    root = attack.roots[0]
    ways = [
        lambda: attack.open(root, b"file", os.O_WRONLY),
        lambda: attack.open(root, b"file", os.O_RDWR),
        lambda: attack.open(root, b"file", os.O_RDONLY | os.O_TRUNC),
        lambda: linux.openat2(root, b"new", os.O_CREAT | os.O_WRONLY, resolve=0, mode=0o600),
        lambda: linux.openat2(AT_FDCWD, b"/new", os.O_CREAT | os.O_WRONLY, resolve=0, mode=0o600),
        lambda: os.unlink("file", dir_fd=root),
        lambda: os.mkdir("directory", dir_fd=root),
        lambda: os.mknod("node", 0o600 | 0o020000, os.makedev(1, 3), dir_fd=root),
        lambda: os.chmod("file", 0o777, dir_fd=root),
    ]
    attack.tell(*map(outcome, ways))


def programs(attack: Attack) -> None:
    """Memory that can hold code, another program in memory, another process."""
    executable = (ctypes.c_void_p(0), ctypes.c_size_t(4096), 7, 0x22, -1, ctypes.c_long(0))
    libc.mmap.restype = ctypes.c_ssize_t

    def map_executable() -> int:
        address: int = libc.mmap(*executable)
        if address == -1:
            raise OSError(ctypes.get_errno(), "refused")
        return address

    attack.tell(
        outcome(map_executable),
        outcome(lambda: call(SYS_MEMFD_CREATE, b"program", 0)),
        outcome(lambda: call(SYS_CLONE3, None, 0)),
        outcome(lambda: call(56, SIGCHLD, None)),  # clone(2) of a process
    )


def kill(attack: Attack) -> None:
    """A signal for the daemon and one for the process in the argument."""
    attack.tell(*[outcome(lambda pid=pid: os.kill(pid, 9)) for pid in (os.getppid(), int(attack.argument))])  # type: ignore[misc]


def ptrace(attack: Attack) -> None:
    attack.tell(outcome(lambda: call(SYS_PTRACE, 16, int(attack.argument), 0, 0)))


def read_memory(attack: Attack) -> None:
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("=QQ", ctypes.addressof(buffer), 8)
    remote = struct.pack("=QQ", 0x400000, 8)
    attack.tell(outcome(lambda: call(SYS_PROCESS_VM_READV, int(attack.argument), local, 1, remote, 1, 0)))


def by_handle(attack: Attack) -> None:
    """The root inode of the file system that our root lies on, by its number: works with our capability alone."""
    handle = struct.pack("=IiIII", 8, 1, 2, 0, 0)  # type 1: inode 2, generation 0
    directory = attack.open(attack.roots[0], b".", os.O_RDONLY | os.O_DIRECTORY)
    attack.tell(outcome(lambda: call(SYS_OPEN_BY_HANDLE_AT, directory, handle, os.O_RDONLY)))


def execute(attack: Attack) -> None:
    attack.tell(outcome(lambda: os.execv("/bin/sh", ["sh"])))


def mount(attack: Attack) -> None:
    attack.tell(outcome(lambda: linux.mount("proc", "/", "proc")))


def namespace(attack: Attack) -> None:
    attack.tell(outcome(lambda: linux.unshare(0x10000000)))  # CLONE_NEWUSER


def root_again(attack: Attack) -> None:
    attack.tell(outcome(lambda: os.setuid(0)))


def io_uring(attack: Attack) -> None:
    attack.tell(outcome(lambda: call(SYS_IO_URING_SETUP, 8, ctypes.create_string_buffer(120))))


def bpf(attack: Attack) -> None:
    attack.tell(outcome(lambda: call(SYS_BPF, 0, ctypes.create_string_buffer(72), 72)))


def userfaultfd(attack: Attack) -> None:
    attack.tell(outcome(lambda: call(SYS_USERFAULTFD, 0)))


def sockets(attack: Attack) -> None:
    """A socket of the family in the argument."""
    attack.tell(outcome(lambda: call(41, int(attack.argument), socket.SOCK_DGRAM, 0)))


def abstract_socket(attack: Attack) -> None:
    """Reach a service of the host over its network, if there is a socket at all."""

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(f"\0{attack.argument}")

    attack.tell(outcome(connect))


# --- on the daemon ----------------------------------------------------------------------------------------------


def foreign_file(attack: Attack) -> None:
    """A regular file, read-only, of another volume of the same mount."""
    descriptor, info = tree.open_file(attack.roots[1], (b"file",))
    attack.say({"id": attack.request["id"], "ok": info}, descriptor)


def root_descriptor(attack: Attack) -> None:
    """The very descriptor whose ``..`` leads out in another process."""
    attack.say({"id": attack.request["id"], "ok": attack.file()[1]}, attack.roots[0])


def directory(attack: Attack) -> None:
    descriptor = attack.open(attack.roots[0], b".", os.O_RDONLY | os.O_DIRECTORY)
    attack.say({"id": attack.request["id"], "ok": attack.file()[1]}, descriptor)


def own_socket(attack: Attack) -> None:
    attack.say({"id": attack.request["id"], "ok": attack.file()[1]}, attack.sock.fileno())


def path_only(attack: Attack) -> None:
    descriptor = attack.open(attack.roots[0], b"file", os.O_PATH)
    attack.say({"id": attack.request["id"], "ok": attack.file()[1]}, descriptor)


def two_files(attack: Attack) -> None:
    descriptor, info = attack.file()
    attack.say({"id": attack.request["id"], "ok": info}, descriptor, descriptor)


def two_hundred_files(attack: Attack) -> None:
    descriptor, info = attack.file()
    attack.say({"id": attack.request["id"], "ok": info}, *[descriptor] * 200)


def unasked_file(attack: Attack) -> None:
    attack.say({"id": 9999, "ok": None}, attack.file()[0])


def garbage(attack: Attack) -> None:
    attack.say(b"\x00\xff" * 1000)


def too_long(attack: Attack) -> None:
    attack.say(b" " * (protocol.MAX_FRAME + 1000))


def flood(attack: Attack) -> None:
    while True:
        attack.say({"id": attack.request["id"] + 1, "ok": None})


def parts_without_end(attack: Attack) -> None:
    for number in range(1_000_000):
        entry = protocol.Entry(f"{number:09}", "file", 0, 0, 0, "", {})
        attack.say({"id": attack.request["id"], "more": True, "ok": {"entries": [entry]}})


def end_without_beginning(attack: Attack) -> None:
    attack.say({"id": attack.request["id"], "ok": [0, 0, False, 0, True]})


def two_beginnings(attack: Attack) -> None:
    for _ in range(2):
        attack.say({"id": attack.request["id"], "more": True, "ok": None})


def beginning_with_a_file(attack: Attack) -> None:
    attack.say({"id": attack.request["id"], "more": True, "ok": None}, attack.file()[0])


def error_after_the_beginning(attack: Attack) -> None:
    attack.say({"id": attack.request["id"], "more": True, "ok": None})
    attack.say({"id": attack.request["id"], "error": "PathNotFound", "message": "it was there"})


def more_than_the_limit(attack: Attack) -> None:
    attack.say({"id": attack.request["id"], "more": True, "ok": None})
    attack.say({"id": attack.request["id"], "ok": [10**6, 0, True, 0, True]})


def lies(attack: Attack) -> None:
    """Whatever it likes into the pipe, and an end that claims to be a whole one."""
    attack.say({"id": attack.request["id"], "more": True, "ok": None})
    os.write(attack.fds[0], b"\x00\xff not JSON at all\n")
    os.close(attack.fds.pop())
    attack.say({"id": attack.request["id"], "ok": [5, 0, False, 2**63, True]})


def die_in_the_middle(attack: Attack) -> None:
    attack.say({"id": attack.request["id"], "more": True, "ok": None})
    os.write(attack.fds[0], b'{"path":"/v/half')
    os._exit(3)


def die(_attack: Attack) -> None:
    os._exit(3)


def hang_up(attack: Attack) -> None:
    attack.sock.close()
    silence(attack)


def silence(_attack: Attack) -> None:
    """No answer, for ever: waits on a lock that nobody will release."""
    import threading  # noqa: PLC0415 - imported by main already

    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


ATTACKS = {
    act.__name__: act
    for act in (
        *(
            host_files,
            up_and_out,
            other_mounts,
            write,
            programs,
            kill,
            ptrace,
            read_memory,
            by_handle,
            execute,
            mount,
        ),
        *(namespace, root_again, io_uring, bpf, userfaultfd, sockets, abstract_socket),
        *(
            foreign_file,
            root_descriptor,
            directory,
            own_socket,
            path_only,
            two_files,
            two_hundred_files,
            unasked_file,
        ),
        *(garbage, too_long, flood, parts_without_end, die, hang_up, silence),
        *(end_without_beginning, two_beginnings, beginning_with_a_file, error_after_the_beginning),
        *(more_than_the_limit, lies, die_in_the_middle),
    )
}


def run(arguments: list[str]) -> None:
    cell, sock = main.prepare(arguments)
    name, _, argument = arguments[-1].partition("=")
    attack = Attack(sock, argument)
    act = ATTACKS[name.removeprefix("unfiltered.")]
    if name.startswith("unfiltered."):
        for step in confine.STEPS:
            if step is not confine.filter_system_calls:
                step(cell)
    else:
        confine.confine(cell)
    attack.say({"id": 0, "ok": None})
    while frame := protocol.receive(sock, most_fds=protocol.MAX_FDS):
        message, fds = frame
        if message["op"] == "give":
            attack.roots = fds
            attack.say({"id": message["id"], "ok": dict.fromkeys(message["volumes"], (1, 1))})
        else:
            attack.request, attack.fds = message, fds
            act(attack)


if __name__ == "__main__":
    run(sys.argv[1:])

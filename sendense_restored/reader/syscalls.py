"""The system calls that a reader may make, once it serves.

Everything that is not on the list answers EPERM: libraries try calls that they can do without, and a new version of
one should not end in a dead reader. The calls that an attack needs - run a program, look into or signal another
process, open by handle past the root, mount, talk to the network or load something into the kernel - kill the process
instead. No honest reader makes them, so the first attempt is proof enough; the daemon sees SIGSYS, and whoever is in
there gets no second try.
"""

from __future__ import annotations

import errno
import fcntl
import mmap

from seccomp import ALLOW, EQ, ERRNO, KILL_PROCESS, MASKED_EQ, Arg, SyscallFilter

_CLONE_VM = 0x00000100
_CLONE_THREAD = 0x00010000

_ALLOWED = (
    # guest files: open below a root, look, list; nothing that writes, creates or changes
    *(
        "openat2",
        "close",
        "fstat",
        "newfstatat",
        "statx",
        "readlinkat",
        "getdents64",
        "fstatfs",
        "flistxattr",
        "fgetxattr",
        "lseek",
    ),
    # the daemon, and the pipes of streams: writing reaches pipes, stderr and what wakes a thread of ours alone, for
    # the files that it has are open for reading
    *("recvmsg", "sendmsg", "write", "poll", "ppoll", "eventfd2"),
    # memory, the executable kind excepted (below)
    *("brk", "munmap", "mremap", "madvise"),
    # threads and their end
    *("futex", "set_robust_list", "rseq", "gettid", "getpid", "getppid", "sched_yield", "sched_getaffinity"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group"),
    # the time, where the vDSO cannot tell it, and random seeds of the C library
    *("clock_gettime", "gettimeofday", "clock_nanosleep", "getrandom"),
)

_FCNTL = (fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)

_DEADLY = (
    *("execve", "execveat", "fork", "vfork"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
    *("kill", "tkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
    *("open_by_handle_at", "name_to_handle_at"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "move_mount", "open_tree", "mount_setattr"),
    *("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4"),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("keyctl", "add_key", "request_key"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "iopl", "ioperm"),
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "capset"),
)


def make_filter() -> SyscallFilter:
    """The filter, ready to ``load``; it holds for the calling thread and for those that it starts later."""
    rules = SyscallFilter(defaction=ERRNO(errno.EPERM))
    for name in _ALLOWED:
        rules.add_rule(ALLOW, name)
    for command in _FCNTL:
        rules.add_rule(ALLOW, "fcntl", Arg(1, EQ, command))
    for name in ("mmap", "mprotect"):
        rules.add_rule(ALLOW, name, Arg(2, MASKED_EQ, mmap.PROT_EXEC, 0))
    # Threads only. A filter cannot see clone3's flags, which lie in memory; told that the kernel has none, the C
    # library falls back to clone.
    threads = _CLONE_VM | _CLONE_THREAD
    rules.add_rule(ALLOW, "clone", Arg(0, MASKED_EQ, threads, threads))
    rules.add_rule(ERRNO(errno.ENOSYS), "clone3")
    for name in _DEADLY:
        rules.add_rule(KILL_PROCESS, name)
    return rules

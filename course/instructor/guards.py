"""What a submission's process may not do, once `confine` was called in it.

  - Landlock (Linux 5.13 and newer): the kernel refuses files outside of its tree and of Python's
    own, for reading and for writing; from Linux 6.7 on TCP, from 6.12 on signals.
  - seccomp (on x86-64): the kernel refuses processes, sockets, signals, and what reaches into other
    processes.
  - As root, where the user `nobody` can read Python's own files, it becomes `nobody`.
  - A Python audit hook refuses the same files and calls with a clear message. A submission can get
    around the hook, not around the others.

A process that uses a GPU has no seccomp and no limit of memory: compiling a kernel starts processes
and loads libraries.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
from functools import cache
from pathlib import Path

MEMORY = 8 * 2**30  # bytes of address space that the process may add
PROCESSES = 128  # of the user `nobody`, threads included, where no seccomp refuses new ones
NOBODY = 65534
# Numbers of Linux: Landlock's system calls, and options of prctl.
CREATE_RULESET = 444
ADD_RULE = 445
RESTRICT_SELF = 446
CAPSET = {"x86_64": 126}.get(platform.machine(), 91)
CAPABILITY_VERSION = 0x20080522
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38

# What the audit hook refuses by name.
EVENTS = (
    "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "subprocess.Popen", "pty.spawn",
    "os.kill", "os.killpg", "signal.pthread_kill", "socket.__new__", "socket.connect", "socket.bind", "ctypes.dlopen",
    "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.setxattr",
    "os.removexattr", "os.utime", "resource.prlimit",
)  # fmt: skip

# What seccomp refuses: system calls of x86-64.
CALLS = {
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424,
    "socket": 41, "socketpair": 53, "io_uring_setup": 425, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
    "truncate": 76, "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "lchown": 94, "fchownat": 260, "setxattr": 188,
    "pidfd_getfd": 438, "unshare": 272, "setns": 308, "mount": 165, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "sched_setaffinity": 203, "sched_setscheduler": 144, "sched_setparam": 142, "setpriority": 141, "ioprio_set": 251,
    "sched_setattr": 314, "fchmodat2": 452, "utimensat": 280, "utime": 132, "utimes": 235, "futimesat": 261, "fchown": 93,
    "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "setxattrat": 463,
    "removexattrat": 466, "keyctl": 250, "add_key": 248, "request_key": 249, "reboot": 169, "chroot": 161, "sethostname": 170,
    "setdomainname": 171, "syslog": 103, "swapon": 167, "swapoff": 168, "init_module": 175, "finit_module": 313,
    "settimeofday": 164, "clock_settime": 227, "kexec_load": 246, "kexec_file_load": 320, "shmat": 30, "shmctl": 31,
    "semop": 65, "semctl": 66, "msgsnd": 69, "msgrcv": 70, "msgctl": 71,
}  # fmt: skip
CLONE, CLONE3, PRLIMIT, FCNTL, PRCTL = 56, 435, 302, 72, 157
CLONE_THREAD = 0x10000
SIGNAL_OPTIONS = (8, 10, 15)  # of fcntl: who gets which signal when a pipe is ready


# ---- files ------------------------------------------------------------------------------------


def existing(*places):
    return {os.path.realpath(place) for place in places if os.path.exists(place)}


def python_places():
    """What Python and its libraries read."""
    places = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/sys"]
    places += ["/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]
    places += [path for path in sys.path if os.path.isdir(path)]
    return existing(*places)


def own_places():
    """Of /proc, what is about this process or the machine."""
    names = ("self", "cpuinfo", "meminfo", "stat", "sys", "filesystems", "version")
    return existing(*(f"/proc/{name}" for name in names))


def landlock_version():
    """0 or less: the kernel has no Landlock."""
    return ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)


def landlock(readable, writable):
    """Let the kernel refuse all but reading in `readable`, and anything in `writable`.

    Raises OSError if it does not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = landlock_version()
    read = 0b1101  # execute, read a file, read a directory
    everything = 2**13 - 1  # the rights of the first version: all that writes, removes or makes
    everything |= (version >= 2) << 13 | (version >= 3) << 14  # moving and truncating
    network = 0b11 if version >= 4 else 0  # TCP: bind, connect
    scoped = 0b11 if version >= 6 else 0  # abstract sockets, signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = struct.pack("QQQ", everything, network, scoped)
    rules = libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(size), 0)
    for place in {*readable, *writable}:
        at = os.open(place, os.O_PATH | os.O_CLOEXEC)
        allowed = everything if place in writable else read
        if not os.path.isdir(place):
            allowed &= 0b111 | 1 << 14
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed & everything, at), 0)
        os.close(at)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "Landlock does not take the rules")
    os.close(rules)


# ---- system calls -----------------------------------------------------------------------------


def has_seccomp():
    return platform.machine() == "x86_64"


def case(call: int, argument: int, test: int, numbers, match: int, other: int):
    """The instructions for one system call: answer `match` if its argument passes a test."""
    load, equal, answer = 0x20, 0x15, 0x06
    *first, last = numbers
    left = range(len(first), 0, -1)  # tests that a match jumps over
    tests = [(test, jump, 0, number) for jump, number in zip(left, first)]
    tests += [(test, 0, 1, last), (answer, 0, 0, match), (answer, 0, 0, other)]
    return [(equal, 0, 1 + len(tests), call), (load, 0, 0, argument), *tests]


def seccomp():
    """Let the kernel refuse CALLS, new processes, and limits of other processes.

    A program of the packet filter: a list of (code, jump if true, jump if false, number). Raises
    OSError if the kernel does not take it.
    """
    load, equal, at_least, has_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    refused, missing, allowed = 0x00050001, 0x00050026, 0x7FFF0000  # EPERM, ENOSYS, go on
    number, architecture, first, second = 0, 4, 16, 24  # offsets of what a filter sees
    program = [
        (load, 0, 0, architecture),
        (equal, 1, 0, 0xC000003E),  # x86-64
        (answer, 0, 0, refused),
        (load, 0, 0, number),
        (at_least, 0, 1, 0x40000000),  # the same calls under other numbers, x32
        (answer, 0, 0, refused),
        (equal, 0, 1, CLONE3),  # then libc uses clone
        (answer, 0, 0, missing),
    ]
    for call in CALLS.values():
        program += [(equal, 0, 1, call), (answer, 0, 0, refused)]
    program += case(PRLIMIT, first, equal, [0], allowed, refused)  # 0: this process
    program += case(CLONE, first, has_bit, [CLONE_THREAD], allowed, refused)
    program += case(PRCTL, first, equal, [PR_SET_PDEATHSIG], refused, allowed)
    program += case(FCNTL, second, equal, SIGNAL_OPTIONS, refused, allowed)
    program += [(answer, 0, 0, allowed)]
    code = b"".join(struct.pack("HBBI", kind, yes, no, k) for kind, yes, no, k in program)
    block = ctypes.create_string_buffer(code)
    pointer = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(block))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(pointer), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp does not take the filter")


# ---- the hook, the user, the limits -----------------------------------------------------------


def is_inside(path: str, places):
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def refuse(tree: Path, scratch: str, events):
    """Install the audit hook. `events`: what it always refuses."""
    own = python_places() | own_places() | {str(tree), scratch, f"/proc/{os.getpid()}"}
    writable = ("/proc/self", f"/proc/{os.getpid()}", "/dev/null", scratch)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments):
        if event in events:
            raise PermissionError(f"{event} is not allowed while a submission is graded")
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            is_free = is_inside(path, writable) or path.startswith("/memfd:")
            flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
            if not is_free and (flags & writing or not is_inside(path, own)):
                raise PermissionError(f"{path} is not open to a submission while it is graded")

    sys.addaudithook(hook)


@cache  # before the tree of a submission is among the places
def becomes_nobody():
    """We are root, and `nobody` can read Python's own files and the temporary directory."""
    places = [Path(os.__file__).resolve(), *map(Path, python_places())]
    places.append(Path(tempfile.gettempdir()).resolve() / "tree")
    parents = {parent for place in places for parent in place.parents}
    return os.geteuid() == 0 and all(parent.stat().st_mode & 1 for parent in parents)


def drop_privileges():
    """Become `nobody`, if that is possible."""
    if becomes_nobody():
        if not has_seccomp():
            resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES,) * 2)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_capabilities():
    """Root without its powers: it may no longer reboot, mount or change root."""
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(CAPSET, header, bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities stay")


def limit(seconds: float, gpu: bool):
    """Of the process: time, memory, files."""
    if not gpu:  # CUDA maps far more than it uses
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 5,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28 if gpu else 0,) * 2)


def names():
    """The guards that hold on this machine."""
    found = ["Landlock"] * (landlock_version() >= 1) + ["seccomp"] * has_seccomp()
    return [*found, *["user nobody"] * becomes_nobody(), "audit hook"]


def confine(tree: Path, scratch: str, seconds: float, gpu: bool):
    """From here on this process may read `tree`, write `scratch`, and compute."""
    devices = [str(path) for path in Path("/dev").glob("nvidia*") if gpu and not path.is_dir()]
    limit(seconds, gpu)
    drop_privileges()
    if not gpu:
        drop_capabilities()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # die with the nursery
    if landlock_version() >= 1:
        readable = {*python_places(), *own_places(), str(tree), *["/proc"] * gpu}
        landlock(readable, {scratch, "/dev/null", *devices})
    if has_seccomp() and not gpu:
        seccomp()
    refuse(tree, scratch, () if gpu else EVENTS)

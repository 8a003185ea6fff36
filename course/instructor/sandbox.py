"""Processes that run a submission's code, and nothing else: the judge never imports it.

    with Nursery() as nursery:
        with nursery.worker(tree, seconds=60) as student:
            student.loss("forward_kl", {"top_k": 4}, s, t, b)

The nursery is a process that has imported torch and transformers, but no test and no solution. It
forks a worker for every test. The worker imports tests/probes.py of `tree` and, through it, the
submission. It answers calls over a socket, in tensors and plain values. The judge computes what is
right by itself. So whatever a submission does to its own process, to pytest or to its output, only
right answers score.

A worker cannot read the hidden tests or the solutions, start processes, write files or outlive its
test. Three things see to it, as far as the machine has them:

  - Landlock (Linux 5.13 and newer): the kernel refuses files outside of its tree and of Python's
    own, for reading and for writing. From Linux 6.12 on it refuses signals, too.
  - As root, where the user `nobody` can read Python's own files, it becomes `nobody`.
  - A Python audit hook refuses processes, sockets, signals, foreign libraries and the same files.
    Native code could get around the hook, not around the other two.

A test that needs a GPU may start processes and load libraries, because compiling a kernel does.

`Nursery.guards` names those that hold. With the hook alone, grade strangers' code in a container.
"""

import ctypes
import io
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = 8 * 2**30  # bytes of address space that a worker may add
PROCESSES = 128  # of the user `nobody`, threads included
LARGEST = 256 * 2**20  # bytes of one answer
NOBODY = 65534
# Numbers of Linux: Landlock's system calls, and options of prctl.
CREATE_RULESET = 444
ADD_RULE = 445
RESTRICT_SELF = 446
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SETTINGS = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TQDM_DISABLE")


# ---- messages ---------------------------------------------------------------------------------


def send(connection: socket.socket, value):
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    data = file.getbuffer()
    connection.sendall(struct.pack("q", len(data)) + data)


def receive_bytes(connection: socket.socket, count: int, deadline: float | None):
    parts = []
    while count:
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([connection], [], [], left)[0]:
                raise TimeoutError
        part = connection.recv(min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def receive(connection: socket.socket, deadline: float | None = None):
    """The next message: tensors and plain values only, so that reading it runs no code."""
    import torch

    size = struct.unpack("q", receive_bytes(connection, 8, deadline))[0]
    if not 0 <= size <= LARGEST:
        raise EOFError
    return torch.load(io.BytesIO(receive_bytes(connection, size, deadline)), weights_only=True)


# ---- the worker -------------------------------------------------------------------------------

REFUSED = (
    "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "subprocess.Popen", "pty.spawn",
    "os.kill", "os.killpg", "signal.pthread_kill", "socket.__new__", "socket.connect", "socket.bind", "ctypes.dlopen",
    "os.link", "os.symlink", "os.chmod", "os.chown", "os.setxattr", "os.removexattr",
)  # fmt: skip


def may_read(path: str, allowed):
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in allowed)


def python_places():
    """Directories that Python and its libraries read."""
    places = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc", "/dev", "/sys"}
    places |= {path for path in sys.path if os.path.isdir(path)}
    return {os.path.realpath(place) for place in places if os.path.exists(place)}


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
    scoped = 0b11 if version >= 6 else 0  # abstract sockets, signals
    size = 24 if version >= 6 else 8
    ruleset = struct.pack("QQQ", everything, 0, scoped)
    rules = libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(size), 0)
    for place in {*readable, *writable}:
        at = os.open(place, os.O_PATH | os.O_CLOEXEC)
        allowed = everything if place in writable else read
        if not os.path.isdir(place):
            allowed &= 0b111
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, at), 0)
        os.close(at)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "Landlock does not take the rules")
    os.close(rules)


def refuse(tree: Path, scratch: str, events):
    """Install the audit hook. It cannot be taken away again. `events`: what it always refuses."""
    own = python_places() | {str(tree), scratch}
    own |= {"/proc/self", f"/proc/{os.getpid()}", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments):
        if event in events:
            raise PermissionError(f"{event} is not allowed while a submission is graded")
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            free = ("/proc/self/", f"/proc/{os.getpid()}/", "/memfd:", "/dev/", scratch + "/")
            is_own = path.startswith(free) or path == scratch
            flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
            if not may_read(path, own) and not is_own or flags & writing and not is_own:
                raise PermissionError(f"{path} is not open to a submission while it is graded")

    sys.addaudithook(hook)


def can_become_nobody():
    """We are root, and `nobody` can read Python's own files."""
    places = [Path(os.__file__).resolve(), *map(Path, python_places())]
    parents = {parent for place in places for parent in place.parents}
    return os.geteuid() == 0 and all(parent.stat().st_mode & 1 for parent in parents)


def drop_privileges():
    """Become `nobody`, if that is possible."""
    if can_become_nobody():
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES,) * 2)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def serve(connection: socket.socket, tree: Path, scratch: str, seconds: float, gpu: bool):
    """Be a worker: answer calls of functions of probes.py until the judge is gone."""
    import torch

    devices = [str(path) for path in Path("/dev").glob("nvidia*") if gpu and not path.is_dir()]
    os.setsid()
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, 4096)
    if not gpu:  # CUDA maps far more than it uses
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 5,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28,) * 2)
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["HOME"] = scratch
    os.environ["TRITON_CACHE_DIR"] = scratch
    drop_privileges()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # die with the nursery
    if landlock_version() >= 1:
        landlock({*python_places(), str(tree), "/proc"}, {scratch, "/dev/null", *devices})
    refuse(tree, scratch, () if gpu else REFUSED)
    import probes

    while True:
        name, arguments, keywords = receive(connection)
        try:
            answer = "value", getattr(probes, name)(*arguments, **keywords)
        except BaseException as error:
            answer = "error", describe(error, tree)
        try:
            send(connection, answer)
        except Exception as error:
            send(connection, ("error", f"{name} returned what cannot be sent: {error}"))


def describe(error: BaseException, tree: Path):
    """What the submission raised, and where in its files."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, NotImplementedError):
        return f"not written yet ({text})"
    place, at = "", error.__traceback__
    while at:
        file = Path(at.tb_frame.f_code.co_filename)
        is_theirs = file.is_relative_to(tree) and not file.is_relative_to(tree / "tests")
        if is_theirs and not isinstance(error, SyntaxError):  # which says its place itself
            place = f" ({file.relative_to(tree)}, line {at.tb_lineno})"
        at = at.tb_next
    return f"{type(error).__name__}: {text}{place}"


# ---- the nursery ------------------------------------------------------------------------------


def children_of(pid: int):
    """All processes below `pid`."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                stat = Path(entry.path, "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def sweep():
    """Kill everything that was started from here, until nothing is left."""
    while below := children_of(os.getpid()):
        for pid in below:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def nursery(control: socket.socket):
    """The process that workers are forked from. Orphans become its children, and it sweeps them."""
    import torch  # noqa: F401
    import transformers.modeling_layers  # noqa: F401
    import triton  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers import Gemma3ForCausalLM, GenerationConfig, LlamaForCausalLM  # noqa: F401
    from transformers import Qwen3ForCausalLM  # noqa: F401
    from torch import distributed, multiprocessing  # noqa: F401
    from torch.distributed import fsdp  # noqa: F401
    from torch.distributed.checkpoint import state_dict  # noqa: F401

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    torch.set_num_threads(1)
    guards = ["audit hook"] + ["user nobody"] * can_become_nobody()
    if landlock_version() >= 1:
        guards.insert(0, "Landlock")
    control.send(f"ready {', '.join(guards)}".encode())
    while True:
        data, fds, *_ = socket.recv_fds(control, 65536, 1)
        if not data:  # the judge is gone
            sweep()
            return
        if not fds:
            sweep()
            control.send(b"swept")
            continue
        request = json.loads(data)
        connection = socket.socket(fileno=fds[0])
        if os.fork() == 0:
            try:
                request["tree"] = Path(request["tree"])
                serve(connection, **request)
            finally:
                os._exit(1)
        connection.close()
        control.send(b"forked")


class Worker:
    """A worker as the judge sees it: its methods are the functions of probes.py."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            from grading import RemoteError, Timeout

            try:
                send(self.connection, (name, arguments, keywords))
                kind, value = receive(self.connection, self.deadline)
            except TimeoutError:
                raise Timeout(f"not done after {self.seconds:.0f} s") from None
            except (EOFError, OSError):
                raise RemoteError("the process ended before it answered") from None
            except Exception as error:  # no message that we know
                raise RemoteError(f"the answer cannot be read: {type(error).__name__}") from None
            if kind == "error":
                raise RemoteError(str(value))
            return value

        return call


class Nursery:
    """Starts workers. Use it in a `with`. `interprets`: Triton is in its interpreter."""

    def __init__(self, interprets: bool = True):
        self.interprets = interprets
        self.other = None

    def compiling(self):
        """Another nursery, in which Triton compiles. It starts when it is first wanted."""
        if self.other is None:
            self.other = Nursery(interprets=False).__enter__()
        return self.other

    def __enter__(self):
        self.is_open = True
        self.start()
        return self

    def __exit__(self, *_):
        if self.other is not None:
            self.other.__exit__()
        self.is_open = False
        self.control.close()
        self.process.kill()
        self.process.wait()

    def start(self):
        self.control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: "1" for name in SETTINGS}
        environment["TRITON_INTERPRET"] = str(int(self.interprets))
        kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
        environment |= {name: os.environ[name] for name in kept if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(its.fileno())],  # -P: not its own directory
            pass_fds=[its.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        its.close()
        word, _, self.guards = self.control.recv(256).decode().partition(" ")
        if word != "ready":
            raise RuntimeError("the nursery did not start: is the environment installed?")

    @contextmanager
    def worker(self, tree: Path, seconds: float, gpu: bool = False):
        """A worker on a clean tree. Whatever it started is dead when the `with` ends."""
        ours, its = socket.socketpair()
        scratch = os.path.realpath(tempfile.mkdtemp())
        os.chmod(scratch, 0o777)
        request = {"tree": str(tree), "scratch": scratch, "seconds": seconds, "gpu": gpu}
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], [its.fileno()])
            answer = self.control.recv(16)
        except OSError:
            answer = b""
        its.close()
        try:
            if not answer:
                raise RuntimeError("the nursery died")
            yield Worker(ours, seconds)
        finally:
            ours.close()
            try:
                self.control.send(b"sweep")
                if not self.control.recv(16):
                    self.restart()
            except OSError:
                self.restart()
            shutil.rmtree(scratch, ignore_errors=True)

    def restart(self):
        """The nursery is gone: a submission has killed it. Its worker has died with it."""
        if not self.is_open:
            raise RuntimeError("the grader was stopped")
        self.process.kill()
        self.process.wait()
        self.control.close()
        self.start()


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))

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
test: guards.py. `Nursery.guards` names the guards that hold on this machine.
"""

import ctypes
import io
import json
import os
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

if __name__ == "__main__":  # started with -P, so that no submission's file is taken for a library
    sys.path.insert(0, str(Path(__file__).resolve().parent))
from guards import confine, names  # noqa: E402

if __name__ == "__main__":
    del sys.path[0]

LARGEST = 128 * 2**20  # bytes of one answer
LONGEST = 500  # characters of a message
PR_SET_CHILD_SUBREAPER = 36
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


def serve(connection: socket.socket, tree: Path, scratch: str, seconds: float, gpu: bool):
    """Be a worker: answer calls of functions of probes.py until the judge is gone."""
    import torch

    os.setsid()
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, 4096)
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["HOME"] = scratch
    os.environ["TRITON_CACHE_DIR"] = scratch
    confine(tree, scratch, seconds, gpu)
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
    text = " ".join(str(error).split())[:LONGEST]
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
    control.send(check_guards().encode())
    while True:
        try:
            data, fds, *_ = socket.recv_fds(control, 65536, 1)
        except ConnectionError:
            data = b""
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


def check_guards():
    """ "ready" and the guards, once a child has come under them; or why it could not."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o777)
        if os.fork() == 0:
            try:
                confine(Path(scratch), os.path.realpath(scratch), 60.0, gpu=False)
                os.write(writer, b"ready")
            except BaseException as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        answer = os.read(reader, 4096).decode()
        os.close(reader)
        os.wait()
    return f"ready {', '.join(names())}" if answer == "ready" else f"no {answer}"


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
                self.connection.settimeout(max(0.01, self.deadline - time.monotonic()))
                send(self.connection, (name, arguments, keywords))
                kind, value = receive(self.connection, self.deadline)
            except TimeoutError:
                raise Timeout(f"not done after {self.seconds:.0f} s") from None
            except (EOFError, OSError):
                raise RemoteError("the process ended before it answered") from None
            except Exception as error:  # no message that we know
                raise RemoteError(f"the answer cannot be read: {type(error).__name__}") from None
            if kind == "error":
                said = value if isinstance(value, str) else "it cannot say why"
                raise RemoteError(said[:LONGEST])
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
        for pid in children_of(self.process.pid):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.control.close()
        self.process.kill()
        self.process.wait()

    def start(self):
        self.control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: "1" for name in SETTINGS}
        environment["TRITON_INTERPRET"] = str(int(self.interprets))
        kept = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
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
        word, _, self.guards = self.control.recv(4096).decode().partition(" ")
        if word == "no":
            raise RuntimeError(f"submissions cannot be guarded on this machine: {self.guards}")
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
            with suppress(OSError):
                self.control.send(b"sweep")
                self.control.recv(16)
            shutil.rmtree(scratch, ignore_errors=True)

    def is_dead(self):
        return self.process.poll() is not None or self.other is not None and self.other.is_dead()

    def revive(self):
        """Begin anew, after something was killed."""
        if self.other is not None:
            self.other.revive()
        if self.is_open:
            self.process.kill()
            self.process.wait()
            self.control.close()
            self.start()


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))

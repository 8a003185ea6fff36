"""Processes that run a submission's code, and nothing else: the judge never imports it.

    with Sandbox() as sandbox:
        ...  # the submission's files go to sandbox.tree
        with sandbox.worker(seconds=60) as student:
            student.loss_and_gradient("forward_kl", {"top_k": 4}, s, t, b)

A sandbox is for one submission. In it runs a process that has imported torch and transformers, the
nursery. It forks a worker for every test. The worker imports tests/probes.py of the tree and,
through it, the submission. It answers calls over a socket, in tensors and plain values. The judge
computes what is right by itself. So whatever a submission does to its own process, to pytest or to
its output, only right answers score.

`bubblewrap` is the command line around the nursery: what the submission sees of this machine.
"""

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

LARGEST = 128 * 2**20  # bytes of one answer
LONGEST = 500  # characters of a message
MEMORY = 8 * 2**30  # bytes of address space that a worker may add
PROCESSES = 256  # threads included
STARTING = 300.0  # seconds
SETTINGS = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "TQDM_DISABLE")
KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
# Besides Python's own files: what it, its libraries and a compiler read.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/sys")
SYSTEM += ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")


class SandboxError(Exception):
    """There is no sandbox. The message says why."""


# ---- bubblewrap -------------------------------------------------------------------------------


def bubblewrap(readable, gpu: bool = False):
    """The command line before a command that runs a submission's code.

    The command sees `readable` (paths), Python, the system's libraries, and nothing else of ours.
    """
    command = ["bwrap"]
    command += ["--unshare-all"]  # sees no process of ours, has no network
    command += ["--die-with-parent"]  # also if the judge is killed; takes all it started along
    command += ["--new-session"]  # cannot type into our terminal
    command += ["--cap-drop", "ALL"]  # as root, too
    command += ["--proc", "/proc"]  # of its own processes
    command += ["--remount-ro", "/proc"]  # else root could set the kernel's options there
    command += ["--dev", "/dev"]  # null, zero, random and the like
    command += ["--tmpfs", "/tmp"]  # empty; the only place it needs to write to
    # All else is what is listed here, read-only. A path that this machine lacks is left out.
    for path in (*SYSTEM, sys.base_prefix, sys.prefix, *readable):
        command += ["--ro-bind-try", str(path), str(path)]
    for path in (*Path("/dev").glob("nvidia*"), Path("/dev/dxg")) if gpu else ():
        command += ["--dev-bind-try", str(path), str(path)]
    return command


def check_bubblewrap():
    """Raise SandboxError if it does not work here."""
    if shutil.which("bwrap") is None:
        raise SandboxError(
            "bubblewrap is missing, which keeps submissions away from your files. "
            "Install it: apt-get install bubblewrap. "
            "Or give --unsandboxed, if you trust the submissions"
        )
    result = subprocess.run([*bubblewrap([]), "true"], capture_output=True, text=True)
    if result.returncode:
        raise SandboxError(
            f"bubblewrap is here, and the system refuses it: {result.stderr.strip()}. "
            "It needs user namespaces, which many containers forbid (docs/teaching.md). "
            "Or give --unsandboxed, if you trust the submissions"
        )


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


def serve(connection: socket.socket, tree: Path, gpu: bool, sandboxed: bool):
    """Be a worker: answer calls of functions of probes.py until the judge is gone."""
    os.setpgid(0, 0)
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, 4096)
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    limit(gpu, sandboxed)
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


def limit(gpu: bool, sandboxed: bool):
    """What the process may use."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sandboxed:  # else all of the user's processes would count; root's are never counted
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES,) * 2)
    if not gpu:  # CUDA maps far more than it uses
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)


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


def nursery(control: socket.socket):
    """The process that workers are forked from, one at a time."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # not the judge's
    import torch
    import transformers.modeling_layers  # noqa: F401
    import triton  # noqa: F401
    from torch import distributed, multiprocessing  # noqa: F401
    from torch.distributed import fsdp  # noqa: F401
    from torch.distributed.checkpoint import state_dict  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers import Gemma3ForCausalLM, GenerationConfig, LlamaForCausalLM  # noqa: F401
    from transformers import Qwen3ForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    control.send(b"ready")
    worker = None
    while True:
        try:
            data, fds, *_ = socket.recv_fds(control, 65536, 1)
        except ConnectionError:
            data = b""
        if worker is not None:
            for kill in (os.kill, os.killpg):  # with what it started
                with suppress(OSError):
                    kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            worker = None
        if not data:  # the judge is gone
            return
        if fds:
            connection = socket.socket(fileno=fds[0])
            worker = os.fork()
            if worker == 0:
                try:
                    request = json.loads(data)
                    serve(connection, Path(request.pop("tree")), **request)
                finally:
                    os._exit(1)
            connection.close()


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


class Sandbox:
    """Starts workers. Use it in a `with`. Without `sandboxed` they run as you, with your files."""

    def __init__(self, sandboxed: bool = True):
        self.sandboxed = sandboxed
        self.nurseries = {}  # Triton is in its interpreter -> (process, control socket)

    def __enter__(self):
        self.directory = tempfile.TemporaryDirectory()
        self.place = Path(self.directory.name).resolve()
        self.tree = self.place / "tree"
        self.start(interprets=True)
        return self

    def __exit__(self, *_):
        for interprets in list(self.nurseries):
            self.stop(interprets)
        self.directory.cleanup()

    def start(self, interprets: bool):
        control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P: no submission's file is taken for a library
        command = [sys.executable, "-P", __file__, str(its.fileno())]
        scratch = tempfile.mkdtemp(dir=self.place)
        if self.sandboxed:
            scratch = "/tmp"
            command = [*bubblewrap([self.place, __file__], gpu=not interprets), *command]
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= dict.fromkeys(SETTINGS, "1") | {"TRITON_INTERPRET": str(int(interprets))}
        environment |= dict.fromkeys(("HOME", "TMPDIR", "TRITON_CACHE_DIR"), scratch)
        process = subprocess.Popen(
            command,
            pass_fds=[its.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # a Ctrl-C is the judge's
        )
        its.close()
        self.nurseries[interprets] = process, control
        control.settimeout(STARTING)
        with suppress(OSError):
            if control.recv(16) == b"ready":
                return
        process.kill()
        said = process.communicate()[1].decode(errors="replace").strip().splitlines()
        raise SandboxError(f"the sandbox does not start: {said[-1] if said else 'nothing is said'}")

    def stop(self, interprets: bool):
        process, control = self.nurseries.pop(interprets)
        control.close()  # a nursery that is well kills its worker and ends
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()

    @contextmanager
    def worker(self, seconds: float, gpu: bool = False, interprets: bool = True):
        """A worker on the tree. It is killed when the `with` ends."""
        if interprets not in self.nurseries:
            self.start(interprets)
        request = {"tree": str(self.tree), "gpu": gpu, "sandboxed": self.sandboxed}
        ours, its = socket.socketpair()
        message = [json.dumps(request).encode()], [its.fileno()]
        try:
            socket.send_fds(self.nurseries[interprets][1], *message)
        except OSError:  # the last test has killed it
            self.stop(interprets)
            self.start(interprets)
            socket.send_fds(self.nurseries[interprets][1], *message)
        its.close()
        try:
            yield Worker(ours, seconds)
        finally:
            ours.close()
            with suppress(OSError):
                self.nurseries[interprets][1].send(b"end")


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))

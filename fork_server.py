"""The process that the roles are forked from. It imports the libraries while rank 0 does.

Starting the roles by `spawn` would import torch and transformers once more in every role, one
after the other. A fork of rank 0 itself is no choice: CUDA does not survive it.
"""

import os
import signal
import tempfile
from multiprocessing import forkserver

PRELOAD = ["transformers.models.auto.modeling_auto", "transformers.generation"]
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


torchrun = None  # a pidfd; a shell may go and leave us running


def start():
    """Start the server in rank 0, before its own slow imports. The server ignores interrupts."""
    global torchrun
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: imports leave long tracebacks
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if "RANK" in os.environ:
        torchrun = os.pidfd_open(os.getppid() or os.getpid())  # 0: not in our namespace
    forkserver.set_forkserver_preload(PRELOAD)
    if len(tempfile.gettempdir()) > 60:
        tempfile.tempdir = "/tmp"  # the path of a socket may have 107 characters
    handlers = ignore_interrupts()
    forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ignore_interrupts():
    """From now on interrupts are rank 0's business; returns the handlers before."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}

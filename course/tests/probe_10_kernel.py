"""Exercise 10: a Triton kernel, in Triton's interpreter.

The interpreter runs the programs one after the other, and every operation on all lanes at once. So
it computes right numbers even if threads would race. `interpreted` notes every access to memory,
with the line of kernels/fused_loss.py that it comes from. The tests look for races in these notes.
Exercise 12 uses `interpreted` and `lowered`, too.
"""

import importlib
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy
import torch
import triton
import triton.language as tl
from triton.language import constexpr
from triton.runtime.errors import InterpreterError


@triton.jit
def logsumexp_alone(row, out, V, FUNCTION: constexpr, LANES: constexpr):
    tl.store(out, FUNCTION(row, V, LANES))


@triton.jit
def candidates_alone(s, ids, c, c_sum, out, C, FUNCTION: constexpr, CANDIDATES: constexpr):
    k = tl.arange(0, CANDIDATES)
    own_s = tl.load(s + k, mask=k < C, other=0.0)
    own_ids = tl.load(ids + k, mask=k < C, other=0)
    found = FUNCTION(own_s, own_ids, ids, c, tl.load(c_sum), C, CANDIDATES)
    tl.store(out + k, found, mask=k < C)


@triton.jit
def overwrite_alone(row, grad_row, lse, c_sum, V, FUNCTION: constexpr, LANES: constexpr):
    FUNCTION(row, grad_row, tl.load(lse), tl.load(c_sum), V, LANES)


@triton.jit
def given(s, t, b, k, first_draw, C):
    """kernels.terms.given: the derivative of the loss is known."""
    return t, t


# ---- the interpreter, watched -----------------------------------------------------------------


def nearest_even(original):
    """Triton's interpreter cuts float32 to bfloat16. This rounds first, as compiled kernels do."""

    def convert(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            bits = data.view(numpy.uint32)
            half = numpy.uint32(0x7FFF) + ((bits >> 16) & numpy.uint32(1))
            data = (bits + half).view(numpy.float32)
        return original(data, source, target, mode)

    return convert


def line_in(file: str):
    """The innermost line of `file` that is being executed; 0: none."""
    frame = sys._getframe()
    while frame and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame.f_lineno if frame else 0


class Notes:
    """What the programs do to memory, in order: `events`, a list of dicts.

    kind       load, store, atomic or barrier
    program    its number
    line       of the file with the kernel
    The following, of loads and stores alone:
    shape      of the block that is loaded or stored
    size       of an entry, bytes
    lanes      index in the block of every entry that the mask lets through
    addresses  of these entries, bytes from the first logit on
    values     what is stored there, as integers
    """

    def __init__(self, file: str, first: int):
        self.file = file
        self.first = first
        self.events = []

    def add(self, kind, builder, pointers=None, mask=None, values=None):
        event = {"kind": kind, "program": int(builder.grid_idx[0]), "line": line_in(self.file)}
        if pointers is not None:
            where = numpy.broadcast_to(mask.data, pointers.data.shape).ravel()
            addresses = pointers.data.ravel()[where].astype(numpy.int64) - self.first
            event["shape"] = list(pointers.data.shape)
            event["size"] = pointers.get_element_ty().primitive_bitwidth // 8
            event["lanes"] = torch.from_numpy(where.nonzero()[0])
            event["addresses"] = torch.from_numpy(addresses)
        if values is not None:
            stored = numpy.broadcast_to(values.data, pointers.data.shape).ravel()[where]
            bits = stored.view(f"int{8 * stored.itemsize}").astype(numpy.int64)
            event["values"] = torch.from_numpy(bits)
        self.events.append(event)

    def patches(self):
        """Method of Triton's interpreter -> what takes its place."""
        from triton.runtime.interpreter import InterpreterBuilder

        def noted(name, note):
            original = getattr(InterpreterBuilder, name, None)
            if original is None:
                raise RuntimeError(f"Triton {triton.__version__} has no {name}: install 3.7")

            def call(builder, *args, **kwargs):
                note(builder, *args)
                return original(builder, *args, **kwargs)

            return mock.patch.object(InterpreterBuilder, name, call)

        def load(builder, pointers, mask, *_):
            self.add("load", builder, pointers, mask)

        def store(builder, pointers, values, mask, *_):
            self.add("store", builder, pointers, mask, values)

        def atomic(builder, *_):
            self.add("atomic", builder)

        def barrier(builder, *_):
            self.add("barrier", builder)

        yield noted("create_masked_load", load)  # create_load calls it
        yield noted("create_masked_store", store)
        yield noted("create_atomic_rmw", atomic)
        yield noted("create_atomic_cas", atomic)
        yield noted("create_barrier", barrier)


@contextmanager
def interpreted(first: int = 0, module: str = "kernels.fused_loss"):
    """Run kernels in the interpreter, and yield the list of events that fills meanwhile."""
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("this test needs Triton's interpreter: set TRITON_INTERPRET=1")
    notes = Notes(importlib.import_module(module).__file__, first)
    rounding = nearest_even(interpreter._convert_float)
    with ExitStack() as stack:
        for patch in notes.patches():
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(interpreter, "_convert_float", rounding))
        stack.enter_context(numpy.errstate(all="ignore"))
        try:
            yield notes.events
        except InterpreterError as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


def guarded(logits, lanes: int):
    """(buffer, the logits inside of it). The rows before and after them are NaN."""
    margin = 4 * lanes // logits.shape[1] + 2
    buffer = torch.full((len(logits) + 2 * margin, logits.shape[1]), torch.nan, dtype=logits.dtype)
    inside = buffer[margin:-margin]
    inside.copy_(logits)
    return buffer, inside


def changed(buffer, inside):
    """How many entries of the buffer outside of `inside` are no longer NaN."""
    outside = (len(buffer) - len(inside)) // 2
    return int((~torch.cat([buffer[:outside], buffer[-outside:]]).isnan()).sum())


# ---- what the tests call ----------------------------------------------------------------------


def logsumexp_of(row):
    """row_logsumexp of a row [V]."""
    from kernels import fused_loss

    lanes = fused_loss.launch_shape(len(row), 1)["LANES"]
    _, inside = guarded(row[None], lanes)
    out = torch.zeros(1)
    with interpreted():
        logsumexp_alone[(1,)](inside, out, len(row), fused_loss.row_logsumexp, LANES=lanes)
    return out[0]


def candidates_gradient(s, ids, c):
    """gradient_at_candidates of one position: [C] each -> [C]. Behind c lies NaN."""
    from kernels import fused_loss

    behind = torch.full((512,), torch.nan)
    c_sum, c = c.sum()[None], torch.cat([c, behind])[: len(c)]
    ids = torch.cat([ids, ids[:1].expand(512)])[: len(ids)]
    out, width = torch.zeros_like(s), fused_loss.launch_shape(512, len(s))["CANDIDATES"]
    sizes = (len(s), fused_loss.gradient_at_candidates)
    with interpreted():
        candidates_alone[(1,)](s, ids, c, c_sum, out, *sizes, CANDIDATES=width)
    return out


def overwritten_row(logits, lse: float, c_sum: float, dtype: str):
    """overwrite_row on a row [V].

    gradient  [V]
    outside   how many entries before and behind the row changed
    events    see Notes; `threads` of a program, `bytes` of the logits
    """
    from kernels import fused_loss

    shape = fused_loss.launch_shape(len(logits), 1)
    buffer, inside = guarded(logits[None], shape["LANES"])
    gradient = inside.view(getattr(torch, dtype))[0, : len(logits)]
    numbers = (torch.tensor([lse]), torch.tensor([c_sum]), len(logits))
    with interpreted(inside.data_ptr()) as events:
        overwrite_alone[(1,)](
            inside, gradient, *numbers, fused_loss.overwrite_row, LANES=shape["LANES"]
        )
    return {
        "gradient": gradient.clone(),
        "outside": changed(buffer, inside),
        "events": events,
        "threads": 32 * shape["num_warps"],
        "bytes": logits.nbytes,
    }


def whole_kernel(logits, ids, c, dtype: str):
    """The kernel on rows [G,V] with a given derivative c of the candidates [G,C]."""
    from kernels import fused_loss

    shape = fused_loss.launch_shape(logits.shape[1], ids.shape[1])
    buffer, inside = guarded(logits, shape["LANES"])
    with interpreted(inside.data_ptr()) as events:
        _, student_logp, gradient = fused_loss.fused_loss(
            given, inside, ids, c, c, getattr(torch, dtype), 0, 0
        )
    return {
        "student_logp": student_logp,
        "gradient": gradient.clone(),
        "outside": changed(buffer, inside),
        "events": events,
        "threads": 32 * shape["num_warps"],
        "bytes": logits.nbytes,
    }


def front_end(vocab: int, columns: int, logits: str, gradient: str):
    """Put the kernel through the part of Triton's compiler that needs no GPU.

    Returns how many loops and how many barriers it has then.

    `logits` and `gradient` are dtypes as the compiler writes them, such as "fp32".
    """
    from kernels import fused_loss

    kernel = fused_loss.loss_kernel
    constants = fused_loss.launch_shape(vocab, columns) | {"TERMS": given}
    types = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= dict.fromkeys(("V", "C", "grad_stride", "first", "first_draw"), "i32")
    types |= {"logits": f"*{logits}", "grad": f"*{gradient}", "ids": "*i64"}
    text = lowered(kernel, types, constants)
    return text.count("scf.for") + text.count("scf.while"), text.count("barrier")


def lowered(kernel, types: dict, constants: dict):
    """The text of a kernel behind the part of Triton's compiler that needs no GPU.

    `types` of its arguments; `constants`: those of its launch, num_warps and num_stages included.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError, make_backend

    constants = dict(constants)
    given = constants.keys() & {"num_warps", "num_stages"}
    options = {name: constants.pop(name) for name in given}
    types = types | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parts = (backend.get_codegen_implementation(options), backend.get_module_map(), context)
    try:
        made = ASTSource(kernel, types, places).make_ir(target, options, *parts)
    except CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise refusal(error) from None
    return str(made)


def refusal(error):
    """What Triton's compiler says, and at which line of the source."""
    if getattr(error, "src", None) is None or getattr(error, "node", None) is None:
        return error
    line = error.src.splitlines()[error.node.lineno - 1].strip()
    if "NotImplementedError" in line:
        return NotImplementedError(line.split('"')[1])
    return RuntimeError(f"the compiler refuses `{line}`: {error.error_message}")


def compiled_kernel(logits, ids, c, dtype: str):
    """The same, compiled, on a GPU."""
    from kernels import fused_loss

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is in its interpreter: set TRITON_INTERPRET=0 for this test")
    logits, ids, c = (one.to("cuda") for one in (logits, ids, c))
    _, student_logp, gradient = fused_loss.fused_loss(
        given, logits, ids, c, c, getattr(torch, dtype), 0, 0
    )
    return {"student_logp": student_logp.cpu(), "gradient": gradient.cpu()}

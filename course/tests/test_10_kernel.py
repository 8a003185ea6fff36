"""Public tests of exercise 10. Expected values: plain torch in float64."""

import torch

from claims import check, close, worth

# What rounding to a dtype may change, relative to an entry; float32 computes exponentials, too.
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-8 + 1e-5}


def problem(seed=0, rows=2, vocab=1000, columns=5, different=100, dtype=torch.float32):
    """logits [rows,vocab], ids and c [rows,columns]. Only `different` ids occur in a row."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab, generator=random)
    different = min(different, vocab)
    order = torch.rand(rows, vocab, generator=random).argsort(-1)[:, :different]
    ids = order.repeat(1, -(-columns // different))[:, :columns].contiguous()
    c = torch.randn(rows, columns, generator=random)
    return logits.to(dtype), ids, c


def right_answer(logits, ids, c):
    """(log-probabilities of the candidates, gradient of sum c s), by autograd."""
    logits = logits.double().requires_grad_()
    s = logits.log_softmax(-1).gather(1, ids)
    (gradient,) = torch.autograd.grad((c.double() * s).sum(), logits)
    return s.detach(), gradient


def check_gradient(found, expected, ids, dtype, what, tolerance=None):
    """Every entry is right to its own rounding, not to that of the largest."""
    found = found.double()
    check(found.shape == expected.shape, f"{what} has the shape {tuple(found.shape)}")
    allowed = (tolerance or ROUNDING[dtype]) * expected.abs() + 1e-7 * expected.abs().max()
    wrong = ((found - expected).abs() <= allowed).logical_not().nonzero()
    if len(wrong):
        row, entry = wrong[0].tolist()
        kind = "a candidate" if entry in ids[row].tolist() else "no candidate"
        numbers = f"is {found[row, entry]:.6g}, {expected[row, entry]:.6g} is right"
        check(False, f"{what} is wrong: entry {entry} of row {row}, {kind}, {numbers}")


# ---- races ------------------------------------------------------------------------------------


def races(found):
    """What may go wrong when the threads of a program do not run in step: sentences.

    `found` is what probe_10_kernel returns. Programs run in any order, and so do the threads of a
    program; a barrier waits until all of them are there. The compiler gives lane i of two blocks to
    the same thread if both have the same shape and entries of the same size, and at least one entry
    for every thread. In all other cases two lanes may belong to two threads.
    """
    problems = {}  # sentence -> its first byte
    for program in sorted({event["program"] for event in found["events"]}):
        own = [event for event in found["events"] if event["program"] == program]
        races_in_program(own, found["threads"], problems)
    races_between_programs(found["events"], problems)
    size = found["bytes"]
    places = {text: f"byte {at} of the logits" for text, at in problems.items() if 0 <= at < size}
    return [text.format(place=places.get(text, "a candidates' table")) for text in problems]


def races_in_program(events, threads: int, problems: dict):
    since = {}  # byte -> the accesses since the last barrier
    for number, event in enumerate(events):
        line = event["line"]
        if event["kind"] == "barrier":
            since = {}
        if event["kind"] == "atomic":
            problems.setdefault(f"line {line} uses an atomic: the order of its sums is chance", 0)
        if event["kind"] not in ("load", "store"):
            continue
        if event["kind"] == "store":
            unequal_stores(event, problems)
        shape = torch.Size(event["shape"])
        layout = (shape, event["size"]) if shape.numel() >= threads else number
        new = []
        for address, lane in zip(event["addresses"].tolist(), event["lanes"].tolist()):
            for byte in range(address, address + event["size"]):
                for kind, thread, other in since.get(byte, ()):
                    if "store" in (kind, event["kind"]) and thread != (layout, lane):
                        text = (
                            f"line {line} {event['kind']}s {{place}}, which line {other} {kind}s "
                            "for another lane, and no barrier stands between"
                        )
                        problems.setdefault(text, byte)
                new.append((byte, (event["kind"], (layout, lane), line)))
        for byte, access in new:
            since.setdefault(byte, []).append(access)


def unequal_stores(event, problems: dict):
    """Two lanes that store different values in one place: which one wins is chance."""
    values = {}
    for address, value in zip(event["addresses"].tolist(), event["values"].tolist()):
        if values.setdefault(address, value) != value:
            text = f"line {event['line']} stores different values of two lanes at {{place}}"
            problems.setdefault(text, address)


def races_between_programs(events, problems: dict):
    """A program loads or stores what another stores."""
    writer = {}
    for kind in ("store", "load"):
        for event in events:
            if event["kind"] != kind:
                continue
            for address in event["addresses"].tolist():
                for byte in range(address, address + event["size"]):
                    if kind == "store":
                        writer.setdefault(byte, event["program"])
                    if writer.get(byte, event["program"]) != event["program"]:
                        line = event["line"]
                        text = f"line {line} {kind}s {{place}}, which another program stores"
                        problems.setdefault(text, byte)


def check_races(found, what: str):
    problems = races(found)
    check(not problems, f"{what}: {'; '.join(problems[:3])}")


def check_compiled(student, vocab, columns, logits, gradient):
    loops, barriers = student.front_end(vocab, columns, logits, gradient)
    what = f"the compiled kernel for a {gradient} gradient of {logits} logits"
    check(loops >= 2, f"{what} has {loops} loops, 2 at least are right")
    right = 3 if logits != gradient else 2  # two of them are given
    check(barriers >= right, f"{what} has {barriers} barriers, {right} at least are right")


# ---- the tests --------------------------------------------------------------------------------


@worth(1)
def test_the_logsumexp_of_a_row(student):
    """row_logsumexp is right for vocabularies that fill no block, a part of one or some, for logits
    near 300 and near -300, and to the precision of float32."""
    row = problem(0, 1, 1000)[0][0]
    rising = torch.cat([row - 300, row + 300])
    two = torch.where((torch.arange(1000) // 256) % 2 == 1, 0.3, 0.5)
    rows = [
        ("V = 173, logits near -300", row[:173] - 300),
        ("V = 512, one whole block", row[:512]),
        ("V = 1000", row),
        ("V = 1", row[:1]),
        ("V = 2000, first near -300, then near 300", rising),
        ("V = 2000, first near 300, then near -300", rising.flip(0)),
        ("V = 1000, all logits 0.3 or 0.5", two),
    ]
    for what, one in rows:
        found = student.logsumexp_of(one)
        close(found, one.double().logsumexp(-1), f"logsumexp, {what}", 1e-6)


@worth(1)
def test_candidates_with_equal_ids_share_a_sum(student):
    """gradient_at_candidates gives each candidate the derivative of the logit at its id."""
    for columns, different in ((5, 5), (5, 2), (40, 7)):
        logits, ids, c = problem(2, 1, 100, columns, different)
        s, gradient = right_answer(logits, ids, c)
        found = student.candidates_gradient(s[0].float(), ids[0], c[0])
        what = f"the gradient at {columns} candidates with {different} ids"
        close(found, gradient[0, ids[0]], what)


@worth(1)
def test_the_gradient_elsewhere(student):
    """overwrite_row writes -softmax * c_sum over the logits, in float32 and in bfloat16, and
    nothing behind the row."""
    for dtype in ("float32", "bfloat16"):
        for vocab in (1000, 173):
            logits, _, _ = problem(3, 1, vocab)
            lse = float(logits.double().logsumexp(-1))
            expected = -1.7 * logits.double().softmax(-1)
            found = student.overwritten_row(logits[0], lse, 1.7, dtype)
            what = f"the {dtype} gradient of {vocab} float32 logits"
            outside = found["outside"]
            check(outside == 0, f"{what}: {outside} entries behind the row change")
            check_gradient(found["gradient"][None], expected, torch.zeros(1, 0), dtype, what)


@worth(1)
def test_the_second_pass_has_no_race(student):
    """overwrite_row is right, and writes no byte that another thread may still have to load."""
    for dtype in ("float32", "bfloat16"):
        logits, _, _ = problem(4, 1)
        found = student.overwritten_row(logits[0], 12.0, 1.0, dtype)
        what = f"a {dtype} gradient of float32 logits"
        expected = -(logits.double() - 12.0).exp()
        check_gradient(found["gradient"][None], expected, torch.zeros(1, 0), dtype, what)
        check_races(found, what)


@worth(1, compiled=True)
def test_the_compiler_takes_it(student):
    """The kernel is a Triton program: the compiler accepts it, too, and not the interpreter alone.
    There are two loops over V, and in bfloat16 a barrier in one of them."""
    check_compiled(student, 1000, 5, "fp32", "fp32")
    check_compiled(student, 1000, 5, "fp32", "bf16")


@worth(1, gpu=True)
def test_the_compiled_kernel(student):
    """Compiled for a GPU the kernel is right, too, and gives the same bits in every run."""
    for dtype in ("float32", "bfloat16"):
        for vocab in (173, 5000):
            inputs = problem(5, 40, vocab, 33, 20)
            s, gradient = right_answer(*inputs)
            found = student.compiled_kernel(*inputs, dtype)
            close(found["student_logp"], s, f"student_logp, V = {vocab}", 1e-6)
            what = f"the {dtype} gradient, V = {vocab}"
            check_gradient(found["gradient"], gradient, inputs[1], dtype, what)
            again = student.compiled_kernel(*inputs, dtype)["gradient"]
            check(torch.equal(found["gradient"], again), f"{what} changes from run to run")

"""Claims about what the roles share."""

import json
import os
import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from channel import Channel, Field, Tickets, may_start
from config import Config
from data import Prompt
from experiments import memory
from log import Timeline, close_trace, start_output

CONFIG = Config(batch_size=4, max_staleness=2, max_prompt_tokens=8, max_new_tokens=8, slots=2)
P = 200_000


def make(config=CONFIG, parameters=P):
    return Channel.create(config, parameters, torch.float32)


def test_ticket_n_starts_if_and_only_if_the_inequality_holds():
    for version in range(4):
        allowed = [n for n in range(100) if may_start(n, version, CONFIG)]
        assert allowed == list(range((version + 1 + 2) * 4))
    strict = replace(CONFIG, max_staleness=0)
    assert may_start(3, 0, strict) and not may_start(4, 0, strict) and may_start(4, 1, strict)


def test_nothing_is_named_in_dev_shm_and_others_open_it_by_path():
    before = set(os.listdir("/dev/shm"))
    ours = make()
    theirs = pickle.loads(pickle.dumps(ours))
    assert len(pickle.dumps(ours)) < 5000  # the paths; no tensor is sent
    assert set(os.listdir("/dev/shm")) == before
    theirs.tokens[3, 5] = 77
    theirs.to_teachers[0].put([3])
    assert ours.to_teachers[0].get() == 3 and ours.tokens[3, 5] == 77


def test_every_field_has_its_own_whole_pages():
    ours = make()
    spans = []
    fields = {name: field for name, field in vars(Channel).items() if isinstance(field, Field)}
    # The caller's choice.
    assert fields["weights"].dtype is None and ours.weights.dtype == torch.float32
    for name, field in fields.items():
        tensor = getattr(ours, name)
        assert (
            tensor.dtype == (field.dtype or torch.float32)
            and tensor.dim() == len(field.shape.split())
            and not tensor.any()
        )
        spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    assert len(spans) == 17 and all(start % 4096 == spans[0][0] % 4096 for start, _ in spans)
    assert all(first[1] <= second[0] for first, second in zip(sorted(spans), sorted(spans)[1:]))


def test_a_row_queue_keeps_order_and_times_out():
    queue = make().to_learner
    queue.put(list(range(3000)))
    assert [queue.get() for _ in range(3000)] == list(range(3000))
    started = time.monotonic()
    assert queue.get(timeout=0.05) is None and 0.04 < time.monotonic() - started < 5


def _publish(mailbox):
    version = 0
    while not mailbox.stop.item():
        version += 1
        mailbox.publish([torch.full((P,), float(version))], version)


def test_a_reader_never_sees_weights_of_two_versions_mixed():
    """A writer process publishes as fast as it can;
    every pickup must be all of one version, and the named one."""
    ours = make()
    writer = mp.get_context("spawn").Process(target=_publish, args=(ours,))
    writer.start()
    flat, seen = torch.empty(P), set()
    while len(seen) < 300:
        version = ours.pick_up(flat)
        assert flat.min() == flat.max() == version
        seen.add(version)
    ours.stop.fill_(1)
    writer.join()
    assert writer.exitcode == 0


def test_a_pickup_that_two_publishes_overtake_is_made_again():
    """The writer comes back to the buffer that is being read:
    deterministic, by publishing from inside the copy."""
    ours = make(parameters=8)
    ours.publish([torch.full((8,), 1.0)], 1)

    class Slow(torch.Tensor):
        def copy_(self, source):
            half = source[:4].clone()
            if int(ours.version) == 1:
                for version in (2, 3):
                    ours.publish([torch.full((8,), float(version))], version)
            self[:4], self[4:] = half, source[4:]

    flat = torch.empty(8).as_subclass(Slow)
    assert ours.pick_up(flat) == 3
    assert flat.tolist() == [3.0] * 8


def test_too_little_memory_is_said_with_the_number_the_limit_and_the_fix(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000_000)
    with pytest.raises(
        MemoryError, match=r"need 954 MiB .* 95 MiB\s+are available: lower --batch-size \(4\)"
    ):
        memory.check_memory(1_000_000_000, CONFIG)
    memory.check_memory(89_000_000, CONFIG)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="lower --batch-size"):
        make()


class Queue(list):
    def put(self, rows):
        self.extend(rows)


def tickets(config, version=0, trained_ahead=()):
    ours = make(config)
    ours.to_generator = Queue()
    return ours, Tickets(
        config, ours, [Prompt("x", [5, 6]), Prompt("y", [7])], version, list(trained_ahead)
    )


def finish(ours, books, tickets):
    for row in list(ours.to_generator):
        if int(ours.ticket[row]) in tickets:
            books.receive([row])
            ours.to_generator.remove(row)


def test_rows_suffice_for_every_ticket_the_inequality_admits_and_no_more():
    ours, books = tickets(CONFIG)
    books.issue(0)
    assert (
        sorted(int(ours.ticket[row]) for row in ours.to_generator) == list(range(12))
        and not books.free_rows
    )
    for version in range(5):
        finish(ours, books, range(version * 4, version * 4 + 4))
        books.trained(books.batch(version))
        books.issue(version + 1)
        assert (
            not books.free_rows
            and max(int(ours.ticket[row]) for row in ours.to_generator) == (version + 4) * 4 - 1
        )


def test_batch_order_waits_for_its_tickets_and_arrival_order_takes_what_is_there():
    for order, expected in (("batch", None), ("arrival", [3, 5, 8, 9])):
        config = replace(CONFIG, order=order)
        ours, books = tickets(config)
        books.issue(0)
        for ticket in (3, 5, 8, 9):
            finish(ours, books, [ticket])
            if ticket != 9:
                assert books.batch(0) is None
        rows = books.batch(0)
        assert (rows and [int(ours.ticket[row]) for row in rows]) == expected
        finish(ours, books, [2])
        finish(ours, books, [1, 0])
        # Of the first to finish, or of the lowest tickets.
        in_order = [int(ours.ticket[row]) for row in books.batch(0)]
        assert in_order == (expected or [0, 1, 2, 3])


def test_resume_issues_every_ticket_once_also_in_arrival_order():
    config = replace(CONFIG, order="arrival")
    ours, books = tickets(config)
    books.issue(0)
    for ticket in (3, 5, 8, 9):
        finish(ours, books, [ticket])
    books.trained(books.batch(0))
    assert books.lowest == 0 and books.trained_ahead == {3, 5, 8, 9}
    resumed, again = tickets(config, version=1, trained_ahead=sorted(books.trained_ahead))
    again.issue(1)
    assert sorted(int(resumed.ticket[row]) for row in resumed.to_generator) == [
        0,
        1,
        2,
        4,
        6,
        7,
        10,
        11,
        12,
        13,
        14,
        15,
    ]


def test_resume_with_a_smaller_max_staleness_waits_for_free_rows():
    # 4 rows, and 7 tickets below 12 that were not trained.
    strict = replace(CONFIG, order="arrival", max_staleness=0)
    ours, books = tickets(strict, version=2, trained_ahead=[13, 14, 15])
    issued = []
    for version in (2, 3, 4):
        books.issue(version)
        issued.append(sorted(int(ours.ticket[row]) for row in ours.to_generator))
        finish(ours, books, issued[-1])
        books.trained(books.batch(version))
    assert issued == [[5, 6, 7, 8], [9, 10, 11, 12], [16, 17, 18, 19]]


def test_the_timeline_adds_up_busy_seconds_and_writes_a_trace_that_is_json(tmp_path, monkeypatch):
    # Begin and end of each span below.
    clock = iter([1.0, 1.5, 1.5005, 1.9, 2.1, 2.2, 5.0, 6.0, 6.0, 6.5])
    monkeypatch.setattr("log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    ours, path, config = make(), tmp_path / "trace.json", Config(output_dir=str(tmp_path))
    start_output(config, None)
    first, second = (Timeline(config, ours, i, f"role {i}") for i in (0, 1))
    for timeline, name in (
        (first, "decode"),
        (first, "decode"),
        (first, "decode"),
        (second, "score"),
        (second, "publish"),
    ):
        with timeline.span(name):
            pass
    first.flush()
    second.flush()
    close_trace(path)
    events = json.loads(path.read_text())
    spans = [(e["tid"], e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    # 0.5 ms between them, 100 ms.
    merged, apart = (0, "decode", 1.0, pytest.approx(0.9)), (0, "decode", 2.1, pytest.approx(0.1))
    assert sorted(spans, key=lambda span: span[2]) == [
        merged,
        apart,
        (1, "score", 5.0, 1.0),
        (1, "publish", 6.0, 0.5),
    ]
    assert ours.busy[:2].tolist() == pytest.approx([0.9995, 1.5])


def test_the_pinned_memory_is_the_whole_mailbox(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda,
        "cudart",
        lambda: SimpleNamespace(cudaHostRegister=lambda *args: calls.append(args) or "code"),
    )
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: calls.append(code))
    channel = make()
    channel.pin()
    assert (
        calls == [(channel.weights.data_ptr(), channel.weights.nbytes, 0), "code"]
        and calls[0][0] % 4096 == 0
    )

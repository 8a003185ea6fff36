"""Claims about what the roles share."""

import os
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

import channel
from channel import Channel, Field
from support.config import builtin

CONFIG = builtin(batch_size=4, max_staleness=2, max_prompt_tokens=8, max_new_tokens=8, slots=2)
P = 200_000


def make(config=CONFIG, parameters=P):
    return Channel.create(config, parameters, torch.float32)


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
    assert len(spans) == 23 and all(start % 4096 == spans[0][0] % 4096 for start, _ in spans)
    assert all(first[1] <= second[0] for first, second in zip(sorted(spans), sorted(spans)[1:]))


def test_a_row_queue_keeps_order_and_times_out():
    queue = make().to_learner
    queue.put(list(range(3000)))
    assert [queue.get() for _ in range(3000)] == list(range(3000))
    started = time.monotonic()
    assert queue.get(timeout=0.05) is None and 0.04 < time.monotonic() - started < 5


def _publish(mailbox):
    torch.set_num_threads(1)  # as the reader
    version = 0
    while not mailbox.stop.item():
        version += 1
        mailbox.publish([torch.full((P,), float(version))], version)


def test_a_reader_never_sees_weights_of_two_versions_mixed():
    """A writer process publishes as fast as it can. Every pickup is all of the named version."""
    ours = make()
    writer = mp.get_context("spawn").Process(target=_publish, args=(ours,))
    writer.start()
    flat, seen = torch.empty(P), set()
    while len(seen) < 100:
        version = ours.pick_up(flat)
        assert flat.min() == flat.max() == version
        seen.add(version)
    ours.stop.fill_(1)
    writer.join()
    assert writer.exitcode == 0


def test_a_pickup_that_two_publishes_overtake_is_made_again():
    """The writer comes back to the buffer that is being read: it publishes inside of the copy."""
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
    monkeypatch.setattr(channel, "available_memory", lambda: 100_000_000)
    with pytest.raises(
        MemoryError, match="need 954 MiB of shared memory, 95 are available: lower --batch-size"
    ):
        channel.check_memory(1_000_000_000, CONFIG)
    channel.check_memory(89_000_000, CONFIG)
    monkeypatch.setattr(channel, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="lower --batch-size"):
        make()


def test_the_pinned_memory_is_the_whole_mailbox(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda,
        "cudart",
        lambda: SimpleNamespace(cudaHostRegister=lambda *args: calls.append(args) or "code"),
    )
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: calls.append(code))
    ours = make()
    ours.pin(torch.device("cuda"))
    weights = ours.weights
    assert calls == [(weights.data_ptr(), weights.nbytes, 0), "code"] and calls[0][0] % 4096 == 0


def test_memory_is_what_the_kernel_calls_available(tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "Path", lambda name: tmp_path / name.lstrip("/"))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    assert channel.available_memory() == 1_024_000

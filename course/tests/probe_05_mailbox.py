"""Exercise 5: a weight mailbox without locks.

The mailbox's memory is watched while your code runs. `pick_up` meets a writer that moves on just
when your code looks at the memory, also in the middle of a copy.
"""

import weakref

import torch
from torch.overrides import TorchFunctionMode

MOST_LOOKS = 200  # of one pick_up at the memory; then it counts as running for ever


def mailbox(weights, version: int):
    """A channel.Channel that has the fields of the mailbox alone, [2,P] and [1]."""
    from channel import Channel

    channel = Channel.__new__(Channel)
    channel.weights = weights.clone()
    channel.version = torch.tensor([version])
    return channel


def lies_in(value, memory):
    """Whether `value` is a tensor that shares the bytes of `memory`."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def replaced(value, old: torch.Tensor, new):
    """The arguments of a call, with new(x) in the place of every x that lies in `old`."""
    if isinstance(value, (tuple, list)):
        return type(value)(replaced(one, old, new) for one in value)
    if isinstance(value, dict):
        return {name: replaced(one, old, new) for name, one in value.items()}
    return new(value) if lies_in(value, old) else value


UNSEEN = ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage")


def refuse_unseen(function, args, memories):
    """The tests watch operations of torch. What gives the bare memory away cannot be watched."""
    if function.__name__ in UNSEEN and any(lies_in(args[0], memory) for memory in memories):
        raise RuntimeError(f"use operations of torch on the mailbox, not {function.__name__}")


class Recorder(TorchFunctionMode):
    """Notes what the mailbox holds after every call of torch that changes it."""

    def __init__(self, channel):
        super().__init__()
        self.weights, self.version = channel.weights, channel.version
        self.moments = []
        self.note()

    def note(self):
        moment = int(self.version), self.weights.clone()
        last = self.moments[-1] if self.moments else None
        if last is None or last[0] != moment[0] or not torch.equal(last[1], moment[1]):
            self.moments.append(moment)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        refuse_unseen(function, args, (self.weights, self.version))
        result = function(*args, **(kwargs or {}))
        self.note()
        return result


class Writer(TorchFunctionMode):
    """Moves the memory on whenever it is looked at.

    `states`: (version, weights) as time passes. Before the i-th look, schedule[i] states pass. A
    look at weights takes time: its first half sees what was, its second half what is then.
    """

    def __init__(self, channel, states, schedule):
        super().__init__()
        self.weights, self.version = channel.weights, channel.version
        self.states, self.schedule = states, schedule
        self.at = self.looks = 0

    def move_on(self):
        steps = self.schedule[self.looks] if self.looks < len(self.schedule) else 0
        self.at = min(self.at + steps, len(self.states) - 1)
        self.looks += 1
        if self.looks > MOST_LOOKS:
            raise RuntimeError(f"pick_up looks at the mailbox {MOST_LOOKS} times, without an end")
        version, weights = self.states[self.at]
        self.version.fill_(version)
        self.weights.copy_(weights)

    def torn(self, of_weights):
        """A copy of what lies in the weights, while the writer goes on."""
        copy = of_weights.clone().flatten()
        self.move_on()
        half = copy.numel() // 2
        copy[half:] = of_weights.flatten()[half:]
        return copy.view(of_weights.shape)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        refuse_unseen(function, args, (self.weights, self.version))
        sees = [[], []]
        for memory, seen in zip((self.weights, self.version), sees):
            replaced((args, kwargs), memory, seen.append)
        if not any(sees) or name in ("__get__", "__iter__", "unbind", "__len__", "numel", "size"):
            return function(*args, **kwargs)
        writes = name == "__setitem__" or name.endswith("_") and not name.endswith("__")
        if not writes and "out" not in kwargs:
            result = function(*args, **kwargs)
            if lies_in(result, self.weights) or lies_in(result, self.version):
                return result  # a view: nothing was read yet
        if sees[1]:
            self.move_on()
        if sees[0]:
            args, kwargs = replaced((args, kwargs), self.weights, self.torn)
        return function(*args, **kwargs)


def published(weights, version: int, publications):
    """What the mailbox holds as time passes: (version, weights [2,P]), whenever something changes.

    `publications`: pairs of a version and its list of parts, for publish.
    """
    channel = mailbox(weights, version)
    with Recorder(channel) as recorder:

        def noted(parts):
            for part in parts:
                recorder.note()
                yield part

        for number, parts in publications:
            channel.publish(noted(parts), number)
            recorder.note()
    return recorder.moments


def parts_held(weights, version: int, parts):
    """The most of `parts` that exist at the same time while publish writes them."""
    channel = mailbox(weights, 0)
    made, most = [], 0

    def one_by_one():
        nonlocal most
        for part in parts:
            part = part.clone()
            made.append(weakref.ref(part))
            most = max(most, sum(one() is not None for one in made))
            yield part
            del part

    channel.publish(one_by_one(), version)
    return most


def picked_up(states, schedules):
    """What pick_up returns while a writer goes on, for each schedule.

    -> (version returned, what is in flat, version in the mailbox at the end).
    """
    found = []
    for schedule in schedules:
        version, weights = states[0]
        channel = mailbox(weights, version)
        flat = torch.full(weights.shape[1:], -1.0)
        with Writer(channel, states, schedule) as writer:
            returned = channel.pick_up(flat)
        found.append((int(returned), flat, int(writer.version)))
    return found

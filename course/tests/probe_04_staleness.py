"""Exercise 4: the staleness rule."""

import os
from types import SimpleNamespace
from unittest import mock

import torch

MOST_ROUNDS = 20_000  # of a pipeline; then it counts as standing still


class TicketQueue(list):
    """What channel.RowQueue is to Tickets."""

    def put(self, rows):
        self.extend(rows)


def on_node(node: int, nodes: int):
    """Inside of this `with`, a Config believes to be on node `node` of `nodes`."""
    return mock.patch.dict(os.environ, GROUP_RANK=str(node), GROUP_WORLD_SIZE=str(nodes))


def new_tickets(config):
    """tickets.Tickets on a channel of its own."""
    from support.data import Prompt
    from tickets import Tickets

    rows = config.table_rows
    names = ("prompt_len", "ticket", "teacher_prompt_len", "teacher", "group", "group_size")
    channel = SimpleNamespace(
        tokens=torch.zeros(rows, 4, dtype=torch.int32),
        teacher_tokens=torch.zeros(rows, 4, dtype=torch.int32),
        to_generator=TicketQueue(),
        **{name: torch.zeros(rows, dtype=torch.int64) for name in names},
    )
    return Tickets(config, channel, [Prompt("1", [1])])


def admitted(settings: dict, version: int, count: int, node: int = 0, nodes: int = 1):
    """The tickets below `count` that may_start admits to weights of `version`."""
    from support.config import builtin
    from tickets import may_start

    with on_node(node, nodes):
        config = builtin(**settings)
        return [ticket for ticket in range(count) if may_start(ticket, version, config)]


def batches(settings: dict, version: int, arrivals, node: int = 0, nodes: int = 1, late=()):
    """What Tickets.batch returns after each arrival. `arrivals`: pairs of a ticket and its row.

    All of the node's tickets that weights of `version` admit are under way, from those of update
    `version` on. `late`: tickets of earlier updates that are, too.
    """
    from support.config import builtin

    with on_node(node, nodes):
        config = builtin(**settings)
        tickets = new_tickets(config)
        end = (version + 1 + config.max_staleness) * config.batch_size
        issued = range(version * config.batch_size, end)
        tickets.in_flight = {*late, *(ticket for ticket in issued if ticket % nodes == node)}
        found = []
        for ticket, row in arrivals:
            tickets.channel.ticket[row] = ticket
            tickets.receive([row])
            rows = tickets.batch(version)
            found.append(None if rows is None else [int(one) for one in rows])
        return found


def pipeline(settings: dict, responses: list[int], training: int):
    """A run without models: one entry (update, ticket, version that sampled it, round) a rollout.

    Time passes in rounds. The rollout of a ticket takes responses[ticket % len(responses)] of them,
    an update takes `training`. Scoring takes none. As in train.py, a ticket may start on the
    weights that the generator has, and these change when the refresh of the settings allows it.
    """
    from support.config import builtin
    from tickets import may_start

    config = builtin(**settings)
    tickets = new_tickets(config)
    channel = tickets.channel
    version = weights = 0  # of the learner, of the generator
    active, sampled_by, in_training, trained = {}, {}, [], []
    until = None  # the round in which the update at hand ends
    tickets.issue(version)
    for now in range(MOST_ROUNDS):
        if until == now:
            tickets.trained(in_training)
            version, until = version + 1, None
            if version == config.steps:
                break
            tickets.issue(version)
        if config.refresh == "in_flight" or not active:
            weights = version
        while channel.to_generator and len(active) < config.slots:
            row = channel.to_generator[0]
            ticket = int(channel.ticket[row])
            if not may_start(ticket, weights, config):
                break
            channel.to_generator.pop(0)
            active[row] = now + responses[ticket % len(responses)]
            sampled_by[ticket] = weights
        done = [row for row, end in active.items() if end == now + 1]
        active = {row: end for row, end in active.items() if row not in done}
        tickets.receive(done)
        if until is None and (rows := tickets.batch(version)):
            in_training = [int(channel.ticket[row]) for row in rows]
            until = now + 1 + training
            trained += [(version, ticket, sampled_by[ticket], now) for ticket in in_training]
    return trained

"""Tickets: the order of rollouts, and the one inequality that decides how asynchronous a run is.

Ticket n means the n-th rollout of the run. Update v trains the tickets from v * B to (v + 1) * B,
with B the batch size, and makes weights of version v + 1. Rollout n may start once

    n < (weight_version + 1 + max_staleness) * B

`max_staleness = 0` is synchronous training: no rollout of an update starts before the update before
it was made. Nothing else schedules.

Several nodes take turns: of the tickets that this run has left to train, node k of n has every n-th
from the k-th on. Every node keeps the books of all nodes, so that any of them knows what was
trained.
"""

import torch

from channel import Channel
from support.config import Config
from support.data import prompt_of


def may_start(ticket: int, weight_version: int, config: Config):
    """The inequality: may weights of `weight_version` sample rollout number `ticket`?"""
    return ticket < (weight_version + 1 + config.max_staleness) * config.batch_size


def teacher_of(ticket: int, config: Config):
    """(number of the teacher that scores a ticket, how many tickets of the node it had before)."""
    turn, teacher = divmod(ticket // config.nodes, config.teachers)
    return teacher, turn


class Tickets:
    """A leader's books: which row carries which ticket, which may start, which were trained."""

    def __init__(self, config: Config, channel: Channel, prompts, version=0, trained_ahead=()):
        """`version` updates were made before.

        `trained_ahead`: tickets that were trained before an earlier one was (arrival order).
        """
        self.config = config
        self.channel = channel
        self.prompts = prompts
        self.free_rows = list(range(config.table_rows))
        self.scored = {}  # ticket -> row, in order of arrival
        self.trained_before = frozenset(trained_ahead)  # by the run that this one resumes
        self.trained_ahead = set(trained_ahead)
        self.turn = version * config.batch_size  # says whose the next ticket is
        # Every ticket below `lowest` was trained, and of those from it on only `trained_ahead`.
        self.lowest = self.turn - len(self.trained_ahead)
        self.next = self.lowest  # the next that may be issued

    def issue(self, version: int):
        """Give free rows to the tickets that weights of `version` admit, with their prompts."""
        rows = []
        end = self.config.steps * self.config.batch_size
        while self.free_rows and self.next < end and may_start(self.next, version, self.config):
            if self.next not in self.trained_before:
                if self.turn % self.config.nodes == self.config.node:
                    rows.append(self.fill_row(self.next))
                self.turn += 1
            self.next += 1
        self.channel.to_generator.put(rows)

    def fill_row(self, ticket: int):
        """Write a ticket and its prompt into a free row."""
        row = self.free_rows.pop()
        ids = self.prompts[prompt_of(ticket, len(self.prompts), self.config)].ids
        self.channel.tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.channel.prompt_len[row] = len(ids)
        self.channel.ticket[row] = ticket
        return row

    def receive(self, rows: list[int]):
        """Take note of rows that the teacher has scored."""
        for row in rows:
            self.scored[int(self.channel.ticket[row])] = row

    def batch(self, version: int):
        """Rows of the update after `version`, in ticket order or as they came; None: not yet."""
        size = self.config.batch_size
        wanted = range(version * size, (version + 1) * size)  # of all nodes
        if self.config.order == "arrival":
            wanted = list(self.scored)
        share = size // self.config.nodes
        ready = [self.scored[ticket] for ticket in wanted if ticket in self.scored][:share]
        return ready if len(ready) == share else None

    def trained(self, tickets: list[int]):
        """Remember the tickets of an update, of all nodes, and free the rows of our own."""
        for ticket in tickets:
            if ticket in self.scored:
                self.free_rows.append(self.scored.pop(ticket))
        self.trained_ahead.update(tickets)
        while self.lowest in self.trained_ahead:
            self.trained_ahead.remove(self.lowest)
            self.lowest += 1

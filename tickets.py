"""Tickets: the order of rollouts, and the one inequality that decides how asynchronous a run is.

Ticket n means the n-th rollout of the run. Update v trains the tickets from v * B to (v + 1) * B,
with B the batch size, and makes weights of version v + 1. Rollout n may start once

    n < (weight_version + 1 + max_staleness) * B

`max_staleness = 0` is synchronous training: no rollout of an update starts before the update before
it was made. Nothing else schedules, and no rollout is thrown away. tinker-cookbook admits by the
same rule (docs/related.md).

Which rollouts make an update is one number, too, the window W. The update after version v waits for
every ticket below (v + 1 - W) * B that was not trained yet, and fills up with those that came
first. W = 0 is ticket order, a large W is order of arrival. No token that is trained comes from
weights more than max_staleness + W updates old.

Several nodes take turns: of the tickets that this run has left to train, node k of n has every n-th
from the k-th on. Every node keeps the books of all nodes, so that any of them knows what was
trained.
"""

import math
from collections import Counter, defaultdict

from channel import Channel, write_prompt
from support.config import Config
from support.data import prompt_of


def may_start(ticket: int, weight_version: int, config: Config):
    """The inequality: may weights of `weight_version` sample rollout number `ticket`?"""
    return ticket < (weight_version + 1 + config.max_staleness) * config.batch_size


class Tickets:
    """A leader's books: which row carries which ticket, which may start, which were trained."""

    def __init__(self, config: Config, channel: Channel, prompts, version=0, trained_ahead=()):
        """`version` updates were made before.

        `trained_ahead`: tickets that were trained before an earlier one was.
        """
        self.config = config
        self.channel = channel
        self.prompts = prompts
        self.free_rows = list(range(config.table_rows))
        self.in_flight = set()  # tickets of rows that the teacher has not scored yet
        self.scored = {}  # ticket -> row, in order of arrival
        self.groups = Counter()  # of each teacher process so far
        self.trained_before = frozenset(trained_ahead)  # by the run that this one resumes
        self.trained_ahead = set(trained_ahead)
        self.turn = version * config.batch_size  # says whose the next ticket is
        # Every ticket below `lowest` was trained, and of those from it on only `trained_ahead`.
        self.lowest = self.turn - len(self.trained_ahead)
        self.next = self.lowest  # the next that may be issued

    def issue(self, version: int):
        """Give free rows to the tickets that weights of `version` admit, with their prompts.

        In ticket order rows are enough for whole updates. So each teacher's groups are the same in
        every run of equal settings.
        """
        rows = []
        end = self.config.steps * self.config.batch_size
        while self.free_rows and self.next < end and may_start(self.next, version, self.config):
            if self.next not in self.trained_before:
                if self.turn % self.config.nodes == self.config.node:
                    rows.append(self.fill_row(self.next))
                self.turn += 1
            self.next += 1
        self.assign_teachers(rows)
        self.channel.to_generator.put(rows)

    def fill_row(self, ticket: int):
        """Write a ticket and its prompt into a free row."""
        row = self.free_rows.pop()
        prompt = self.prompt_of(ticket)
        write_prompt(self.channel, row, prompt.ids, prompt.for_teacher)
        self.channel.ticket[row] = ticket
        self.in_flight.add(ticket)
        return row

    def prompt_of(self, ticket: int):
        return self.prompts[prompt_of(ticket, len(self.prompts), self.config)]

    def assign_teachers(self, rows):
        """Decide which teacher process scores a row, and together with which others.

        Tickets and prompts alone decide it, because the last bits of a score depend on who shares
        the forward pass. The rows of an update that name one teacher are dealt to its processes in
        turn. A group, which a process scores at once, is a quarter of what it has of an update.
        """
        channel, names = self.channel, self.config.teacher_processes
        shares = defaultdict(list)  # (update, name) -> rows
        for row in rows:
            ticket = int(channel.ticket[row])
            shares[ticket // self.config.batch_size, self.prompt_of(ticket).teacher].append(row)
        for (_, name), share in shares.items():
            processes = [i for i, of in enumerate(names) if of == name]
            for number, process in enumerate(processes):
                own = share[number :: len(processes)]
                size = math.ceil(len(own) / 4) or 1
                for start in range(0, len(own), size):
                    group = own[start : start + size]
                    channel.teacher[group] = process
                    channel.group[group] = self.groups[process]
                    channel.group_size[group] = len(group)
                    self.groups[process] += 1

    def receive(self, rows: list[int]):
        """Take note of rows that the teacher has scored."""
        for row in rows:
            ticket = int(self.channel.ticket[row])
            self.in_flight.remove(ticket)
            self.scored[ticket] = row

    def batch(self, version: int):
        """Rows of the update after `version`: those that are due, in ticket order, then those that
        came first. None: not all are there yet.
        """
        size, share = self.config.batch_size, self.config.batch_size // self.config.nodes
        due = (version + 1 - self.config.window) * size  # tickets below it
        if min(self.in_flight, default=due) < due or len(self.scored) < share:
            return None
        chosen = sorted(self.scored, key=lambda ticket: min(ticket, due))[:share]
        return [self.scored[ticket] for ticket in chosen]

    def trained(self, tickets: list[int]):
        """Remember the tickets of an update, of all nodes, and free the rows of our own."""
        for ticket in tickets:
            if ticket in self.scored:
                self.free_rows.append(self.scored.pop(ticket))
        self.trained_ahead.update(tickets)
        while self.lowest in self.trained_ahead:
            self.trained_ahead.remove(self.lowest)
            self.lowest += 1

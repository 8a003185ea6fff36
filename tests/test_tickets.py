"""Claims about the order of rollouts: what may start, which rows make an update, what is left."""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.config import builtin
from support.data import Prompt
from teacher import ready_rows
from tickets import Tickets, may_start, teacher_of

CONFIG = builtin(batch_size=4, max_staleness=2, max_prompt_tokens=8, max_new_tokens=8)
PROMPTS = [Prompt("x", [5, 6]), Prompt("y", [7])]


class Queue(list):
    def put(self, rows):
        self.extend(rows)


def place(monkeypatch, node, count):
    """As torchrun says it to a process of node `node` of `count`."""
    monkeypatch.setenv("GROUP_RANK", str(node))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(count))


def books_of(config, version=0, trained_ahead=()):
    """Tickets, with what they use of a Channel in plain tensors."""
    rows = config.table_rows
    table = SimpleNamespace(
        tokens=torch.zeros(rows, config.max_sequence, dtype=torch.int32),
        prompt_len=torch.zeros(rows, dtype=torch.int32),
        ticket=torch.zeros(rows, dtype=torch.int64),
        to_generator=Queue(),
    )
    return Tickets(config, table, PROMPTS, version, trained_ahead)


def waiting(books):
    """The tickets that a generator could take, in order."""
    return sorted(books.channel.ticket[books.channel.to_generator].tolist())


def finish(books, tickets):
    """They come back from the teacher, in this order."""
    queue = books.channel.to_generator
    for ticket in tickets:
        (row,) = [row for row in queue if int(books.channel.ticket[row]) == ticket]
        queue.remove(row)
        books.receive([row])


def of_batch(books, version):
    rows = books.batch(version)
    return rows and books.channel.ticket[rows].tolist()


def test_ticket_n_starts_if_and_only_if_the_inequality_holds():
    for version in range(4):
        allowed = [n for n in range(100) if may_start(n, version, CONFIG)]
        assert allowed == list(range((version + 1 + 2) * 4))
    strict = replace(CONFIG, max_staleness=0)
    assert may_start(3, 0, strict) and not may_start(4, 0, strict) and may_start(4, 1, strict)


def test_rows_suffice_for_every_ticket_the_inequality_admits_and_no_more():
    books = books_of(CONFIG)
    books.issue(0)
    assert waiting(books) == list(range(12)) and not books.free_rows
    for version in range(5):
        finish(books, range(version * 4, version * 4 + 4))
        books.trained(of_batch(books, version))
        books.issue(version + 1)
        assert not books.free_rows and max(waiting(books)) == (version + 4) * 4 - 1


def test_a_row_gets_its_ticket_and_the_prompt_of_the_ticket():
    books = books_of(replace(CONFIG, samples_per_prompt=3))
    books.issue(0)
    table = books.channel
    texts = {}
    for row in table.to_generator:
        texts[int(table.ticket[row])] = table.tokens[row, : table.prompt_len[row]].tolist()
    found = [texts[ticket] for ticket in sorted(texts)]
    assert found[:3] == [found[0]] * 3 and found[3:6] == [found[3]] * 3
    assert sorted(map(tuple, (found[0], found[3]))) == [(5, 6), (7,)]


def test_no_ticket_of_an_update_after_the_last_is_issued():
    books = books_of(replace(CONFIG, steps=2))
    books.issue(0)
    assert waiting(books) == list(range(8))


def test_batch_order_waits_for_its_tickets_and_arrival_order_takes_what_is_there():
    for order, expected in (("batch", None), ("arrival", [3, 5, 8, 9])):
        books = books_of(replace(CONFIG, order=order))
        books.issue(0)
        for ticket in (3, 5, 8, 9):
            assert books.batch(0) is None
            finish(books, [ticket])
        assert of_batch(books, 0) == expected
        finish(books, [2, 1, 0])
        # Of the first to finish, or of the lowest tickets.
        assert of_batch(books, 0) == (expected or [0, 1, 2, 3])


def test_resume_issues_every_ticket_once_also_in_arrival_order():
    config = replace(CONFIG, order="arrival")
    books = books_of(config)
    books.issue(0)
    finish(books, (3, 5, 8, 9))
    books.trained(of_batch(books, 0))
    assert books.lowest == 0 and books.trained_ahead == {3, 5, 8, 9}
    again = books_of(config, 1, sorted(books.trained_ahead))
    again.issue(1)
    assert waiting(again) == [0, 1, 2, 4, 6, 7, 10, 11, 12, 13, 14, 15]


def test_resume_with_a_smaller_max_staleness_waits_for_free_rows():
    # 4 rows, and 7 tickets below 12 that were not trained.
    strict = replace(CONFIG, order="arrival", max_staleness=0)
    books = books_of(strict, 2, [13, 14, 15])
    issued = []
    for version in (2, 3, 4):
        books.issue(version)
        issued.append(waiting(books))
        finish(books, issued[-1])
        books.trained(of_batch(books, version))
    assert issued == [[5, 6, 7, 8], [9, 10, 11, 12], [16, 17, 18, 19]]


# ---- several nodes ------------------------------------------------------------------------------


def advance(monkeypatch, config, nodes, version, ahead, updates, shuffle):
    """That many updates of a run on `nodes` nodes: (tickets of each update, books of each node).

    `shuffle`: changes the order in which a node's rollouts come back.
    """
    books = []
    for node in range(nodes):
        place(monkeypatch, node, nodes)
        books.append(books_of(config, version, ahead))
    trained = []
    for update in range(version, version + updates):
        share = []
        for node, own in enumerate(books):
            place(monkeypatch, node, nodes)
            own.issue(update)
            tickets = waiting(own)
            assert all(may_start(ticket, update, config) for ticket in tickets)
            shuffle(tickets)
            finish(own, tickets[: config.batch_size // nodes])
            if config.order == "batch":
                finish(own, tickets[config.batch_size // nodes :])
            share += of_batch(own, update) or pytest.fail(f"node {node} waits for ever")
        for own in books:
            own.trained(share)
        assert all(own.trained_ahead == books[0].trained_ahead for own in books)
        assert all(own.lowest == books[0].lowest for own in books)
        trained.append(share)
    return trained, books


@pytest.mark.parametrize("order", ["batch", "arrival"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_nodes_together_train_the_tickets_of_one_and_keep_the_same_books(
    count, order, monkeypatch
):
    """Every ticket once, in batch order in its own update; a node has every n-th."""
    config = replace(CONFIG, batch_size=12, max_staleness=1, steps=4, order=order)
    shuffle = random.Random(0).shuffle
    updates, books = advance(monkeypatch, config, count, 0, (), 4, shuffle)
    assert sorted(itertools.chain(*updates)) == list(range(48))
    size = 12 // count
    for version, tickets in enumerate(updates):
        parts = [tickets[i : i + size] for i in range(0, 12, size)]
        owners = [{ticket % count for ticket in part} for part in parts]
        assert owners == [{node} for node in range(count)]
        assert order == "arrival" or sorted(tickets) == list(range(12 * version, 12 * version + 12))
    assert all(own.lowest == 48 and not own.trained_ahead for own in books)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_in_arrival_order_on_2_then_1_then_3_nodes_trains_every_ticket_once(
    seed, monkeypatch
):
    config = replace(CONFIG, batch_size=12, steps=9, order="arrival")
    shuffle = random.Random(seed).shuffle
    updates, ahead, counts = [], [], []
    for nodes in (2, 1, 3):
        done, books = advance(monkeypatch, config, nodes, len(updates), ahead, 3, shuffle)
        updates += done
        ahead = sorted(books[0].trained_ahead)
        counts.append(len(ahead))
    assert counts[0] and counts[1] and not counts[2]  # so there was something to remember
    assert sorted(itertools.chain(*updates)) == list(range(9 * 12))


def test_no_node_starves_when_a_resume_changes_nodes_and_max_staleness_at_once(monkeypatch):
    """One node had trained all odd tickets first. They would have been those of node 1."""
    config = replace(CONFIG, batch_size=12, max_staleness=0, steps=4, order="arrival")
    ahead = range(1, 24, 2)
    updates, _ = advance(monkeypatch, config, 2, 1, ahead, 3, lambda tickets: None)
    assert sorted([*ahead, *itertools.chain(*updates)]) == list(range(48))


def test_a_nodes_table_and_its_teachers_share_are_of_its_part_of_the_batch(monkeypatch):
    place(monkeypatch, 1, 2)
    config = builtin(batch_size=16, teachers=2, max_staleness=0, steps=2)
    assert config.table_rows == 8
    assert ready_rows({0: "a", 1: "b"}, 0, config) == ["a"]  # a quarter of the share of 4 rows


@pytest.mark.parametrize("nodes, teachers", [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_the_teachers_of_a_node_take_its_tickets_in_turns(nodes, teachers, monkeypatch):
    place(monkeypatch, 0, nodes)
    config = builtin(batch_size=12, teachers=teachers)
    for node in range(nodes):
        turns = [[] for _ in range(teachers)]
        for ticket in range(node, 48, nodes):
            teacher, turn = teacher_of(ticket, config)
            turns[teacher].append(turn)
        assert turns == [list(range(48 // nodes // teachers))] * teachers

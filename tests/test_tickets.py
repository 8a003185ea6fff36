"""Claims about the order of rollouts: what may start, which rows make an update, what is left."""

import itertools
import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.config import builtin
from support.data import Prompt
from teacher import ready_rows
from tickets import Tickets, may_start

CONFIG = builtin(batch_size=4, max_staleness=2, max_prompt_tokens=8, max_new_tokens=8)
PROMPTS = [Prompt("x", [5, 6]), Prompt("y", [7])]


class Queue(list):
    def put(self, rows):
        self.extend(rows)


def place(monkeypatch, node, count):
    """As torchrun says it to a process of node `node` of `count`."""
    monkeypatch.setenv("GROUP_RANK", str(node))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(count))


def books_of(config, version=0, trained_ahead=(), prompts=PROMPTS):
    """Tickets, with what they use of a Channel in plain tensors."""
    rows = config.table_rows
    names = ("prompt_len", "ticket", "teacher_prompt_len", "teacher", "group", "group_size")
    table = SimpleNamespace(
        tokens=torch.zeros(rows, config.max_sequence, dtype=torch.int32),
        teacher_tokens=torch.zeros(rows, config.max_teacher_sequence, dtype=torch.int32),
        to_generator=Queue(),
        **{name: torch.zeros(rows, dtype=torch.int64) for name in names},
    )
    return Tickets(config, table, prompts, version, trained_ahead)


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


def test_without_a_window_an_update_waits_for_its_tickets_and_with_a_large_one_for_none():
    for window, expected in ((0, None), (1, [3, 5, 8, 9]), (100, [3, 5, 8, 9])):
        books = books_of(replace(CONFIG, window=window))
        books.issue(0)
        for ticket in (3, 5, 8, 9):
            assert books.batch(0) is None
            finish(books, [ticket])
        assert of_batch(books, 0) == expected
        finish(books, [2, 1, 0])
        # Of the first to finish, or of the lowest tickets.
        assert of_batch(books, 0) == (expected or [0, 1, 2, 3])


def test_a_ticket_that_is_due_is_waited_for_and_then_comes_first():
    """A window of 2: ticket 1, of update 0, may miss the updates 0 and 1, and none more."""
    books = books_of(replace(CONFIG, window=2))
    for version in range(3):
        books.issue(version)
        on_time = [ticket for ticket in waiting(books) if ticket != 1]
        finish(books, on_time[:4])
        if version == 2:
            assert books.batch(2) is None
            finish(books, [1])
            assert of_batch(books, 2) == [1, *on_time[:3]]
        else:
            books.trained(of_batch(books, version))


def test_resume_issues_every_ticket_once_also_in_arrival_order():
    config = replace(CONFIG, window=100)
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
    strict = replace(CONFIG, window=100, max_staleness=0)
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
            while own.batch(update) is None:  # as few as possible
                finish(own, [tickets.pop(0)])
            share += of_batch(own, update) or pytest.fail(f"node {node} waits for ever")
        for own in books:
            own.trained(share)
        assert all(own.trained_ahead == books[0].trained_ahead for own in books)
        assert all(own.lowest == books[0].lowest for own in books)
        trained.append(share)
    return trained, books


@pytest.mark.parametrize("window", [0, 1, 100])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_nodes_together_train_the_tickets_of_one_and_keep_the_same_books(
    count, window, monkeypatch
):
    """Every ticket once, without a window in its own update; a node has every n-th."""
    config = replace(CONFIG, batch_size=12, max_staleness=1, steps=4, window=window)
    shuffle = random.Random(0).shuffle
    updates, books = advance(monkeypatch, config, count, 0, (), 4, shuffle)
    assert sorted(itertools.chain(*updates)) == list(range(48))
    size = 12 // count
    for version, tickets in enumerate(updates):
        parts = [tickets[i : i + size] for i in range(0, 12, size)]
        owners = [{ticket % count for ticket in part} for part in parts]
        assert owners == [{node} for node in range(count)]
        assert window or sorted(tickets) == list(range(12 * version, 12 * version + 12))
    assert all(own.lowest == 48 and not own.trained_ahead for own in books)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_in_arrival_order_on_2_then_1_then_3_nodes_trains_every_ticket_once(
    seed, monkeypatch
):
    config = replace(CONFIG, batch_size=12, steps=9, window=100)
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
    config = replace(CONFIG, batch_size=12, max_staleness=0, steps=4, window=100)
    ahead = range(1, 24, 2)
    updates, _ = advance(monkeypatch, config, 2, 1, ahead, 3, lambda tickets: None)
    assert sorted([*ahead, *itertools.chain(*updates)]) == list(range(48))


def test_a_nodes_table_and_its_teachers_share_are_of_its_part_of_the_batch(monkeypatch):
    place(monkeypatch, 1, 2)
    config = builtin(batch_size=16, teachers="2", max_staleness=0, steps=2)
    assert config.table_rows == 8
    books = books_of(config)
    books.issue(0)
    # A quarter of each teacher's 4 rows.
    assert books.channel.group_size.tolist() == [1] * 8
    assert groups_of(books) == {0: [[1], [5], [9], [13]], 1: [[3], [7], [11], [15]]}


@pytest.mark.parametrize("seed", range(20))
def test_no_trained_token_is_older_than_max_staleness_plus_window(seed, monkeypatch):
    """Whoever finishes first, on any number of nodes, with a resume in between that changes both.
    Some token is that old, or the rule would be too strict.
    """
    random.seed(seed)
    oldest = 0
    limits, window = (random.randint(1, 3), random.randint(0, 3)), random.randrange(5)
    config = replace(CONFIG, batch_size=6, max_staleness=limits[0], window=window, steps=60)

    def late(tickets):
        """Some tickets are slow: they come last, as long as the window allows it."""
        random.shuffle(tickets)
        tickets.sort(key=lambda ticket: ticket % 17 == 0)

    trained, books = advance(monkeypatch, config, random.choice([1, 2, 3]), 0, (), 30, late)
    ahead = sorted(books[0].trained_ahead)
    config = replace(config, max_staleness=limits[1])
    trained += advance(monkeypatch, config, random.choice([1, 2, 3]), 30, ahead, 30, late)[0]
    assert sorted(itertools.chain(*trained)) == list(range(360))
    for version, tickets in enumerate(trained):
        start, staleness = (30, limits[1]) if version >= 30 else (0, limits[0])
        # The oldest weights that may have sampled a ticket: the first that admit it.
        lags = [version - max(start, ticket // 6 - staleness) for ticket in tickets]
        assert max(lags) <= staleness + window
        oldest = max(oldest, *lags) if version < 30 else oldest
    assert oldest == limits[0] + window


# ---- teachers -----------------------------------------------------------------------------------


def groups_of(books):
    """{teacher process: [tickets of each group, in order]}."""
    table = books.channel
    found = defaultdict(lambda: defaultdict(list))
    for row in table.to_generator:
        found[int(table.teacher[row])][int(table.group[row])].append(int(table.ticket[row]))
    return {
        number: [sorted(groups[i]) for i in range(len(groups))] for number, groups in found.items()
    }


def of_three(names):
    """Settings with 3 processes of 2 teachers, and a prompt for each of `names`."""
    config = replace(CONFIG, teacher=("math=builtin", "code=student"), teachers="math=2,code=1")
    return config, [Prompt(f"{i}", [i], teacher=name) for i, name in enumerate(names)]


@pytest.mark.parametrize("batch_size", [1, 7, 12, 40])
def test_every_row_goes_to_a_process_of_its_teacher_and_the_work_is_even(batch_size):
    config, prompts = of_three(["math", "code", "math", "math", "code"])
    config = replace(config, batch_size=batch_size, max_staleness=1, steps=40)
    books = books_of(config, prompts=prompts)
    books.issue(0)
    table = books.channel
    for row in table.to_generator:
        name = books.prompt_of(int(table.ticket[row])).teacher
        assert config.teacher_processes[table.teacher[row]] == name
    for update in (0, 1):  # each name's tickets of an update are dealt evenly
        owners = [int(table.teacher[row]) for row in table.to_generator
                  if int(table.ticket[row]) // batch_size == update]  # fmt: skip
        assert 0 <= owners.count(0) - owners.count(1) <= 1
    sizes = [len(group) for groups in groups_of(books).values() for group in groups]
    assert sum(sizes) == 2 * batch_size and min(sizes) > 0
    # No group reaches over the end of an update.
    for groups in groups_of(books).values():
        assert all(len({ticket // batch_size for ticket in group}) == 1 for group in groups)


def test_who_scores_what_is_the_same_whenever_tickets_are_issued_and_after_a_resume():
    config, prompts = of_three(["math", "code", "math", "math", "code"])
    config = replace(config, batch_size=12, max_staleness=1, steps=40)
    together, apart = books_of(config, prompts=prompts), {}
    together.issue(0)  # updates 0 and 1 at once
    strict = replace(config, max_staleness=0)
    for version in (0, 1):  # one at a time, the second as after a resume
        books = books_of(strict, version, prompts=prompts)
        books.issue(version)
        for number, groups in groups_of(books).items():
            apart[number] = apart.get(number, []) + groups
    assert groups_of(together) == apart


def test_in_ticket_order_a_teacher_scores_whole_groups_in_their_order_whatever_comes_first():
    config = replace(CONFIG, batch_size=8, max_staleness=1)
    books = books_of(config)
    books.issue(0)
    table = books.channel
    row_of = {int(table.ticket[row]): row for row in table.to_generator}
    for seed in range(20):
        arrivals = list(range(16))
        random.Random(seed).shuffle(arrivals)
        here, scored = set(), []
        for ticket in arrivals:
            here.add(row_of[ticket])
            while rows := ready_rows(here, table, len(scored), config):
                scored.append(table.ticket[rows].tolist())
        assert scored == [[2 * i, 2 * i + 1] for i in range(8)] and not here


def test_with_a_window_a_teacher_scores_what_is_there():
    config = replace(CONFIG, batch_size=8, window=1)
    books = books_of(config)
    books.issue(0)
    here = {row for row in books.channel.to_generator if int(books.channel.ticket[row]) in (9, 3)}
    rows = ready_rows(here, books.channel, 0, config)
    assert books.channel.ticket[rows].tolist() == [3, 9] and not here
    assert ready_rows(here, books.channel, 0, config) == []

"""Public tests of exercise 4. Every ticket is looked at, one by one."""

import random

from claims import check, worth


def updates_of_tickets(batch_size: int, updates: int):
    """The update that trains each ticket, as a list over the tickets."""
    return [update for update in range(updates) for _ in range(batch_size)]


def check_admitted(student, batch_size: int, max_staleness: int, version: int, nodes: int = 1):
    """may_start admits what is no staler than allowed, and all of it."""
    settings = {"batch_size": batch_size, "max_staleness": max_staleness}
    update_of = updates_of_tickets(batch_size, version + max_staleness + 4)
    found = student.admitted(settings, version, len(update_of), nodes - 1, nodes)
    for ticket, update in enumerate(update_of):
        lag = update - version  # update v makes version v + 1: it trains weights of version v
        what = (
            f"batch_size {batch_size}, max_staleness {max_staleness}: ticket {ticket} belongs to "
            f"update {update}, so weights of version {version} are "
            + (f"{lag} updates behind it" if lag >= 0 else "ahead of it")
        )
        if lag > max_staleness:
            check(ticket not in found, f"{what}, and it may start")
        else:
            check(ticket in found, f"{what}, and it may not start")


def run(student, settings: dict, seed: int = 0, training: int = 3):
    """The entries of a whole pipeline. Checks that it came to its end."""
    lengths = random.Random(seed)
    responses = [lengths.randint(1, 9) for _ in range(101)]
    entries = student.pipeline(settings, responses, training)
    updates = len({update for update, *_ in entries})
    steps = settings["steps"]
    check(updates == steps, f"the run stands still after {updates} of {steps} updates")
    return entries


@worth(1)
def test_without_staleness_an_update_waits_for_its_own_weights(student):
    """With max_staleness 0 weights of version v sample the tickets up to those of update v."""
    for version in range(4):
        check_admitted(student, 4, 0, version)


@worth(1)
def test_a_rollout_starts_as_soon_as_it_is_not_too_stale(student):
    """A ticket may start if and only if it is trained at most max_staleness updates later."""
    for max_staleness in (1, 2, 5):
        for version in range(4):
            check_admitted(student, 4, max_staleness, version)


@worth(1)
def test_without_a_window_an_update_waits_for_its_own_tickets(student):
    """A window of 0: when all tickets of the update are there, their rows, in ticket order."""
    settings = {"batch_size": 4, "max_staleness": 2, "window": 0}
    arrivals = [(6, 3), (9, 8), (4, 11), (8, 0), (7, 5), (10, 1), (5, 2)]
    found = student.batches(settings, 1, arrivals)
    check(
        found[:-1] == [None] * 6,
        f"update 1 has the tickets 4 to 7, and ticket 5 has not come; still batch returns "
        f"{next((rows for rows in found[:-1] if rows is not None), None)}",
    )
    check(
        found[-1] == [11, 2, 3, 5],
        f"tickets 4, 5, 6, 7 of update 1 are in the rows 11, 2, 3, 5; batch returns {found[-1]}",
    )


@worth(1)
def test_with_a_window_the_first_to_come_are_trained_but_what_is_due_is_waited_for(student):
    """A window of 2: the rows that came first, and before them those of tickets that are due."""
    settings = {"batch_size": 4, "max_staleness": 2, "window": 2}
    arrivals = [(6, 3), (9, 8), (4, 11), (8, 0), (7, 5), (10, 1), (5, 2)]
    found = student.batches(settings, 1, arrivals)
    check(
        found[:3] == [None] * 3,
        f"3 rollouts of 4 have come, and batch has returned {found[:3]}",
    )
    check(len(found) == 7, "batch was not asked after each of 7 arrivals")
    for rows in found[3:]:
        check(
            rows == [3, 8, 11, 0],
            f"update 1, window 2: nothing is due; 3, 8, 11 and 0 are the rows that came first, in "
            f"this order; batch returns {rows}",
        )
    arrivals = [(13, 3), (12, 8), (16, 11), (14, 0), (7, 5), (5, 2), (15, 1)]
    found = student.batches(settings, 3, arrivals, late=(5, 7))
    check(
        found[:5] == [None] * 5,
        f"update 3, window 2: the tickets 5 and 7 are due, and 5 has not come; batch returns "
        f"{next((rows for rows in found[:5] if rows is not None), None)}",
    )
    for rows in found[5:]:
        check(
            rows == [2, 5, 3, 8],
            f"update 3, window 2: the due tickets 5 and 7 are in the rows 2 and 5, the first to "
            f"come after them in 3 and 8; batch returns {rows}",
        )


@worth(1)
def test_the_lag_of_a_run_reaches_the_limit_and_stays_within(student):
    """In a whole run no rollout is more than max_staleness updates old, and some are that old."""
    for limit in (0, 1, 3):
        settings = {"batch_size": 4, "max_staleness": limit, "steps": 12, "refresh": "batch"}
        lags = [update - sampled for update, _, sampled, _ in run(student, settings)]
        check(
            max(lags) == limit,
            f"max_staleness {limit}: the largest lag of a run is {max(lags)}, {limit} is right",
        )

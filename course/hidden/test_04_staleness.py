"""Hidden tests of exercise 4."""

from claims import check, worth
from test_04_staleness import check_admitted, run


@worth(1)
def test_the_rule_at_other_sizes(student):
    """The rule holds for any batch size and any version, a batch of one rollout included."""
    for batch_size in (1, 3, 8):
        for max_staleness in (0, 1, 7):
            for version in (0, 1, 5, 40):
                check_admitted(student, batch_size, max_staleness, version)


@worth(1)
def test_the_rule_is_the_same_on_every_node(student):
    """Ticket numbers and batch_size count the rollouts of all nodes, so the rule does too."""
    for nodes in (2, 4):
        check_admitted(student, 8, 1, 2, nodes)


@worth(1)
def test_a_node_has_its_share_of_an_update(student):
    """Node k of n trains its own tickets of the update, batch_size / n of them."""
    settings = {"batch_size": 6, "max_staleness": 1}
    arrivals = [(8, 4), (12, 1), (6, 0), (14, 5), (10, 2)]  # node 0 has the even tickets
    for window, right in ((0, [0, 4, 2]), (9, [4, 1, 0])):
        found = student.batches(settings | {"window": window}, 1, arrivals, 0, 2)
        waits = 2 if window else 4
        check(
            found[:waits] == [None] * waits,
            f"node 0 of 2, window {window}: its share has not come, batch returns {found[:waits]}",
        )
        check(
            found[-1] == right,
            f"node 0 of 2, window {window}: the rows {right} are right, batch returns {found[-1]}",
        )
    arrivals = [(17, 3), (13, 1), (15, 2)]
    found = student.batches(settings | {"window": 0}, 2, arrivals, 1, 2)
    check(
        found == [None, None, [1, 2, 3]],
        f"node 1 of 2, window 0: after each arrival batch returns {found}",
    )
    arrivals = [(19, 3), (21, 1), (23, 2), (7, 0)]  # below (3 + 1 - 2) * 6 the others are due
    found = student.batches(settings | {"window": 2}, 3, arrivals, 1, 2, late=(7,))
    check(
        found == [None, None, None, [0, 3, 1]],
        f"node 1 of 2, window 2, ticket 7 is due: after each arrival batch returns {found}",
    )


@worth(1)
def test_whole_runs_at_other_sizes(student):
    """Runs of either refresh end, train each ticket in its update, and keep the limit."""
    for refresh in ("in_flight", "batch"):
        for batch_size, limit, training in ((1, 0, 1), (3, 2, 20), (8, 4, 1), (5, 1, 6)):
            settings = {"batch_size": batch_size, "max_staleness": limit, "steps": 9}
            entries = run(student, settings | {"refresh": refresh}, batch_size, training)
            what = f"{settings}, refresh {refresh}"
            found = [ticket for _, ticket, *_ in entries]
            check(found == list(range(9 * batch_size)), f"{what}: it trains the tickets {found}")
            worst = max(update - sampled for update, _, sampled, _ in entries)
            check(worst <= limit, f"{what}: a lag of {worst} is more than max_staleness")


@worth(1)
def test_runs_with_a_window(student):
    """A run trains each ticket at most once, starts none before its time, and waits for a slow one
    if it must, so that no lag is above max_staleness + window."""
    responses = [1, 1, 1, 1, 200, 1, 1, 1]
    for window in (0, 1, 3, 100):
        settings = {"batch_size": 4, "max_staleness": 2, "steps": 12, "window": window}
        entries = student.pipeline(settings, responses, 2)
        what = f"window {window}"
        updates = len({update for update, *_ in entries})
        check(updates == 12, f"{what}: the run stands still after {updates} of 12 updates")
        tickets = [ticket for _, ticket, *_ in entries]
        check(len(set(tickets)) == 48, f"{what}: 12 updates train the tickets {sorted(tickets)}")
        first = [ticket for update, ticket, *_ in entries if update == 1]
        check(
            (4 in first) == (window == 0),
            f"{what}: ticket 4, which is slow, belongs to update 1, which trains {first}",
        )
        early = [
            (ticket, sampled) for _, ticket, sampled, _ in entries if ticket // 4 - sampled > 2
        ]
        check(not early, f"{what}: (ticket, version that sampled it) {early[:3]} start too early")
        worst = max(update - sampled for update, _, sampled, _ in entries)
        check(worst <= 2 + window, f"{what}: a lag of {worst} is above max_staleness + window")

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
    for order, right in (("batch", [0, 4, 2]), ("arrival", [4, 1, 0])):
        found = student.batches(settings | {"order": order}, 1, arrivals, 0, 2)
        waits = 4 if order == "batch" else 2
        check(
            found[:waits] == [None] * waits,
            f"node 0 of 2, order {order}: its share has not come, batch returns {found[:waits]}",
        )
        check(
            found[-1] == right,
            f"node 0 of 2, order {order}: the rows {right} are right, batch returns {found[-1]}",
        )
    arrivals = [(17, 3), (13, 1), (15, 2)]
    found = student.batches(settings | {"order": "batch"}, 2, arrivals, 1, 2)
    check(
        found == [None, None, [1, 2, 3]],
        f"node 1 of 2, order batch: after each arrival batch returns {found}",
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
def test_runs_in_arrival_order(student):
    """A run in arrival order trains each ticket at most once, never waits for a slow one, and
    starts none before its time."""
    settings = {"batch_size": 4, "max_staleness": 2, "steps": 12, "order": "arrival"}
    entries = student.pipeline(settings, [1, 1, 1, 1, 1, 1, 1, 200], 2)
    updates = len({update for update, *_ in entries})
    check(updates == 12, f"the run stands still after {updates} of 12 updates")
    tickets = [ticket for _, ticket, *_ in entries]
    check(len(set(tickets)) == 48, f"12 updates of 4 train the tickets {sorted(tickets)}")
    first = [ticket for update, ticket, *_ in entries if update == 1]
    check(7 not in first, f"update 1 waits for the slow ticket 7: it trains {first}")
    early = [(ticket, version) for _, ticket, version, _ in entries if ticket // 4 - version > 2]
    check(not early, f"(ticket, version that sampled it) {early[:3]}: these start too early")

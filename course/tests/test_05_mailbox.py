"""Public tests of exercise 5. Instead of hoping for a race, they try every order of events."""

import itertools

import torch

from claims import check, worth

P = 6


def parameters(version: int):
    """All parameters of a version, P numbers that no other version has."""
    return 10.0 * version + torch.arange(P) / P


def parts_of(version: int):
    """The same in parts of different shapes."""
    whole = parameters(version)
    return [whole[:1].view(1, 1), whole[1:5].view(2, 2), whole[5:]]


def holding(older: int, newer: int):
    """The memory [2,P] when these two versions lie in it."""
    rows = [None, None]
    rows[older % 2], rows[newer % 2] = parameters(older), parameters(newer)
    return torch.stack(rows)


def name_of(found):
    """What a test says about parameters: the versions that their entries belong to."""
    versions = [int(number // 10) for number in found.tolist()]
    if len(set(versions)) == 1 and torch.equal(found, parameters(versions[0])):
        return f"version {versions[0]}"
    return f"entries of the versions {versions}" if len(set(versions)) > 1 else f"{found.tolist()}"


def name_of_schedule(schedule, unit: str):
    """What a test says about a writer: what it does while pick_up looks at the memory."""
    steps = [(look, count) for look, count in enumerate(schedule, 1) if count]
    said = [f"by {count} {unit}{'s' * (count > 1)} at look {look}" for look, count in steps[:3]]
    if not said:
        return "the writer rests"
    return f"the writer goes on {', '.join(said)}{', and so on' if len(steps) > 3 else ''}"


def check_pick_up(student, states, schedules, unit: str = "version"):
    """Under every schedule the parameters are whole, of the version returned, and not old."""
    results = student.picked_up(states, schedules)
    for schedule, (version, flat, last) in zip(schedules, results, strict=True):
        what = name_of_schedule(schedule, unit)
        is_whole = torch.equal(flat, parameters(version))
        check(is_whole, f"{what}: pick_up returns {version}, and flat has {name_of(flat)}")
        first = states[0][0]
        check(
            first <= version <= last,
            f"{what}: pick_up returns {version}; the mailbox went from {first} to {last}",
        )


@worth(1)
def test_a_version_lies_in_the_mailbox_after_publish(student):
    """After publish the mailbox has the new version: its number and parts, taken one by one."""
    for new in (2, 3):
        moments = student.published(holding(new - 2, new - 1), new - 1, [(new, parts_of(new))])
        version, weights = moments[-1]
        check(version == new, f"after publish of version {new} the mailbox says {version}")
        found = weights[new % 2]
        check(
            torch.equal(found, parameters(new)),
            f"after publish of version {new}, weights[{new % 2}] has {name_of(found)}",
        )
    held = student.parts_held(holding(0, 1), 2, [torch.ones(1)] * P)
    check(held <= 2, f"publish keeps {held} of {P} parts at the same time")


@worth(1)
def test_a_reader_finds_a_whole_version_at_any_moment_of_publish(student):
    """While publish is at work, the version that the mailbox names is there, whole."""
    publications = [(version, parts_of(version)) for version in range(2, 6)]
    moments = student.published(holding(0, 1), 1, publications)
    named = sorted({version for version, _ in moments})
    check(named == [1, 2, 3, 4, 5], f"versions 2 to 5 are published after 1; readers see {named}")
    for version, weights in moments:
        found = weights[version % 2]
        what = f"during publish the mailbox says {version}, and weights[{version % 2}] has"
        check(torch.equal(found, parameters(version)), f"{what} {name_of(found)}")


@worth(1)
def test_the_newest_version_is_picked_up(student):
    """With no writer at work pick_up copies the newest version and returns its number."""
    for newest in (1, 2, 7):
        state = newest, holding(newest - 1, newest)
        check_pick_up(student, [state], [()])


@worth(2)
def test_no_writer_can_make_a_reader_mix_two_versions(student):
    """Whatever is published meanwhile, pick_up returns one whole version and its number."""
    states = [(version, holding(version - 1, version)) for version in range(1, 14)]
    schedules = list(itertools.product(range(3), repeat=6))  # versions published at looks 1 to 6
    check_pick_up(student, states, schedules)

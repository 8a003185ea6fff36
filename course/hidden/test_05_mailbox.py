"""Hidden tests of exercise 5."""

import itertools

import torch

from claims import check, worth
from test_05_mailbox import P, check_pick_up, holding, name_of, parameters, parts_of


def states_of_a_writer(versions):
    """The memory after every step of a right writer that copies in two halves."""
    first = versions[0]
    weights = holding(first - 1, first)
    states = [(first, weights.clone())]
    for version in versions[1:]:
        for half in (slice(0, P // 2), slice(P // 2, P)):
            weights[version % 2, half] = parameters(version)[half]
            states.append((version - 1, weights.clone()))
        states.append((version, weights.clone()))
    return states


@worth(1)
def test_the_first_version_of_a_resumed_run(student):
    """A run may begin with any version, and the next ones follow; parts may be a single tensor."""
    for first in (17, 18):
        publications = [(first, parts_of(first)), (first + 1, [parameters(first + 1)])]
        moments = student.published(torch.zeros(2, P), 0, publications)
        version, weights = moments[-1]
        check(version == first + 1, f"after publish of {first + 1} the mailbox says {version}")
        for number in (first, first + 1):
            found = weights[number % 2]
            check(
                torch.equal(found, parameters(number)),
                f"weights[{number % 2}] has {name_of(found)}, not version {number}",
            )
    held = student.parts_held(torch.zeros(2, 40), 18, [torch.ones(1, 2)] * 20)
    check(held <= 2, f"publish keeps {held} of 20 parts at the same time")


@worth(2)
def test_a_writer_that_is_half_way(student):
    """A reader that the writer overtakes by a version and a half does not return the mixture."""
    states = states_of_a_writer(range(1, 6))
    schedules = list(itertools.product((0, 1, 2, 3, 4, 5), repeat=3))
    check_pick_up(student, states, schedules, "step")


@worth(1)
def test_a_writer_that_overtakes_again_and_again(student):
    """A reader that is overtaken twenty times in a row makes its copy once more each time."""
    states = [(version, holding(version - 1, version)) for version in range(1, 64)]
    schedules = [(0, 2) * 20, (0, 2, 0) * 20, (0, 2, 1) * 20, (1, 1) * 20, (1, 2) * 20]
    check_pick_up(student, states, schedules)


@worth(1)
def test_publish_and_pick_up_together(student):
    """A reader that meets your publish at any of its steps picks up one whole version."""
    publications = [(version, parts_of(version)) for version in range(2, 7)]
    states = student.published(holding(0, 1), 1, publications)
    schedules = list(itertools.product((0, 1, 2, 4, 5), repeat=4))
    check_pick_up(student, states, schedules, "step")

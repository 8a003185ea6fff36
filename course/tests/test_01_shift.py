"""Public tests of exercise 1."""

import tiny
from claims import check, close, worth


@worth(2)
def test_every_response_token_is_predicted_once(student):
    """There are as many predicting positions as response tokens."""
    found = student.positions(5, 9)
    check(len(found) == 4, f"a prompt of 5 and a response of 4 tokens give {len(found)} positions")


@worth(2)
def test_the_first_token_is_predicted_by_the_prompt(student):
    """The first response token is predicted at the last prompt token, each other one step on."""
    found = student.positions(5, 9)
    check(found == [4, 5, 6, 7], f"a prompt of 5 and a response of 4 tokens give {found}")


@worth(2)
def test_the_frozen_scores_come_out(student):
    """With your functions the teacher gives the frozen rollouts the scores that they have."""
    table = tiny.frozen_table()
    found = student.teacher_scores()
    for row in range(len(table.length)):
        count = int(table.length[row] - table.prompt_len[row])
        what = f"teacher_logp of row {row}"
        close(found[row, :count], table.teacher_logp[row, :count], what, 1e-4)

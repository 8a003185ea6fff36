"""Hidden tests of exercise 1."""

import torch

import tiny
from claims import check, close, worth


def expected_hidden(rows, tokens, table):
    """Hidden states of one row at a time, unpadded."""
    model = tiny.builtin("teacher")
    parts = []
    for row in rows:
        ids = tokens[row, : table.length[row]].long()[None]
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        parts.append(hidden[table.prompt_len[row] - 1 : -1])
    return torch.cat(parts)


@worth(1)
def test_a_response_of_one_token(student):
    """A response of one token has one predicting position, the last of the prompt."""
    found = student.positions(3, 4)
    check(found == [2], f"a prompt of 3 and a response of 1 token give {found}")


@worth(1)
def test_rows_keep_their_order_and_share_a_forward_pass(student):
    """Rows of different lengths come out one after the other, as each alone would."""
    table = tiny.frozen_table()
    rows = [7, 2, 9, 0]
    expected = expected_hidden(rows, table.tokens, table)
    close(student.hidden_of(rows), expected, "the hidden states of rows 7, 2, 9 and 0", 1e-4)


@worth(1)
def test_positions_come_from_lengths_not_from_the_pad_id(student):
    """A pad id inside of a response is a token like any other, and what lies behind is none."""
    table = tiny.frozen_table()
    tokens = table.tokens.clone()
    pad = tiny.builtin("teacher").config.pad_token_id or 0
    row = int(table.length.argmin())
    tokens[row, table.prompt_len[row]] = pad
    tokens[row, table.length[row] :] = 7
    other = int(table.length.argmax())
    expected = expected_hidden([row, other], tokens, table)
    found = student.hidden_of([row, other], tokens)
    close(found, expected, "the hidden states of a response with a pad id in it", 1e-4)


@worth(1)
def test_no_rows_give_no_positions(student):
    """Without rows the result has no positions, and the model has run all the same; with one row it
    has that row's."""
    found = student.hidden_of([])
    size = tiny.builtin("teacher").config.hidden_size
    check(tuple(found.shape) == (0, size), f"no rows give the shape {tuple(found.shape)}")
    table = tiny.frozen_table()
    expected = expected_hidden([3], table.tokens, table)
    close(student.hidden_of([3]), expected, "the hidden states of row 3 alone", 1e-4)

"""Exercise 1: the one-token shift."""

import torch


def positions(prompt_len: int, length: int):
    """The positions that predict the response, as a list."""
    from model import predicting_positions

    return list(range(length))[predicting_positions(prompt_len, length)]


@torch.no_grad()
def hidden_of(rows, tokens=None, length=None):
    """response_hidden of the built-in teacher on rows of the frozen table: [T,F].

    `tokens` and `length` take the place of the table's.
    """
    import tiny

    from model import response_hidden

    table = tiny.frozen_table()
    table.tokens = table.tokens if tokens is None else tokens
    table.length = table.length if length is None else length
    return response_hidden(tiny.builtin("teacher"), table, rows)


def teacher_scores():
    """teacher_logp of the frozen table, as teacher.Teacher computes it with your functions."""
    import tiny

    from support.config import builtin
    from teacher import Teacher

    table = tiny.frozen_table()
    table.teacher_logp = torch.zeros_like(table.teacher_logp)
    config = builtin(loss="stratified_reverse_kl", top_k=4, num_samples=4, teacher_cache_mb=0)
    model = tiny.builtin("teacher")
    teacher = Teacher(model, config, model.config.vocab_size)
    teacher.score(table, list(range(len(table.length))))
    return table.teacher_logp

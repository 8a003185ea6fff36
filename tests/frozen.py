"""A small frozen rollout table for the tests of the teacher and the learner.

The tokens are written down here. Candidates and scores come from plain transformers and plain
torch. So a fault in sampling, attention or the cache fails the tests of the generator alone.
"""

import torch
from conftest import load, make_table

from channel import LENGTH, STOP, Rollout
from losses import make_loss

MAX_NEW = 12
STOPS = {1, 60, 61}
A = [69, 117, 2, 85, 133, 3]
B = [21, 22, 2, 40, 41, 2, 50, 51, 3]
C = [100]
D = [7, 8, 9, 3]
ROLLOUTS = [  # prompt, response; three are cut at MAX_NEW, the others end with a stop token
    (A, [86, 98, 141, 141, 158, 8, 75, 89, 49, 108, 89, 78]),
    (B, [169, 18, 133, 36, 124, 59, 169, 75, 109, 72, 60]),
    (C, [17, 11, 100, 109, 137, 149, 26, 106, 154, 82, 96, 80]),
    (D, [61]),
    (A, [149, 98, 0, 3, 111, 145, 45, 0, 1]),
    (B, [64, 22, 17, 152, 165, 134, 6, 105, 90, 38, 85, 57]),
    (C, [75, 90, 60]),
    (D, [10, 142, 64, 32, 85, 1]),
]
ROWS = list(range(len(ROLLOUTS)))


def response_logp(path, prompt, response, temperature=1.0):
    """log-probabilities [n,V] at every token of a response, by a plain forward pass."""
    with torch.no_grad():
        logits = load(path)(torch.tensor([prompt + response])).logits[0] / temperature
    return torch.stack([logits[len(prompt) - 1 + r].log_softmax(-1) for r in range(len(response))])


def full_logp(path, table, row, temperature=1.0):
    """The same of a row of a table."""
    tokens, prompt_len = table.tokens[row, : table.length[row]].tolist(), int(table.prompt_len[row])
    return response_logp(path, tokens[:prompt_len], tokens[prompt_len:], temperature)


def candidates(logp, response, loss, generator):
    """What a sampler with logp [n,V] proposes for a response: ids and their logp, [n,C]."""

    def draw(probs, count):
        if count == 0:
            return response[:, :0]
        return torch.multinomial(probs, count, replacement=True, generator=generator)

    probs = logp.exp()
    top = logp.topk(loss.sampler_top).indices
    ids = torch.cat([response, draw(probs, loss.draws.stop - 1), top], 1)
    rest = probs.scatter(1, top, 0.0)
    tail = draw(rest, loss.tail.stop - loss.tail.start)
    tail_logp = (rest / rest.sum(-1, keepdim=True)).gather(1, tail).log()
    return torch.cat([ids, tail], 1), torch.cat([logp.gather(1, ids), tail_logp], 1)


def unscored_table(student, config):
    """The frozen rollouts with the candidates of the model `student`, as the teacher gets them."""
    loss = make_loss(config)
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for ticket, (prompt, response) in enumerate(ROLLOUTS):
        logp = response_logp(student, prompt, response, config.temperature)
        ids, ids_logp = candidates(logp, torch.tensor(response)[:, None], loss, generator)
        finish = STOP if response[-1] in STOPS else LENGTH
        rollouts.append(Rollout(prompt, ticket, 0, finish, [0] * len(response), ids, ids_logp))
    return make_table(rollouts, config.num_candidates, MAX_NEW, 16)


def frozen_table(student, teacher, config):
    """The same with the scores of the model `teacher`, as the learner gets it."""
    table = unscored_table(student, config)
    loss = make_loss(config)
    for row in ROWS:
        logp = full_logp(teacher, table, row, config.temperature)
        ids = table.candidate_ids[row, : len(logp)]
        if loss.teacher_top:
            ids[:, loss.top] = logp.topk(loss.teacher_top).indices.int()
        table.teacher_logp[row, : len(logp)] = logp.gather(1, ids.long())
    return table

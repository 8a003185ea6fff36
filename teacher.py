"""The frozen teacher: scores rollouts in token-budget batches, remembers its top-k in an LRU cache.

    n  response positions of one rollout     C  candidates     K  top-k     D  hidden size     V  vocabulary

`Teacher.score` fills `teacher_logp` of rows of the rollout table: the log-probability of every candidate id the
student proposed or, for forward KL, of the teacher's own top-K ids, which it writes to `candidate_ids`.

The frozen teacher never changes its mind, so a cached sequence never goes stale. It pays where sequences recur:
several epochs or samples of short answers. A hit is exact or it is no hit: student-chosen ids are served only if
every one of them is among the cached ids.

Left out: teachers above one GPU, several teachers.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from channel import Channel
from config import Config
from kernels.head import gather, logit_chunks
from log import Timeline
from model import compute_dtype, head_weight, last_hidden, load_model, shared_vocabulary


def predicting_positions(prompt_len: int, length: int) -> slice:
    """Sequence indices whose hidden states predict the response: token r is predicted at prompt_len - 1 + r.

    The one-token shift of the whole project. `length` counts prompt and response, stop token included.
    """
    return slice(prompt_len - 1, length - 1)


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest, stays within `budget` tokens, at most a third of them padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        longest = lengths[batches[-1][0]] if batches else 0
        if 3 * lengths[i] >= 2 * longest > 0 and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def response_hidden(model, table: Channel, rows: list[int]) -> Tensor:
    """Hidden states at every response position of `rows`, one after the other: [sum n, D]. Right-padded, no mask."""
    spans = [(int(table.prompt_len[row]), int(table.length[row])) for row in rows]
    width = max(length for _, length in spans)
    hidden = last_hidden(model, table.tokens[rows, :width].to(model.device, torch.int64))
    return torch.cat([hidden[i, predicting_positions(*span)] for i, span in enumerate(spans)])


class TopKCache:
    """Least-recently-used map: a sequence -> the teacher's (ids int32 [n,1+K], logp float32 [n,1+K]) at its response.

    Column 0 is the sequence's own next token, the others are the teacher's top-K. Bounded in bytes.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes, self.entries = max_bytes, 0, OrderedDict()
        self.hits = self.misses = self.evictions = 0

    def get(self, key: bytes, wanted: Tensor) -> Tensor | None:
        """Log-probabilities of ids `wanted` [n,C] after sequence `key`, or None unless every one is known exactly."""
        found = None
        if key in self.entries:
            self.entries.move_to_end(key)
            ids, logp = self.entries[key]
            match = wanted[:, :, None] == ids[:, None, :]  # [n,C,1+K]
            if match.any(-1).all():
                found = logp.gather(1, match.int().argmax(-1))
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: bytes, ids: Tensor, logp: Tensor):
        size = len(key) + ids.nbytes + logp.nbytes
        if size > self.max_bytes or key in self.entries:
            return
        self.entries[key] = (ids, logp)
        self.bytes += size
        while self.bytes > self.max_bytes:
            old, tensors = self.entries.popitem(last=False)
            self.bytes -= len(old) + sum(t.nbytes for t in tensors)
            self.evictions += 1


class Teacher:
    """Scores rows of a rollout table: a Channel, or anything with its fields."""

    def __init__(self, model, config: Config, vocab: int):
        self.model, self.config, self.vocab = model, config, vocab
        self.own_ids = config.loss == "forward_kl"  # the teacher proposes; else it scores what the student proposed
        columns = config.columns["total"].stop
        self.top_k = config.top_k if self.own_ids else min(vocab, 4 * columns) * (config.teacher_cache_mb > 0)
        self.cache = TopKCache(config.teacher_cache_mb * 2**20)

    @torch.no_grad()
    def score(self, table: Channel, rows: list[int]):
        """Fill teacher_logp [n,C] of `rows` and, for forward KL, the top-K columns of candidate_ids."""
        missing = [row for row in rows if not self._from_cache(table, row)]
        for group in token_batches([int(table.length[row]) for row in missing], self.config.micro_batch_tokens):
            self._compute(table, [missing[i] for i in group])

    def _views(self, table: Channel, row: int) -> tuple[bytes, Tensor, Tensor]:
        """Cache key of a row, and its candidate_ids and teacher_logp as views [n,C]."""
        prompt_len, length = int(table.prompt_len[row]), int(table.length[row])
        key = prompt_len.to_bytes(4, "little") + table.tokens[row, :length].numpy().tobytes()
        count = length - prompt_len
        return key, table.candidate_ids[row, :count], table.teacher_logp[row, :count]

    def _from_cache(self, table: Channel, row: int) -> bool:
        if not self.cache.max_bytes:
            return False
        key, ids, logp = self._views(table, row)
        if self.own_ids and key in self.cache.entries:
            ids.copy_(self.cache.entries[key][0])
        found = self.cache.get(key, ids)
        if found is not None:
            logp.copy_(found)
        return found is not None

    def _compute(self, table: Channel, rows: list[int]):
        views = [self._views(table, row) for row in rows]
        hidden = response_hidden(self.model, table, rows)
        given = 1 if self.own_ids else self.config.columns["total"].stop  # columns of candidate_ids that are filled in by now
        wanted = torch.cat([ids[:, :given] for _, ids, _ in views]).to(hidden.device, torch.int64)
        weight, config = head_weight(self.model)[: self.vocab], self.config
        known_ids, known_logp, scored = [], [], []
        for part, logits in logit_chunks(hidden, weight.to(hidden.dtype), 1.0 / config.temperature, config.head_chunk):
            ids = torch.cat([wanted[part], logits.topk(self.top_k, dim=-1).indices], 1)
            logp, known = gather(logits, ids)[0].float().cpu(), [0, *range(given, ids.shape[1])]
            known_ids.append(ids[:, known].int().cpu())
            known_logp.append(logp[:, known])
            scored.append(logp[:, :given])
            del logits  # before the next chunk's are made
        counts = [len(ids) for _, ids, _ in views]
        known_ids, known_logp = torch.cat(known_ids).split(counts), torch.cat(known_logp).split(counts)
        scored = known_logp if self.own_ids else torch.cat(scored).split(counts)
        for i, (key, ids, logp) in enumerate(views):
            logp.copy_(scored[i])
            if self.own_ids:
                ids.copy_(known_ids[i])
            self.cache.put(key, known_ids[i].clone(), known_logp[i].clone())


def ready_rows(waiting: dict[int, int], next_ticket: int, config: Config) -> list[int]:
    """Which of the waiting rows (ticket -> row) to score now, in ticket order.

    In arrival order, all. In batch order whole groups of consecutive tickets, a quarter of a batch each, so that
    which rollouts share a forward pass, and so every last bit of the scores, does not depend on timing.
    """
    if config.order == "arrival":
        return [waiting[ticket] for ticket in sorted(waiting)]
    size = max(1, config.batch_size // 4)
    group = range(next_ticket, min(next_ticket + size, (next_ticket // config.batch_size + 1) * config.batch_size))
    return [waiting[ticket] for ticket in group] if all(ticket in waiting for ticket in group) else []


def run(config: Config, channel: Channel, first_ticket: int, device: torch.device, trace: Path):
    """The teacher process, until rank 0 says stop or is gone.

    1. take finished rows from the generators   2. score those that are ready   3. pass them on to the learner
    """
    vocab = shared_vocabulary(config)[2]
    model = load_model(config.teacher_path, compute_dtype(config, device), device)
    teacher = Teacher(model, config, vocab)
    place = config.generators
    timeline = Timeline(channel.busy[place : place + 1], trace, place, "teacher")
    waiting: dict[int, int] = {}
    next_ticket = first_ticket
    while channel.running():
        timeout = 0.02
        while (row := channel.to_teacher.get(timeout)) is not None:
            waiting[int(channel.ticket[row])] = row
            timeout = 0.0
        while rows := ready_rows(waiting, next_ticket, config):
            with timeline.span("score"):
                teacher.score(channel, rows)
            for row in rows:
                del waiting[int(channel.ticket[row])]
            next_ticket += len(rows)
            channel.to_learner.put(rows)
            cache = teacher.cache
            channel.cache_stats.copy_(torch.tensor([cache.hits, cache.misses, cache.bytes, cache.evictions]))
        timeline.flush()
    timeline.flush()

"""The frozen teacher: scores rollouts in batches and remembers its top ids in an LRU cache.

Letters of shapes: serial.py; M tokens of one response, T of all in a batch.

`Teacher.score` fills `teacher_logp` of rows of the rollout table: the log-probability of every
candidate that the student proposed or, for forward KL, of the teacher's own top K, whose ids it
writes to `candidate_ids`.

The teacher is frozen, so a cached sequence never goes stale. The cache pays where sequences recur:
several epochs, or several samples of short answers. It is a hit only if every requested id is
cached.

Left out: several teacher models.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from channel import Channel
from checks import load_model
from config import Config
from kernels.head import gather, logit_chunks
from log import Timeline
from losses import make_loss
from model import compute_dtype, head_weight, response_hidden, row_batches
from model import shared_vocabulary


class TopKCache:
    """Least-recently-used map from a sequence to what the teacher knows about its response.

    An entry holds ids int32 [M,1+K] and their logp float32 [M,1+K]. Column 0 is the sequence's own
    next token, the others are the teacher's top K. Bounded in bytes.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.entries = OrderedDict()  # key -> (ids, logp)
        self.bytes = self.hits = self.misses = self.evictions = 0

    def get(self, key: bytes, wanted):
        """Log-probabilities of the ids `wanted` [M,C], or None unless every one is known."""
        found = None
        if key in self.entries:
            self.entries.move_to_end(key)
            ids, logp = self.entries[key]
            match = wanted[:, :, None] == ids[:, None, :]  # [M,C,1+K]
            if match.any(-1).all():
                found = logp.gather(1, match.int().argmax(-1))
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: bytes, ids, logp):
        size = entry_bytes(key, ids, logp)
        if size > self.max_bytes or key in self.entries:
            return
        self.entries[key] = ids, logp
        self.bytes += size
        while self.bytes > self.max_bytes:
            old, tensors = self.entries.popitem(last=False)
            self.bytes -= entry_bytes(old, *tensors)
            self.evictions += 1

    def stats(self):
        return torch.tensor([self.hits, self.misses, self.bytes, self.evictions])


def entry_bytes(key: bytes, ids, logp):
    return len(key) + ids.nbytes + logp.nbytes


@dataclass
class Teacher:
    """Scores rows of a rollout table: a Channel, or anything with its fields."""

    model: nn.Module
    config: Config
    vocab: int

    def __post_init__(self):
        self.loss = make_loss(self.config)
        self.cache = TopKCache(self.config.teacher_cache_mb * 2**20)
        self.own_top = self.loss.teacher_top  # how many of its top ids a forward pass looks up
        if self.cache.max_bytes and not self.own_top:
            self.own_top = min(self.vocab, 4 * self.loss.num_columns)

    @torch.no_grad()
    def score(self, table: Channel, rows: list[int]):
        """Fill teacher_logp of `rows` and, for forward KL, the top-K columns of candidate_ids."""
        missing = [row for row in rows if not self.from_cache(table, row)]
        for batch in row_batches(table, missing, self.config.micro_batch_tokens):
            self.compute(table, batch)

    def views(self, table, row):
        """Cache key of a row, and its candidate_ids and teacher_logp as views [M,C]."""
        prompt_len, length = int(table.prompt_len[row]), int(table.length[row])
        key = prompt_len.to_bytes(4, "little") + table.tokens[row, :length].numpy().tobytes()
        response = slice(0, length - prompt_len)
        return key, table.candidate_ids[row, response], table.teacher_logp[row, response]

    def from_cache(self, table, row):
        """Fill a row from the cache; False if that cannot be done exactly."""
        key, ids, logp = self.views(table, row)
        if self.loss.teacher_top and key in self.cache.entries:
            ids.copy_(self.cache.entries[key][0])
        found = self.cache.get(key, ids)
        if found is None:
            return False
        logp.copy_(found)
        return True

    def compute(self, table, rows):
        """Fill rows by one forward pass, and remember its top ids."""
        views = [self.views(table, row) for row in rows]
        proposed = self.loss.num_proposed  # columns that the generator has filled
        wanted = torch.cat([ids[:, :proposed] for _, ids, _ in views])
        all_ids, all_logp = self.look_up(response_hidden(self.model, table, rows), wanted)
        counts = [len(ids) for _, ids, _ in views]
        found = zip(views, all_ids.split(counts), all_logp.split(counts))
        for (key, ids, logp), row_ids, row_logp in found:
            columns = ids.shape[1]  # the candidates come first, then ids for the cache alone
            ids[:, proposed:] = row_ids[:, proposed:columns]
            logp.copy_(row_logp[:, :columns])
            known = [0, *range(proposed, row_ids.shape[1])]
            self.cache.put(key, row_ids[:, known], row_logp[:, known])

    def look_up(self, hidden, wanted):
        """Ids int32 [T,C+K] and their log-probabilities: those wanted [T,C], then the top K."""
        weight = head_weight(self.model)[: self.vocab].to(hidden)
        wanted = wanted.to(hidden.device, torch.int64)
        scale = 1.0 / self.config.temperature
        all_ids, all_logp = [], []
        for part, logits in logit_chunks(hidden, weight, scale, self.config.head_chunk):
            ids = torch.cat([wanted[part], logits.topk(self.own_top, dim=-1).indices], 1)
            all_ids.append(ids.int().cpu())
            all_logp.append(gather(logits, ids)[0].float().cpu())
            del logits  # before the next chunk's are made
        return torch.cat(all_ids), torch.cat(all_logp)


# ---- the process ------------------------------------------------------------------------------


def ready_rows(waiting, next_turn, config):
    """Take the rows to score now out of `waiting` (turn -> row), in the order of turns.

    Turn i of a teacher is its i-th ticket: of one node, teacher k of n has the tickets k, k + n,
    k + 2 n. In arrival order all rows are ready. In batch order a quarter of the teacher's share of
    a batch is, once it is whole. Then timing does not decide which rollouts share a forward pass,
    and so it does not decide the last bits of their scores.
    """
    group = sorted(waiting)
    if config.order == "batch":
        share = config.batch_size // (config.nodes * config.teachers)
        share_end = (next_turn // share + 1) * share
        group = range(next_turn, min(next_turn + max(1, share // 4), share_end))
    is_whole = all(turn in waiting for turn in group)
    return [waiting.pop(turn) for turn in group] if is_whole else []


def run(
    config: Config,
    channel: Channel,
    device: torch.device,
    index: int,
    next_ticket: int,
):
    """Teacher process number `index`, until rank 0 says stop or is gone.

    1. take finished rows   2. score those that are ready   3. pass them on to the learner
    """
    dtype = compute_dtype(config, device)
    model = load_model(config.teacher_path, dtype, device, gpus=config.teacher_gpus)
    teacher = Teacher(model, config, shared_vocabulary(config))
    timeline = Timeline(config, channel, config.generators + index, f"teacher {index}")
    turns = config.nodes * config.teachers
    next_turn = next_ticket // turns
    waiting = {}  # turn -> row
    rows = []
    while channel.running():
        for row in channel.to_teachers[index].get_all(timeout=0.0 if rows else 0.02):
            waiting[int(channel.ticket[row]) // turns] = row
        rows = ready_rows(waiting, next_turn, config)
        if not rows:
            timeline.flush()
            continue
        with timeline.span("score"):
            teacher.score(channel, rows)
        next_turn += len(rows)
        channel.cache_stats[index] = teacher.cache.stats()
        channel.to_learner.put(rows)
    timeline.flush()

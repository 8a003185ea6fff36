"""The frozen teacher: scores rollouts in batches and remembers its top ids in an LRU cache.

Letters of shapes: serial.py. T are the response tokens of one row or of a batch of rows.

`Teacher.score` fills `teacher_logp` of rows of the rollout table: the log-probability of every
candidate that the student proposed or, for forward KL, of the teacher's own top K, whose ids it
writes to `candidate_ids`.

The teacher is frozen, so a cached sequence never goes stale. The cache pays where sequences recur:
several epochs, or several samples of short answers. It is a hit only if every requested id is
cached.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from channel import Channel
from kernels.head import gather, logit_chunks
from losses import make_loss
from model import compute_dtype, head_weight, response_hidden, row_batches
from support.config import Config
from support.load import head_factor, load_model, shared_vocabulary
from support.log import Timeline


class TopKCache:
    """Least-recently-used map from a sequence to what the teacher knows about its response.

    An entry holds ids int32 [T,1+K] and their logp float32 [T,1+K]. Column 0 is the sequence's own
    next token, the others are the teacher's top K. Bounded in bytes.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.entries = OrderedDict()  # key -> (ids, logp)
        self.bytes = self.hits = self.misses = self.evictions = 0

    def get(self, key: bytes, wanted):
        """Log-probabilities of the ids `wanted` [T,C], or None unless every one is known."""
        found = None
        if key in self.entries:
            self.entries.move_to_end(key)
            ids, logp = self.entries[key]
            match = wanted[:, :, None] == ids[:, None, :]  # [T,C,1+K]
            if match.any(-1).all():
                found = logp.gather(1, match.int().argmax(-1))  # of the first that matches
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
    """Scores rows of the rollout table. A test may give anything with a Channel's fields."""

    model: nn.Module
    config: Config
    vocab: int

    def __post_init__(self):
        self.loss = make_loss(self.config)
        self.cache = TopKCache(self.config.teacher_cache_mb * 2**20)
        # How many of its top ids a forward pass looks up: those of the loss, or of the metric.
        self.own_top = self.loss.teacher_top or self.loss.sampler_top
        if self.cache.max_bytes and not self.loss.teacher_top:
            # For the cache alone: the more it knows, the likelier is a hit on new candidates.
            self.own_top = min(self.vocab, 4 * self.loss.num_columns)

    @torch.no_grad()
    def score(self, channel: Channel, rows: list[int]):
        """Fill teacher_logp of `rows` and, for forward KL, the top-K columns of candidate_ids."""
        missing = [row for row in rows if not self.from_cache(channel, row)]
        sequences = channel.as_teacher_reads()
        for batch in row_batches(sequences, missing, self.config.micro_batch_tokens):
            self.compute(channel, batch)

    def views(self, channel, row):
        """Cache key of a row, and its candidate_ids and teacher_logp as views [T,C].

        The key is what the teacher reads.
        """
        prompt_len = int(channel.teacher_prompt_len[row])
        response = slice(0, int(channel.length[row] - channel.prompt_len[row]))
        read = channel.teacher_tokens[row, : prompt_len + response.stop]
        key = prompt_len.to_bytes(4, "little") + read.numpy().tobytes()
        return key, channel.candidate_ids[row, response], channel.teacher_logp[row, response]

    def from_cache(self, channel, row):
        """Fill a row from the cache; False if that cannot be done exactly."""
        key, ids, logp = self.views(channel, row)
        if self.loss.teacher_top and key in self.cache.entries:
            ids.copy_(self.cache.entries[key][0])  # forward KL: the candidates are the entry
        found = self.cache.get(key, ids)
        if found is None:
            return False
        logp.copy_(found)
        channel.top_overlap[row] = self.overlap(ids, self.cache.entries[key][0][:, 1:]).mean()
        return True

    def compute(self, channel, rows):
        """Fill rows by one forward pass, and remember its top ids."""
        views = [self.views(channel, row) for row in rows]
        proposed = self.loss.num_proposed  # columns that the generator has filled
        wanted = torch.cat([ids[:, :proposed] for _, ids, _ in views])  # [T,proposed]
        hidden = response_hidden(self.model, channel.as_teacher_reads(), rows)  # [T,F]
        all_ids, all_logp = self.look_up(hidden, wanted)
        counts = [len(ids) for _, ids, _ in views]
        overlap = self.overlap(wanted, all_ids[:, proposed:])  # [T]
        tables = (table.split(counts) for table in (all_ids, all_logp, overlap))
        for row, (key, ids, logp), row_ids, row_logp, shares in zip(rows, views, *tables):
            columns = ids.shape[1]  # the candidates come first, then ids for the cache alone
            ids[:, proposed:] = row_ids[:, proposed:columns]
            logp.copy_(row_logp[:, :columns])
            known = [0, *range(proposed, row_ids.shape[1])]  # the emitted token and the top ids
            self.cache.put(key, row_ids[:, known], row_logp[:, known])
            channel.top_overlap[row] = shares.mean()

    def overlap(self, ids, own_ids):
        """Which part of the sampler's top K is in the teacher's: [T]. NaN without the former.

        ids [T,C]: the candidates. own_ids [T,N]: the teacher's top ids, in descending order.
        """
        own_ids = own_ids[:, : self.loss.sampler_top]
        both = torch.cat([ids[:, self.loss.top], own_ids], 1).sort().values  # [T,2K]
        return (both[:, 1:] == both[:, :-1]).sum(-1) / self.loss.sampler_top

    def look_up(self, hidden, wanted):
        """Ids int32 [T,C+K] and their log-probabilities: those wanted [T,C], then the top K."""
        weight = head_weight(self.model)[: self.vocab].to(hidden)
        wanted = wanted.to(hidden.device, torch.int64)
        scale = head_factor(self.model) / self.config.temperature
        all_ids, all_logp = [], []
        for part, logits in logit_chunks(hidden, weight, scale, self.config.head_chunk):
            ids = torch.cat([wanted[part], logits.topk(self.own_top, dim=-1).indices], 1)
            all_ids.append(ids.int().cpu())
            all_logp.append(gather(logits, ids)[0].float().cpu())
            del logits  # before the next chunk's are made
        return torch.cat(all_ids), torch.cat(all_logp)


# ---- the process ------------------------------------------------------------------------------


def ready_rows(waiting: set[int], channel, next_group: int, config: Config):
    """Take the rows to score now out of `waiting`, in the order of their tickets.

    In ticket order (a window of 0) these are group `next_group` once all of it is there: neither
    the rows of a forward pass nor what the cache holds may depend on timing. Else all that wait.
    """
    rows = list(waiting)
    if config.window == 0:
        groups = channel.group[rows].tolist()
        rows = [row for row, group in zip(rows, groups) if group == next_group]
        if rows and len(rows) < channel.group_size[rows[0]]:
            return []
    waiting.difference_update(rows)
    return sorted(rows, key=lambda row: int(channel.ticket[row]))


def run(config: Config, channel: Channel, device: torch.device, number: int):
    """Teacher process `number`, until the leader says stop or is gone.

    1. take finished rows   2. score those that are ready   3. pass them on to the learner
    """
    dtype = compute_dtype(config, device)
    path = config.teacher_paths[config.teacher_processes[number]]
    model = load_model(path, dtype, device, gpus=config.teacher_gpus)
    teacher = Teacher(model, config, shared_vocabulary(config))
    timeline = Timeline(config, channel, config.generators + number)
    waiting = set()
    next_group = 0
    rows = []
    while channel.running():
        # After a group there may be another: look, and do not wait.
        waiting.update(channel.to_teachers[number].get_all(timeout=0.0 if rows else 0.02))
        rows = ready_rows(waiting, channel, next_group, config)
        if not rows:
            timeline.flush()
            continue
        with timeline.span("score"):
            teacher.score(channel, rows)
        next_group += 1
        channel.cache_stats[number] = teacher.cache.stats()
        channel.to_learner.put(rows)
    timeline.flush()

"""The losses in plain torch: one class each, with the candidates it wants and its value.

Letters of shapes: serial.py. Candidates are ids of the vocabulary at which teacher and student are
compared. A position's candidates stand in columns, left to right:

    draws   ids drawn from the sampler, with replacement; column 0 is the emitted token
    top     the K most probable ids of the sampler or, if the loss says so, of the teacher, in
            descending order
    tail    ids drawn from the sampler restricted to the ids outside its top K

Losses see three tables [T,C] of natural log-probabilities, float32 or float64. All three are
normalised over the whole vocabulary, at the temperature of the sampler:

    s  student_logp   current weights, differentiable
    t  teacher_logp   frozen teacher
    b  behavior_logp  the density that a candidate was really drawn from, at generation time

A loss returns one value per position [T]. The learner divides their sum by the response tokens of
the whole update. No padding enters, because positions come from lengths.

The reverse-KL losses have the form sg[w D] s, where sg stops the gradient. Their gradient is what
counts and their value means nothing, so every run reports `reverse_kl` beside the loss.

To add a loss, write a class in a file of your own, put it into LOSSES, and give the file to
--plugin. What the studies compare with is such a file: experiments/corrections.py. Left out:
generalised JSD, rewards.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import torch

BLOCK = 128  # ids that `draw` sums first; divides most models' vocabularies
BASELINE_DRAWS = 8  # fewer draws have no baseline
EPSILON = torch.finfo(torch.float32).eps  # what a sum of float32 probabilities is rounded by


# ---- candidates: how a generator draws them ---------------------------------------------------


def draw(probs, uniforms):
    """Ids drawn by inverting the cumulative sum.

    probs float32 [A,V], of any sum; uniforms float64 [A,N] in [0,1) -> ids int64 [A,N]. In
    float32 the cumulative sum over 150,000 ids ends at 0.9999998, which distorts the tail. In
    float64 its error is 1e-16. Where V allows it, a block of ids is drawn first, by its sum, then
    an id inside it: so the large table is read once. A block's sum is rounded to float32, as
    `probs` are: every id keeps its probability up to 3e-7 of it.
    """
    if probs.shape[1] % BLOCK:
        return find(probs, uniforms * probs.sum(-1, keepdim=True, dtype=torch.float64))
    blocks = probs.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).double()  # summing in float64 would copy the table
    target = uniforms * sums.sum(-1, keepdim=True)
    block = find(sums, target)
    width = sums.gather(1, block)
    before = sums.cumsum(-1).gather(1, block) - width
    inside = blocks[torch.arange(len(probs), device=probs.device)[:, None], block]  # [A,N,BLOCK]
    target = (target - before) / width * inside.sum(-1, dtype=torch.float64)
    within = find(inside, target[..., None])
    return block * BLOCK + within[..., 0]


def find(weights, target):
    """Entry that `target` [...,N] falls into when entries are as wide as weights [...,X].

    Whatever rounding does to the target, it falls into no entry of width 0.
    """
    ends = weights.cumsum(-1, dtype=torch.float64)
    inside = target.clamp(min=0.0).minimum(ends[..., -1:] * (1 - 1e-15))
    # NaN is beyond all ends.
    return torch.searchsorted(ends, inside, right=True).clamp_(max=ends.shape[-1] - 1)


class Proposal:
    """Which candidates a position gets. `Proposal()` alone is plain sampling of one token."""

    def __init__(self, *, draws=1, top=0, tail=0, teacher_top=False):
        """How many columns of each kind. `teacher_top`: the top ids are the teacher's."""
        self.draws = slice(0, draws)
        self.top = slice(draws, draws + top)
        self.tail = slice(draws + top, draws + top + tail)
        self.num_columns = draws + top + tail
        self.num_uniforms = draws + tail
        self.teacher_top = top if teacher_top else 0  # columns that the teacher fills
        self.sampler_top = top - self.teacher_top
        self.num_proposed = self.num_columns - self.teacher_top

    def propose(self, logits, uniforms):
        """Candidates of one position in every active slot, and the log-density each was drawn with.

        logits float32 [A,V], divided by the temperature; uniforms float64 [A,num_uniforms]
        -> ids int64 in [0,V) and logp float32, both [A,num_proposed]. Overwrites the logits.
        """
        logp = logits.log_softmax(-1)
        ids = draw(logp.exp(), uniforms[:, self.draws])
        if self.sampler_top == 0:
            return ids, logp.gather(1, ids)
        top = logp.topk(self.sampler_top, dim=-1).indices
        ids = torch.cat([ids, top], 1)
        ids_logp = logp.gather(1, ids)
        if self.tail.start == self.tail.stop:
            return ids, ids_logp
        # A logsumexp of its own: log(1 - mass of the top) would round to -inf.
        tail_logp = logits.scatter_(1, top, float("-inf")).log_softmax(-1)
        tail = draw(tail_logp.exp(), uniforms[:, self.draws.stop :])
        return torch.cat([ids, tail], 1), torch.cat([ids_logp, tail_logp.gather(1, tail)], 1)


class Greedy(Proposal):
    """The most probable token, for evaluation."""

    def propose(self, logits, uniforms):
        ids = logits.argmax(-1, keepdim=True)
        return ids, logits.log_softmax(-1).gather(1, ids)


# ---- losses -----------------------------------------------------------------------------------


class Loss(Proposal):
    """Base class. A loss says its candidates in `__init__(self, config)`, by super().__init__.

    Its `value(self, s, t, b)` is the loss of each position, differentiable in s: [T,C] each -> [T].
    """

    def check(self):
        """Raise ValueError unless `propose` fills its columns and `value` gives [T] and a gradient.

        The table and the learner would take other shapes without a word: a mean, for one.
        """
        slots = torch.zeros(2, 2 * self.num_columns + 2)
        uniforms = torch.full((2, self.num_uniforms), 0.5, dtype=torch.float64)
        shapes = [tuple(x.shape) for x in self.propose(slots, uniforms)]
        if shapes != 2 * [(2, self.num_proposed)]:
            raise ValueError(f"`propose` of 2 slots gives {shapes}, not [2,{self.num_proposed}]")
        t = torch.full((5, self.num_columns), -1.0)
        with torch.enable_grad():  # a Config may be made where gradients are off
            value = self.value(t.clone().requires_grad_(), t, t)
        if not torch.is_tensor(value) or value.shape != (5,) or not value.requires_grad:
            found = list(getattr(value, "shape", [value]))
            raise ValueError(f"`value` of 5 positions gives {found}, not [5] with a gradient to s")

    def look_ahead(self, tables, gather):
        """Called before every update, for losses that judge it as a whole.

        `tables`: an iterator over (s, ids, t, b) of its micro-batches, [T,C] each. Going through it
        costs a forward pass, which every rank makes or none. `gather`: value -> the list of all
        ranks' values.
        """

    def support_probs(self, ids, logp):
        """Probabilities of the candidates whose mass is a metric: the top, or else the draws.

        ids and logp [T,C]. A draw that repeats an earlier one counts as 0.
        """
        if self.top.start < self.top.stop:
            return logp[:, self.top].exp()
        ids = ids[:, self.draws]
        repeated = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
        return logp[:, self.draws].exp().masked_fill(repeated, 0.0)

    @torch.no_grad()
    def reverse_kl(self, s, t, b):
        """Unbiased estimate of KL(student || teacher) of each position: [T,C] each -> [T].

        Mean over the draws of w (s - t) with w = e^(s - b). Forward and sparse KL have one draw,
        the emitted token: noisy, but unbiased.
        """
        s, t, b = s[:, self.draws], t[:, self.draws], b[:, self.draws]
        return ((s - b).exp() * (s - t)).mean(-1)


class ForwardKL(Loss):
    """sum_k e^t (t - s) over the teacher's top K: KL(teacher || student) without its tail.

    The teacher weighs the terms, so lag can only change which prefixes it trains on (AsyncOPD,
    arXiv 2606.24143). On a truncated support the sum may be negative. That is no error. Nor is its
    minimum the teacher there: a student that equals its teacher is pulled away from it.
    """

    def __init__(self, config):
        super().__init__(top=config.top_k, teacher_top=True)

    def value(self, s, t, b):
        s, t = s[:, self.top], t[:, self.top]
        return (t.exp() * (t - s)).sum(-1)


def rest(mass):
    """The probability [T] that `mass` [T] leaves to all other ids, at least EPSILON."""
    return (1 - mass).clamp(min=EPSILON)


class SparseReverseKL(Loss):
    """sum_k sg[e^s (D - m)] s over the sampler's top K, with D = s - t: nothing is drawn.

    m stands for the ids outside. With m the mean of D over them, weighted by e^s, the gradient is
    exact at the logits of the top K. That mean is not known. The edge of the top K, all but its
    first quarter, tells most about the rest: either the mean of D is the edge's, or the mean less
    the log-ratio of the masses that student and teacher give the set. If m is too low, mass leaks
    out of the top K, which then knows even less. So m is the larger guess. docs/topk.md derives
    and compares.
    """

    def __init__(self, config):
        super().__init__(top=config.top_k)

    def value(self, s, t, b):
        s, t = s[:, self.top], t[:, self.top]
        d, p = (s - t).detach(), s.detach().exp()
        edge = slice(s.shape[1] // 4, None)
        log_ratio = (s[:, edge].logsumexp(-1) - t[:, edge].logsumexp(-1)).detach()  # of the edge
        rest_log_ratio = (rest(p.sum(-1)) / rest(t.exp().sum(-1))).log()
        mean_edge = (s[:, edge].softmax(-1).detach() * d[:, edge]).sum(-1)
        m = mean_edge + (rest_log_ratio - log_ratio).clamp(min=0.0)  # [T]
        return (p * (d - m[:, None]) * s).sum(-1)


def less_others(x):
    """Draws [T,N], each less the mean of the others: the leave-one-out baseline.

    Fewer than BASELINE_DRAWS stay as they are: the mean of a few would add more noise than it
    takes away (docs/decisions.md).
    """
    count = x.shape[-1]
    if count < BASELINE_DRAWS:
        return x
    return (x - x.mean(-1, keepdim=True)) * (count / (count - 1))


class SampledReverseKL(Loss):
    """(1/N) sum_i sg[w_i (D_i - m_i)] s_i over N draws from the sampler: score-function reverse KL.

    w = e^(s - b) and D = s - t, recomputed with the current student (AsyncOPD). The baseline m_i is
    the mean of D over the other draws, 0 for a few draws (`less_others`). It takes away noise that
    all draws have in common. The baseline itself is not weighted: one large ratio would spoil it.
    The expectation over the draws is the exact gradient of the reverse KL at any lag.
    """

    def __init__(self, config):
        super().__init__(draws=config.num_samples)

    def value(self, s, t, b):
        weight = (s - b).exp()
        return ((weight * less_others(s - t)).detach() * s).mean(-1)


class StratifiedReverseKL(Loss):
    """sum_top sg[e^s (D - m)] s + (1/N) sum_tail sg[w_i (D_i - m_i)] s_i, with D = s - t.

    w = e^(s - b). The sampler's top K are summed exactly. The N draws come from the sampler
    restricted to the rest, and b is the density of that restricted sampler. The gradient is
    unbiased at any lag, and only the tail is random: the sum-and-sample estimator of Liu et al.
    2019 (arXiv 1810.04777) with importance weights. The baseline m_i is the mean of D over the
    other draws, and m over all of them, both 0 for a few draws.

    The probabilities e^s of all ids sum to one, so their gradients sum to zero. One number less in
    the D of every id therefore leaves the expected gradient as it is. Both strata subtract m for
    that reason, and for the same reason both do without the +1 that d/ds e^s (s - t) has.
    """

    def __init__(self, config):
        super().__init__(top=config.top_k, tail=config.num_samples)

    def value(self, s, t, b):
        d = (s - t).detach()
        drawn = d[:, self.tail]
        alone = less_others(drawn)
        m = (drawn - alone).mean(-1, keepdim=True)
        exact = s[:, self.top].detach().exp() * (d[:, self.top] - m)
        sampled = (s - b)[:, self.tail].detach().exp() * alone
        return (exact * s[:, self.top]).sum(-1) + (sampled * s[:, self.tail]).mean(-1)

    @torch.no_grad()
    def reverse_kl(self, s, t, b):
        """sum_top e^s (s - t) + mean_tail w (s - t), [T]."""
        d = s - t
        exact = s.exp() * d
        sampled = (s - b).exp() * d
        return exact[:, self.top].sum(-1) + sampled[:, self.tail].mean(-1)


LOSSES = {
    "forward_kl": ForwardKL,
    "sparse_reverse_kl": SparseReverseKL,
    "sampled_reverse_kl": SampledReverseKL,
    "stratified_reverse_kl": StratifiedReverseKL,
}


@cache
def import_plugin(name: str):
    """Import a module, or a file FILE.py, once in every process. It may add to LOSSES."""
    if not name.endswith(".py"):
        return importlib.import_module(name) if name else None
    # Not under its bare name: a student's file may be called losses.py.
    spec = importlib.util.spec_from_file_location(f"plugin_{Path(name).stem}", name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_loss(config):
    """The loss that `config` names. Raises ValueError if neither LOSSES nor the plugin has it."""
    import_plugin(config.plugin)
    if config.loss not in LOSSES:
        raise ValueError(f"one of {', '.join(LOSSES)} is needed")
    return LOSSES[config.loss](config)

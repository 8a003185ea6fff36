"""The losses in plain torch: one class each, with the candidates it wants and its value.

Letters of shapes: serial.py. A position's candidates stand in columns, left to right:

    draws   ids drawn from the sampler, with replacement; column 0 is the emitted token
    top     the K most probable ids of the sampler or, if the loss says so, of the teacher
    tail    ids drawn from the sampler restricted to the ids outside its top K

Losses see three tables [T,C] of natural log-probabilities, float32 or float64. All three are
normalised over the whole vocabulary, at the temperature of the sampler:

    s  student_logp   current weights, differentiable
    t  teacher_logp   frozen teacher
    b  behavior_logp  the density that a candidate was really drawn from, at generation time

A loss returns one value per position [T]. The learner divides their sum by the response tokens of
the whole update. Nothing is clamped. No padding enters, because positions come from lengths.

The reverse-KL losses that draw candidates have the form sg[w D] s, where sg stops the gradient.
Its gradient is right and its value means nothing, so every run reports `reverse_kl` beside the
loss.

To add a loss, write a class and name it in LOSSES. Left out: generalised JSD, rewards.
"""

import torch

from kernels.forward_kl import forward_kl
from kernels.sampled_reverse_kl import BASELINE_DRAWS, sampled_reverse_kl
from kernels.sparse_reverse_kl import sparse_reverse_kl

BLOCK = 128  # ids that `draw` sums first; divides most models' vocabularies

SIGNALS = ("current", "rollout")
CORRECTIONS = ("is", "none", "ppo", "decoupled", "m2po", "m2po_areal", "tis", "icepop")


# ---- candidates: how a generator draws them ---------------------------------------------------


def draw(probs, uniforms):
    """Ids drawn by inverting the cumulative sum.

    probs float32 [A,V], of any sum; uniforms float64 [A,N] in [0,1) -> ids int64 [A,N]. In
    float32 the cumulative sum over 150,000 ids ends at 0.9999998, which distorts the tail. In
    float64 its error is 1e-16. Where V allows it, a block of ids is drawn first, by its sum, then
    an id inside it: so the large table is read once.
    """
    if probs.shape[1] % BLOCK:
        return find(probs, uniforms * probs.sum(-1, keepdim=True, dtype=torch.float64))
    blocks = probs.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    target = uniforms * sums.sum(-1, keepdim=True)
    block = find(sums, target)
    before = (sums.cumsum(-1) - sums).gather(1, block)
    row = torch.arange(len(probs), device=probs.device)[:, None]
    within = find(blocks[row, block], (target - before)[..., None])
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

    def __init__(self, draws=1, top=0, tail=0, teacher_top=False):
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
    """Base class. A loss says its candidates in __init__ and its value in `value`."""

    triton_terms = None  # `value` and its derivative for the fused kernel (kernels/shared.py)

    def __init_subclass__(cls):
        """Who overrides the formula alone has no Triton terms."""
        if "value" in vars(cls) and "triton_terms" not in vars(cls):
            cls.triton_terms = None

    def value(self, s, t, b):
        """Loss of each position, differentiable in s: [T,C] each -> [T]."""
        raise NotImplementedError

    def look_ahead(self, tables, gather):
        """Called before every update, for losses that judge it as a whole.

        `tables`: an iterator over (s, ids, t, b) of its micro-batches, [T,C] each; it costs a
        forward pass, and every rank takes all of them or none. `gather`: value -> the list of all
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
    arXiv 2606.24143). On a truncated support the sum may be negative. That is no error.
    """

    triton_terms = forward_kl

    def __init__(self, config):
        super().__init__(top=config.top_k, teacher_top=True)

    def value(self, s, t, b):
        s, t = s[:, self.top], t[:, self.top]
        return (t.exp() * (t - s)).sum(-1)


class SparseReverseKL(Loss):
    """sum_k e^s (s - t) over the sampler's top K: KL(student || teacher) without its tail.

    Its derivative is d/ds = e^s (s - t + 1). On a truncated support the +1 does not cancel: it
    drains the support's mass. No importance weight corrects this bias; watch
    `support_mass_student`.
    """

    triton_terms = sparse_reverse_kl

    def __init__(self, config):
        super().__init__(top=config.top_k)

    def value(self, s, t, b):
        s, t = s[:, self.top], t[:, self.top]
        return (s.exp() * (s - t)).sum(-1)


def less_others(x):
    """Draws [T,N], each less the mean of the others: the leave-one-out baseline.

    Fewer than BASELINE_DRAWS stay as they are: the mean of a few would add more noise than it
    takes away (docs/decisions.md).
    """
    count = x.shape[-1]
    if count < BASELINE_DRAWS.value:
        return x
    return (x - x.mean(-1, keepdim=True)) * (count / (count - 1))


class SampledReverseKL(Loss):
    """(1/N) sum_i sg[w_i (D_i - m_i)] s_i over N draws from the sampler: score-function reverse KL.

    w = e^(s - b) and D = s - t, recomputed with the current student (AsyncOPD). The baseline m_i is
    the mean of D over the other draws, 0 for a few draws (`less_others`). It takes away noise that
    all draws have in common. The baseline itself is not weighted: one large ratio would spoil it.
    The expectation over the draws is the exact gradient of the reverse KL at any lag. Other signals
    and corrections are in experiments/baselines.py.
    """

    triton_terms = sampled_reverse_kl

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
    other draws, and m over all of them, both 0 for a few draws. A number that is subtracted from
    the D of every id adds nothing to the gradient. The +1 in the derivative of e^s (s - t) is such
    a number, so both strata leave it out (score-function form).
    """

    triton_terms = sampled_reverse_kl

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


def make_loss(config):
    """The loss that `config` names. Other signals and corrections: experiments/baselines.py."""
    if (config.signal, config.correction) != ("current", "is"):
        return baselines.Corrected(config)
    return LOSSES[config.loss](config)


# What the losses are compared with. It names its own losses in LOSSES, so it comes last.
from experiments import baselines  # noqa: E402

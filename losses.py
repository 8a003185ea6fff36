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

The reverse-KL losses that draw candidates have the form -sg[w A] s, where sg stops the gradient.
Its gradient is right and its value means nothing, so every run reports `reverse_kl` beside the
loss.

To add a loss, write a class and name it in LOSSES. Left out: generalised JSD, rewards.
"""

from math import inf

import torch

from kernels.forward_kl import forward_kl
from kernels.sampled_reverse_kl import sampled_reverse_kl
from kernels.sparse_reverse_kl import sparse_reverse_kl

PPO_CLIP = 0.2  # Schulman et al. 2017, arXiv 1707.06347
DECOUPLED_CAP = 5.0  # AReaL, arXiv 2505.24298: samples with a larger behaviour weight are dropped
BLOCK = 128  # ids that `draw` sums first; divides most models' vocabularies
M2_BUDGET = 0.04  # M2PO, arXiv 2510.01161: largest mean square of the log ratios that are kept

SIGNALS = ("current", "rollout")
CORRECTIONS = ("is", "none", "ppo", "decoupled", "m2po")


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
    return torch.searchsorted(ends, inside, right=True)


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

    needs_log_ratios = False  # True: the learner calls `use_log_ratios` before each update
    triton_terms = None  # `value` and its derivative for the fused kernel (kernels/shared.py)

    def __init_subclass__(cls):
        """Who overrides the formula alone has no Triton terms."""
        changed = vars(cls).keys() & {"value", "terms"}
        if changed and "triton_terms" not in vars(cls):
            cls.triton_terms = None

    def value(self, s, t, b):
        """Loss of each position, differentiable in s: [T,C] each -> [T]."""
        raise NotImplementedError

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


class SampledReverseKL(Loss):
    """-(1/N) sum_i sg[w_i A_i] s_i over N draws from the sampler: score-function reverse KL.

    `signal` "current": A = t - s, recomputed with the current student (AsyncOPD). "rollout": A =
    t - b, what stale reinforcement learning does. `correction` chooses w, see
    `importance_weight`. With "current" and "is" the mean over the draws is the exact gradient of
    the reverse KL at any lag.
    """

    triton_terms = sampled_reverse_kl

    def __init__(self, config):
        super().__init__(draws=config.num_samples)
        self.signal = config.signal
        self.correction = config.correction
        self.needs_log_ratios = config.correction == "m2po"
        self.m2_threshold = inf
        if (self.signal, self.correction) != ("current", "is"):
            self.triton_terms = None

    def use_log_ratios(self, log_ratios):
        """M2PO: one threshold for all samples of the update."""
        self.m2_threshold = second_moment_threshold(log_ratios)

    def value(self, s, t, b):
        advantage = (t - (s if self.signal == "current" else b)).detach()
        weight = importance_weight(s.detach(), b, advantage, self.correction, self.m2_threshold)
        return -(weight * advantage * s).mean(-1)


class StratifiedReverseKL(Loss):
    """sum_top sg[e^s (s - t)] s + (1/N) sum_tail sg[w (s - t)] s, with w = e^(s - b).

    The sampler's top K are summed exactly. The N draws come from the sampler restricted to the
    rest, and b is the density of that restricted sampler. The gradient is unbiased at any lag,
    and only the tail is random: the sum-and-sample estimator of Liu et al. 2019 (arXiv
    1810.04777) with importance weights. Both strata have score-function form. The +1 of sparse
    reverse KL sums to zero over the whole vocabulary, so both leave it out.
    """

    triton_terms = sampled_reverse_kl

    def __init__(self, config):
        super().__init__(top=config.top_k, tail=config.num_samples)

    def terms(self, s, t, b):
        """Terms whose sum over the top, and mean over the tail, is the reverse KL: [T,K], [T,N]."""
        top, tail = self.top, self.tail
        weight = (s[:, tail] - b[:, tail]).exp()
        exact = s[:, top].exp() * (s[:, top] - t[:, top])
        return exact, weight * (s[:, tail] - t[:, tail])

    def value(self, s, t, b):
        exact, sampled = self.terms(s.detach(), t, b)
        return (exact * s[:, self.top]).sum(-1) + (sampled * s[:, self.tail]).mean(-1)

    @torch.no_grad()
    def reverse_kl(self, s, t, b):
        """sum_top e^s (s - t) + mean_tail w (s - t), [T]."""
        exact, sampled = self.terms(s, t, b)
        return exact.sum(-1) + sampled.mean(-1)


LOSSES = {
    "forward_kl": ForwardKL,
    "sparse_reverse_kl": SparseReverseKL,
    "sampled_reverse_kl": SampledReverseKL,
    "stratified_reverse_kl": StratifiedReverseKL,
}


def make_loss(config):
    """The loss that `config` names."""
    return LOSSES[config.loss](config)


# ---- what stale samples are multiplied by -----------------------------------------------------


def importance_weight(student_logp, behavior_logp, advantage, correction, m2_threshold=inf):
    """The weight w of every sample, judged on its own. [T,N] each -> [T,N]; no gradient passes.

    With r = e^(s - b):
      none       1
      is         r, unbiased
      ppo        r, but 0 where the clipped surrogate is flat:
                 A >= 0 and r > 1.2, or A < 0 and r < 0.8
      decoupled  r, but 0 where r > 5. This is AReaL's behaviour weight e^(prox - b). Its proximal
                 policy is the one that the update starts from. An update is one optimiser step
                 here, so prox = s and the clipped ratio s / prox is one.
      m2po       r, but 0 where (s - b)^2 is above `m2_threshold`, see `second_moment_threshold`
    """
    log_ratio = student_logp - behavior_logp
    if correction == "none":
        return torch.ones_like(log_ratio)
    ratio = log_ratio.exp()
    dropped = {
        "is": ratio < 0,
        "ppo": torch.where(advantage >= 0, ratio > 1 + PPO_CLIP, ratio < 1 - PPO_CLIP),
        "decoupled": ratio > DECOUPLED_CAP,
        "m2po": log_ratio.square() > m2_threshold,
    }
    return ratio.masked_fill(dropped[correction], 0.0)


def second_moment_threshold(log_ratio, budget=M2_BUDGET):
    """M2PO's bound: the largest (s - b)^2 that is kept.

    The mean over what is kept stays within `budget`. `log_ratio`: every sample of the update, any
    shape. The largest squares are dropped first, so the mean of the kept ones falls
    monotonically: one sort and one cumulative mean give the answer. inf: all are kept. -1: none.
    """
    moment = log_ratio.double().square().flatten().sort().values
    count = torch.arange(1, len(moment) + 1, device=moment.device)
    kept = int((moment.cumsum(0) / count <= budget).sum())
    if kept == len(moment):
        return float("inf")
    return float(moment[kept - 1]) if kept else -1.0

"""What only studies compare with: corrections of stale samples, other estimators of reverse KL.

`--plugin experiments.corrections` puts them into losses.LOSSES, as a file of your own would do with
yours. Letters and tables s, t, b: losses.py.

`sampled_SIGNAL_CORRECTION` is sampled reverse KL without a baseline, -(1/N) sum_i sg[w_i a_i] s_i.
SIGNAL says with whom the teacher is compared:

    current     advantage a = t - s, the current student at the learner (AsyncOPD)
    rollout     advantage a = t - b, the sampler at the rollout: what stale RL does

CORRECTION makes the weight w of each sample from its ratio e^(s - b) and its advantage:

    none        1
    is          the ratio: unbiased with the current signal, the surrogate of AsyncOPD
    ppo         the ratio, but 0 where the clipped surrogate is flat: a >= 0 and a ratio above 1.2,
                or a < 0 and a ratio below 0.8 (arXiv 1707.06347)
    decoupled   the ratio, but 0 where it is above 5. This is AReaL's behaviour weight e^(prox - b)
                (arXiv 2505.24298). Its proximal policy is the one that the update starts from. An
                update is one optimiser step here, so prox = s and e^(s - prox) is one
    m2po        as in the release of M2PO (arXiv 2510.01161, github.com/Infini-AI-Lab/M2PO): the
                ratio, but 0 where the update pushes a sample further from the sampler (a >= 0 and
                a ratio above 1, or a < 0 and one below 1) and its (s - b)^2 is above a bound. If
                all such squares were cut at the bound, their mean over the update would be within
                0.04. The release also keeps every ratio within 0.7 to 1.5; we do not
    m2po_areal  the ratio, but 0 where (s - b)^2 is above a bound, as AReaL reads M2PO: the largest
                squares of all samples are dropped until the mean of the others is within 0.04
    tis         min(ratio, 2): truncated importance sampling, as verl and others offer it
    icepop      the ratio, but 0 outside of 0.2 to 5: a gate on both sides (IcePop; prime-rl uses
                these limits)
"""

from math import inf

import torch

from losses import LOSSES, Loss, SampledReverseKL, StratifiedReverseKL, rest

SIGNALS = ("current", "rollout")
CORRECTIONS = ("is", "none", "ppo", "decoupled", "m2po", "m2po_areal", "tis", "icepop")
PPO_CLIP = 0.2
DECOUPLED_CAP = 5.0
M2_BUDGET = 0.04
TRUNCATION = 2.0
GATE = (0.2, 5.0)


def moves_away(log_ratio, advantage, clip=0.0):
    """Where PPO's clipped surrogate is flat.

    The ratio is beyond 1 + clip or 1 - clip, and the advantage pushes it on.
    """
    ratio = log_ratio.exp()
    return torch.where(advantage >= 0, ratio > 1 + clip, ratio < 1 - clip)


def importance_weight(log_ratio, advantage, correction, bound=inf):
    """The weight w of every sample: s - b and the advantage, [T,N] each -> [T,N].

    `bound`: M2PO's, of (s - b)^2.
    """
    ratio = log_ratio.exp()
    if correction == "none":
        return torch.ones_like(ratio)
    if correction == "tis":
        return ratio.clamp(max=TRUNCATION)
    dropped = {
        "is": ratio < 0,
        "ppo": moves_away(log_ratio, advantage, PPO_CLIP),
        "decoupled": ratio > DECOUPLED_CAP,
        "m2po": moves_away(log_ratio, advantage) & (log_ratio.square() > bound),
        "m2po_areal": log_ratio.square() > bound,
        "icepop": (ratio < GATE[0]) | (ratio > GATE[1]),
    }
    return ratio.masked_fill(dropped[correction], 0.0)


def second_moment_bound(squares, is_capped, budget=M2_BUDGET):
    """M2PO's bound on (s - b)^2, from the squares of an update, any shape.

    inf: all are within it. -1: none is. With `is_capped` (the release) it is the largest square v
    with mean(min(squares, v)) <= budget. Else (AReaL) the mean of the squares up to v must be
    within it. Both means rise with v, so one sort and one cumulative sum give the answer.
    """
    moment = squares.double().flatten().sort().values
    count = torch.arange(1, len(moment) + 1, device=moment.device)
    total = moment.cumsum(0)
    mean = (total + moment * (len(moment) - count)) / len(moment) if is_capped else total / count
    kept = int((mean <= budget).sum())
    if kept == len(moment):
        return inf
    return float(moment[kept - 1]) if kept else -1.0


class Corrected(SampledReverseKL):
    """-(1/N) sum_i sg[w_i a_i] s_i. Each subclass has its signal and its correction."""

    signal = "current"
    correction = "is"
    m2_bound = inf  # of the update

    def advantage(self, s, t, b):
        return (t - (s if self.signal == "current" else b)).detach()

    @torch.no_grad()
    def look_ahead(self, tables, gather):
        """M2PO has one bound for the whole update."""
        if self.correction.startswith("m2po"):
            parts = [self.squares(s, t, b).flatten().cpu() for s, _, t, b in tables]
            squares = torch.cat(gather(torch.cat([torch.zeros(0), *parts])))
            self.m2_bound = second_moment_bound(squares, is_capped=self.correction == "m2po")

    def squares(self, s, t, b):
        """(s - b)^2 of the samples that the bound is about."""
        log_ratio = s - b
        if self.correction == "m2po":
            log_ratio = log_ratio[moves_away(log_ratio, self.advantage(s, t, b))]
        return log_ratio.double().square()

    def value(self, s, t, b):
        advantage = self.advantage(s, t, b)
        weight = importance_weight((s - b).detach(), advantage, self.correction, self.m2_bound)
        return -(weight * advantage * s).mean(-1)


def named(signal: str, correction: str):
    """The subclass of Corrected for one pair."""
    name = f"Sampled_{signal}_{correction}"
    return type(name, (Corrected,), {"signal": signal, "correction": correction})


class PlainStratified(StratifiedReverseKL):
    """Stratified reverse KL without a baseline."""

    def value(self, s, t, b):
        d = (s - t).detach()
        exact = s[:, self.top].detach().exp()
        weight = (s - b)[:, self.tail].detach().exp()
        return (exact * d[:, self.top] * s[:, self.top]).sum(-1) + (
            weight * d[:, self.tail] * s[:, self.tail]
        ).mean(-1)


class TopKAndEmitted(Loss):
    """The top K exactly, and the emitted token where it is none of them.

    This is EMA-PG's top-k KL (arXiv 2602.04417) with weights. The emitted token comes from the
    whole sampler. So the tail's term is 0 for most tokens and large for the others.
    """

    def __init__(self, config):
        Loss.__init__(self, top=config.top_k)

    def value(self, s, t, b):
        d = (s - t).detach()
        weight = (s - b).detach().exp()
        top = s.detach()[:, self.top]
        emitted = s.detach()[:, :1]
        is_outside = (emitted != top).all(-1)  # equal ids have equal log-probabilities
        sampled = torch.where(is_outside, weight[:, 0] * d[:, 0] * s[:, 0], 0.0)
        return (top.exp() * d[:, self.top] * s[:, self.top]).sum(-1) + sampled


class TopKBaseline(Loss):
    """N draws less the reverse KL of the sampler's top K as a baseline.

    This is vOPD (arXiv 2605.07865) with importance weights.
    """

    def __init__(self, config):
        Loss.__init__(self, draws=config.num_samples, top=config.top_k)

    def value(self, s, t, b):
        d = (s - t).detach()
        weight = (s - b).detach().exp()
        baseline = (s.detach()[:, self.top].exp() * d[:, self.top]).sum(-1, keepdim=True)
        return (weight * (d - baseline) * s)[:, self.draws].mean(-1)


# ---- reverse and forward KL of a top K: what others do about the rest (docs/topk.md) -----------


class TruncatedReverseKL(Loss):
    """sum_k e^s (s - t) over the sampler's top K, differentiated as it stands: AsyncOPD's form.

    c_k = e^s (s - t + 1). On a truncated support the +1 does not cancel: it drains the support's
    mass, also of a student that equals its teacher.
    """

    def __init__(self, config):
        super().__init__(top=config.top_k)

    def value(self, s, t, b):
        return self.of_top(s[:, self.top], t[:, self.top])

    def of_top(self, s, t):
        """From the top K alone: [T,K] each -> [T]."""
        return (s.exp() * (s - t)).sum(-1)


class ScoreTopK(TruncatedReverseKL):
    """c_k = e^s (s - t): the score-function form, without the +1."""

    def of_top(self, s, t):
        return ((s.exp() * (s - t)).detach() * s).sum(-1)


class CentredTopK(TruncatedReverseKL):
    """c_k = e^s (D - m) with m the mean of D = s - t over the top K, weighted by e^s.

    All c_k add up to 0: no mass leaves the support or comes in.
    """

    def of_top(self, s, t):
        p, d = s.exp().detach(), (s - t).detach()
        m = (p * d).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
        return (p * (d - m) * s).sum(-1)


class RenormalisedTopK(TruncatedReverseKL):
    """KL of both distributions, renormalised on the top K (arXiv 2603.25562).

    c_k = e^s (D - m) / sum e^s: the centred form, longer where the top K hold little.
    """

    def of_top(self, s, t):
        s, t = s.log_softmax(-1), t.log_softmax(-1)
        return (s.exp() * (s - t)).sum(-1)


class BucketTopK(TruncatedReverseKL):
    """KL over K + 1 categories, the last of which is all the rest (TA-OPD, arXiv 2608.14728).

    c_k = e^s (D - log(1 - sum e^s) + log(1 - sum e^t)).
    """

    def of_top(self, s, t):
        p, q = rest(s.exp().sum(-1)), rest(t.exp().sum(-1))
        return (s.exp() * (s - t)).sum(-1) + p * (p.log() - q.log())


class HalfwayTopK(TruncatedReverseKL):
    """m half-way between the two guesses of `sparse_reverse_kl`, which takes the larger one."""

    def of_top(self, s, t):
        p, d = s.exp().detach(), (s - t).detach()
        edge_s, edge_t = (x.detach()[:, x.shape[1] // 4 :] for x in (s, t))
        mean = (edge_s.softmax(-1) * (edge_s - edge_t)).sum(-1)
        gap = (rest(p.sum(-1)) / rest(t.exp().sum(-1))).log()
        gap = gap - edge_s.logsumexp(-1) + edge_t.logsumexp(-1)
        return (p * (d - (mean + gap / 2)[:, None]) * s).sum(-1)


class BucketForwardKL(Loss):
    """Forward KL over the teacher's top K and one category for all the rest (verl #7856).

    Its minimum is a student with the teacher's probabilities, unlike that of `forward_kl`.
    """

    def __init__(self, config):
        super().__init__(top=config.top_k, teacher_top=True)

    def value(self, s, t, b):
        s, t = s[:, self.top], t[:, self.top]
        p, q = rest(s.exp().sum(-1)), rest(t.exp().sum(-1))
        return (t.exp() * (t - s)).sum(-1) + q * (q.log() - p.log())


LOSSES |= {
    f"sampled_{signal}_{correction}": named(signal, correction)
    for signal in SIGNALS
    for correction in CORRECTIONS
}
LOSSES |= {
    "plain_stratified": PlainStratified,
    "top_k_and_emitted": TopKAndEmitted,
    "top_k_baseline": TopKBaseline,
    "truncated_reverse_kl": TruncatedReverseKL,
    "score_top_k": ScoreTopK,
    "centred_top_k": CentredTopK,
    "renormalised_top_k": RenormalisedTopK,
    "bucket_top_k": BucketTopK,
    "halfway_top_k": HalfwayTopK,
    "bucket_forward_kl": BucketForwardKL,
}

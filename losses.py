"""Every distillation loss as a function of candidate log-probabilities, in plain torch: the specification.

    N  response positions      K  candidates at a position      V  vocabulary

All inputs are natural logs, float32 or float64 [N,K], normalised over the whole vocabulary (never over the
candidates) at one temperature tau: `student_logp`, `teacher_logp` and `behavior_logp` are log_softmax(z / tau)
of their own logits z, with the tau the sampler drew with. So teacher == student gives zero for every tau.

    s  student_logp   current weights, differentiable
    t  teacher_logp   frozen teacher
    b  behavior_logp  the density a candidate was really drawn from, at generation time

Functions return a loss per position [N]; the learner divides their sum by the response tokens of the whole
update. A student-weighted loss in score-function form -sg[w A] s has the right gradient but a meaningless
value: what to report is `reverse_kl_estimate`. Nothing is clamped and no padding enters: positions come from lengths.

Left out: generalised JSD (a mixture needs the full distributions), rewards, entropy bonuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PPO_CLIP = 0.2  # Schulman et al. 2017, arXiv 1707.06347
DECOUPLED_CAP = 5.0  # AReaL, arXiv 2505.24298: behaviour weights above this are dropped
M2_BUDGET = 0.04  # M2PO, arXiv 2510.01161: largest mean square of the log ratios kept

LOSSES = ("forward_kl", "sparse_reverse_kl", "sampled_reverse_kl", "stratified_reverse_kl")
SIGNALS = ("current", "rollout")
CORRECTIONS = ("is", "none", "ppo", "decoupled", "m2po")


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sum_k e^t (t - s) over the teacher's top-K ids: KL(teacher || student) without its tail. [N,K] -> [N].

    Teacher-weighted, so a stale prefix is all that lag can do to it (AsyncOPD, arXiv 2606.24143). May be
    negative on a truncated support; that is not an error.
    """
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def sparse_reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sum_k e^s (s - t) over the sampler's top-K ids: KL(student || teacher) without its tail. [N,K] -> [N].

    Differentiated as it stands: d/ds = e^s (s - t + 1). On a truncated support the +1 does not cancel and
    drains the support's mass, a bias that no importance weight corrects: watch `support_mass_student`.
    """
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def sampled_reverse_kl(
    student_logp: Tensor,
    teacher_logp: Tensor,
    behavior_logp: Tensor,
    signal: str = "current",
    correction: str = "is",
    m2_threshold: float | None = None,
) -> Tensor:
    """-(1/N) sum_i sg[w_i A_i] s_i over N draws from the sampler: score-function reverse KL. [N,K] -> [N].

    `signal`: A = t - s with the current student ("current", the recomputed signal of AsyncOPD) or A = t - b
    ("rollout", what stale reinforcement learning does). `correction`: see `importance_weight`. With signal
    "current" and correction "is" the expectation over the draws is the exact reverse-KL gradient at any lag.
    """
    reference = student_logp if signal == "current" else behavior_logp
    advantage = (teacher_logp - reference).detach()
    weight = importance_weight(student_logp.detach(), behavior_logp, advantage, correction, m2_threshold)
    return -(weight * advantage * student_logp).mean(-1)


def importance_weight(
    student_logp: Tensor, behavior_logp: Tensor, advantage: Tensor, correction: str, m2_threshold: float | None = None
) -> Tensor:
    """What each sample's score is multiplied by, beside its advantage. All [N,K]; no gradient passes.

    With r = e^(s - b), every sample judged on its own:
      none       1
      is         r, unbiased
      ppo        r, and 0 where the clipped surrogate is flat: A >= 0 and r > 1.2, or A < 0 and r < 0.8
      decoupled  r, and 0 where r > 5. AReaL's behaviour weight e^(prox - b); the proximal policy is the one
                 that this update starts from and an update is one optimiser step, so prox = s and its
                 clipped ratio s / prox is one
      m2po       r, and 0 where (s - b)^2 is above `m2_threshold`, see `second_moment_threshold`
    """
    log_ratio = student_logp - behavior_logp
    if correction == "none":
        return torch.ones_like(log_ratio)
    ratio = log_ratio.exp()
    if correction == "ppo":
        flat = torch.where(advantage >= 0, ratio > 1 + PPO_CLIP, ratio < 1 - PPO_CLIP)
        return ratio.masked_fill(flat, 0.0)
    if correction == "decoupled":
        return ratio.masked_fill(ratio > DECOUPLED_CAP, 0.0)
    if correction == "m2po":
        if m2_threshold is None:
            raise ValueError("correction m2po needs m2_threshold, computed over the whole update")
        return ratio.masked_fill(log_ratio.square() > m2_threshold, 0.0)
    if correction == "is":
        return ratio
    raise ValueError(f"unknown correction {correction!r}: one of {', '.join(CORRECTIONS)}")


def second_moment_threshold(log_ratio: Tensor, budget: float = M2_BUDGET) -> float:
    """Largest (s - b)^2 that may be kept so that the mean over what is kept stays within `budget` (M2PO); inf: all may.

    `log_ratio`: every sample of the update, any shape. Dropping the largest first, the kept mean falls
    monotonically, so the answer is one sort and one cumulative mean. Returns -1 when nothing may be kept.
    """
    moment = log_ratio.double().square().flatten().sort().values
    mean_kept = moment.cumsum(0) / torch.arange(1, len(moment) + 1, device=moment.device)
    kept = int((mean_kept <= budget).sum())
    return float("inf") if kept == len(moment) else float(moment[kept - 1]) if kept else -1.0


def stratified_reverse_kl(
    top_student_logp: Tensor, top_teacher_logp: Tensor, tail_student_logp: Tensor, tail_teacher_logp: Tensor,
    tail_behavior_logp: Tensor,
) -> Tensor:  # fmt: skip
    """sum_top sg[e^s (s - t)] s + (1/N) sum_i sg[w_i (s_i - t_i)] s_i, w_i = e^(s_i - b_i). [N,K],[N,n] -> [N].

    The sampler's top-K summed exactly, n draws from the sampler restricted to the rest, with b the density of
    that restricted sampler. Unbiased at any lag, and only the tail is random: the sum-and-sample estimator of
    Liu et al. 2019 (arXiv 1810.04777) with importance weights. Both strata are in score-function form: the
    +1 of `sparse_reverse_kl` sums to zero over the whole vocabulary and is left out of both.
    """
    top_weight = (top_student_logp.exp() * (top_student_logp - top_teacher_logp)).detach()
    tail_weight = (tail_student_logp - tail_behavior_logp).exp() * (tail_student_logp - tail_teacher_logp)
    return (top_weight * top_student_logp).sum(-1) + (tail_weight.detach() * tail_student_logp).mean(-1)


# ---- the learner's view: one table of candidates [N,C], column 0 always the emitted token ------------


def candidate_columns(loss: str, top_k: int, num_samples: int) -> dict[str, slice]:
    """Which columns of the candidate table hold what. C, the table's width, is `total.stop`.

    `drawn` are draws with replacement from the sampler, the emitted token first; `top` the top-K ids of the
    sampler (of the teacher for forward_kl); `tail` draws from the sampler restricted to the rest.
    """
    drawn = num_samples if loss == "sampled_reverse_kl" else 1
    top = 0 if loss == "sampled_reverse_kl" else top_k
    tail = num_samples if loss == "stratified_reverse_kl" else 0
    return {
        "drawn": slice(0, drawn),
        "top": slice(drawn, drawn + top),
        "tail": slice(drawn + top, drawn + top + tail),
        "total": slice(0, drawn + top + tail),
    }


def make_loss(config, m2_threshold: float | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The configured loss as a function (student_logp, teacher_logp, behavior_logp), each [N,C], -> [N]."""
    columns = candidate_columns(config.loss, config.top_k, config.num_samples)
    top, tail = columns["top"], columns["tail"]

    def loss(s: Tensor, t: Tensor, b: Tensor) -> Tensor:
        if config.loss == "forward_kl":
            return forward_kl(s[:, top], t[:, top])
        if config.loss == "sparse_reverse_kl":
            return sparse_reverse_kl(s[:, top], t[:, top])
        if config.loss == "stratified_reverse_kl":
            return stratified_reverse_kl(s[:, top], t[:, top], s[:, tail], t[:, tail], b[:, tail])
        if config.loss == "sampled_reverse_kl":
            return sampled_reverse_kl(s, t, b, config.signal, config.correction, m2_threshold)
        raise ValueError(f"make_loss does not know the loss {config.loss!r}")

    return loss


@torch.no_grad()
def reverse_kl_estimate(loss: str, columns: dict[str, slice], s: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """Unbiased estimate of KL(student || teacher) at each position from its candidates, [N,C] -> [N].

    sum_top e^s (s - t) + mean_tail w (s - t) where there are both strata, else mean over the draws of
    w (s - t) with w = e^(s - b): for forward and sparse KL that is the emitted token alone, noisy but unbiased.
    """
    if loss == "stratified_reverse_kl":
        top, tail = columns["top"], columns["tail"]
        exact = (s[:, top].exp() * (s[:, top] - t[:, top])).sum(-1)
        return exact + ((s[:, tail] - b[:, tail]).exp() * (s[:, tail] - t[:, tail])).mean(-1)
    drawn = columns["drawn"]
    return ((s[:, drawn] - b[:, drawn]).exp() * (s[:, drawn] - t[:, drawn])).mean(-1)

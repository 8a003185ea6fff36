"""Claims about the staleness study: its expectations are exact, its lags are exact, one seed gives one result."""

from dataclasses import replace

import pytest
import torch

from experiments.estimators import dense_logit_gradient, expected_logit_gradient
from experiments.lagged import Lagged
from experiments.staleness import BASE, LAGS, LOSSES, SAME_WITHOUT_LAG, Job, grid, read, run, summary, task


def policies(lag, positions=5, vocab=40):
    """log-probabilities of student, teacher and a stale sampler, float64 [P,V]."""
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(positions, vocab, dtype=torch.float64, generator=generator)
    t, b = (z + scale * torch.randn(positions, vocab, dtype=torch.float64, generator=generator) for scale in (1.0, lag))
    return z.log_softmax(-1), t.log_softmax(-1), b.log_softmax(-1)


UNBIASED = [name for name in LOSSES if name.startswith(("current signal + IS", "stratified"))]
BIASED = [name for name in LOSSES if name.startswith(("rollout", "decoupled", "M2PO", "sparse")) or name == "current signal"]


def small(name):
    """The study's settings with a support that fits 40 ids."""
    fields = LOSSES[name]
    return replace(BASE, **{**fields, "top_k": min(fields.get("top_k", 8), 8)})


@pytest.mark.parametrize("lag", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("name", UNBIASED)
def test_importance_weights_with_the_current_signal_have_exactly_no_bias_at_any_lag(name, lag):
    s, t, b = policies(lag)
    torch.testing.assert_close(expected_logit_gradient(small(name), s, t, b), dense_logit_gradient(s, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BIASED)
def test_the_others_are_biased_under_lag(name):
    s, t, b = policies(1.0)
    exact = dense_logit_gradient(s, t)
    assert (expected_logit_gradient(small(name), s, t, b, m2_threshold=0.2) - exact).norm() > 0.05 * exact.norm()


def test_the_whole_vocabulary_as_support_is_the_dense_gradient():
    s, t, b = policies(1.0)
    torch.testing.assert_close(expected_logit_gradient(replace(BASE, loss="sparse_reverse_kl", top_k=40), s, t, b), dense_logit_gradient(s, t))


@pytest.mark.parametrize("lag", [0, 2])
def test_every_token_is_exactly_lag_updates_old(lag):
    lagged = Lagged(replace(BASE, batch_size=4, steps=5, **LOSSES["stratified 12+4"]), lag, *task())
    for update in range(5):
        metrics = lagged.update()
        assert metrics["lag_max"] == metrics["lag_mean"] == min(lag, update)
        assert lag or abs(metrics["drift_kl"]) < 1e-5


def test_one_seed_gives_one_result_and_another_seed_another():
    first, again, other = (run(Job("weak", "forward KL 16", 2, seed), "builtin", 2, 2, 3e-4) for seed in (0, 0, 1))
    assert first == again != other and first[0]["update"] == 2


def test_no_run_is_made_twice_and_none_is_missing(tmp_path):
    jobs = grid(("weak", "strong"), list(LOSSES), LAGS, 2)
    assert len(set(jobs)) == len(jobs)
    for seed in (0, 1):
        for name in LOSSES:
            stands_in = SAME_WITHOUT_LAG.get(name, name)
            assert Job("weak", stands_in, 0, seed) in jobs and all(Job("weak", name, lag, seed) in jobs for lag in LAGS[1:])
    (tmp_path / "s.csv").write_text("start,loss,lag,seed,update,accuracy\nweak,current signal + IS,0,0,20,0.5\n")
    assert {line["loss"] for line in read(tmp_path / "s.csv")} == {name for name, same in SAME_WITHOUT_LAG.items() if same == "current signal + IS"} | {"current signal + IS"}


def test_the_summary_is_the_mean_over_seeds_of_the_last_evaluation():
    line = {"start": "weak", "loss": "M2PO", "lag": 8, "update": 80}
    lines = [line | {"accuracy": 0.25}, line | {"accuracy": 0.75}, line | {"update": 20, "accuracy": 1.0}, line | {"lag": 0, "accuracy": 1.0}]
    assert summary(lines).split() == "weak M2PO lag 0: 100.0% lag 8: 50.0%".split()

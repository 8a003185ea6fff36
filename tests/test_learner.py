"""Claims about the learner: one denominator, every response token once, micro-batches no matter."""

from dataclasses import replace

import pytest
import torch
from conftest import LOSS_CONFIGS, corrected, label, load
from frozen import MAX_NEW, ROWS, STOPS, frozen_table, full_logp

from channel import Channel
from experiments.corrections import second_moment_bound
from kernels.head import candidate_loss
from learner import Learner
from losses import LOSSES, make_loss
from model import flatten_parameters, head_weight
from support.config import builtin

SHORT = {"max_prompt_tokens": 16, "max_new_tokens": MAX_NEW}  # fits 28 tokens a forward pass


def new_learner(path, config, **kwargs):
    model = load(path)
    return Learner(model, config, head_weight(model).shape[0], torch.float32, **kwargs)


def stale_table(model_dir, config):
    """Rollouts of seed 0, scored by seed 1. Who trains on them has seed 2: no log-ratio is 0."""
    return frozen_table(model_dir(seed=0), model_dir(seed=1), config)


def gradients(learner):
    return torch.cat([p.grad.flatten() for p in learner.parameters])


def config_for(loss, **kwargs):
    return builtin(loss=loss, max_grad_norm=1e9, **kwargs)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize(
    "config",
    [
        LOSS_CONFIGS[0],
        LOSS_CONFIGS[2],
        LOSS_CONFIGS[-1],
        builtin(loss="sparse_reverse_kl", top_k=4, temperature=0.7),
    ],
    ids=label,
)
def test_the_gradient_is_that_of_the_mean_over_all_response_tokens(config, family, model_dir):
    """Against autograd on dense logits, one rollout and one position at a time."""
    config = replace(config, max_grad_norm=1e9)
    table = stale_table(model_dir, config)
    learner = new_learner(model_dir(family, seed=2), config)
    metrics = learner.update(table, ROWS)
    reference = load(model_dir(family, seed=2)).requires_grad_(True)
    total, tokens = 0.0, 0
    loss = make_loss(config)
    for row in ROWS:
        length, prompt_len = int(table.length[row]), int(table.prompt_len[row])
        logits = (
            reference(table.tokens[row : row + 1, :length].long()).logits[0] / config.temperature
        )
        for r in range(length - prompt_len):
            s = logits[prompt_len - 1 + r].log_softmax(-1)[table.candidate_ids[row, r].long()]
            total = (
                total
                + loss.value(
                    s[None], table.teacher_logp[row, r][None], table.behavior_logp[row, r][None]
                ).sum()
            )
            tokens += 1
    (total / tokens).backward()
    assert metrics["tokens"] == tokens
    assert metrics["loss"] == pytest.approx(float(total.detach() / tokens), rel=1e-4, abs=1e-6)
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    torch.testing.assert_close(
        gradients(learner), expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-3
    )


@pytest.mark.parametrize("config", [LOSS_CONFIGS[0], LOSS_CONFIGS[-1], LOSS_CONFIGS[-2]], ids=label)
def test_the_update_does_not_depend_on_micro_batches_or_chunks(config, model_dir):
    config = replace(config, **SHORT)
    table = stale_table(model_dir, config)
    whole = new_learner(model_dir(seed=2), config)
    pieces = new_learner(model_dir(seed=2), replace(config, micro_batch_tokens=28, head_chunk=3))
    first, second = whole.update(table, ROWS), pieces.update(table, list(reversed(ROWS)))
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(gradients(whole), gradients(pieces), atol=1e-6, rtol=1e-4)


def test_every_response_token_is_trained_once_stop_token_included_and_none_after_it(
    model_dir, monkeypatch
):
    config = config_for("sampled_reverse_kl", num_samples=1)
    table = stale_table(model_dir, config)
    trained = []

    def spy(hidden, weight, ids, *args):
        trained.extend(ids[:, 0].tolist())
        return candidate_loss(hidden, weight, ids, *args)

    monkeypatch.setattr("learner.candidate_loss", spy)
    metrics = new_learner(model_dir(seed=2), config).update(table, ROWS)
    responses = [
        table.tokens[row, table.prompt_len[row] : table.length[row]].tolist() for row in ROWS
    ]
    assert sorted(trained) == sorted(sum(responses, [])) and metrics["tokens"] == len(trained)
    assert any(response[-1] in STOPS for response in responses)
    assert sum(token in STOPS for token in trained) == sum(
        response[-1] in STOPS for response in responses
    )


@pytest.mark.parametrize(
    "config",
    [config for config in LOSS_CONFIGS if config.loss not in ("forward_kl", "sparse_reverse_kl")],
    ids=label,
)
def test_teacher_equal_to_student_gives_zero_gradient_and_zero_reverse_kl(config, model_dir):
    config = replace(config, max_grad_norm=1e9)
    table = frozen_table(model_dir(), model_dir(), config)
    learner = new_learner(model_dir(), config)
    metrics = learner.update(table, ROWS)
    assert abs(metrics["reverse_kl"]) < 1e-5 and metrics["grad_norm"] < 1e-4
    assert abs(metrics["drift_kl"]) < 1e-5


def test_support_mass_counts_repeated_draws_once(model_dir):
    config = config_for("sampled_reverse_kl", num_samples=4)
    table = stale_table(model_dir, config)
    metrics = new_learner(model_dir(seed=2), config).update(table, ROWS)
    total, tokens = 0.0, 0
    for row in ROWS:
        logp = full_logp(model_dir(seed=2), table, row)
        for r in range(len(logp)):
            total += float(
                logp[r][torch.tensor(sorted(set(table.candidate_ids[row, r].tolist())))].exp().sum()
            )
            tokens += 1
    assert metrics["support_mass_student"] == pytest.approx(total / tokens, rel=1e-4)


def test_lag_is_measured_per_token(model_dir):
    config = config_for("sampled_reverse_kl")
    table = stale_table(model_dir, config)
    learner = new_learner(model_dir(seed=2), config)
    learner.version = 7
    table.weight_version[:, :2], table.weight_version[:, 2:] = 4, 6
    metrics = learner.update(table, ROWS)
    counts = (table.length - table.prompt_len).clamp(max=2)
    expected = float(
        (counts * 3 + (table.length - table.prompt_len - counts)).sum()
        / (table.length - table.prompt_len).sum()
    )
    assert metrics["lag_max"] == 3 and metrics["lag_mean"] == pytest.approx(expected)


def test_ess_is_that_of_the_importance_weights_of_the_emitted_tokens(model_dir):
    config = config_for("sampled_reverse_kl", micro_batch_tokens=28, **SHORT)  # several passes
    table = stale_table(model_dir, config)
    weights = []
    for row in ROWS:
        logp = full_logp(model_dir(seed=2), table, row)
        for r, step in enumerate(logp):
            emitted = int(table.candidate_ids[row, r, 0])
            weights.append(float((step[emitted] - table.behavior_logp[row, r, 0]).exp()))
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    metrics = new_learner(model_dir(seed=2), config).update(table, ROWS)
    assert metrics["ess"] == pytest.approx(expected, rel=1e-4) and 0.01 < expected < 0.9
    assert "top_overlap" not in metrics and "weight" not in metrics


@pytest.mark.parametrize("drift", [200.0, 0.0])  # an emitted token may be e^-200 likely by now
def test_ess_is_a_fraction_however_far_the_student_is_from_its_samples(drift, model_dir):
    config = config_for("sampled_reverse_kl", **SHORT)
    table = stale_table(model_dir, config)
    table.behavior_logp += drift
    metrics = new_learner(model_dir(seed=2), config).update(table, ROWS)
    assert 0.01 < metrics["ess"] <= 1.0 + 1e-6


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_losses_without_a_top_k_of_the_sampler_have_no_overlap(config, model_dir):
    table = frozen_table(model_dir(seed=0), model_dir(seed=1), config)
    metrics = new_learner(model_dir(seed=2), config).update(table, ROWS)
    has_top = config.loss in ("sparse_reverse_kl", "stratified_reverse_kl")
    assert ("top_overlap" in metrics) == has_top
    assert not has_top or 0 <= metrics["top_overlap"] < 0.5


def test_the_overlap_is_a_mean_over_positions(model_dir):
    config = config_for("sparse_reverse_kl", top_k=5)
    table = stale_table(model_dir, config)
    table.top_overlap.copy_(torch.linspace(0, 1, len(ROWS)))
    counts = (table.length - table.prompt_len).float()
    metrics = new_learner(model_dir(seed=2), config).update(table, ROWS)
    assert metrics["top_overlap"] == pytest.approx(float(table.top_overlap @ counts / counts.sum()))


@pytest.mark.parametrize("budget, kept", [(1000, [0, 1, 2]), (28, [1, 3, 5])])
def test_a_few_micro_batches_are_kept_as_the_loss_saw_them(budget, kept, model_dir):
    config = config_for("stratified_reverse_kl", top_k=3, num_samples=2, **SHORT)
    config = replace(config, micro_batch_tokens=budget)
    table = stale_table(model_dir, config)
    learner = new_learner(model_dir(seed=2), config)
    (batches,) = learner.micro_batches(table, ROWS)
    with torch.no_grad():
        expected = [learner.student(table, batches[i])[1:] for i in kept]
    learner.update(table, ROWS)
    assert [rows for rows, *_ in learner.shown] == [batches[i] for i in kept]
    for (_, *tables), wanted in zip(learner.shown, expected, strict=True):
        assert not any(table.requires_grad for table in tables)
        torch.testing.assert_close(tables, list(wanted))
    learner.update(table, ROWS)  # drops the old ones
    assert len(learner.shown) == len(kept)


def test_m2po_has_one_bound_for_the_whole_update(model_dir, monkeypatch):
    sizes = dict(num_samples=3, **SHORT)
    config = corrected("sampled_current_m2po_areal", max_grad_norm=1e9, **sizes)
    table = stale_table(model_dir, config)
    computed, used = [], []

    class Spy(LOSSES[config.loss]):
        def look_ahead(self, *args):
            super().look_ahead(*args)
            used.clear()  # of the pass that asks for the squares
            computed.append(self.m2_bound)

        def value(self, *args):
            used.append(self.m2_bound)
            return super().value(*args)

    monkeypatch.setitem(LOSSES, config.loss, Spy)
    micro_batches = []
    for budget in (8192, 28):
        computed.clear()
        used.clear()
        learner = new_learner(model_dir(seed=2), replace(config, micro_batch_tokens=budget))
        for update in (1, 2):  # of the second update, whose weights are others, it is another
            learner.update(table, ROWS)
            assert len(computed) == update and set(used) == {computed[-1]}
        first = computed[0]
        micro_batches.append((first, len(used)))
        assert computed[1] != first
    (seen_whole, few), (seen_pieces, many) = micro_batches
    assert many > few
    log_ratio = []
    for row in ROWS:
        count = int(table.length[row] - table.prompt_len[row])
        s = full_logp(model_dir(seed=2), table, row).gather(
            1, table.candidate_ids[row, :count].long()
        )
        log_ratio.append((s - table.behavior_logp[row, :count]).flatten())
    bound = second_moment_bound(torch.cat(log_ratio).square(), is_capped=False)
    assert seen_whole == pytest.approx(seen_pieces, rel=1e-4) == pytest.approx(bound, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_no_parameter(model_dir):
    config = config_for("forward_kl", top_k=6)
    table = stale_table(model_dir, config)
    table.teacher_logp[0, 0] = float("nan")
    learner = new_learner(model_dir(seed=2), config)
    before = [p.detach().clone() for p in learner.parameters]
    with pytest.raises(FloatingPointError, match="update 1: gradient norm is nan"):
        learner.update(table, ROWS)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters))


def test_masters_are_float32_and_small_updates_are_not_lost_though_bfloat16_is_published(model_dir):
    config = config_for("forward_kl", top_k=6, lr=1e-6, warmup_steps=0)
    table = stale_table(model_dir, config)
    learner = new_learner(model_dir(seed=2), config)
    before = [p.detach().clone() for p in learner.parameters]
    learner.update(table, ROWS)
    changed = sum(int((a != b).sum()) for a, b in zip(before, learner.parameters))
    in_bfloat16 = sum(
        int((a.bfloat16() != b.bfloat16()).sum()) for a, b in zip(before, learner.parameters)
    )
    assert changed > 0.5 * sum(p.numel() for p in before) and in_bfloat16 < 0.02 * changed
    count = sum(p.numel() for p in before)
    channel = Channel.create(
        builtin(batch_size=1, max_prompt_tokens=4, max_new_tokens=4), count, torch.bfloat16
    )
    learner.publish(channel)
    received = load(model_dir(seed=0), dtype=torch.bfloat16)
    assert channel.pick_up(flatten_parameters(received)) == 1
    assert all(
        torch.equal(a.bfloat16(), b) for a, b in zip(learner.parameters, received.parameters())
    )


def test_a_node_divides_by_the_tokens_of_all_nodes_and_makes_as_many_passes(model_dir):
    config = config_for("forward_kl", top_k=6)
    table = stale_table(model_dir, config)
    alone, learner = (new_learner(model_dir(seed=2), config) for _ in range(2))
    expected = alone.update(table, ROWS)
    own = learner.describe(table, ROWS)
    other = {
        "tokens": 2 * own["tokens"],
        "tickets": [0] * 4,
        "truncated": 4,
        "passes": own["passes"] + 2,
    }
    other |= {"lag_sum": 12 * own["tokens"], "lag_max": 9}
    passes = []
    learner.student.register_forward_hook(lambda *_: passes.append(1))
    metrics = learner.update(table, ROWS, [own, other])
    assert len(passes) == other["passes"]
    torch.testing.assert_close(3 * gradients(learner), gradients(alone), rtol=1e-4, atol=1e-6)
    assert 3 * metrics["loss"] == pytest.approx(expected["loss"])
    assert metrics["truncated_fraction"] == (own["truncated"] + 4) / (len(ROWS) + 4)
    lags = (metrics["tokens"], metrics["lag_mean"], metrics["lag_max"])
    assert lags == (3 * own["tokens"], 4.0, 9)


def test_recomputed_activations_give_the_same_gradient_and_are_not_kept(model_dir):
    config = config_for("forward_kl", top_k=6)
    table = stale_table(model_dir, config)
    kept = []
    learners = []
    for recompute in (False, True):
        sizes = []
        learner = new_learner(model_dir(seed=2), replace(config, checkpoint_activations=recompute))
        hooks = (lambda x: sizes.append(x.nbytes) or x, lambda x: x)  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            total, *_ = learner.student(table, ROWS)
        kept.append(sum(sizes))
        total.backward()
        learners.append(learner)
    assert torch.equal(*map(gradients, learners))
    assert kept[1] < 0.5 * kept[0]

"""Claims about the teacher: the shift, exact scores, a cache that never changes one."""

from types import SimpleNamespace

import pytest
import torch
from conftest import LOSS_CONFIGS, SHIPPED, label, load, load_with_slots, make_table, new_generator
from frozen import MAX_NEW, ROLLOUTS, ROWS, STOPS, full_logp, unscored_table

from channel import Rollout
from losses import make_loss
from model import head_weight, predicting_positions, row_batches
from support.config import builtin
from teacher import Teacher, TopKCache


def scored_table(student, teacher_path, config):
    """The frozen rollouts, scored by a Teacher, and the Teacher."""
    table = unscored_table(student, config)
    return table, score(table, teacher_path, config)


def score(table, teacher_path, config):
    model = load(teacher_path)
    teacher = Teacher(model, config, head_weight(model).shape[0])
    teacher.score(table, ROWS)
    return teacher


def test_token_r_is_predicted_one_position_earlier_and_the_stop_token_is_included():
    assert list(range(20))[predicting_positions(prompt_len=5, length=9)] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "config",
    [LOSS_CONFIGS[0], LOSS_CONFIGS[1], builtin(loss="stratified_reverse_kl", temperature=0.6)],
    ids=label,
)
def test_scores_equal_a_plain_forward_pass(config, model_dir):
    table, _ = scored_table(model_dir(seed=0), model_dir(seed=1, hidden=40), config)
    for row in ROWS:
        count = int(table.length[row] - table.prompt_len[row])
        expected = full_logp(model_dir(seed=1, hidden=40), table, row, config.temperature).gather(
            1, table.candidate_ids[row, :count].long()
        )
        torch.testing.assert_close(table.teacher_logp[row, :count], expected, atol=2e-5, rtol=0)
        assert not table.teacher_logp[row, count:].any()  # tokens after the stop token do not exist


def test_for_forward_kl_the_teacher_proposes_its_own_top_k(model_dir):
    config = builtin(loss="forward_kl", top_k=6)
    table, _ = scored_table(model_dir(seed=0), model_dir(seed=1), config)
    for row in ROWS:
        count = int(table.length[row] - table.prompt_len[row])
        top = full_logp(model_dir(seed=1), table, row).topk(6)
        assert torch.equal(table.candidate_ids[row, :count, 1:].long(), top.indices)
        start = int(table.prompt_len[row])
        assert torch.equal(
            table.candidate_ids[row, :count, 0], table.tokens[row, start : start + count]
        )


@pytest.mark.parametrize("config", SHIPPED, ids=label)
def test_teacher_equal_to_student_agrees_at_every_candidate(config, model_dir):
    """Catches every off-by-one between generator and teacher: one model, so equal numbers."""
    names = ("loss", "plugin", "top_k", "num_samples", "temperature")
    settings = {name: getattr(config, name) for name in names}
    model = load_with_slots(model_dir())
    generator = new_generator(model, STOPS, max_prompt=16, max_new=MAX_NEW, **settings)
    rollouts = generator.generate(
        [Rollout(prompt, ticket) for ticket, (prompt, _) in enumerate(ROLLOUTS)]
    )
    table = make_table(rollouts, config.num_candidates, MAX_NEW, 16)
    score(table, model_dir(), config)
    loss = make_loss(config)
    for row in ROWS:
        count = int(table.length[row] - table.prompt_len[row])
        s, t = table.behavior_logp[row, :count], table.teacher_logp[row, :count]
        # The tail's b is that of the restricted sampler.
        known = slice(0, 1 if config.loss == "forward_kl" else loss.tail.start)
        assert known.stop == {"forward_kl": 1, "stratified_reverse_kl": 1 + config.top_k}.get(
            config.loss, config.num_candidates
        )
        torch.testing.assert_close(t[:, known], s[:, known], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [LOSS_CONFIGS[0], LOSS_CONFIGS[2], builtin(loss="sparse_reverse_kl", top_k=45)],
    ids=label,
)
def test_a_hit_gives_what_the_model_gave(config, model_dir):
    table, teacher = scored_table(model_dir(seed=0), model_dir(seed=1), config)
    expected_ids, expected = table.candidate_ids.clone(), table.teacher_logp.clone()
    table.teacher_logp.zero_()
    if config.loss == "forward_kl":
        table.candidate_ids[:, :, 1:] = 0
    hits = teacher.cache.hits
    assert all(teacher.from_cache(table, row) for row in ROWS) and teacher.cache.hits == hits + 8
    for row in ROWS:
        assert torch.equal(table.teacher_logp[row], expected[row]) and torch.equal(
            table.candidate_ids[row], expected_ids[row]
        )


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_the_overlap_counts_the_ids_that_are_in_the_top_k_of_both(cache_mb, model_dir):
    config = builtin(loss="sparse_reverse_kl", top_k=45, teacher_cache_mb=cache_mb)
    table, teacher = scored_table(model_dir(seed=0), model_dir(seed=1), config)
    shares = table.top_overlap.tolist()
    for row in ROWS:
        tops = [full_logp(model_dir(seed=seed), table, row).topk(45).indices for seed in (0, 1)]
        both = [len({*s.tolist()} & {*t.tolist()}) for s, t in zip(*tops)]
        assert shares[row] == pytest.approx(sum(both) / len(both) / 45)
    assert len(set(shares)) > 2
    table.top_overlap.zero_()
    if cache_mb:  # a hit finds the same
        assert all(teacher.from_cache(table, row) for row in ROWS)
        assert table.top_overlap.tolist() == shares


def test_an_id_outside_the_cached_top_k_is_a_miss_and_is_computed():
    cache = TopKCache(10_000)
    cache.put(
        b"a", torch.tensor([[5, 1, 2]], dtype=torch.int32), torch.tensor([[-3.0, -0.5, -1.0]])
    )
    assert torch.equal(
        cache.get(b"a", torch.tensor([[2, 5, 2]])), torch.tensor([[-1.0, -3.0, -1.0]])
    )
    assert cache.get(b"a", torch.tensor([[2, 7]])) is None
    assert cache.get(b"b", torch.tensor([[2]])) is None
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_cache_is_bounded_in_bytes_and_drops_the_least_recently_used():
    entry = lambda: (torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4))  # noqa: E731
    cache = TopKCache(3 * 33)  # three entries of 16 + 16 + 1 bytes
    for key in (b"a", b"b", b"c"):
        cache.put(key, *entry())
    cache.get(b"a", torch.tensor([[0]]))
    cache.put(b"d", *entry())
    assert set(cache.entries) == {b"a", b"c", b"d"} and cache.evictions == 1 and cache.bytes == 99
    cache.put(b"too large", torch.zeros(100, 4, dtype=torch.int32), torch.zeros(100, 4))
    assert b"too large" not in cache.entries and cache.bytes == 99


def test_the_same_response_after_another_split_of_prompt_and_response_is_another_entry(model_dir):
    config = builtin(loss="forward_kl", top_k=4)
    table, teacher = scored_table(model_dir(seed=0), model_dir(seed=1), config)
    table.prompt_len[0] += 1
    table.teacher_prompt_len[0] += 1
    assert not teacher.from_cache(table, 0)


def test_row_batches_cover_everything_within_the_budget_and_are_at_most_a_third_padding():
    lengths = [5, 90, 3, 40, 41, 7, 7, 100]
    batches = row_batches(SimpleNamespace(length=torch.tensor(lengths)), range(8), 120)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 120 for batch in batches)
    assert all(
        3 * min(lengths[i] for i in batch) >= 2 * max(lengths[i] for i in batch)
        for batch in batches
    )
    assert batches == [[7], [1], [4, 3], [5, 6, 0], [2]]


@pytest.mark.parametrize("mean, longest, most", [(1024, 2048, 0.05), (8192, 16_384, 0.01)])
def test_rows_of_long_tailed_lengths_are_padded_by_a_twentieth_at_most(mean, longest, most):
    """So packed sequences would save little: docs/decisions.md."""
    generator = torch.Generator().manual_seed(0)
    padded = real = 0
    for _ in range(10):
        lengths = (
            torch.empty(256).exponential_(1 / mean, generator=generator).clamp(1, longest) + 256
        ).int()
        for batch in row_batches(SimpleNamespace(length=lengths), range(256), 16_896):
            padded += len(batch) * int(lengths[batch].max())
            real += int(lengths[batch].sum())
    assert 1 - real / padded < most

"""Claims about generation: the cache is exact, sampling is exact, slots are alone."""

import math
from contextlib import contextmanager

import pytest
import torch
from conftest import CPU, FAMILIES, build_model, load, load_with_slots, new_generator
from torch.distributions import Chi2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from assets.task import running_sums
from channel import LENGTH, STOP, Rollout
from generate import Sampler
from losses import LOSSES, draw, find, make_loss
from model import flatten_parameters
from support.config import builtin
from support.data import Prompt


def prompts(count, seed=0, longest=20, vocab=173):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_full_forward_at_every_slot_age_and_after_refills(family, model_dir):
    path = model_dir(family)
    reference = load(path)
    generator = new_generator(load_with_slots(path), loss="sampled_reverse_kl", num_samples=3)
    rollouts = generator.generate([Rollout(ids, ticket=i) for i, ids in enumerate(prompts(19))])
    assert (
        max(len(r.response_ids) for r in rollouts) == 24
        and min(len(r.response_ids) for r in rollouts) < 24
    )
    for rollout in rollouts:
        ids = rollout.prompt_ids + rollout.response_ids
        with torch.no_grad():
            logp = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logp[len(rollout.prompt_ids) - 1 : len(ids) - 1].gather(1, rollout.candidate_ids)
        torch.testing.assert_close(rollout.behavior_logp, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_model_generate(family, model_dir):
    path = model_dir(family)
    reference = load(path)
    rollouts = new_generator(load_with_slots(path), slots=3).generate(
        [Rollout(ids) for ids in prompts(11, seed=1)]
    )
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=1,
        )
        assert rollout.response_ids == out[0, ids.shape[1] :].tolist()


def test_a_rollout_depends_on_its_ticket_and_not_on_its_neighbours(model_dir):
    model = load_with_slots(model_dir())
    alone, crowded = (
        new_generator(model, slots=s, loss="stratified_reverse_kl", top_k=4, num_samples=2)
        for s in (1, 7)
    )
    first = alone.generate([Rollout(ids, ticket=i) for i, ids in enumerate(prompts(9))])
    second = crowded.generate(
        [Rollout(ids, ticket=i) for i, ids in reversed(list(enumerate(prompts(9))))]
    )
    assert [r.response_ids for r in first] == [r.response_ids for r in reversed(second)]
    again = alone.generate([Rollout(prompts(9)[0], ticket=100)])[0]
    assert again.response_ids != first[0].response_ids


def test_the_stop_token_is_the_last_response_token_also_with_several_stops_and_pad_as_stop(
    model_dir,
):
    model = load_with_slots(model_dir())
    stops = (0, 1, 5, 9, 60, 61, 62, 63)  # 0 is the pad token
    rollouts = new_generator(model, stops=stops, loss="sampled_reverse_kl").generate(
        [Rollout(ids, ticket=i) for i, ids in enumerate(prompts(40))]
    )
    seen = set()
    for rollout in rollouts:
        stopped = [token for token in rollout.response_ids if token in stops]
        assert (
            (rollout.finish == STOP) == (rollout.response_ids[-1] in stops) == (len(stopped) == 1)
        )
        assert (
            rollout.finish == STOP or len(rollout.response_ids) == 24 and rollout.finish == LENGTH
        )
        seen.update(stopped)
    assert len(seen) >= 3 and {r.finish for r in rollouts} == {STOP, LENGTH}


def test_new_weights_in_flight_keep_the_cache_and_each_token_records_its_version(model_dir):
    model = load_with_slots(model_dir())
    flat = flatten_parameters(model)
    generator = new_generator(model, stops=(), loss="sampled_reverse_kl")
    rollout = Rollout(prompts(1)[0])
    generator.add([rollout])
    for _ in range(5):
        generator.step()
    keys_before = {
        layer: keys[0, :, : len(rollout.prompt_ids) + 4].clone()
        for layer, (keys, _) in generator.cache.layers.items()
    }
    flat.mul_(1.5)
    generator.version = 3
    while generator.active:
        generator.step()
    assert rollout.weight_version == [0] * 5 + [3] * 19
    for layer, keys in keys_before.items():
        assert torch.equal(generator.cache.layers[layer][0][0, :, : keys.shape[1]], keys)


@pytest.mark.parametrize("loss", LOSSES)
def test_column_0_is_the_emitted_token_and_columns_are_as_declared(loss, model_dir):
    model = load_with_slots(model_dir())
    generator = new_generator(model, loss=loss, top_k=6, num_samples=3)
    columns = make_loss(builtin(loss=loss, top_k=6, num_samples=3))
    # The teacher fills in its own top-K.
    written = 1 if columns.teacher_top else columns.num_columns
    assert columns.num_proposed == written and (written == 1) == ("forward_kl" in loss)
    for rollout in generator.generate([Rollout(ids, ticket=i) for i, ids in enumerate(prompts(3))]):
        assert (
            rollout.candidate_ids.shape
            == rollout.behavior_logp.shape
            == (len(rollout.weight_version), written)
        )
        if loss in ("sparse_reverse_kl", "stratified_reverse_kl"):
            top = rollout.candidate_ids[:, columns.top]
            assert all(len(set(row)) == 6 for row in top.tolist())
            tail = rollout.candidate_ids[:, columns.tail]
            assert tail.shape[1] == (3 if loss == "stratified_reverse_kl" else 0)
            assert not (tail[:, :, None] == top[:, None, :]).any()


def chi_square_p(observed: torch.Tensor, probs: torch.Tensor) -> float:
    """p-value of counts against probabilities, ids in bins of at least 10 expected counts."""
    order = probs.argsort()
    expected, observed = (probs[order] * observed.sum()).double(), observed[order].double()
    bins, total = [], 0.0
    for value in expected.tolist():
        bins.append(int(total // 10))
        total += value
    index = torch.tensor(bins).unique(return_inverse=True)[1]
    size = int(index.max()) + 1
    e = torch.zeros(size, dtype=torch.float64).index_add_(0, index, expected)
    o = torch.zeros(size, dtype=torch.float64).index_add_(0, index, observed)
    keep = e >= 5
    statistic = float(((o - e)[keep] ** 2 / e[keep]).sum())
    return float(1 - Chi2(torch.tensor(float(keep.sum() - 1))).cdf(torch.tensor(statistic)))


@pytest.mark.parametrize("vocab", [300, 150_000])
def test_draws_follow_the_full_softmax_tail_included(vocab):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(vocab, generator=generator) * 2 - 6 * torch.rand(
        vocab, generator=generator
    )
    logits[0] += 12
    probs = logits.double().softmax(-1)
    draws = 3_000_000
    ids = draw(
        logits.softmax(-1)[None], torch.rand(1, draws, dtype=torch.float64, generator=generator)
    )[0]
    counts = torch.bincount(ids, minlength=vocab)
    assert chi_square_p(counts, probs) > 1e-3
    # The same test turns down a sampler that is one id off in the tail.
    biased = probs.float().cumsum(0)
    wrong = (
        torch.searchsorted(biased, torch.rand(draws, generator=generator), right=True)
        .add_(1)
        .clamp_(max=vocab - 1)
    )
    assert chi_square_p(torch.bincount(wrong, minlength=vocab), probs) < 1e-6


def test_an_id_of_probability_1e_minus_9_is_drawn_as_often_as_it_should_be():
    """Where the float32 cumulative sum and float32 exponential races draw nothing at all."""
    vocab = 100_000
    probs = torch.full((1, vocab), 1e-9)
    probs[0, 0] = 1 - 1e-9 * (vocab - 1)
    draws = 5_000_000
    ids = draw(
        probs, torch.rand(1, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    expected = draws * 1e-9 * (vocab - 1)  # 500
    assert abs(int((ids > 0).sum()) - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("vocab", [40, 256])  # 256: blocks are drawn first
def test_stratified_candidates_follow_the_sampler_and_the_restricted_sampler(vocab):
    generator = torch.Generator().manual_seed(3)
    rows, k, n = 40_000, 4, 3
    logits = (torch.randn(1, vocab, generator=generator) * 1.5).repeat(rows, 1)
    probs = logits[0].double().softmax(-1)
    uniforms = torch.rand(rows, 1 + n, dtype=torch.float64, generator=generator)
    loss = make_loss(builtin(loss="stratified_reverse_kl", top_k=k, num_samples=n))
    ids, logp = loss.propose(logits, uniforms)
    top = probs.topk(k).indices
    tail = probs.scatter(0, top, 0.0)
    assert set(ids[0, 1 : 1 + k].tolist()) == set(top.tolist())
    assert chi_square_p(torch.bincount(ids[:, 0], minlength=vocab), probs) > 1e-3
    assert (
        chi_square_p(torch.bincount(ids[:, 1 + k :].flatten(), minlength=vocab), tail / tail.sum())
        > 1e-3
    )
    expected = (tail / tail.sum()).log()[ids[:, 1 + k :]]
    torch.testing.assert_close(logp[:, 1 + k :].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        logp[:, : 1 + k].double(), probs.log()[ids[:, : 1 + k]], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("vocab", [200, 256, 4096])
def test_drawing_inverts_the_cumulative_sum_and_never_gives_an_impossible_id(vocab):
    """The block's ends included, where rounding could fall to either side."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, vocab, generator=generator)
    probs[torch.rand(3, vocab, generator=generator) < 0.5] = 0.0
    probs[:, :130] = probs[:, -3:] = 0.0  # the first block and the last ids
    ends = probs.double().cumsum(-1)
    uniforms = torch.cat(
        [torch.rand(3, 500, dtype=torch.float64, generator=generator), ends / ends[:, -1:]], 1
    )
    uniforms = (
        torch.cat([uniforms, torch.zeros(3, 1), torch.full((3, 1), 1 - 2.0**-53)], 1)
        .clamp(max=1 - 2.0**-53)
        .double()
    )
    ids = draw(probs, uniforms)
    assert (probs.gather(1, ids) > 0).all()
    expected = torch.searchsorted(ends, uniforms[:, :500] * ends[:, -1:], right=True)
    assert torch.equal(ids[:, :500], expected)


def test_no_entry_of_width_0_is_found_whatever_rounding_does_to_the_target():
    weights = torch.tensor([[0.0, 0.0, 1.0, 0.0, 2.0, 0.0]])
    target = torch.tensor([[-1e-17, 0.0, 1.0, 3.0, 3.0 + 1e-15]], dtype=torch.float64)
    assert find(weights, target).tolist() == [[2, 2, 4, 4, 4]]
    # The learner says what is wrong.
    assert 0 <= int(find(torch.full((1, 4), float("nan")), target).max()) < 4


def test_an_id_keeps_its_probability_in_blocks_of_any_weight():
    """Ids of 1e-8 between two blocks of 60: a cumulative sum in float32 could not tell them apart.

    The uniforms that draw an id are an interval. Its length is the id's probability.
    """
    heavy = torch.rand(2, 128, generator=torch.Generator().manual_seed(0))
    probs = torch.cat([heavy[0], torch.full((128,), 1e-8), heavy[1]])[None]
    ids = torch.arange(385)
    low, high = torch.zeros(2, 385, dtype=torch.float64)  # where the interval of an id begins
    high += 1 - 2.0**-53
    for _ in range(60):
        middle = (low + high) / 2
        is_left = draw(probs, middle[None])[0] < ids
        low, high = torch.where(is_left, middle, low), torch.where(is_left, high, middle)
    expected = probs[0].double() / probs.double().sum()
    torch.testing.assert_close(high.diff(), expected, rtol=3e-6, atol=0)  # uniforms: 1e-16


@pytest.mark.parametrize("loss, passes", [("stratified_reverse_kl", 11), ("sampled_reverse_kl", 5)])
def test_sampling_passes_over_the_logits_at_most_a_dozen_times(loss, passes):
    """Tensors of their size that operators read and write; torch.topk counts as one."""
    rows, vocab = 6, 4096

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            is_view = func in (
                torch.ops.aten.view.default,
                torch.ops.aten._unsafe_view.default,
                torch.ops.aten.detach.default,
            )
            is_sparse = func in (
                torch.ops.aten.scatter_.value,
                torch.ops.aten.gather.default,
                torch.ops.aten.index.Tensor,
            )
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if not is_view and not is_sparse:
                self.seen += sum(x.numel() >= rows * vocab for x in tensors)
            return out

    proposal = make_loss(builtin(loss=loss, top_k=28, num_samples=4))
    logits, uniforms = (
        torch.randn(rows, vocab),
        torch.rand(rows, proposal.num_uniforms, dtype=torch.float64),
    )
    with Count() as count:
        proposal.propose(logits, uniforms)
    assert count.seen == passes


def test_tail_log_mass_is_right_where_one_minus_the_top_mass_would_be_zero():
    logits = torch.zeros(1, 64)
    logits[0, :4] = 60.0  # the tail holds 60 / 4 e^-60 of the mass, far below float32's 1 - mass
    loss = make_loss(builtin(loss="stratified_reverse_kl", top_k=4, num_samples=1))
    ids, logp = loss.propose(logits, torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    assert ids[0, 5] >= 4
    assert float(logp[0, 5]) == pytest.approx(-math.log(60), abs=1e-4)


def test_temperature_scales_the_logits_of_draws_and_log_probabilities(model_dir):
    path = model_dir()
    generator = new_generator(load_with_slots(path), loss="sampled_reverse_kl", temperature=0.7)
    rollout = generator.generate([Rollout(prompts(1)[0])])[0]
    ids = rollout.prompt_ids + rollout.response_ids
    with torch.no_grad():
        logp = (load(path)(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
    expected = logp[len(rollout.prompt_ids) - 1 : len(ids) - 1].gather(1, rollout.candidate_ids)
    torch.testing.assert_close(rollout.behavior_logp, expected, atol=2e-5, rtol=0)


def test_only_ids_below_the_shared_vocabulary_are_drawn(model_dir):
    generator = new_generator(
        load_with_slots(model_dir()), stops=(), loss="sampled_reverse_kl", num_samples=8, vocab=100
    )
    rollouts = generator.generate(
        [Rollout(ids, ticket=i) for i, ids in enumerate(prompts(8, vocab=100))]
    )
    assert max(int(r.candidate_ids.max()) for r in rollouts) < 100


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_evaluation_between_rollouts_takes_their_slots_and_changes_none_of_them(
    family, model_dir, tokenizer
):
    config = builtin(
        student=model_dir(family),
        teacher=model_dir(family),
        max_prompt_tokens=20,
        max_new_tokens=12,
        slots=3,
        top_k=4,
    )
    held_out = [
        Prompt(text, tokenizer(text).input_ids, answer)
        for text, answer in running_sums(5, 0, heldout=True)
    ]
    with_evaluation, without = (Sampler(config, CPU, 8, prompts) for prompts in (held_out, []))
    assert with_evaluation.greedy.cache is with_evaluation.generator.cache
    found = []
    for sampler in (with_evaluation, without):
        first = sampler.generator.generate(
            [Rollout(ids, ticket=i) for i, ids in enumerate(prompts(7))]
        )
        if sampler.held_out:
            assert sampler.evaluate() == sampler.evaluate()
        second = sampler.generator.generate(
            [Rollout(ids, ticket=7 + i) for i, ids in enumerate(prompts(7))]
        )
        found.append([(r.response_ids, r.behavior_logp) for r in first + second])
    for (ids, logp), (expected_ids, expected_logp) in zip(*found):
        assert ids == expected_ids and torch.equal(logp, expected_logp)
    (keys, _), *_ = with_evaluation.generator.cache.layers.values()
    assert len(keys) == 3  # the only cache there is


def test_flat_parameters_hold_tied_weights_once():
    model = build_model("qwen3")
    expected = sum(p.numel() for p in model.parameters())
    flat = flatten_parameters(model)
    assert flat.numel() == expected
    flat.fill_(3.0)
    assert all(bool((p == 3.0).all()) for p in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert expected < sum(p.numel() for p in build_model("llama").parameters())


@pytest.mark.parametrize("slots", [5, 16, 20, 100])
def test_a_step_computes_few_slots_more_than_are_active(slots, model_dir):
    """On a CPU 7 to 15 as 16, which is faster; on a GPU a power of two: few graphs."""
    generator = new_generator(load_with_slots(model_dir()), slots=slots)
    for active in range(1, slots + 1):
        generator.active = [None] * active
        generator.device = torch.device("cpu")
        expected = 16 if 7 <= active <= 15 else active
        assert generator.computed_slots == min(slots, expected)
        generator.device = torch.device("cuda")
        power = next(1 << n for n in range(9) if 1 << n >= active)
        assert generator.computed_slots == min(slots, power)


def test_idle_slots_that_run_along_change_nothing(model_dir):
    """7 to 15 rollouts in 16 slots, where earlier ones have left keys, positions and counters."""
    model = load_with_slots(model_dir())
    options = {"slots": 16, "loss": "sampled_reverse_kl", "stops": ()}
    used, alone = new_generator(model, **options), new_generator(model, **options)
    used.generate([Rollout(ids, ticket) for ticket, ids in enumerate(prompts(16))])
    for (keys, values), x in zip(used.cache.layers.values(), (1e3, -1e3)):
        keys.fill_(x), values.fill_(x)
    few = [[Rollout(ids, 50 + i) for i, ids in enumerate(prompts(9))] for _ in range(2)]
    for a, b in zip(used.generate(few[0]), alone.generate(few[1])):
        assert a.response_ids == b.response_ids and torch.equal(a.behavior_logp, b.behavior_logp)


class RecordedGraph:
    """What torch.cuda.CUDAGraph is to `replay`: a capture executes nothing, and `replay` does."""

    capturing = None

    def pool(self):
        return "a pool"

    @classmethod
    @contextmanager
    def capture(cls, graph, pool):
        cls.capturing = graph
        yield
        cls.capturing = None

    @classmethod
    def around(cls, decode):
        def step(*arguments):
            if cls.capturing:
                cls.capturing.replay = lambda: decode(*arguments)
            else:
                decode(*arguments)

        return step


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_through_graphs_of_a_few_shapes_change_nothing(family, model_dir, monkeypatch):
    """The real `replay`: the first step of a shape, idle slots."""
    kwargs = dict(slots=6, loss="stratified_reverse_kl", top_k=4, num_samples=2)
    model = load_with_slots(model_dir(family))
    rollouts = [[Rollout(ids, ticket=i) for i, ids in enumerate(prompts(13))] for _ in range(2)]
    plain = new_generator(model, **kwargs).generate(rollouts[0])
    padded = new_generator(model, **kwargs)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", RecordedGraph.capture)
    recorded = RecordedGraph.around(padded.decode)

    def on_a_gpu(active):  # `step` calls `decode` on the CPU and `replay` on a GPU
        padded.decode = recorded
        padded.replay(min(6, 1 << (active - 1).bit_length()))
        padded.decode = on_a_gpu

    padded.decode = on_a_gpu
    for a, b in zip(plain, padded.generate(rollouts[1])):
        assert a.response_ids == b.response_ids
        torch.testing.assert_close(a.behavior_logp, b.behavior_logp, atol=2e-5, rtol=0)
    assert padded.graphs.keys() <= {1, 2, 4, 6}
    assert padded.pool == "a pool"


def test_flat_parameters_keep_the_dtype_of_the_head_and_every_value():
    """Also where a parameter has another dtype (some mixtures of experts) or is not contiguous."""
    model = build_model("llama").bfloat16()
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    before = [p.detach().float().clone() for p in model.parameters()]
    flat = flatten_parameters(model)
    assert flat.dtype == torch.bfloat16
    assert all(torch.equal(p.float(), b) for p, b in zip(model.parameters(), before))
    flat.zero_()
    assert not any(p.any() for p in model.parameters())

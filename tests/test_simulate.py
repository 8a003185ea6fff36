"""Claims about the simulation: where the answer is known exactly, it gives that answer."""

import csv
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from experiments import memory, scaling, validate
from experiments.count import Counted, Kernels
from experiments.simulate import RESULTS, Cores, Machine, Queue, Result, Simulation
from experiments.stages import H100, Model, Stages, measured
from support.config import builtin
from support.data import Prompt
from tickets import may_start

PROMPTS = [Prompt("", [0] * 10)]
FREE = Stages((0.0, 0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)
SLOW = Stages(
    step=(0.5, 0.0, 0.0), fill=(0.25, 0.0), pass_teacher=(2.0, 0.0), pass_learner=(3.0, 0.0),
    update=0.125, publishing=0.0625, picking_up=0.03125,
)  # fmt: skip


def simulate(
    stages, lengths=lambda ticket: 8, nodes=1, cores=0, skip=0, stride=1, pool=False, **settings
):
    settings = {"steps": 6, "batch_size": 4, "slots": 64, "max_staleness": 0} | settings
    simulation = Simulation(
        builtin(**settings), stages, lengths, PROMPTS, nodes, cores, stride, pool
    )
    return simulation, simulation.run(skip)


def test_a_synchronous_update_is_the_sum_of_its_stages():
    """One rollout an update: nothing overlaps. 8 steps, one forward pass each."""
    _, result = simulate(SLOW, batch_size=1, steps=5)
    alone = 8 * 0.5 + 0.25 + 2.0 + 3.0 + 0.125 + 0.0625 + 0.03125
    assert result.seconds == pytest.approx(alone)
    assert result.lag_mean == 0.0
    assert result.busy["teacher"] == pytest.approx(2.0 / result.seconds)
    assert result.tokens_per_second == pytest.approx(8 / result.seconds)


def test_equal_answers_take_one_wave_of_decoding_a_batch():
    """All roles but the generator are free.
    4 rollouts in 2 slots of equal length: two waves of (prefill, 8 steps)."""
    stages = replace(FREE, step=(0.5, 0.1, 0.0), fill=(0.25, 0.0))
    assert simulate(stages)[1].seconds == pytest.approx(0.25 + 8 * (0.5 + 4 * 0.1))
    assert simulate(stages, slots=2)[1].seconds == pytest.approx(2 * (0.25 + 8 * (0.5 + 2 * 0.1)))


@pytest.mark.parametrize("stride", [1, 3, 100])
def test_steps_of_one_event_cost_what_they_cost_one_by_one(stride):
    """Also where the cost grows with the length. Answers of 3, 5, 8, 13 tokens."""
    stages = replace(FREE, step=(0.5, 0.1, 0.01))
    lengths = (3, 5, 8, 13)
    _, result = simulate(stages, lambda ticket: lengths[ticket % 4], stride=stride)
    expected = 0.0
    for step in range(13):
        active = sum(length > step for length in lengths)
        expected += 0.5 + 0.1 * active + 0.01 * active * (10 + step)
    assert result.seconds == pytest.approx(expected)


@pytest.mark.parametrize("role, stages, seconds", [
    # In ticket order it scores a quarter of a batch at a time.
    ("teacher", replace(FREE, pass_teacher=(1.5, 0.0)), 4 * 1.5),
    ("learner", replace(FREE, pass_learner=(2.5, 0.0), update=0.5), 2.5 + 0.5),
    ("generator", replace(FREE, step=(0.5, 0.0, 0.0)), 8 * 0.5),
])  # fmt: skip
def test_with_staleness_the_only_role_that_costs_anything_sets_the_pace(role, stages, seconds):
    """It is never idle, and the others take no time. So lag cannot make it faster."""
    for staleness in (0, 1, 3):
        _, result = simulate(stages, max_staleness=staleness, slots=4)
        assert result.seconds == pytest.approx(seconds)
        assert result.busy[role] == pytest.approx(1.0)


def test_two_roles_of_equal_cost_take_turns_without_lag_and_overlap_with_it():
    stages = replace(FREE, step=(0.5, 0.0, 0.0), pass_learner=(4.0, 0.0))
    assert simulate(stages, max_staleness=0, slots=4)[1].seconds == pytest.approx(8.0)
    overlapped = simulate(stages, max_staleness=1, slots=4, skip=2)[1]
    assert overlapped.seconds == pytest.approx(4.0) and overlapped.lag_mean == pytest.approx(1.0)


def test_no_token_is_drawn_by_weights_that_the_inequality_forbids():
    simulation, _ = simulate(
        SLOW,
        lambda ticket: 1 + ticket % 7,
        max_staleness=2,
        slots=2,
        generators=2,
        window=100,
        steps=12,
    )
    assert simulation.updates and all(lags >= 0 for _, _, lags, _ in simulation.updates.values())
    (node,) = simulation.at
    for response in node.responses.values():
        assert may_start(response.ticket, response.parts[0][0], simulation.config)


def test_littles_law_holds_on_every_queue():
    """Rows in a queue at a time, on average,
    are arrivals a second times the seconds that each stays."""
    stages = replace(SLOW, step=(0.05, 0.0, 0.0))
    simulation, _ = simulate(
        stages, lambda ticket: 1 + (7 * ticket) % 5, max_staleness=3, slots=3, steps=20
    )
    channel = simulation.at[0].channel
    for queue in (channel.to_generator, *channel.to_teachers, channel.to_learner):
        queue.count()
        still = sum(simulation.machine.now - entered for entered in queue.entered)
        assert queue.area == pytest.approx(sum(queue.waits) + still) and queue.waits
    assert max(channel.to_generator.waits) > 0


def test_a_queue_counts_a_row_from_put_to_get():
    machine = Machine()
    queue = Queue(machine)
    queue.put([1, 2])
    machine.now = 2.0
    assert queue.get() == 1
    machine.now = 5.0
    assert queue.get_all() == [2] and queue.get() is None
    queue.count()
    assert queue.waits == [2.0, 5.0] and queue.area == 2 * 2.0 + 1 * 3.0


def test_processes_share_cores_as_linux_shares_them():
    """Three that need 2, 4 and 6 seconds on two cores, a quarter slower while both work,
    and half as fast with several."""

    def work(seconds):
        yield seconds
        while True:
            yield None

    machine = Cores(2, beside=0.25, shared=1.0)
    for seconds in (2.0, 4.0, 6.0):
        machine.add(0, work(seconds))
    when = []
    while machine.step():
        when.append(machine.now)
    # 2 s and 6 s share a core, 4 s has the other and is done after 5 s.
    # Each of those that share has done 1 s then, and has a core.
    assert when == pytest.approx([1.25 * 4, 1.25 * 4 + 1.25, 1.25 * 4 + 1.25 + 4.0])


def test_a_core_without_work_takes_some_from_a_full_one():
    def work(*parts):
        yield from parts
        while True:
            yield None

    machine = Cores(2)
    # The first and the third share a core; at 2 s it has one left, like the other.
    for parts in ((1.0,), (3.0,), (3.0,)):
        machine.add(0, work(*parts))
    when = []
    while machine.step():
        when.append(machine.now)
    assert when == pytest.approx([2.0, 3.0, 4.0])


def test_nodes_wait_for_the_slowest_and_add_up_what_they_train():
    """Node 1 has the odd tickets, whose answers are twice as long."""
    stages = replace(FREE, step=(0.5, 0.0, 0.0), exchange=(0.25, 0.125))
    simulation, result = simulate(stages, lambda ticket: 16 if ticket % 2 else 8, nodes=2)
    assert result.seconds == pytest.approx(16 * 0.5 + 0.25 + 2 * 0.125)
    assert result.tokens_per_second == pytest.approx((2 * 16 + 2 * 8) / result.seconds)
    waited = [sum(node.waited) for node in simulation.at]
    assert waited == pytest.approx([6 * 4.0, 0.0])
    assert result.waited == pytest.approx(2.0 / result.seconds)


def test_a_shared_pool_does_not_wait_for_the_slowest_node():
    stages = replace(FREE, step=(0.5, 0.0, 0.0))
    common = dict(
        lengths=lambda ticket: 32 if ticket % 2 else 4,
        nodes=2,
        window=100,
        max_staleness=2,
        steps=20,
        slots=2,
        batch_size=8,
    )
    plain, pooled = (simulate(stages, pool=pool, **common)[1] for pool in (False, True))
    assert pooled.waited < plain.waited and pooled.seconds < plain.seconds


def test_a_run_in_which_all_wait_for_ever_is_an_error():
    simulation = Simulation(builtin(steps=2, batch_size=4), FREE, lambda ticket: 8, PROMPTS)
    simulation.at[0].channel.to_teachers[0].put = lambda rows: None  # lost on the way
    with pytest.raises(RuntimeError, match="all wait for each other after 0 updates"):
        simulation.run()


def test_scales_are_found_that_give_a_run_back(monkeypatch):
    """From other costs, without seeing these:
    the run of `truth` comes out, also at a staleness it was not fitted to."""
    truth = replace(SLOW, step=(0.05, 0.0, 0.0))
    config = builtin(steps=6, batch_size=4, max_staleness=0)

    def run(config, stages, nodes=1, cores=2, skip=0):
        return Simulation(config, stages, lambda ticket: 8, PROMPTS, nodes, cores).run(skip)

    monkeypatch.setattr(validate, "simulate", run)
    guess = truth.scaled(generator=0.7, teacher=1.4, learner=0.5)
    found = validate.fitted(guess, config, run(config, truth))
    for staleness in (0, 2):
        other = replace(config, max_staleness=staleness)
        assert run(other, found).seconds == pytest.approx(run(other, truth).seconds, rel=0.001)


# ---- the costs of a GPU, the lengths -------------------------------------------------------------


def test_costs_of_a_gpu_follow_from_its_peaks():
    counted = Counted(
        step=Kernels(900, 2e6),
        forward=Kernels(700, 1e6),
        scoring=Kernels(800, 3e6),
        training=Kernels(2000, 9e6),
    )
    model = Model(1e9, active=1e9, layers=10, width=1000, keys=500, counted=counted)
    costs = H100(model, model, ranks=4, recompute=False)
    read = (2e9 + 4 * 8 * 100 * 10 * 500) / (3.35e12 * 0.6)
    rest = 8 * 2e6 / (3.35e12 * 0.6) + 900 * 2e-6
    assert costs.decode(8, 100, 1) == pytest.approx(read + rest)  # bound by memory
    assert costs.decode(8, 100, 3) == pytest.approx(
        sum(costs.decode(8, 100 + i, 1) for i in range(3))
    )
    products = (2 * 1e9 * 1e6 + 2 * 10 * 1000 * 1000 * 1e6) / (989e12 * 0.6)
    scoring = 1e6 * 3e6 / (3.35e12 * 0.6) + 800 * 2e-6
    assert costs.score([(1000, 1000)]) == pytest.approx(products + scoring)
    training = 1e6 * 9e6 / (3.35e12 * 0.6) + 2000 * 2e-6
    assert costs.accumulate([(1000, 1000)]) == pytest.approx((3 * products + training) / 4)
    again = H100(model, model, ranks=4, recompute=True)
    forward = 1e6 * 1e6 / (3.35e12 * 0.6) + 700 * 2e-6
    recomputing = (4 * products + training + forward) / 4
    assert again.accumulate([(1000, 1000)]) == pytest.approx(recomputing)
    # A ring over 8 nodes: each rank sends its quarter of the gradient 2 * 7 / 8 times.
    assert costs.apply(8) - costs.apply(1) == pytest.approx(2 * 7 * (1e9 / 8 / 50e9 + 20e-6))


@pytest.mark.parametrize("spread", [0.2, 0.8, 1.2])
def test_lengths_have_the_mean_that_is_asked_for_and_never_more_than_the_longest(spread):
    lengths = scaling.response_lengths(1000, 4096, spread)
    drawn = [lengths(ticket) for ticket in range(4000)]
    assert (
        sum(drawn) / 4000 == pytest.approx(1000, rel=0.05)
        and 1 <= min(drawn)
        and max(drawn) <= 4096
    )
    assert drawn[:5] == [
        scaling.response_lengths(1000, 4096, spread)(ticket) for ticket in range(5)
    ]


@pytest.mark.slow
def test_a_plan_fits_the_gpus_it_is_for():
    job = scaling.Job("0.6B", "8B", 256, 512, batch=64)
    found = scaling.candidates(job)
    assert found and all(
        one.ranks + one.generators + one.teachers * one.teacher_gpus == 8 for one in found
    )
    split, result = scaling.best(job, tries=2)
    assert isinstance(result, Result) and result.tokens_per_second > 0 and split in found


def test_the_page_shows_the_committed_comparison_with_every_error():
    rows = list(csv.DictReader(open(RESULTS / "simulated.csv")))
    text = (ROOT / "docs" / "simulation.md").read_text()
    assert [row["run"] for row in rows] == list(validate.RUNS)
    for row in rows:
        predicted, measured = (
            float(row[f"{kind}_tokens_per_second"]) for kind in ("predicted", "measured")
        )
        assert float(row["speed_error"]) == pytest.approx(predicted / measured - 1, abs=1e-4)
        percent = 100 * float(row["speed_error"])
        shown = f"| {row['run']} | {predicted:,.0f} | {measured:,.0f} | {percent:+.1f} % |"
        assert shown in text and f"| {float(row['lag_error']):+.2f} |" in text


def test_the_stages_of_this_machine_are_measured_from_serial_updates():
    threads = torch.get_num_threads()
    found = measured([builtin(batch_size=8, eval_size=8)], updates=2)
    torch.set_num_threads(threads)
    assert found.step[0] > 0 and sum(found.pass_teacher) > 0 and sum(found.pass_learner) > 0
    assert min(found.update, found.publishing, found.picking_up) > 0


@pytest.mark.slow
def test_a_plan_for_two_teachers_gives_each_its_processes_and_half_of_the_prompts():
    one = scaling.Job("0.6B", "8B", 512, 2048)
    both = replace(one, teacher="8B+1.7B")
    for split in scaling.candidates(both)[:20]:
        assert split.ranks + split.generators + 2 * split.teachers * split.teacher_gpus == 8
        *_, alone, _ = scaling.closed_form(one, split)
        assert scaling.closed_form(both, split)[1] == pytest.approx(alone / 2)  # of the larger
    config = scaling.config_of(both, split)
    assert config.teacher_processes == ["8B"] * split.teachers + ["1.7B"] * split.teachers
    roles = ["learner", "generator", "teacher 8B", "teacher 1.7B"]
    assert [*memory.needed(config, 1, 2)] == roles

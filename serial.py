"""On-policy distillation in one process: `python serial.py` trains the built-in student.

This is the whole algorithm, before the system. The student writes rollouts, the teacher scores
them, the learner trains on them, and the new weights go back to the generator. train.py makes the
same calls, each in a process of its own, so that they overlap. Then rollouts come from older
weights than those they train. Here the lag is exact: `--max-staleness 8` takes every rollout from
the weights of 8 updates ago (in the first 8 updates: from the first weights). Options of train.py
that concern processes, resuming or output have no effect here.

Letters of shapes, in all files:

    B  rollouts of an update        R  rows of the rollout table
    L  longest sequence             M  longest response
    T  response tokens at hand      C  candidates of a token
    K  top ids among them           N  draws among them
    S  decode slots                 A  active slots
    F  features of a hidden state   V  vocabulary
    H  key-value heads              E  head size
    P  parameters                   G  positions of a chunk of logits
"""

import sys
from collections import deque
from dataclasses import replace

import torch

from channel import Channel, read_rollout, write_rollout
from generate import Sampler
from learner import Learner
from model import flat_parameters
from support.config import Config, InputError, parse
from support.data import load_prompts
from support.load import check_models, load_model, load_tokenizer, shared_vocabulary
from teacher import Teacher
from tickets import Tickets

CPU = torch.device("cpu")


class Serial:
    """Generator, teacher and learner in one process, called in turn."""

    def __init__(self, config: Config, lag: int, prompts, held_out):
        """`lag` is exact and replaces `config.max_staleness`.

        `prompts`, `held_out`: data.Prompt objects to train on and to evaluate on.
        """
        self.config = config = replace(config, max_staleness=0, window=0, teachers="1")
        student = load_model(config.path("student"), torch.float32, CPU)
        vocab = shared_vocabulary(config)
        self.learner = Learner(student, config, vocab, torch.float32)
        models = [load_model(path, torch.float32, CPU) for path in config.teacher_paths.values()]
        self.teachers = [Teacher(model, config, vocab) for model in models]
        self.sampler = Sampler(config, CPU, config.batch_size, held_out)
        self.lag = lag
        first = flat_parameters(student)
        self.versions = deque([first], maxlen=lag + 1)  # [P] each; the last is the newest
        self.channel = Channel.create(config, len(first), torch.float32)
        self.tickets = Tickets(config, self.channel, prompts)

    def update(self):
        """Sample a batch with the weights of `lag` updates ago, score it, train on it."""
        channel, version = self.channel, self.learner.version
        self.tickets.issue(version)
        rows = channel.to_generator.get_all()
        self.sample(rows)
        for number, teacher in enumerate(self.teachers):
            teacher.score(channel, [row for row in rows if channel.teacher[row] == number])
        self.tickets.receive(rows)
        rows = self.tickets.batch(version)
        metrics = self.learner.update(channel, rows)
        self.tickets.trained(channel.ticket[rows].tolist())
        self.versions.append(flat_parameters(self.learner.model))
        return metrics

    def sample(self, rows):
        """Write one rollout into each of the rows."""
        self.pick_up(min(self.lag, self.learner.version))
        rollouts = [read_rollout(self.channel, row) for row in rows]
        for rollout in self.sampler.generator.generate(rollouts):
            write_rollout(self.channel, rollout)

    def pick_up(self, behind: int):
        """Give the sampler the weights of `behind` updates ago."""
        self.sampler.weights.copy_(self.versions[-1 - behind])
        self.sampler.generator.version = self.learner.version - behind

    def accuracy(self):
        """Greedy accuracy of the newest weights on the evaluation prompts that have answers."""
        self.pick_up(0)
        verdicts = [answer["correct"] for answer in self.sampler.evaluate()]
        return verdicts.count(True) / (len(verdicts) - verdicts.count(None))


def train(config: Config):
    for note in check_models(config):
        print(f"note: {note}")
    prompts, held_out = load_prompts(config, load_tokenizer("--student", config.path("student")))
    run = Serial(config, config.max_staleness, prompts, held_out)
    has_answers = any(prompt.answer for prompt in held_out)
    if has_answers:
        print(f"accuracy before training {run.accuracy():.1%}")
    for step in range(1, config.steps + 1):
        metrics = run.update()
        numbers = f"reverse KL {metrics['reverse_kl']:.4f}  lag {metrics['lag_mean']:.2f}"
        print(f"update {step:4d}/{config.steps}  {numbers}")
    if has_answers:
        print(f"accuracy after training {run.accuracy():.1%}")


if __name__ == "__main__":
    try:
        train(parse())
    except (InputError, MemoryError, FloatingPointError) as error:
        sys.exit(f"serial.py: error: {error}")

"""The run's settings: one frozen dataclass; every flag of train.py is generated from it.

`--config FILE.yaml` sets fields by name, flags win over it, and `config.yaml` in the output directory is
the dump of the object that the run used. Derived values are properties.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from losses import CORRECTIONS, LOSSES, SIGNALS, candidate_columns

ASSETS = Path(__file__).resolve().parent / "assets"


SECTIONS = {  # first field of each section of --help
    "teacher": "models and prompts", "loss": "what is learned", "max_staleness": "how asynchronous",
    "steps": "optimisation", "generators": "machine", "output_dir": "output",
}  # fmt: skip


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value, the limit and the fix."""


def option(default, help: str, choices: tuple = (), least: float | None = None, most: float = sys.float_info.max):
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    teacher: str = option("builtin", "teacher: directory or hub id; builtin: the shipped one")
    student: str = option("builtin", "student to train: directory or hub id; builtin: the shipped one")
    prompts: str = option("", "JSONL of training prompts: `prompt` text or `messages` list, optional `answer`; empty: built-in task")
    eval_prompts: str = option("", "JSONL of evaluation prompts with answers; empty: hold some of --prompts out")
    eval_size: int = option(256, "evaluation prompts, at most a tenth of --prompts when held out of it", least=1, most=10_000)
    drop_long_prompts: bool = option(False, "drop prompts above --max-prompt-tokens instead of stopping")
    max_prompt_tokens: int = option(64, "longest prompt, tokens", least=1)
    max_new_tokens: int = option(40, "longest response, tokens, stop token included", least=1)
    loss: str = option("stratified_reverse_kl", "distillation loss, see losses.py", LOSSES)
    top_k: int = option(28, "top-K ids a position (all losses but sampled_reverse_kl)", least=1)
    num_samples: int = option(4, "draws a position (stratified: of the tail; sampled_reverse_kl alone wants 16 or more)", least=1)
    signal: str = option("current", "sampled_reverse_kl: advantage from the current student or as at rollout", SIGNALS)
    correction: str = option("is", "sampled_reverse_kl: correction for stale samples", CORRECTIONS)
    temperature: float = option(1.0, "softmax temperature of sampling, and of student and teacher in the loss", least=0.001)
    max_staleness: int = option(1, "rollouts may start this many updates early, which bounds their lag in batch order; 0: synchronous", least=0)
    order: str = option("batch", "train batches in ticket order, or whatever finished first", ("batch", "arrival"))
    refresh: str = option("in_flight", "new weights between decode steps, or when a generator is drained", ("in_flight", "batch"))
    steps: int = option(200, "updates in total, those before --resume included", least=1)
    batch_size: int = option(64, "rollouts per update, over all ranks", least=1)
    samples_per_prompt: int = option(1, "rollouts per prompt and epoch", least=1)
    lr: float = option(1e-3, "AdamW learning rate after warm-up", least=1e-12)
    warmup_steps: int = option(10, "updates of linear warm-up, constant after", least=0)
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only", least=0)
    max_grad_norm: float = option(1.0, "gradient clipping, global L2 norm", least=1e-12)
    micro_batch_tokens: int = option(8192, "padded tokens of a forward pass at the learner and at the teacher", least=1)
    head_chunk: int = option(1024, "positions whose logits exist at once", least=1)
    seed: int = option(0, "seed of prompt order and sampling", least=0, most=2**32 - 1)
    generators: int = option(1, "generation processes", least=1)
    slots: int = option(64, "sequences decoded at once by a generator", least=1)
    teacher_cache_mb: int = option(64, "LRU cache of teacher top-k scores, MiB; 0: off", least=0)
    dtype: str = option("auto", "of generation, teacher and autocast; auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16"))
    cpu_threads: int = option(0, "CPU threads of each role; 0: cores / roles, 1 at least", least=0)
    output_dir: str = option("runs/default", "metrics.jsonl, trace.json, config.yaml, step_N/")
    eval_every: int = option(50, "updates between greedy evaluations; 0: never", least=0)
    save_every: int = option(100, "updates between checkpoints; 0: only at the end and when interrupted", least=0)
    resume: bool = option(False, "continue from the newest checkpoint in --output-dir")

    def __post_init__(self):
        for item in fields(self):
            value, choices, least, most = (getattr(self, item.name), *(item.metadata[key] for key in ("choices", "least", "most")))
            if choices and value not in choices:
                raise ConfigError(f"{flag(item.name)} is {value!r}: one of {', '.join(choices)}")
            if least is not None and not least <= value <= most:
                limit = f"{most} is the most" if value > most and most < sys.float_info.max else f"{least} is the least"
                raise ConfigError(f"{flag(item.name)} is {value}: {limit}")
        if self.loss != "sampled_reverse_kl" and (self.signal, self.correction) != ("current", "is"):
            raise ConfigError(f"--signal and --correction belong to sampled_reverse_kl; --loss is {self.loss}: leave them out")
        if self.table_rows > 16_384:
            raise ConfigError(f"{self.table_rows} rollouts in flight, the limit is 16384: lower --batch-size or --max-staleness")
        if self.max_sequence > self.micro_batch_tokens:
            raise ConfigError(
                f"--micro-batch-tokens is {self.micro_batch_tokens}, one sequence may have {self.max_sequence}: "
                "raise it or lower --max-prompt-tokens / --max-new-tokens"
            )

    @property
    def teacher_path(self) -> str:
        return str(ASSETS / "teacher") if self.teacher == "builtin" else os.path.expanduser(self.teacher)

    @property
    def student_path(self) -> str:
        return str(ASSETS / "student") if self.student == "builtin" else os.path.expanduser(self.student)

    @property
    def max_sequence(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def table_rows(self) -> int:
        """Rollouts that exist at once: exactly what the inequality in channel.py admits."""
        return (1 + self.max_staleness) * self.batch_size

    @property
    def columns(self) -> dict[str, slice]:
        return candidate_columns(self.loss, self.top_k, self.num_samples)

    def dump(self) -> str:
        """The YAML that starts an equal run; continuing is not a property of the run."""
        return yaml.safe_dump({name: value for name, value in asdict(self).items() if name != "resume"}, sort_keys=False)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


FLAGS = {flag(item.name) for item in fields(Config)}


def unknown_flag(name: str) -> str:
    near = difflib.get_close_matches(name, FLAGS, 1)
    if not name.startswith("-"):
        return f"unexpected argument {name}: options are --name value, or --name alone for yes and --no-name for no"
    return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else ": see --help")


def parse(argv: list[str] | None = None) -> Config:
    """Command line to Config. Exits with a message on an unknown flag or a setting that cannot work."""
    formatter = functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=32, width=110)
    parser = argparse.ArgumentParser(
        "train.py", usage="torchrun --standalone --nproc-per-node=1 -- train.py [--config FILE.yaml] [options]",
        description="Asynchronous on-policy distillation.", formatter_class=formatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="options by name, as in a run's config.yaml; flags win over it")
    group = parser
    for item in fields(Config):
        group = parser.add_argument_group(SECTIONS[item.name]) if item.name in SECTIONS else group
        kind, choices = type(item.default), item.metadata["choices"]
        extra = {"type": kind, "choices": choices} if choices else {"type": kind, "metavar": {str: "TEXT", int: "N", float: "X"}.get(kind)}
        extra = {"action": argparse.BooleanOptionalAction} if kind is bool else extra
        group.add_argument(flag(item.name), default=item.default, help=item.metadata["help"], **extra)
    argv = sys.argv[1:] if argv is None else argv
    path = parser.parse_known_args(argv)[0].config
    try:
        values, unknown = parser.parse_known_args((yaml_flags(path) if path else []) + argv)
        if unknown:
            raise ConfigError(unknown_flag(unknown[0]))
        del values.config
        return Config(**vars(values))
    except ConfigError as error:
        parser.error(str(error))


def yaml_flags(path: str) -> list[str]:
    """A YAML mapping of option names as the flags it stands for, so that both are checked alike."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: a mapping of option names is needed, as in a run's config.yaml")
    flags = {flag(str(name)): "" if value is None else value for name, value in values.items()}
    for unknown in flags.keys() - FLAGS:
        raise ConfigError(f"--config {path}: {unknown_flag(unknown)}")
    return [
        f"--no-{name[2:]}" if value is False else name if value is True else f"{name}={value}" for name, value in flags.items()
    ]

"""The run's settings: one frozen dataclass. Every flag of train.py is generated from it.

`--config FILE.yaml` sets fields by name, and flags win over it. `config.yaml` in the output
directory is the dump of the object that the run used. Derived values are properties.
"""

import argparse
import difflib
import functools
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from losses import CORRECTIONS, LOSSES, SIGNALS, make_loss

ASSETS = Path(__file__).resolve().parent / "assets"
MAX_ROWS = 16_384  # of the rollout table: their numbers fit into a pipe
USAGE = "torchrun --standalone --nproc-per-node=1 -- train.py [options]"
SECTIONS = {  # of --help: the first option of each
    "teacher": "models and prompts",
    "loss": "what is learned",
    "max_staleness": "how asynchronous",
    "steps": "optimisation",
    "generators": "machine",
    "output_dir": "output",
}


class InputError(ValueError):
    """Input that cannot be used. The message names the value, the limit and the fix."""


def option(default, help: str, choices=(), least=0, most=sys.float_info.max):
    """A setting: text is one of `choices`, a number lies between `least` and `most`."""
    limits = {"choices": choices, "least": least, "most": most}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config:
    teacher: str = option("builtin", "teacher: directory or hub id; builtin: the shipped one")
    student: str = option("builtin", "student: directory or hub id; builtin: the shipped one")
    prompts: str = option("", "JSONL of training prompts; empty: the built-in task")
    eval_prompts: str = option("", "JSONL of evaluation prompts; empty: hold out of --prompts")
    eval_size: int = option(256, "evaluation prompts; at most a tenth of --prompts", (), 1, 10_000)
    drop_long_prompts: bool = option(False, "drop prompts above --max-prompt-tokens")
    max_prompt_tokens: int = option(64, "longest prompt, tokens", least=1)
    max_new_tokens: int = option(40, "longest response, tokens, stop token included", least=1)
    loss: str = option("stratified_reverse_kl", "distillation loss, see losses.py", LOSSES)
    top_k: int = option(28, "top ids a position; sampled_reverse_kl has none", least=1)
    num_samples: int = option(4, "draws a position; sampled_reverse_kl wants 16 or more", least=1)
    signal: str = option("current", "sampled_reverse_kl: source of the advantage", SIGNALS)
    correction: str = option("is", "sampled_reverse_kl: weight of stale samples", CORRECTIONS)
    temperature: float = option(1.0, "softmax temperature of sampling and loss", least=0.001)
    max_staleness: int = option(1, "updates that rollouts may start early; 0: synchronous")
    order: str = option("batch", "train in ticket order or as they finish", ("batch", "arrival"))
    refresh: str = option(
        "in_flight", "pick up weights between tokens or when drained", ("in_flight", "batch")
    )
    steps: int = option(200, "updates in total, those before --resume included", least=1)
    batch_size: int = option(64, "rollouts per update, over all ranks", least=1)
    samples_per_prompt: int = option(1, "rollouts per prompt and epoch", least=1)
    lr: float = option(1e-3, "AdamW learning rate after warm-up", least=1e-12)
    warmup_steps: int = option(10, "updates of linear warm-up, constant after")
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "gradient clipping, global L2 norm", least=1e-12)
    micro_batch_tokens: int = option(8192, "padded tokens of a forward pass", least=1)
    head_chunk: int = option(1024, "positions whose logits exist at once", least=1)
    seed: int = option(0, "seed of prompt order and sampling", most=2**32 - 1)
    generators: int = option(1, "generation processes", least=1)
    slots: int = option(64, "sequences that a generator decodes at once", least=1)
    teacher_cache_mb: int = option(64, "teacher's LRU cache of top-k scores, MiB; 0: off")
    dtype: str = option(
        "auto", "of all but masters; auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16")
    )
    cpu_threads: int = option(0, "CPU threads of each role; 0: cores / roles")
    output_dir: str = option("runs/default", "metrics.jsonl, trace.json, config.yaml, step_N/")
    eval_every: int = option(50, "updates between greedy evaluations; 0: never")
    save_every: int = option(100, "updates between checkpoints; 0: only at the end")
    resume: bool = option(False, "continue from the newest checkpoint in --output-dir")

    def __post_init__(self):
        for item in fields(self):
            check_value(flag(item.name), getattr(self, item.name), **item.metadata)
        is_default = (self.signal, self.correction) == ("current", "is")
        if self.loss != "sampled_reverse_kl" and not is_default:
            raise InputError(
                "--signal and --correction belong to sampled_reverse_kl; "
                f"--loss is {self.loss}: leave them out"
            )
        if self.table_rows > MAX_ROWS:
            raise InputError(
                f"{self.table_rows} rollouts in flight, the limit is {MAX_ROWS}: "
                "lower --batch-size or --max-staleness"
            )
        if self.max_sequence > self.micro_batch_tokens:
            raise InputError(
                f"--micro-batch-tokens is {self.micro_batch_tokens}, one sequence may have "
                f"{self.max_sequence}: raise it or lower --max-prompt-tokens / --max-new-tokens"
            )

    @property
    def teacher_path(self):
        return model_path(self.teacher, "teacher")

    @property
    def student_path(self):
        return model_path(self.student, "student")

    @property
    def output(self):
        return Path(self.output_dir)

    @property
    def trace(self):
        return self.output / "trace.json"

    @property
    def max_sequence(self):
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def table_rows(self):
        """Rollouts that exist at once: exactly what the inequality in channel.py admits."""
        return (1 + self.max_staleness) * self.batch_size

    @property
    def num_candidates(self):
        """Candidates of a position: the width of the table."""
        return make_loss(self).num_columns

    def dump(self):
        """YAML that starts an equal run. `resume` is left out: it says how a run was started."""
        values = asdict(self)
        del values["resume"]
        return yaml.safe_dump(values, sort_keys=False)


def check_value(name: str, value, help: str, choices, least, most):
    if choices and value not in choices:
        raise InputError(f"{name} is {value!r}: one of {', '.join(choices)}")
    if isinstance(value, str) or least <= value <= most:
        return
    limit = f"{most} is the most" if value > most else f"{least} is the least"
    raise InputError(f"{name} is {value}: {limit}")


def model_path(name: str, builtin: str):
    return str(ASSETS / builtin) if name == "builtin" else os.path.expanduser(name)


# ---- the command line -------------------------------------------------------------------------


def flag(name: str):
    return "--" + name.replace("_", "-")


FLAGS = {flag(item.name): item for item in fields(Config)}


def parse(argv=None, usage: str = USAGE):
    """Command line to Config. Exits with a message on a setting that cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser(usage)
    try:
        path = parser.parse_known_args(argv)[0].config
        from_file = yaml_flags(path) if path else []
        values, unknown = parser.parse_known_args(from_file + argv)
        if unknown:
            raise InputError(unknown_flag(unknown[0]))
        del values.config
        return Config(**vars(values))
    except InputError as error:
        parser.error(str(error))


def new_parser(usage: str):
    formatter = functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=32)
    parser = argparse.ArgumentParser(
        usage=usage,
        description="Asynchronous on-policy distillation.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML of options; flags win over it")
    section = parser
    for name, item in FLAGS.items():
        if item.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[item.name])
        kind, choices = type(item.default), item.metadata["choices"]
        how = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif choices:
            how = {"choices": choices}
        section.add_argument(name, default=item.default, help=item.metadata["help"], **how)
    return parser


def yaml_flags(path: str):
    """The options of a YAML file as flags, so that both are checked alike."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: a mapping of option names is needed")
    flags = []
    for key, value in values.items():
        name = flag(str(key))
        if name not in FLAGS:
            raise InputError(f"--config {path}: {unknown_flag(name)}")
        if isinstance(value, bool):
            flags.append(name if value else f"--no-{name[2:]}")
        else:
            flags.append(f"{name}={'' if value is None else value}")
    return flags


def unknown_flag(name: str):
    if not name.startswith("-"):
        return f"unexpected argument {name}: options are --name value, --name or --no-name"
    near = difflib.get_close_matches(name, FLAGS, 1)
    return f"unknown flag {name}: " + (f"did you mean {near[0]}?" if near else "see --help")

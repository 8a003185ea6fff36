"""The run's settings: one frozen dataclass. Every flag of train.py is generated from it.

`--config FILE.yaml` sets fields by name, and flags win over it. `config.yaml` in the output
directory is the dump of the object that the run used. Derived values are properties.
"""

import json
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import click
import yaml

from losses import LOSSES, import_plugin, make_loss

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MAX_ROWS = 16_384  # of the rollout table: their numbers fit into a pipe
NAMED = re.compile(r"(?:([\w.-]+)=)?(.*)", re.S)  # a value of --teacher or --teachers
RATE = click.FloatRange(1e-12)
COUNT = click.IntRange(0)
ABOUT = "Asynchronous on-policy distillation. torchrun --nproc-per-node=N starts N learner ranks."


class InputError(ValueError):
    """Input that cannot be used. The message names the value, the limit and the fix."""


def require(condition, message):
    if not condition:
        raise InputError(message)


@contextmanager
def refusal(what: str):
    """Whatever is raised inside becomes an InputError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what}: {reason}") from error


def option(default, help: str, limits=None):
    """A setting. `limits`: choices, or click's type. An integer without is at least 1.

    A tuple has one value for each time that the flag is given.
    """
    if isinstance(limits, tuple):
        limits = click.Choice(limits)
    elif limits is None and type(default) is int:  # a bool is an int, too
        limits = click.IntRange(1)
    settings = {"help": help, "type": limits, "multiple": default == ()}
    return field(default=default, metadata=settings)


@dataclass(frozen=True)
class Config:
    teacher: tuple = option(
        (), "directory or hub id; student: its first weights; repeatable as NAME=DIR"
    )
    student: str = option("builtin", "directory or hub id; builtin: read assets/builtin.yaml")
    prompts: str = option("", "JSONL of training prompts; builtin: running sums")
    eval_prompts: str = option("", "JSONL of evaluation prompts; empty: hold out of --prompts")
    eval_size: int = option(256, "evaluation prompts; at most a tenth of --prompts")
    chat_template_kwargs: str = option("{}", 'JSON: {"enable_thinking": false}, for all rows')
    drop_long_prompts: bool = option(False, "leave longer prompts out")
    max_prompt_tokens: int = option(1024, "longest prompt, tokens")
    max_teacher_prompt_tokens: int = option(0, "longest of a teacher; 0: as above", COUNT)
    teacher_system: str = option("", "a system message that the teacher alone reads first")
    max_new_tokens: int = option(1024, "longest response, tokens, stop token included")
    stop_token: tuple = option((), "one more token that ends a response; repeatable")
    plugin: str = option("", "FILE.py or module, imported first: it may add to losses.LOSSES")
    loss: str = option("stratified_reverse_kl", f"{', '.join(LOSSES)} or of --plugin")
    top_k: int = option(16, "top ids a position; forward_kl and sparse_reverse_kl see no others")
    num_samples: int = option(16, "draws a position, from 8 on with a baseline")
    temperature: float = option(1.0, "softmax of sampling and loss", click.FloatRange(1e-3))
    max_staleness: int = option(1, "updates that weights lag behind at a start; 0: none", COUNT)
    window: int = option(0, "updates that a late rollout may miss; 0: ticket order", COUNT)
    refresh: str = option("in_flight", "weights: between tokens or batches", ("in_flight", "batch"))
    steps: int = option(200, "updates in total, those before --resume included")
    batch_size: int = option(64, "rollouts per update, over all ranks and nodes")
    samples_per_prompt: int = option(1, "rollouts per prompt and epoch")
    lr: float = option(1e-6, "AdamW learning rate after warm-up", RATE)
    warmup_steps: int = option(10, "updates of linear warm-up, constant after", COUNT)
    max_grad_norm: float = option(1.0, "gradient clipping, global L2 norm", RATE)
    micro_batch_tokens: int = option(8192, "padded tokens of a forward pass")
    checkpoint_activations: bool = option(False, "recompute layers backwards: less memory, slower")
    head_chunk: int = option(1024, "positions whose logits exist at once")
    seed: int = option(0, "seed of prompt order and sampling", click.IntRange(0, 2**32 - 1))
    generators: int = option(1, "generation processes of a node")
    teachers: str = option("1", "processes of each teacher on a node; or NAME=2,NAME=1")
    teacher_gpus: int = option(1, "GPUs that each teacher is spread over")
    slots: int = option(64, "sequences that a generator decodes at once")
    teacher_cache_mb: int = option(0, "teacher's LRU cache of top-k scores, MiB; 0: off", COUNT)
    answers: str = option("text", "judge of answers: text, contains, math, or FILE.py or module")
    dtype: str = option("auto", "auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16"))
    cpu_threads: int = option(0, "CPU threads of each role; 0: cores / roles", COUNT)
    output_dir: str = option("runs/default", "metrics.jsonl, trace.json, config.yaml, step_N/")
    eval_every: int = option(50, "updates between greedy evaluations; 0: never", COUNT)
    save_every: int = option(100, "updates between checkpoints; 0: only at the end", COUNT)
    keep_checkpoints: int = option(2, "newest checkpoints to keep; 0: all", COUNT)
    resume: bool = option(False, "continue from the newest checkpoint in --output-dir")

    def __post_init__(self):
        if isinstance(self.teacher, str):
            object.__setattr__(self, "teacher", (self.teacher,))
        for item in fields(self):
            check_value(new_option(item), getattr(self, item.name))
        for name in ("teacher", "prompts", "output_dir"):
            is_given = getattr(self, name) not in ("", (), ("",))
            require(is_given, f"--{name.replace('_', '-')} is missing")
        with refusal(f"--chat-template-kwargs is {self.chat_template_kwargs}, no JSON object"):
            require(isinstance(json.loads(self.chat_template_kwargs), dict), "it is none")
        with refusal(f"--plugin {self.plugin}"):
            import_plugin(self.plugin)
        with refusal(f"--answers {self.answers}"):
            judge(self)
        with refusal(f"--loss {self.loss}"):
            make_loss(self).check()
        self.check_teachers()
        fix = f"take a multiple of the number of nodes, {self.nodes}"
        require(self.batch_size % self.nodes == 0, f"--batch-size is {self.batch_size}: {fix}")
        fix = f"the limit is {MAX_ROWS}: lower --batch-size or --max-staleness"
        require(self.table_rows <= MAX_ROWS, f"{self.table_rows} rollouts in flight, {fix}")
        budget = self.micro_batch_tokens
        longest = max(self.max_sequence, self.max_teacher_sequence)
        fix = f"one sequence may have {longest}: raise it or lower --max-new-tokens"
        require(longest <= budget, f"--micro-batch-tokens is {budget}, {fix}")

    def check_teachers(self):
        """Raise InputError if --teacher and --teachers do not name the same, each once."""
        names = set(self.teacher_paths)
        is_clear = len(names) == len(self.teacher) and ("" not in names or len(names) == 1)
        is_clear = is_clear and all(self.teacher_paths.values())
        fix = "several teachers need different names: --teacher math=DIR --teacher code=DIR"
        require(is_clear, f"--teacher {' --teacher '.join(self.teacher)}: {fix}")
        parts = self.teachers.split(",")
        counts = by_name(parts)
        is_whole = all(re.fullmatch(r"[1-9]\d{0,3}", count) for count in counts.values())
        is_whole = is_whole and len(counts) == len(parts)
        fix = "give a number from 1 on, or one for every teacher: "
        fix += ",".join(f"{name}=1" for name in self.teacher_paths if name) or "they have no names"
        require(is_whole and set(counts) in (names, {""}), f"--teachers is {self.teachers}: {fix}")

    @property
    def teacher_paths(self):
        """Where each teacher lies, by the name that rows of --prompts give it; "": it has none."""
        places = {"builtin": str(ASSETS / "teacher"), "student": self.path("student")}
        given = by_name(self.teacher).items()
        return {name: places.get(path, os.path.expanduser(path)) for name, path in given}

    @property
    def teacher_processes(self):
        """The name of the teacher of each process of a node: ["math", "math", "code"]."""
        counts = by_name(self.teachers.split(","))
        counts = {name: int(counts.get(name, counts.get(""))) for name in self.teacher_paths}
        return [name for name, count in counts.items() for _ in range(count)]

    @property
    def role_names(self):
        """Generators, teachers, learner of a node, as messages, metrics and trace call them."""
        names = self.teacher_processes
        numbers = [names[:i].count(name) for i, name in enumerate(names)]  # of each name from 0 on
        teachers = [f"{name} {i}".strip() for name, i in zip(names, numbers)]
        generators = [f"generator {i}" for i in range(self.generators)]
        return [*generators, *(f"teacher {name}" for name in teachers), "learner"]

    def path(self, name: str):
        """Where `student`, `prompts` or `eval_prompts` lie; "": nowhere."""
        value = getattr(self, name)
        if name == "eval_prompts" and self.prompts == "builtin":
            value = value or "builtin"
        file = {"prompts": "prompts.jsonl", "eval_prompts": "eval.jsonl"}.get(name, name)
        return str(ASSETS / file) if value == "builtin" else os.path.expanduser(value)

    @property
    def output(self):
        """Node 0 has the directory itself, node k `node_k` in it."""
        return Path(self.output_dir, f"node_{self.node}" if self.node else "")

    @property
    def node(self):
        """The number of this node."""
        return from_torchrun("GROUP_RANK", 0)

    @property
    def nodes(self):
        return from_torchrun("GROUP_WORLD_SIZE", 1)

    @property
    def max_sequence(self):
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def max_teacher_sequence(self):
        return (self.max_teacher_prompt_tokens or self.max_prompt_tokens) + self.max_new_tokens

    @property
    def table_rows(self):
        """Rollouts of a node that exist at once: what the inequality in tickets.py admits."""
        return (1 + self.max_staleness) * self.batch_size // self.nodes

    @property
    def num_candidates(self):
        """Candidates of a position: the width of the table."""
        return make_loss(self).num_columns

    def dump(self):
        """YAML that starts an equal run, anew."""
        return yaml.safe_dump(asdict(replace(self, resume=False)), sort_keys=False)


def by_name(values):
    """{"math": "DIR"} of ["math=DIR"], and {"": "DIR"} of ["DIR"]."""
    return dict(NAMED.fullmatch(value).groups("") for value in values)


def judge(config: Config):
    """The function is_correct(response, answer) of a module. A word stands for one in judges/."""
    name = config.answers
    return import_plugin(f"judges.{name}" if name.isidentifier() else name).is_correct


def from_torchrun(name: str, alone: int):
    """A number that torchrun gives to all processes of a run; `alone`: without torchrun."""
    return int(os.environ.get(name, alone))


def builtin(**changes):
    """The settings of the built-in task, with changes."""
    return Config(**yaml.safe_load((ASSETS / "builtin.yaml").read_text()) | changes)


# ---- the command line -------------------------------------------------------------------------


def new_option(item):
    """The flag of one field of Config."""
    name = "--" + item.name.replace("_", "-")
    if isinstance(item.default, bool):
        name = f"{name}/--no-{name[2:]}"
    return click.Option([name], default=item.default, show_default=True, **item.metadata)


def check_value(option, value):
    """What click checks on the command line holds for a Config made in Python, too."""
    is_list = isinstance(value, (list, tuple))
    for one in value if is_list else [value]:
        with refusal(f"{option.opts[0]} is {one}"):
            # Unequal: "7" for 7, and NaN.
            is_same = option.type.convert(one, option, None) == one != math.inf
            require(is_same and is_list == option.multiple, f"{option.type.name} is needed")
            # `--output-dir --resume` would take the next flag for a directory.
            require(not str(one).startswith("--"), "its own value is missing")


def read_yaml(path):
    """The values of a YAML file by option names, as text; a list where an option is repeatable."""
    with refusal(f"--config {path}"):
        values = yaml.load(Path(path).read_text(), yaml.BaseLoader) or {}  # scalars stay text
    require(isinstance(values, dict), f"--config {path}: a mapping of option names is needed")
    named = {key.replace("-", "_"): value for key, value in values.items()}
    is_repeatable = {item.name: item.default == () for item in fields(Config)}
    for name, value in named.items():
        is_mapping = isinstance(value, dict) and all(isinstance(x, str) for x in value.values())
        if name in ("teacher", "teachers") and is_mapping:
            value = [f"{key}={one}" for key, one in value.items()]
            value = value if name == "teacher" else ",".join(value)
        kinds = (str, list) if is_repeatable.get(name) else str
        fix = "no option of this version, see --help"
        require(name in is_repeatable, f"--config {path}: {name} is {fix}")
        fix = "one value is needed, or a list where an option is repeatable"
        require(isinstance(value, kinds), f"--config {path}: {name} is {value}: {fix}")
        named[name] = [value] if is_repeatable[name] and isinstance(value, str) else value
    return named


def parse(argv=None):
    """Command line to Config. Raises InputError on a setting that cannot work.

    Flags win over the file of --config, which wins over assets/builtin.yaml. `--resume` without
    --config reads the file that the run has left.
    """
    from_file = click.Option(["--config"], metavar="FILE", help="YAML of options; flags win")
    params = [from_file, *map(new_option, fields(Config))]
    command = click.Command("train.py", callback=dict, params=params, help=ABOUT)
    try:
        # --help prints and returns nothing.
        given = command.main(argv, standalone_mode=False) or sys.exit()
        file, left = given["config"], Path(given["output_dir"], "config.yaml")
        if file is None and given["resume"] and left.exists():
            file = left
        defaults = {} if file is None else read_yaml(file)
        if given["student"] == defaults.get("student", "builtin") == "builtin":
            defaults = read_yaml(ASSETS / "builtin.yaml") | defaults
        values = command.main(argv, standalone_mode=False, default_map=defaults)
    except click.ClickException as error:
        raise InputError(error.format_message()) from None
    return Config(**{name: value for name, value in values.items() if name != "config"})

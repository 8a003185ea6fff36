# %% [markdown]
# # A tour of minOPD
#
# One prompt becomes a rollout, the rollout a row of a table, the row gets scores, the scores
# become a gradient. Then we let the data grow old and watch what happens. All of it is the real
# code of this repository on its built-in models (0.2 and 0.7 million parameters), and takes a few
# minutes on two cores.
#
# **To run it in a hosted notebook** (Colab, Kaggle, ...): put this in a first cell, then run all.
#
# ```
# !git clone --depth 1 <address of this repository> minOPD
# %cd minOPD
# !pip install -q -r requirements.txt matplotlib
# ```
#
# At home: `pip install jupyterlab matplotlib` in the environment that `make train` has set up,
# then `jupyter lab docs/tour.ipynb`. The notebook is made from `docs/tour.py` by `python -m
# experiments.notebook`: change that file, not the notebook.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

while not Path("serial.py").exists():  # a notebook starts in its own directory
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import matplotlib.pyplot as plt
import torch

from experiments.run_files import ROLES, read_run, read_trace
from losses import make_loss
from model import head_weight
from serial import Serial
from support.config import builtin
from support.data import load_prompts
from support.load import load_tokenizer

torch.set_num_threads(1)
config = builtin(batch_size=4, slots=4, eval_size=64, output_dir="runs/tour")
tokenizer = load_tokenizer("--student", config.path("student"))
prompts, held_out = load_prompts(config, tokenizer)
print(len(prompts), "prompts to train on; the first:", prompts[0].text)

# %% [markdown]
# ## 1. A prompt becomes a rollout
#
# The task: running sums, least significant digit first. `a12+b34+c91=` asks for 046 and 137,
# written `b640,c731`. Each digit has 16 tokens that mean the same; only their number tells them
# apart here.
#
# `Serial` is the whole algorithm in one process: a sampler, a teacher, a learner, and the table
# between them. We call its parts one by one, as `serial.py` does in `update`.

# %%
run = Serial(config, lag=0, prompts=prompts, held_out=held_out)
table = run.channel
print("accuracy of the student before training:", run.accuracy())

run.tickets.issue(version=0)  # which prompts come next: written into free rows of the table
rows = table.to_generator.get_all()
run.sample(rows)  # the student writes

row = rows[0]
start, end = int(table.prompt_len[row]), int(table.length[row])
print("prompt:  ", tokenizer.decode(table.tokens[row, :start]))
print("response:", tokenizer.decode(table.tokens[row, start:end]))

# %% [markdown]
# ## 2. The row
#
# A rollout is a row of a table in shared memory. The generator has filled in the tokens, and at
# each position the *candidates*: ids at which teacher and student will be compared. The default
# loss asks for one draw (the token itself), the 16 likeliest ids, and 16 draws from all the
# others.

# %%
loss = run.learner.student.loss
count = end - start
print("candidate_ids:", tuple(table.candidate_ids[row, :count].shape), "= [tokens, candidates]")
for name in ("draws", "top", "tail"):
    columns = getattr(loss, name)
    words = [tokenizer.decode(i) for i in table.candidate_ids[row, 1, columns].tolist()]
    print(f"{name:6s} at position 1:", " ".join(words))
print("weight_version:", table.weight_version[row, :count].tolist(), "(which weights sampled it)")

# %% [markdown]
# ## 3. The teacher scores it
#
# One forward pass over prompt and response. It fills in the teacher's log-probability of every
# candidate. Position by position: where is the teacher surprised by what the student wrote?

# %%
run.teachers[0].score(table, rows)
ids = table.candidate_ids[row, :count, 0].tolist()
b, t = table.behavior_logp[row, :count, 0], table.teacher_logp[row, :count, 0]
figure, axis = plt.subplots(figsize=(9, 2.4))
axis.bar(range(count), b - t, color=["#D55E00" if gap > 0 else "#0072B2" for gap in (b - t)])
axis.set_xticks(range(count), [tokenizer.decode([i]) for i in ids], fontsize=8)
axis.set(title="student less teacher: log-probability of each token", ylabel="nats")
axis.axhline(0, color="black", linewidth=0.5)
plt.show()

# %% [markdown]
# The tall bars are mistakes: after a wrong digit the teacher would have said something else.
# Reverse KL is the mean of this over the student's own tokens, and the mean is what training
# lowers.
#
# ## 4. The learner makes a gradient of it
#
# `Learner.update` runs the student again, this time with gradients, and takes the loss at the
# candidates. Its metrics are those of `metrics.jsonl`.

# %%
run.tickets.receive(rows)
metrics = run.learner.update(table, run.tickets.batch(0))
for name in ("reverse_kl", "grad_norm", "lag_mean", "ess", "top_overlap"):
    print(f"{name:12s} {metrics[name]:.3f}")

# %% [markdown]
# ## 5. What lag does to one position
#
# Asynchronous training samples with weights that are a few updates old. To see what that means,
# we train a student for 24 updates and compare three models at one position: the *sampler*
# (before), the *student* (after), the *teacher*. `SURE` is a second position, for section 6.

# %%
UNSURE = "a73+b41+c86+d11+e20+f57+g59=b411,c002,d112,e132,f882,g"  # right so far; which digit now?
SURE = "a20+b36+c87=b65"
old = Serial(builtin(batch_size=16, slots=16, warmup_steps=1), 0, prompts, held_out)
vocab = old.sampler.generator.vocab


@torch.no_grad()
def next_logp(model, text):
    """Log-probabilities of the token after `text`: [V]."""
    ids = torch.tensor([tokenizer(text).input_ids])
    hidden = model.base_model(ids).last_hidden_state[0, -1]
    return (hidden @ head_weight(model).T)[:vocab].log_softmax(-1)


before = {text: next_logp(old.learner.model, text) for text in (UNSURE, SURE)}
for _ in range(24):
    old.update()
after = {text: next_logp(old.learner.model, text) for text in (UNSURE, SURE)}
wanted = {text: next_logp(old.teachers[0].model, text) for text in (UNSURE, SURE)}

print("after", UNSURE)
for name, logp in (("sampler", before), ("student", after), ("teacher", wanted)):
    shares = {}  # of a digit, over its 16 tokens
    for i, p in enumerate(logp[UNSURE].exp().tolist()):
        shares[tokenizer.decode([i])] = shares.get(tokenizer.decode([i]), 0.0) + p
    best = sorted(shares, key=shares.get, reverse=True)[:5]
    print(f"{name}: {', '.join(f'{digit} {shares[digit]:.0%}' for digit in best)}")
drift = (before[UNSURE].exp() * (before[UNSURE] - after[UNSURE])).sum()
print(f"drift, KL(sampler || student): {float(drift):.3f} nats")

# %% [markdown]
# Tokens drawn from the sampler are not tokens drawn from the student. The weight w = p(student) /
# p(sampler) of a draw repairs that on average, at the price of noise: a token that the sampler
# hardly ever draws, and the student likes, comes seldom and weighs a lot.

# %%
torch.manual_seed(0)
draws = torch.multinomial(before[UNSURE].exp(), 200, replacement=True)
weights = (after[UNSURE] - before[UNSURE])[draws].exp()
figure, axis = plt.subplots(figsize=(9, 2))
axis.hist(weights.numpy(), bins=40, color="#0072B2")
axis.set(title="weights of 200 draws: those above 1 carry the update", xlabel="w", yscale="log")
plt.show()
share = float(weights.sum() ** 2 / (200 * (weights**2).sum()))
print(f"effective sample size: {share:.0%} of the draws")

# %% [markdown]
# ## 6. Four estimators of one gradient
#
# The exact gradient of KL(student || teacher) at the logits is p (D - KL), D = log p - log q.
# Nobody can afford it for every token of a large vocabulary, so a loss looks at a few candidates.
# Here four losses of `losses.py` estimate the same gradient 500 times, from the *old* sampler's
# candidates. Bias is how far their mean is from the exact gradient, variance how much they
# scatter.

# %%
TRIALS = 500
ESTIMATORS = {
    "1 draw": {"loss": "sampled_reverse_kl", "num_samples": 1},
    "32 draws": {"loss": "sampled_reverse_kl", "num_samples": 32},
    "16 + 16": {"loss": "stratified_reverse_kl", "top_k": 16, "num_samples": 16},
    "top 32": {"loss": "sparse_reverse_kl", "top_k": 32},
}


def squared_error(settings, b, s, t):
    """(bias squared, variance) in units of the exact gradient's square. b, s, t: [V]."""
    exact = s.exp() * (s - t)
    exact = exact - s.exp() * exact.sum()
    loss = make_loss(builtin(**settings))
    uniforms = torch.rand(TRIALS, loss.num_uniforms, dtype=torch.float64)
    ids, drawn_with = loss.propose(b.expand(TRIALS, vocab).clone(), uniforms)
    logits = s.expand(TRIALS, vocab).clone().requires_grad_()
    at_candidates = logits.log_softmax(-1).gather(1, ids)
    teacher_logp = t.expand(TRIALS, vocab).gather(1, ids)
    loss.value(at_candidates, teacher_logp, drawn_with).sum().backward()
    estimates = logits.grad  # [TRIALS,V]
    scale = exact.square().sum()
    variance = estimates.var(0).sum() / scale
    bias = (estimates.mean(0) - exact).square().sum() / scale - variance / TRIALS
    return max(0.0, float(bias)), float(variance)


figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for axis, text, title in zip(
    axes, (SURE, UNSURE), ("the student is sure", "the student is unsure")
):
    found = [squared_error(x, before[text], after[text], wanted[text]) for x in ESTIMATORS.values()]
    bias, variance = zip(*found)
    axis.bar([*ESTIMATORS], bias, label="bias squared", color="#D55E00", width=0.5)
    axis.bar([*ESTIMATORS], variance, bottom=bias, label="variance", color="#56B4E9", width=0.5)
    mass = before[text].exp().topk(16).values.sum()
    axis.set(title=f"{title} (its top 16 have {mass:.0%})", yscale="symlog", ylim=(0, 300))
    print(title)
    for name, numbers in zip(ESTIMATORS, found):
        print("  {:9s} bias^2 {:8.4f}   variance {:8.4f}".format(name, *numbers))
axes[0].set_ylabel("squared error")
axes[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# One draw is unbiased and nearly useless alone. Where the student is sure, and that is most
# positions, its top 16 have nearly all of the mass: to sum them exactly leaves nothing to chance.
# Where it is unsure they have little, and the draws do the work: then many draws are as good. The
# top K alone has no noise anywhere, and where it sees little of the mass a large bias. The
# default, 16 + 16, is unbiased in both cases. [staleness.md](staleness.md) follows this through
# whole runs, [topk.md](topk.md) derives the last one.
#
# ## 7. Synchronous and asynchronous
#
# The same 30 updates twice, by `train.py`, with a process for each role. First they take turns
# (`--max-staleness 0`), then rollouts may come from weights of one update ago.

# %%
figure, axes = plt.subplots(2, 1, figsize=(9, 3.4))
for staleness, axis in zip((0, 1), axes):
    out = Path(f"runs/tour/staleness_{staleness}")
    if not (out / "step_30").exists():
        shutil.rmtree(out, ignore_errors=True)  # of an earlier try
        options = ["--steps=30", "--eval-every=0", "--cpu-threads=1", f"--output-dir={out}"]
        command = [sys.executable, "train.py", *options, f"--max-staleness={staleness}"]
        subprocess.run(command, check=True, capture_output=True)
    spans, records = read_trace(out / "trace.json"), read_run(out)
    for span in spans:
        colour = ROLES[span.role.split()[0]]
        axis.barh(span.role, span.end - span.begin, left=span.begin - spans[0].begin, color=colour)
    seconds = records[-1]["wall_seconds"]
    axis.invert_yaxis()
    axis.set_title(f"max_staleness {staleness}: {seconds:.1f} s")
figure.tight_layout()
plt.show()

# %% [markdown]
# White is waiting. `python -m experiments.page runs/tour/staleness_0 runs/tour/staleness_1` lays
# the two side by side, with every token of some rollouts.
#
# ## Three things to change
#
# 1. **The loss.** Take `"sparse_reverse_kl"` with `top_k=4` in section 6. Where does its bias
#    come from? Then train with it: `python serial.py --loss sparse_reverse_kl --top-k 4`.
# 2. **The lag.** `python serial.py --max-staleness 32 --loss sampled_reverse_kl --num-samples 1`
#    has an exact lag of 32. Compare with 16 + 16, the default, and look at `reverse_kl`.
# 3. **The teacher.** `--teacher student` makes the student its own teacher. What should
#    `reverse_kl` be, and what does Adam do with a gradient that is nothing but rounding?
#
# Then [walkthrough.md](walkthrough.md) follows a rollout through the code, and `make assignment`
# cuts exercises out of it.

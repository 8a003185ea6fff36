"""Train the built-in teacher and the initial student of the running-sums task:
`python -m assets.make_assets`.

Both are Qwen3 models trained by plain supervised learning on the training half of the prompts,
first in plain digits. The teacher then learns the synonyms. The student, a quarter of its size, is
stopped in the jump of its learning curve and has never seen a synonym, only copies of the digits'
embeddings: it has half the arithmetic and none of the style. About fifteen minutes on one core;
writes assets/teacher and assets/student (safetensors, float32). `--only prompts` writes
prompts.jsonl and eval.jsonl.

`second_task` makes what experiments/two_teachers.py needs: a teacher of sums of neighbours, which
is the built-in teacher trained on, and the built-in student after a little of both tasks.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from assets.task import EVALUATION_SEED, neighbour_sums, running_sums  # noqa: E402
from assets.tokenizer import SYNONYMS, build_tokenizer  # noqa: E402

ASSETS = Path(__file__).resolve().parent
PROBE_SEED = 99  # of the held-out prompts that decide when the student stops


def new_model(tokenizer, hidden, layers, heads, kv_heads, intermediate):
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            intermediate_size=intermediate,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            rope_theta=10000.0,
        )
    )


class Examples:
    """Endless supervised batches: ids and labels [B,L], labels -100 off the response.

    Synonyms are drawn anew each time.
    """

    def __init__(self, tokenizer, count, seed, synonyms, tasks=(running_sums,)):
        self.generator = torch.Generator().manual_seed(seed)
        pairs = [pair for task in tasks for pair in task(count, seed, heldout=False)]
        self.encoded = [
            (tokenizer(p).input_ids, tokenizer(a).input_ids + [tokenizer.eos_token_id])
            for p, a in pairs
        ]
        self.first_digit = tokenizer.convert_tokens_to_ids("0")
        zipf = 1.0 / torch.arange(1, SYNONYMS + 1)
        self.weights = zipf / zipf.sum() if synonyms else torch.tensor([1.0])

    def batch(self, size):
        chosen = [
            self.encoded[i]
            for i in torch.randint(len(self.encoded), (size,), generator=self.generator)
        ]
        width = max(len(p) + len(a) for p, a in chosen)
        ids = torch.zeros(size, width, dtype=torch.long)
        labels = torch.full((size, width), -100)
        for row, (p, a) in enumerate(chosen):
            answer = torch.tensor(a)
            draws = torch.multinomial(
                self.weights, len(a), replacement=True, generator=self.generator
            )
            answer = torch.where(answer >= self.first_digit, answer + draws, answer)
            ids[row, : len(p) + len(a)] = torch.cat([torch.tensor(p), answer])
            labels[row, len(p) : len(p) + len(a)] = answer
        return ids, labels


@torch.no_grad()
def exact_match(model, tokenizer, count=256, task=running_sums):
    """Greedy exact match on held-out prompts, grouped by length so that no padding is needed."""
    groups = {}
    for prompt, answer in task(count, PROBE_SEED, heldout=True):
        ids = tokenizer(prompt).input_ids
        groups.setdefault(len(ids), []).append((ids, answer))
    correct = 0
    for group in groups.values():
        ids = torch.tensor([ids for ids, _ in group])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        correct += sum(text == answer for text, (_, answer) in zip(texts, group))
    return correct / count


@torch.no_grad()
def copy_digits_to_synonyms(model, tokenizer):
    """A synonym starts as a copy of its digit, but for a little noise."""
    first = tokenizer.convert_tokens_to_ids("0")
    digits = model.get_input_embeddings().weight[first:].view(10, SYNONYMS, -1)
    digits[:, 1:] = digits[:, :1] + 0.01 * torch.randn_like(digits[:, 1:])


def train(model, examples, steps, batch_size, lr, probe=None, label=""):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.time()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        ids, labels = examples.batch(batch_size)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"{label} step {step} loss {loss.item():.3f} {time.time() - started:.0f} s",
                flush=True,
            )
        if probe and step % 10 == 0 and probe(step):
            return


def second_task(out):
    """Write teacher_pairs and student_both into `out`: three minutes on one core.

    The student is stopped while its accuracy at the second task jumps.
    """
    tokenizer = build_tokenizer()
    torch.set_num_threads(1)  # of such small models one is fastest
    torch.manual_seed(2)
    teacher = Qwen3ForCausalLM.from_pretrained(ASSETS / "teacher", dtype=torch.float32)
    both = (running_sums, neighbour_sums)

    def solved(step):
        if step % 50:
            return False
        accuracy = exact_match(teacher, tokenizer, task=neighbour_sums)
        print(f"teacher of pairs step {step}: {accuracy:.3f}", flush=True)
        return accuracy >= 0.99

    examples = Examples(tokenizer, 50_000, 4, True, both[1:])
    train(teacher, examples, 1500, 64, 1e-3, solved, "teacher of pairs")
    student = Qwen3ForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32)

    def begun(step):
        return step % 20 == 0 and exact_match(student, tokenizer, 128, neighbour_sums) >= 0.75

    examples = Examples(tokenizer, 50_000, 5, False, both)
    train(student, examples, 3000, 64, 1e-3, begun, "student of both")
    for model, name in ((teacher, "teacher_pairs"), (student, "student_both")):
        sums, pairs = (exact_match(model, tokenizer, task=task) for task in both)
        print(f"{name}: {sums:.1%} of the running sums, {pairs:.1%} of the pairs", flush=True)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def write_prompts(directory):
    """What the built-in task trains on and is evaluated on, for every seed of a run."""
    for name, pairs in (
        ("prompts.jsonl", running_sums(20_000, 0, heldout=False)),
        ("eval.jsonl", running_sums(1_000, EVALUATION_SEED, heldout=True)),
    ):
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in pairs]
        (directory / name).write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--only", choices=["teacher", "student", "prompts"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_prompts(args.out)
    if args.only == "prompts":
        return
    tokenizer = build_tokenizer()

    if args.only != "student":
        torch.manual_seed(args.seed)
        teacher = new_model(tokenizer, hidden=128, layers=3, heads=4, kv_heads=4, intermediate=384)
        print(f"teacher: {teacher.num_parameters():,} parameters")

        def solved(step):
            if step < 300 or step % 50:
                return False
            print(
                f"teacher step {step}: {(accuracy := exact_match(teacher, tokenizer)):.3f}",
                flush=True,
            )
            return accuracy >= 0.995

        train(
            teacher,
            Examples(tokenizer, 100_000, 1, synonyms=False),
            4000,
            64,
            2e-3,
            solved,
            "digits",
        )

        print("teacher, digits:", exact_match(teacher, tokenizer), flush=True)
        copy_digits_to_synonyms(teacher, tokenizer)
        train(
            teacher,
            Examples(tokenizer, 100_000, 2, synonyms=True),
            300,
            128,
            1e-3,
            label="synonyms",
        )
        print("teacher, synonyms:", exact_match(teacher, tokenizer), flush=True)
        teacher.save_pretrained(args.out / "teacher")
        tokenizer.save_pretrained(args.out / "teacher")

    if args.only != "teacher":
        torch.manual_seed(args.seed + 1)
        student = new_model(tokenizer, hidden=64, layers=3, heads=4, kv_heads=4, intermediate=192)
        print(f"student: {student.num_parameters():,} parameters")

        def good_enough(step):  # in its jump: 4 % at update 750, 46 % at 800, 77 % at 850
            return step >= 400 and step % 50 == 0 and exact_match(student, tokenizer, 128) >= 0.28

        train(
            student,
            Examples(tokenizer, 100_000, 3, synonyms=False),
            20_000,
            64,
            3e-3,
            good_enough,
            "student",
        )
        copy_digits_to_synonyms(student, tokenizer)
        student.save_pretrained(args.out / "student")
        tokenizer.save_pretrained(args.out / "student")


if __name__ == "__main__":
    main()

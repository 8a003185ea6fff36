"""Claims about the model families: what is accepted is exact,
what is refused is refused by a sentence."""

import re

import pytest
from conftest import ROOT

from experiments.families import KINDS, LIKE, published, table, verdict

PAGE = ROOT / "docs" / "families.md"


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "deepseek_v3", "granite", "qwen3_5_text", "lfm2", "bamba"]
)
def test_an_accepted_family_is_exact_trains_and_resumes(kind):
    assert verdict(kind) == ("works", "")


def test_a_family_that_works_with_trivial_settings_alone_is_told_apart():
    answer, why = verdict("hyperclovax")
    assert answer == "works plain" and "a bias, scale or soft-cap follows the head" in why


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKE)
def test_models_like_published_ones_work(name):
    assert verdict(*LIKE[name]) == ("works", "")


@pytest.mark.parametrize("kind, sentence", [
    ("falcon", "its attention is its own"),
    ("phi", "a bias, scale or soft-cap follows the head"),
    ("nemotron_h", "the KV slots do not hold all that it remembers"),
    ("stablelm", "does not pass on what the KV slots need"),
    ("nemotron", "does not pass on what the KV slots need"),
    ("gemma2", "soft-cap follows the head"),
    ("gpt_oss", "wants attention with s_aux"),
    ("doge", "the KV slots do not hold all that it remembers"),
    ("phimoe", "a window that its attention layers do not pass on"),
    ("llama4_text", "its logits cannot be compared with .*: .*no attribute 'last_hidden_state'"),
    ("deepseek_v32", "its code does not fit the KV slots: .*not subscriptable"),
])  # fmt: skip
def test_another_family_is_refused_by_a_sentence(kind, sentence):
    answer, why = verdict(kind)
    assert answer == "refused" and re.search(sentence, why)
    assert "\n" not in why


@pytest.mark.slow
def test_no_family_of_transformers_is_wrong_or_crashes_and_the_page_says_which():
    verdicts = {kind: verdict(kind) for kind in KINDS}
    assert not [kind for kind, (answer, _) in verdicts.items() if answer in ("wrong", "crash")]
    like = {name: verdict(*job) for name, job in LIKE.items()}
    assert table(verdicts) in PAGE.read_text() and published(like) in PAGE.read_text()

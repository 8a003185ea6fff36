"""Claims about the model families: what is accepted is exact,
what is refused is refused by a sentence."""

import pytest
from conftest import ROOT

from experiments.families import KINDS, table, verdict

PAGE = ROOT / "docs" / "families.md"


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "opt", "deepseek_v3", "gemma3_text", "phi3", "mixtral"]
)
def test_an_accepted_family_is_exact(kind):
    assert verdict(kind) == ("exact", "")


@pytest.mark.parametrize("kind, sentence", [
    ("gptj", "its attention is its own"),
    ("falcon", "its attention is its own"),
    ("stablelm", "does not pass on what the KV slots need"),
    ("nemotron", "does not pass on what the KV slots need"),
    ("gemma2", "soft-cap follows the head"),
    ("gpt_oss", "wants attention with s_aux"),
    ("doge", "the KV slots do not hold all that it remembers"),
    ("phimoe", "a window that its attention layers do not pass on"),
    ("llama4_text", "no attribute 'last_hidden_state'"),
    ("deepseek_v32", "not subscriptable"),
])  # fmt: skip
def test_another_family_is_refused_by_a_sentence(kind, sentence):
    answer, why = verdict(kind)
    assert answer == "refused" and sentence in why and "\n" not in why


@pytest.mark.slow
def test_no_family_of_transformers_is_wrong_or_crashes_and_the_page_says_which():
    verdicts = {kind: verdict(kind) for kind in KINDS}
    assert not [kind for kind, (answer, _) in verdicts.items() if answer in ("wrong", "crash")]
    assert table(verdicts) in PAGE.read_text()

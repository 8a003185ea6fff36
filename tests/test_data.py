"""Claims about prompts and answers: a bad file is refused with its line."""

import itertools
import json

import pytest
from tokenizers.processors import TemplateProcessing

from assets.tokenizer import build_tokenizer
from support.config import Config, InputError
from support.data import Prompt, fingerprint, load_prompts, prompt_of, read_jsonl
from support.task import ADDENDS, running_sums


def test_running_sums_are_right_and_held_out_prompts_are_disjoint():
    train, held = dict(running_sums(20_000, 0, False)), dict(running_sums(500, 12345, True))
    assert len(train) == 20_000 and len(held) == 500 and not set(train) & set(held)
    for prompt, answer in list(train.items())[:500]:
        addends = {term[0]: int(term[1:]) for term in prompt.rstrip("=").split("+")}
        totals = {total[0]: int(total[:0:-1]) for total in answer.split(",")}
        running = dict(zip(addends, itertools.accumulate(addends.values())))
        assert "".join(addends) == "abcdefgh"[: len(addends)]
        assert (
            totals == {name: total for name, total in running.items() if name != "a"}
            and len(answer) == 5 * len(totals) - 1
        )
    sizes = [prompt.count("+") + 1 for prompt in train]
    assert set(sizes) == set(ADDENDS) and sizes.count(2) > 1.5 * sizes.count(8)


def test_synonyms_decode_to_their_digit_and_prompts_survive_a_round_trip(tokenizer):
    ids = tokenizer("b5A0C1,c6B9O1").input_ids + [tokenizer.eos_token_id]
    assert len(ids) == 10 and tokenizer.decode(ids, skip_special_tokens=True) == "b501,c691"
    assert tokenizer.decode(tokenizer("a47+b58+c91=").input_ids) == "a47+b58+c91="


# ---- prompt files -------------------------------------------------------------------------------


def write_lines(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return str(path)


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            [{"prompt": "1+1="}, "{not json"],
            "line 2: one JSON object per line is needed: Expecting",
        ),
        (
            ['{"prompt": "1", "answer": "\\ud800"}'],
            "line 1: one JSON object .*surrogates not allowed",
        ),
        (
            ['{"prompt": "1", "answer": ' + "7" * 5000 + "}"],
            "line 1: one JSON object .*4300 digits",
        ),
        (["[" * 100_000], "line 1: one JSON object .*recursion"),
        ([""], r"no prompts in it \(up to 64 tokens long\)"),
        ([{"text": "hello"}], "line 1: needs an object with either `prompt`"),
        ([{"prompt": "a", "messages": []}], "line 1: needs an object with either"),
        ([["a"]], "line 1: needs an object"),
        ([{"prompt": ""}], "line 1: the prompt is empty or not text"),
        ([{"prompt": 7}], "line 1: the prompt is empty or not text"),
        ([{"prompt": "1", "answer": ["x"]}], "line 1: `answer` is list"),
        ([{"messages": "hello"}], "line 1: the chat template refuses `messages`: a list is needed"),
        (
            [{"prompt": "1+1="}, {"prompt": "1 apple"}],
            "line 2: the prompt has characters that the tokenizer does not know: '1 apple'",
        ),
    ],
)
def test_a_bad_prompt_file_is_refused_with_its_line(lines, message, tmp_path, tokenizer):
    with pytest.raises(InputError, match=message):
        read_jsonl(write_lines(tmp_path / "p.jsonl", *lines), tokenizer, 64)


def test_a_prompt_file_that_cannot_be_read_is_refused(tmp_path, tokenizer):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    for path, message in (
        ("/nowhere.jsonl", "No such file"),
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "latin.jsonl"), "'utf-8' codec"),
    ):
        with pytest.raises(
            InputError, match=f"{path}: a file of JSON lines in UTF-8 is needed: .*{message}"
        ):
            read_jsonl(path, tokenizer, 64)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n', encoding="utf-8-sig")
    prompts = read_jsonl(str(tmp_path / "p.jsonl"), tokenizer, 64)
    assert [prompt.text for prompt in prompts] == ["1+1="]


def test_a_prompt_above_the_limit_is_refused(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "1+1="}, {"prompt": "1+" * 20 + "1="})
    with pytest.raises(
        InputError, match="line 2: 42 tokens, --max-prompt-tokens is 8: raise it or drop the line"
    ):
        read_jsonl(path, tokenizer, 8)
    with pytest.raises(
        InputError, match="built-in prompts have up to 32 tokens, --max-prompt-tokens is 8"
    ):
        load_prompts(Config(max_prompt_tokens=8), tokenizer)


def test_the_built_in_prompts_are_measured_with_the_tokenizer_at_hand():
    """One that adds a token to every prompt makes the longest 33 tokens long."""
    adds_bos = build_tokenizer()
    adds_bos._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    load_prompts(Config(max_prompt_tokens=33), adds_bos)
    with pytest.raises(
        InputError,
        match="built-in prompts have up to 33 tokens, --max-prompt-tokens is 32: raise it",
    ):
        load_prompts(Config(max_prompt_tokens=32), adds_bos)


def test_line_separators_inside_strings_do_not_split_a_line(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "1+1=", "answer": "a\u2028b\x85c"}\n', encoding="utf-8"
    )
    assert read_jsonl(str(tmp_path / "p.jsonl"), tokenizer, 8)[0].answer == "a\u2028b\x85c"


def test_messages_need_a_chat_template(tmp_path):
    without = build_tokenizer()
    without.chat_template = None
    path = write_lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "1+2="}]})
    with pytest.raises(InputError, match="no chat template: use `prompt`"):
        read_jsonl(path, without, 64)


def test_messages_go_through_the_chat_template(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "1+2="}], "answer": 3}
    )
    prompt = read_jsonl(path, tokenizer, 64)[0]
    assert (prompt.text, prompt.answer) == ("1+2=", "3")


def test_only_plain_prompts_get_the_tokenizers_own_special_tokens(tmp_path):
    """The chat template has put its own in;
    adding a second beginning of sequence would be a prompt never trained on."""
    adds_bos = build_tokenizer()
    adds_bos._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    message = {"messages": [{"role": "user", "content": "1+2="}]}
    plain, chat = read_jsonl(
        write_lines(tmp_path / "p.jsonl", {"prompt": "1+2="}, message), adds_bos, 64
    )
    assert plain.ids == [1, *chat.ids] and 1 not in chat.ids


def test_a_prompt_with_a_token_that_the_models_lack_is_refused(model_dir, tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "1+1="})
    config = Config(student=model_dir(vocab=12), teacher=model_dir(), prompts=path)
    highest = max(tokenizer("1+1=").input_ids)
    with pytest.raises(
        InputError, match=f"a prompt has token {highest}, the models know 12 tokens"
    ):
        load_prompts(config, tokenizer)


def test_evaluation_prompts_never_occur_in_training(tmp_path, tokenizer):
    # Prompts repeat.
    rows = [{"prompt": f"{i % 60}+{i % 60}=", "answer": str(i)} for i in range(200)]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    train, held = load_prompts(Config(prompts=path, eval_size=10), tokenizer)
    assert len(held) == 10 and not {p.text for p in train} & {p.text for p in held}
    held_path = write_lines(tmp_path / "e.jsonl", {"prompt": "5+5=", "answer": "01"})
    train, held = load_prompts(Config(prompts=path, eval_prompts=held_path), tokenizer)
    assert [p.text for p in held] == ["5+5="] and "5+5=" not in {p.text for p in train}
    no_answer = write_lines(tmp_path / "n.jsonl", {"prompt": "5+5="})
    with pytest.raises(InputError, match="every evaluation prompt needs an `answer`"):
        load_prompts(Config(prompts=path, eval_prompts=no_answer), tokenizer)
    with pytest.raises(
        InputError, match="e.jsonl: all are evaluation prompts, none is left to train on"
    ):
        load_prompts(Config(prompts=held_path, eval_prompts=held_path), tokenizer)
    assert load_prompts(Config(prompts=no_answer), tokenizer)[1] == []


# ---- order, fingerprint, answers ----------------------------------------------------------------


def test_each_epoch_visits_every_prompt_samples_per_prompt_times_in_its_own_order():
    def order(ticket, seed=1):
        return prompt_of(ticket, 10, Config(samples_per_prompt=3, seed=seed))

    epochs = [[order(n) for n in range(epoch * 30, epoch * 30 + 30)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(list(range(10)) * 3)
        assert all(len(set(epoch[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert epochs[0] != epochs[1] and [order(n) for n in range(30)] == epochs[0]
    assert [order(n, seed=2) for n in range(30)] != epochs[0]


def test_a_fingerprint_is_of_texts_and_answers_in_order():
    one, other = Prompt("a", [1], "2"), Prompt("a", [1], "3")
    assert fingerprint([one, other]) == fingerprint([Prompt("a", [7], "2"), other])
    different = Prompt("a2", [1], None)
    lists = ([one], [other], [one, one], [other, one], [one, other], [different], [])
    assert len({fingerprint(prompts) for prompts in lists}) == 7

"""Claims about prompts and answers: a bad file is refused with its line."""

import itertools
import json
from dataclasses import replace
from datetime import datetime

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from assets.make_assets import write_prompts
from assets.task import ADDENDS, running_sums
from assets.tokenizer import build_tokenizer
from support.config import InputError, builtin
from support.data import fingerprint, load_prompts, prompt_of, read_jsonl


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


def test_the_built_in_files_are_what_the_task_makes(tmp_path):
    write_prompts(tmp_path)
    for name in ("prompts.jsonl", "eval.jsonl"):
        assert (ROOT / "assets" / name).read_bytes() == (tmp_path / name).read_bytes(), name


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
        (
            [{"question": "1+1?", "answer": "#### 2"}],
            "line 1: needs an object with either `prompt` .*: rename its keys: {.question",
        ),
        ([{"prompt": "a", "messages": []}], "line 1: needs an object with either"),
        ([["a"]], "line 1: needs an object"),
        ([{"prompt": ""}], "line 1: the prompt is empty or not text"),
        ([{"prompt": 7}], "line 1: the prompt is empty or not text"),
        ([{"prompt": "1", "answer": ["x"]}], r"line 1: `answer` is \['x'\]: text or a number"),
        ([{"prompt": "1", "answer": " "}], "line 1: `answer` is ' ': text or a number is needed"),
        (['{"prompt": "1", "answer": NaN}'], "line 1: `answer` is nan: text or a number is needed"),
        (['{"prompt": "1", "answer": Infinity}'], "line 1: `answer` is inf: text or a number"),
        ([{"prompt": "1", "answer": True}], "line 1: `answer` is True: text or a number is needed"),
        ([{"messages": "hello"}], "line 1: the prompt is empty or not text"),
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


def test_prompts_above_the_limit_are_refused_or_left_out(tmp_path, tokenizer, capsys):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "1+1="}, {"prompt": "1+" * 20 + "1="})
    with pytest.raises(
        InputError,
        match="p.jsonl: 1 of 2 prompts are longer than --max-prompt-tokens 8, the longest"
        " has 42 tokens: raise it, or --drop-long-prompts",
    ):
        read_jsonl(path, tokenizer, 8)
    prompts = read_jsonl(path, tokenizer, 8, drop_long=True)
    assert [prompt.text for prompt in prompts] == ["1+1="]
    assert "1 of 2 prompts are longer than --max-prompt-tokens 8" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no prompts in it \(up to 2 tokens long\)"):
        read_jsonl(path, tokenizer, 2, drop_long=True)


def test_the_built_in_prompts_are_measured_with_the_tokenizer_at_hand():
    """One that adds a token to every prompt makes the longest 33 tokens long."""
    adds_bos = build_tokenizer()
    adds_bos._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    load_prompts(builtin(max_prompt_tokens=33), adds_bos)
    with pytest.raises(InputError, match="the longest has 33 tokens: raise it"):
        load_prompts(builtin(max_prompt_tokens=32), adds_bos)


def test_line_separators_inside_strings_do_not_split_a_line(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "1+1=", "answer": "a\u2028b\x85c"}\n', encoding="utf-8"
    )
    assert read_jsonl(str(tmp_path / "p.jsonl"), tokenizer, 8)[0].answer == "a\u2028b\x85c"


def test_messages_need_a_chat_template(tmp_path):
    without = build_tokenizer()
    without.chat_template = None
    path = write_lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "1+2="}]})
    with pytest.raises(
        InputError, match="chat template refuses it: .*tokenizer.chat_template is not set"
    ):
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
    config = builtin(student=model_dir(vocab=12), teacher=model_dir(), prompts=path)
    highest = max(tokenizer("1+1=").input_ids)
    why = f"line 1: the prompt has token {highest}, the models know 12 tokens: take it out"
    with pytest.raises(InputError, match=why):
        load_prompts(config, tokenizer)


def test_evaluation_prompts_never_occur_in_training(tmp_path, tokenizer):
    # Prompts repeat.
    rows = [{"prompt": f"{i % 60}+{i % 60}=", "answer": str(i)} for i in range(200)]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    train, held = load_prompts(builtin(prompts=path, eval_size=10), tokenizer)
    assert len(held) == 10 and not {p.text for p in train} & {p.text for p in held}
    held_path = write_lines(tmp_path / "e.jsonl", {"prompt": "5+5=", "answer": "01"})
    train, held = load_prompts(builtin(prompts=path, eval_prompts=held_path), tokenizer)
    assert [p.text for p in held] == ["5+5="] and "5+5=" not in {p.text for p in train}
    no_answer = write_lines(tmp_path / "n.jsonl", {"prompt": "5+5="})
    train, held = load_prompts(builtin(prompts=path, eval_prompts=no_answer), tokenizer)
    assert [p.answer for p in held] == [None]  # to be looked at
    with pytest.raises(InputError, match="e.jsonl: all are evaluation prompts, give it more"):
        load_prompts(builtin(prompts=held_path, eval_prompts=held_path), tokenizer)
    assert load_prompts(builtin(prompts=no_answer), tokenizer)[1] == []


# ---- order, fingerprint, answers ----------------------------------------------------------------


def test_each_epoch_visits_every_prompt_samples_per_prompt_times_in_its_own_order():
    def order(ticket, seed=1):
        return prompt_of(ticket, 10, builtin(samples_per_prompt=3, seed=seed))

    epochs = [[order(n) for n in range(epoch * 30, epoch * 30 + 30)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(list(range(10)) * 3)
        assert all(len(set(epoch[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert epochs[0] != epochs[1] and [order(n) for n in range(30)] == epochs[0]
    assert [order(n, seed=2) for n in range(30)] != epochs[0]


def test_a_fingerprint_is_of_the_files_as_they_are(tmp_path):
    def of(prompts, held_out=""):
        files = {"prompts": prompts, "eval_prompts": held_out}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        named = {name: str(tmp_path / name) for name, text in files.items() if text}
        return fingerprint(builtin(**named))

    assert of("a\nb\n") == of("a\nb\n") and of("a", "b") == of("a", "b")
    assert len({of("a\nb\n"), of("b\na\n"), of("a\n"), of("a", "b"), of("b", "a"), of("a")}) == 6


# ---- what people bring -------------------------------------------------------------------------


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS = CHATML.replace("m['content']", "(m['content'] | trim)")
ONLY_KNOWN = (  # as Qwen3's: other roles vanish, thoughts of earlier turns too
    "{% for m in messages %}{% if m.role in ('user', 'system') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<tool>' + m.content | tojson + '</tool>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML
FIRST = {"role": "user", "content": "6*7?"}
QUESTION = "<|im_start|>user\n6*7?<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"


def byte_tokenizer(template=CHATML, **options):
    """Bytes, `<s>`, `<|im_start|>`, `<|im_end|>`. `single`: what it makes of every text."""
    single = options.pop("single", None)
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if single:
        ids = [(token, vocab[token]) for token in special]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    options = {"eos_token": "<|im_end|>", "bos_token": "<s>"} | options
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.chat_template = template
    return fast


def prompt_from(tmp_path, row, tokenizer, **options):
    (prompt,) = read_jsonl(write_lines(tmp_path / "p.jsonl", row), tokenizer, 512, **options)
    assert tokenizer.decode(prompt.ids) == prompt.text
    return prompt.text


def refusal_of(tmp_path, row, tokenizer, **options):
    with pytest.raises(InputError) as refused:
        prompt_from(tmp_path, row, tokenizer, **options)
    return str(refused.value)


@pytest.mark.parametrize("template", [CHATML, TRIMS, ONLY_KNOWN, WITH_TOOLS])
def test_an_answer_at_the_end_of_a_chat_is_left_out_and_said(template, tmp_path, capsys):
    for answers in (["42."], ["Well.", "42."]):
        chat = [FIRST, *({"role": "assistant", "content": text} for text in answers)]
        for row in ({"messages": chat}, {"prompt": chat}):
            (prompt,) = read_jsonl(write_lines(tmp_path / "p", row), byte_tokenizer(template), 512)
            assert prompt.text == QUESTION + HEADER and prompt.answer is None
            assert "1 rows end with the assistant's answer" in capsys.readouterr().out
    later = [FIRST, {"role": "assistant", "content": "42."}, {"role": "user", "content": "So?"}]
    text = prompt_from(tmp_path, {"messages": later}, byte_tokenizer(template))
    assert "42." in text and text.endswith("So?<|im_end|>\n" + HEADER)
    alone = {"messages": [{"role": "assistant", "content": "Hi."}]}
    assert "nothing that the student could answer" in refusal_of(
        tmp_path, alone, byte_tokenizer(template)
    )


@pytest.mark.parametrize("role", ["developer", "function", "critic"])
def test_a_role_that_the_template_leaves_out_is_named(role, tmp_path):
    for chat in ([{"role": role, "content": "Be brief."}], [{"role": role, "content": "x"}, FIRST]):
        message = refusal_of(tmp_path, {"messages": chat}, byte_tokenizer(ONLY_KNOWN))
        assert f"line 1: the chat template refuses it: it leaves out what role `{role}`" in message
        assert role in prompt_from(tmp_path, {"messages": chat}, byte_tokenizer(CHATML))


def test_what_a_template_changes_on_purpose_is_no_reason_to_refuse_it(tmp_path):
    """It drops the thoughts of earlier turns, writes results as JSON, strips white space."""
    chat = [
        FIRST,
        {"role": "assistant", "content": "<think>hm</think>42"},
        {"role": "tool", "content": 'say "x"\n'},
        {"role": "user", "content": "6*7?"},
    ]
    text = prompt_from(tmp_path, {"messages": chat}, byte_tokenizer(ONLY_KNOWN))
    assert "hm" not in text and r'<tool>"say \"x\"\n"</tool>' in text
    spaces = {"messages": [{"role": "user", "content": "  6*7?\n"}]}
    assert prompt_from(tmp_path, spaces, byte_tokenizer(TRIMS)) == QUESTION + HEADER


@pytest.mark.parametrize("template", [CHATML, TRIMS])
def test_text_parts_are_joined_and_other_parts_refused(template, tmp_path):
    parts = [{"type": "text", "text": "6*"}, {"type": "text", "text": "7?"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert prompt_from(tmp_path, row, byte_tokenizer(template)) == QUESTION + HEADER
    for content, reason in (
        ([*parts, {"type": "image", "url": "x"}], "parts of type image are not supported"),
        (["6*7?"], "string indices"),
        ([{"type": "text"}], "'text'"),
        ({"text": "6*7?"}, "its `content` is not text"),
        (None, "its `content` is not text"),
        (42, "its `content` is not text"),
    ):
        row = {"messages": [{"role": "user", "content": content}]}
        message = refusal_of(tmp_path, row, byte_tokenizer(template))
        assert "line 1: a message needs a `role`, and text as `content`" in message
        assert reason in message


def test_a_message_of_another_format_is_refused_with_what_it_needs(tmp_path):
    sharegpt = {"role": "human", "content": "6*7?"}  # no template has that role
    found = {"from": "human", "value": "6*7?"}
    for message in (
        sharegpt,
        found,
        {"content": "6*7?"},
        "6*7?",
        ["user"],
        sharegpt | {"role": "gpt"},
    ):
        told = refusal_of(tmp_path, {"messages": [message]}, byte_tokenizer())
        assert "line 1: a message needs a `role`, and text as `content`" in told, told


def test_settings_of_the_template_come_from_the_row_or_for_all_rows(tmp_path):
    off = {"enable_thinking": False}
    quiet = QUESTION + HEADER + "<think></think>"
    row = {"messages": [FIRST], "chat_template_kwargs": off}
    assert prompt_from(tmp_path, row, byte_tokenizer(ONLY_KNOWN)) == quiet
    plain = {"messages": [FIRST]}
    assert prompt_from(tmp_path, plain, byte_tokenizer(ONLY_KNOWN)) == QUESTION + HEADER
    assert prompt_from(tmp_path, plain, byte_tokenizer(ONLY_KNOWN), kwargs=off) == quiet
    row["chat_template_kwargs"] = {"enable_thinking": True}  # the row's win
    on = prompt_from(tmp_path, row, byte_tokenizer(ONLY_KNOWN), kwargs=off)
    assert on == QUESTION + HEADER
    told = refusal_of(tmp_path, plain, byte_tokenizer(CHATML), kwargs=off)
    assert "the chat template refuses it: it knows no `enable_thinking`" in told
    nearly = {"messages": [FIRST], "chat_template_kwargs": {"think": False}}
    assert "it knows no `think`" in refusal_of(tmp_path, nearly, byte_tokenizer(ONLY_KNOWN))
    nothing = {"messages": [FIRST], "chat_template_kwargs": None}
    assert prompt_from(tmp_path, nothing, byte_tokenizer()) == QUESTION + HEADER
    hidden = {"messages": [FIRST], "chat_template_kwargs": {"tools": [{"name": "multiply"}]}}
    assert "it knows no `tools`" in refusal_of(tmp_path, hidden, byte_tokenizer(WITH_TOOLS))
    assert "refuses it" in refusal_of(
        tmp_path, plain | {"chat_template_kwargs": "off"}, byte_tokenizer(ONLY_KNOWN)
    )


def test_tools_reach_the_template_or_the_row_is_refused(tmp_path):
    row = {"messages": [FIRST], "tools": [{"type": "function", "function": {"name": "multiply"}}]}
    assert "multiply" in prompt_from(tmp_path, row, byte_tokenizer(WITH_TOOLS))
    assert "it leaves out `tools`" in refusal_of(tmp_path, row, byte_tokenizer(CHATML))
    plain = {"prompt": "6*7?", "tools": row["tools"]}
    assert "need `messages`" in refusal_of(tmp_path, plain, byte_tokenizer(CHATML))
    assert prompt_from(tmp_path, {"prompt": "6*7?", "tools": None}, byte_tokenizer()) == "6*7?"
    call = {"role": "assistant", "tool_calls": [{"name": "multiply"}]}
    uses = CHATML.replace("m['content']", "(m['content'] or m.tool_calls | tojson)")
    chat = [FIRST, call, {"role": "tool", "content": "42"}]
    text = prompt_from(tmp_path, {"messages": chat}, byte_tokenizer(uses))
    assert "multiply" in text and "42" in text
    chat[1] = call | {"content": ""}
    told = refusal_of(tmp_path, {"messages": chat}, byte_tokenizer(CHATML))
    assert "it leaves out `tool_calls`: drop them" in told
    told = refusal_of(
        tmp_path, {"messages": chat, "tools": row["tools"]}, byte_tokenizer(WITH_TOOLS)
    )
    assert "it leaves out `tool_calls`: drop them" in told  # though it shows the tools
    as_text = row | {"tools": json.dumps(row["tools"])}  # as columns of a table have them
    shown = prompt_from(tmp_path, row, byte_tokenizer(WITH_TOOLS))
    assert prompt_from(tmp_path, as_text, byte_tokenizer(WITH_TOOLS)) == shown
    for none in ("", " ", "[]", "null", None, []):
        empty = row | {"tools": none}
        assert "multiply" not in prompt_from(tmp_path, empty, byte_tokenizer(CHATML))
    told = refusal_of(tmp_path, row | {"tools": "multiply"}, byte_tokenizer(WITH_TOOLS))
    assert "line 1: the chat template refuses it: Expecting value" in told
    nothing = {"role": "user", "content": None, "tool_calls": None}
    assert "not text" in refusal_of(tmp_path, {"messages": [nothing]}, byte_tokenizer())


def test_a_prompt_after_which_nothing_is_left_to_say_is_refused(tmp_path):
    """The finished answer stands in the text, or the header of the assistant's turn is missing."""
    over = QUESTION + HEADER + "42.<|im_end|>\n"
    for row, template in (
        ({"prompt": over}, CHATML),
        ({"prompt": QUESTION}, CHATML),
        ({"messages": [FIRST]}, CHATML.split("{% if add_generation_prompt")[0]),
    ):
        told = refusal_of(tmp_path, row, byte_tokenizer(template))
        assert "line 1: nothing follows <|im_end|>: end with the header" in told
    assert prompt_from(tmp_path, {"prompt": "<|im_end|>"}, byte_tokenizer()) == "<|im_end|>"
    assert prompt_from(tmp_path, {"prompt": over + HEADER}, byte_tokenizer()) == over + HEADER


def test_keys_that_are_not_used_are_named_once(tmp_path, capsys):
    rows = [{"prompt": "a", "id": 1, "source": "x"}, {"prompt": "b", "id": 2}]
    read_jsonl(write_lines(tmp_path / "p.jsonl", *rows), byte_tokenizer(), 512)
    assert capsys.readouterr().out.count("are not used: id, source") == 1


@pytest.mark.parametrize(
    "single, before",
    [(None, ""), ("<s> $A", "<s>"), ("$A <|im_end|>", ""), ("<s> $A <|im_end|>", "<s>"),
     ("<s> <|im_start|> $A", "<s><|im_start|>")],
)  # fmt: skip
def test_special_tokens_are_never_doubled_and_no_stop_token_is_appended(single, before, tmp_path):
    tokenizer = byte_tokenizer(single=single, template="{{ bos_token }}" + CHATML)

    def ids_of(row):
        (prompt,) = read_jsonl(write_lines(tmp_path / "p.jsonl", row), tokenizer, 512)
        return tokenizer.decode(prompt.ids)

    assert ids_of({"prompt": "6*7="}) == before + "6*7="
    assert ids_of({"prompt": before + "6*7="}) == before + "6*7="
    templated = "<s>" + QUESTION + HEADER
    assert ids_of({"messages": [FIRST]}) == templated
    if before in ("", "<s>"):
        assert ids_of({"prompt": templated}) == templated


def test_a_separator_that_is_the_unknown_token_is_no_unknown_character(tmp_path):
    """SmolLM2's `<|endoftext|>` is."""
    tokenizer = byte_tokenizer(unk_token="<s>", bos_token="<|im_start|>")
    assert prompt_from(tmp_path, {"prompt": "a<s>b<s>c"}, tokenizer) == "a<s>b<s>c"


def test_the_date_is_that_of_the_start_of_the_run(tmp_path, model_dir):
    """A template that prints it gives a resumed run the same prompts."""
    row = {"messages": [FIRST]}
    path = write_lines(tmp_path / "p.jsonl", row, {"prompt": "1+1="})
    models = {"student": model_dir(vocab=300), "teacher": model_dir(vocab=300)}
    config = builtin(prompts=path, **models)
    tokenizer = byte_tokenizer(DATED)
    for started, shown in (
        (datetime(2024, 2, 29, 23, 59, 59), "29 Feb 2024"),
        (None, f"{datetime.now():%d %b %Y}"),
    ):
        train, _ = load_prompts(replace(config, max_prompt_tokens=512), tokenizer, started)
        assert train[0].text == f"{shown}\n{QUESTION}{HEADER}"


@pytest.mark.parametrize(
    "name, content, source",
    [
        ("rows.parquet", b"PAR1\xff\xfe", "'parquet', data_files='{}'"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08", "'json', data_files='{}'"),
        ("rows.csv", b"prompt,answer\n1,2\n", "'csv', data_files='{}'"),
        ("rows.csv.gz", b"\x1f\x8b\x08", "'csv', data_files='{}'"),
        ("rows.txt", b"one plus one\n", "'text', data_files='{}'"),
        ("rows.json", b'[\n{"prompt": "1"}\n]', "'json', data_files='{}'"),
        (None, None, "'openai/gsm8k'"),
    ],
)
def test_other_formats_are_refused_with_the_line_that_makes_json_lines(
    name, content, source, tmp_path
):
    path = "openai/gsm8k"
    if name:
        path = str(tmp_path / name)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_jsonl(path, byte_tokenizer(), 512)
    make = f"from datasets import load_dataset; load_dataset({source.format(path)}, split='train')"
    assert make + ".to_json('prompts.jsonl')" in str(refused.value)
    assert "pip install datasets" in str(refused.value)


def test_many_rows_are_tokenized_as_one_by_one(tmp_path):
    rows = [{"prompt": f"{i}+{i}="} if i % 3 else {"messages": [FIRST]} for i in range(2100)]
    tokenizer = byte_tokenizer(single="<s> $A")
    prompts = read_jsonl(write_lines(tmp_path / "p.jsonl", *rows), tokenizer, 512)
    assert len(prompts) == 2100
    for prompt, row in list(zip(prompts, rows))[::100]:
        assert prompt.ids == tokenizer(prompt.text, add_special_tokens="prompt" in row).input_ids

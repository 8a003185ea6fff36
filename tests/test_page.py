"""Claims about the page of a run: what it keeps of a long one, and that it works in a browser."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from array import array
from html import unescape

import pytest
from conftest import ROOT

from experiments.page import BYTES, POINTS, UNKNOWN, describe, ends, html, in_steps, means, within
from experiments.run_files import Span

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
KINDS = (("d", "begin"), ("f", "length"))
LAST = {"tokens": 100, "wall_seconds": 7.0}
NASTY = "</script><script>failures.push('ran')</script><img src=x onerror=failures.push('image')>"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rollout(step, tokens, response=None, columns=5):
    """One draw, two top ids, two draws of the tail. New weights arrive amid it."""
    ids = [[r % 7, 1, 2, 3, 4 + r % 3] for r in range(tokens)]
    table = [[-0.5 - 0.25 * c - 0.001 * (r % 100) for c in range(columns)] for r in range(tokens)]
    return {
        "step": step,
        "prompt": f"question {step} {NASTY}",
        "response": response or "x" * tokens,
        "finish": "stop",
        "weight_version": [step - 2] * (tokens // 2) + [step - 1] * (tokens - tokens // 2),
        "columns": {"draws": [0, 1], "top": [1, 3], "tail": [3, 5]},
        "tokens": [NASTY if r == 3 else f" w{r % 7}" for r in range(tokens)],
        "texts": {str(i): f" w{i}" for i in range(7)},
        "candidate_ids": ids,
        "student_logp": table,
        "teacher_logp": [[x - 1.5 for x in row] for row in table],
        "behavior_logp": [[x - math.log(2) for x in row] for row in table],
    }


def write_run(run, updates=60, tokens=40, every=20):
    """What train.py leaves, in its form, with text that could break a page."""
    run.mkdir()
    (run / "config.yaml").write_text("loss: stratified_reverse_kl\ntop_k: 2\nstudent: builtin\n")
    records, samples, events = [], [], []
    for tid, role in enumerate(("generator 0", "teacher 0", "learner")):
        events.append({"ph": "M", "tid": tid, "args": {"name": role}})
    for step in range(1, updates + 1):
        record = {
            "step": step,
            "reverse_kl": 1 / step,
            "tokens": 100,
            "lag_mean": 0.5,
            "lag_max": 1,
        }
        record |= {"wall_seconds": 0.1 * step, "ess": 0.9, "generator_busy": 0.8}
        if step % every == 0:
            record["eval_accuracy"] = step / updates
        records.append(record)
        for tid, name in enumerate(("decode", "score", "update")):
            start = 1e5 * step + 2e4 * tid
            events.append({"ph": "X", "tid": tid, "name": name, "ts": start, "dur": 2e4})
    records[0]["eval_accuracy_before"] = 0.0
    for step in range(0, updates + 1, every):
        for prompt in ("always", f"worst of {step}"):
            line = {"step": step, "prompt": prompt, "response": NASTY, "answer": "42"}
            samples.append(line | {"correct": step > 0, "tokens": 9, "logp": -0.5})
    write_lines(run / "metrics.jsonl", records)
    write_lines(run / "samples.jsonl", samples)
    (run / "trace.json").write_text("[\n" + "".join(json.dumps(e) + ",\n" for e in events))
    steps = [1, *range(every, updates + 1, every)]
    write_lines(run / "rollouts.jsonl", [rollout(step, tokens) for step in steps])
    return run


# ---- thinning out -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, POINTS, POINTS + 1, 10_000])
def test_a_thinned_curve_keeps_its_mean_and_its_last_update(count):
    points = [(i + 1, float(i % 13)) for i in range(count)]
    kept = means(points)
    assert len(kept) <= POINTS and kept[-1][0] == count
    if count <= POINTS:
        assert kept == points
    else:
        assert sum(y for _, y in kept) / len(kept) == pytest.approx(6, abs=0.05)


def test_of_too_many_spans_the_first_and_the_last_are_kept_and_the_gap_is_named():
    spans = [Span("ab"[i % 2], "work", float(i), i + 1.5) for i in range(100)]
    assert ends(spans, most=100) == (spans, None)
    assert ends(spans, most=10) == (spans[:5] + spans[95:], (5.5, 95.0))


def test_spans_keep_their_times_after_a_week(tmp_path):
    run = write_run(tmp_path / "run")
    week = 7 * 24 * 3600.0
    late = {"ph": "X", "tid": 0, "name": "decode", "ts": 1e6 * week + 1e5, "dur": 250.0}
    with open(run / "trace.json", "a") as file:
        file.write(json.dumps(late) + ",\n")
    generator = describe(run)["timeline"]["tracks"][0]
    begin, length = (array(kind, base64.b64decode(generator[name])) for kind, name in KINDS)
    assert begin[-1] == pytest.approx(week, abs=1e-6) and length[-1] == pytest.approx(250e-6)
    assert begin[0] == 0.0 and begin[1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "logp, steps",
    [(-1.0, -256), (0.0, 0), (None, UNKNOWN), (math.nan, UNKNOWN), (-math.inf, UNKNOWN + 1)],
)
def test_a_log_probability_becomes_an_int16(logp, steps):
    assert in_steps(logp) == steps


def test_text_with_other_ends_of_lines_and_numbers_that_are_none_have_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 61, "reverse_kl": math.nan, "drift_k3": math.inf} | LAST))
    line = rollout(61, 8) | {"prompt": "one\u2028two\u0085three"}
    line["behavior_logp"][0] = [-0.5, None, None, -0.5, math.nan]
    with open(run / "rollouts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    text = html([describe(run)])
    data = text[text.index('id="data">') + len('id="data">') :].partition("</script>")[0]
    (found,) = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
        "runs"
    ]
    assert found["rollouts"][-1]["prompt"] == line["prompt"]
    curve = {curve["metric"]: curve["y"][-1] for curve in found["curves"]}
    assert curve["reverse_kl"] is None and curve["drift_k3"] is None


@pytest.mark.parametrize("size, count", [(10, 5), (BYTES // 20, 50), (BYTES // 3, 4), (BYTES, 3)])
def test_what_is_too_large_loses_groups_in_the_middle(size, count):
    groups = [[{"step": i, "text": "x" * (size // 2)}] * 2 for i in range(count)]
    kept = within(groups)
    assert kept[0][0]["step"] == 0 and kept[-1][0]["step"] == count - 1
    assert len(json.dumps(kept)) <= BYTES * 1.01
    if size * count < BYTES:
        assert kept == groups


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_holds_all_and_asks_the_network_for_nothing(tmp_path):
    text = html([describe(write_run(tmp_path / "run"))])
    assert not re.search(r"""(src|href)=["']|url\(|@import|fetch\(|XMLHttp|https?:""", text)
    body = text[text.index('id="data">') : text.index("</script>")]
    assert "<" not in body.removeprefix('id="data">')
    (run,) = json.loads(body.removeprefix('id="data">'))["runs"]
    assert [line["step"] for line in run["samples"]] == [0, 0, 20, 20, 40, 40, 60, 60]
    assert [line["step"] for line in run["rollouts"]] == [1, 20, 40, 60]
    accuracy = next(curve for curve in run["curves"] if curve["metric"] == "eval_accuracy")
    assert accuracy["x"] == [0, 20, 40, 60] and accuracy["y"][0] == 0


@pytest.mark.parametrize(
    "break_it, told",
    [
        (lambda run: shutil.rmtree(run), "no such directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl in it"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no update in its metrics.jsonl"),
    ],
)
def test_a_directory_that_is_no_run_is_refused_in_one_line(break_it, told, tmp_path):
    break_it(write_run(tmp_path / "run"))
    command = [sys.executable, "-m", "experiments.page", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr


def test_a_run_with_metrics_alone_or_cut_off_amid_a_line_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("trace.json", "rollouts.jsonl", "samples.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text[: len(text) // 2])
    assert describe(run)["rollouts"]
    for name in ("trace.json", "rollouts.jsonl", "samples.jsonl", "config.yaml"):
        (run / name).unlink()
    assert describe(run)["timeline"]["tracks"] == [] and "<main>" in html([describe(run)])


# ---- in a browser -------------------------------------------------------------------------------

WATCH = """<script>
const failures = [];
addEventListener("error", event => failures.push(String(event.message || event.target.src)), true);
console.error = (...words) => failures.push(words.join(" "));
</script>"""
ACT = """
const result = {};
const at = (element, x, y) => {
  const box = element.getBoundingClientRect();
  return { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true,
           cancelable: true };
};
const text = selector => document.querySelector(selector).textContent;
const range = () => document.querySelector(".time").nextSibling.textContent;
const move = (element, x, y) =>
  element.dispatchEvent(new PointerEvent("pointermove", at(element, x, y)));
const point = element => move(element, .5, .5);
const panel = document.querySelector(".panel canvas");
result.legend = text(".panel .legend");
point(panel);
result.legend_at = text(".panel .legend");
result.whole = range();
const time = document.querySelector(".time canvas");
const pixels = time.toDataURL();
for (let i = 0; i < 8; i++) {
  time.dispatchEvent(new WheelEvent("wheel", { ...at(time, .5, .2), deltaY: -100 }));
}
result.zoomed = range();
result.repainted = time.toDataURL() !== pixels;
time.dispatchEvent(new PointerEvent("pointerdown", at(time, .5, .2)));
move(time, .3, .2);
window.dispatchEvent(new PointerEvent("pointerup"));
result.moved = range();
time.dispatchEvent(new MouseEvent("dblclick", at(time, .5, .2)));
result.back = range();
const box = time.getBoundingClientRect();
const tips = new Set();
for (let x = 0; x < 400; x++) {
  move(time, .5 + x / 1000, 12 / box.height);
  tips.add(text(".tip").split(",")[0]);
}
result.tips = [...tips].sort();
const slider = document.querySelector("input[type=range]");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
result.samples = [...document.querySelectorAll("tbody")][0].innerText;
const response = document.getElementById("response");
result.tokens = response.querySelectorAll(".token").length;
result.arrived = [...response.querySelectorAll(".arrived")].map(mark => mark.textContent);
result.before_mark = response.querySelectorAll(".arrived")[1].previousSibling.dataset.r;
point(response.querySelector('[data-r="5"]'));
result.detail = text("#detail h3");
result.rows = [...document.querySelectorAll("#detail tbody tr")].map(
  row => [...row.children].map(cell => cell.textContent));
response.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
result.next = text("#detail h3");
result.images = document.querySelectorAll("img").length;
setTimeout(() => {
  result.failures = failures;
  const found = document.createElement("pre");
  found.id = "result";
  found.textContent = JSON.stringify(result);
  document.body.append(found);
}, 500);
"""


def browse(page, script=ACT):
    """What `script` finds on a page, in headless Chromium."""
    text = page.read_text()
    text = text.replace("<head>", "<head>" + WATCH, 1)
    text = text.replace("</body>", f"<script>{script}</script></body>")
    page.with_name("watched.html").write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=4000", "--dump-dom"]
    address = page.with_name("watched.html").as_uri()
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: apt-get install chromium, then this test runs"
)


def make_page(*runs):
    command = [sys.executable, "-m", "experiments.page", *map(str, runs)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return runs[0] / "page.html"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("count", [1, 2])
def test_the_page_opens_without_an_error_and_hover_and_zoom_work(count, tmp_path):
    runs = [write_run(tmp_path / f"run{i}") for i in range(count)]
    found = browse(make_page(*runs))
    assert found["failures"] == [] and found["images"] == 0
    assert " at " not in found["legend"] and re.search(
        r"reverse_kl 0\.\d+ at \d\d", found["legend_at"]
    )
    assert found["whole"].startswith("0.0 ms to 5.96 s") and found["back"] == found["whole"]
    assert len({found["whole"], found["zoomed"], found["moved"]}) == 3 and found["repainted"]
    assert found["tips"] == ["generator 0: decode", "generator 0: waits"]
    assert NASTY in found["samples"] and "wrong" in found["samples"]
    assert found["tokens"] == 40 and found["arrived"] == ["58", "59"]
    assert found["before_mark"] == "19"
    assert found["detail"].startswith("token 6 of 40") and found["next"].startswith("token 7 of 40")
    kinds, words, s, t, b, weight = zip(*found["rows"])
    assert kinds == ("emitted", "top", "top", "tail", "tail")
    assert words == (" w5", " w1", " w2", " w3", " w6")
    assert s[0] == "-0.50" and t[0] == "-2.00" and b[0] == "-1.20"  # written with 1/256 nats
    assert weight == ("2.00", "", "", "2.00", "2.00")


@pytest.mark.slow
@needs_chromium
def test_a_run_of_ten_thousand_updates_and_sixteen_thousand_tokens_stays_usable(tmp_path):
    run = write_run(tmp_path / "run", updates=10_000, tokens=16_384, every=1000)
    page = make_page(run)
    assert page.stat().st_size < 3 * BYTES
    found = browse(page)
    assert found["failures"] == [] and found["tokens"] == 16_384
    assert found["whole"] != found["zoomed"] and found["detail"].startswith("token 6 of 16384")

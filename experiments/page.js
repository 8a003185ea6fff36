// The page of a run. Data come from the element #data, see page.py. No library.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUN_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const LINE_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#787878"];
const DASHES = [[], [5, 3], [1, 2], [8, 3, 2, 3]];
const VERDICTS = { null: "", true: "right", false: "wrong" };  // null: there is no answer
const FULL_COLOUR = 4;  // nats between student and teacher at which a token has its full colour

// ---- small things ---------------------------------------------------------------------------

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "style") Object.assign(element.style, value);
    else element[name] = value;
  }
  element.append(...children);  // text stays text
  return element;
}

function section(title, words) {
  document.querySelector("main").append(make("h2", {}, title), make("p", {}, words));
  const body = make("div", { className: "runs" });
  document.querySelector("main").append(body);
  return body;
}

function unpack(kind, text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return new kind(bytes.buffer);
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A canvas as sharp as the screen, and its context in CSS pixels.
function prepare(canvas, height) {
  const width = canvas.parentElement.clientWidth, ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, sans-serif";
  return [context, width];
}

function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const size = Math.abs(value);
  if (size >= 1e7 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return value.toFixed(size >= 1 ? 2 : 3);
}

function seconds(value) {
  if (value < 1) return (1000 * value).toFixed(1) + " ms";
  if (value < 120) return value.toFixed(2) + " s";
  return (value / 60).toFixed(1) + " min";
}

// Round numbers that divide a range into about `count` parts, and their texts.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= rough * 0.999);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step / 1e6; x += step) {
    found.push(Math.abs(x) < step / 1e6 ? 0 : x);
  }
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return found.map(x => [x, Math.abs(x) < 1e4 ? x.toFixed(digits) : short(x)]);
}

const TIP = make("div", { className: "tip" });
function tip(event, text) {
  TIP.textContent = text;
  TIP.style.display = text ? "block" : "none";
  TIP.style.left = Math.min(event.clientX + 14, window.innerWidth - 260) + "px";
  TIP.style.top = event.clientY + 16 + "px";
}

const REDRAW = [];  // what a new width of the window asks for

// ---- the head -------------------------------------------------------------------------------

function head() {
  const main = document.querySelector("main");
  main.append(make("h1", {}, DATA.runs.map(run => run.name).join("  and  ")));
  const body = make("div", { className: "runs" });
  DATA.runs.forEach((run, number) => {
    const settings = make("div", { className: "settings" });
    for (const [name, value] of Object.entries(run.settings)) {
      const same = DATA.runs.every(other => String(other.settings[name]) === String(value));
      const text = `${name} ${value}`;
      settings.append(same ? make("span", {}, text) : make("b", {}, text));
    }
    const swatch = make("span", { className: "swatch", style: { background: RUN_COLOURS[number % 6] } });
    const facts = `${run.updates} updates, ${short(run.tokens)} tokens, ${seconds(run.seconds)}`;
    body.append(make("div", {}, make("h3", {}, swatch, run.name), make("p", {}, facts), settings));
  });
  main.append(body);
}

// ---- curves ---------------------------------------------------------------------------------

// One panel for each title. Hovering over one shows the values of all at that update.
function curves() {
  const body = section("Curves", "Against the update. Point at one: all show their values there.");
  body.className = "panels";
  const titles = [...new Set(DATA.runs.flatMap(run => run.curves.map(curve => curve.title)))];
  const panels = titles.map(title => {
    const lines = [];
    DATA.runs.forEach((run, number) => {
      run.curves.filter(curve => curve.title === title).forEach((curve, index) => {
        const several = DATA.runs.length > 1;
        lines.push({
          ...curve,
          label: (several ? run.name + " " : "") + curve.metric,
          colour: several ? RUN_COLOURS[number % 6] : LINE_COLOURS[index % 7],
          dash: several ? DASHES[index % 4] : [],
        });
      });
    });
    const panel = { lines, canvas: make("canvas"), legend: make("div", { className: "legend" }) };
    const box = make("div", { className: "panel" }, make("h3", {}, title), panel.canvas, panel.legend);
    body.append(box);
    panel.canvas.addEventListener("pointermove", event => {
      drawAll(panel.low + (event.offsetX - panel.left) / panel.scale);
    });
    panel.canvas.addEventListener("pointerleave", () => drawAll(null));
    return panel;
  });
  function drawAll(update) { panels.forEach(panel => drawPanel(panel, update)); }
  REDRAW.push(() => drawAll(null));
}

function drawPanel(panel, update) {
  const height = 150, bottom = 18, left = 40, right = 16, top = 8;
  const [context, width] = prepare(panel.canvas, height);
  const xs = panel.lines.flatMap(line => [line.x[0], line.x[line.x.length - 1]]);
  const ys = panel.lines.flatMap(line => line.y).filter(Number.isFinite);
  const lowX = Math.min(0, ...xs), highX = Math.max(...xs, 1);
  let lowY = 0, highY = 0;
  for (const y of ys) { lowY = Math.min(lowY, y); highY = Math.max(highY, y); }
  if (highY === lowY) highY = lowY + 1;
  const scaleX = (width - left - right) / (highX - lowX), scaleY = (height - bottom - top) / (highY - lowY);
  Object.assign(panel, { left, scale: scaleX, low: lowX });
  const place = (x, y) => [left + (x - lowX) * scaleX, height - bottom - (y - lowY) * scaleY];
  context.fillStyle = style("--soft");
  context.strokeStyle = style("--line");
  context.lineWidth = 1;
  for (const [y, text] of ticks(lowY, highY, 4)) {
    const level = place(0, y)[1];
    context.beginPath(); context.moveTo(left, level); context.lineTo(width - right, level); context.stroke();
    context.textAlign = "right";
    context.fillText(text, left - 5, level + 3);
  }
  context.textAlign = "center";
  for (const [x, text] of ticks(lowX, highX, 5)) context.fillText(text, place(x, 0)[0], height - 5);
  panel.legend.replaceChildren();
  for (const line of panel.lines) {
    context.strokeStyle = line.colour;
    context.lineWidth = 1.4;
    context.setLineDash(line.dash);
    context.beginPath();
    let drawing = false;  // null: the number was not finite
    line.x.forEach((x, i) => {
      if (line.y[i] !== null) context[drawing ? "lineTo" : "moveTo"](...place(x, line.y[i]));
      drawing = line.y[i] !== null;
    });
    context.stroke();
    context.setLineDash([]);
    let index = line.x.length - 1;
    if (update !== null) {
      while (index > 0 && line.x[index] > update) index--;
      const [x, y] = place(line.x[index], line.y[index]);
      context.fillStyle = line.colour;
      if (line.y[index] !== null) context.fillRect(x - 2.5, y - 2.5, 5, 5);
    }
    const value = `${line.label} ${short(line.y[index])}` + (update === null ? "" : ` at ${line.x[index]}`);
    panel.legend.append(make("span", {}, make("span", { className: "swatch", style: { background: line.colour, margin: "0 5px 0 0" } }), value));
  }
}

// ---- who works when -------------------------------------------------------------------------

function timelines() {
  const body = section("Who works when",
    "Wheel or + and -: zoom. Drag: move. Pale: evaluates, saves. Black: picks up new weights. Percent: busy in what is shown.");
  for (const run of DATA.runs) {
    const box = make("div");
    body.append(box);
    if (!run.timeline.tracks.length) { box.append(make("p", {}, `${run.name} has no trace.json`)); continue; }
    timeline(run, box);
  }
}

const ROW = 24, LABEL = 150, EDGE = 26;  // pixels

function timeline(run, box) {
  const { names, left_out } = run.timeline;
  const tracks = run.timeline.tracks.map(track => {
    const begin = unpack(Float64Array, track.begin), length = unpack(Float32Array, track.length);
    const end = begin.map((at, i) => at + length[i]);
    return { role: track.role, name: unpack(Uint8Array, track.name), begin, end };
  });
  const isPale = names.map(name => ["evaluate", "save"].includes(name));
  const isArrival = names.map(name => name.includes("weights"));
  const whole = Math.max(...tracks.map(track => track.end[track.end.length - 1]));
  const view = { from: 0, to: whole };
  const canvas = make("canvas"), words = make("div", { className: "legend" });
  const button = (text, action) => make("button", { onclick: () => { action(); draw(); } }, text);
  const zoom = (factor, at) => {
    const span = Math.min(whole, Math.max(0.002, (view.to - view.from) * factor));
    const share = (at - view.from) / (view.to - view.from);
    move(at - share * span, span);
  };
  const move = (from, span) => {
    view.from = Math.max(0, Math.min(from, whole - span));
    view.to = view.from + span;
  };
  const centre = () => (view.from + view.to) / 2;
  box.append(
    make("h3", {}, run.name + "  ",
      button("+", () => zoom(0.5, centre())), button("-", () => zoom(2, centre())),
      button("<", () => move(view.from - (view.to - view.from) / 2, view.to - view.from)),
      button(">", () => move(view.from + (view.to - view.from) / 2, view.to - view.from)),
      button("all", () => move(0, whole))),
    make("div", { className: "time" }, canvas), words);

  function draw() {
    const height = tracks.length * ROW + 18;
    const [context, width] = prepare(canvas, height);
    const scale = (width - LABEL - EDGE) / (view.to - view.from);
    const ink = style("--ink");
    let known = view.to - view.from;  // of the time shown, what the page holds
    if (left_out) {
      const from = Math.max(left_out[0], view.from), to = Math.min(left_out[1], view.to);
      known -= Math.max(0, to - from);
      context.fillStyle = style("--line");
      context.fillRect(LABEL + (from - view.from) * scale, 0, Math.max(0, to - from) * scale, tracks.length * ROW);
    }
    tracks.forEach((track, row) => {
      let busy = 0, last = -1, arrived = -1;
      for (let i = first(track.end, view.from); i < track.begin.length && track.begin[i] < view.to; i++) {
        const begin = Math.max(track.begin[i], view.from), end = Math.min(track.end[i], view.to);
        busy += end - begin;
        const x = LABEL + (begin - view.from) * scale, right = LABEL + (end - view.from) * scale;
        const name = track.name[i];
        if (isArrival[name] ? x < arrived + 0.5 : right < last + 0.25) continue;  // nobody would see it
        context.globalAlpha = isPale[name] ? 0.35 : 1;
        context.fillStyle = isArrival[name] ? ink : DATA.colours[track.role.split(" ")[0]];
        context.fillRect(x, row * ROW + 3, Math.max(0.5, right - x), ROW - 6);
        last = right;
        if (isArrival[name]) arrived = x;
      }
      context.globalAlpha = 1;
      context.fillStyle = style("--ink");
      context.textAlign = "left";
      const share = known > 0 ? `${(100 * busy / known).toFixed(0)} %` : "";
      context.fillText(`${track.role}  ${share}`, 4, row * ROW + ROW / 2 + 4);
    });
    context.fillStyle = style("--soft");
    context.textAlign = "center";
    for (const [x, text] of ticks(view.from, view.to, 8)) {
      context.fillText(text + " s", LABEL + (x - view.from) * scale, height - 4);
    }
    words.textContent = `${seconds(view.from)} to ${seconds(view.to)} of ${seconds(whole)}` +
      (left_out ? `. Too long for a page: grey is left out, ${seconds(left_out[0])} to ${seconds(left_out[1])}.` : "");
  }

  const timeOf = event => view.from + (event.offsetX - LABEL) / (canvas.clientWidth - LABEL - EDGE) * (view.to - view.from);
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      move(view.from + (event.deltaX || event.deltaY) / 600 * (view.to - view.from), view.to - view.from);
    } else {
      zoom(1.2 ** Math.sign(event.deltaY), Math.max(view.from, timeOf(event)));
    }
    draw();
  }, { passive: false });
  let grabbed = null;
  canvas.addEventListener("pointerdown", event => { grabbed = { x: event.clientX, from: view.from }; });
  window.addEventListener("pointerup", () => { grabbed = null; });
  canvas.addEventListener("pointermove", event => {
    if (grabbed) {
      const span = view.to - view.from;
      move(grabbed.from - (event.clientX - grabbed.x) / (canvas.clientWidth - LABEL - EDGE) * span, span);
      draw();
      return;
    }
    const row = Math.floor(event.offsetY / ROW), at = timeOf(event), track = tracks[row];
    let text = "";
    if (track && at >= view.from) {
      const i = first(track.end, at);
      const length = i < track.begin.length ? track.end[i] - track.begin[i] : 0;
      const works = i < track.begin.length && track.begin[i] <= at;
      const isLeftOut = left_out && left_out[0] < at && at < left_out[1];
      text = works ? `${track.role}: ${names[track.name[i]]}, ${seconds(length)}` : isLeftOut ? "" : `${track.role}: waits`;
    }
    tip(event, text);
  });
  canvas.addEventListener("pointerleave", event => tip(event, ""));
  canvas.addEventListener("dblclick", () => { move(0, whole); draw(); });
  REDRAW.push(draw);
}

// The first place in ascending numbers that is above x.
function first(numbers, x) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] > x) high = middle; else low = middle + 1;
  }
  return low;
}

// ---- what the student says ------------------------------------------------------------------

function samples() {
  const body = section("What the student says",
    "Greedy answers of each evaluation: the same prompts every time, then the wrong answers that it was surest of.");
  for (const run of DATA.runs) {
    const steps = [...new Set(run.samples.map(line => line.step))];
    const box = make("div", {}, make("h3", {}, run.name));
    body.append(box);
    if (!steps.length) { box.append(make("p", {}, "It has no samples.jsonl: no evaluation was made.")); continue; }
    const always = new Set(run.samples.filter(line => line.step === steps[0]).map(line => line.prompt)
      .filter(prompt => steps.every(step => run.samples.some(line => line.step === step && line.prompt === prompt))));
    const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, style: { width: "60%" } });
    const label = make("b"), table = make("tbody");
    const show = () => {
      const step = steps[slider.value];
      const lines = run.samples.filter(line => line.step === step);
      label.textContent = `  after update ${step}`;
      table.replaceChildren(...lines.map(line => make("tr", {},
        make("td", { className: "soft" }, always.has(line.prompt) ? "always" : "worst"),
        make("td", { className: "text" }, line.prompt),
        make("td", { className: "text" }, line.response || "(nothing)"),
        make("td", { className: "text" }, line.answer ?? ""),
        make("td", { className: VERDICTS[line.correct] }, VERDICTS[line.correct]),
        make("td", { className: "number" }, short(line.logp)))));
    };
    slider.addEventListener("input", show);
    const heads = ["", "prompt", "response", "answer", "", "log p a token"].map((text, i) =>
      make("th", { className: i === 5 ? "number" : "" }, text));
    box.append(slider, label, make("div", { className: "scroll" },
      make("table", {}, make("thead", {}, make("tr", {}, ...heads)), table)));
    show();
  }
}

// ---- the reader of rollouts -----------------------------------------------------------------

function reader() {
  const body = section("Rollouts, token by token", "");
  body.className = "";
  const words = body.previousSibling;
  words.append("Blue: the teacher finds the token likelier than the student does. Orange: less likely. Full colour: 4 nats. ",
    make("span", { className: "scale" }), "  A number in grey: from here on the weights of that update sampled. Point at a token, or use the arrow keys.");
  const all = DATA.runs.flatMap(run => run.rollouts.map(rollout => ({ run, rollout })));
  if (!all.length) { body.append(make("p", {}, "No run here has a rollouts.jsonl.")); return; }
  const choice = make("select", { id: "rollout" });
  all.forEach(({ run, rollout }, number) => {
    const name = DATA.runs.length > 1 ? run.name + ", " : "";
    const text = `${name}update ${rollout.step}: ${rollout.prompt.slice(-60).replace(/\s+/g, " ")}`;
    choice.append(make("option", { value: number }, text));
  });
  choice.value = all.findIndex(item => item.rollout.step === all[all.length - 1].rollout.step);
  const left = make("div"), right = make("div", { className: "detail", id: "detail" });
  const another = by => () => {
    choice.value = Math.max(0, Math.min(all.length - 1, Number(choice.value) + by));
    show();
  };
  body.append(make("p", {}, make("button", { onclick: another(-1) }, "<"), " ", choice, " ",
    make("button", { onclick: another(1) }, ">")), make("div", { className: "reader" }, left, right));
  let current = null, cursor = 0, strip = null;

  function show() {
    const { rollout } = all[choice.value];
    const width = Math.max(...Object.values(rollout.columns).map(range => range[1]));
    current = { ...rollout, width, ids: unpack(Uint32Array, rollout.candidate_ids), names: rollout.ids };
    for (const name of ["student_logp", "teacher_logp", "behavior_logp"]) {
      const steps = unpack(Int16Array, rollout[name]);
      current[name] = (r, c) => {
        const step = steps[r * width + c];
        return step === DATA.unknown ? null : step / DATA.steps_per_nat;
      };
    }
    const response = make("div", { className: "response", id: "response", tabIndex: 0 });
    let difference = 0, version = null, widest = 0, most = -1;
    const parts = document.createDocumentFragment();
    rollout.tokens.forEach((text, r) => {
      if (rollout.weight_version[r] !== version) {
        version = rollout.weight_version[r];
        const title = r ? `weights of update ${version} arrived here` : `started with the weights of update ${version}`;
        parts.append(make("span", { className: "arrived", title }, String(version)));
      }
      const gap = current.student_logp(r, 0) - current.teacher_logp(r, 0);
      difference += gap;
      if (Math.abs(gap) > most) [widest, most] = [r, Math.abs(gap)];
      parts.append(token(text, r, gap));
    });
    response.append(parts);
    response.addEventListener("pointermove", event => {
      if (event.target.dataset.r !== undefined) point(Number(event.target.dataset.r));
    });
    response.addEventListener("keydown", event => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      point(Math.max(0, Math.min(rollout.tokens.length - 1, cursor + by)));
      response.querySelector(".on").scrollIntoView({ block: "nearest" });
    });
    const versions = rollout.weight_version, count = rollout.tokens.length;
    const lag = versions.reduce((sum, v) => sum + rollout.step - 1 - v, 0) / count;
    const facts = `${count} tokens, ended by ${rollout.finish}; sampled by weights ${versions[0]} to ` +
      `${versions[count - 1]}, trained in update ${rollout.step} (lag ${lag.toFixed(2)}); ` +
      `student less teacher: ${(difference / count).toFixed(3)} nats a token`;
    strip = make("canvas", { title: "every token; click to go there", style: { cursor: "pointer", margin: "0 0 8px" } });
    const holder = make("div", {}, strip);
    left.replaceChildren(make("div", { className: "prompt" }, rollout.prompt), holder, response, make("p", {}, facts));
    drawStrip(strip);
    strip.addEventListener("click", event => {
      point(Math.min(count - 1, Math.floor(event.offsetX / strip.clientWidth * count)));
      response.querySelector(".on").scrollIntoView({ block: "center" });
    });
    point(widest);
  }

  function token(text, r, gap) {
    const shown = text.trim() ? text : text.replace(/\n/g, "\u23ce\n").replace(/ /g, "\u00b7").replace(/\t/g, "\u21e5") || "\u2205";
    const element = make("span", { className: "token" }, shown);
    element.dataset.r = r;
    element.style.background = colour(gap);
    return element;
  }

  function colour(gap) {
    const opacity = Math.min(1, Math.abs(gap) / FULL_COLOUR) * 0.75;
    return `rgba(var(${gap > 0 ? "--more" : "--less"}), ${opacity.toFixed(3)})`;
  }

  // The whole response in one line: of several tokens in a pixel, the one with the widest gap.
  function drawStrip(canvas) {
    const [context, width] = prepare(canvas, 14);
    const count = current.tokens.length;
    const widest = new Float64Array(Math.ceil(width));
    for (let r = 0; r < count; r++) {
      const gap = current.student_logp(r, 0) - current.teacher_logp(r, 0);
      for (let x = Math.floor(r / count * width); x < Math.max((r + 1) / count * width, r / count * width + 1) && x < width; x++) {
        if (Math.abs(gap) > Math.abs(widest[x])) widest[x] = gap;
      }
    }
    widest.forEach((gap, x) => {
      context.fillStyle = colour(gap).replace(/var\((--\w+)\)/, (_, name) => style(name));
      context.fillRect(x, 0, 1, 14);
    });
  }

  function point(r) {
    cursor = r;
    left.querySelector(".token.on")?.classList.remove("on");
    left.querySelector(`[data-r="${r}"]`).classList.add("on");
    const { columns, width, ids } = current;
    const number = value => make("td", { className: "number" }, value === null ? "-" : value.toFixed(2));
    const rows = [];
    let mass = [0, 0];
    for (const [kind, [from, to]] of Object.entries(columns)) {
      for (let c = from; c < to; c++) {
        const [s, t, b] = ["student_logp", "teacher_logp", "behavior_logp"].map(name => current[name](r, c));
        if (kind === "top") mass = [mass[0] + Math.exp(s), mass[1] + Math.exp(t)];
        const place = ids[r * width + c];
        const cell = make("td", { style: { background: colour(s - t) }, title: `id ${current.names[place]}` },
          JSON.stringify(current.texts[place]).slice(1, -1) || "\u2205");
        const weight = make("td", { className: "number" }, kind === "top" || b === null ? "" : short(Math.exp(s - b)));
        const name = kind === "draws" ? (c === 0 ? "emitted" : "draw") : kind === "top" ? "top" : "tail";
        rows.push(make("tr", {}, make("td", { className: "soft" }, name), cell, number(s), number(t), number(b), weight));
      }
    }
    const heads = ["", "candidate", "student", "teacher", "sampler", "weight"].map((text, i) =>
      make("th", { className: i > 1 ? "number" : "" }, text));
    const top = columns.top[1] > columns.top[0]
      ? `; mass of the top ${columns.top[1] - columns.top[0]}: student ${(100 * mass[0]).toFixed(1)} %, teacher ${(100 * mass[1]).toFixed(1)} %` : "";
    right.replaceChildren(
      make("h3", {}, `token ${r + 1} of ${current.tokens.length}: ${JSON.stringify(current.tokens[r])}`),
      make("p", {}, `sampled by weights ${current.weight_version[r]}, lag ${current.step - 1 - current.weight_version[r]}${top}. ` +
        "Log-probabilities in nats; the weight of a draw is e^(student - sampler)."),
      make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
  }

  choice.addEventListener("change", show);
  REDRAW.push(() => strip ? drawStrip(strip) : show());
}

// ---- all of it ------------------------------------------------------------------------------

head();
curves();
timelines();
samples();
reader();
document.body.append(TIP);
const redraw = () => REDRAW.forEach(draw => draw());
let waiting = null;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 100); });
redraw();

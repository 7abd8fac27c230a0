"use strict";
// Everything from outside enters by textContent, or as a number: markup in a completion is shown and never run.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, several = runs.length > 1;
const at = (id) => document.getElementById(id);
const COLOURS = ["#3b7dd8", "#d9772b", "#2e9e5b", "#b0489b", "#c23b3b", "#7a6ff0"];
const colour = (k) => COLOURS[k % COLOURS.length];
const number = (value, digits = 3) => value == null ? "–" : Number(value).toFixed(digits);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A new element with a class, text and children. */
function make(tag, name = "", text = null, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

// --- head, worries, result ---

function showHead() {
  document.title = runs.map((run) => run.name).join(", ");
  at("title").textContent = document.title;
  at("about").textContent = runs.map((run) => {
    const c = run.config;
    const model = c.model || "tiny random model, synthetic clips";
    const total = run.seconds.total ? `, ${(run.seconds.total / 3600).toFixed(2)} h in all` : ", not finished";
    return `${several ? run.name + ": " : ""}${model}; ${c.tasks.join(", ")}; ${run.steps} GRPO steps, ${c.questions} questions × ` +
      `${c.group_size} completions, lr ${c.lr}, beta ${c.beta}, seed ${c.seed}${total}`;
  }).join("\n");
  at("about").style.whiteSpace = "pre-line";
}

function showWorries() {
  for (const run of runs) {
    const title = several ? `${run.name}: ` : "";
    if (run.missing) at("worries").append(make("div", "worry", title + run.missing));
    if (run.worries.length) {
      const list = make("ul", "", null, ...run.worries.map((text) => make("li", "", text)));
      at("worries").append(make("div", "worry", null, make("b", "", title + "What to worry about"), list));
    } else if (!run.steps) {
      at("worries").append(make("p", "quiet", title + "no step of GRPO is logged yet."));
    } else {
      at("worries").append(make("div", "fine", title + "Nothing to worry about was found: dead groups, truncation, collapse, " +
        "format, KL, gap and held-out metrics were looked at."));
    }
  }
}

/** Rows of the result of all runs, then the blind answers: once where they are those of an earlier run's questions too. */
function resultRows() {
  const stages = [], blind = new Map();
  runs.forEach((run, k) => run.results.forEach((row) => {
    const title = several ? `${run.name}: ${row.title}` : row.title, key = JSON.stringify(row);
    if (row.kind !== "blind") stages.push({...row, title, colour: several ? colour(k) : css("--span")});
    else if (!blind.has(key)) blind.set(key, {...row, title: k ? title : row.title, colour: css("--quiet")});
  }));
  return [...stages, ...blind.values()];
}

function metricNames(rows) {
  return [...new Set(rows.flatMap((row) => Object.keys(row.metrics)))].filter((name) => name !== "n");
}

function showResult() {
  const rows = resultRows(), names = metricNames(rows), tasks = {};
  for (const name of names) if (name.includes("/")) tasks[name.split("/")[0]] ??= name;
  if (!rows.length) at("forests").append(make("p", "quiet", "No evaluation is there yet, or the run has no held-out questions."));
  for (const name of Object.values(tasks)) {
    const forest = make("div", "forest");
    for (const row of rows.filter((row) => row.metrics[name] != null)) forest.append(...forestRow(row, name));
    at("forests").append(make("div", "card", null, make("h3", "", name), forest));
  }
  const head = make("tr", "", null, make("th", "", "metric"), ...rows.map((row) => make("th", "", row.title)));
  const body = names.map((name) => make("tr", "", null, make("td", "", name), ...rows.map((row) => {
    const cell = make("td", "", number(row.metrics[name])), interval = row.intervals[name];
    if (interval) cell.append(make("small", "", `${number(interval[0])} to ${number(interval[1])}`));
    return cell;
  })));
  at("table").append(make("table", "", null, head, ...body));
}

function forestRow(row, name) {
  const value = row.metrics[name], interval = row.intervals[name], track = make("div", "track");
  const percent = (x) => `${100 * Math.min(Math.max(x, 0), 1)}%`;
  if (interval) {
    const bar = make("div", "interval");
    Object.assign(bar.style, {left: percent(interval[0]), width: percent(interval[1] - interval[0]), background: row.colour});
    track.append(bar);
  }
  const dot = make("div", "dot");
  Object.assign(dot.style, {left: percent(value), background: row.colour});
  track.append(dot);
  track.title = interval ? `${number(value)}, 95 % from ${number(interval[0])} to ${number(interval[1])}` : number(value);
  const figure = make("span", "number", number(value));
  if (interval) figure.append(make("small", "", `${number(interval[0])}–${number(interval[1])}`));
  return [make("span", row.kind === "blind" ? "quiet" : "", row.title), track, figure];
}

// --- curves ---

/** Series of one chart over the steps of all runs: [steps, values, ...] and their looks. */
function seriesOf([, phase, names]) {
  const columns = runs.map((run) => run[phase] || {step: []});
  const steps = [...new Set(columns.flatMap((column) => column.step))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, k) => [step, k])), values = [steps], looks = [{label: "step", value: (_, v) => v == null ? "–" : String(v)}];
  const wanted = names[0] === "*" ? [...new Set(columns.flatMap(Object.keys))].filter((name) => name !== "step") : names;
  columns.forEach((column, k) => wanted.forEach((name, n) => {
    if (!column[name] || column[name].every((value) => value === null)) return;
    const line = new Array(steps.length).fill(undefined);  // undefined: another run's step, drawn over; null: a gap
    column.step.forEach((step, m) => { line[place.get(step)] = column[name][m]; });
    values.push(line);
    looks.push({label: several ? `${runs[k].name} ${name}` : name, stroke: several ? colour(k) : colour(n), width: 1.5,
      dash: several && n ? [4 * n, 4] : undefined, value: (_, v) => v == null ? "–" : String(+Number(v).toPrecision(3)),
      points: {show: phase === "evaluations"}});
  }));
  return [values, looks];
}

function showCurves() {
  const charts = [];
  for (const curve of data.curves) {
    const [title, , , logarithmic, sentence] = curve, [values, looks] = seriesOf(curve);
    if (values.length < 2) continue;
    const place = make("div"), card = make("div", "card", null, make("h3", "", title), place, make("p", "quiet", sentence));
    at("charts").append(card);
    const axis = {stroke: () => css("--quiet"), grid: {stroke: () => css("--line"), width: 1}, ticks: {stroke: () => css("--line"), width: 1}};
    const plot = new uPlot({width: 300, height: 180, series: looks, scales: {x: {time: false}, y: logarithmic ? {distr: 3} : {range: (_, low, high) => low === high ? [low - 0.5, high + 0.5] : uPlot.rangeNum(low, high, 0.1, true)}},
      axes: [{...axis, space: 60}, {...axis, size: 56, values: (_, ticks) => ticks.map((v) => v == null ? "" : logarithmic ? v.toExponential(0) : String(+v.toPrecision(4)))}],
      cursor: {y: false}}, logarithmic ? values.map((line, k) => k ? line.map((v) => v === 0 ? null : v) : line) : values, place);
    charts.push([plot, place]);
  }
  if (!charts.length) at("charts").append(make("p", "quiet", "No step is logged yet."));
  const fit = () => charts.forEach(([plot, place]) => plot.setSize({width: place.clientWidth, height: 180}));
  fit();
  addEventListener("resize", fit);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(([plot]) => plot.redraw()));
}

// --- frames, spans and boxes ---

/** Frames, the truth, then a lane for each answer: {title, spans}. `boxes`: of the chosen answer. */
function timeline(question, answers, chosen) {
  const clip = question.clip == null ? null : data.clips[question.clip], inner = make("div");
  inner.style.setProperty("--frames", clip ? clip.times.length : 6);
  if (clip && clip.times.length > 8) inner.classList.add("many");
  if (clip) inner.append(...frameLanes(clip, question, answers[chosen]));
  if (question.length && (question.spans || answers.some((answer) => answer.spans))) {
    if (question.spans) inner.append(lane("truth", bars(question.spans, question.length, css("--truth"))));
    answers.forEach((answer, k) => {
      const row = lane(answer.title, bars(answer.spans || [], question.length, css("--span")));
      if (k === chosen && answers.length > 1) row.classList.add("chosen");
      inner.append(row);
    });
    if (!clip) inner.append(lane("", make("div", "moment", `0 to ${number(question.length, 1)} s`)));
  }
  return make("div", "timeline", null, inner);
}

function lane(title, content) {
  return make("div", "lane", null, make("span", "", title), content);
}

function bars(spans, length, mark) {
  const track = make("div", "bars");
  for (const [start, end] of spans) {
    const bar = make("div", "bar"), left = Math.min(Math.max(start / length, 0), 1), right = Math.min(Math.max(end / length, 0), 1);
    Object.assign(bar.style, {left: `${100 * left}%`, width: `${100 * Math.max(right - left, 0)}%`});
    bar.style.setProperty("--mark", mark);
    bar.title = `${start} to ${end} s`;
    track.append(bar);
  }
  return track;
}

function frameLanes(clip, question, answer) {
  const count = clip.times.length, frames = make("div", "frames"), moments = make("div", "frames");
  clip.times.forEach((seconds, k) => {
    const frame = make("div", "frame");
    Object.assign(frame.style, {aspectRatio: `${clip.width} / ${clip.height}`, backgroundImage: `url(${clip.src})`,
      backgroundSize: `${100 * count}% 100%`, backgroundPosition: `${count > 1 ? 100 * k / (count - 1) : 0}% 0`});
    for (const [boxes, mark] of [[question.boxes, css("--truth")], [answer && answer.boxes, css("--span")]]) {
      if (boxes && boxes[clip.shown[k]]) frame.append(box(boxes[clip.shown[k]], mark));
    }
    frames.append(frame);
    moments.append(make("div", "moment", number(seconds, 1)));
  });
  const title = clip.of > count ? `${count} of ${clip.of}` : "frames";
  return [lane(title, frames), lane("seconds", moments)];
}

function box([x0, y0, x1, y1], mark) {
  const frame = make("div", "box");
  Object.assign(frame.style, {left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%`});
  frame.style.setProperty("--mark", mark);
  return frame;
}

/** A card: the question, its timeline, and answers to choose among. */
function questionCard(title, question, answers) {
  let chosen = answers.reduce((best, answer, k) => answer.reward > answers[best].reward ? k : best, 0);
  const card = make("div", "card"), place = make("div"), list = make("div");
  const draw = () => {
    place.replaceChildren(timeline(question, answers, chosen));
    [...list.children].forEach((row, k) => row.classList.toggle("chosen", k === chosen && answers.length > 1));
  };
  answers.forEach((answer, k) => {
    const row = answerRow(answer);
    if (question.boxes || question.spans || answer.spans) {
      row.classList.add("pick");
      row.addEventListener("click", () => { chosen = k; draw(); });
    }
    list.append(row);
  });
  card.append(make("p", "quiet", title), make("p", "question", question.question));
  if (question.options) card.append(make("p", "quiet", question.options.map((text, k) => `${String.fromCharCode(65 + k)} ${text}`).join("   ")));
  card.append(make("p", "quiet", question.truth ? `truth: ${question.truth}` : ""), place, list);
  if (question.boxes) card.append(make("p", "quiet", `Boxes: the ${data.asked ? "one that was given" : "truth"} ` +
    "in green, the chosen answer in blue" + (answers.length > 1 ? "; a click chooses another." : ".")));
  draw();
  return card;
}

function answerRow(answer) {
  const numbers = make("div", "numbers", null, make("b", "", answer.title));
  if (answer.reward != null) numbers.append(make("span", "", `reward ${number(answer.reward, 2)}`));
  for (const [name, value] of Object.entries(answer.parts || {})) numbers.append(make("span", "", `${name} ${number(value, 2)}`));
  if (answer.advantage != null) numbers.append(make("span", "", `advantage ${number(answer.advantage, 2)}`));
  if (answer.reason) numbers.append(make("span", answer.reason === "ok" ? "tag" : "tag bad", answer.reason));
  if (answer.note) numbers.append(make("span", "", answer.note));
  return make("div", "answer", null, numbers, make("div", "text", answer.text));
}

function showWatched() {
  const tasks = new Set();
  for (const run of runs) for (const question of run.watched) {
    const card = questionCard(`${several ? run.name + " · " : ""}${question.task} · ${question.id}`, question, question.answers);
    const list = card.querySelector(".answer").parentNode, details = make("details", "", null, make("summary", "", "what was said"));
    list.replaceWith(details);
    details.append(list);
    at("watched-list").append(card);
    tasks.add(question.task);
  }
  if (!tasks.size) at("watched-list").append(make("p", "quiet", "No answers to held-out questions are there yet."));
}

// --- groups ---

const PER_PAGE = 3;
let shown = [], first = 0;
const groups = runs.flatMap((run) => run.groups.map((group) => {
  const rewards = group.completions.map((completion) => completion.reward), mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const std = Math.sqrt(rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / rewards.length);
  return {...group, run: run.name, mean, std, completions: group.completions.map((completion, k) => ({...completion, title: `answer ${k + 1}`}))};
}));

function fill(id, values) {
  at(id).append(new Option("all", ""), ...[...new Set(values)].sort().map((value) => new Option(value, value)));
}

function filterGroups() {
  const task = at("task").value, reason = at("reason").value, sort = at("sort").value;
  const limit = (id, otherwise) => at(id).value === "" ? otherwise : Number(at(id).value);
  shown = groups.filter((group) => (!task || group.task === task) && group.mean >= limit("least", -Infinity) &&
    group.mean <= limit("most", Infinity) && group.std >= limit("spread", 0) &&
    (!reason || group.completions.some((completion) => completion.reason === reason)));
  const keys = {step: (g) => g.step, mean: (g) => -g.mean, "-mean": (g) => g.mean, std: (g) => -g.std};
  shown.sort((a, b) => sort === "task" ? a.task.localeCompare(b.task) || a.step - b.step : keys[sort](a) - keys[sort](b) || a.step - b.step);
  first = 0;
  drawGroups();
}

function drawGroups() {
  const last = Math.min(first + PER_PAGE, shown.length);
  at("groups-list").replaceChildren(...shown.slice(first, last).map((group) => questionCard(
    `${several ? group.run + " · " : ""}step ${group.step} · ${group.task} · ${group.id} · mean reward ${number(group.mean, 2)}, spread ${number(group.std, 2)}`,
    group, group.completions)));
  at("count").textContent = shown.length ? `${first + 1} to ${last} of ${shown.length}` : "no group is like this";
  at("place").max = Math.max(shown.length - 1, 0);
  at("place").value = first;
  at("back").disabled = first === 0;
  at("on").disabled = last >= shown.length;
}

function showGroups() {
  const all = runs.reduce((sum, run) => sum + run.all_groups, 0);
  at("groups-about").textContent = `${groups.length} of ${all} groups, spread evenly over the steps. Frames are those that the model saw; ` +
    "bars are seconds of the clip, the truth above the answers.";
  fill("task", groups.map((group) => group.task));
  fill("reason", groups.flatMap((group) => group.completions.map((completion) => completion.reason)));
  at("filters").addEventListener("input", filterGroups);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("back").addEventListener("click", () => { first = Math.max(first - PER_PAGE, 0); drawGroups(); });
  at("on").addEventListener("click", () => { first += PER_PAGE; drawGroups(); });
  at("place").addEventListener("input", () => { first = Number(at("place").value); drawGroups(); });
  filterGroups();
}

// --- selection and reasons ---

function showSelection() {
  let any = false;
  for (const run of runs) for (const [task, part] of Object.entries((run.selected || {}).tasks || {})) {
    any = true;
    const bins = Object.entries(part.bins).filter(([, count]) => count).map(([name, count]) => `${name.replaceAll("_", " ")} ${count}`).join(", ");
    at("selection-list").append(make("div", "card", null, make("h3", "", `${several ? run.name + ": " : ""}${task}: ${part.kept} of ${part.total} kept`),
      make("p", "quiet", bins), make("div", "wide", null, part.histogram ? heat(part) : rightOfK(part.right_of_k))));
  }
  if (!any) at("selection-list").append(make("p", "quiet", "There was no selection (--select_k 0)."));
}

/** Rows of the mean, best on top, columns of the spread; framed: at or above both thresholds at its lower corner. */
function heat({histogram: {mean_edges, std_edges, counts}, min_mean, min_std}) {
  const most = Math.max(...counts.flat(), 1);
  const rows = counts.map((row, m) => make("tr", "", null, make("th", "", number(mean_edges[m], 1)), ...row.map((count, s) => {
    const cell = make("td", mean_edges[m] >= min_mean - 1e-9 && std_edges[s + 1] > min_std ? "kept" : "", count ? String(count) : "");
    if (count) cell.style.background = `rgba(59, 125, 216, ${0.12 + 0.6 * Math.sqrt(count / most)})`;
    return cell;
  }))).reverse();
  const head = make("tr", "", null, make("th", "", "mean \\ std"), ...std_edges.slice(0, -1).map((edge) => make("th", "", number(edge, 2))));
  const note = `Mean and standard deviation of the answers' task score, by the lower edges of the bins; framed: where those with a mean of at least ` +
    `${number(min_mean, 2)} and a deviation of at least ${number(min_std, 2)} can lie.`;
  return make("div", "", null, make("table", "heat", null, head, ...rows), make("p", "quiet", note));
}

function rightOfK(counts) {
  const names = Object.keys(counts || {});
  return make("table", "", null, make("tr", "", null, make("th", "", "right answers"), ...names.map((name) => make("td", "", name))),
    make("tr", "", null, make("th", "", "questions"), ...names.map((name) => make("td", "", String(counts[name])))));
}

function showReasons() {
  for (const run of runs) {
    const total = run.reasons.reduce((sum, row) => sum + row.count, 0);
    for (const row of run.reasons) {
      at("reasons-list").append(make("div", "card", null,
        make("h3", "", `${several ? run.name + ": " : ""}${row.reason}: ${row.count} of ${total}, ${(100 * row.count / total).toFixed(1)} %`),
        make("p", "quiet", `step ${row.step}, ${row.id}`), make("div", "text", row.text)));
    }
  }
}

// --- one question, without a run (tools/ask.py) ---

function showAsked() {
  document.title = at("title").textContent = data.asked.id;
  at("about").textContent = data.asked.about;
  for (const part of document.querySelectorAll("nav, main > *")) part.remove();
  document.querySelector("main").append(questionCard(data.asked.task, data.asked, data.asked.completions));
}

const ofRuns = [showHead, showWorries, showResult, showCurves, showWatched, showGroups, showSelection, showReasons];
for (const show of data.asked ? [showAsked] : ofRuns) show();
document.body.dataset.ready = "yes";  // for the test in a browser

// The page: one state that every picture follows, the slider, the keys, the address, and news of a run that still trains.

const PANELS = [
  DIFFERENCES, ALL_LOSSES, ALL_ENTROPIES, HEADS, LAYERS, HEAD, BANDS, LOSSES, THRESHOLDS, TEMPERATURES,
  ENTROPY_SURFACE, LOGIT_SURFACE, LOGITS, POSITIONS, MORE, TEXT, PRIVATE, FRONTIER,
];
// What a panel with a field of the state lets one choose for it.
const OFFERED = {
  measure: Object.entries(MEASURES).map(([key, { name }]) => [key, name]),
  reading: [["entropy", "entropy"], ["loss", "loss"]],
  cost: Object.entries(COSTS).map(([key, [name]]) => [key, name]),
};
const PLAY_SECONDS = 12, FOLLOW_SECONDS = 2;
const state = { step: 0, run: 0, other: 1, difference: false, layer: null, head: null, measure: "entropy", reading: "entropy", cost: "bytes", metric: "" };
let data = null, allSteps = [], built = [], playing = null, addressing = null;

function lastStep() {
  return Math.max(1, allSteps.at(-1), ...data.runs.flatMap((run) => run.incidents.map(({ step }) => step)));
}

function currentRun() {
  return data.runs[state.run];
}

function setStep(step) {
  const i = indexAt(allSteps, step);
  const next = allSteps[i + 1];
  const closest = next !== undefined && next - step < step - allSteps[i] ? next : allSteps[i];
  if (closest === state.step) return;
  state.step = closest;
  move();
}

function setHead(layer, head) {
  [state.layer, state.head] = [layer, head];
  draw();
}

function el(id) {
  return document.getElementById(id);
}

function buildTime() {
  const slider = html("input", { type: "range", id: "step", min: 0, max: allSteps.length - 1, step: 1, "aria-label": "training step", oninput: (event) => setStep(allSteps[event.target.value]) });
  const play = html("button", { type: "button", id: "play", "aria-label": "play", onclick: togglePlay }, "▶");
  const select = (id, label, onchange) => html("label", {}, html("span", {}, label), html("select", { id: `choose-${id}`, onchange }));
  el("time").replaceChildren(
    play, html("div", { id: "track" }, svg("svg", { id: "spark", "aria-hidden": "true", preserveAspectRatio: "none" }), slider),
    html("output", { id: "now", for: "step" }),
    html("div", { id: "choices" },
      select("run", "run", (event) => { state.run = Number(event.target.value); state.layer = state.head = null; draw(); }),
      select("other", "against", (event) => { state.difference = event.target.value !== ""; if (state.difference) state.other = Number(event.target.value); draw(); }),
      select("layer", "layer", (event) => setHead(event.target.value === "" ? null : Number(event.target.value), event.target.value === "" ? null : state.head)),
      select("head", "head", (event) => setHead(state.layer ?? 0, event.target.value === "" ? null : Number(event.target.value)))),
  );
}

function fillTime() {
  const options = (id, pairs, value) => {
    el(`choose-${id}`).replaceChildren(...pairs.map(([key, text]) => html("option", { value: key }, text)));
    el(`choose-${id}`).value = value ?? "";
  };
  const numbers = (count) => Array.from({ length: count }, (_, i) => [i, i]);
  const run = currentRun(), several = data.runs.length > 1;
  el("step").max = allSteps.length - 1;
  el("time").classList.toggle("still", allSteps.length === 1);
  options("run", data.runs.map(({ name }, i) => [i, name]), state.run);
  const alike = data.runs.map((other, i) => [i, other.name]).filter(([i]) => i !== state.run && data.runs[i].layers === run.layers && data.runs[i].heads === run.heads);
  options("other", [["", "no other"], ...alike], state.difference && difference(run) ? state.other : "");
  options("layer", [["", "all"], ...numbers(run.layers)], state.layer);
  options("head", [["", "all"], ...numbers(run.heads)], state.head);
  for (const id of ["run", "other"]) el(`choose-${id}`).closest("label").hidden = !several;
  spark(run);
}

// The loss behind the slider, with the guard's marks; one place a logged step, as the slider has.
function spark(run) {
  const loss = run.train.cross_entropy.values, [low, high] = extent(loss);
  const place = (step) => (1000 * indexAt(allSteps, step)) / Math.max(1, allSteps.length - 1);
  const height = scale(low, high, 36, 6);
  const path = pathOf({ steps: stepsOf(run), values: loss }, place, height);
  el("spark").setAttribute("viewBox", "0 0 1000 42");
  el("spark").replaceChildren(svg("path", { class: "curve", d: path, "vector-effect": "non-scaling-stroke" }),
    ...run.incidents.map(({ step }) => svg("path", { class: "incident", "vector-effect": "non-scaling-stroke", d: `M${place(step)} 0V42` })));
}

function buildPanels() {
  built = PANELS.map((panel) => {
    const said = html("p", { class: "said", ...(panel.live ? { "aria-live": "polite" } : {}) }), picture = html("div", { class: "picture" });
    const numbers = html("details", { class: "numbers" }, html("summary", {}, "Table"), html("div", {}));
    const section = html("section", { id: panel.id, class: "panel", "aria-label": panel.title },
      html("h2", {}, panel.title), said, choices(panel), picture, html("p", { class: "caption" }, panel.caption), numbers);
    numbers.hidden = Boolean(panel.tabular);
    numbers.addEventListener("toggle", () => fillTable({ panel, numbers }));
    return { panel, said, picture, numbers, section, view: null };
  });
  el("panels").replaceChildren(...built.map(({ section }) => section));
}

// What a panel lets one choose.
function choices(panel) {
  if (panel.select) return html("select", { class: "metric", "aria-label": "metric", onchange: (event) => { state.metric = event.target.value; draw(); } });
  const { field } = panel;
  if (!field) return null;
  return html("div", { class: "choice", role: "radiogroup", "aria-label": `${panel.title}: what is shown` }, ...OFFERED[field].map(([key, name]) => html("label", { "data-key": key },
    html("input", { type: "radio", name: field, value: key, onchange: () => { state[field] = key; draw(); } }), html("span", {}, name))));
}

function fillTable({ panel, numbers }) {
  if (!numbers.open) return;
  const { scrollLeft = 0, scrollTop = 0 } = numbers.querySelector(".scroll") || {};
  redraw(numbers.lastChild, () => numbers.lastChild.replaceChildren(...tableOf(panel.table(currentRun()), panel.title, `${currentRun().name}-${panel.id}`)));
  Object.assign(numbers.querySelector(".scroll"), { scrollLeft, scrollTop });
}

// Which panels there are and which take both columns; the last of an odd number would stand alone.
function layOut(run) {
  for (const { panel, section } of built) {
    section.hidden = !panel.shown(run);
    section.classList.toggle("wide", typeof panel.wide === "function" ? panel.wide(run) : panel.wide === true);
  }
  const narrow = built.filter(({ section }) => !section.hidden && !section.classList.contains("wide"));
  if (narrow.length % 2) narrow.at(-1).section.classList.add("wide");
}

function draw() {
  const run = currentRun();
  if (!ofHeads(run, MEASURES[state.measure].metric)) state.measure = "entropy";
  if (state.layer >= run.layers || state.head >= run.heads) state.layer = state.head = null;
  for (const article of document.querySelectorAll("[data-run]")) article.hidden = Number(article.dataset.run) !== state.run;
  fillTime();
  layOut(run);
  for (const one of built) {
    const { panel, section, picture } = one;
    one.view = section.hidden ? null : redraw(picture, () => panel.draw(picture, run));
    for (const label of section.querySelectorAll("[data-key]")) {
      label.hidden = panel.field === "measure" && !ofHeads(run, MEASURES[label.dataset.key].metric);
      label.firstChild.checked = state[panel.field] === label.dataset.key;
    }
    const metric = section.querySelector(".metric");
    if (metric) {
      metric.replaceChildren(...panel.options(run).map((name) => html("option", { value: name }, name)));
      metric.value = panel.source(run).name;
    }
  }
  move();
}

function move() {
  const run = currentRun();
  el("step").value = indexAt(allSteps, state.step);
  el("step").setAttribute("aria-valuetext", steps(state.step));
  el("now").replaceChildren(html("b", {}, state.step.toLocaleString("en")), ` of ${allSteps.at(-1).toLocaleString("en")}`);
  for (const one of built) {
    if (!one.view) continue;
    one.view.move();
    const words = one.panel.said(run);
    if (one.said.textContent !== words) one.said.textContent = words;
    fillTable(one);
  }
  clearTimeout(addressing); // browsers refuse hundreds of addresses in a few seconds
  addressing = setTimeout(writeAddress, 200);
}

function togglePlay() {
  if (playing) {
    clearInterval(playing);
    playing = null;
  } else {
    let i = indexAt(allSteps, state.step);
    if (i === allSteps.length - 1) i = -1;
    const every = Math.max(50, (1000 * PLAY_SECONDS) / allSteps.length);
    const stride = Math.max(1, Math.round((allSteps.length * every) / (1000 * PLAY_SECONDS)));
    playing = setInterval(() => {
      i = Math.min(i + stride, allSteps.length - 1);
      setStep(allSteps[i]);
      if (i === allSteps.length - 1) togglePlay();
    }, every);
  }
  el("play").textContent = playing ? "❚❚" : "▶";
  el("play").setAttribute("aria-label", playing ? "pause" : "play");
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name, most) => {
    const value = Number.parseInt(asked.get(name) ?? "", 10);
    return value >= 0 && value < most ? value : null;
  };
  state.run = number("run", data.runs.length) ?? 0;
  const run = currentRun();
  state.layer = number("layer", run.layers);
  state.head = state.layer === null ? null : number("head", run.heads);
  const other = number("against", data.runs.length);
  state.difference = other !== null && other !== state.run;
  if (state.difference) state.other = other;
  const step = Number.parseInt(asked.get("step") ?? "", 10);
  state.step = Number.isFinite(step) ? allSteps[indexAt(allSteps, step)] : allSteps.at(-1);
}

function writeAddress() {
  const parts = { step: state.step };
  if (data.runs.length > 1) parts.run = state.run;
  if (state.difference) parts.against = state.other;
  if (state.layer !== null) parts.layer = state.layer;
  if (state.head !== null) parts.head = state.head;
  try {
    history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
  } catch {} // a frame without an address of its own has none to write
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.("input,select,textarea,summary,button,.scroll,.reading")) return;
  const i = indexAt(allSteps, state.step), last = allSteps.length - 1;
  const to = { ArrowLeft: i - 1, ArrowRight: i + 1 }[event.key];
  if (to !== undefined) setStep(allSteps[Math.min(last, Math.max(0, to))]);
  else if (event.key === " ") togglePlay();
  else if (event.key === "Escape") setHead(null, null);
  else return;
  event.preventDefault();
}

function take(fresh) {
  data = fresh;
  Object.assign(colors, data.colors);
  allSteps = [...new Set(data.runs.flatMap((run) => [...stepsOf(run)]))].sort((a, b) => a - b);
}

// Fetches the page again from the server of `watch`, and takes over its words and numbers where they are new.
function follow() {
  let tag = "", shown = el("data").textContent.trim();
  const look = async () => {
    try {
      const answer = await fetch(location.pathname, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag") || "";
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        const block = fresh.getElementById("data").textContent.trim();
        if (block && (data || block !== shown)) await renew(fresh, block === shown ? "" : (shown = block));
      }
      document.documentElement.classList.remove("alone");
    } catch {
      document.documentElement.classList.add("alone"); // the server has ended; what is shown stays
    }
    setTimeout(look, 1000 * FOLLOW_SECONDS);
  };
  setTimeout(look, 1000 * FOLLOW_SECONDS);
}

// An empty block: only the words are new.
async function renew(fresh, block) {
  const open = new Set([...document.querySelectorAll("#abouts details[open] > summary")].map((summary) => summary.textContent));
  for (const id of ["words", "abouts"]) redraw(el(id), () => el(id).replaceChildren(...fresh.getElementById(id).childNodes));
  if (!data) return start(block);
  for (const summary of document.querySelectorAll("#abouts summary")) summary.parentNode.open = open.has(summary.textContent);
  if (block) {
    const atEnd = state.step === allSteps.at(-1);
    take(await readBlock(block));
    if (atEnd) state.step = allSteps.at(-1);
  }
  draw();
}

async function start(block) {
  take(await readBlock(block));
  readAddress();
  buildTime();
  buildPanels();
  draw();
  addEventListener("hashchange", () => { readAddress(); draw(); });
  addEventListener("keydown", onKey);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width === innerWidth) return;
    width = innerWidth;
    draw();
  });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("#abouts details:not([open])")];
    for (const one of closed) one.open = true;
    document.documentElement.classList.add("printing"); // as wide as paper, so that letters have their size there
    draw();
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
    document.documentElement.classList.remove("printing");
    draw();
  });
  document.documentElement.classList.add("ready");
}

if (document.documentElement.dataset.follow === "yes") follow();
const block = el("data").textContent.trim();
if (block) start(block).catch((error) => {
  el("panels").append(html("p", { class: "notice" }, `This browser cannot draw the page (${error.message}); the folder figures beside it has the pictures as files.`));
  throw error;
});

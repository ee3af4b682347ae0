// Curves over steps (or positions) and stacked shares: axes, labels at the ends, a cursor, marks of incidents.

const EDGE = { top: 22, right: 64, bottom: 38, left: 46 };

// A picture of curves in `box`; `move` sets the cursor to a step.
//
// spec: series [{ name, label, steps, values, color, dash, layer, range }], unit, up (what the upright axis is, if not
// its unit), height, floor, log, references [{ value, label }], incidents [{ step, what }], last (end of the axis), of
// ("step" or "position").
function lineChart(box, spec) {
  const frame = axes(box, spec, ySpan(spec));
  const { root, x, y, plot } = frame;
  for (const { value, label } of spec.references || []) {
    plot.append(svg("line", { class: "reference", x1: frame.left, x2: frame.right, y1: y(value), y2: y(value) }));
    plot.append(svg("text", { class: "note", x: besideMarks(frame.left + 4, 6 * label.length, spec, x), y: y(value) - 4 }, label));
  }
  const chosen = spec.series.some((one) => one.layer !== undefined && one.layer === state.layer);
  for (const one of spec.series) {
    const faded = chosen && one.layer !== state.layer;
    if (one.range) plot.append(svg("path", { class: "range", d: rangeOf(one, x, y), style: `fill:${one.color}` }));
    const path = svg("path", {
      class: `curve${faded ? " faded" : ""}${chosen && !faded ? " chosen" : ""}`, d: pathOf(one, x, y),
      style: `stroke:${one.color}`, "stroke-dasharray": one.dash || null,
    });
    plot.append(path);
  }
  plot.append(...[...plot.querySelectorAll(".chosen")]);
  endLabels(frame, spec, y);
  const cursor = svg("g", { class: "cursor" });
  const line = svg("line", { y1: frame.top, y2: frame.bottom });
  const dots = spec.series.map((one) => svg("circle", { r: chosen && one.layer === state.layer ? 4.5 : 3, style: `fill:${one.color}` }));
  cursor.append(line, ...dots);
  if (spec.of !== "position") root.append(cursor);
  watchPointer(frame, spec, (event, at) => {
    const near = nearest(spec.series, at, x, y, frame);
    if (near) hint(event, `${spec.of === "position" ? "position" : "step"} ${Math.round(near.step).toLocaleString("en")}`, `${near.one.name}: ${exact(near.value)}${spec.unit ? ` ${spec.unit}` : ""}`);
  });
  return {
    move() {
      const place = Math.min(Math.max(x(state.step), frame.left), frame.right);
      line.setAttribute("x1", place);
      line.setAttribute("x2", place);
      spec.series.forEach((one, i) => {
        const e = indexAt(one.steps, state.step);
        const value = one.values[e];
        const seen = one.steps[0] <= state.step && Number.isFinite(value);
        dots[i].setAttribute("cx", x(one.steps[e]));
        dots[i].setAttribute("cy", seen ? y(value) : -99);
      });
    },
  };
}

function ySpan(spec) {
  let low = Infinity, high = -Infinity;
  for (const one of spec.series) {
    for (const values of [one.values, ...(one.range || [])].filter((values) => values.some(Number.isFinite))) {
      const [least, most] = extent(values);
      [low, high] = [Math.min(low, least), Math.max(high, most)];
    }
  }
  for (const { value } of spec.references || []) high = Math.max(high, value);
  if (!(low <= high)) [low, high] = [0, 1];
  const log = Boolean(spec.log) && low > 0 && high > 8 * low;
  if (log) return { low: low / 1.15, high: high * 1.15, log };
  const margin = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return { low: spec.floor === undefined ? low - margin : Math.min(spec.floor, low), high: high + margin, log };
}

// The frame of a picture: axes with their names, ticks, marks of incidents.
function axes(box, spec, { low, high, log }) {
  const width = Math.max(260, Math.round(box.clientWidth || 560)), height = spec.height || 250;
  const edge = { ...EDGE, right: spec.right ?? EDGE.right };
  const [left, right, top, bottom] = [edge.left, width - edge.right, edge.top, height - edge.bottom];
  const x = scale(spec.first || 0, spec.logAcross ? spec.last : Math.max(spec.last, 1), left, right, spec.logAcross), y = scale(low, high, bottom, top, log);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title });
  const grid = svg("g", { class: "axes" }), plot = svg("g", {});
  const marks = spec.rows ? Array.from({ length: spec.rows }, (_, i) => i).filter((i) => i % Math.ceil(spec.rows / 14) === 0) : y.ticks(5);
  for (const value of marks) {
    grid.append(svg("line", { x1: left, x2: right, y1: y(value), y2: y(value) }));
    grid.append(svg("text", { x: left - 6, y: y(value) + 3.5, "text-anchor": "end" }, spec.percent ? `${Math.round(100 * value)} %` : tickText(value)));
  }
  const across = spec.steps?.length === 1 ? [] : x.ticks(Math.max(2, Math.floor((right - left) / 90)));
  for (const value of across) {
    const anchor = x(value) > width - 22 ? "end" : "middle";
    grid.append(svg("text", { x: anchor === "end" ? width - 2 : x(value), y: bottom + 16, "text-anchor": anchor }, tickText(value)));
  }
  grid.append(svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }));
  grid.append(svg("text", { x: (left + right) / 2, y: bottom + 31, "text-anchor": "middle" }, spec.steps?.length === 1 ? "" : spec.across || spec.of || "step"));
  grid.append(svg("text", { x: 2, y: top - 10 }, spec.up ?? spec.unit ?? ""));
  for (const { step, what } of spec.incidents || []) {
    const mark = svg("g", { class: "incident" }, svg("line", { x1: x(step), x2: x(step), y1: top, y2: bottom }),
      svg("path", { d: `M${x(step) - 5} ${top - 8}h10l-5 9z` }), svg("title", {}, `${steps(step)}: ${what}`));
    plot.append(mark);
  }
  root.append(grid, plot);
  box.replaceChildren(root);
  return { root, plot, x, y, left, right, top, bottom, width, height };
}

// Where a word at `from` of that width begins so that no mark of an incident runs through it.
function besideMarks(from, width, { incidents = [] }, x) {
  const marks = incidents.map(({ step }) => x(step)).sort((a, b) => a - b);
  for (const mark of marks) if (mark > from - 8 && mark < from + width) from = mark + 8;
  return from;
}

// At most four points a pixel: the first, least, largest and last of what falls on it.
function pathOf({ steps: at, values }, x, y) {
  const parts = [];
  let open = false;
  const put = (i) => {
    if (!Number.isFinite(values[i])) {
      open = false;
      return;
    }
    parts.push(`${open ? "L" : "M"}${x(at[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`);
    open = true;
  };
  let i = 0;
  while (i < values.length) {
    const pixel = Math.floor(x(at[i]));
    let end = i, least = i, most = i;
    while (end + 1 < values.length && Math.floor(x(at[end + 1])) === pixel) {
      end++;
      if (!(values[end] >= values[least])) least = end;
      if (!(values[end] <= values[most])) most = end;
    }
    [...new Set([i, Math.min(least, most), Math.max(least, most), end])].forEach(put);
    i = end + 1;
  }
  if (parts.length === 1) parts.push(`h.01`);
  return parts.join("");
}

function rangeOf({ steps: at, range: [least, most] }, x, y) {
  const points = [...at].map((step, i) => [x(step), y(most[i])]).concat([...at].map((step, i) => [x(step), y(least[i])]).reverse());
  return `M${points.filter(([, py]) => Number.isFinite(py)).map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join("L")}Z`;
}

// Names at the right ends of curves, apart from each other; where there is no room for all, those in between go.
function endLabels(frame, spec, y) {
  const labels = spec.series.map((one) => {
    let last = one.values.length - 1;
    while (last > 0 && !Number.isFinite(one.values[last])) last--;
    return { text: one.label ?? one.name, place: y(one.values[last]), one };
  }).filter(({ place }) => Number.isFinite(place)).sort((a, b) => a.place - b.place);
  const gap = 11, room = Math.floor((frame.bottom - frame.top) / gap);
  const every = Math.ceil(labels.length / room);
  const kept = labels.filter(({ one }, i) => every === 1 || i % every === 0 || (one.layer !== undefined && one.layer === state.layer));
  for (let i = 1; i < kept.length; i++) kept[i].place = Math.max(kept[i].place, kept[i - 1].place + gap);
  let most = frame.bottom + 4;
  for (let i = kept.length - 1; i >= 0; i--) most = (kept[i].place = Math.min(kept[i].place, most)) - gap;
  for (const { text, place, one } of kept) {
    const chosen = one.layer !== undefined && one.layer === state.layer;
    frame.plot.append(svg("text", { class: `end${chosen ? " chosen" : ""}`, x: frame.right + 5, y: place + 3.5, style: `fill:${one.color}` }, text));
  }
}

// Hover shows, a press or drag on steps moves the slider.
function watchPointer(frame, spec, show) {
  const { root } = frame;
  const at = (event) => pointed(event, root, frame.width);
  let down = false;
  root.addEventListener("pointermove", (event) => {
    if (down) setStep(frame.x.invert(at(event)[0]));
    show(event, at(event));
  });
  root.addEventListener("pointerleave", (event) => hint(event));
  if (spec.of === "position") return;
  root.classList.add("times");
  root.addEventListener("pointerdown", (event) => {
    down = true;
    setStep(frame.x.invert(at(event)[0]));
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) root.addEventListener(name, () => (down = false));
}

function nearest(series, [px, py], x, y, frame) {
  if (px < frame.left - 8 || px > frame.right + 8) return null;
  let best = null;
  for (const one of series) {
    let e = indexAt(one.steps, x.invert(px));
    if (e + 1 < one.steps.length && Math.abs(x(one.steps[e + 1]) - px) < Math.abs(x(one.steps[e]) - px)) e++;
    const far = Math.abs(y(one.values[e]) - py);
    if (Number.isFinite(one.values[e]) && (!best || far < best.far)) best = { one, far, step: one.steps[e], value: one.values[e] };
  }
  return best;
}

// Where a word of half that width has room inside a band, of which `edges` tells top and bottom; null if nowhere.
function roomFor(half, frame, edges) {
  let best = null;
  for (let px = frame.left + half + 8; px < frame.right - half - 4; px += 8) {
    let top = 0, bottom = frame.height;
    for (let near = px - half; near <= px + half; near += half / 4) {
      const [above, below] = edges(near);
      [top, bottom] = [Math.max(top, above), Math.min(bottom, below)];
    }
    if (bottom - top > Math.max(14, best ? best[2] : 0)) best = [px, (top + bottom) / 2, bottom - top];
  }
  return best;
}

// Shares that add up, from the bottom quarter to the top one.
function stackChart(box, spec) {
  const frame = axes(box, { ...spec, percent: true, up: "heads", right: 14 }, { low: 0, high: 1, log: false });
  const { x, y, plot, root } = frame;
  const [E, Q] = spec.shares.shape, { values } = spec.shares;
  const below = (e, q) => { let sum = 0; for (let i = 0; i < q; i++) sum += values[e * Q + i] || 0; return sum; };
  for (let q = 0; q < Q; q++) {
    const top = [], base = [];
    for (let e = 0; e < E; e++) {
      const place = x(E > 1 ? spec.steps[e] : e).toFixed(1);
      top.push(`${place} ${y(below(e, q + 1)).toFixed(1)}`);
      base.unshift(`${place} ${y(below(e, q)).toFixed(1)}`);
    }
    if (E === 1) { top.push(`${frame.right} ${y(below(0, q + 1))}`); base.unshift(`${frame.right} ${y(below(0, q))}`); }
    plot.prepend(svg("path", { class: "share", d: `M${top.join("L")}L${base.join("L")}Z`, style: `fill:${heatColor([0, 0.36, 0.7, 1][q])}` }));
    const place = roomFor(spec.names[q].length * 3.6, frame, (px) => {
      const e = indexAt(spec.steps, x.invert(px));
      return [y(below(e, q + 1)), y(below(e, q))];
    });
    if (place) plot.append(svg("text", { class: "inside", x: place[0], y: place[1] + 3.5, style: `fill:${inkOn(heatColor([0, 0.36, 0.7, 1][q]))}` }, spec.names[q]));
  }
  const line = svg("line", { y1: frame.top, y2: frame.bottom });
  if (E > 1) root.append(svg("g", { class: "cursor over" }, line));
  watchPointer(frame, spec, (event, [px]) => {
    const e = indexAt(spec.steps, x.invert(px));
    hint(event, steps(spec.steps[e]), ...spec.names.map((name, q) => `${name}: ${exact(100 * values[e * Q + q], 3)} %`).reverse());
  });
  return {
    move() {
      const place = Math.min(Math.max(x(state.step), frame.left), frame.right);
      line.setAttribute("x1", place);
      line.setAttribute("x2", place);
    },
  };
}

// Pictures of layers by heads, of layers by steps, and of one number of every head against another.

function rowHeight(rows, cell) {
  return Math.max(14, Math.min(44, cell, 420 / rows));
}

// What a picture beside the heads has room for.
function gridHeight(box, run) {
  return Math.round(run.layers * rowHeight(run.layers, ((box.clientWidth || 560) - 38) / run.heads)) + 100;
}

// Heads as cells, layer 0 at the top. spec: { title, rows, columns, value(l, n), color(value), unit, mark(l, n), scale }.
function heatGrid(box, spec) {
  const { rows, columns } = spec;
  const width = Math.max(280, Math.round(box.clientWidth || 560));
  const left = 34, top = 4, cell = Math.min(132, (width - left - 4) / columns), tall = rowHeight(rows, cell);
  const height = top + rows * tall + 34;
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, class: "heads", tabindex: 0, role: "application",
    "aria-label": `${spec.title}: arrow keys move from head to head, Escape ends the choice`,
  });
  const cells = [];
  for (let l = 0; l < rows; l++) {
    if (l % Math.ceil(rows / 18) === 0) root.append(svg("text", { class: "tick", x: left - 7, y: top + (l + 0.5) * tall + 4, "text-anchor": "end" }, l));
    for (let n = 0; n < columns; n++) {
      const [x, y] = [left + n * cell, top + l * tall];
      const shape = svg("rect", { x: x + 0.5, y: y + 0.5, width: cell - 1, height: tall - 1, rx: Math.min(3, cell / 8) });
      const text = svg("text", { x: x + cell / 2, y: y + tall / 2 + 3.5, "text-anchor": "middle" });
      root.append(svg("g", { class: "cell", "data-layer": l, "data-head": n }, shape, text));
      cells.push({ l, n, shape, text });
    }
  }
  for (let n = 0; n < columns; n += Math.ceil(columns / 18)) {
    root.append(svg("text", { class: "tick", x: left + (n + 0.5) * cell, y: top + rows * tall + 15, "text-anchor": "middle" }, n));
  }
  root.append(svg("text", { class: "tick", x: left + (columns * cell) / 2, y: height - 5, "text-anchor": "middle" }, "head"));
  root.append(svg("text", { class: "tick", x: 9, y: top + (rows * tall) / 2, transform: `rotate(-90 9 ${top + (rows * tall) / 2})`, "text-anchor": "middle" }, "layer"));
  const band = svg("rect", { class: "row", x: left - 1.5, width: columns * cell + 3, height: tall + 2, rx: 4 });
  const ring = svg("rect", { class: "ring", width: cell, height: tall, rx: 4 });
  root.append(band, ring);
  box.replaceChildren(root, legend(spec.scale));

  const choose = (event) => {
    const found = event.target.closest?.(".cell");
    return found && [Number(found.dataset.layer), Number(found.dataset.head)];
  };
  root.addEventListener("click", (event) => {
    const at = choose(event);
    if (at) setHead(...(state.layer === at[0] && state.head === at[1] ? [null, null] : at));
  });
  root.addEventListener("pointermove", (event) => {
    const at = choose(event);
    if (at) hint(event, `layer ${at[0]}, head ${at[1]}`, `${exact(spec.value(...at))} ${spec.unit}`);
    else hint(event);
  });
  root.addEventListener("pointerleave", (event) => hint(event));
  root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const within = (value, most) => Math.min(Math.max(value, 0), most - 1);
    if (state.head === null) setHead(state.layer ?? 0, 0);
    else setHead(within(state.layer + move[0], rows), within(state.head + move[1], columns));
  });
  const decimals = cell >= 36 && tall >= 16 ? 2 : cell >= 22 ? 1 : null;
  return {
    move() {
      for (const { l, n, shape, text } of cells) {
        const value = spec.value(l, n);
        const known = Number.isFinite(value);
        const color = known ? spec.color(value) : "none";
        shape.style.fill = color;
        shape.classList.toggle("unknown", !known);
        if (decimals === null || rows * columns > 300) continue;
        const digits = Math.abs(value) >= 100 ? 0 : Math.min(decimals, Math.abs(value) >= 10 ? 1 : 2);
        text.textContent = known ? `${spec.signed && value > 0 ? "+" : ""}${value.toFixed(digits)}` : "NaN";
        text.style.fill = known ? inkOn(color) : "var(--ink)";
      }
      band.style.display = state.layer === null ? "none" : "";
      ring.style.display = state.head === null ? "none" : "";
      band.setAttribute("y", top + (state.layer ?? 0) * tall - 1);
      ring.setAttribute("x", left + (state.head ?? 0) * cell);
      ring.setAttribute("y", top + (state.layer ?? 0) * tall);
    },
  };
}

// The colours and their numbers, for all pictures of cells.
function legend({ low, high, color, unit, log = false, notes = [] }) {
  const between = (share) => (log ? low * (high / low) ** share : low + (high - low) * share);
  const stops = Array.from({ length: 25 }, (_, i) => color(between(i / 24)));
  return html("div", { class: "legend" },
    html("span", {}, exact(low, 3)),
    html("i", { style: `background:linear-gradient(90deg,${stops.join(",")})`, "aria-hidden": "true" }),
    html("span", {}, `${exact(high, 3)} ${unit}`),
    ...notes.map((note) => html("span", { class: "soft" }, note)));
}

// Layers by steps as one image. spec: { title, steps, values {shape [E, L], values}, share(value), unit, scale }.
function surface(box, spec) {
  const [E, L] = spec.values.shape;
  const frame = axes(box, { ...spec, height: Math.max(140, Math.min(284, 30 * L + 60)), right: 10, rows: L, up: "layer" }, { low: L - 0.5, high: -0.5, log: false });
  const { x, plot, root } = frame;
  const columns = Math.min(frame.right - frame.left, 2 * E);
  const canvas = html("canvas", { width: columns, height: L });
  const context = canvas.getContext("2d");
  for (let i = 0; i < columns; i++) {
    const e = indexAt(spec.steps, x.invert(frame.left + ((i + 0.5) / columns) * (frame.right - frame.left)));
    for (let l = 0; l < L; l++) {
      const value = spec.values.values[e * L + l];
      context.fillStyle = Number.isFinite(value) ? heatColor(spec.share(value)) : "#999";
      context.fillRect(i, l, 1, 1);
    }
  }
  const tall = (frame.bottom - frame.top) / L;
  plot.prepend(svg("image", {
    href: canvas.toDataURL(), x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top,
    preserveAspectRatio: "none", style: "image-rendering:pixelated",
  }));
  const band = svg("rect", { class: "row", x: frame.left, width: frame.right - frame.left, height: tall });
  const line = svg("line", { y1: frame.top, y2: frame.bottom });
  root.append(band, svg("g", { class: "cursor over" }, line));
  const lost = spec.values.values.some((value) => !Number.isFinite(value));
  box.append(legend(lost ? { ...spec.scale, notes: ["grey: not a number"] } : spec.scale));
  watchPointer(frame, spec, (event, [px, py]) => {
    const layer = Math.min(L - 1, Math.max(0, Math.floor((py - frame.top) / tall)));
    const e = indexAt(spec.steps, x.invert(px));
    hint(event, `${steps(spec.steps[e])}, layer ${layer}`, `${exact(spec.values.values[e * L + layer])} ${spec.unit}`);
  });
  return {
    move() {
      const place = Math.min(Math.max(x(state.step), frame.left), frame.right);
      line.setAttribute("x1", place);
      line.setAttribute("x2", place);
      band.style.display = state.layer === null ? "none" : "";
      band.setAttribute("y", frame.top + (state.layer ?? 0) * tall);
    },
  };
}

// Every head as a point with its layer's number. spec: { title, count, layers, layer(i), head(i), x(i), y(i), most,
// tolerance, across and up (what the axes are), lines(i) (the hint), choose(i) }.
function scatter(box, spec) {
  const frame = axes(box, { ...spec, last: spec.most, right: 12, height: 320 }, { low: 0, high: spec.most, log: false });
  const { x, y, plot, root } = frame;
  const band = [[0, spec.tolerance], [spec.most, spec.most + spec.tolerance], [spec.most, spec.most - spec.tolerance], [0, -spec.tolerance]];
  const id = "inside";
  root.append(svg("clipPath", { id }, svg("rect", { x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top })));
  plot.setAttribute("clip-path", `url(#${id})`);
  plot.append(svg("path", { class: "tolerance", d: `M${band.map(([a, b]) => `${x(a)} ${y(b)}`).join("L")}Z` }));
  plot.append(svg("line", { class: "reference", x1: x(0), y1: y(0), x2: x(spec.most), y2: y(spec.most) }));
  const small = spec.count > 200;
  const points = Array.from({ length: spec.count }, (_, i) => {
    const color = layerColor(spec.layer(i), spec.layers);
    const group = svg("g", { class: "point", "data-point": i }, svg("circle", { r: small ? 3 : 7, style: `fill:${color}` }),
      small ? null : svg("text", { y: 3.2, "text-anchor": "middle" }, spec.layer(i)));
    plot.append(group);
    return group;
  });
  root.addEventListener("pointermove", (event) => {
    const found = event.target.closest?.(".point");
    if (!found) return hint(event);
    hint(event, ...spec.lines(Number(found.dataset.point)));
  });
  root.addEventListener("pointerleave", (event) => hint(event));
  root.addEventListener("click", (event) => {
    const found = event.target.closest?.(".point");
    if (found) spec.choose(Number(found.dataset.point));
  });
  return {
    move() {
      points.forEach((point, i) => {
        const [px, py] = [x(spec.x(i)), y(spec.y(i))];
        const known = Number.isFinite(px + py);
        point.style.display = known ? "" : "none";
        if (known) point.setAttribute("transform", `translate(${px.toFixed(1)} ${py.toFixed(1)})`);
        point.classList.toggle("chosen", spec.layer(i) === state.layer);
        point.classList.toggle("faded", state.layer !== null && spec.layer(i) !== state.layer);
        point.classList.toggle("head", spec.layer(i) === state.layer && spec.head(i) === state.head);
      });
    },
  };
}

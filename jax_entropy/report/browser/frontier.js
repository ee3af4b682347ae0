// The frontier of a sweep: perplexity against what private execution sends, how often it waits, and how long it takes.

const COSTS = { bytes: ["MB sent", 1e6], rounds: ["rounds", 1], seconds: ["seconds", 1] };

const FRONTIER = {
  id: "frontier", title: "Perplexity and the cost of private execution", wide: true, field: "cost",
  caption: "Rows of the sweep by number; the line joins those that no other beats in both. Bars are one standard deviation over seeds. Costs are predicted for one forward pass.",
  shown: () => Boolean(data.sweep?.points.length),
  points() {
    const [, unit] = COSTS[state.cost];
    const points = data.sweep.points.map((point, i) => ({ ...point, number: i + 1, x: point[state.cost] / unit }));
    const sorted = [...points].sort((a, b) => a.x - b.x || a.perplexity - b.perplexity);
    let best = Infinity;
    for (const point of sorted) if ((point.front = point.perplexity < best)) best = point.perplexity;
    return points;
  },
  draw(box) {
    const points = this.points(), [label] = COSTS[state.cost];
    const [least, most] = extent(points.map(({ x }) => x));
    const ends = points.flatMap(({ perplexity, spread }) => [Math.max(perplexity - (spread || 0), 0.3 * perplexity), perplexity + (spread || 0)]);
    const [low, high] = extent(ends), log = high > 3 * low, margin = 0.08 * (high - low) || 1;
    const span = log ? { low: low / 1.15, high: high * 1.15, log } : { low: low - margin, high: high + margin, log };
    const inner = html("div", {});
    box.replaceChildren(inner);
    const frame = axes(inner, { title: this.title, height: 340, across: label, up: "perplexity", first: least / 1.25, last: most * 1.25, logAcross: true, right: 20 }, span);
    const { x, y, plot, root } = frame;
    const front = points.filter((point) => point.front).sort((a, b) => a.x - b.x);
    plot.append(svg("path", { class: "curve", style: `stroke:${RUN_COLORS[1]}`, d: `M${front.map((point) => `${x(point.x)} ${y(point.perplexity)}`).join("L")}` }));
    for (const point of points) {
      const [px, py] = [x(point.x), y(point.perplexity)], color = RUN_COLORS[point.front ? 1 : 0];
      const bar = point.spread ? svg("path", { class: "curve", style: `stroke:${color}`, d: `M${px} ${y(Math.max(point.perplexity - point.spread, span.low))}V${y(point.perplexity + point.spread)}` }) : null;
      const mark = svg("g", { class: "point", transform: `translate(${px} ${py})` }, svg("circle", { r: 8.5, style: `fill:${color}` }), svg("text", { y: 3.2, "text-anchor": "middle" }, point.number));
      mark.addEventListener("pointermove", (event) => hint(event, point.label, `perplexity ${exact(point.perplexity)}${point.spread ? ` ± ${exact(point.spread, 2)}` : ""}`, `${exact(point.x, 4)} ${label}`));
      plot.append(...[bar, mark].filter(Boolean));
    }
    root.addEventListener("pointerleave", (event) => hint(event));
    box.append(html("ol", { class: "rows" }, ...points.map((point) => html("li", { class: point.front ? "front" : null }, point.label))));
    return { move() {} };
  },
  said: () => `${data.sweep.name}, ${data.sweep.protocol}`,
  table() {
    const rows = this.points().map(({ label, perplexity, spread, bytes, rounds, seconds, front }) => [label, perplexity, spread ?? "one seed", bytes, rounds, seconds, front ? "yes" : "no"]);
    return { head: ["row", "perplexity", "±", "bytes", "rounds", "seconds", "on the front"], rows };
  },
};

// Several runs beside each other: what differs, their losses and entropies over each other, and the spread over seeds.

const DIFFERENCES = {
  id: "differences", title: "What differs", wide: true, tabular: true,
  caption: "Fields of the configurations that are not the same everywhere, then how the runs ended.",
  shown: () => data.runs.length > 1,
  draw(box) {
    const { head, rows } = this.table();
    const table = html("table", { class: "differences" },
      html("thead", {}, html("tr", {}, ...head.map((text, i) => html("th", { scope: "col", class: i - 1 === state.run ? "chosen" : null }, ...breakable(text))))),
      html("tbody", {}, ...rows.map(([name, ...values], i) => html("tr", { class: data.differences[i].measured ? "measured" : null },
        html("th", { scope: "row" }, ...breakable(name)), ...values.map((value, j) => html("td", { class: j === state.run ? "chosen" : null }, ...breakable(value)))))));
    box.replaceChildren(html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "what differs" }, table));
    return { move() {} };
  },
  said: () => `${data.runs.length} runs`,
  table: () => ({ head: ["", ...data.runs.map(({ name }) => name)], rows: data.differences.map(({ name, values }) => [name, ...values]) }),
};

function sameTokens() {
  return data.runs.every((run) => run.tokenizer === data.runs[0].tokenizer);
}

// What all runs can be compared by: { kind, metric, unit }.
function comparable() {
  const all = (metric) => data.runs.every((run) => run.evaluate[metric]);
  if (!sameTokens() && all("bits_per_byte")) return { kind: "evaluate", metric: "bits_per_byte", unit: "bits/byte" };
  if (all("validation_loss")) return { kind: "evaluate", metric: "validation_loss", unit: "nats/token" };
  return { kind: "train", metric: "cross_entropy", unit: "nats/token" };
}

// One curve a group of seeds, the mean of its runs, with the range of them behind it; one a run where there is one seed.
// `spread(e)` is their standard deviation there, 0 of one.
function groupCurves(values) {
  return data.groups.map((members, i) => {
    const curves = members.map((index) => values(data.runs[index]));
    const [first] = curves;
    const length = Math.min(...curves.map((one) => one.values.length));
    const across = (reduce) => Float32Array.from({ length }, (_, e) => reduce(curves.map((one) => one.values[e])));
    const mean = across((numbers) => numbers.reduce((sum, value) => sum + value, 0) / numbers.length);
    const run = data.runs[members[0]];
    const alone = members.length === 1;
    const twin = data.runs.some((other, index) => !members.includes(index) && other.architecture === run.architecture);
    const name = alone && twin ? run.name : run.architecture;
    return {
      ...curve(alone ? name : `${name}, mean of ${members.length} runs`, first.steps.slice(0, length), mean, i),
      label: `${i + 1}`,
      range: alone ? null : [across((numbers) => Math.min(...numbers)), across((numbers) => Math.max(...numbers))],
      spread: (e) => (alone ? 0 : deviation(curves.map((one) => one.values[e]))),
    };
  });
}

function deviation(numbers) {
  const mean = numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
  return Math.sqrt(numbers.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (numbers.length - 1));
}

function swatch({ color, dash }) {
  return svg("svg", { class: "swatch", viewBox: "0 0 26 8", "aria-hidden": "true" }, svg("path", { class: "curve", d: "M1 4H25", style: `stroke:${color}`, "stroke-dasharray": dash || null }));
}

function overlay(id, title, caption, source) {
  return {
    id, title, caption, shown: () => data.runs.length > 1,
    series: () => groupCurves(source().values),
    // Curves carry numbers; the list below has their names, and what they are at the slider.
    draw(box) {
      const series = this.series(), inner = html("div", {}), now = series.map(() => html("b", {}));
      box.replaceChildren(inner, html("ol", { class: "rows" }, ...series.map((one, i) => html("li", {}, swatch(one), one.name, " ", now[i]))));
      const chart = lineChart(inner, { title, series, last: lastStep(), unit: source().unit, right: 28, height: 300, incidents: data.runs.flatMap((run) => run.incidents) });
      return {
        move() {
          chart.move();
          series.forEach(({ steps: at, values, spread }, i) => {
            const e = indexAt(at, state.step), apart = spread(e);
            now[i].textContent = at[0] > state.step ? "not yet" : `${exact(values[e], 4)}${apart ? ` ± ${exact(apart, 2)}` : ""}`;
          });
        },
      };
    },
    said: () => `${source().unit} at ${steps(state.step)}${data.groups.length < data.runs.length ? ", ± a standard deviation over seeds" : ""}`,
    table() {
      const rows = this.series().map(({ name, values, range, spread }) => [name, values.at(-1), range ? spread(values.length - 1) : "one seed"]);
      return { head: ["run", `at the end [${source().unit}]`, "± over seeds"], rows };
    },
  };
}

const ALL_LOSSES = overlay(
  "all-losses", "Losses of all runs", "Runs that differ in their seed only are drawn as their mean, with the range of them behind it. Where tokenizers differ, nats per token do not compare, and bits per byte are drawn.",
  () => {
    const { kind, metric, unit } = comparable();
    return { unit, values: (run) => ({ steps: stepsOf(run, kind), values: run[kind][metric].values }) };
  },
);
const ALL_ENTROPIES = overlay(
  "all-entropies", "Entropy of all runs", "Mean of all heads of a run, in training batches.",
  () => ({
    unit: "nats",
    values: (run) => {
      const array = run.train.head_entropy, count = run.layers * run.heads;
      return { steps: stepsOf(run), values: Float32Array.from({ length: array.shape[0] }, (_, e) => row(array, e).reduce((sum, value) => sum + value, 0) / count) };
    },
  }),
);

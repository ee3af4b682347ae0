// Several runs beside each other: what differs, their losses and entropies over each other, and the spread over seeds.

const DIFFERENCES = {
  id: "differences", title: "What differs", wide: true, tabular: true,
  caption: "Fields of the configurations that are not the same everywhere, then how the runs ended.",
  shown: () => data.runs.length > 1,
  draw(box) {
    const { head, rows } = this.table();
    const table = html("table", { class: "differences" },
      html("thead", {}, html("tr", {}, ...head.map((text, i) => html("th", { scope: "col", class: i - 1 === state.run ? "chosen" : null }, text)))),
      html("tbody", {}, ...rows.map(([name, ...values], i) => html("tr", { class: data.differences[i].measured ? "measured" : null },
        html("th", { scope: "row" }, name), ...values.map((value, j) => html("td", { class: j === state.run ? "chosen" : null, title: value }, value))))));
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
      label: alone ? name : `${name} ×${members.length}`, members,
      range: alone ? null : [across((numbers) => Math.min(...numbers)), across((numbers) => Math.max(...numbers))],
      spread: alone ? 0 : deviation(curves.map((one) => one.values[length - 1])),
    };
  });
}

function deviation(numbers) {
  const mean = numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
  return Math.sqrt(numbers.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (numbers.length - 1));
}

function overlay(id, title, caption, source) {
  return {
    id, title, caption, shown: () => data.runs.length > 1,
    series: () => groupCurves(source().values),
    draw(box) {
      const right = Math.min(190, Math.max(70, Math.round(0.24 * box.clientWidth)));
      const series = this.series();
      const most = Math.floor((right - 10) / 7);
      for (const one of series) if (one.label.length > most) one.label = `${one.label.slice(0, most - 1)}…`;
      return lineChart(box, { title, series, last: lastStep(), unit: source().unit, right, height: 280, incidents: data.runs.flatMap((run) => run.incidents) });
    },
    said() {
      const ends = this.series().map(({ name, values, spread }) => `${name}: ${exact(values.at(-1), 4)}${spread ? ` ± ${exact(spread, 2)}` : ""}`);
      return `${source().unit} at the end · ${ends.slice(0, 4).join(" · ")}${ends.length > 4 ? " · …" : ""}`;
    },
    table() {
      return { head: ["run", `at the end [${source().unit}]`, "± over seeds"], rows: this.series().map(({ name, values, spread, members }) => [name, values.at(-1), members.length > 1 ? spread : "one seed"]) };
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

// Held-out text with each token's entropy or loss as its background, and what a private forward pass costs.

// Of which evaluation a text is, where there were several.
function readAt(run) {
  return stepsOf(run).length > 1 ? `, at ${steps(run.text.step[indexAt(run.text.step, state.step)])}` : "";
}

const TEXT = {
  id: "text", title: "Text, token by token", wide: true, field: "reading",
  caption: "The background is what the chosen head (or the mean of those chosen) had at a token, or the loss of predicting it: light is much.",
  shown: (run) => Boolean(run.text),
  // The numbers of piece r at evaluation k, one a token; not a number where a token has none.
  numbers(run, r, k) {
    const { loss, entropy, pieces } = run.text;
    const [, L, N, R, T] = entropy.shape;
    const length = pieces[r].length;
    if (state.reading === "loss") return Float32Array.from({ length }, (_, i) => (i ? loss.values[(k * R + r) * T + i - 1] : NaN));
    const layers = state.layer === null ? [...Array(L).keys()] : [state.layer];
    const heads = state.head === null ? [...Array(N).keys()] : [state.head];
    return Float32Array.from({ length }, (_, i) => {
      if (i >= T) return NaN;
      let sum = 0;
      for (const l of layers) for (const n of heads) sum += entropy.values[(((k * L + l) * N + n) * R + r) * T + i];
      return sum / (layers.length * heads.length);
    });
  },
  draw(box, run) {
    const { pieces, step } = run.text;
    const all = [...step.keys()].flatMap((k) => pieces.flatMap((_, r) => [...this.numbers(run, r, k)]));
    const [least, most] = extent(all);
    const color = (value) => heatColor((value - least) / (most - least || 1));
    const tokens = pieces.map((piece, r) => piece.map((text, i) => {
      const shown = text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
      return html("span", { class: "token", "data-at": `${r}/${i}` }, shown);
    }));
    const texts = tokens.map((spans) => html("p", { class: "reading", tabindex: 0 }, ...spans));
    box.replaceChildren(html("div", { class: "readings" }, ...texts), legend({ low: least, high: most, color, unit: state.reading === "loss" ? "nats (loss)" : "nats (entropy)" }));
    let numbers = [];
    box.onpointermove = (event) => {
      const at = event.target.dataset?.at;
      if (!at) return hint(event);
      const [r, i] = at.split("/").map(Number);
      hint(event, JSON.stringify(pieces[r][i]), `position ${i}`, `${state.reading} ${exact(numbers[r][i])} nats`);
    };
    box.onpointerleave = (event) => hint(event);
    let drawn = null;
    return {
      move: () => {
        const k = indexAt(step, state.step);
        if (k === drawn) return;
        drawn = k;
        numbers = pieces.map((_, r) => this.numbers(run, r, k));
        tokens.forEach((spans, r) => spans.forEach((span, i) => {
          const known = Number.isFinite(numbers[r][i]);
          span.style.background = known ? color(numbers[r][i]) : "none";
          span.style.color = known ? inkOn(color(numbers[r][i])) : "inherit";
        }));
      },
    };
  },
  said(run) {
    const of = state.layer === null ? "mean of all heads" : state.head === null ? `mean of layer ${state.layer}` : `layer ${state.layer}, head ${state.head}`;
    return state.reading === "loss" ? `loss of each token${readAt(run)}` : `entropy at each token, ${of}${readAt(run)}`;
  },
  table(run) {
    const rows = run.text.pieces.flatMap((piece, r) => {
      const numbers = this.numbers(run, r, indexAt(run.text.step, state.step));
      return piece.map((text, i) => [`${r + 1}.${i}`, JSON.stringify(text), numbers[i]]);
    });
    return { head: ["piece.position", "token", `${state.reading} [nats]`], rows };
  },
};

const POSITIONS = {
  id: "positions", title: "Entropy by position",
  caption: "The further a query stands, the more it can spread over: the dashed curve is the most that it could. Means over the text below of a layer's heads, and of the head that is chosen.",
  shown: (run) => Boolean(run.text),
  // Means over the pieces, and over the heads of a layer where none is given, of evaluation k.
  mean(run, k, l, n = null) {
    const { values, shape: [, L, N, R, T] } = run.text.entropy;
    const heads = n === null ? [...Array(N).keys()] : [n];
    return Float32Array.from({ length: T }, (_, i) => {
      let sum = 0;
      for (const head of heads) for (let r = 0; r < R; r++) sum += values[(((k * L + l) * N + head) * R + r) * T + i];
      return sum / (heads.length * R);
    });
  },
  series(run, k) {
    const [, L, , , T] = run.text.entropy.shape, positions = Float32Array.from({ length: T }, (_, i) => i);
    const most = run.text.most.map(({ layers, values }) => ({
      ...curve(layers.length === L ? "the most" : `the most of ${layers.length > 1 ? "layers" : "layer"} ${layers.join(", ")}`, positions, values.values, 5), label: "", dash: "2 3",
    }));
    const layers = Array.from({ length: L }, (_, l) => ({
      name: `layer ${l}`, label: `${l}`, layer: l, steps: positions, values: this.mean(run, k, l), color: layerColor(l, L), dash: DASHES[l % DASHES.length],
    }));
    if (state.head === null) return [...most, ...layers];
    return [...most, ...layers, { ...curve(`layer ${state.layer}, head ${state.head}`, positions, this.mean(run, k, state.layer, state.head)), label: "", layer: state.layer, dash: "" }];
  },
  draw(box, run) {
    let drawn = null;
    return {
      move: () => {
        const k = indexAt(run.text.step, state.step);
        if (k === drawn) return;
        drawn = k;
        const series = this.series(run, k);
        lineChart(box, { title: this.title, of: "position", series, unit: "nats", floor: 0, last: series[0].steps.length - 1, right: 24, height: 320 });
      },
    };
  },
  said: (run) => `${run.text.pieces.length === 1 ? "one piece" : `mean of ${run.text.pieces.length} pieces`} of text, ${run.text.entropy.shape[4]} tokens long${readAt(run)}`,
  table(run) {
    const series = this.series(run, indexAt(run.text.step, state.step));
    return { head: ["position", ...series.map(({ name }) => name)], rows: [...series[0].steps].map((i) => [i, ...series.map(({ values }) => values[i])]) };
  },
};

const PRIVATE = {
  id: "private", title: "What private execution costs", wide: true,
  caption: "A forward pass under secure computation, by kind of operation: what the busiest party sends, how often messages wait for others, and the time of both on a network.",
  shown: (run) => Boolean(run.private),
  measures: (run) => [["bytes", 1e6, "MB"], ["rounds", 1, "rounds"], ["seconds", 1, `seconds (${run.private.network})`]],
  draw(box, run) {
    const { costs } = run.private;
    const columns = this.measures(run).map(([name, unit, label]) => {
      const most = Math.max(...costs.map((cost) => cost[name])) || 1;
      const sum = costs.reduce((total, cost) => total + cost[name], 0);
      const bars = costs.map((cost) => html("div", { class: "bar" },
        html("span", {}, cost.kind), html("i", { style: `width:${(100 * cost[name]) / most}%;background:${heatColor(cost.group / 5)}` }),
        html("b", {}, exact(cost[name] / unit, 3)), html("em", {}, `${exact((100 * cost[name]) / (sum || 1), 2)} %`)));
      return html("div", { class: "third" }, html("h3", {}, `${label}: ${exact(sum / unit, 4)}`), ...bars);
    });
    box.classList.add("thirds");
    box.replaceChildren(...columns);
    return { move() {} };
  },
  said: (run) => run.private.terms,
  table: (run) => ({ head: ["kind", "bytes", "rounds", "seconds"], rows: run.private.costs.map(({ kind, bytes, rounds, seconds }) => [kind, bytes, rounds, seconds]) }),
};

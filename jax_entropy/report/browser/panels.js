// What is shown of a run, panel by panel. Each says when it has something to show, draws it, and gives it as a table.
//
// { id, title, caption, wide, live, shown(run), draw(box, run) -> view, said(run), table(run) }; a view's `move` follows the slider.
// `live`: what it says is read out as it changes, for who cannot see what the keys have chosen.

const QUARTERS = ["bottom quarter (collapse)", "second quarter", "third quarter", "top quarter (overload)"];
const MEASURES = {
  entropy: { name: "entropy", metric: "head_entropy", unit: "nats" },
  threshold: { name: "threshold θ", metric: "threshold", unit: "of log T" },
  logit: { name: "largest logit", metric: "head_max_logit", unit: "" },
  sink: { name: "weight on the first token", metric: "head_sink", unit: "" },
};

function stepsOf(run, kind = "train") {
  return run[kind].step.values;
}

function now(run, kind = "train") {
  return indexAt(stepsOf(run, kind), state.step);
}

function valueNow(run, metric, layer, head) {
  const array = run.train[metric];
  return array ? array.values[(now(run) * run.layers + layer) * run.heads + head] : NaN;
}

// Whether a run has logged a number of every head.
function ofHeads(run, metric) {
  return run.train[metric]?.shape.length === 3;
}

// Of a single step there is nothing to draw over steps.
function moves(run, metric) {
  return Boolean(run.train[metric]) && stepsOf(run).length > 1;
}

function overSteps(run, more) {
  return { steps: stepsOf(run), last: lastStep(), incidents: run.incidents, ...more };
}

// One curve a layer of a metric [E, L].
function layerCurves(run, metric) {
  return Array.from({ length: run.layers }, (_, layer) => ({
    name: `layer ${layer}`, label: `${layer}`, layer, steps: stepsOf(run), values: column(run.train[metric], layer),
    color: layerColor(layer, run.layers), dash: DASHES[layer % DASHES.length],
  }));
}

function curve(name, at, values, i = 0, more = {}) {
  return { name, steps: at, values, color: RUN_COLORS[i % RUN_COLORS.length], dash: DASHES[i % DASHES.length], ...more };
}

// About `count` of the logged steps, with the slider's.
function someSteps(run, kind = "train", count = 16) {
  const at = stepsOf(run, kind);
  const chosen = new Set([now(run, kind), at.length - 1]);
  for (let i = 0; i < count; i++) chosen.add(Math.floor((i * at.length) / count));
  return [...chosen].sort((a, b) => a - b);
}

function layerTable(run, metric) {
  return {
    head: ["step", ...Array.from({ length: run.layers }, (_, layer) => `layer ${layer}`)],
    rows: someSteps(run).map((e) => [stepsOf(run)[e], ...row(run.train[metric], e)]),
  };
}

function saidOfLayers(run, metric, unit) {
  const values = row(run.train[metric], now(run));
  return state.layer === null ? saidRange(values, unit, "layers") : `layer ${state.layer}: ${exact(values[state.layer], 5)} ${unit}`.trim();
}

// From the least to the largest of several numbers, and how many of them are none.
function saidRange(values, unit, of) {
  return saidOfKnown(values, of, (known) => `${exact(Math.min(...known), 4)} to ${exact(Math.max(...known), 4)} ${unit}`.trim());
}

// What `say` says of those values that are numbers, and how many are none.
function saidOfKnown(values, of, say) {
  const known = values.filter(Number.isFinite), lost = values.length - known.length;
  return [known.length ? say(known) : "", lost ? `${lost} of ${values.length} ${of} are not a number` : ""].filter(Boolean).join(", ");
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function difference(run) {
  const other = data.runs[state.other];
  return other && other !== run && other.layers === run.layers && other.heads === run.heads ? other : null;
}

const HEADS = {
  id: "heads", title: "Every attention head", field: "measure", live: true, wide: (run) => run.heads > 14,
  caption: "Near zero a head looks at one token, near the maximum it looks at all alike. Choose a head: it is marked in every picture.",
  shown: () => true,
  // The run that this one is compared with, where it has as many heads and the same measure.
  other(run) {
    const other = state.difference ? difference(run) : null;
    return other && ofHeads(other, MEASURES[state.measure].metric) ? other : null;
  },
  value(run, l, n) {
    const { metric } = MEASURES[state.measure], other = this.other(run);
    return valueNow(run, metric, l, n) - (other ? valueNow(other, metric, l, n) : 0);
  },
  scale(run) {
    const { metric, unit } = MEASURES[state.measure], other = this.other(run);
    if (other) {
      const ends = [run, other].map((one) => row(one.train[metric], stepsOf(one).length - 1));
      const far = extent(ends[0].map((value, i) => Math.abs(value - ends[1][i])))[1] || 1;
      return { low: -far, high: far, color: (value) => differenceColor(value / far), unit: `${unit} more than in ${other.name}` };
    }
    const [low, high] = extent(run.train[metric].values);
    const least = Math.min(0, low), most = (state.measure === "entropy" ? Math.max(run.maxima.causal, high) : high) || 1;
    const notes = state.measure === "entropy" ? [`causal maximum ${exact(run.maxima.causal, 3)}`, `log T ${exact(run.maxima.context, 3)}`] : [];
    return { low: least, high: most, color: (value) => heatColor((value - least) / (most - least)), unit, notes };
  },
  draw(box, run) {
    const found = this.scale(run);
    return heatGrid(box, {
      title: this.title, rows: run.layers, columns: run.heads, unit: found.unit, color: found.color, signed: Boolean(this.other(run)),
      value: (l, n) => this.value(run, l, n), scale: found,
    });
  },
  said(run) {
    const { unit } = this.scale(run);
    if (state.head !== null) return `layer ${state.layer}, head ${state.head}: ${exact(this.value(run, state.layer, state.head))} ${unit}`;
    return saidOfKnown(this.table(run).rows.flatMap(([, ...heads]) => heads), "heads", (known) => `mean ${exact(mean(known), 4)} ${unit}`);
  },
  table(run) {
    return {
      head: [`layer [${this.scale(run).unit}]`, ...Array.from({ length: run.heads }, (_, n) => `head ${n}`)],
      rows: Array.from({ length: run.layers }, (_, l) => [l, ...Array.from({ length: run.heads }, (__, n) => this.value(run, l, n))]),
    };
  },
};

const HEAD = {
  id: "head", title: "One head", wide: true,
  caption: "Its entropy in nats against its threshold, its largest logit, and its temperature by position at the evaluation before the slider.",
  shown: (run) => state.head !== null && moves(run, "head_entropy"),
  draw(box, run) {
    const [l, n] = [state.layer, state.head];
    const parts = [], places = {};
    const first = ofHeads(run, "threshold") ? "entropy, threshold" : "entropy";
    const titles = [first, ofHeads(run, "head_max_logit") && "largest logit", run.text?.temperature && "temperature by position"];
    box.classList.add("thirds");
    box.replaceChildren(...titles.filter(Boolean).map((title) => html("div", { class: "third" }, html("h3", {}, title), (places[title] = html("div", { class: "picture" })))));
    const place = (title) => places[title];
    const entropy = [curve("entropy", stepsOf(run), column(run.train.head_entropy, l, n), 0)];
    if (ofHeads(run, "threshold")) {
      const nats = column(run.train.threshold, l, n).map((share) => share * run.most[l]);
      entropy.push(curve("threshold", stepsOf(run), nats, 1, { label: "θ" }));
    }
    entropy[0].label = "H";
    parts.push(lineChart(place(first), overSteps(run, { title: "entropy and threshold of the head", series: entropy, unit: "nats", floor: 0, right: 22, height: 212 })));
    if (ofHeads(run, "head_max_logit")) {
      const logit = curve("largest logit", stepsOf(run), column(run.train.head_max_logit, l, n), 2, { label: "", dash: "" });
      parts.push(lineChart(place("largest logit"), overSteps(run, { title: "largest logit of the head", series: [logit], up: "logit", right: 12, height: 212 })));
    }
    if (run.text?.temperature) {
      const inner = place("temperature by position");
      const draw = () => {
        const k = indexAt(run.text.step, state.step), [, L, N, P] = run.text.temperature.shape;
        const values = run.text.temperature.values.subarray((k * L + l) * N * P + n * P, (k * L + l) * N * P + (n + 1) * P);
        const series = [curve("temperature", run.text.positions, values, 3, { label: "", dash: "" })];
        lineChart(inner, { title: "temperature by position", of: "position", series, last: run.text.positions.at(-1), up: "temperature", right: 12, height: 212 });
        return k;
      };
      let drawn = draw();
      parts.push({ move() { if (indexAt(run.text.step, state.step) !== drawn) drawn = draw(); } });
    }
    return { move: () => parts.forEach((part) => part.move()) };
  },
  said(run) {
    const theta = ofHeads(run, "threshold") ? `, threshold ${exact(valueNow(run, "threshold", state.layer, state.head) * run.most[state.layer], 4)} nats` : "";
    return `layer ${state.layer}, head ${state.head}: entropy ${exact(valueNow(run, "head_entropy", state.layer, state.head))} nats${theta}`;
  },
  table(run) {
    const [l, n] = [state.layer, state.head];
    const metrics = ["head_entropy", "threshold", "head_max_logit"].filter((name) => ofHeads(run, name));
    const at = (name, e) => run.train[name].values[(e * run.layers + l) * run.heads + n];
    return { head: ["step", ...metrics], rows: someSteps(run).map((e) => [stepsOf(run)[e], ...metrics.map((name) => at(name, e))]) };
  },
};

const LAYERS = {
  id: "layers", title: "Entropy of each layer",
  caption: "Mean of a layer's heads. Deep layers that sink to zero foretell an unstable run; layers that stay at the causal maximum did not specialise.",
  shown: (run) => moves(run, "layer_entropy"),
  draw: (box, run) => lineChart(box, overSteps(run, {
    title: "mean head entropy by layer, over steps", series: layerCurves(run, "layer_entropy"), unit: "nats", floor: 0, right: 24, height: HEADS.wide(run) ? 250 : Math.max(250, gridHeight(box, run)),
    references: [{ value: run.maxima.context, label: `log T = ${exact(run.maxima.context, 3)}` }, { value: run.maxima.causal, label: `causal maximum = ${exact(run.maxima.causal, 3)}` }],
  })),
  said: (run) => saidOfLayers(run, "layer_entropy", "nats"),
  table: (run) => layerTable(run, "layer_entropy"),
};

const BANDS = {
  id: "bands", title: "Heads in each quarter",
  caption: "Quarters of the largest head entropy. Well-behaved models have about nine tenths in the middle two.",
  shown: (run) => Boolean(run.train.bands_observed),
  draw: (box, run) => stackChart(box, overSteps(run, { title: "share of heads by quarter, over steps", shares: run.train.bands_observed, names: QUARTERS })),
  said: (run) => `${[...row(run.train.bands_observed, now(run))].map((share) => exact(100 * share, 3)).join(" · ")} %, from collapse to overload`,
  table(run) {
    const rows = [];
    for (const e of someSteps(run)) rows.push([stepsOf(run)[e], ...row(run.train.bands_observed, e)]);
    return { head: ["step", ...QUARTERS], rows };
  },
};

// Layers whose windows or slots let rows see more or fewer keys have maxima of their own: shares of them compare.
const THRESHOLDS = {
  id: "thresholds", title: "Thresholds against entropies",
  caption: "Each point is a head, its number the layer; both axes are shares of the most entropy that a row of the layer can have. Outside the shaded band around its threshold a row of attention is penalised.",
  shown: (run) => ofHeads(run, "threshold"),
  share: (run, l, n) => valueNow(run, "head_entropy", l, n) / run.most[l],
  // Every head's name, threshold, entropy as a share, and entropy in nats.
  heads(run) {
    return Array.from({ length: run.layers * run.heads }, (_, i) => [Math.floor(i / run.heads), i % run.heads])
      .map(([l, n]) => [`layer ${l}, head ${n}`, valueNow(run, "threshold", l, n), this.share(run, l, n), valueNow(run, "head_entropy", l, n)]);
  },
  draw(box, run) {
    const at = (i) => [Math.floor(i / run.heads), i % run.heads];
    return scatter(box, {
      title: "head entropies against learned thresholds", count: run.layers * run.heads, layers: run.layers, most: 1, tolerance: run.tolerance || 0,
      across: "threshold θ", up: "head entropy ÷ its maximum", layer: (i) => at(i)[0], head: (i) => at(i)[1],
      x: (i) => valueNow(run, "threshold", ...at(i)), y: (i) => this.share(run, ...at(i)), choose: (i) => setHead(...at(i)),
      lines: (i) => {
        const [name, threshold, , nats] = this.heads(run)[i];
        return [name, `entropy ${exact(nats)} nats`, `threshold ${exact(threshold)}, ${exact(threshold * run.most[at(i)[0]])} nats`];
      },
    });
  },
  said(run) {
    const apart = this.heads(run).map(([, threshold, share]) => Math.abs(share - threshold));
    return saidOfKnown(apart, "heads", (known) => {
      const outside = known.filter((distance) => distance > (run.tolerance || 0)).length;
      return `${outside} of ${known.length} heads outside the band, ${exact(mean(known), 3)} apart in the mean`;
    });
  },
  table(run) {
    return { head: ["head", "θ", "entropy ÷ its maximum", "entropy [nats]"], rows: this.heads(run) };
  },
};

const TEMPERATURES = {
  id: "temperatures", title: "Temperatures",
  caption: "Learned divisors of the logits, mean of a layer's heads and positions. Above 1 attention is spread out, below 1 sharpened.",
  shown: (run) => moves(run, "temperature/mean"),
  draw: (box, run) => lineChart(box, overSteps(run, { title: "mean temperature by layer, over steps", series: layerCurves(run, "temperature/mean"), up: "temperature", log: true, right: 24, height: 320 })),
  said: (run) => saidOfLayers(run, "temperature/mean", ""),
  table: (run) => layerTable(run, "temperature/mean"),
};

const LOGITS = {
  id: "logits", title: "Largest logits",
  caption: "The largest scaled attention logit of each layer. What keeps growing here precedes a spike.",
  shown: (run) => moves(run, "max_logit"),
  draw: (box, run) => lineChart(box, overSteps(run, { title: "largest logit by layer, over steps", series: layerCurves(run, "max_logit"), up: "logit", log: true, right: 24, height: 320 })),
  said: (run) => saidOfLayers(run, "max_logit", ""),
  table: (run) => layerTable(run, "max_logit"),
};

const LOSSES = {
  id: "losses", title: "Losses",
  caption: "Cross-entropy of training batches and of held-out text.",
  shown: (run) => moves(run, "cross_entropy"),
  draw(box, run) {
    const series = [curve("training", stepsOf(run), run.train.cross_entropy.values)];
    if (run.evaluate.validation_loss) series.push(curve("held out", stepsOf(run, "evaluate"), run.evaluate.validation_loss.values, 1));
    return lineChart(box, overSteps(run, { title: "losses over steps", series, unit: "nats/token" }));
  },
  said(run) {
    const loss = run.train.cross_entropy.values[now(run)];
    const held = run.evaluate.validation_loss?.values[now(run, "evaluate")];
    return `training ${exact(loss, 4)}${held === undefined || stepsOf(run, "evaluate")[0] > state.step ? "" : `, held out ${exact(held, 4)}`} nats/token`;
  },
  table(run) {
    const rows = someSteps(run).map((e) => [stepsOf(run)[e], "training", run.train.cross_entropy.values[e]]);
    if (run.evaluate.validation_loss) rows.push(...someSteps(run, "evaluate").map((e) => [stepsOf(run, "evaluate")[e], "held out", run.evaluate.validation_loss.values[e]]));
    return { head: ["step", "text", "nats/token"], rows };
  },
};

function surfacePanel(id, title, caption, metric, unit, spread, log = false) {
  return {
    id, title, caption,
    shown: (run) => moves(run, metric),
    draw(box, run) {
      const { least, most, share } = spread(run, run.train[metric].values);
      const color = (value) => heatColor(share(value));
      return surface(box, overSteps(run, { title, values: run.train[metric], unit, share, scale: { low: least, high: most, color, unit, log } }));
    },
    said: (run) => saidOfLayers(run, metric, unit),
    table: (run) => layerTable(run, metric),
  };
}

const ENTROPY_SURFACE = surfacePanel(
  "entropy-surface", "Entropy, layer by step", "The whole of training in one picture: layers downwards, steps to the right.", "layer_entropy", "nats",
  (run) => ({ least: 0, most: run.maxima.causal, share: (value) => value / run.maxima.causal }),
);
const LOGIT_SURFACE = surfacePanel(
  "logit-surface", "Largest logits, layer by step", "A streak that lights up before the others is where a run begins to fail. The colours are logarithmic.", "max_logit", "",
  (_, values) => {
    const [low, most] = extent(values);
    const least = Math.max(low, most / 1e4, 1e-9), ratio = Math.log(most / least) || 1;
    return { least, most, share: (value) => Math.log(Math.max(value, least) / least) / ratio };
  },
  true,
);

// Every other number that was logged: a new metric is here without a line of its own.
const MORE = {
  id: "more", title: "Any number that was logged", select: true,
  caption: "Choose a metric; those with one number a layer are drawn by layer, of one number a head the mean is drawn.",
  shown: (run) => moves(run, "step"),
  options: (run) => [...Object.keys(run.train), ...Object.keys(run.evaluate).map((name) => `evaluate/${name}`)].filter((name) => !name.endsWith("step")),
  source(run) {
    const names = this.options(run);
    const name = names.includes(state.metric) ? state.metric : names.includes("gradient_norm") ? "gradient_norm" : names[0];
    const kind = name.startsWith("evaluate/") ? "evaluate" : "train";
    return { name, kind, array: run[kind][name.replace(/^evaluate\//, "")] };
  },
  series(run) {
    const { name, kind, array } = this.source(run);
    const [E, width = 1, ...rest] = array.shape;
    if (rest.length) return [curve("mean", stepsOf(run, kind), Float32Array.from({ length: E }, (_, e) => row(array, e).reduce((sum, value) => sum + value, 0) / (width * rest[0])))];
    if (array.shape.length === 1) return [curve(name.split("/").at(-1).replaceAll("_", " "), stepsOf(run, kind), array.values, 0, { label: "" })];
    return Array.from({ length: width }, (_, i) => ({
      name: width === run.layers ? `layer ${i}` : `quarter ${i + 1}`, label: `${i}`, layer: width === run.layers ? i : undefined, steps: stepsOf(run, kind),
      values: column(array, i), color: layerColor(i, width), dash: DASHES[i % DASHES.length],
    }));
  },
  draw(box, run) {
    return lineChart(box, overSteps(run, { title: this.source(run).name, series: this.series(run), log: true, right: 24 }));
  },
  said(run) {
    const { kind } = this.source(run), e = now(run, kind), values = this.series(run).map((one) => one.values[e]);
    return `${values.length === 1 ? exact(values[0]) : saidRange(values, "", "numbers")}, at ${steps(stepsOf(run, kind)[e])}`;
  },
  table(run) {
    const { kind } = this.source(run), series = this.series(run);
    return { head: ["step", ...series.map(({ name }) => name)], rows: someSteps(run, kind).map((e) => [stepsOf(run, kind)[e], ...series.map(({ values }) => values[e])]) };
  },
};

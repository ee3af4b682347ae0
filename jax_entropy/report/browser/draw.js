// Elements, numbers as text, scales and colours: what all pictures share. Text only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, ...children) {
  return dressed(document.createElementNS(SVG, tag), attributes, children);
}

function html(tag, attributes = {}, ...children) {
  return dressed(document.createElement(tag), attributes, children);
}

function dressed(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// A number as a reader wants it: seven digits are what was logged, five what is read.
function exact(value, digits = 5) {
  if (!Number.isFinite(value)) return value === Infinity ? "infinite" : "not a number";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-4) return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { maximumFractionDigits: decimals });
}

function steps(step) {
  return `step ${Math.round(step).toLocaleString("en")}`;
}

function tickText(value) {
  const size = Math.abs(value);
  return size >= 1e6 || (size < 1e-3 && size > 0) ? value.toExponential(0).replace("e+", "e") : value.toLocaleString("en", { maximumFractionDigits: 4 });
}

// Round numbers between two ends, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 5, 10].find((multiple) => multiple * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + 1e-9 * unit; i++) found.push(i * unit + 0);
  return found;
}

function logTicks(low, high) {
  const found = [];
  const wide = high > 300 * low;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const multiple of wide ? [1] : [1, 2, 5]) {
      const value = multiple * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 7 ? found.filter((_, i) => i % 2 === 0) : found;
}

// From numbers to pixels; `log` spreads what is above zero.
function scale(low, high, from, to, log = false) {
  const transform = log ? (value) => Math.log(Math.max(value, low)) : (value) => value;
  const [a, b] = [transform(low), transform(high)];
  const place = (value) => from + ((transform(value) - a) / (b - a || 1)) * (to - from);
  place.invert = (pixel) => {
    const value = a + ((pixel - from) / (to - from)) * (b - a);
    return log ? Math.exp(value) : value;
  };
  place.ticks = (count) => (log ? logTicks(low, high) : ticks(low, high, count));
  return place;
}

const colors = { heat: "", depth: "" };

function heatColor(share) {
  const i = Math.round(255 * Math.min(1, Math.max(0, share || 0)));
  return `#${colors.heat.substr(6 * i, 6)}`;
}

// From blue over none to orange, for differences from −1 to 1.
function differenceColor(share) {
  const strength = Math.min(1, Math.abs(share || 0));
  const end = share < 0 ? [0, 90, 160] : [200, 80, 0];
  return `#${end.map((part) => Math.round(245 + (part - 245) * strength).toString(16).padStart(2, "0")).join("")}`;
}

function luminance(color) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const part = parseInt(color.substr(at, 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function inkOn(color) {
  return luminance(color) > 0.179 ? "#000" : "#fff";
}

// Dark to light by depth, or light to dark on a dark page: each end stands out from what is behind it.
function layerColor(layer, count) {
  const share = layer / Math.max(count - 1, 1);
  const at = (x) => `#${colors.depth.substr(6 * Math.round(255 * x), 6)}`;
  return `light-dark(${at(0.74 * share)}, ${at(0.3 + 0.68 * share)})`;
}

const DASHES = ["", "7 2", "7 2 2 2", "2 2"];
const RUN_COLORS = [
  "light-dark(#0072b2, #5db7f0)", "light-dark(#c04a00, #ff9a57)", "light-dark(#00785a, #3fd0a4)",
  "light-dark(#9c3f7d, #f09bd0)", "light-dark(#6a5a00, #e0cf4a)", "light-dark(#444, #ccc)",
];

// The hint that follows the pointer, with exact values.
function hint(event, ...lines) {
  const tip = document.getElementById("tip");
  if (!lines.length) {
    tip.hidden = true;
    return;
  }
  tip.replaceChildren(...lines.map((line, i) => html(i ? "div" : "b", {}, line)));
  tip.hidden = false;
  const { clientX: x, clientY: y } = event;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y - height - 14 < 4 ? y + 18 : y - height - 14}px`;
}

// A name that may break behind its separators.
function breakable(name) {
  const parts = String(name).replace(/[-_+/,]|\.(?!\d)/g, "$&\u200b").split("\u200b");
  return parts.flatMap((part, i) => (i ? [html("wbr"), part] : [part]));
}

function pointed(event, element, width) {
  const box = element.getBoundingClientRect();
  const shrink = width / box.width;
  return [(event.clientX - box.left) * shrink, (event.clientY - box.top) * shrink];
}

// Draws what is inside an element anew; what has the keyboard there hands it on to what comes in its place.
function redraw(box, drawing) {
  const reached = () => [...box.querySelectorAll("[tabindex], button, summary, a")];
  const at = reached().indexOf(document.activeElement);
  const drawn = drawing();
  if (at >= 0) reached()[at]?.focus({ preventScroll: true });
  return drawn;
}

// A table and, beside it, the same as a file.
function tableOf({ head, rows }, title, name) {
  const cell = (text, tag, scope) => html(tag, scope ? { scope } : {}, typeof text === "number" ? exact(text, 7) : String(text));
  const table = html("table", {},
    html("thead", {}, html("tr", {}, ...head.map((text) => cell(text, "th", "col")))),
    html("tbody", {}, ...rows.map((values) => html("tr", {}, ...values.map((value, i) => cell(value, i ? "td" : "th", i ? null : "row"))))),
  );
  const save = html("button", { type: "button", onclick: () => saveCsv({ head, rows }, name) }, "Save as CSV");
  return [html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `table: ${title}` }, table), save];
}

function saveCsv({ head, rows }, name) {
  const quoted = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const text = [head, ...rows].map((values) => values.map(quoted).join(",")).join("\r\n");
  const link = html("a", { href: `data:text/csv;charset=utf-8,${encodeURIComponent(text)}`, download: `${name}.csv` });
  link.click();
}

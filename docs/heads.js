// The heat-maps of the first page: every head of two models while they train, from the numbers in the page.
// Moves by itself unless the reader prefers no motion; the slider stops it.
const VIRIDIS = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
  [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
];
const FRAME_MILLISECONDS = 110, REST_FRAMES = 18;

function colorOf(share) {
  const at = share * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[i].map((from, k) => Math.round(from + (at - i) * (VIRIDIS[i + 1][k] - from))).join(" ")})`;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// One model: its name, its grid of heads, and a function that shows a frame and says it in words.
function heatMap(figure, { layers, heads, maximum }) {
  const { name, entropy, perplexity } = figure.dataset, size = layers * heads;
  const bytes = Uint8Array.from(atob(entropy), (letter) => letter.charCodeAt(0));
  const cells = Array.from({ length: size }, () => element("span"));
  const grid = element("div", { className: "grid", role: "img" }, ...cells);
  grid.style.gridTemplateColumns = `repeat(${heads}, 1fr)`;
  const mean = element("small");
  figure.prepend(element("strong", { textContent: name }), grid, mean);
  const show = (frame) => {
    const shares = bytes.subarray(frame * size, (frame + 1) * size);
    shares.forEach((share, i) => (cells[i].style.background = colorOf(share / 255)));
    const nats = (maximum * shares.reduce((sum, share) => sum + share, 0)) / 255 / size;
    const low = shares.filter((share) => share < 64).length, high = shares.filter((share) => share > 191).length;
    mean.textContent = `mean ${nats.toFixed(2)} nats · perplexity ${perplexity} in the end`;
    grid.setAttribute("aria-label", `${name}: ${size} heads, ${low} collapsed, ${high} overloaded, mean entropy ${nats.toFixed(2)} nats`);
  };
  return { show, frames: bytes.length / size };
}

function animate(root) {
  const maps = [...root.querySelectorAll("[data-entropy]")].map((figure) => heatMap(figure, root.dataset));
  const last = maps[0].frames - 1;
  const steps = root.dataset.steps.split(" ").map(Number);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const play = element("button", { type: "button" });
  const slider = element("input", { type: "range", min: 0, max: last, ariaLabel: "training step" });
  const step = element("span"); // no <output>: that would be read aloud at every frame
  const colors = element("i", { ariaHidden: "true" });
  colors.style.background = `linear-gradient(90deg, ${VIRIDIS.map((color) => `rgb(${color.join(" ")})`).join(",")})`;
  const most = `${(+root.dataset.maximum).toFixed(1)} nats: at all alike`;
  root.append(element("div", { className: "scale" }, "0: at one token", colors, most));
  root.append(element("div", { className: "time" }, play, slider, step));
  let frame = 0, timer = 0;
  const show = (to) => {
    frame = to;
    const shown = Math.min(frame, last);
    slider.value = shown;
    step.textContent = `step ${steps[shown]}`;
    slider.setAttribute("aria-valuetext", step.textContent);
    maps.forEach((map) => map.show(shown));
  };
  const moving = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => document.hidden || show((frame + 1) % (last + REST_FRAMES)), FRAME_MILLISECONDS) : 0;
    play.textContent = on ? "pause" : "play";
  };
  play.onclick = () => moving(!timer);
  slider.oninput = () => { moving(false); show(+slider.value); };
  show(still ? last : 0);
  moving(!still);
}

document$.subscribe(({ body }) => body.querySelectorAll(".heads").forEach(animate));

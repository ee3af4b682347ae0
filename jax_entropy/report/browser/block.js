// Reads the page's block of numbers, as block.py writes it.

async function readBlock(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const content = new Uint8Array(await new Response(stream).arrayBuffer());
  const length = new DataView(content.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(content.subarray(4, 4 + length)));
  return unpack(header, content.subarray(4 + length));
}

// The header with every place of an array replaced by { shape, values }.
function unpack(node, bytes) {
  if (node === null || typeof node !== "object") return node;
  if (Array.isArray(node)) return node.map((child) => unpack(child, bytes));
  if (node.planes) return unpackArray(node, bytes);
  return Object.fromEntries(Object.entries(node).map(([name, child]) => [name, unpack(child, bytes)]));
}

function unpackArray({ at, shape, drop, planes }, bytes) {
  const size = shape.reduce((product, length) => product * length, 1);
  const row = size / (shape[0] || 1);
  const bits = new Uint32Array(size);
  for (let plane = 0; plane < planes; plane++) {
    const from = at + plane * size;
    for (let i = 0; i < size; i++) bits[i] |= bytes[from + i] << (8 * plane);
  }
  for (let i = 0; i < size; i++) {
    const change = (bits[i] >>> 1) ^ -(bits[i] & 1);
    bits[i] = change + (i >= row ? bits[i - row] : 0);
  }
  if (drop) for (let i = 0; i < size; i++) bits[i] <<= drop;
  return { shape, values: new Float32Array(bits.buffer) };
}

// One number a step of an array [E, …], as in column(entropy, layer, head).
function column(array, ...index) {
  const [length, ...rest] = array.shape;
  const width = rest.reduce((product, size) => product * size, 1);
  const offset = index.reduce((sum, i, axis) => sum * rest[axis] + i, 0);
  return Float32Array.from({ length }, (_, e) => array.values[e * width + offset]);
}

// The part of an array [E, …] that belongs to its e-th step.
function row(array, e) {
  const width = array.values.length / (array.shape[0] || 1);
  return array.values.subarray(e * width, (e + 1) * width);
}

// The last index whose step is not after `step`; 0 where all are.
function indexAt(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle - 1;
  }
  return low;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high && value < Infinity) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

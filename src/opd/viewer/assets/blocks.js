// Blocks of the page: gzip of JSON and columns of numbers, opened when they are shown (written by pack.py).
const MISSING = -32768;
const READ = {
  hundredths: (bytes, count) => {
    const out = new Float64Array(count);
    for (let i = 0; i < count; i++) {
      const value = ((bytes[i] | (bytes[count + i] << 8)) << 16) >> 16;
      out[i] = value === MISSING ? NaN : value / 100;
    }
    return out;
  },
  small: (bytes, count) => bytes.slice(0, count),
  index: (bytes, count) => {
    const out = new Uint32Array(count);
    for (let plane = 0; plane < 4; plane++)
      for (let i = 0; i < count; i++) out[i] |= bytes[plane * count + i] << (8 * plane);
    return out;
  },
};
const WIDTH = { hundredths: 2, small: 1, index: 4 };

// Where the bytes of a block come from: an element of the page; a live page replaces this.
const source = {
  async bytes(name) {
    const text = $("#b-" + name)?.textContent;
    return text ? Uint8Array.from(atob(text), character => character.charCodeAt(0)) : null;
  },
};
const opened = new Map();
function block(name, again = false) {
  if (again || !opened.has(name)) opened.set(name, openBlock(name));
  return opened.get(name);
}
async function openBlock(name) { return unpack(await source.bytes(name)); }
async function unpack(packed) {
  if (packed === null) return null;
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(data.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + size)));
  let at = 4 + size;
  const columns = {};
  for (const [column, kind, count] of head.columns) {
    columns[column] = { at: 0, values: READ[kind](data.subarray(at, at + WIDTH[kind] * count), count) };
    at += WIDTH[kind] * count;
  }
  head.numbers = Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column.values]));
  for (const row of head.rows || []) openRow(row, columns, head);
  return head;
}
// A row gets its numbers by name, and its tokens as [id, text].
function openRow(row, columns, head) {
  for (const [name, count] of Object.entries(row.n)) {
    const column = columns[name];
    row[name] = column.values.subarray(column.at, column.at + count);
    column.at += count;
  }
  row.tokens = Array.from(row.token || [], i => head.vocabulary[i]);
  row.promptText = head.texts[row.prompt];
  row.saidTexts = row.said === undefined ? null : head.texts[row.said];
  row.readsParts = row.reads === undefined ? null : head.texts[row.reads];
  row.shownImages = row.images === undefined ? null : head.texts[row.images];
  row.theirImages = row.theirs === undefined ? null : head.texts[row.theirs];
  row.parts = row.parts || [[0, row.tokens.length]];
  row.places = row.parts.flatMap(([a, b]) => Array.from({ length: b - a }, (_, i) => a + i));
  row.text = row.response ?? row.tokens.map(token => token[1]).join("");
  for (const who of ["student", "teacher"]) row[who + "_tops"] = topsOf(row, who, head);
}
// The most likely tokens of a model by the place of the token: [text, log-prob] each.
function topsOf(row, who, head) {
  const found = new Map(), counts = row[who + "_k"];
  if (!counts) return found;
  let start = 0;
  row.at.forEach((place, n) => {
    const top = [];
    for (let k = start; k < start + counts[n]; k++)
      top.push([head.vocabulary[row[who + "_top"][k]], row[who + "_logp"][k]]);
    start += counts[n];
    if (top.length) found.set(place, top);
  });
  return found;
}

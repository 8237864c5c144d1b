// The colour of a token: eleven steps around 0 in nats, the same in every run, so that a legend can be read.
const CUTS = [0.2, 0.5, 1, 2, 4];
function level(value) {
  let n = 0;
  while (n < 5 && Math.abs(value) >= CUTS[n]) n++;
  return n;
}
const bothWays = value => (level(value) === 0 ? "z" : (value < 0 ? "n" : "p") + level(value));
const upward = value => (level(value) === 0 ? "z" : "q" + level(value));
const ratioOf = row => {
  if (row.ratio === undefined)
    row.ratio = row.p && row.q ? Float64Array.from(row.q, (value, i) => value - row.p[i]) : null;
  return row.ratio;
};
const negative = values => (values ? Float64Array.from(values, value => -value) : null);
const COLOURS = {
  ratio: { title: "log q − log p", of: ratioOf, less: "teacher wants it less", more: "more, nats" },
  signal: { title: "signal (what was trained on)", of: row => row.signal, less: "less", more: "more, nats" },
  logp: { title: "−log p (student's surprise)", of: row => negative(row.p), up: true },
  logq: { title: "−log q (teacher's surprise)", of: row => negative(row.q), up: true },
  entropyp: { title: "entropy of the student", of: row => row.hp, up: true },
  entropyq: { title: "entropy of the teacher", of: row => row.hq, up: true },
  weight: { title: "weight − 1", of: row => row.weight && Float64Array.from(row.weight, v => v - 1) },
  advantage: { title: "advantage", of: row => row.advantage },
  none: { title: "none", of: () => null },
};
const classOf = (name, value) => (missing(value) ? "z" : COLOURS[name].up ? upward(value) : bothWays(value));

function legend(element, name) {
  const { up, less = "less", more = "more" } = COLOURS[name];
  if (name === "none") return fill(element);
  const below = [...CUTS].reverse().map((cut, i) => make("b", { class: "n" + (5 - i) }, `−${cut}`));
  const above = CUTS.map((cut, i) => make("b", { class: (up ? "q" : "p") + (i + 1) }, (up ? "" : "+") + cut));
  fill(element, up ? [] : [make("span", {}, less), ...below], make("b", { class: "zero" }, "0"), above,
    make("span", {}, up ? "nats" : more));
}

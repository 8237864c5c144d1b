// Images of a prompt: what the student reads, what the teacher reads where it differs, and places on the first one.
const WIDE = 320, SMALL = 192; // pixels on the page: of a copy at most, and of an image that is enlarged by whole pixels

// Where a copy's bytes come from: the block of a stage's images; a live page replaces this.
source.image = async (stage, name) => {
  const found = await block(`${stage}-images`);
  if (!found) return null;
  if (!found.copies) {
    let at = 0;
    found.copies = new Map(found.images.map(([one, size]) => [one, found.numbers.png.subarray(at, (at += size))]));
  }
  return found.copies.get(name) || null;
};
const urls = new Map();
function imageUrl(stage, name) {
  const key = `${stage}-${name}`;
  if (!urls.has(key)) urls.set(key, source.image(stage, name).then(bytes => bytes && pngUrl(bytes)));
  return urls.get(key);
}
function pngUrl(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return `data:image/png;base64,${btoa(text)}`;
}

// The marks of places: a shape each, so that they differ without colour.
const SHAPES = {
  cross: (x, y, r) => `M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}`,
  diamond: (x, y, r) => `M${x},${y - r * 1.3}L${x + r * 1.3},${y}L${x},${y + r * 1.3}L${x - r * 1.3},${y}Z`,
  ring: (x, y, r) => `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0`,
};
const WHEN = { before: "cross", teacher: "diamond", after: "ring" };
const SIGNS = { cross: "×", diamond: "◇", ring: "○" };
const inside = ([x, y], [left, top, right, bottom]) => left <= x && x < right && top <= y && y < bottom;
const placeSays = row => `(${row.click.join(", ")}) ${inside(row.click, row.box) ? "inside" : "outside"} the box`;

// [label, shape, row] of the responses of an item that name a place: of a prompt over time the first and the last.
function placesOf(item, labels) {
  const first = item.at?.length > 1 ? [[`step ${item.at[0][0]}`, "cross", item.at[0][1]]] : [];
  const all = item.rows
    ? Object.entries(item.rows).map(([when, row], i) => [labels[when], WHEN[when] || Object.keys(SHAPES)[i % 3], row])
    : item.at?.length ? [...first, [`step ${item.at.at(-1)[0]}`, "ring", item.at.at(-1)[1]]] : [["response", "ring", item.all[0]]];
  return all.filter(([, , row]) => row?.click);
}

function imagesOf(item, data, index) {
  const own = item.all.find(row => row.shownImages)?.shownImages, theirs = item.all.find(row => row.theirImages)?.theirImages;
  if (!own && !theirs) return null;
  const places = placesOf(item, data.labels), box = item.all.find(row => row.box)?.box;
  const same = own && theirs && own.length === theirs.length;
  const others = (theirs || []).map((image, i) => [image, i]).filter(([image, i]) => !same || image[0] !== own[i][0]);
  const figure = (who, list, count) => make("figure", { class: "seen" },
    make("div", { class: "row" }, list.map(([image, i]) => oneImage(index, image, who, i, count, i === 0 && who === "student" ? { box, places } : null))),
    make("figcaption", {}, who === "teacher" && own ? `the teacher reads${same && others.length < theirs.length ? `, of ${theirs.length} images` : ""}` : own && theirs && !others.length ? "student and teacher read" : `the ${who} reads`));
  return make("div", { class: "images" },
    own ? figure("student", own.map((image, i) => [image, i]), own.length) : null,
    others.length ? figure("teacher", others, theirs.length) : null,
    box || places.length ? make("ul", { class: "places" },
      box ? make("li", {}, make("b", {}, "▭ "), `target box ${box.join(", ")}`) : null,
      places.map(([label, shape, row]) => make("li", {}, make("b", {}, `${SIGNS[shape]} `), `${label}: ${placeSays(row)}`))) : null);
}
function oneImage(index, [name, width, height], who, i, count, marks) {
  const side = Math.max(width || 0, height || 0) || WIDE;
  const scale = side < SMALL ? Math.floor(SMALL / side) : Math.min(1, WIDE / side);
  const size = width ? { width: Math.round(width * scale), height: Math.round(height * scale) } : {};
  const what = `${count > 1 ? `image ${i + 1} of ${count}` : "image"} that the ${who} reads`;
  const said = marks ? [marks.box ? `target box ${marks.box.join(", ")}` : "", ...marks.places.map(([label, , row]) => `${label}: ${placeSays(row)}`)].filter(Boolean) : [];
  const image = make("img", { alt: [what, ...said].join("; "), decoding: "async", class: scale > 1 ? "enlarged" : null, ...size });
  const home = make("div", { class: "image" }, image, marks && width ? overlay(width, height, marks) : null);
  imageUrl(index, name).then(url => {
    if (url) image.src = url;
    else fill(home, make("span", { class: "absent" }, `${what}${width ? `, ${width} × ${height} pixels` : ""}: not ${PAGE.live ? "kept by the run" : "in this page"}`));
  });
  return home;
}
// The box and the places over an image, in its own pixels; each line has a dark edge, to be seen on any picture.
function overlay(width, height, { box, places }) {
  const r = Math.max(width, height) / 28;
  const twice = (shape, properties) => ["edge", "line"].map(name => make(shape, { ...properties, class: name }));
  return make("svg:svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    box ? make("svg:g", { class: "target" }, twice("svg:rect", { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] })) : null,
    places.map(([, shape, row]) => make("svg:g", { class: shape }, twice("svg:path", { d: SHAPES[shape](row.click[0] + 0.5, row.click[1] + 0.5, r) }))));
}
// What of a page's images is not in it.
function imagesSay(counts) {
  if (!counts || counts.shown === counts.of && counts.whole) return "";
  const absent = counts.absent ? `The run kept no copy of ${counts.absent} (samples.images).` : "";
  const left = counts.of - counts.shown - counts.absent;
  return [`Images: ${counts.shown} of ${counts.of} are in this page${counts.whole ? "" : ", reduced to 128 pixels"}.`,
    left ? `${left} are left out (opd view shows them).` : "", absent].filter(Boolean).join(" ");
}

// The card of a token: every number that the run has about it. Hover, focus and tap show the same.
const card = $("#card");
const hideCard = () => { card.hidden = true; };
const percent = logp => `${(100 * Math.exp(logp)).toPrecision(3)} %`;
const withPercent = logp => (missing(logp) ? "–" : `${logp.toFixed(2)}  (${percent(logp)})`);

function cardRows(row, i) {
  const ratio = ratioOf(row);
  const rows = [["position", `${row.places[i]} of ${row.length}, id ${row.tokens[i][0]}`]];
  const add = (name, values, show = v => v.toFixed(2)) => {
    if (values && !missing(values[i])) rows.push([name, show(values[i])]);
  };
  add("log p (student)", row.p, withPercent);
  add("log q (teacher)", row.q, withPercent);
  add("log q − log p", ratio);
  add("signal", row.signal);
  for (const name of ["weight", "advantage"]) {
    add(name, row[name]);
    if (row.same?.[name] !== undefined) rows.push([name, number(row.same[name])]);
  }
  add("entropy of p", row.hp);
  add("entropy of q", row.hq);
  add("rank under the teacher", row.rank, v => (v === 0 ? "–" : String(v)));
  if (row.turn) rows.push(["turn", String(row.turn[i] + 1)]);
  if (row.trained && !row.trained[i]) rows.push(["trained", row.talk ? "no: written by the environment" : "no: written by a tool or a template, or masked"]);
  const unit = unitAt(row, row.places[i]);
  if (unit) rows.push(["the teacher's tokens", unit[2].map(text => JSON.stringify(visible(text))).join(" ")]);
  return rows;
}
const unitAt = (row, place) => (row.units || []).find(([start, end]) => start <= place && place < end);

function topList(title, tops, sampled) {
  if (!tops) return null;
  const lines = tops.map(([[id, text], logp]) =>
    make("div", { class: id === sampled ? "sampled" : null },
      make("meter", { min: 0, max: 1, value: Math.exp(logp).toFixed(4) }), " ", percent(logp), " ",
      JSON.stringify(visible(text))));
  return make("div", {}, make("b", {}, title), ...lines);
}
function showCard(element, i, loud) {
  const row = element.row, [id, text] = row.tokens[i], token = element.tokenAt[i];
  const rows = cardRows(row, i);
  const table = make("table", {}, make("tbody", {},
    rows.map(([name, value]) => make("tr", {}, make("th", {}, name), make("td", {}, value)))));
  const student = row.student_tops.get(i), teacher = row.teacher_tops.get(i);
  const any = row.student_tops.size + row.teacher_tops.size;
  fill(card, make("div", { class: "token" }, JSON.stringify(visible(text))), table,
    student || teacher
      ? make("div", { class: "tops" }, topList("student", student, id), topList("teacher", teacher, id))
      : any ? make("div", { class: "empty" }, "most likely tokens: kept where the models differ most") : null);
  card.hidden = false;
  const box = token.getBoundingClientRect(), gap = 8;
  const left = Math.min(box.left, innerWidth - card.offsetWidth - gap);
  const below = box.bottom + 6;
  const top = below + card.offsetHeight + gap < innerHeight ? below : box.top - card.offsetHeight - 6;
  card.style.left = `${Math.max(gap, left)}px`;
  card.style.top = `${Math.max(gap, Math.min(top, innerHeight - card.offsetHeight - gap))}px`;
  if (loud) {
    const first = teacher?.[0];
    say([`token ${row.places[i]}: ${JSON.stringify(visible(text))}`, ...rows.slice(1, 5).map(pair => pair.join(" ")),
      first ? `teacher's first choice ${JSON.stringify(visible(first[0][1]))} ${percent(first[1])}` : ""].join(", "));
  }
}
// It closes when the reader scrolls; a key that moves to the next token may scroll, too.
let scrolledByKey = 0;
const onScroll = () => { if (performance.now() > scrolledByKey) hideCard(); };
addEventListener("scroll", onScroll, { passive: true, capture: true });

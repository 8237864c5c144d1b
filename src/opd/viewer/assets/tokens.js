// A response as tokens: one tab stop, arrow keys inside.
const SPECIAL = /^(<[^<>\s]{1,60}>|\[[A-Z_/]{2,20}\])$/;

function tokenElement(row, i, colour, value) {
  const [, text] = row.tokens[i];
  const names = [classOf(colour, value)];
  if (SPECIAL.test(text)) names.push("special");
  if (text === "") names.push("part");
  if (row.trained && !row.trained[i]) names.push("untrained");
  const element = make("b", { class: names.join(" ") }, text === "" ? "·" : marked(text));
  element.place = i;
  return element;
}
// All tokens of a response; units of two tokenizers are outlined, and what a page leaves out is counted.
function tokensOf(row, label, colour) {
  const values = COLOURS[colour].of(row);
  const element = make("div", {
    class: "tokens", tabindex: 0, role: "group", "aria-label": `${label}: ${visible(row.text).slice(0, 300)}`,
  });
  element.row = row;
  element.values = values;
  element.tokenAt = [];
  const ends = new Map(row.parts.map(([, end], n) => [end, row.parts[n + 1]?.[0] ?? row.length]));
  const talks = Boolean(row.turn || row.talk);
  let home = element, part = element, unit = null;
  if (row.parts.length && row.parts[0][0] > 0) element.append(gaps.make(row, 0, row.parts[0][0]));
  for (let i = 0; i < row.tokens.length; i++) {
    const place = row.places[i], now = unitAt(row, place);
    if (talks && changes(row, i)) {
      part = home = partOf(row, i, element, part);
      unit = null;
    }
    if (now !== unit) {
      unit = now;
      home = part;
      if (now) part.append(home = make("span", { class: "unit" }));
    }
    const token = tokenElement(row, i, colour, values ? values[i] : null);
    element.tokenAt.push(token);
    home.append(token);
    const next = ends.get(place + 1);
    if (next !== undefined && next > place + 1) part.append(gaps.make(row, place + 1, next));
  }
  if (!row.tokens.length) element.append(make("i", { class: "empty" }, "empty"));
  return element;
}
// Of a conversation: turns are lines, in which what the environment says is apart from the student's words.
const turnAt = (row, i) => (row.turn ? row.turn[i] : 0);
const heardAt = (row, i) => Boolean(row.trained) && !row.trained[i];
const changes = (row, i) => i === 0 || turnAt(row, i) !== turnAt(row, i - 1) || heardAt(row, i) !== heardAt(row, i - 1);
function partOf(row, i, element, before) {
  const turn = turnAt(row, i), heard = heardAt(row, i);
  let line = before.closest(".turn");
  if (!line || i === 0 || turn !== turnAt(row, i - 1))
    element.append(line = make("span", { class: "turn" }, make("i", { class: "who" }, turnSays(row, turn))));
  // The environment answers the turn before.
  const failed = heard && row.talk?.errors?.[turn - 1] > 0;
  const part = make("span", { class: heard ? (failed ? "heard failed" : "heard") : "said" },
    make("i", { class: "who" }, heard ? (failed ? "environment, error" : "environment") : "student"));
  line.append(part);
  return part;
}
function turnSays(row, turn) {
  const reward = row.talk?.rewards?.[turn];
  return `turn ${turn + 1}${missing(reward) ? "" : `, reward ${number(reward)}`}`;
}
// How a conversation went, and how it ended, in words.
const ENDS = {
  hung: "left behind in an action that hung",
  turn_limit: "ended by the limit of turns", token_limit: "cut at the limit of tokens", stopped: "stopped early",
  refused: "ended: its template refused an observation", rewritten: "ended: its template rewrote an earlier turn",
};
function talkSays(row) {
  const { counts, turns, heard } = row.talk;
  const many = (n, what) => (n ? `${n} ${what}${n === 1 ? "" : "s"}` : "");
  const end = Object.keys(ENDS).find(name => counts[name] && !(name === "rewritten" && row.finished));
  return [many(turns, "turn"), many(heard, "token") + (heard ? " of the environment" : ""), many(counts.tool_calls, "tool call"),
    many(failures(row), "error"), row.finished ? "finished" : ENDS[end] || "not finished"];
}
const failures = row => ["tool_errors", "errors", "timeouts"].reduce((sum, name) => sum + (row.talk?.counts[name] || 0), 0);

// What stands for the tokens [start, end) that are left out; a live page replaces this.
const gaps = {
  make: (row, start, end) =>
    make("i", { class: "gap" }, ` … ${(end - start).toLocaleString("en")} tokens left out (opd view shows them) … `),
};

// The cursor in the tokens of a response.
const cursor = { element: null, at: -1 };
function leave() {
  hideCard();
  for (const token of $$(".tokens b.at")) token.classList.remove("at");
}
function moveTo(element, i) {
  const last = element.row.tokens.length - 1;
  if (last < 0) return;
  leave();
  cursor.element = element;
  cursor.at = Math.max(0, Math.min(last, i));
  const token = element.tokenAt[cursor.at];
  token.classList.add("at");
  scrolledByKey = performance.now() + 300;
  token.scrollIntoView({ block: "nearest", behavior: "instant" });
  showCard(element, cursor.at, true);
}
// The next token in a direction whose value is at least 1 nat away from 0.
function strong(element, from, way) {
  let i = from + way;
  while (i >= 0 && i < element.row.tokens.length && !(element.values && Math.abs(element.values[i]) >= 1)) i += way;
  return i >= 0 && i < element.row.tokens.length ? i : from;
}
function watchTokens(panel) {
  const owner = target => target.place !== undefined && target.closest(".tokens");
  panel.addEventListener("mouseover", event => {
    if (owner(event.target)) showCard(owner(event.target), event.target.place);
  });
  panel.addEventListener("mouseout", event => { if (owner(event.target)) hideCard(); });
  panel.addEventListener("click", event => {
    if (owner(event.target)) moveTo(owner(event.target), event.target.place);
  });
  panel.addEventListener("focusin", event => {
    if (event.target.row && cursor.element !== event.target) Object.assign(cursor, { element: event.target, at: -1 });
  });
  panel.addEventListener("keydown", event => {
    const element = event.target;
    if (!element.row || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = cursor.at, last = element.row.tokens.length - 1;
    const single = KEYS_ON ? { n: () => strong(element, at, 1), p: () => strong(element, Math.max(at, 0), -1) } : {};
    const to = { ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => last, ...single };
    if (!to[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    moveTo(element, to[event.key]());
  });
}

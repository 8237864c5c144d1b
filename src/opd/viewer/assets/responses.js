// Responses: of the held-out prompts in columns, of a step, and of the same prompts over time.
const FIRST = { items: 20, tokens: 6000 }; // shown before "Show more"
const TABS = { held: "Held out", steps: "While training", follow: "Same prompt over time" };

class Responses {
  constructor(stage) {
    Object.assign(this, { stage, filters: new Filters(stage.data), items: [], list: [], current: null });
    const { data } = stage;
    this.panel = stage.part("panel");
    this.findTabs();
    this.state = { tab: this.tabs[0], step: data.steps.at(-1)?.step ?? null, colour: "ratio", filter: "all", setting: "", task: "", find: "", response: "" };
    this.limit = { ...FIRST };
    if (!this.tabs.length && !PAGE.live) {
      stage.part("responses").remove();
      return;
    }
    watchTokens(this.panel);
    if (imagesSay(data.images)) stage.part("images").textContent = imagesSay(data.images);
    stage.part("colour").addEventListener("change", event => this.set({ colour: event.target.value }));
  }
  findTabs() {
    const { held, steps, followed } = this.stage.data;
    const counts = { held, steps: steps.length, follow: followed };
    this.tabs = Object.keys(TABS).filter(name => counts[name]);
    if (this.stage.part("tabs")) this.makeTabs(counts);
  }
  // New files of a run at work: the held-out block may be another, and there may be more steps to choose from.
  async refresh(newHeldOut) {
    const had = this.tabs.length;
    this.findTabs();
    this.filters = new Filters(this.stage.data);
    if (newHeldOut) opened.delete(`${this.stage.index}-held`);
    opened.delete(`${this.stage.index}-follow`);
    if (!had && this.tabs.length) Object.assign(this.state, { tab: this.tabs[0], step: this.stage.data.steps.at(-1)?.step ?? null });
    if (!had || (newHeldOut && this.state.tab === "held")) return this.render();
    this.markTabs();
    this.controls();
  }
  markTabs() {
    for (const tab of $$("[role=tab]", this.stage.part("tabs"))) {
      const on = tab.dataset.tab === this.state.tab;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
  }
  makeTabs(counts) {
    const home = this.stage.part("tabs"), n = this.stage.index;
    const names = { held: `${TABS.held} (${counts.held})`, steps: TABS.steps, follow: TABS.follow };
    fill(home, this.tabs.map(name => make("button", {
      role: "tab", type: "button", id: `tab-${n}-${name}`, "aria-controls": `panel-${n}`, "data-tab": name,
      onclick: () => this.set({ tab: name, filter: "all", response: "" }),
      onkeydown: event => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!by) return;
        const next = this.tabs[(this.tabs.indexOf(name) + by + this.tabs.length) % this.tabs.length];
        this.set({ tab: next, filter: "all", response: "" });
        $(`#tab-${n}-${next}`).focus();
      },
    }, names[name])));
  }
  set(changes) {
    Object.assign(this.state, changes);
    this.limit = { ...FIRST };
    return this.render();
  }
  blockName() {
    const { tab, step } = this.state;
    return `${this.stage.index}-${tab === "held" ? "held" : tab === "follow" ? "follow" : "s" + step}`;
  }
  // Items of the tab: {all: its responses, rows: by evaluation, at: [step, row]}.
  async load() {
    const found = await block(this.blockName());
    if (!found) return [];
    if (this.state.tab === "steps") return found.rows.map(row => ({ id: row.id, task: row.task, all: [row] }));
    return found.groups.map(group => {
      const at = (group.at || []).map(([step, i]) => [step, found.rows[i]]);
      const rows = group.rows && Object.fromEntries(Object.entries(group.rows).map(([when, i]) => [when, found.rows[i]]));
      return { ...group, at, rows, all: rows ? Object.values(rows) : at.map(pair => pair[1]) };
    });
  }
  async render() {
    if (!this.tabs.length) return;
    leave();
    const asked = this.blockName();
    const items = await this.whileLoading(this.load());
    if (asked !== this.blockName()) return; // another step was chosen while this one was opened
    this.items = items;
    const { state } = this;
    this.markTabs();
    this.panel.setAttribute("aria-labelledby", `tab-${this.stage.index}-${state.tab}`);
    this.colourChoices();
    this.controls();
    this.show();
    writeHash();
  }
  // What takes a moment, because a large file is read: the panel says so instead of what it showed before.
  async whileLoading(items) {
    const timer = setTimeout(() => {
      this.panel.setAttribute("aria-busy", "true");
      fill(this.panel, make("p", {}, "Loading responses …"));
    }, 300);
    try {
      return await items;
    } finally {
      clearTimeout(timer);
      this.panel.removeAttribute("aria-busy");
    }
  }
  colourChoices() {
    const rows = this.items.flatMap(item => item.all);
    const has = Object.keys(COLOURS).filter(name => name === "none" || rows.some(row => COLOURS[name].of(row)));
    if (!has.includes(this.state.colour)) this.state.colour = has[0];
    COLOURS.signal.up = !rows.some(row => row.signal && row.signal.some(value => value < -0.2));
    this.colours = has;
    const select = this.stage.part("colour");
    fill(select, has.map(name => make("option", { value: name, selected: name === this.state.colour }, COLOURS[name].title)));
    legend(this.stage.part("legend"), this.state.colour);
    this.stage.part("why").textContent = has.includes("ratio") || !rows.length ? "" : `No log q − log p: ${this.whyNone(rows)}.`;
  }
  // Why these rows have no colour by log q - log p: in words, where a reader looks for the colour.
  whyNone(rows) {
    const { teacher, scored, compared } = this.stage.data, held = this.state.tab === "held";
    if (!teacher) return compared ? "the runs have no teacher" : "the stage has no teacher";
    if (!rows.some(row => row.q)) {
      const few = held && scored !== null && scored !== undefined ? ` (samples.held_out: ${scored} of each setting)` : "";
      return `the teacher did not score ${rows.length > 1 ? "these responses" : "this response"}${few}`;
    }
    return "the student's own numbers are not in the file";
  }
  isPlain(row) {
    const { colour } = this.state;
    return colour !== "none" && row.tokens.length > 0 && !COLOURS[colour].of(row);
  }
  whyPlain(rows) {
    const ofTeacher = ["ratio", "logq", "entropyq"].includes(this.state.colour) || rows.every(row => !row.p && !row.q);
    const why = ofTeacher ? this.whyNone(rows) : "the file has no such numbers of it";
    return make("p", { class: "hint plain" }, `Not coloured: ${why}.`);
  }
  controls() {
    const home = this.stage.part("filters"), focused = document.activeElement?.id;
    const lines = [];
    const { state, stage } = this, n = stage.index;
    const first = make("div", { class: "controls" });
    if (state.tab === "steps") first.append(...this.slider());
    const inside = this.inside();
    const choose = (key, values, title) => {
      if (values.length < 2) return;
      first.append(make("label", {}, `${title} `, make("select", { id: `${key}-${n}`, onchange: event => this.set({ [key]: event.target.value }) },
        make("option", { value: "" }, "all"),
        values.map(value => make("option", { value, selected: value === state[key] }, value)))));
    };
    if (state.tab === "held") choose("setting", [...new Set(this.items.map(item => item.setting).filter(Boolean))], "Setting");
    choose("task", [...new Set(this.items.map(item => item.task).filter(Boolean))], "Task");
    const group = make("div", { role: "group", "aria-label": "Show", class: "controls" });
    this.known = this.filters.of(this.items);
    const { first: a, second: b } = this.filters, both = this.items.some(item => item.rows?.[a] && item.rows[b]);
    for (const [name, { title, test }] of Object.entries(this.known)) {
      const count = inside.filter(test).length;
      if (!count && name !== "all" && !(both && ["up", "down"].includes(name))) continue;
      group.append(make("button", { type: "button", id: `filter-${n}-${name}`, "data-filter": name,
        "aria-pressed": String(state.filter === name), onclick: () => this.set({ filter: name, response: "" }),
      }, `${title} (${count})`));
    }
    first.append(make("label", {}, "Find ", make("input", { id: `find-${n}`, type: "search", value: state.find,
      oninput: event => { state.find = event.target.value; this.limit = { ...FIRST }; this.show(); writeHash(); } })));
    lines.push(first);
    if (state.tab !== "follow") lines.push(group);
    const { held, held_of: of } = stage.data;
    if (state.tab === "held" && held < of) lines.push(make("p", { class: "hint" }, `${held} of ${of} held-out responses are on this page; counts are of these.`));
    fill(home, lines);
    if (focused) document.getElementById(focused)?.focus();
  }
  slider() {
    const { steps } = this.stage.data, i = Math.max(0, steps.findIndex(one => one.step === this.state.step));
    const { step, shown, of } = steps[i];
    const input = make("input", { type: "range", id: `step-${this.stage.index}`, min: 0, max: steps.length - 1, value: i,
      "aria-valuetext": `step ${step}`, oninput: event => this.set({ step: steps[event.target.value].step, response: "" }) });
    const count = of === undefined ? "" : `: ${shown} of ${of} responses`; // a live page shows all
    return [make("label", {}, "Step ", input), make("output", {}, `${step}${count}`)];
  }
  inside() {
    const { setting, task, tab } = this.state;
    return this.items.filter(item => (tab !== "held" || !setting || item.setting === setting) && (!task || item.task === task));
  }
  found() {
    const test = (this.known[this.state.filter] || this.known.all).test, find = this.state.find.toLowerCase();
    const text = item => item.all.map(row => `${row.promptText}\n${row.text}`).join("\n").toLowerCase();
    return this.inside().filter(item => test(item) && (!find || text(item).includes(find)));
  }
  show() {
    leave();
    this.list = this.found();
    let n = 0, tokens = 0;
    while (n < this.list.length && n < this.limit.items && (n === 0 || tokens < this.limit.tokens))
      tokens += this.list[n++].all.reduce((sum, row) => sum + row.tokens.length, 0);
    const more = this.list.length - n;
    fill(this.panel,
      this.list.slice(0, n).map((item, i) => this.article(item, i)),
      this.list.length ? null : make("p", { class: "empty" }, "No response is like that."),
      more > 0 ? make("button", { type: "button", class: "more", onclick: () => {
        this.limit = { items: this.limit.items * 3, tokens: this.limit.tokens * 3 };
        this.show();
      } }, `Show more (${more})`) : null);
    this.current = null;
    if (this.state.response !== "") this.choose(Number(this.state.response), false);
  }
  article(item, i) {
    const one = item.all[0];
    if (!one) return make("article", { class: "response", tabindex: -1 }, make("p", { class: "empty" }, "no response"));
    // What both read; a response that one of them did not read says nothing of the difference.
    const kinds = row => new Set((row.readsParts || []).map(([kind]) => kind));
    const both = item.all.filter(row => kinds(row).has("=") || (kinds(row).has("+") && kinds(row).has("-")));
    const reads = both.find(row => kinds(row).has("+")) || both[0] || item.all.find(row => row.readsParts) || one;
    const about = [`prompt ${one.id}${one.sample ? `, response ${one.sample + 1}` : ""}`, item.task, item.setting, one.pick && `picked: ${one.pick}`, one.part && `part ${one.part}`, one.answer !== undefined && `reference: ${visible(one.answer)}`];
    return make("article", { class: "response", tabindex: -1, "data-n": i },
      make("div", { class: "about" }, about.filter(Boolean).map(text => make("span", {}, text)),
        item.rows || item.at?.length ? null : this.aboutRow(one)),
      one.saidTexts ? this.conversation(one) : make("div", { class: "prompt", dir: "auto" }, visible(one.promptText)),
      imagesOf(item, this.stage.data, this.stage.index),
      readsOf(reads),
      item.at?.length ? this.overTime(item) : this.columns(item));
  }
  aboutRow(row) {
    return make("span", { class: this.filters.markOf(row) }, [`${row.length} tokens`, ...(row.talk ? talkSays(row) : [row.finished ? "" : "cut at the limit"]), this.filters.judged(row), extracted(row), row.click ? `place ${placeSays(row)}` : ""].filter(Boolean).join(", "));
  }
  conversation(row) {
    return make("div", { class: "prompt" }, row.saidTexts.map(([role, text]) =>
      make("div", { class: "said", dir: "auto" }, make("b", {}, `${visible(role)}: `), visible(text))));
  }
  columns(item) {
    const { whens, labels } = this.stage.data;
    const parts = item.rows ? whens.filter(when => item.rows[when]).map(when => [labels[when], item.rows[when]]) : [["", item.all[0]]];
    const rows = parts.map(([, row]) => row), once = rows.length > 1 && rows.every(row => this.isPlain(row));
    const columns = make("div", { class: "columns" }, parts.map(([label, row]) => make("div", { class: "column" },
      label ? make("h3", {}, `${label} `, make("span", {}, this.aboutRow(row))) : null, this.body(row, label || "response", !once))));
    return once ? [this.whyPlain(rows), columns] : columns;
  }
  overTime(item) {
    return make("div", {}, item.at.map(([step, row]) => make("div", { class: "column" },
      make("h3", {}, `step ${step} `, make("span", {}, this.aboutRow(row))), this.body(row, `step ${step}`))));
  }
  body(row, label, says = true) {
    const tokens = tokensOf(row, label, this.state.colour);
    return make("div", {}, row.response === undefined ? null : make("div", { class: "prompt", dir: "auto" }, visible(row.response)),
      says && this.isPlain(row) ? this.whyPlain([row]) : null, tokens);
  }
  // Make one response the current one: `j` and `k`, and the address of the page.
  choose(i, focus = true) {
    const all = $$(".response", this.panel), article = all[Math.max(0, Math.min(all.length - 1, i))];
    for (const one of all) one.removeAttribute("aria-current");
    if (!article) return;
    this.current = Number(article.dataset.n);
    this.state.response = String(this.current);
    article.setAttribute("aria-current", "true");
    if (focus) $(".tokens", article)?.focus({ preventScroll: true });
    article.scrollIntoView({ block: "center" });
    writeHash();
  }
  by(n) { this.choose(this.current === null ? (n > 0 ? 0 : 0) : this.current + n); }
  byStep(n) {
    const { steps } = this.stage.data, at = steps.findIndex(one => one.step === this.state.step) + n;
    if (this.tabs.includes("steps") && steps[at]) this.set({ tab: "steps", step: steps[at].step, response: "" });
  }
  nextColour() {
    if (!this.colours) return; // a page without responses
    const at = this.colours.indexOf(this.state.colour);
    return this.set({ colour: this.colours[(at + 1) % this.colours.length] });
  }
}
const extracted = row => (row.extracted === undefined ? "" : `compared: ${visible(row.extracted)}`);

// What student and teacher read, the difference marked: what the teacher alone reads is inserted.
function readsOf(row) {
  if (!row.readsParts?.length) return null;
  const tags = { "=": "span", "-": "del", "+": "ins" };
  const kinds = new Set(row.readsParts.map(([kind]) => kind).filter(kind => kind !== "…"));
  const alone = kinds.size === 1 ? { "-": "What the student read", "+": "What the teacher read" }[[...kinds][0]] : "";
  const differs = !alone && kinds.size > 1;
  const parts = row.readsParts.map(([kind, text]) => (kind === "…"
    ? make("i", {}, ` … ${text.toLocaleString("en")} characters left out … `)
    : make(alone ? "span" : tags[kind], { dir: "auto" }, visible(text))));
  const note = differs ? make("p", { class: "hint" }, "Underlined: the teacher alone reads it. Struck through: the student alone.") : null;
  return make("details", {}, make("summary", {}, alone || (differs ? "What student and teacher read" : "What was read")), note,
    make("div", { class: "reads", tabindex: 0 }, parts));
}

// Stages, the keys of the page, and its state in the address.
const KEYS_ON = new URLSearchParams(location.search).get("keys") !== "off";

class Stage {
  constructor(data, index) {
    Object.assign(this, { data, index, root: $("#stage-" + index), charts: null, opened: false });
  }
  part(name) { return $(`[data-part="${name}"]`, this.root); }
  // Draw it at its first show: charts need a width.
  async open() {
    if (this.opened) return;
    this.opened = true;
    const curves = await block(`${this.index}-curves`);
    if (curves) this.charts = new Charts(this, curves);
    drawWhere(this);
    this.responses = new Responses(this);
  }
  // New data of a run at work: curves grow, new steps can be chosen, what is shown stays.
  async refresh(data) {
    const charts = JSON.stringify(this.data.charts), held = JSON.stringify(this.data.held_when);
    Object.assign(this.data, data);
    if (data.state_says && this.part("state")) this.part("state").textContent = data.state_says;
    if (!this.opened) return;
    const curves = await block(`${this.index}-curves`, true);
    if (curves && this.charts) {
      this.charts.curves = curves;
      if (charts === JSON.stringify(this.data.charts)) this.charts.again();
      else this.charts.rebuild();
    } else if (curves) this.charts = new Charts(this, curves);
    await this.responses?.refresh(held !== JSON.stringify(this.data.held_when));
  }
  goStep(step) {
    const { steps } = this.data;
    if (!this.responses?.tabs.includes("steps")) return;
    const nearest = steps.reduce((a, b) => (Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a)).step;
    this.responses.set({ tab: "steps", step: nearest, filter: "all", response: "" });
    this.part("responses").scrollIntoView();
  }
}
const stages = PAGE.stages.map((data, index) => new Stage(data, index));
let shown = stages[PAGE.first];

async function showStage(index) {
  shown = stages[index] || stages[PAGE.first];
  for (const stage of stages) stage.root.hidden = stage !== shown;
  $$("#stages [role=tab]").forEach((tab, i) => {
    tab.setAttribute("aria-selected", String(i === shown.index));
    tab.tabIndex = i === shown.index ? 0 : -1;
  });
  await shown.open();
  for (const link of $$("nav a")) link.hidden = !shown.part(link.dataset.to);
}
$$("#stages [role=tab]").forEach((tab, i, all) => {
  tab.addEventListener("click", async () => { await showStage(i); await shown.responses.render(); writeHash(); });
  tab.addEventListener("keydown", event => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = all[(i + by + all.length) % all.length];
    next.click();
    next.focus();
  });
});
for (const link of $$("nav a"))
  link.addEventListener("click", event => {
    event.preventDefault();
    shown.part(link.dataset.to)?.scrollIntoView();
  });

// The address holds what is shown, so that a link opens the same view.
let writing = false;
function writeHash() {
  if (!writing || !shown.responses?.tabs.length) return;
  const values = { stage: String(shown.index), ...shown.responses.state };
  const known = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  history.replaceState(null, "", "#" + new URLSearchParams(known.map(([name, value]) => [name, String(value)])));
}
async function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  await showStage(Number(given.get("stage") ?? PAGE.first));
  const { responses } = shown;
  if (!responses.tabs.length) return;
  const { state } = responses;
  if (responses.tabs.includes(given.get("tab"))) state.tab = given.get("tab");
  if (shown.data.steps.some(one => String(one.step) === given.get("step"))) state.step = Number(given.get("step"));
  if (COLOURS[given.get("colour")]) state.colour = given.get("colour");
  for (const name of ["filter", "setting", "task", "find", "response"]) state[name] = given.get(name) ?? state[name];
  await responses.render();
}

addEventListener("keydown", event => {
  if (event.key === "Escape") return leave();
  if (!KEYS_ON || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || $("#keys").open) return;
  const { responses } = shown;
  const actions = {
    j: () => responses.by(1), k: () => responses.by(-1), c: () => responses.nextColour(), t: flipTheme,
    "[": () => responses.byStep(-1), "]": () => responses.byStep(1), "?": () => $("#keys").showModal(),
    "/": () => $(`#find-${shown.index}`)?.focus(),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
readHash().then(() => {
  writing = true;
  html.dataset.ready = "1";
});

// Curves: small charts with one cursor, a zoom that they share, values by keyboard, and their numbers as a table.
const HEIGHT = 150;
const STROKES = ["--s1", "--s2", "--s3", "--s4"];
const shortName = key => key.replace(/^eval\//, "").replace(/^(teacher|rollout|train|optim|seconds|compare)\//, "");

class Charts {
  constructor(stage, curves) {
    Object.assign(this, { stage, curves, alpha: 0, axis: "step", zoom: null, zooming: false, all: [], cursor: {} });
    for (const chart of stage.data.charts) this.add(chart, stage.part("charts"));
    this.controls();
    this.more();
    onTheme.push(() => this.all.forEach(one => one.draw()));
  }
  // [x, y] of a series; x on the chosen axis, lines smoothed.
  points(key, run = 0) {
    const from = this.curves.lines.y[key] ? this.curves.lines : this.curves.points;
    const [place, y] = from.y[key];
    const x = from.x[place].map(step => this.across(step, run));
    return [x, from === this.curves.lines ? smoothed(y, this.alpha) : y];
  }
  across(step, run) {
    if (this.axis === "step") return step;
    const axis = this.curves.axes[run]?.[this.axis];
    if (!axis) return step;
    const [steps, totals] = axis;
    let i = steps.findIndex(one => one >= step);
    if (i < 0) i = steps.length - 1;
    if (i === 0 || steps[i] === step) return totals[i];
    return totals[i - 1] + (totals[i] - totals[i - 1]) * (step - steps[i - 1]) / (steps[i] - steps[i - 1]);
  }
  add(chart, home) { this.all.push(new Chart(this, chart, home)); }
  setZoom(range, but) {
    if (this.zooming) return;
    this.zooming = true;
    this.zoom = range;
    for (const one of this.all) if (one !== but) one.scale();
    this.zooming = false;
  }
  controls() {
    const { stage } = this, smooth = stage.part("smooth"), axis = stage.part("axis");
    smooth.addEventListener("input", () => {
      this.alpha = smooth.value / 100;
      stage.part("smooth-value").textContent = this.alpha ? this.alpha.toFixed(2) : "off";
      this.again();
    });
    stage.part("unzoom").addEventListener("click", () => this.setZoom(null));
    const known = Object.keys(this.curves.axes[0] || {});
    fill(axis, ["step", ...known].map(name => make("option", { value: name }, name === "step" ? "steps" : name)));
    axis.addEventListener("change", () => {
      this.axis = axis.value;
      this.zoom = null;
      this.again();
    });
  }
  again() { for (const one of this.all) one.again(); }
  // Other charts than before, because there are numbers of a new kind.
  rebuild() {
    for (const one of this.all) one.u.destroy();
    this.all = [];
    fill(this.stage.part("charts"));
    for (const chart of this.stage.data.charts) this.add(chart, this.stage.part("charts"));
  }
  // Numbers without a chart of their own get one when they are asked for.
  more() {
    const { stage, curves } = this;
    const shown = new Set(stage.data.charts.flatMap(chart => [...chart.lines, ...chart.points]));
    const hidden = /_(low|high)$/;
    const rest = [...Object.keys(curves.lines.y), ...Object.keys(curves.points.y)]
      .filter(key => !shown.has(key) && !hidden.test(key)).sort();
    const title = stage.part("more-title"), details = title.closest("details");
    if (!rest.length || stage.data.compared) return details.remove();
    title.textContent = `All other numbers (${rest.length})`;
    details.addEventListener("toggle", () => {
      if (!details.open || stage.part("more").children.length) return;
      for (const key of rest)
        this.add({ title: key, lines: curves.lines.y[key] ? [key] : [], points: curves.points.y[key] ? [key] : [] },
          stage.part("more"));
    });
    stage.part("more-find").addEventListener("input", event => {
      for (const box of stage.part("more").children)
        box.hidden = !$("h3", box).textContent.includes(event.target.value);
    });
  }
}

function smoothed(values, alpha) {
  if (!alpha) return values;
  let mean = 0, weight = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = alpha * mean + (1 - alpha) * value;
    weight = alpha * weight + 1 - alpha;
    return mean / weight;
  });
}

class Chart {
  constructor(charts, chart, home) {
    Object.assign(this, { charts, chart, index: null, keys: [...chart.lines, ...chart.points] });
    this.now = make("div", { class: "now" });
    this.numbers = make("div", { class: "scroll", hidden: true, tabindex: 0, role: "region", "aria-label": `Numbers: ${chart.title}` });
    const button = make("button", { type: "button", "aria-expanded": "false", "aria-label": `Numbers: ${chart.title}`,
      onclick: () => this.toggle(button) }, "Numbers");
    this.plot = make("div", {});
    this.box = make("div", { class: "chart" },
      make("div", { class: "top" }, make("h3", {}, chart.title), button), this.now, this.plot, this.numbers);
    home.append(this.box);
    this.data = this.joined();
    this.draw();
    new ResizeObserver(() => {
      const width = this.width();
      if (Math.abs(width - this.u.width) > 3) this.u.setSize({ width, height: HEIGHT });
    }).observe(this.box);
  }
  width() { return Math.max(180, this.box.clientWidth - 18); }
  joined() { return uPlot.join(this.keys.map((key, i) => this.charts.points(key, this.chart.runs?.[i] ?? 0))); }
  name(i) { return this.chart.names?.[i] ?? shortName(this.keys[i]); }
  // Of several runs, each has its own colour and dash in all charts.
  place(i) { return (this.chart.runs?.[i] ?? i) % STROKES.length; }
  colour(i) { return css(STROKES[this.place(i)]); }
  again() {
    this.data = this.joined();
    this.u.setData(this.data, false);
    this.scale();
    this.u.redraw();
    this.show(this.index);
  }
  range() {
    const { data, finished, planned, made } = this.charts.stage.data, x = this.data[0];
    const last = x[x.length - 1] ?? 1;
    if (this.charts.zoom) return this.charts.zoom;
    const until = this.charts.axis === "step" && !finished ? Math.min(planned, 3 * made) : 0;
    return [0, Math.max(1e-9, last, until)];
  }
  scale() {
    const [min, max] = this.range();
    this.u.setScale("x", { min, max });
  }
  vertical(low, high) {
    const { level, share, zero } = this.chart;
    const ends = (this.chart.intervals || []).flat()
      .flatMap(key => this.charts.curves.points.y[key]?.[1] ?? []).filter(value => value !== null);
    if (low === null || low === undefined) [low, high] = [0, 1];
    for (const value of [...ends, ...(missing(level) ? [] : [level]), ...(zero ? [0] : [])]) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (share) return [Math.min(0, low), Math.max(1, high)];
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [zero && low === 0 ? 0 : low - margin, zero && high === 0 ? 0 : high + margin];
  }
  draw() {
    this.u?.destroy();
    const axis = {
      stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), size: 4 },
      font: "11px system-ui",
    };
    const series = this.keys.map((key, i) => ({
      label: key, stroke: this.colour(i), width: 1.6, spanGaps: true, dash: this.place(i) ? [5, 2 + this.place(i)] : undefined,
      points: this.chart.points.includes(key)
        ? { show: true, size: 7, fill: this.colour(i) } : { show: this.data[0].length === 1, size: 7 },
    }));
    this.u = new uPlot({
      width: this.width(), height: HEIGHT, legend: { show: false },
      cursor: { sync: { key: "stage" + this.charts.stage.index, setSeries: false }, points: { size: 6 },
        drag: { x: true, y: false, uni: 10 } },
      scales: { x: { time: false, range: (_, low, high) => (low === null ? [0, 1] : [low, high]) },
        y: { range: (_, low, high) => this.vertical(low, high) } },
      axes: [{ ...axis, size: 26, values: (_, values) => values.map(number) },
        { ...axis, size: 48, values: (_, values) => values.map(number) }],
      series: [{}, ...series],
      hooks: {
        draw: [u => this.overlay(u)],
        setSelect: [u => this.select(u)],
        setCursor: [u => { this.index = u.cursor.idx; this.show(this.index); }],
      },
    }, this.data, this.plot);
    this.scale();
    this.reach();
    this.show(null);
  }
  select(u) {
    if (u.select.width <= 0) return;
    const low = u.posToVal(u.select.left, "x"), high = u.posToVal(u.select.left + u.select.width, "x");
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.justZoomed = performance.now();
    this.charts.setZoom([low, high]);
  }
  // The teacher's level and the intervals of evaluations, over the lines.
  overlay(u) {
    const g = u.ctx, ratio = devicePixelRatio, { level } = this.chart;
    g.save();
    g.lineWidth = ratio;
    if (!missing(level)) {
      const y = u.valToPos(level, "y", true), right = u.bbox.left + u.bbox.width;
      g.strokeStyle = g.fillStyle = css("--s2");
      g.setLineDash([2 * ratio, 3 * ratio]);
      g.beginPath();
      g.moveTo(u.bbox.left, y);
      g.lineTo(right, y);
      g.stroke();
      g.setLineDash([]);
      g.font = `${10 * ratio}px system-ui`;
      g.textAlign = "right";
      g.fillText("teacher", right - 2, y + (y - u.bbox.top < 16 * ratio ? 11 : -4) * ratio);
    }
    g.lineWidth = 1.6 * ratio;
    (this.chart.intervals || []).forEach(([low, high], i) => {
      const from = this.charts.curves.points.y[low], to = this.charts.curves.points.y[high];
      if (!from || !to) return;
      g.strokeStyle = this.colour(this.chart.lines.length + i);
      this.charts.curves.points.x[from[0]].forEach((step, n) => {
        const x = u.valToPos(this.charts.across(step, this.chart.runs?.[i] ?? 0), "x", true);
        g.beginPath();
        g.moveTo(x, u.valToPos(from[1][n], "y", true));
        g.lineTo(x, u.valToPos(to[1][n], "y", true));
        g.stroke();
      });
    });
    g.restore();
  }
  // A name, keys and a click for the drawing, which is a canvas.
  reach() {
    const { over } = this.u;
    over.tabIndex = 0;
    over.setAttribute("role", "img");
    over.setAttribute("aria-label", `${this.chart.title}. ${this.summary()}. Arrow keys read values.`);
    over.addEventListener("keydown", event => {
      const n = this.data[0].length;
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -n, End: n }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      this.index = Math.min(n - 1, Math.max(0, (this.index ?? (by > 0 ? -1 : n)) + by));
      this.u.setCursor({ left: this.u.valToPos(this.data[0][this.index], "x"), top: 10 });
      this.show(this.index, true);
    });
    over.addEventListener("click", () => {
      if (this.index === null || this.index === undefined || performance.now() - (this.justZoomed || -1e9) < 300) return;
      if (this.charts.axis === "step") this.charts.stage.goStep(this.data[0][this.index]);
    });
  }
  summary() {
    const parts = this.keys.map((key, i) => {
      const y = this.data[i + 1].filter(value => !missing(value));
      return `${this.name(i)} from ${number(y[0])} to ${number(y[y.length - 1])}`;
    });
    return [...parts, ...(missing(this.chart.level) ? [] : [`teacher ${number(this.chart.level)}`])].join("; ");
  }
  // The values at a place, or the last ones.
  show(index, loud) {
    const x = this.data[0], at = index ?? x.length - 1;
    if (at < 0) return;
    const values = this.keys.map((_, i) => {
      let k = at;
      while (k > 0 && missing(this.data[i + 1][k])) k--;
      return this.data[i + 1][k];
    });
    const axis = this.charts.axis === "step" ? "step" : this.charts.axis;
    const named = values.map((value, i) => (this.keys.length > 1 ? `${this.name(i)} ${number(value)}` : number(value)));
    fill(this.now, make("i", {}, `${axis} ${number(x[at])}`),
      named.map((text, i) => make("i", { class: "k" + this.place(i) }, text)),
      missing(this.chart.level) ? null : make("i", { class: "k1" }, `teacher ${number(this.chart.level)}`));
    if (loud) say(`${this.chart.title}, ${axis} ${number(x[at])}: ${named.join(", ")}`);
  }
  toggle(button) {
    const open = this.numbers.hidden;
    this.numbers.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) fill(this.numbers, this.table());
  }
  table() {
    const heads = ["", "first", "least", "most", "last"];
    const rows = this.keys.map((key, i) => {
      const y = this.data[i + 1].filter(value => !missing(value));
      const cells = [y[0], Math.min(...y), Math.max(...y), y[y.length - 1]];
      return make("tr", {}, make("th", { scope: "row" }, this.name(i)),
        cells.map(value => make("td", { class: "num" }, number(value))));
    });
    const measured = this.chart.points.flatMap((key, j) => {
      const i = this.chart.lines.length + j;
      return this.data[0].flatMap((x, n) => (missing(this.data[i + 1][n]) ? [] : [
        make("tr", {}, make("th", { scope: "row" }, `${this.name(i)}, ${this.charts.axis} ${number(x)}`),
          make("td", { class: "num", colspan: 4 }, number(this.data[i + 1][n])))]));
    });
    return make("table", {}, make("thead", {}, make("tr", {},
      heads.map(text => make("th", { scope: "col", class: text ? "num" : null }, text || make("span", { class: "sr" }, "series"))))),
      make("tbody", {}, rows, measured));
  }
}

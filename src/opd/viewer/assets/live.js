// A page of a run at work: blocks come from the server, new points are added to the curves, what is new is said.
const EVERY = { seen: 2000, hidden: 10000 };

async function load(path) {
  const answer = await fetch(path, { credentials: "same-origin" });
  return answer.ok ? new Uint8Array(await answer.arrayBuffer()) : null;
}
source.bytes = name => load(`/block/${name}`);

source.image = (stage, name) => load(`/image/${stage}-${name}`);

// A part of a long response that is not here yet: a button loads it, some thousand tokens at a time.
gaps.make = (row, start, end) => {
  const count = Math.min(live.chunk, end - start);
  return make("button", { type: "button", class: "gap", onclick: () => live.fill(row, start, start + count) },
    `show ${count.toLocaleString("en")} of ${(end - start).toLocaleString("en")} tokens`);
};

const live = {
  chunk: 2048, tag: null, known: null, timer: null,

  async fill(row, start, end) {
    const spans = [...row.parts, [start, end]].map(([a, b]) => `${a}-${b}`).join(",");
    const [file, place] = row.place;
    const found = await unpack(await load(`/row/${shown.index}-${file}-${place}?tokens=${spans}`));
    if (!found) return say("The run has no such response any more.");
    const whole = found.rows[0];
    if (!whole.place) delete row.place;
    Object.assign(row, whole, { promptText: row.promptText, saidTexts: row.saidTexts, readsParts: row.readsParts, shownImages: row.shownImages, theirImages: row.theirImages });
    shown.responses.show();
    say(`${(end - start).toLocaleString("en")} tokens loaded`);
  },

  async poll() {
    clearTimeout(this.timer);
    try {
      const answer = await fetch("/state", { headers: this.tag ? { "If-None-Match": this.tag } : {} })
        .catch(() => { throw new Error("`opd view` does not answer any more: start it again."); });
      if (answer.status >= 500) throw new Error(await answer.text());
      if (answer.status === 200) {
        this.tag = answer.headers.get("ETag");
        await this.take(await answer.json());
      }
      html.dataset.live = "on";
      $("#lost").hidden = true;
      if (answer.status === 401) return this.chip("Another `opd view` has this address. Open the one that it printed.", null);
    } catch (error) {
      this.lost(error.message);
    }
    const all = this.known?.stages ?? [];
    if (all.length && all.every(one => one.state === "finished")) return;
    this.timer = setTimeout(() => this.poll(), document.hidden ? EVERY.hidden : EVERY.seen);
  },

  // What the page shows is of the last answer; the line is gone with the next one.
  lost(why) {
    if (html.dataset.live === "lost") return;
    html.dataset.live = "lost";
    const text = `This page shows the run as it was at ${new Date().toLocaleTimeString("en-GB")}. ${why}`;
    $("#lost").hidden = false;
    fill($("#lost"), visible(text));
    say(text);
  },

  async take(state) {
    const before = this.known;
    this.known = state;
    this.chunk = state.chunk;
    if (state.stages.length !== stages.length) return this.chip("Another stage has begun.", "Show it", () => {
      history.replaceState(null, "", location.pathname + location.search); // the page opens on the stage that runs
      location.reload();
    });
    for (const [n, one] of state.stages.entries()) await this.refresh(stages[n], one, before?.stages[n]);
  },

  async refresh(stage, now, before) {
    const { data } = stage, says = stage.part("state");
    if (says) {
      says.textContent = now.says;
      says.className = `state-${now.state}`;
      fill(stage.part("facts"), ...now.facts.map(fact => make("span", {}, fact)));
    }
    const last = data.steps.at(-1)?.step ?? -1, newest = now.samples[0] ?? -1;
    const evaluated = before ? now.whens.filter(when => !before.whens.includes(when)) : [];
    data.finished = now.state === "finished";
    // Fewer steps than before: a resumed run began again at its last checkpoint.
    if (now.made < data.made || newest !== last || evaluated.length) {
      const answer = await fetch(`/data/${stage.index}`);
      if (answer.ok) await stage.refresh(await answer.json());
      if (says) says.textContent = now.says;
      if (newest > last) this.chip(`Step ${newest} has responses.`, "Show it", () => stage.goStep(newest));
      if (evaluated.length) this.chip(`${data.name}: evaluated (${evaluated.join(", ")}). The table is of before.`, "Show it");
    } else if (now.made > data.made && stage.charts) await this.append(stage);
  },

  // New points at the end of each series. Zoom, smoothing and the choice of the axis stay.
  async append(stage) {
    const { curves } = stage.charts;
    const answer = await fetch(`/since/${stage.index}/${stage.data.made}`);
    if (!answer.ok) return;
    const more = await answer.json();
    for (const kind of ["lines", "points"]) {
      const home = curves[kind], added = more[kind];
      for (const [name, [place, values]] of Object.entries(added.y)) {
        const old = home.y[name], x = old ? home.x[old[0]] : [], y = old ? old[1] : [];
        home.y[name] = [home.x.length, [...y, ...values]];
        home.x.push([...x, ...added.x[place]]);
      }
      this.compact(home);
    }
    curves.axes = more.axes;
    stage.data.made = more.made;
    stage.charts.again();
  },

  // Series hold their own places after an addition; those that none uses any more are dropped.
  compact(home) {
    const x = [];
    for (const series of Object.values(home.y)) {
      x.push(home.x[series[0]]);
      series[0] = x.length - 1;
    }
    home.x = x;
  },

  // One line above the sections says what is new; its button shows it, by default by loading the page again.
  chip(text, button, action = () => location.reload()) {
    const home = $("#new");
    home.hidden = false;
    fill(home, visible(text), button ? make("button", { type: "button", onclick: () => { home.hidden = true; action(); } }, button) : null);
    say(text);
  },
};
document.addEventListener("visibilitychange", () => { if (!document.hidden && live.timer) live.poll(); });
addEventListener("load", () => live.poll());

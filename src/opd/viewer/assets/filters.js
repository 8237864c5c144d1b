// Filters of responses: buttons with counts. A reward that is 1 or 0 is called right or wrong only if it says so.
const cut = row => row && row.finished === false;
const repeated = row => {
  if (row.repeats === undefined) {
    const seen = new Set(), ids = row.tokens.map(token => token[0]);
    let again = 0;
    for (let i = 2; i < ids.length; i++) {
      const gram = ids.slice(i - 2, i + 1).join(" ");
      if (seen.has(gram)) again++;
      seen.add(gram);
    }
    row.repeats = ids.length ? again / ids.length : 0;
  }
  return row.repeats >= 0.5;
};
const far = row => {
  const values = ratioOf(row) || row.signal;
  return Boolean(values) && values.some(value => Math.abs(value) >= 4);
};

class Filters {
  constructor(data) {
    this.data = data;
    const known = data.rewards;
    this.names = [...new Set(known.map(([, name]) => name))];
    this.name = this.names.length === 1 ? this.names[0] : "reward";
    this.correctness = known.length > 0 && known.every(([, , declared]) => declared);
    [this.first, this.second] = data.compared ? data.whens : ["before", "after"];
  }
  rewardName(task) { return (this.data.rewards.find(([one]) => one === (task ?? null)) || [0, this.name])[1]; }
  // What a reward is called: `max_words: 1`; right and wrong where the reward declares correctness.
  judged(row) {
    if (missing(row.reward)) return "";
    const [, name, declared] = this.data.rewards.find(([one]) => one === (row.task ?? null)) || [0, this.name, false];
    const text = `${name}: ${number(row.reward)}`;
    return declared && [0, 1].includes(row.reward) ? `${row.reward ? "right" : "wrong"} (${text})` : text;
  }
  markOf(row) {
    const declared = (this.data.rewards.find(([one]) => one === (row.task ?? null)) || [0, 0, false])[2];
    return declared && row.reward === 1 ? "right" : declared && row.reward === 0 ? "wrong" : null;
  }
  // The filters of a list of items, by name: {title, test}. Items have their responses in `all`, held-out ones `rows`.
  of(items) {
    const found = { all: { title: "all", test: () => true } };
    const talks = items.some(item => item.all.some(row => row.talk));
    if (items.some(item => item.rows)) Object.assign(found, this.pairs(items));
    Object.assign(found, {
      cut: { title: talks ? "not finished" : "cut at the limit", test: item => cut(this.judgedRow(item)) },
      failed: { title: "an error in a turn", test: item => item.all.some(row => failures(row) > 0) },
      repeated: { title: "repeated (half of the 3-grams)", test: item => repeated(this.judgedRow(item)) },
      far: { title: "|log q − log p| ≥ 4 somewhere", test: item => item.all.some(far) },
    });
    return found;
  }
  judgedRow(item) { return item.rows ? item.rows[this.second] || item.rows[this.first] || item.all[0] : item.all[0]; }
  pairs(items) {
    const rewards = items.flatMap(item => item.all.map(row => row.reward)).filter(value => !missing(value));
    if (!rewards.length) return {};
    const both = (item, a, b, test) =>
      Boolean(item.rows[a] && item.rows[b]) && !missing(item.rows[a].reward) && !missing(item.rows[b].reward) &&
      test(item.rows[a].reward, item.rows[b].reward);
    const { first, second } = this;
    const on = (a, b, test) => item => both(item, a, b, test);
    if (!rewards.every(value => value === 0 || value === 1)) {
      const names = this.data.compared ? this.data.labels : { [first]: "", [second]: "" };
      const better = this.data.compared ? `${names[second]} better by ≥ 0.1` : `${this.name} better by ≥ 0.1`;
      const worse = this.data.compared ? `${names[first]} better by ≥ 0.1` : `${this.name} worse by ≥ 0.1`;
      return {
        up: { title: better, test: on(first, second, (a, b) => b - a >= 0.1 - 1e-9) },
        down: { title: worse, test: on(first, second, (a, b) => a - b >= 0.1 - 1e-9) },
        ...(this.data.compared ? {} : { gap: { title: "teacher better by ≥ 0.1", test: on("teacher", second, (t, b) => t - b >= 0.1 - 1e-9) } }),
      };
    }
    const titles = this.titles();
    return {
      up: { title: titles.up, test: on(first, second, (a, b) => a === 0 && b === 1) },
      down: { title: titles.down, test: on(first, second, (a, b) => a === 1 && b === 0) },
      low: { title: titles.low, test: on(first, second, (a, b) => a === 0 && b === 0) },
      ...(this.data.compared ? {} : { gap: { title: titles.gap, test: on("teacher", second, (t, b) => t === 1 && b === 0) } }),
    };
  }
  titles() {
    const { name, correctness } = this;
    if (this.data.compared) {
      const [a, b] = [this.data.labels[this.first], this.data.labels[this.second]];
      const what = correctness ? "right" : `${name} 1`;
      return { up: `only ${b} ${what}`, down: `only ${a} ${what}`, low: correctness ? "both wrong" : `both ${name} 0` };
    }
    if (correctness)
      return { up: "wrong → right", down: "right → wrong", low: "still wrong", gap: "teacher right, student wrong" };
    return { up: `${name} 0 → 1`, down: `${name} 1 → 0`, low: `${name} stays 0`, gap: `${name}: teacher 1, student 0` };
  }
}

// Means by step and position: where in the response the teacher disagrees.
function drawWhere(stage) {
  const found = stage.data.position, home = stage.part("where");
  if (!found) return home.remove();
  const { width, steps, mean, count, what } = found;
  const columns = mean[0].length;
  const wide = Math.max(9, Math.min(26, Math.floor(1120 / columns)));
  const high = Math.max(7, Math.min(18, Math.floor(330 / steps.length)));
  const left = 56, top = 20;
  const title = what === "ratio" ? "Mean log q − log p" : "Mean signal";
  const svg = make("svg:svg", {
    width: left + columns * wide + 10, height: top + steps.length * high + 4, role: "img",
    "aria-label": `${title}, ${steps.length} steps by ${columns} positions`,
  });
  const every = Math.ceil((16 + 7 * String(columns * width).length) / wide);
  for (let j = 0; j < columns; j += every)
    svg.append(make("svg:text", { x: left + j * wide + 2, y: 13 }, String(j * width)));
  steps.forEach((step, i) => {
    if (i % Math.ceil(14 / high) === 0)
      svg.append(make("svg:text", { x: left - 6, y: top + i * high + high * 0.8, "text-anchor": "end" }, String(step)));
    mean[i].forEach((value, j) => {
      if (value === null) return;
      const place = width > 1 ? `positions ${j * width} to ${(j + 1) * width - 1}` : `position ${j}`;
      const rectangle = make("svg:rect", {
        x: left + j * wide, y: top + i * high, width: wide, height: high, class: bothWays(value),
        onclick: () => stage.goStep(step),
      }, make("svg:title", {}, `step ${step}, ${place}: ${number(value)} (${count[i][j]} tokens)`));
      svg.append(rectangle);
    });
  });
  stage.part("matrix").append(svg);
  legend(stage.part("where-legend"), what === "ratio" ? "ratio" : "signal");
  fill(stage.part("where-says"), whereSays(found, title));
}
function whereSays({ width, steps, mean, count }, title) {
  const sizes = mean[0].map((value, j) => Math.abs(value ?? 0) * count[0][j]);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let at = 0, half = 0, sum = 0;
  mean[0].forEach((value, j) => { if (Math.abs(value ?? 0) > Math.abs(mean[0][at] ?? 0)) at = j; });
  while (half < sizes.length - 1 && (sum += sizes[half]) < total / 2) half++;
  const named = (from, to) => (from === to ? `position ${from}` : `positions ${from} to ${to}`);
  return `${title} of the sampled tokens, by position (left to right) and step (top to bottom). In step ${steps[0]} ` +
    `the largest mean is ${number(mean[0][at])} nats, at ${named(at * width, (at + 1) * width - 1)}; half of the sum of ` +
    `all differences is at ${named(0, (half + 1) * width - 1)} of ${mean[0].length * width}.`;
}

// ---- curves: values at the pointer ----
for (const figure of document.querySelectorAll("[data-chart]")) readValues(figure, data.charts[figure.dataset.chart]);

function keyOf(index) { // a piece of the series' line: told apart by its dashes where colour is not seen
  return drawing("svg", { class: `key ${data.looks[index]}`, viewBox: "0 0 26 8", "aria-hidden": "true" },
    drawing("path", { class: "line", d: "M1,4H25" }));
}

function readValues(figure, chart) {
  const g = data.geometry, svg = figure.querySelector("svg"), readout = figure.querySelector(".readout");
  const steps = [...new Set(chart.lines.flatMap((line) => (line ? line.steps : [])))].sort((a, b) => a - b);
  const x = (step) => g.LEFT + (step - chart.x[0]) / (chart.x[1] - chart.x[0]) * (g.WIDTH - g.LEFT - g.RIGHT);
  const y = (v) => g.HEIGHT - g.BOTTOM - (v - chart.y[0]) / (chart.y[1] - chart.y[0]) * (g.HEIGHT - g.TOP - g.BOTTOM);
  const overlay = svg.appendChild(drawing("g", {}));
  let at = steps.length - 1;

  const draw = (tag, attributes) => overlay.append(drawing(tag, attributes));
  function show(active) {
    const step = steps[at];
    overlay.replaceChildren();
    readout.replaceChildren(element("span", "", `step ${step}`));
    if (active) draw("line", { class: "cross", x1: x(step), x2: x(step), y1: g.TOP, y2: g.HEIGHT - g.BOTTOM });
    chart.lines.forEach((line, index) => {
      const i = line ? line.steps.indexOf(step) : -1;
      if (i < 0) return;
      if (active) draw("circle", { class: `mark ${data.looks[index]}`, cx: x(step), cy: y(line.means[i]), r: 4 });
      const [mean, range] = line.text[i];
      const key = chart.lines.length > 1 ? [keyOf(index)] : [];
      readout.append(element("span", "", ...key, element("b", "", mean), range && ` ${range}`));
    });
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) / box.width * g.WIDTH;
    at = steps.reduce((best, step, i) => (Math.abs(x(step) - pointer) < Math.abs(x(steps[best]) - pointer) ? i : best), 0);
    show(true);
  });
  const rest = () => { at = steps.length - 1; show(false); };
  svg.addEventListener("pointerleave", rest);
  figure.addEventListener("blur", rest);
  figure.addEventListener("focus", () => show(figure.matches(":focus-visible")));
  figure.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(steps.length - 1, to));
    show(true);
  });
  show(false);
}

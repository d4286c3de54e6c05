// ---- tokens ----
// A run's answers at the slider's step, one of them token by token, and one token of it in full.

for (const rollout of data.rollouts) rollout.unwritten = new Set(rollout.unwritten);
const MINUS = "\u2212";
const signed = (v) => (v < 0 ? MINUS : "+") + Math.abs(v).toFixed(2);
const nats = (v) => (v === null ? "not finite" : v.toFixed(2).replace("-", MINUS));
const PART = "\u2026"; // a token that only begins a character, which a later one ends
const NAMES = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", " ": "\u00b7" };
// Blanks, control and format characters and lone surrogates have no look of their own; some reorder what is near.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Z}]/u;
const nameOf = (c) => NAMES[c] ?? `\u27e8U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`;

function visible(text) { // text with its blanks made visible, as nodes
  if (!text) return [element("span", "glyph", "\u2205")];
  const nodes = [];
  for (const character of text) {
    // A word's leading blank may be faint; marks that are all there is to read may not.
    const kind = character === " " && text.trim() ? "glyph blank" : "glyph";
    if (HIDDEN.test(character)) nodes.push(element("span", kind, nameOf(character)));
    else if (typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + character);
    else nodes.push(character);
  }
  return nodes;
}

function probability(logprob) {
  if (logprob === null) return "?";
  const p = Math.exp(logprob);
  if (p >= 0.0995) return `${(p * 100).toFixed(0)}%`;
  return p >= 0.0005 ? `${(p * 100).toPrecision(2)}%` : "<0.05%";
}

let rollouts = [], steps = [], shown = null, selected = 0; // of the run; of the run; the rollout; its token

function options(select, texts) {
  select.replaceChildren(...texts.map((text, i) => new Option(text, i)));
}

function showRun() {
  const at = steps[$("step").value] ?? 0;
  rollouts = data.rollouts.filter((rollout) => rollout.run === Number($("run").value));
  steps = [...new Set(rollouts.map((rollout) => rollout.step))].sort((a, b) => a - b);
  // Another run's nearest step: the page may hold other steps of it.
  const nearest = steps.reduce((best, step, i) => (Math.abs(step - at) < Math.abs(steps[best] - at) ? i : best), 0);
  $("step").max = steps.length - 1;
  $("step").value = nearest;
  showStep();
}

const ofStep = () => rollouts.filter((rollout) => rollout.step === steps[$("step").value]);

function showStep() {
  const step = steps[$("step").value], now = ofStep();
  $("step-text").textContent = `${step} of ${steps.at(-1)}`;
  $("step").setAttribute("aria-valuetext", `step ${step}`);
  const wanted = Math.max(0, Math.min($("rollout").selectedIndex, now.length - 1));
  const context = (rollout) => (data.texts[rollout.context].trim() ? "" : " (no context)");
  const guided = (rollout) => (rollout.guided ? " (written by the told teacher)" : "");
  options($("rollout"), now.map((r) => data.texts[r.prompt].replace(/\s+/g, " ").slice(0, 90) + context(r) + guided(r)));
  $("rollout").selectedIndex = wanted;
  showRollout();
}

function showRollout() {
  const now = ofStep(), index = $("rollout").selectedIndex;
  shown = now[index];
  $("rollout-text").textContent = `${index + 1} of ${now.length}`;
  $("previous").disabled = index <= 0;
  $("next").disabled = index >= now.length - 1;
  $("prompt").textContent = data.texts[shown.prompt];
  const context = data.texts[shown.context];
  $("context").textContent = context.trim() ? context : "Nothing: an anchor row, where the teacher holds the model in place.";
  $("context").classList.toggle("faint", !context.trim());
  $("written-by").textContent = shown.guided ? "Written by the told teacher" : "The student wrote";
  $("counts").replaceChildren(...[
    [shown.length, "tokens"],
    ...(shown.unwritten.size ? [[shown.unwritten.size, "not the student\u2019s"]] : []),
    ...Object.entries(shown.episode).map(([name, count]) => [count, name.replaceAll("_", " ")]),
    [shown.candidates.length, "candidates"],
    [shown.kept.length, "kept"],
  ].flatMap(([count, noun], i) => [i ? " \u00b7 " : "", element("b", "", String(count)), ` ${noun}`]));
  $("cut").hidden = shown.length === shown.tokens.length;
  $("cut").textContent = `The first ${shown.tokens.length} of ${shown.length} tokens.`;
  const candidates = new Set(shown.candidates), kept = new Set(shown.kept);
  $("answer").replaceChildren(...shown.tokens.flatMap((text, i) => {
    const node = token(text, i, candidates.has(i), kept.has(i));
    return text.endsWith("\n") ? [node, element("br")] : [node, element("wbr")];
  }));
  foldOthers();
  const first = shown.candidates.find((i) => kept.has(i)) ?? shown.candidates[0] ?? 0;
  if (shown.tokens.length) select(Math.min(first, shown.tokens.length - 1));
  else $("detail").replaceChildren(element("p", "role", "An empty answer."));
}

// A tool's turn of more than a few tokens is folded behind a mark that says how many; selecting one of them unfolds it.
const FOLDED = 8;

function foldOthers() {
  for (let i = 0; i < shown.tokens.length; i += 1) {
    let end = i;
    while (shown.unwritten.has(end) && end < shown.tokens.length) end += 1;
    if (end - i <= FOLDED) continue;
    const run = element("span", "run"), first = nodeOf(i), after = nodeOf(end);
    const mark = element("span", "fold", `${end - i} tokens of a tool`);
    mark.setAttribute("aria-hidden", "true"); // the arrow keys walk through the tokens themselves
    first.before(mark, run);
    run.setAttribute("role", "presentation");
    while (run.nextSibling && run.nextSibling !== after) run.append(run.nextSibling);
    run.hidden = true;
    mark.addEventListener("click", () => { run.hidden = !run.hidden; });
    i = end;
  }
}

const gapOf = (i) => (shown.teacher[i] === null || shown.student[i] === null ? null : shown.teacher[i] - shown.student[i]);

const contrastOf = (i) => shown.contrast?.[i] ?? null; // known of candidates alone

function token(text, i, isCandidate, isKept) {
  const byContrast = $("by-contrast").checked, contrast = contrastOf(i);
  const gap = gapOf(i), coloured = byContrast ? contrast : gap, node = element("span", "t", ...visible(text || PART));
  const isOthers = shown.unwritten.has(i);
  if (isOthers) node.classList.add("unwritten");
  else if (gap === null) node.classList.add("unknown");
  else if (coloured) {
    node.classList.add(coloured > 0 ? "up" : "down");
    // A little more than proportional, as the legend's ramp is: gaps of one nat are to be seen beside ones of six.
    node.style.setProperty("--gap", Math.min(1, (Math.abs(coloured) / data.scale) ** 0.75).toFixed(3));
  }
  node.classList.toggle("candidate", isCandidate);
  node.classList.toggle("kept", isKept);
  node.classList.toggle("marked", marked.get(shown)?.has(i) ?? false);
  node.dataset.index = i;
  node.tabIndex = -1;
  node.setAttribute("role", "option");
  node.setAttribute("aria-selected", "false");
  const label = [text.trim() || (text ? "blank" : "part of a character")];
  label.push(isOthers ? "not the student\u2019s" : gap === null ? "gap not finite" : `gap ${signed(gap)} nats`);
  if (contrast !== null) label.push(`contrast ${signed(contrast)} nats`);
  if (isCandidate) label.push("candidate");
  if (isKept) label.push("kept");
  if (Object.hasOwn(shown.preferred, i)) label.push(`teacher prefers ${shown.preferred[i].trim() || "blank"}`);
  node.setAttribute("aria-label", label.join(", "));
  return node;
}

const nodeOf = (i) => $("answer").querySelector(`[data-index="${i}"]`);

function select(i, focus = false) {
  const old = nodeOf(selected), node = nodeOf(i), run = node.closest(".run");
  if (run) run.hidden = false;
  if (old) { old.setAttribute("aria-selected", "false"); old.tabIndex = -1; }
  selected = i;
  node.setAttribute("aria-selected", "true");
  node.tabIndex = 0;
  if (focus) node.focus({ preventScroll: false });
  describe(i);
}

function bar(who, logprob) {
  const fill = element("i");
  fill.style.setProperty("--p", logprob === null ? 0 : Math.exp(logprob).toFixed(4));
  return [element("span", "", who), element("span", `bar ${who.toLowerCase()}`, fill), element("span", "", probability(logprob))];
}

function describe(i) {
  const place = ["token", `${i + 1} of ${shown.length}`];
  const detail = shown.unwritten.has(i) ? othersDetail(place) : scoredDetail(i, place);
  $("detail").replaceChildren(element("div", "token", ...visible(shown.tokens[i])), ...detail);
}

const factsOf = (facts) =>
  element("dl", "", ...facts.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));

function othersDetail(place) {
  const what = "The student did not write this, it read it (a tool\u2019s answer, say): neither scored nor trained on.";
  return [element("div", "role", element("b", "", "Not the student\u2019s")), element("div", "wish none", what), factsOf([place])];
}

function scoredDetail(i, place) {
  const gap = gapOf(i), rank = shown.candidates.indexOf(i);
  const role = rank < 0 ? ["Not a candidate"] : [`Candidate, rank ${rank + 1} of ${shown.candidates.length}`];
  if (shown.kept.includes(i)) role.push(", ", element("b", "", "kept"));
  const wish = Object.hasOwn(shown.preferred, i)
    ? element("div", "wish", "The teacher most wants to promote ", element("b", "", ...visible(shown.preferred[i])))
    : element("div", "wish none", "The teacher\u2019s wish is recorded for candidates only.");
  const facts = factsOf([
    ["log p, student", nats(shown.student[i])],
    ["log p, teacher", nats(shown.teacher[i])],
    ["gap, nats", gap === null ? "not finite" : signed(gap)],
    ...(contrastOf(i) === null ? [] : [["contrast, nats", signed(contrastOf(i))]]),
    ...(shown.divergence ? [["divergence", nats(shown.divergence[i])]] : []), // an engine that scores does not know it
    place,
  ]);
  const mark = rank < 0 || gap === null ? [] : [markButton(i)]; // labels hold candidates with a gap alone
  const bars = element("div", "bars", ...bar("Student", shown.student[i]), ...bar("Teacher", shown.teacher[i]));
  return [element("div", "role", ...role), bars, wish, facts, ...mark];
}

// ---- labels: which candidates bear on the wanted behaviour, for `rmsd judge --questions` ----
const marked = new Map(); // rollout -> set of positions; a rollout that was looked at and has none is labelled too

function markButton(i) {
  const is = marked.get(shown)?.has(i) ?? false;
  const button = element("button", "mark", is ? "Relevant: take the mark off" : "Mark as relevant");
  button.type = "button";
  button.setAttribute("aria-pressed", String(is));
  button.addEventListener("click", () => {
    const positions = marked.get(shown) ?? new Set();
    if (!positions.delete(i)) positions.add(i);
    marked.set(shown, positions);
    nodeOf(i)?.classList.toggle("marked", positions.has(i));
    $("save").hidden = false;
    $("save").textContent = `Save labels of ${marked.size} answer${marked.size > 1 ? "s" : ""}`;
    describe(i);
  });
  return button;
}

function labelled() { // a line an answer, as rmsd.judge.measure reads it
  return [...marked].map(([rollout, positions]) => JSON.stringify({
    prompt: data.texts[rollout.prompt],
    privileged_context: data.texts[rollout.context],
    teacher_prompt: data.texts[rollout.teacher_prompt],
    tokens: rollout.tokens,
    unwritten: [...rollout.unwritten].filter((i) => i < rollout.tokens.length),
    candidates: rollout.candidates.filter((i) => i < rollout.tokens.length && rollout.student[i] !== null && rollout.teacher[i] !== null).map((i) => ({
      position: i,
      token: rollout.tokens[i],
      promoted: rollout.preferred[i] ?? "",
      gap: rollout.teacher[i] - rollout.student[i],
      contrast: rollout.contrast?.[i] ?? null,
    })),
    relevant: [...positions].sort((a, b) => a - b),
  }) + "\n").join("");
}

function saveLabels() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([labelled()], { type: "application/jsonl" }));
  link.download = "labelled.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

function move(by) {
  $("rollout").selectedIndex += by;
  showRollout();
}

function startTokens() {
  const tokenAt = (event) => event.target.closest("#answer .t");
  $("answer").addEventListener("pointerover", (event) => {
    const node = tokenAt(event);
    if (node) describe(Number(node.dataset.index));
  });
  $("answer").addEventListener("pointerleave", () => shown.tokens.length && describe(selected));
  $("answer").addEventListener("click", (event) => {
    const node = tokenAt(event);
    if (node) select(Number(node.dataset.index), true);
  });
  $("answer").addEventListener("keydown", (event) => {
    const marked = shown.candidates.filter((i) => i < shown.tokens.length).sort((a, b) => a - b);
    const to = {
      ArrowRight: selected + 1,
      ArrowLeft: selected - 1,
      ArrowDown: marked.find((i) => i > selected),
      ArrowUp: marked.findLast((i) => i < selected),
      Home: 0,
      End: shown.tokens.length - 1,
    }[event.key];
    if (!(event.key in { ArrowRight: 1, ArrowLeft: 1, ArrowDown: 1, ArrowUp: 1, Home: 1, End: 1 })) return;
    event.preventDefault();
    if (to >= 0 && to < shown.tokens.length) select(to, true);
  });

  $("run").addEventListener("change", showRun);
  $("step").addEventListener("input", showStep);
  $("rollout").addEventListener("change", showRollout);
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("save").addEventListener("click", saveLabels);
  $("by-contrast").addEventListener("change", () => {
    $("key-gap").hidden = $("by-contrast").checked;
    $("key-contrast").hidden = !$("by-contrast").checked;
    const at = selected;
    showRollout();
    if (shown.tokens.length) select(at);
  });

  const withRollouts = new Set(data.rollouts.map((rollout) => rollout.run));
  $("run").replaceChildren(...data.runs.flatMap((name, i) => (withRollouts.has(i) ? [new Option(name, i)] : [])));
  $("run-field").hidden = withRollouts.size < 2;
  $("scale-low").textContent = MINUS + data.scale;
  $("scale-high").textContent = "+" + data.scale;
  const any = (isSuch) => data.rollouts.some((one) => one.tokens.some((_, i) => isSuch(one, i)));
  $("by-contrast-field").hidden = !data.rollouts.some((rollout) => rollout.contrast);
  $("key-unwritten").hidden = !any((one, i) => one.unwritten.has(i));
  $("key-unknown").hidden = !any((one, i) => (one.student[i] === null || one.teacher[i] === null) && !one.unwritten.has(i));
  $("view").hidden = false;
  showRun();
  // Open on an answer from which something was learned.
  move(Math.max(0, ofStep().findIndex((rollout) => rollout.kept.length && data.texts[rollout.context].trim())));
}

if (data.rollouts.length) startTokens();

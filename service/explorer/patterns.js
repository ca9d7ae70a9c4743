// The view of patterns. What a pattern means the service says; here it is only spelled and drawn.

import { json } from "./api.js";
import { $, debounced, element, number, percent, say } from "./dom.js";
import { Mask } from "./mask.js";
import { plot } from "./plot.js";

const LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];
const START = "sinks:4+window:16+strided:16";
const ENDING = /@(bidirectional|causal)\s*$/;

let catalogue = null;
let mask = null;
let shown = null; // the service's last answer
let running = null;
const state = { spec: START, length: 128, part: null };

export async function start(parameters) {
  if (!mask) wire();
  catalogue ??= await json("v1/patterns").catch((error) => void trouble(error));
  if (!catalogue) return;
  fill();
  restore(parameters);
}

export function restore(parameters) {
  state.spec = parameters.get("spec") ?? state.spec;
  const length = Number(parameters.get("n"));
  if (Number.isInteger(length) && length >= 1) state.length = Math.min(length, LENGTHS.at(-1));
  const at = (parameters.get("at") ?? "").split(",").map(Number);
  state.part = at.length === 3 && at.every(Number.isFinite) ? { row: at[0], column: at[1], span: at[2] } : null;
  mask.limit(state.length, state.part);
  $("spec").value = state.spec;
  look();
}

export function enter() {
  if (shown) link();
}

export function repaint() {
  mask?.draw();
}

function wire() {
  mask = new Mask($("mask"), () => {
    state.part = mask.whole ? null : mask.part;
    mask.draw();
    lookSoon();
  });
  $("spec").addEventListener("input", () => change($("spec").value, lookSoon));
  $("spec").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    change($("spec").value);
  });
  $("length").addEventListener("change", () => resize(Number($("length").value)));
  $("preset").addEventListener("change", () => {
    const preset = catalogue.presets.find((one) => one.name === $("preset").value);
    if (!preset) return;
    resize(preset.length, false);
    change(preset.spec);
  });
  for (const input of document.querySelectorAll("#direction input")) {
    input.addEventListener("change", () => {
      const ending = input.value === "bidirectional" ? "@bidirectional" : "";
      change((shown?.spec ?? state.spec).replace(ENDING, "") + ending);
    });
  }
  $("zoom-in").addEventListener("click", () => mask.zoom(0.5));
  $("zoom-out").addEventListener("click", () => mask.zoom(2));
  $("zoom-all").addEventListener("click", () => mask.all());
  $("png").addEventListener("click", save);
  $("copy").addEventListener("click", async () => {
    link();
    await navigator.clipboard.writeText(location.href).then(
      () => say("The link is copied."),
      () => say("Copy the address of this page: it is the link."),
    );
  });
  $("task").addEventListener("change", () => {
    $("grid-field").hidden = !["image", "video"].includes($("task").value);
  });
  $("task-use").addEventListener("click", suggest);
}

function fill() {
  $("preset").replaceChildren(element("option", { value: "" }, "\u2013"), ...catalogue.presets.map((one) => element("option", { value: one.name }, one.name)));
  $("task").replaceChildren(...catalogue.tasks.map((task) => element("option", { value: task }, task)));
  $("chips").replaceChildren(...catalogue.primitives.map((kind) => element("button", {
    type: "button", className: "chip", colour: kind.name, title: `${kind.form}. ${kind.description}`,
    "data-name": kind.name, "aria-pressed": "false", onclick: () => toggle(kind),
  }, kind.name)));
}

async function suggest() {
  const asked = new URLSearchParams({ task: $("task").value, tokens: state.length, causal: shown?.causal ?? true });
  if (!$("grid-field").hidden) {
    asked.set("rows", $("grid-rows").value);
    asked.set("cols", $("grid-cols").value);
  }
  try {
    change((await json(`v1/patterns/auto?${asked}`)).spec);
  } catch (error) {
    trouble(error);
  }
}

function resize(length, now = true) {
  state.length = length;
  state.part = null;
  mask.limit(length);
  if (now) look();
}

function change(spec, how = look) {
  state.spec = spec;
  $("spec").value = spec;
  how();
}

function toggle(kind) {
  const terms = shown?.terms ?? [];
  const on = (shown?.primitives ?? []).some((one) => one.name === kind.name);
  if (!on) return change(shown.terms ? spelled([...terms, { operator: "+", spec: kind.example }]) : joined(`+${kind.example}`));
  const left = terms.filter((term) => term.name !== kind.name);
  if (!left.length) return say("A pattern has one primitive at the least.");
  return change(spelled(left));
}

const ending = () => (shown?.causal === false ? "@bidirectional" : "");
const spelled = (terms) => terms.map((term, at) => (at ? term.operator || "+" : "") + term.spec).join("") + ending();
const joined = (more) => shown.spec.replace(ENDING, "") + more + ending();

// -- asking ------------------------------------------------------------------------------------

const lookSoon = debounced(() => look(), 120);

async function look() {
  running?.abort();
  const mine = (running = new AbortController());
  $("mask").setAttribute("aria-busy", "true");
  const { row, column, span } = mask.part;
  const end = (at) => Math.min(state.length, at + span);
  try {
    const answer = await json("v1/patterns", {
      body: { spec: state.spec, length: state.length, rows: [row, end(row)], columns: [column, end(column)], cells: 256 },
      signal: mine.signal,
    });
    if (mine === running) show(answer);
  } catch (error) {
    if (error.name !== "AbortError" && mine === running) trouble(error);
  }
}

function trouble(error) {
  $("spec-error").textContent = error.message;
  $("spec-error").hidden = false;
  $("spec").setAttribute("aria-invalid", "true");
  $("mask").setAttribute("aria-busy", "false");
}

function link() {
  const parameters = new URLSearchParams({ spec: state.spec, n: state.length });
  if (state.part) parameters.set("at", `${state.part.row},${state.part.column},${state.part.span}`);
  // Read by people, too: what needs no escape has none.
  const text = parameters.toString().replace(/%3A/g, ":").replace(/%2C/g, ",").replace(/%40/g, "@");
  history.replaceState(null, "", `#patterns?${text}`);
}

// -- showing -----------------------------------------------------------------------------------

function show(answer) {
  shown = answer;
  $("spec-error").hidden = true;
  $("spec").removeAttribute("aria-invalid");
  mask.take(answer);
  mask.point(mask.cursor);
  choices(answer);
  terms(answer);
  figures(answer);
  const { row, column, span } = mask.part;
  const last = (at) => number(Math.min(state.length, at + span) - 1);
  const cells = answer.mask.step > 1 ? `, ${answer.mask.step} \u00d7 ${answer.mask.step} pairs a cell` : "";
  $("place").textContent = `queries ${number(row)}\u2013${last(row)}, keys ${number(column)}\u2013${last(column)}${cells}`;
  if ($("panel-patterns").hidden === false) link();
  $("mask").dataset.spec = answer.spec;
  $("mask").dataset.part = answer.mask.rows.concat(answer.mask.columns).join();
  $("mask").setAttribute("aria-busy", "false");
}

function choices(answer) {
  const names = new Set(answer.primitives.map((one) => one.name));
  for (const chip of $("chips").children) {
    const on = names.has(chip.dataset.name);
    chip.setAttribute("aria-pressed", on);
    chip.disabled = on && !answer.terms; // behind parentheses there is no simple way to leave it out
  }
  $("nested").hidden = Boolean(answer.terms);
  document.querySelector(`#direction [value=${answer.causal ? "causal" : "bidirectional"}]`).checked = true;
  const lengths = LENGTHS.includes(state.length) ? LENGTHS : [...LENGTHS, state.length].sort((a, b) => a - b);
  $("length").replaceChildren(...lengths.map((n) => element("option", { value: n, selected: n === state.length }, number(n))));
  const preset = catalogue.presets.find((one) => one.spec === answer.spec);
  $("preset").value = preset?.name ?? "";
  const kinds = [...new Set(answer.primitives.map((one) => one.name))];
  $("legend").replaceChildren(...kinds.map((name) => element("li", { colour: name }, name)));
}

function terms(answer) {
  const list = answer.terms ?? [];
  const shape = list.map((term) => term.operator + term.name).join();
  const numbersOf = (term) => catalogue.primitives.find((one) => one.name === term.name).parameters;
  if ($("terms").dataset.shape !== shape) {
    $("terms").dataset.shape = shape;
    $("terms").replaceChildren(...list.map((term, at) => panel(term, at, numbersOf(term))));
  }
  // The inputs stay where they are, and so does the focus.
  list.forEach((term, at) => term.numbers.forEach((value, which) => {
    for (const input of document.querySelectorAll(`[data-number="${at}.${which}"]`)) {
      const slider = input.type === "range";
      if (slider) input.max = Math.max(reach(state.length), Math.log2(value + 1));
      if (document.activeElement !== input || slider) input.value = slider ? Math.log2(value + 1) : value;
    }
  }));
}

const reach = (length) => Math.log2(length + 1);

function panel(term, at, parameters) {
  const head = element("div", { className: "head" });
  if (at) {
    const operator = element("select", { "aria-label": `How ${term.name} joins what stands before it` },
      element("option", { value: "+", selected: term.operator === "+" }, "+ union"),
      element("option", { value: "&", selected: term.operator === "&" }, "& intersection"));
    operator.addEventListener("change", () => tune(at, (one) => ({ ...one, operator: operator.value })));
    head.append(operator);
  }
  head.append(element("span", {}, term.name));
  const rows = parameters.map((parameter, which) => {
    const id = `number-${at}-${which}`;
    const slider = element("input", { type: "range", min: 0, max: 12, step: "any", "data-number": `${at}.${which}`, "aria-label": `${parameter.name} of ${term.name}` });
    const exact = element("input", { type: "number", id, min: parameter.least, max: parameter.most, "data-number": `${at}.${which}` });
    const set = (value) => {
      const whole = Math.max(parameter.least, Math.min(parameter.most, Math.round(value)));
      if (!Number.isFinite(whole)) return;
      for (const input of [slider, exact]) if (document.activeElement !== input) input.value = input === slider ? Math.log2(whole + 1) : whole;
      tune(at, (one) => {
        const numbers = one.numbers.with(which, whole);
        return { ...one, numbers, spec: `${one.name}:${numbers.join(",")}` };
      }, lookSoon);
    };
    slider.addEventListener("input", () => set(2 ** Number(slider.value) - 1));
    slider.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const value = Number(exact.value) + step;
      slider.value = Math.log2(value + 1);
      exact.value = value;
      set(value);
    });
    exact.addEventListener("input", () => set(exact.valueAsNumber));
    return element("div", { className: "number" }, element("label", { for: id }, parameter.name), slider, exact);
  });
  return element("div", { className: "term", colour: term.name, role: "group", "aria-label": term.name }, head, ...rows);
}

function tune(at, how, then = look) {
  if (!shown?.terms) return;
  shown.terms[at] = how(shown.terms[at]);
  change(spelled(shown.terms), then);
}

function figures(answer) {
  const card = (name, value, note, id, wide) => element("div", { className: wide ? "wide" : "" },
    element("dt", {}, name), element("dd", { id }, value, ...(note ? [element("small", {}, note)] : [])));
  $("figures").replaceChildren(
    card("Sparsity", percent(answer.sparsity), `${percent(answer.density)} is read`, "sparsity"),
    card("Keys per query", number(answer.keys_mean, 1), `at most ${number(answer.keys_most, answer.keys_most % 1 ? 1 : 0)}`, "keys-mean"),
    card("Pairs", number(answer.pairs), `of ${number(answer.visible)}`, "pairs"),
    card("Recognised as", answer.recognised ?? "no known model", answer.keeps_previous ? "keeps the previous key" : "does not keep the previous key", "recognised"),
    card("Complexity", answer.complexity, answer.formula, "complexity", true),
  );
  const { step, values } = answer.keys_per_query;
  $("keys-plot").replaceChildren(plot(values, {
    label: `Keys per query, from query 0 to ${answer.length - 1}, ${step > 1 ? `mean of ${step} queries each, ` : ""}at most ${number(Math.max(...values))}`,
    from: "query 0", to: number(answer.length - 1), height: 130,
  }));
  $("summary").textContent = answer.summary;
}

function save() {
  $("mask").toBlob((blob) => {
    const place = URL.createObjectURL(blob);
    const name = (shown?.spec ?? "pattern").replace(/[^a-z0-9_]+/gi, "-");
    element("a", { href: place, download: `${name}-${state.length}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(place), 1000);
  });
}

// Inside an answer: the same question under several policies, and what each token attended to.

import { events, json } from "./api.js";
import { $, element, number, percent, say } from "./dom.js";
import { massOf, Place } from "./looks.js";

const PASSAGES = 8;
const MARKED = 40; // sentences whose tokens are marked one by one
let model = null;
let place = null;
let running = null;
let columns = [];
let chosen = null;
let facts = [];
let due = false;
let turn = false; // whether the document is to turn to the heaviest passage

export function start() {
  if (model === null) wire();
  json("v1/models").then((served) => (model = served.data[0].id), (error) => fail(error));
}

export function repaint() {
  for (const column of columns) strip(column);
}

function wire() {
  model = "";
  $("sample").addEventListener("click", sample);
  $("file").addEventListener("change", async () => {
    const file = $("file").files[0];
    if (!file) return;
    if (file.size > 8 << 20) return fail(new Error("The file is larger than 8 MiB."));
    put(await file.text(), []);
  });
  $("document").addEventListener("dragover", (event) => event.preventDefault());
  $("document").addEventListener("drop", async (event) => {
    const file = event.dataTransfer.files[0];
    if (!file) return;
    event.preventDefault();
    put(await file.text(), []);
  });
  $("document").addEventListener("input", () => sized());
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("stop").addEventListener("click", () => running?.abort());
  for (const id of ["layer", "head", "hide"]) $(id).addEventListener("change", () => soon());
}

function fail(error) {
  $("ask-error").textContent = error.message;
}

function put(text, planted) {
  $("document").value = text;
  facts = planted;
  sized();
}

function sized() {
  $("size").textContent = `${number($("document").value.length)} characters`;
}

async function sample() {
  $("ask-error").textContent = "";
  const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  try {
    const made = await json(`v1/sample?tokens=${$("sample-size").value}&seed=${seed}`);
    put(made.text, made.facts);
    $("questions").replaceChildren(...made.questions.map((value) => element("option", { value })));
    $("question").value = made.questions[Math.floor(made.questions.length / 2)];
    say(`${made.facts.length} facts are planted; they are underlined once you ask.`);
  } catch (error) {
    fail(error);
  }
}

// -- asking ------------------------------------------------------------------------------------

async function ask() {
  running?.abort();
  $("ask-error").textContent = "";
  const text = $("document").value.trim(), question = $("question").value.trim();
  const policies = [...document.querySelectorAll("#policies input:checked")].map((input) => input.value);
  if (!text || !question) return fail(new Error("Give a document and a question first."));
  if (!policies.length) return fail(new Error("Choose a policy at the least."));
  const mine = (running = new AbortController());
  busy(true);
  try {
    const asked = await prompt(text, question, mine.signal);
    place = new Place(text, asked.text, asked.offsets);
    columns = policies.map((policy) => column(policy));
    $("columns").replaceChildren(...columns.map((one) => one.box));
    choose(columns[0]);
    read(text);
    $("inside").hidden = false;
    await Promise.all(columns.map((one) => stream(one, asked, mine.signal)));
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  } finally {
    if (running === mine) busy(false);
  }
}

function busy(on) {
  $("go").disabled = on;
  $("stop").hidden = !on;
  $("columns").setAttribute("aria-busy", on);
}

// What the model reads: a chat where the checkpoint has a template, else a plain question.
async function prompt(text, question, signal) {
  const messages = [{ role: "user", content: `${text}\n\n${question}` }];
  try {
    const told = await json("tokenize", { body: { messages, return_offsets: true }, signal });
    return { ...told, path: "v1/chat/completions", fields: { messages } };
  } catch (error) {
    if (error.param !== "messages") throw error;
    const plain = `${text}\n\nQuestion: ${question}\nAnswer:`;
    const told = await json("tokenize", { body: { prompt: plain, return_offsets: true }, signal });
    return { ...told, path: "v1/completions", fields: { prompt: plain } };
  }
}

async function stream(one, asked, signal) {
  const sparsity = { policy: one.policy, explain: "tokens" };
  if (one.policy === "fixed") Object.assign(sparsity, { pattern: $("fixed-pattern").value, prefill: "dense" });
  const body = {
    ...asked.fields, model, sparsity, stream: true, temperature: 0,
    max_tokens: Number($("most").value), stream_options: { include_usage: true },
  };
  const began = performance.now();
  try {
    for await (const chunk of events(asked.path, { body, signal })) {
      for (const choice of chunk.choices) {
        const text = choice.delta?.content ?? choice.text ?? "";
        if (choice.attended) token(one, text, choice.attended, began);
        else if (text && one.tokens.length) one.tokens.at(-1).button.append(text);
      }
      if (chunk.sparsity) done(one, chunk, began);
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    one.note.className = stopped ? "quiet" : "error";
    // A pattern's mark below it, on lines of its own, needs a fixed pitch: the sentence names its place.
    one.note.textContent = stopped ? "stopped" : error.message.split("\n")[0];
  }
}

// -- columns -----------------------------------------------------------------------------------

function column(policy) {
  const one = { policy, tokens: [], picked: null };
  one.note = element("span", { className: "quiet", role: "status" }, "reading the document \u2026");
  one.pick = element("button", { type: "button", "aria-pressed": "false", onclick: () => choose(one) }, "Show");
  one.answer = element("p", { className: "answer", "aria-live": "polite" });
  one.numbers = element("div", { className: "numbers" });
  one.canvas = element("canvas", { className: "strip", width: 600, height: 26, role: "img", "aria-label": `Where ${policy} looked in the document` });
  one.box = element("article", { className: "column", "data-policy": policy },
    element("header", {}, element("h2", {}, policy, ...(policy === "fixed" ? [element("small", {}, " the document itself is read densely")] : [])), one.pick), one.answer, one.numbers, one.canvas, one.note);
  return one;
}

function token(one, text, look, began) {
  // No button: a line of text may not break within one.
  const button = element("span", { role: "button", tabIndex: 0, className: "token", "aria-pressed": "false", onclick: () => pick(one, button) }, text);
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pick(one, button);
  });
  one.tokens.push({ button, look });
  one.answer.append(button);
  one.note.textContent = `${one.tokens.length} tokens, first after ${number(((one.first ??= performance.now()) - began) / 1000, 1)} s`;
  soon();
}

function done(one, chunk, began) {
  const { density, coverage, keys_attended, fallbacks } = chunk.sparsity;
  const fallen = Object.entries(fallbacks).filter(([reason]) => reason !== "requested").map(([reason, n]) => `${reason} ${n}`).join(", ");
  const figure = (name, value) => element("span", {}, element("b", {}, value), ` ${name}`);
  one.numbers.replaceChildren(
    figure("density", percent(density)), figure("coverage", coverage === null ? "unknown" : percent(coverage)),
    figure("keys a token", number(keys_attended)), figure("seconds", number((performance.now() - began) / 1000, 1)),
    ...(fallen ? [figure("fell back", fallen)] : []),
  );
  one.note.textContent = `${one.tokens.length} tokens; choose one to see what it alone attended to`;
  one.box.dataset.done = "true";
  if (one === chosen) turn = true;
  soon();
}

function choose(one) {
  chosen = one;
  turn = true;
  for (const other of columns) {
    other.box.classList.toggle("chosen", other === one);
    other.pick.setAttribute("aria-pressed", other === one);
    other.pick.textContent = other === one ? "Shown" : "Show";
  }
  soon();
}

function pick(one, button) {
  const was = one.picked === button;
  one.picked = was ? null : button;
  for (const other of one.tokens) other.button.setAttribute("aria-pressed", other.button === one.picked);
  choose(one);
}

// -- what was attended to ----------------------------------------------------------------------

function soon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    light();
  });
}

const filter = () => {
  const of = (id) => ($(id).value === "" ? null : Number($(id).value));
  return { layer: of("layer"), head: of("head"), hide: $("hide").checked };
};

function looksOf(one) {
  const some = one.picked ? one.tokens.filter((other) => other.button === one.picked) : one.tokens;
  return some.map((other) => other.look);
}

function read(text) {
  $("text").replaceChildren(...place.sentences.map(([from, to]) => {
    const fact = facts.some((one) => one.start < to && one.end > from && text.slice(one.start, one.end).includes(one.value));
    return element("span", { className: fact ? "fact" : "" }, text.slice(from, to));
  }));
}

function light() {
  if (!chosen || !place) return;
  options();
  const found = massOf(looksOf(chosen), filter());
  const bySentence = new Map();
  for (const [position, mass] of found.mass) {
    const characters = place.characters(position);
    if (!characters) continue;
    const sentence = place.sentence(characters[0]);
    const entry = bySentence.get(sentence) ?? { mass: 0, marks: [] };
    entry.mass += mass;
    entry.marks.push([...characters, mass]);
    bySentence.set(sentence, entry);
  }
  const ranked = [...bySentence].sort((a, b) => b[1].mass - a[1].mass);
  const most = ranked[0]?.[1].mass ?? 1;
  const spans = $("text").children;
  for (const span of $("text").querySelectorAll(".lit")) plain(span);
  for (const [sentence, entry] of ranked.slice(0, MARKED)) {
    if (entry.mass > 0.02 * most) lit(spans[sentence], sentence, entry, most);
  }
  $("passages").replaceChildren(...ranked.slice(0, PASSAGES).map(([sentence, entry]) => element("li", {},
    element("button", { type: "button", onclick: () => turnTo(spans[sentence]) },
      element("b", {}, percent(entry.mass)), place.document.slice(...place.sentences[sentence]).trim().slice(0, 160)))));
  const what = chosen.picked ? `the token \u201c${chosen.picked.textContent.trim()}\u201d` : `all ${chosen.tokens.length} tokens`;
  $("view").textContent = `${chosen.policy}, ${what}: ${number(found.keys)} keys, density ${percent(found.density)}, coverage ${percent(found.coverage)}`;
  for (const column of columns) strip(column);
  if (turn && ranked.length) {
    turnTo(spans[ranked[0][0]]);
    turn = false;
  }
}

// Within the document's own box, so that the page stays where it is.
function turnTo(span) {
  const box = $("text");
  box.scrollTop += span.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
}

function plain(span) {
  span.classList.remove("lit");
  span.textContent = span.textContent;
}

function lit(span, sentence, entry, most) {
  span.classList.add("lit");
  span.style.setProperty("--mass", (0.08 + (0.25 * entry.mass) / most).toFixed(3));
  const [from, to] = place.sentences[sentence];
  const highest = Math.max(...entry.marks.map((mark) => mark[2]));
  const parts = [];
  let at = from;
  for (const [begin, end, mass] of entry.marks.sort((a, b) => a[0] - b[0])) {
    if (begin < at || mass < 0.05 * highest) continue;
    const mark = element("mark", {}, place.document.slice(begin, Math.min(end, to)));
    mark.style.setProperty("--mass", ((0.7 * mass) / highest).toFixed(3));
    parts.push(place.document.slice(at, begin), mark);
    at = Math.min(end, to);
  }
  span.replaceChildren(...parts, place.document.slice(at, to));
}

function options() {
  const looks = columns.flatMap((one) => one.tokens.slice(0, 1).map((other) => other.look));
  if (!looks.length) return;
  for (const id of ["layer", "head"]) {
    const numbers = [...new Set(looks.flatMap((look) => look.heads.map((one) => one[id])))].sort((a, b) => a - b);
    if ($(id).childElementCount === numbers.length + 1) continue;
    $(id).replaceChildren(element("option", { value: "" }, "all"), ...numbers.map((n) => element("option", { value: n }, `${n}`)));
  }
}

// The document from left to right: how much of it was attended to where.
function strip(one) {
  const { width, height } = one.canvas;
  const context = one.canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  if (!place || !one.tokens.length) return;
  const bins = new Float64Array(150);
  for (const [position, mass] of massOf(looksOf(one), filter()).mass) {
    const characters = place.characters(position);
    if (characters) bins[Math.floor((characters[0] / place.document.length) * bins.length)] += mass;
  }
  const most = Math.max(...bins, 1e-9);
  const style = getComputedStyle(document.documentElement);
  for (const fact of facts) {
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect((fact.start / place.document.length) * width - 1, 0, 3, height);
  }
  context.fillStyle = `rgb(${style.getPropertyValue("--lit")})`;
  bins.forEach((mass, at) => {
    const tall = Math.round((height - 2) * (mass / most));
    context.fillRect((at * width) / bins.length, height - tall, width / bins.length - 1, tall);
  });
}

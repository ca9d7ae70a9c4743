// The service's own figures, read from its /metrics and shown over the last minutes.

import { request } from "./api.js";
import { $, element, number, percent, short } from "./dom.js";
import { plot } from "./plot.js";

const EVERY = 2000; // milliseconds
const KEPT = 90;
const LINE = /^(saccade_\w+)(?:\{(.*)\})? (\S+)$/;
const history = [];
let timer = null;

const TILES = [
  { id: "generated", name: "Tokens generated a second", value: (a, b) => rate(a, b, "generation_tokens_total"), told: (x) => number(x, 1) },
  { id: "prompt", name: "Prompt tokens a second", value: (a, b) => rate(a, b, "prompt_tokens_total"), told: (x) => number(x, 0) },
  { id: "density", name: "Density", value: (a, b) => mean(a, b, "attention_density"), told: percent },
  { id: "coverage", name: "Coverage, as estimated", value: (a, b) => mean(a, b, "attention_coverage"), told: percent, most: 1 },
  { id: "running", name: "Requests running", value: (_, b) => total(b, "num_requests_running"), told: number },
  { id: "waiting", name: "Requests waiting", value: (_, b) => total(b, "num_requests_waiting"), told: number },
  { id: "kv", name: "KV cache in use", value: (_, b) => most(b, "kv_cache_usage_perc"), told: percent, most: 1 },
  { id: "fallback", name: "Tokens that fell back, a second", value: (a, b) => rate(a, b, "attention_fallback_total", unasked), told: (x) => number(x, 1) },
];

const unasked = (labels) => labels.reason !== "requested";

function parsed(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const found = LINE.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found;
    if (!series.has(name)) series.set(name, []);
    const named = Object.fromEntries([...(labels ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((pair) => [pair[1], pair[2]]));
    series.get(name).push({ labels: named, value: Number(value) });
  }
  return series;
}

function total(scrape, name, some = () => true) {
  return (scrape.series.get(`saccade_${name}`) ?? []).filter((one) => some(one.labels)).reduce((sum, one) => sum + one.value, 0);
}

// Of the replicas' values: where one's cache is full its requests wait.
function most(scrape, name) {
  return Math.max(0, ...(scrape.series.get(`saccade_${name}`) ?? []).map((one) => one.value));
}

function rate(before, after, name, some) {
  return Math.max(0, total(after, name, some) - total(before, name, some)) / ((after.at - before.at) / 1000);
}

// Of what was observed between two scrapes; null where nothing was.
function mean(before, after, name) {
  const count = total(after, `${name}_count`) - total(before, `${name}_count`);
  return count > 0 ? (total(after, `${name}_sum`) - total(before, `${name}_sum`)) / count : null;
}

export function start() {
  if ($("live").childElementCount) return;
  $("live").append(...TILES.map((tile) => element("article", { className: "tile" },
    element("h2", {}, tile.name), element("p", { id: `live-${tile.id}` }, "\u2013"), element("div", { id: `live-${tile.id}-plot` }))));
}

export function enter() {
  if (timer === null) scrape();
}

export function leave() {
  clearTimeout(timer);
  timer = null;
}

async function scrape() {
  timer = setTimeout(scrape, EVERY);
  if (document.hidden) return;
  try {
    const text = await (await request("metrics")).text();
    history.push({ at: performance.now(), series: parsed(text) });
    if (history.length > KEPT + 1) history.shift();
    $("live-note").textContent = `Read from this service's /metrics every ${EVERY / 1000} seconds while this page is shown.`;
    draw();
  } catch (error) {
    $("live-note").textContent = `/metrics does not answer: ${error.message}`;
  }
}

function draw() {
  const latest = history.at(-1);
  const pairs = history.slice(1).map((after, at) => [history[at], after]);
  for (const tile of TILES) {
    const values = pairs.map(([before, after]) => tile.value(before, after));
    const known = values.filter((value) => value !== null);
    $(`live-${tile.id}`).textContent = known.length ? tile.told(known.at(-1)) : "\u2013";
    const seconds = Math.round((latest.at - history[0].at) / 1000);
    $(`live-${tile.id}-plot`).replaceChildren(plot(known, {
      label: `${tile.name}, ${known.length ? `now ${tile.told(known.at(-1))}` : "nothing yet"}`,
      from: seconds ? `${seconds} s ago` : "", to: "now", height: 90, most: tile.most ?? 0,
      format: tile.told === percent ? (x) => `${short(100 * x)}%` : short,
    }));
  }
  const rows = (latest.series.get("saccade_attention_fallback_total") ?? []).map(({ labels, value }) => element("tr", {},
    element("td", {}, labels.reason), element("td", {}, labels.to), element("td", { className: "number" }, number(value))));
  $("fallbacks").replaceChildren(...rows);
}

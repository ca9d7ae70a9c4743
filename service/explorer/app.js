// Views, colours, the API key: what surrounds the three views.

import * as answer from "./answer.js";
import { json, onKeyWanted, useKey } from "./api.js";
import { $ } from "./dom.js";
import * as live from "./live.js";
import * as patterns from "./patterns.js";

const VIEWS = { patterns, answer, live };
const THEMES = ["auto", "light", "dark"];
const tabs = [...document.querySelectorAll("[role=tab]")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const started = new Set();
let theme = THEMES.includes(stored("saccade-theme")) ? stored("saccade-theme") : "auto";

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // storage may be forbidden: then the choice lasts as long as the page
  }
}

function paint() {
  const shown = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  document.documentElement.dataset.theme = shown;
  const names = { auto: "Auto", light: "Light", dark: "Dark" };
  $("theme").textContent = names[theme];
  $("theme").title = `Colours: ${names[theme]}`;
  $("theme").setAttribute("aria-label", $("theme").title);
  for (const view of started) VIEWS[view].repaint?.();
}

async function show(view, focus = false) {
  for (const tab of tabs) {
    const chosen = tab.dataset.view === view;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(`panel-${tab.dataset.view}`).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  for (const other of started) if (other !== view) VIEWS[other].leave?.();
  const parameters = new URLSearchParams(location.hash.split("?")[1] ?? "");
  if (!started.has(view)) {
    started.add(view);
    await VIEWS[view].start(parameters);
  }
  VIEWS[view].enter?.();
}

const asked = () => {
  const view = location.hash.slice(1).split("?")[0];
  return view in VIEWS ? view : "patterns";
};

for (const tab of tabs) {
  tab.addEventListener("click", () => {
    history.replaceState(null, "", `#${tab.dataset.view}`);
    show(tab.dataset.view);
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    history.replaceState(null, "", `#${next.dataset.view}`);
    show(next.dataset.view, true);
    event.preventDefault();
  });
}

$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the state that links share
  $("main").focus();
});
$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try {
    localStorage.setItem("saccade-theme", theme);
  } catch {
    // As above.
  }
  paint();
});
dark.addEventListener("change", paint);
// A link that was followed or typed within the page.
addEventListener("hashchange", () => {
  const view = asked();
  if (started.has(view)) VIEWS[view].restore?.(new URLSearchParams(location.hash.split("?")[1] ?? ""));
  show(view);
});

onKeyWanted((wrong) => {
  $("key-form").hidden = false;
  $("key-error").textContent = wrong ? "The service refused this key." : "";
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key-form").hidden = true;
  const view = asked();
  started.delete(view);
  begin();
});

async function begin() {
  paint();
  await show(asked());
  const served = await json("v1/models").catch(() => null);
  $("model").textContent = served?.data[0].id ?? "";
}

begin();

// Asks the daemon for its picture again and again, and shows it; says so when it does not answer.
import { Chart } from "./charts.js";
import { count, perSecond, rate, time } from "./format.js";
import { ClusterMap } from "./map.js";
import { showFailures, showLive, showTiles } from "./tables.js";

const EVERY_MS = 1000, SLOWER_MS = 2000, MANY_AGENTS = 500, LATE_MS = 4000, SPAN_S = 600;

const $ = (id) => document.getElementById(id);
const map = new ClusterMap($("map"), $("tip"));
const charts = [
  new Chart($("throughput"), [{ name: "all links", column: 1, colour: 1 }], (v) => rate(v ?? 0)),
  new Chart($("latency"), [{ name: "p50", column: 4, colour: 1 }, { name: "p95", column: 5, colour: 2 }, { name: "p99", column: 6, colour: 3 }], time),
  new Chart($("rates"), [{ name: "handoffs", column: 2, colour: 1 }, { name: "errors", column: 3, colour: 3 }], (v) => perSecond(v ?? 0)),
];
let answeredAt = null, epoch = null, older = [], newest = [];

/** What was drawn before a daemon's restart stays, left of what the next one knows. */
function joined({ epoch: now, points }) {
  if (epoch !== null && now !== epoch) older = older.concat(newest);
  epoch = now;
  newest = points;
  const first = points[0]?.[0] ?? Infinity, last = points[points.length - 1]?.[0] ?? 0;
  older = older.filter((point) => point[0] < first && point[0] > last - SPAN_S);
  return older.concat(points);
}

function show(picture) {
  const points = joined(picture);
  showTiles($("tiles"), picture);
  map.show(picture);
  for (const chart of charts) chart.show(points);
  showLive($("live"), picture);
  showFailures($("failures"), picture);
  $("summary").textContent = `${count(picture.served)} requests answered, ${picture.secured ? "keys required" : "without keys: this machine only"}`;
  state(picture.draining ? "drain" : "up", picture.draining ? "draining" : "live");
  document.body.classList.remove("stale");
  $("trouble").hidden = true;
}

function state(kind, words) {
  $("status").dataset.state = kind;
  $("status").textContent = words;
}

function missing() {
  document.body.classList.add("stale");
  state("down", "no answer");
  const since = answeredAt === null ? "" : ` since ${new Date(answeredAt).toLocaleTimeString()}`;
  $("trouble").textContent = `The daemon has not answered${since}. ${answeredAt === null ? "" : "What it said last is shown. "}Handoffs between agents that know each other go on without it; this page tries again every second.`;
  $("trouble").hidden = false;
}

async function turn() {
  let pause = EVERY_MS;
  try {
    const answer = await fetch("api/state", { signal: AbortSignal.timeout(LATE_MS), cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const picture = await answer.json();
    answeredAt = Date.now();
    show(picture);
    if (picture.agents.length > MANY_AGENTS) pause = SLOWER_MS;
  } catch (error) {
    console.info("kvferry: no picture", error);
    missing();
  }
  setTimeout(turn, pause);
}

const THEMES = ["system", "light", "dark"];
function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `theme: ${theme}`;
  try {
    localStorage.setItem("kvferry-theme", theme);
  } catch {
    return; // a browser that keeps nothing: the choice lasts as long as the page
  }
}
function savedTheme() {
  try {
    return localStorage.getItem("kvferry-theme");
  } catch {
    return null;
  }
}
let theme = THEMES.includes(savedTheme()) ? savedTheme() : "system";
setTheme(theme);
$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  setTheme(theme);
});
turn();

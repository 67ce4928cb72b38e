// Tiles and tables. Every word from the cluster goes in as text.
import { bytes, count, element, perSecond, rate, time } from "./format.js";

/** The figures of this moment. */
export function showTiles(section, picture) {
  const { agents, links, num_links: all, points, errors } = picture;
  const last = points[points.length - 1] ?? [0, 0, 0, 0, null, null, null];
  const recent = [...points].reverse().slice(0, 30).find((point) => point[4] !== null);
  const failed = Object.values(errors).reduce((sum, n) => sum + n, 0);
  // Both ends of a handoff tell of it: decode's word counts.
  const inflight = agents.reduce((sum, agent) => sum + (agent.role === "prefill" ? 0 : agent.inflight_nbytes), 0);
  const flowing = links.filter((link) => link.nbytes_per_s).length;
  const hosts = new Set(agents.map((agent) => agent.host)).size;
  const tiles = [
    ["agents", [count(agents.length), `on ${count(hosts)} host${hosts === 1 ? "" : "s"}`]],
    ["links", [count(all), flowing ? `${count(flowing)} busy` : ""]],
    ["throughput", rate(last[1])],
    ["handoffs", perSecond(last[2])],
    ["latency p50", time(recent?.[4])],
    ["latency p99", time(recent?.[6])],
    ["in flight", bytes(inflight)],
    ["errors", [count(failed), "since the start"], failed > 0],
  ];
  section.replaceChildren(...tiles.map(([name, [value, unit], bad = false]) => element("div", { class: `tile${bad ? " bad" : ""}`, "data-tile": name },
    element("span", { class: "quiet" }, name),
    element("b", {}, value, element("small", {}, unit)))));
}

/** The handoffs under way, oldest first. */
export function showLive(section, { live }) {
  fill(section, live.length ? table(["handoff", "prefill", "decode", "bytes", "for"], live.map((row) => [
    row.handoff, row.prefill || "waits for it", row.decode || "nobody has asked yet", row.nbytes ? bytes(row.nbytes).join(" ") : "–", time(row.age_s).join(" "),
  ]), 3) : none("No handoff is under way."));
}

/** How often which error came, and the last handoffs that failed. */
export function showFailures(section, { errors, failures }) {
  const kinds = Object.entries(errors).sort(([a, m], [b, n]) => n - m || a.localeCompare(b));
  if (!kinds.length && !failures.length) return fill(section, none("No handoff has failed."));
  const counts = element("div", { class: "counts" }, ...kinds.map(([name, n]) => element("span", {}, name, element("b", {}, count(n)))));
  fill(section, counts, table(["handoff", "agent", "peer", "error", "ago"], failures.map((row) => [
    row.handoff, row.agent, row.peer || "–", row.error, time(row.age_s).join(" "),
  ]), 4));
}

function fill(section, ...parts) {
  const scrolled = section.querySelector(".rows")?.scrollTop ?? 0;
  section.replaceChildren(section.querySelector("h2"), ...parts);
  const rows = section.querySelector(".rows");
  if (rows) rows.scrollTop = scrolled;
}

function none(words) {
  return element("div", { class: "none" }, words);
}

/** A table whose columns from `numbers` on are numbers. */
function table(heads, rows, numbers) {
  const kind = (column) => (column >= numbers ? { class: "number" } : {});
  return element("div", { class: "rows" }, element("table", {},
    element("thead", {}, element("tr", {}, ...heads.map((head, i) => element("th", kind(i), head)))),
    element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell, i) => element("td", { ...kind(i), title: cell }, cell)))))));
}

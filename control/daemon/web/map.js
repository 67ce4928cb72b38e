// The cluster as a map: agents by role and host, and the links between them with their GB/s.
import { bytes, count, element, rate, shape } from "./format.js";
import { layOut } from "./layout.js";

const LABELS = 8; // rates that are written out: the busiest
const ROLE_WORDS = { prefill: "prefill", both: "prefill and decode", decode: "decode" };

export class ClusterMap {
  constructor(section, tip) {
    this.svg = section.querySelector("svg");
    this.note = section.querySelector("#map-note");
    this.tip = tip;
    this.picture = null;
    this.cells = new Map();
    new ResizeObserver(() => this.draw()).observe(section.querySelector(".canvas"));
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
  }

  show(picture) {
    this.picture = picture;
    this.draw();
  }

  draw() {
    if (!this.picture) return;
    const { clientWidth: width, clientHeight: height } = this.svg;
    const { agents, links, num_links: all } = this.picture;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!agents.length) {
      this.cells.clear();
      this.svg.replaceChildren(
        shape("text", { class: "empty", x: width / 2, y: height / 2 - 8 }, "No agents are registered."),
        shape("text", { class: "empty", x: width / 2, y: height / 2 + 14 }, "An Agent made with daemon=\"tcp://…\" appears here."));
      this.note.textContent = "";
      return;
    }
    const placed = layOut(agents, width, height);
    this.svg.replaceChildren(
      ...placed.columns.map((column) => shape("text", { class: "column", x: column.role === "decode" ? width : column.role === "both" ? column.x + column.width / 2 : 0, y: 11, "text-anchor": { prefill: "start", both: "middle", decode: "end" }[column.role] }, `${ROLE_WORDS[column.role]} · ${count(agents.filter((a) => a.role === column.role).length)}`)),
      this.links(links, placed),
      ...placed.hosts.flatMap((host) => this.host(host)),
      ...agents.map((agent) => this.agent(agent, placed)),
      this.labels(links, placed));
    const shown = links.length < all ? `the busiest ${count(links.length)} of ${count(all)} links` : `${count(all)} link${all === 1 ? "" : "s"}`;
    this.note.textContent = all ? shown : "no links yet";
    if (this.near) this.mark(this.near);
  }

  host({ name, x, y, width, box }) {
    const parts = box ? [shape("rect", { class: "box", rx: 3, ...box })] : [];
    if (name) parts.push(clipped(shape("text", { class: "host", x, y }), name, width));
    return parts;
  }

  agent(agent, placed) {
    const { x, y, width, height } = placed.agents.get(agent.name);
    const used = agent.num_blocks ? 1 - agent.free_blocks / agent.num_blocks : 0;
    const share = Math.min(1, Math.max(0, used));
    const cards = placed.mode === "cards";
    const state = `agent ${agent.role}${agent.state === "draining" ? " draining" : ""}${cards ? "" : " cell"}`;
    const group = shape("g", { class: state, "data-agent": agent.name });
    const rx = cards ? 6 : Math.min(2, width / 4);
    group.append(shape("rect", { class: "body", x, y, width, height, rx }));
    if (cards) {
      group.append(
        clipped(shape("text", { x: x + 9, y: y + 15 }), agent.name, width - 60),
        shape("text", { class: "detail", x: x + width - 9, y: y + 15, "text-anchor": "end" }, agent.handoffs ? `${count(agent.handoffs)} live` : ""),
        shape("rect", { class: "body", x: x + 9, y: y + 23, width: width - 18, height: 5, rx: 2.5 }),
        shape("rect", { class: "full", x: x + 9, y: y + 23, width: share * (width - 18), height: 5, rx: 2.5 }));
    } else {
      const full = Math.max(share, 0.12) * height;
      group.append(shape("rect", { class: "full", x, y: y + height - full, width, height: full, rx }));
    }
    this.cells.set(agent.name, agent);
    return group;
  }

  links(links, placed) {
    const group = shape("g", { class: "links" });
    // Many lines are thin and pale: where they lie close the map shows a cloud, and no single one.
    const busy = links.filter((link) => link.nbytes_per_s).length;
    const many = links.length > 60;
    group.style.setProperty("--busy", Math.min(0.85, 50 / (busy + 1)).toFixed(3));
    group.style.setProperty("--idle", Math.min(0.4, 30 / (links.length + 1)).toFixed(3));
    for (const link of links) {
      const path = route(placed.agents.get(link.source), placed.agents.get(link.target));
      if (!path) continue;
      const now = link.nbytes_per_s, most = Math.max(now, link.measured_nbytes_per_s);
      const wide = 1 + Math.max(0, Math.log10(Math.max(1, most) / 1e7)) * (many ? 0.25 : 1.3);
      group.append(shape("path", {
        class: `link${now ? " flows" : ""}`, d: path.d, "stroke-width": wide.toFixed(2),
        "data-source": link.source, "data-target": link.target,
      }));
    }
    return group;
  }

  labels(links, placed) {
    const group = shape("g", { class: "rates" });
    const shown = links.slice(0, placed.mode === "cards" ? LABELS : LABELS / 2);
    const taken = [];
    const boxes = placed.agents.size > 200 ? [] : [...placed.agents.values()];
    const free = ([x, y], wide) => taken.every(([a, b, w]) => Math.abs(a - x) > (w + wide) / 2 || Math.abs(b - y) > 20)
      && boxes.every((box) => x + wide / 2 < box.x || x - wide / 2 > box.x + box.width || y + 12 < box.y || y - 12 > box.y + box.height);
    for (const link of shown) {
      const path = route(placed.agents.get(link.source), placed.agents.get(link.target));
      const value = link.nbytes_per_s || link.measured_nbytes_per_s;
      if (!path || !value) continue;
      const text = rate(value).join(" ") + (link.nbytes_per_s ? "" : " when busy");
      const wide = 12 + 6.3 * text.length;
      const spot = [0.5, 0.4, 0.6, 0.3, 0.7].map(path.at).find((place) => free(place, wide));
      if (!spot) continue;
      taken.push([...spot, wide]);
      group.append(shape("g", { class: "rate" },
        shape("rect", { x: spot[0] - wide / 2, y: spot[1] - 9, width: wide, height: 18, rx: 9 }),
        shape("text", { x: spot[0], y: spot[1] + 4 }, text)));
    }
    return group;
  }

  hover(event) {
    const group = event.target.closest("[data-agent]");
    if (!group) return this.leave();
    const agent = this.cells.get(group.dataset.agent);
    if (!agent) return;
    this.mark(agent.name);
    const rows = [
      ["host", agent.host || "–"], ["role", agent.role + (agent.wanted_role ? ` → ${agent.wanted_role}` : "")],
      ["state", agent.state], ["handoffs", count(agent.handoffs)],
      ["in flight", bytes(agent.inflight_nbytes).join(" ")], ["queued", `${count(agent.queued_tokens)} tokens`],
      ["blocks free", `${count(agent.free_blocks)} of ${count(agent.num_blocks)}`],
      ["transports", agent.transports.join(", ") || "–"],
    ];
    if (agent.model) rows.splice(1, 0, ["model", agent.model]);
    if (agent.zone) rows.splice(1, 0, ["zone", agent.zone]);
    for (const link of this.picture.links.filter((l) => l.source === agent.name || l.target === agent.name).slice(0, 6)) {
      const out = link.source === agent.name;
      rows.push([`${out ? "→" : "←"} ${out ? link.target : link.source}`, rate(link.nbytes_per_s || link.measured_nbytes_per_s).join(" ")]);
    }
    this.tip.replaceChildren(element("b", {}, agent.name), element("dl", {}, ...rows.flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, v)])));
    this.tip.hidden = false;
    const { width, height } = this.tip.getBoundingClientRect();
    this.tip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
    this.tip.style.top = `${Math.min(event.clientY + 14, innerHeight - height - 8)}px`;
  }

  mark(name) {
    this.near = name;
    const group = this.svg.querySelector(".links");
    if (!group) return;
    group.classList.toggle("some", name !== null);
    for (const link of group.children) {
      link.classList.toggle("near", link.dataset.source === name || link.dataset.target === name);
    }
  }

  leave() {
    this.tip.hidden = true;
    this.mark(null);
  }
}

/** The curve from one agent to another, and the points along it; null if one of them is not there. */
function route(a, b) {
  if (!a || !b) return null;
  const right = a.x <= b.x;
  const x0 = right ? a.x + a.width : a.x, x3 = right ? b.x : b.x + b.width;
  const y0 = a.y + a.height / 2, y3 = b.y + b.height / 2;
  const bend = a.x === b.x ? 60 : (x3 - x0) / 2;
  const x1 = x0 + bend, x2 = a.x === b.x ? x3 + 60 : x3 - bend;
  const at = (t) => {
    const u = 1 - t;
    const mix = (p0, p1, p2, p3) => u * u * u * p0 + 3 * u * u * t * p1 + 3 * u * t * t * p2 + t * t * t * p3;
    return [mix(x0, x1, x2, x3), mix(y0, y0, y3, y3)];
  };
  return { d: `M${x0.toFixed(1)} ${y0.toFixed(1)}C${x1.toFixed(1)} ${y0.toFixed(1)} ${x2.toFixed(1)} ${y3.toFixed(1)} ${x3.toFixed(1)} ${y3.toFixed(1)}`, at };
}

/** A text that ends with an ellipsis where its room ends; 6.4 px a letter are about right. */
function clipped(text, words, width) {
  const letters = Math.max(1, Math.floor(width / 6.4));
  text.textContent = words.length > letters ? `${words.slice(0, letters - 1)}…` : words;
  return text;
}

// Where agents lie on the map: a column for each role, a box for each host, as large as fits.

const TITLE = 22, GAP = 8;
const CARD = { width: 168, height: 36, gap: 6, host: 18 };
// Cells shrink from 48 px until all fit.
const order = new Intl.Collator("en", { numeric: true });

/** Places of all agents and hosts: {mode, agents: Map(name → {x, y, width, height}), hosts, columns}. */
export function layOut(agents, width, height) {
  const roles = ["prefill", "both", "decode"].filter((role) => role !== "both" || agents.some((a) => a.role === role));
  const share = roles.length === 3 ? 0.28 : 0.38;
  const columns = roles.map((role, index) => ({
    role,
    x: index * (width - share * width) / (roles.length - 1),
    width: share * width,
    hosts: byHost(agents.filter((agent) => agent.role === role)),
  }));
  const cards = columns.every(({ hosts }) => cardsHeight(hosts) <= height - TITLE);
  let size = 48;
  if (!cards) while (size > 2 && !columns.every((column) => packed(column, size) <= height - TITLE)) size -= size > 12 ? 2 : 1;
  const placed = { mode: cards ? "cards" : "cells", size, agents: new Map(), hosts: [], columns };
  for (const column of columns) (cards ? placeCards : placeCells)(column, placed, size, height);
  return placed;
}

function byHost(agents) {
  const hosts = new Map();
  for (const agent of agents) {
    if (!hosts.has(agent.host)) hosts.set(agent.host, []);
    hosts.get(agent.host).push(agent);
  }
  const sorted = [...hosts].sort(([a], [b]) => order.compare(a, b));
  for (const [, members] of sorted) members.sort((a, b) => order.compare(a.name, b.name));
  return sorted;
}

function cardsHeight(hosts) {
  return hosts.reduce((sum, [, members]) => sum + CARD.host + members.length * (CARD.height + CARD.gap) + GAP, 0);
}

function placeCards(column, placed, _, height) {
  const width = Math.min(column.width, CARD.width * 1.5);
  const x = column.role === "prefill" ? column.x : column.x + column.width - width;
  let y = TITLE + Math.max(0, (height - TITLE - cardsHeight(column.hosts)) / 2);
  for (const [host, members] of column.hosts) {
    placed.hosts.push({ name: host, x, y: y + 12, width });
    y += CARD.host;
    for (const agent of members) {
      placed.agents.set(agent.name, { x, y, width, height: CARD.height });
      y += CARD.height + CARD.gap;
    }
    y += GAP;
  }
}

/** The boxes of a column's hosts, row by row: calls `put` for each, returns the height. */
function packed(column, size, put = () => {}) {
  const label = size >= 10 ? 14 : 0, pad = size >= 6 ? 3 : 1, space = size >= 6 ? 6 : 3;
  let x = 0, y = 0, row = 0;
  for (const [host, members] of column.hosts) {
    const across = Math.max(1, Math.min(Math.floor((column.width - 2 * pad) / size), members.length <= 8 ? Math.min(4, members.length) : Math.ceil(Math.sqrt(2 * members.length))));
    const width = across * size + 2 * pad;
    const height = Math.ceil(members.length / across) * size + 2 * pad + label;
    if (x && x + width > column.width) { x = 0; y += row + space; row = 0; }
    put(host, members, x, y, width, height, across, label, pad);
    x += width + space;
    row = Math.max(row, height);
  }
  return y + row;
}

function placeCells(column, placed, size, height) {
  const top = TITLE + Math.max(0, (height - TITLE - packed(column, size)) / 2);
  packed(column, size, (host, members, left, down, width, tall, across, label, pad) => {
    const x = column.x + left, y = top + down;
    placed.hosts.push({ name: label ? host : "", x, y: y + 10, width, box: { x, y: y + label, width, height: tall - label } });
    members.forEach((agent, index) => {
      placed.agents.set(agent.name, {
        x: x + pad + (index % across) * size,
        y: y + label + pad + Math.floor(index / across) * size,
        width: Math.max(1, size - 1),
        height: Math.max(1, size - 1),
      });
    });
  });
}

// Numbers for people, and elements whose text is never taken for markup.

/** An HTML element with attributes and children; strings become text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The same in SVG. */
export function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function scaled(value, units, base) {
  let unit = 0;
  while (value >= base && unit < units.length - 1) {
    value /= base;
    unit += 1;
  }
  return [value >= 100 || unit === 0 && Number.isInteger(value) ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2), units[unit]];
}

/** [number, unit] of bytes a second. */
export function rate(nbytes) {
  return nbytes ? scaled(nbytes, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"], 1000) : ["0", "B/s"];
}

/** [number, unit] of bytes. */
export function bytes(nbytes) {
  return scaled(nbytes, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
}

/** [number, unit] of seconds. */
export function time(seconds) {
  if (seconds === null || seconds === undefined) return ["–", ""];
  if (seconds < 1) return scaled(seconds * 1e6, ["µs", "ms"], 1000);
  return seconds < 120 ? [seconds.toFixed(seconds < 10 ? 2 : 0), "s"] : [(seconds / 60).toFixed(0), "min"];
}

/** A count a second. */
export function perSecond(value) {
  return [value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value ? value.toFixed(2) : "0", "/s"];
}

/** A whole number, with separators. */
export function count(value) {
  return value.toLocaleString("en");
}

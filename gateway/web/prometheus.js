// Prometheus's text format, as far as GET /metrics uses it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

// Returns [{name, labels, value}] of the samples whose name is in `names`, a Set: a page has thousands of others.
export function samples(page, names) {
  const found = [];
  for (const line of page.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const [, name, labels, value] = SAMPLE.exec(line) ?? [];
    if (!names.has(name)) continue;
    found.push({ name, labels: Object.fromEntries([...(labels ?? "").matchAll(LABEL)].map((match) => [match[1], match[2]])), value: Number(value) });
  }
  return found;
}

// Elements from JavaScript: the only way this page makes any, so nothing is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  attach: ["M3 5h18v14H3z", "m3 16 5-5 4 4 3-3 6 6", "M15.5 9.2h.01"],
  auto: ["M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z", "M12 3v18", "M14.6 4v16", "M17.2 5.4v13.2", "M19.6 8.4v7.2"],
  close: ["M6 6l12 12", "M18 6 6 18"],
  copy: ["M9 9h11v11H9z", "M15 9V4H4v11h5"],
  moon: ["M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z"],
  plus: ["M12 5v14", "M5 12h14"],
  retry: ["M20 11a8 8 0 1 0-2.3 6.3", "M20 5v6h-6"],
  send: ["M12 19V5", "m6 11 6-6 6 6"],
  settings: ["M4 7h10", "M18 7h2", "M16 5v4", "M4 17h2", "M10 17h10", "M8 15v4"],
  stop: ["M7 7h10v10H7z"],
  sun: ["M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z", "M12 2.5v2", "M12 19.5v2", "M2.5 12h2", "M19.5 12h2", "m5.3 5.3 1.4 1.4",
    "m17.3 17.3 1.4 1.4", "m18.7 5.3-1.4 1.4", "m6.7 17.3-1.4 1.4"],
  trash: ["M5 7h14", "M10 7V4h4v3", "M7 7l1 13h8l1-13"],
};

// Returns an element. A property that begins with "on" is a listener; null, undefined and false are left out.
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

// Returns an SVG element, by the same rules.
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function icon(name) {
  return s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, ICONS[name].map((d) => s("path", { d })));
}

// Returns a button with an icon. Without a visible text, `label` is what screen readers say and the tooltip.
export function button(label, { glyph = null, onlyIcon = false, kind = "", ...properties } = {}) {
  const named = onlyIcon ? { "aria-label": label, title: label } : {};
  const look = `button ${kind} ${onlyIcon ? "icon-only" : ""}`.trim();
  return h("button", { type: "button", class: look, ...named, ...properties }, glyph && icon(glyph), onlyIcon ? null : label);
}

export function field(label, control, hint = null) {
  const hintId = hint ? `${control.id}-hint` : null;
  if (hintId) control.setAttribute("aria-describedby", hintId);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control,
    hint && h("span", { class: "hint", id: hintId }, hint));
}

// Shows a message in a note that is hidden while there is none.
export function tell(note, message) {
  note.textContent = message ?? "";
  note.hidden = !message;
}

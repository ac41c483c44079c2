// The page: signing in and out, the three views, and the theme.

import { Admin } from "./admin.js";
import { announce, hush } from "./announcer.js";
import { Chat } from "./chat.js";
import { drawCurve } from "./curve.js";
import { byId, icon, tell } from "./dom.js";
import { Gateway } from "./gateway.js";
import { Inspector } from "./inspector.js";
import { Timeline } from "./timeline.js";

const VIEWS = { chat: "Chat", inspector: "Inspector", admin: "Admin" };
const THEMES = ["auto", "light", "dark"];
const timeline = new Timeline();
let signedIn = null; // {chat, inspector, admin}

async function signIn(key) {
  const gateway = new Gateway(key);
  const { data: models } = await gateway.json("GET", "/v1/models");
  const views = {
    chat: new Chat(gateway, models, timeline, { inspect: (messages) => inspect(messages) }),
    inspector: new Inspector(byId("inspector"), gateway),
    admin: new Admin(byId("admin"), gateway, models),
  };
  gateway.addEventListener("refused", ({ detail }) => signOut(`The gateway does not accept the key any more: ${detail.message}`));
  signedIn = views;
  byId("key-id").textContent = gateway.keyId ?? "of your own";
  byId("bar").hidden = false;
  byId("door").hidden = true;
  show(viewOf(location.hash));
  announce("Signed in.");
}

function signOut(reason = null) {
  if (!signedIn) return;
  for (const view of Object.values(signedIn)) view.close();
  signedIn = null; // and with it the key
  timeline.show(null);
  hush();
  byId("bar").hidden = true;
  for (const id of Object.keys(VIEWS)) byId(id).hidden = true;
  byId("inspector").replaceChildren();
  byId("admin").replaceChildren();
  byId("door").hidden = false;
  document.title = "Shannon";
  tell(byId("sign-in-failure"), reason);
  tellState();
  byId("key").focus();
}

const viewOf = (hash) => (hash.slice(1) in VIEWS ? hash.slice(1) : "chat");

function show(name) {
  if (!signedIn) return;
  for (const id of Object.keys(VIEWS)) {
    byId(id).hidden = id !== name;
    if (id !== name) signedIn[id].leave?.();
  }
  for (const link of document.querySelectorAll("#bar nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[name]} · Shannon`;
  if (name === "chat") {
    timeline.update();
    signedIn.chat.focus();
  } else {
    signedIn[name].open();
    byId(name).querySelector("h1").focus();
  }
}

function inspect(messages) {
  signedIn.inspector.take(messages);
  location.hash = "#inspector";
}

// Shows on the sign-in page whether the server is live and ready. Neither route needs a key.
async function tellState() {
  const state = byId("gateway-state");
  const line = (kind, text) => {
    const dot = document.createElement("span");
    dot.className = `dot ${kind}`;
    state.replaceChildren(dot, text);
  };
  try {
    const [health, ready] = await Promise.all([fetch("/health"), fetch("/ready")]);
    const { version } = await health.json();
    line(ready.ok ? "good" : "bad", `${ready.ok ? "Ready" : "Not ready yet"} · version ${version}`);
  } catch {
    line("bad", "The gateway does not answer.");
  }
}

function applyTheme(theme) {
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    if (theme === "auto") localStorage.removeItem("shannon.theme");
    else localStorage.setItem("shannon.theme", theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
  for (const button of document.querySelectorAll(".theme-switch")) {
    button.replaceChildren(icon({ auto: "auto", light: "sun", dark: "moon" }[theme]));
    button.setAttribute("aria-label", `Theme: ${theme}. Switch to ${next}`);
    button.title = `Theme: ${theme}`;
    button.onclick = () => applyTheme(next);
  }
}

byId("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = byId("key");
  const submit = event.target.querySelector("[type=submit]");
  tell(byId("sign-in-failure"), null);
  submit.disabled = true;
  submit.textContent = "Signing in …";
  try {
    await signIn(input.value.trim());
    input.value = "";
  } catch (error) {
    tell(byId("sign-in-failure"), error.message);
    input.select();
  } finally {
    submit.disabled = false;
    submit.textContent = "Sign in";
  }
});
byId("sign-in").querySelector("[type=submit]").disabled = false; // until here nothing would have kept the key from the address
byId("sign-out").addEventListener("click", () => signOut());
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
addEventListener("hashchange", () => show(viewOf(location.hash)));
for (const control of document.querySelectorAll("[data-toggles]")) {
  control.addEventListener("click", () => byId("chat").classList.toggle(`show-${control.dataset.toggles}`));
}
for (const control of document.querySelectorAll("[data-closes]")) {
  control.setAttribute("aria-label", `Close ${control.dataset.closes}`);
  control.append(icon("close"));
  control.addEventListener("click", () => byId("chat").classList.remove(`show-${control.dataset.closes}`));
}
byId("new-session").append(icon("plus"), "New");

drawCurve(byId("curve"));
applyTheme(document.documentElement.dataset.theme ?? "auto");
tellState();
byId("key").focus();

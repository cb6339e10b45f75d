"use strict";
// Keeps a page up to date, and answers the keyboard. Parts come as HTML that the server has escaped; texts of models are
// set as text. Nothing here reads or writes anything but this server.

const body = document.body;
const view = body.dataset.view;
const token = body.dataset.token;
const views = [...document.querySelectorAll("nav a")];
const state = document.getElementById("state");
const help = document.getElementById("help");

// Up to date

let last = body.dataset.last || "";
let source = null;
let stale = false;
let busy = false;

function tell(word, kind) {
  state.textContent = word;
  state.className = `state ${kind}`;
}

function connect() {
  // The browser itself comes back after a break, and then names the last event it had.
  source = new EventSource(`/console/live?last=${encodeURIComponent(last)}`);
  source.onopen = () => tell("live", "good");
  source.onmessage = (event) => {
    last = event.lastEventId;
    const told = JSON.parse(event.data);
    if (told.error) {
      tell(told.error, "bad");
    } else if (told.views.includes(view)) {
      stale = true;
      refresh();
    }
  };
  source.onerror = () => {
    tell("reconnecting …", "warn");
    if (source.readyState === EventSource.CLOSED) {
      source.close();
      setTimeout(connect, 2000);
    }
  };
}

async function refresh() {
  if (busy || !stale || document.hidden) return;
  busy = true;
  stale = false;
  try {
    const answer = await fetch(`/console/part/${view}${location.search}`, { credentials: "same-origin" });
    if (answer.status === 401) location.assign("/console/login");
    if (answer.ok) replace(await answer.text());
    if (stale) setTimeout(refresh, 300);
  } catch {
    stale = true; // The connection is gone; the next event brings it up.
  } finally {
    busy = false;
  }
}

function replace(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html").body;
  const main = document.getElementById("main");
  const olds = [...main.children];
  const news = [...fresh.children];
  const same = olds.length === news.length && olds.every((old, at) => old.dataset.part === news[at].dataset.part);
  if (!same) {
    if (main.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) return;
    fold(main, fresh);
    main.replaceChildren(...news);
    return;
  }
  olds.forEach((old, at) => {
    if ("keep" in old.dataset || old.contains(window.getSelection().anchorNode) && !window.getSelection().isCollapsed) return;
    fold(old, news[at]);
    if (old.outerHTML === news[at].outerHTML) return;
    const scrolls = [...old.querySelectorAll(".scroll")].map((one) => [one.scrollLeft, one.scrollTop]);
    old.replaceWith(news[at]);
    news[at].querySelectorAll(".scroll").forEach((one, n) => {
      if (scrolls[n]) [one.scrollLeft, one.scrollTop] = scrolls[n];
    });
  });
}

function fold(old, fresh) {
  // What somebody opened or closed stays so.
  const was = new Map([...old.querySelectorAll("details[data-fold]")].map((one) => [one.dataset.fold, one.open]));
  fresh.querySelectorAll("details[data-fold]").forEach((one) => {
    if (was.has(one.dataset.fold)) one.open = was.get(one.dataset.fold);
  });
}

// Keyboard, theme, buttons

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  document.cookie = `shoal_theme=${root.dataset.theme}; path=/console; max-age=31536000; samesite=strict`;
}

const deeds = {
  theme,
  help: () => (help.open ? help.close() : help.showModal()),
  close: () => help.close(),
  logout: async () => {
    await fetch("/console/logout", { method: "POST", headers: { "X-CSRF-Token": token } });
    location.assign("/console/login");
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) deeds[button.dataset.do]();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Enter" && event.target.form) event.target.form.requestSubmit();
    return;
  }
  if (event.target.matches("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const at = Number(event.key);
  if (at >= 1 && at <= views.length) {
    location.assign(views[at - 1].href);
  } else if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (search) {
      event.preventDefault();
      search.focus();
      search.select();
    }
  } else if (event.key === "?") {
    deeds.help();
  } else if (event.key === "t") {
    theme();
  }
});

document.querySelectorAll("[data-goes]").forEach((select) => {
  select.addEventListener("change", () => {
    const asked = new URLSearchParams({ [select.name]: select.value });
    location.assign(`${location.pathname}?${asked}`);
  });
});

document.addEventListener("visibilitychange", refresh);

// Playground

async function ask(side, form) {
  const answer = side.querySelector(".answer");
  const took = side.querySelector(".took");
  const draft = side.querySelector("[name=draft]");
  const seed = form.elements.seed.value;
  const body = {
    voice: side.querySelector("[name=voice]").value,
    draft: draft ? draft.value : "",
    messages: [{ role: "user", content: form.elements.words.value }],
    temperature: Number(form.elements.temperature.value),
    max_tokens: Number(form.elements.max_tokens.value),
    seed: seed === "" ? null : Number(seed),
  };
  answer.textContent = "";
  took.textContent = "asks …";
  const response = await fetch("/console/say", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": token },
    body: JSON.stringify(body),
  });
  if (!response.ok) {
    took.textContent = await response.text();
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    rest += value;
    const frames = rest.split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (frame.startsWith("data: ")) show(JSON.parse(frame.slice(6)), answer, took);
    }
  }
}

function show(piece, answer, took) {
  if (piece.text) answer.textContent += piece.text;
  if (piece.state) took.textContent = piece.state;
  if (piece.error) took.textContent = typeof piece.error === "string" ? piece.error : piece.error.message;
  if (piece.done) {
    const { tokens, seconds, first_s: first, tokens_per_round: round } = piece.done;
    const rate = seconds > 0 ? `, ${(tokens / seconds).toFixed(1)} tokens/s` : "";
    const drafts = round ? `, ${round} tokens a round` : "";
    took.textContent = `${tokens} tokens in ${seconds.toFixed(1)} s (first after ${first.toFixed(2)} s)${rate}${drafts}`;
  }
}

const form = document.querySelector("[data-say]");
if (form) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    const asked = [...document.querySelectorAll("[data-side]")].map((side) =>
      ask(side, form).catch((error) => (side.querySelector(".took").textContent = String(error))),
    );
    await Promise.all(asked);
    button.disabled = false;
  });
}

document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
if (view) connect();

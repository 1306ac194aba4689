// Keeps a page up to date: on an event of the service it fetches the fragments of the page again, rendered by the server.
// All text of the service enters the document as parsed, server-escaped markup or as text, never by innerHTML.

const main = document.querySelector("main");
const connection = document.getElementById("connection");
// At most one refresh in this time, however many events arrive.
const PAUSE_MS = 1000;
// Without events: the service is away, or too old.
const POLL_MS = 5000;

export function morph(old, fresh) {
  // Changes only what differs: focus, scroll positions and open details stay.
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.hasAttribute("data-keep")) return;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(old.nodeName === "DETAILS" && name === "open")) old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.nodeName === "TIME") delete old.dataset.ago;
  const before = [...old.childNodes], after = [...fresh.childNodes];
  after.forEach((node, number) => (number < before.length ? morph(before[number], node) : old.append(node)));
  before.slice(after.length).forEach((node) => node.remove());
}

export async function refresh(names) {
  const url = new URL(location.href);
  url.hash = "";
  names.forEach((name) => url.searchParams.append("fragment", name));
  const response = await fetch(url, { credentials: "same-origin" });
  if (!response.ok) throw new Error(`status ${response.status}`);
  const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const fresh of parsed.querySelectorAll("[data-fragment]")) {
    const old = document.getElementById(fresh.id);
    if (old) morph(old, document.adoptNode(fresh));
  }
}

function say(text) {
  if (connection.textContent !== text) connection.textContent = text;
}

function watch() {
  let timer = null, running = false, again = false, last = 0;

  async function update() {
    timer = null;
    if (running) {
      again = true;
      return;
    }
    running = true;
    last = performance.now();
    try {
      await refresh([...document.querySelectorAll("[data-fragment]")].map((each) => each.id));
      say("live");
    } catch (error) {
      say(`not up to date: ${error.message}`);
    }
    running = false;
    if (again) {
      again = false;
      schedule();
    }
  }

  function schedule() {
    // A hidden tab is brought up to date when it is shown.
    if (timer === null && !document.hidden) {
      timer = setTimeout(update, Math.max(0, last + PAUSE_MS - performance.now()));
    }
  }

  document.addEventListener("visibilitychange", schedule);
  const source = new EventSource(main.dataset.events);
  for (const kind of main.dataset.kinds.split(" ")) source.addEventListener(kind, schedule);
  source.addEventListener("open", () => {
    say("live");
    // What has changed since the page was rendered, or since the connection was lost.
    schedule();
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) {
      say("updated every 5 s");
      setInterval(schedule, POLL_MS);
    } else {
      say("connecting");
    }
  });
}

document.documentElement.classList.add("scripts");
if (main.dataset.events) watch();
if (document.getElementById("log")) import("/web/static/log.js");

// Follows the log of a running attempt: appends what is new as text, and keeps a bounded part of it in the document.

const log = document.getElementById("log");
const follow = document.getElementById("follow");
const wrap = document.getElementById("wrap");
const PAUSE_MS = 1000;
// Characters that stay in the document; older ones leave at the top.
const MOST = 512 * 1024;

// Escapes what cannot be seen, or turns the direction of text.
const visible = (text) =>
  text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => {
    if (c === "\n" || c === "\t") return c;
    const code = c.codePointAt(0);
    return code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });

function toEnd() {
  if (follow.checked) log.scrollTop = log.scrollHeight;
}

async function read() {
  let ended = false;
  try {
    const url = `${log.dataset.log}?live=1&offset=${log.dataset.offset}`;
    const response = await fetch(url, { credentials: "same-origin", headers: { Accept: "application/json" } });
    if (response.ok) {
      const piece = await response.json();
      if (piece.log) {
        log.append(document.createTextNode(visible(piece.log)));
        while (log.textContent.length > MOST && log.childNodes.length > 1) log.firstChild.remove();
        toEnd();
      }
      log.dataset.offset = piece.offset;
      ended = piece.end;
    }
  } catch {
    // The service is away: tried again.
  }
  if (ended) {
    document.getElementById("connection").textContent = "the attempt has ended";
  } else {
    setTimeout(read, document.hidden ? 5 * PAUSE_MS : PAUSE_MS);
  }
}

if (log) {
  wrap.addEventListener("change", () => log.classList.toggle("wrap", wrap.checked));
  follow.addEventListener("change", toEnd);
  toEnd();
  if (log.dataset.log) {
    document.getElementById("connection").textContent = "live";
    read();
  }
}

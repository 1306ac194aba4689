// Keys and ranges for the panes of files. Without it, checkboxes and buttons do the same.

const rows = (pane) => [...pane.querySelectorAll("tbody tr")].filter((row) => row.querySelector("input[name=name]"));
const box = (row) => row.querySelector("input[name=name]");
// The row from which a range is selected.
const anchors = new WeakMap();

function range(pane, from, to, checked) {
  const all = rows(pane);
  const [first, last] = [all.indexOf(from), all.indexOf(to)].sort((a, b) => a - b);
  if (first >= 0) all.slice(first, last + 1).forEach((row) => (box(row).checked = checked));
}

function say(pane) {
  const selected = pane.querySelectorAll("input[name=name]:checked").length;
  pane.querySelector(".selected")?.remove();
  if (!selected) return;
  const text = document.createElement("span");
  text.className = "selected";
  text.setAttribute("role", "status");
  text.textContent = `${selected} selected`;
  pane.querySelector(".pages")?.append(text);
}

document.addEventListener("click", (event) => {
  const pane = event.target.closest("[data-pane]"), row = event.target.closest("tbody tr");
  if (!pane || !row || !box(row) || event.target.closest("button, a, input:not([name=name])")) return;
  if (event.target !== box(row)) {
    box(row).checked = !box(row).checked;
    box(row).focus();
  }
  if (event.shiftKey && anchors.has(pane)) {
    range(pane, anchors.get(pane), row, box(row).checked);
    getSelection().removeAllRanges();
  } else {
    anchors.set(pane, row);
  }
  say(pane);
});

document.addEventListener("change", (event) => {
  const pane = event.target.closest("[data-pane]");
  if (pane) say(pane);
});

document.addEventListener("keydown", (event) => {
  const pane = event.target.closest("[data-pane]"), row = event.target.closest("tbody tr");
  if (!pane || !row || !box(row) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([name=name])")) return;
  const all = rows(pane), at = all.indexOf(row);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    const next = all[Math.max(0, Math.min(to, all.length - 1))];
    if (event.shiftKey) {
      if (!anchors.has(pane) || !all.includes(anchors.get(pane))) anchors.set(pane, row);
      range(pane, anchors.get(pane), next, true);
      say(pane);
    } else {
      anchors.set(pane, next);
    }
    box(next).focus();
  } else if (event.key === "Enter" && event.target === box(row)) {
    // Otherwise the browser would press the first button of the form.
    event.preventDefault();
    row.querySelector("button[name=open]")?.click();
  } else if (event.key === "Backspace") {
    event.preventDefault();
    pane.querySelector("button[value='..']")?.click();
  }
});

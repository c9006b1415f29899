"use strict";
const keys = { a: "a", b: "b", t: "tie", u: "undo" };
let busy = false;
async function answer(choice) {
  if (busy) return;
  busy = true;
  const number = Number(document.querySelector("[data-number]").dataset.number);
  await fetch(location.pathname + "/answer", { method: "POST", body: JSON.stringify({ number, choice }) });
  location.reload();
}
document.addEventListener("keydown", (event) => {
  if (!event.ctrlKey && !event.metaKey && !event.altKey && keys[event.key]) answer(keys[event.key]);
});
for (const button of document.querySelectorAll("button")) button.onclick = () => answer(button.dataset.choice);

"use strict";

const SMALL = 128; // pixels; smaller images are enlarged without smoothing,
const ENLARGED = 8; // and to at most so many times their size
const FLASH_MS = 120; // for which a choice stays marked
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "equal" };

const $ = (id) => document.getElementById(id);
let rater = new URLSearchParams(location.search).get("rater") || "";
let state = null;
let shownAt = null; // when both images were on the screen; null while they are not
let busy = false;

async function call(path, body) {
  const request = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new Error("The server does not answer; your last choice may be lost. Try it again.");
  }
  const data = await response.json();
  if (response.ok) return data;
  const error = new Error(data.error);
  error.status = response.status;
  throw error;
}

/** Whether the page takes a choice, for readers of the screen and for tests. */
function ready() {
  $("vote").setAttribute("aria-busy", busy || shownAt === null);
}

const fetchState = () => call("/api/state?rater=" + encodeURIComponent(rater));

function complain(error) {
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

function only(id) {
  for (const name of ["start", "vote", "done"]) $(name).hidden = name !== id;
}

async function showPicture(id, url) {
  const image = $(id);
  image.src = url;
  await image.decode();
  const size = Math.max(image.naturalWidth, image.naturalHeight);
  image.classList.toggle("small", size < SMALL);
  return size;
}

async function show(next) {
  state = next;
  rater = next.rater;
  shownAt = null;
  ready();
  document.title = `${next.done} of ${next.total} · ${next.title}`;
  $("title").textContent = next.title;
  $("name").textContent = next.rater;
  $("count").textContent = `${next.done} of ${next.total}`;
  $("who").hidden = $("progress").hidden = false;
  $("progress").max = next.total;
  $("progress").value = next.done;
  $("undo").hidden = !next.undo;
  if (!next.current) {
    only("done");
    $("done-text").textContent =
      `All ${next.total} pairs are done, ${next.rater}, and every vote is saved. ` +
      "You can close this page.";
    $("thanks").focus();
    return;
  }
  only("vote");
  $("question").textContent = next.question;
  $("prompt").textContent = next.current.prompt;
  $("pictures").classList.add("loading");
  let sizes;
  try {
    sizes = await Promise.all([
      showPicture("left-image", next.current.left),
      showPicture("right-image", next.current.right),
    ]);
  } catch {
    if (state === next) complain(new Error("An image did not load. Reload the page to try again."));
    return;
  }
  if (state !== next) return;
  const side = Math.max(...sizes);
  if (side < SMALL) $("pictures").style.setProperty("--largest", `${side * ENLARGED}px`);
  else $("pictures").style.removeProperty("--largest");
  $("pictures").classList.remove("loading");
  $("announce").textContent =
    `Pair ${next.done + 1} of ${next.total}. Prompt: ${next.current.prompt}`;
  requestAnimationFrame(() => {
    if (state !== next) return;
    shownAt = performance.now();
    ready();
  });
  if (next.next) for (const side of ["left", "right"]) new Image().src = next.next[side];
}

async function send(path, body, button) {
  if (busy) return;
  busy = true;
  ready();
  button.classList.add("chosen");
  button.setAttribute("aria-disabled", "true");
  try {
    const [next] = await Promise.all([
      call(path, body),
      new Promise((resolve) => setTimeout(resolve, FLASH_MS)),
    ]);
    complain(null);
    show(next);
  } catch (error) {
    complain(error);
    if (error.status === 409) await fetchState().then(show, complain);
  } finally {
    button.classList.remove("chosen");
    button.removeAttribute("aria-disabled");
    busy = false;
    ready();
  }
}

function vote(choice) {
  if (!state || !state.current || shownAt === null) return;
  const latency = Math.round(performance.now() - shownAt);
  send("/api/vote", { rater, trial: state.current.trial, choice, latency_ms: latency }, $(choice));
}

function undo() {
  if (state && state.undo) send("/api/undo", { rater, trial: state.undo }, $("undo"));
}

for (const choice of ["left", "right", "equal"]) $(choice).addEventListener("click", () => vote(choice));
$("undo").addEventListener("click", undo);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const choice = KEYS[event.key];
  if ((!choice && event.key !== "Backspace") || !$("start").hidden) return;
  event.preventDefault();
  if (event.repeat) return; // a key held down is one vote
  if (choice) vote(choice);
  else undo();
});

$("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  rater = $("rater").value;
  try {
    const first = await fetchState();
    history.replaceState(null, "", "?rater=" + encodeURIComponent(first.rater));
    complain(null);
    show(first);
  } catch (error) {
    complain(error);
  }
});

async function begin() {
  const study = await call("/api/study");
  document.title = $("title").textContent = study.title;
  $("start-question").textContent = study.question;
  $("start-total").textContent = study.total;
  if (rater) {
    try {
      await show(await fetchState());
      return;
    } catch (error) {
      complain(error);
      $("rater").value = rater;
    }
  }
  only("start");
  $("rater").focus();
}

begin().catch(complain);

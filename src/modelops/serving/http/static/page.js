"use strict";
// Everything goes to this node's own API, by addresses relative to the page; nothing is markup.
const KEPT = 12; // cards on the page
const KEY = "modelops-key";
const $ = (id) => document.getElementById(id);
const seen = new Set(); // digests of the pixels of finished images
let model = null; // its entry in v1/models
let work = null; // the AbortController of the request under way

function keptKey(value) {
  try { // sessionStorage may be forbidden
    if (value === undefined) return sessionStorage.getItem(KEY) || "";
    if (value) sessionStorage.setItem(KEY, value); else sessionStorage.removeItem(KEY);
  } catch { /* then the field alone holds it */ }
  return "";
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function say(text) { $("status").textContent = text; }

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// --- what the node says of itself ---------------------------------------------------------------

async function askReady() {
  let state = "no", words = "does not answer";
  try {
    const answer = await fetch("readyz", { cache: "no-store" });
    const said = await answer.json();
    state = said.ready ? "yes" : "no";
    words = said.ready ? "ready" : `not ready: ${(said.problems || []).join("; ")}`;
    if (said.ready && !model) await askModel();
  } catch { /* as it stands above */ }
  $("ready").dataset.state = state;
  if ($("ready-words").textContent !== words) $("ready-words").textContent = words;
}

async function askModel() {
  try {
    const answer = await fetch("v1/models", { headers: headers(), cache: "no-store" });
    if (answer.status === 401) $("key-box").open = true;
    if (!answer.ok) return;
    model = (await answer.json()).data[0];
  } catch {
    return;
  }
  const about = model.x_modelops || {};
  const signing = about.signing || {};
  const rows = [
    ["Model", `${model.id} ${about.version || ""}`],
    ["Image size", about.size],
    ["Steps, guidance", `${about.steps}, ${about.guidance} unless asked otherwise`],
    ["Runtime", about.runtime],
    ["Release", about.release_sha256 && `sha256 ${about.release_sha256}`],
    ["Signed by", signing.key_id && `key ${signing.key_id}${
      signing.development ? ", a development key that nobody else should trust" : ""}`],
  ];
  $("facts").replaceChildren(...rows.filter((row) => row[1]).flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
  $("title").textContent = `${model.id} ${about.version || ""}`;
  document.title = `${model.id}, an inference node`;
  $("steps").placeholder = about.steps ?? "";
  $("guidance").placeholder = about.guidance ?? "";
}

// --- a request ----------------------------------------------------------------------------------

function wanted() {
  const body = { prompt: $("prompt").value };
  if ($("negative").value) body.negative_prompt = $("negative").value;
  for (const name of ["seed", "steps", "guidance"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  body.n = Number($("n").value);
  body.output_format = $("format").value;
  const partials = $("partials").value;
  if (partials && body.n === 1) Object.assign(body, { stream: true, partial_images: Number(partials) });
  return body;
}

class Refused extends Error {}

function inWords(status, error, retryAfter) {
  const said = error && error.message ? error.message : `the node answered ${status}`;
  const sentence = said[0].toUpperCase() + said.slice(1) + (/[.!?]$/.test(said) ? "" : ".");
  if (status === 401) {
    $("key-box").open = true;
    return `This node needs an API key. ${sentence}`;
  }
  return retryAfter ? `${sentence} Try again in ${retryAfter} s.` : sentence;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      text = text.slice(end + 2);
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

async function make() {
  const body = wanted(), began = performance.now();
  let pending = null, finished = 0;
  complain("");
  say(body.n > 1 ? `Making ${body.n} images` : "Making the image");
  work = new AbortController();
  busy(true);
  try {
    const answer = await fetch("v1/images/generations", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: work.signal,
    });
    if (!answer.ok) {
      const failure = await answer.json().catch(() => ({}));
      throw new Refused(inWords(answer.status, failure.error, answer.headers.get("Retry-After")));
    }
    const seconds = () => (performance.now() - began) / 1000;
    if ((answer.headers.get("Content-Type") || "").startsWith("text/event-stream")) {
      for await (const event of events(answer)) {
        if (event.error) throw new Refused(inWords(200, event.error));
        pending ??= newCard(body);
        if (event.type === "image_generation.partial_image") {
          const which = `${event.partial_image_index + 1} of ${body.partial_images}`;
          showPartial(pending, event, which);
          say(`Unfinished image ${which}`);
        } else if (event.type === "image_generation.completed") {
          showFinished(pending, event, event.output_format, body, seconds());
          finished += 1;
        }
      }
      if (!finished) throw new Refused("The node ended the stream before the image was made.");
    } else {
      const said = await answer.json();
      for (const picture of said.data) {
        showFinished(newCard(body), picture, said.output_format, body, seconds());
        finished += 1;
      }
    }
    say(`${finished > 1 ? `${finished} images` : "Image"} made in ${seconds().toFixed(1)} s`);
  } catch (error) {
    if (pending && !finished) removeCard(pending);
    say("");
    if (error.name === "AbortError") say("Stopped. The node has stopped working on it too.");
    else if (error instanceof Refused) complain(error.message);
    else complain("The node did not answer, or broke off. Is it still running?");
  } finally {
    work = null;
    busy(false);
  }
}

function busy(yes) {
  $("make").disabled = yes;
  $("stop").disabled = !yes;
  $("progress").hidden = !yes;
  for (const button of document.querySelectorAll(".again")) button.disabled = yes;
}

// --- cards --------------------------------------------------------------------------------------

function newCard(body) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  card.querySelector(".asked").textContent = body.prompt;
  $("nothing").hidden = true;
  $("pictures").prepend(card);
  while ($("pictures").children.length > KEPT) removeCard($("pictures").lastElementChild);
  return card;
}

function removeCard(card) {
  for (const link of card.querySelectorAll("img, a")) URL.revokeObjectURL(link.src || link.href);
  card.remove();
  $("nothing").hidden = $("pictures").children.length > 0;
}

function show(card, base64, format, words) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const image = card.querySelector("img"), before = image.src;
  image.onload = () => image.classList.toggle("small", image.naturalWidth <= 160);
  image.src = URL.createObjectURL(new Blob([bytes], { type: `image/${format}` }));
  image.alt = words;
  if (before) URL.revokeObjectURL(before);
  return image.src;
}

function showPartial(card, event, which) {
  show(card, event.b64_json, event.output_format, `Unfinished image ${which}`);
  card.querySelector(".how").textContent = `unfinished, ${which}`;
}

function showFinished(card, picture, format, body, seconds) {
  const receipt = picture.x_modelops, made = receipt.request;
  const find = (name) => card.querySelector(name);
  const name = `picture-${made.seed}.${format === "jpeg" ? "jpg" : format}`;
  find(".save").href = show(card, picture.b64_json, format, `AI-generated image: ${body.prompt}`);
  find(".save").download = name;
  find(".how").textContent =
    `seed ${made.seed} · ${made.steps}\u00a0steps · guidance\u00a0${made.guidance} · ` +
    `${made.size} · ${seconds.toFixed(1)}\u00a0s` +
    (body.negative_prompt ? ` · without: ${body.negative_prompt}` : "");
  find(".same").hidden = !seen.has(receipt.pixels_sha256);
  seen.add(receipt.pixels_sha256);
  const text = JSON.stringify(receipt, null, 2);
  find("pre").textContent = text;
  find(".save-receipt").href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  find(".save-receipt").download = `receipt-${made.seed}.json`;
  find(".receipt").hidden = false;
  find(".actions").hidden = false;
  const again = {
    prompt: body.prompt,
    ...(body.negative_prompt && { negative_prompt: body.negative_prompt }),
    seed: made.seed, steps: made.steps, guidance: made.guidance, output_format: format,
  };
  find(".again").addEventListener("click", () => fillAndMake(again));
  find(".curl").addEventListener("click", (event) => copyCurl(card, event.target, again));
}

function fillAndMake(request) {
  $("prompt").value = request.prompt;
  $("negative").value = request.negative_prompt || "";
  for (const name of ["seed", "steps", "guidance"]) $(name).value = request[name];
  $("n").value = 1;
  $("format").value = request.output_format;
  showPartialsChoice();
  $("form").requestSubmit();
}

async function copyCurl(card, button, request) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const extension = request.output_format === "jpeg" ? "jpg" : request.output_format;
  const key = $("key").value.trim() ? '-H "Authorization: Bearer $OPENAI_API_KEY" ' : "";
  const line =
    `curl -sS ${quoted(new URL("v1/images/generations", location.href).href)} ` +
    `${key}-H 'Content-Type: application/json' -d ${quoted(JSON.stringify(request))} | ` +
    "python3 -c \"import sys,json,base64; sys.stdout.buffer.write(" +
    `base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))" > picture-${request.seed}.${extension}`;
  const byHand = card.querySelector(".by-hand");
  try {
    await navigator.clipboard.writeText(line); // only where the page is safe from eavesdroppers
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy as curl"; }, 2000);
    say("Copied the curl command");
  } catch {
    byHand.hidden = false;
    byHand.querySelector("textarea").value = line;
    byHand.querySelector("textarea").select();
  }
}

// --- the form -----------------------------------------------------------------------------------

function showPartialsChoice() { $("partials").disabled = Number($("n").value) > 1; }

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!work) make();
});
$("stop").addEventListener("click", () => work && work.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("n").addEventListener("input", showPartialsChoice);
$("key").addEventListener("change", () => {
  keptKey($("key").value.trim());
  model = null;
  askReady();
});

$("key").value = keptKey();
showPartialsChoice();
askReady();
setInterval(() => { if (!document.hidden) askReady(); }, 5000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) askReady(); });

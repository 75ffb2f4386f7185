"use strict";
// The page: choose a video, send it to every model, show the events that arrive (results.js).

// ------------------------------------------------------------------ requests
const TOP_K = 5;
let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("token") ?? "";
if (location.hash.includes("token=")) history.replaceState(null, "", location.pathname + location.search);

class RequestError extends Error {
  constructor(status, message, retryable) {
    super(message);
    Object.assign(this, { status, retryable });
  }
}

// Sends a request; returns the response if its status is 2xx, otherwise throws a RequestError.
async function request(path, { query = {}, headers = {}, ...options } = {}) {
  const search = new URLSearchParams(query).toString();
  const authorization = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(search ? `${path}?${search}` : path, { ...options, headers: { ...headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, "The server does not respond. Check that jaxvid serve is still running.", true);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401) askForToken();
  throw new RequestError(response.status, error?.message ?? `The server responded with status ${response.status}.`,
    [408, 429, 503, 504].includes(response.status));
}

// Calls onEvent(name, data) for each server-sent event. EventSource cannot be used, because it cannot POST.
async function readEvents(response, onEvent) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = new Map(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.has("data")) onEvent(fields.get("event"), JSON.parse(fields.get("data")));
    }
  }
}

// Waits until the networks are compiled.
async function waitUntilReady(signal) {
  for (;;) {
    const response = await fetch("readyz", { signal }).catch(() => null); // the next request reports a lost server
    const { status } = await response?.json().catch(() => ({})) ?? {};
    if (status !== "compiling") return;
    setStatus("The server is compiling the network…", true);
    await new Promise((resolve) => { setTimeout(resolve, 500); });
  }
}

function askForToken() {
  if (token) showProblem("The server refused the token.");
  token = "";
  $("token-form").hidden = false;
  $("token").focus();
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token-form").hidden = true;
  start();
});

// ------------------------------------------------------------------ messages
function setStatus(words, busy = false) {
  $("status").textContent = words;
  $("status").classList.toggle("busy", busy);
}
function showProblem(message, retry) {
  const again = retry ? [" ", el("button", { type: "button", onclick: retry }, "Try again")] : [];
  $("problem").replaceChildren(...(message ? [message, ...again] : []));
}

// ------------------------------------------------------------------ classify a video
// A source is {name, blob} or {name, url}; `sample` and `recording` say where it comes from.
let current = null; // {source, controller, windows}
let playing = ""; // object URL of the player's video

const bodyOf = ({ blob, url }) => (blob ? { body: blob, headers: { "Content-Type": "application/octet-stream" } }
  : { body: JSON.stringify({ url }), headers: { "Content-Type": "application/json" } });

let early = null; // a video that was chosen before the models are known
async function classify(source, windows = {}) {
  if (!results.cards.size) { // the page waits for the server, or for the token
    early = source;
    return;
  }
  current?.controller.abort();
  stopCamera();
  const run = { source, windows, controller: new AbortController() };
  current = run;
  const models = [...results.cards.keys()];
  clearResults(models);
  showProblem();
  showPlayer(source);
  showUse(source);
  const limit = [...results.cards.values()][0].limits.upload_bytes;
  if (source.blob && source.blob.size > limit) {
    setStatus("");
    showProblem(`${source.name} has ${megabytes(source.blob.size)}; the server accepts at most ${megabytes(limit)}.`);
    return;
  }
  setStatus(`Classifying ${source.name}…`, true);
  await waitUntilReady(run.controller.signal);
  if (run !== current) return;
  setStatus(`Classifying ${source.name}…`, true);
  const outcomes = await Promise.allSettled(models.map((model) => explain(model, run)));
  if (run !== current) return;
  const failures = outcomes.filter((outcome) => outcome.status === "rejected").map((outcome) => outcome.reason);
  if (failures.length) setStatus("");
  else setStatus(summary());
  const messages = [...new Set(failures.map((failure) => failure.message))];
  showProblem(messages.join(" "), failures.some((failure) => failure.retryable) && (() => classify(source, windows)));
  $("download").disabled = failures.length > 0;
}

async function explain(model, run) {
  const query = { model, top_k: TOP_K, ...run.windows };
  const response = await request("v1/explain", { method: "POST", query, signal: run.controller.signal, ...bodyOf(run.source) });
  let complete = false;
  try {
    await readEvents(response, (name, data) => {
      if (run !== current) return;
      if (name === "error") throw new RequestError(data.status, data.message, false);
      if (name === "done") complete = true;
      else addEvent(model, name, data);
      if (name === "prediction") {
        setStatus(summary(), true);
        scrollToResults();
      }
      if (name === "plan") showWindowForm(data);
    });
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw new RequestError(0, "The connection to the server was lost.", true);
  }
  if (!complete && run === current) throw new RequestError(0, "The connection to the server was lost.", true);
}

// On a phone, the results are below the samples.
function scrollToResults() {
  if ($("classes").getBoundingClientRect().top < innerHeight) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
  $("stage").scrollIntoView({ behavior });
}

function summary() {
  const best = [...results.runs].filter(([, run]) => run.prediction).map(([model, run]) => {
    const { label, probability } = run.prediction.top[0];
    return `${label} ${percent(probability)}${results.runs.size > 1 ? ` (${model})` : ""}`;
  });
  return best.length ? `Most likely: ${best.join(", ")}` : "";
}

// ------------------------------------------------------------------ player
const video = $("video");
function showPlayer({ name, blob }) {
  if (playing) URL.revokeObjectURL(playing);
  playing = blob ? URL.createObjectURL(blob) : "";
  $("player").hidden = !blob;
  $("h-player").replaceChildren(bdi(name));
  $("facts").textContent = "";
  video.hidden = false;
  $("unplayable").hidden = true;
  if (blob) video.src = playing;
  else video.removeAttribute("src");
  results.onSeek = blob ? (time) => { video.currentTime = time; } : null;
}
video.addEventListener("error", () => {
  video.hidden = true;
  $("unplayable").hidden = false;
});
for (const event of ["timeupdate", "seeked"]) {
  video.addEventListener(event, () => { if (!video.paused || !$("chart").matches(":hover")) showTime(video.currentTime); });
}
results.isPlaying = () => !video.paused;

// ------------------------------------------------------------------ windows of the timeline
const secondsInput = (id, words) => el("label", { class: "row" }, words,
  el("input", { type: "number", id, class: "short", min: 0.01, step: "any", required: "" }));
const windowForm = el("form", { class: "row", hidden: "" },
  secondsInput("window", "Window (s)"), secondsInput("stride", "Stride (s)"), el("button", {}, "Apply"));
$("timeline").append(windowForm);
function showWindowForm({ window, stride }) {
  windowForm.hidden = false;
  $("window").value = +window.toFixed(3);
  $("stride").value = +stride.toFixed(3);
}
windowForm.addEventListener("submit", (event) => {
  event.preventDefault();
  classify(current.source, { window: $("window").value, stride: $("stride").value });
});

// ------------------------------------------------------------------ files, addresses and samples
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) classify({ name: file.name, blob: file });
  $("file").value = ""; // so that the same file can be chosen again
});
const hasFiles = (transfer) => [...(transfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event.dataTransfer)) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  if (!hasFiles(event.dataTransfer)) return;
  event.preventDefault();
  $("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) classify({ name: file.name, blob: file });
});
const classifyUrl = (url) => classify({ name: new URL(url).pathname.split("/").pop() || url, url });
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files, text = event.clipboardData.getData("text").trim();
  if (file) classify({ name: file.name, blob: file });
  else if (!$("url-form").hidden && event.target.tagName !== "INPUT" && /^https?:/.test(text) && URL.canParse(text)) {
    $("url").value = text;
    classifyUrl(text);
  }
});
$("url-form").addEventListener("submit", (event) => {
  event.preventDefault();
  classifyUrl($("url").value);
});

function showSamples(samples, note) {
  $("samples").hidden = !samples.length;
  $("samples-note").textContent = note;
  $("sample-list").replaceChildren(...samples.map((sample) => {
    const clip = el("video", { src: sample.url, loop: "", playsinline: "", "aria-hidden": "true", tabindex: -1 });
    clip.muted = true;
    const choose = () => classifySample(sample, button);
    const button = el("button", { type: "button", "aria-pressed": "false", onclick: choose }, clip, el("span", {}, sample.title));
    const stop = () => { clip.pause(); };
    const play = () => { if (!matchMedia("(prefers-reduced-motion: reduce)").matches) clip.play().catch(() => {}); };
    fill(button, { onpointerenter: play, onfocus: play, onpointerleave: stop, onblur: stop }, []);
    return el("li", {}, button);
  }));
}

async function classifySample(sample, button) {
  try {
    const blob = await (await request(sample.url)).blob();
    await classify({ name: sample.name, blob, sample: sample.url, button });
  } catch (error) {
    showProblem(error.message, error.retryable && (() => classifySample(sample, button)));
  }
}

// ------------------------------------------------------------------ report and examples
const quoted = (words) => `'${words.replaceAll("'", "'\\''")}'`;
function showUse(source) {
  $("use").hidden = false;
  for (const button of $("sample-list").querySelectorAll("button")) button.setAttribute("aria-pressed", button === source.button);
  const server = new URL(".", location.href).href, [model] = results.cards.keys();
  const query = new URLSearchParams({ top_k: TOP_K, ...(results.cards.size > 1 && { model }) });
  const address = `${server}v1/predict?${query}`;
  const auth = token ? ` -H "Authorization: Bearer $JAXVID_TOKEN"` : "";
  const file = source.name.replaceAll("\\", "\\\\").replaceAll('"', '\\"');
  const lines = [];
  if (source.sample) lines.push(`curl -O ${quoted(new URL(source.sample, server).href)}`);
  lines.push(source.url ? `curl${auth} --json ${quoted(JSON.stringify({ url: source.url }))} ${quoted(address)}`
    : `curl${auth} -F ${quoted(`video=@"${file}"`)} ${quoted(address)}`);
  $("curl").textContent = lines.join("\n");
  $("python").textContent = pythonExample(server.replace(/\/$/, ""), source);
  $("save-recording").hidden = !source.recording;
  if (source.recording) fill($("save-recording"), { href: playing, download: source.name }, []);
}

function pythonExample(server, source) {
  const secret = token ? "  # the token is in $JAXVID_TOKEN" : "";
  return ["import jaxvid", "", `client = jaxvid.Client(${JSON.stringify(server)})${secret}`,
    `print(client.predict(${JSON.stringify(source.url ?? source.name)}, top_k=${TOP_K}))`].join("\n");
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = $(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch { // no permission, or not a secure context: select the text instead
      getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

$("download").addEventListener("click", async () => {
  const { source, windows } = current;
  $("download").disabled = true;
  try {
    const query = { name: source.name, top_k: TOP_K, ...windows };
    const response = await request("v1/report", { method: "POST", query, ...bodyOf(source) });
    const href = URL.createObjectURL(await response.blob());
    el("a", { href, download: `${source.name}.html` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  } catch (error) {
    showProblem(error.message);
  }
  $("download").disabled = false;
});

// ------------------------------------------------------------------ start
function showModels(cards) {
  const title = cards.length === 1 ? `Video classification: ${cards[0].name}` : "Video classification";
  $("title").replaceChildren(bdi(title));
  document.title = title;
  $("models").replaceChildren(...cards.map((card) => {
    const { num_frames: frames, crop } = card.preprocessing;
    const facts = `${card.labels.length.toLocaleString("en")} classes, ${frames} frames of ${crop} × ${crop} px per clip`;
    return el("li", {}, ...(cards.length > 1 ? [el("b", {}, bdi(card.name)), ": "] : []), facts);
  }));
}

async function start() {
  try {
    const { cards, samples, samples_note: note, allow_urls: allowUrls } = await (await request("v1/page")).json();
    sessionStorage.setItem("token", token);
    showProblem();
    showModels(cards);
    setCards(cards);
    $("url-form").hidden = !allowUrls;
    showSamples(samples, note);
    $("input").hidden = false;
    if (early) classify(early);
    early = null;
  } catch (error) {
    if (error.status !== 401) showProblem(error.message, error.retryable && start);
  }
}
start();

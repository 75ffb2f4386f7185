"use strict";
// The webcam: record a clip, or classify a sliding window of frames continuously (/v1/frames).

const CAPTURES_PER_SECOND = 12; // frames kept for the sliding window
const JPEG_QUALITY = 0.9;
let camera = null; // {stream, timer}, and while recording {recorder, keep}
let isOpening = false; // while the browser asks for permission

// Stops the webcam. A recording is classified if it is kept, otherwise discarded.
function stopCamera(keep = false) {
  if (!camera) return;
  clearInterval(camera.timer);
  camera.keep = keep;
  if (camera.recorder?.state === "recording") camera.recorder.stop();
  for (const track of camera.stream.getTracks()) track.stop();
  camera = null;
  $("preview").srcObject = null;
  $("camera").hidden = true;
  $("record").disabled = $("live").disabled = false;
}

async function openCamera() {
  if (isOpening) return null;
  isOpening = true;
  stopCamera();
  showProblem();
  setStatus("");
  try {
    const size = { width: { ideal: 640 }, height: { ideal: 480 } };
    const stream = await navigator.mediaDevices.getUserMedia({ video: size, audio: false });
    camera = { stream };
    stream.getVideoTracks()[0].addEventListener("ended", () => { // not called by stopCamera
      stopCamera();
      showProblem("The webcam was disconnected.");
    });
  } catch (error) {
    const reason = error.name === "NotAllowedError" ? "allow it in the browser's address bar" : "connect one and try again";
    showProblem(`The webcam cannot be used (${error.message}); ${reason}.`);
    return null;
  } finally {
    isOpening = false;
  }
  $("preview").srcObject = camera.stream;
  await $("preview").play();
  $("camera").hidden = false;
  $("record").disabled = $("live").disabled = true;
  $("stop").focus();
  return camera;
}

let liveName = null; // the model that is chosen for live mode; null: the one whose results are shown
const liveCard = () => results.cards.get(liveName ?? results.shown) ?? [...results.cards.values()][0];
const clipSeconds = (card) => Math.min(10, Math.max(1, card.clip_seconds));

// ------------------------------------------------------------------ record a clip
async function record() {
  const opened = await openCamera();
  if (!opened) return;
  const recorder = new MediaRecorder(opened.stream), parts = [];
  const length = Math.max(2, ...[...results.cards.values()].map(clipSeconds));
  const begin = performance.now();
  $("rate").hidden = $("live-model").hidden = true;
  $("live-bars").replaceChildren();
  showLiveWarnings([]);
  const showRest = () => {
    const rest = length - (performance.now() - begin) / 1000;
    $("camera-text").textContent = `Recording: ${Math.max(0, rest).toFixed(0)} s left`;
    if (rest <= 0) stopCamera(true);
  };
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  recorder.addEventListener("stop", () => {
    if (!opened.keep) return;
    const blob = new Blob(parts, { type: recorder.mimeType });
    const suffix = recorder.mimeType.includes("mp4") ? "mp4" : "webm";
    classify({ name: `recording.${suffix}`, blob, recording: true });
  });
  Object.assign(opened, { recorder, timer: setInterval(showRest, 200) });
  recorder.start();
  showRest();
}

// ------------------------------------------------------------------ live mode
async function goLive() {
  const opened = await openCamera();
  if (!opened) return;
  const captures = []; // {time, jpeg} of the last seconds
  opened.timer = setInterval(() => capture(captures), 1000 / CAPTURES_PER_SECOND);
  showLiveModel(captures);
  $("rate").hidden = false;
  $("rate").textContent = "Waiting for frames…";
  const latencies = []; // of the last requests, in milliseconds, each with its end
  let newest; // last capture of the previous window
  while (camera === opened) {
    if (!captures.length || captures.at(-1) === newest) await new Promise((resolve) => { setTimeout(resolve, 20); });
    else {
      newest = captures.at(-1);
      if (!await classifyFrames(sampleWindow(captures), latencies, opened)) return;
    }
  }
}

// Shows the model of live mode. If the user chooses another one, the captures, which have the size of the
// previous model's frames, are discarded.
function showLiveModel(captures) {
  const card = liveCard();
  modelChoice("live-model", [...results.cards.keys()], card.name, (name) => {
    liveName = name;
    captures.length = 0;
    showLiveModel(captures);
  });
  $("camera-text").textContent = `Classes of the last ${clipSeconds(card).toFixed(1)} s`;
  $("live-bars").replaceChildren();
  showLiveWarnings([]);
}

function capture(captures) {
  const card = liveCard(), preview = $("preview"), { videoWidth: width, videoHeight: height } = preview;
  if (!width) return;
  const scale = Math.min(1, card.preprocessing.short_side / Math.min(width, height));
  const canvas = el("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(preview, 0, 0, canvas.width, canvas.height);
  const time = performance.now() / 1000;
  canvas.toBlob((jpeg) => {
    if (!jpeg || card !== liveCard()) return;
    captures.push({ time, jpeg });
    while (captures[0].time < time - clipSeconds(card) - 1) captures.shift();
  }, "image/jpeg", JPEG_QUALITY);
}

// The captures nearest to evenly spaced times in the last seconds, one per frame of a clip.
function sampleWindow(captures) {
  const card = liveCard(), count = card.preprocessing.num_frames, end = captures.at(-1).time;
  const begin = Math.max(captures[0].time, end - clipSeconds(card));
  return Array.from({ length: count }, (_, i) => {
    const time = begin + ((i + 0.5) / count) * (end - begin);
    return captures.reduce((best, next) => (Math.abs(next.time - time) < Math.abs(best.time - time) ? next : best));
  });
}

// Classifies frames and shows the classes; returns whether live mode goes on.
async function classifyFrames(frames, latencies, opened) {
  const form = new FormData(), card = liveCard();
  for (const { jpeg } of frames) form.append("video", jpeg, "frame.jpg");
  const begin = performance.now();
  try {
    const query = { model: card.name, top_k: TOP_K };
    const { top, warnings } = await (await request("v1/frames", { method: "POST", query, body: form })).json();
    if (camera !== opened) return false;
    if (card === liveCard()) {
      barList($("live-bars"), top);
      showLiveWarnings(warnings);
    }
  } catch (error) {
    if (camera === opened && error.status !== 429) {
      stopCamera();
      showProblem(error.message, error.retryable && goLive);
      return false;
    }
    await new Promise((resolve) => { setTimeout(resolve, 500); });
  }
  showRate(latencies, begin);
  return camera === opened;
}

function showLiveWarnings(warnings) {
  const list = $("live-warnings"), words = warnings.join(" ");
  if (list.textContent !== words) list.textContent = words; // otherwise, screen readers repeat it
  list.hidden = !words;
}

function showRate(latencies, begin) {
  const end = performance.now();
  latencies.push({ end, latency: end - begin });
  if (latencies.length > 10) latencies.shift();
  if (latencies.length < 2) return;
  const rate = (1000 * (latencies.length - 1)) / (end - latencies[0].end);
  const mean = latencies.reduce((sum, { latency }) => sum + latency, 0) / latencies.length;
  $("rate").textContent = `${rate.toFixed(1)} predictions/s, latency ${mean.toFixed(0)} ms`;
}

// ------------------------------------------------------------------ buttons
$("record").addEventListener("click", record);
$("live").addEventListener("click", goLive);
$("stop").addEventListener("click", () => {
  const from = camera?.recorder ? $("record") : $("live");
  stopCamera(true);
  from.focus();
});
if (!navigator.mediaDevices?.getUserMedia) {
  $("record").disabled = $("live").disabled = true;
  $("no-webcam").hidden = false;
}

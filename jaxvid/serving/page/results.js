"use strict";
// Draws the events of /v1/explain: classes, frames and model cards; timeline.js draws the timeline.
// Used by the page (page.js) and, without the rest of the page, by the downloaded report (report.js).

// ------------------------------------------------------------------ create elements; names are set only as text or attributes
const $ = (id) => document.getElementById(id);
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value); // a style attribute is refused by the page's CSP
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const bdi = (words) => el("bdi", {}, words); // keeps a right-to-left name from reordering the text around it

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;
const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const megabytes = (bytes) => (bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
function clock(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - 60 * minutes).toFixed(1).padStart(4, "0")} min`;
}

// ------------------------------------------------------------------ state
const results = {
  cards: new Map(), // name of a model → its card
  runs: new Map(), // name of a model → its events for the current video
  shown: null, // name of the model whose frames and timeline are shown
  time: 0, // of the timeline's cursor, in seconds
  onSeek: null, // called with a time that the user selects; null: there is no player
  isPlaying: () => false, // whether the player is running, which then moves the cursor
};
const shownRun = () => results.runs.get(results.shown);

// Removes the results of the previous video, and waits for those of these models.
function clearResults(models) {
  results.runs = new Map(models.map((model) => [model, { windows: [] }]));
  results.shown = models[0];
  results.time = 0;
  for (const id of ["classes", "frames", "timeline"]) $(id).hidden = true;
}

// One event of /v1/explain. "window" occurs once per window, other events once.
function addEvent(model, name, data) {
  if (!results.runs.has(model)) results.runs.set(model, { windows: [] });
  results.shown ??= model;
  const run = results.runs.get(model);
  if (name === "window") run.windows.push(data);
  else run[name] = data;
  if (name === "info") $("facts").textContent = describeInfo(data);
  if (name === "prediction") drawPredictions();
  if (["frames", "attention"].includes(name)) drawFrames();
  if (["plan", "window"].includes(name)) drawTimelineSoon();
}

// ------------------------------------------------------------------ radio buttons and check boxes
// Lets the user choose one of several models in a fieldset.
function modelChoice(id, names, shown, onChange) {
  const fieldset = $(id);
  fieldset.hidden = names.length < 2;
  const options = names.map((name) => {
    const input = el("input", { type: "radio", name: id, onchange: () => onChange(name) });
    input.checked = name === shown;
    return el("label", {}, input, el("span", {}, bdi(name)));
  });
  const focused = fieldset.contains(document.activeElement);
  fieldset.replaceChildren(fieldset.querySelector("legend"), ...options);
  if (focused) fieldset.querySelector(":checked").focus();
}

// Lets the user choose the model whose frames and timeline are shown.
function resultChoice(id) {
  modelChoice(id, [...results.runs.keys()], results.shown, (name) => {
    results.shown = name;
    drawFrames();
    drawTimeline();
  });
}

function describeInfo({ width, height, seconds, frames, fps, bytes }) {
  return [`${width} × ${height} px`, ...(seconds === null ? [] : [clock(seconds)]), many(frames, "frame"),
    ...(fps ? [`${+fps.toFixed(2)} frames/s`] : []), megabytes(bytes)].join(" · ");
}

// ------------------------------------------------------------------ classes
function barList(list, top) {
  list.replaceChildren(...top.map(({ label, probability }, rank) => el("li", rank ? {} : { class: "best" },
    el("span", { class: "label" }, bdi(label)),
    el("span", { class: "number" }, percent(probability)),
    el("span", { class: "track", "aria-hidden": "true" }, el("i", { style: { width: `${100 * probability}%` } })))));
  return list;
}

function describeTiming({ seconds }) {
  const shown = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`);
  return `decoded in ${shown(seconds.decode)}, classified in ${shown(seconds.network)}`;
}

function drawPrediction(model, run) {
  const parts = [];
  if (results.runs.size > 1) parts.push(el("h3", {}, bdi(model)));
  if (run.prediction) {
    const list = el("ol", { class: "bars", "aria-label": `Most likely classes by ${model}` });
    parts.push(barList(list, run.prediction.top), el("p", { class: "small soft" }, describeTiming(run.prediction)));
  }
  return el("div", {}, ...parts);
}

// Lists the warnings about the video; those that only some models give name the model.
function drawWarnings() {
  const given = [...results.runs].filter(([, run]) => run.prediction);
  const messages = new Set(given.flatMap(([, run]) => run.prediction.warnings));
  $("warnings").replaceChildren(...[...messages].map((message) => {
    const models = given.filter(([, run]) => run.prediction.warnings.includes(message)).map(([model]) => model);
    return el("p", { class: "warning" }, models.length < given.length ? `${models.join(", ")}: ${message}` : message);
  }));
}

function drawPredictions() {
  $("classes").hidden = false;
  drawWarnings();
  $("predictions").replaceChildren(...[...results.runs].map(([model, run]) => drawPrediction(model, run)));
  drawAgreement();
}

function drawAgreement() {
  const done = [...results.runs].filter(([, run]) => run.prediction);
  $("agreement").hidden = done.length < 2;
  if (done.length < 2) return;
  const tops = done.map(([model, run]) => ({ model, ...run.prediction.top[0], all: run.prediction.top.map((c) => c.label) }));
  const known = (label) => done.every(([model]) => results.cards.get(model)?.labels.includes(label));
  if (!tops.some((top) => known(top.label))) {
    $("agreement").replaceChildren("The models have different classes, so their predictions cannot be compared.");
    return;
  }
  const agree = tops.every((top) => top.label === tops[0].label);
  const common = tops[0].all.filter((label) => tops.every((top) => top.all.includes(label))).length;
  const verdict = agree ? [el("b", { class: "right" }, "The models agree: "), bdi(tops[0].label), "."]
    : [el("b", { class: "wrong" }, "The models disagree: "), ...tops.flatMap((top, i) =>
      [i ? ", " : "", bdi(top.label), ` (${percent(top.probability)}, `, bdi(top.model), ")"]), "."];
  $("agreement").replaceChildren(...verdict, ` They share ${common} of their ${tops[0].all.length} most likely classes.`);
}

// ------------------------------------------------------------------ frames and attention
const LAYERS = [["heat", "attention within the frame"], ["weights", "attention to the frame"]];
// Matplotlib's colour map plasma, which `jaxvid visualize` uses, at 9 evenly spaced values.
const PLASMA = [[13, 8, 135], [75, 3, 161], [125, 3, 168], [168, 34, 150], [203, 70, 121], [229, 107, 93],
  [248, 148, 65], [253, 195, 40], [240, 249, 33]];
const OPACITY = 0.75; // of the strongest heat

function drawLayerChoice(hasAttention) {
  $("layers").hidden = !hasAttention;
  if ($("layers").querySelector("input")) return;
  $("layers").append(...LAYERS.map(([layer, words]) => {
    const input = el("input", { type: "checkbox", onchange: () => $("pictures").classList.toggle(layer, input.checked) });
    input.checked = true;
    $("pictures").classList.add(layer);
    return el("label", {}, input, el("span", {}, words));
  }));
}

function heatColour(strength) {
  const position = strength * (PLASMA.length - 1), low = Math.min(Math.floor(position), PLASMA.length - 2);
  return PLASMA[low].map((value, c) => value + (position - low) * (PLASMA[low + 1][c] - value));
}

// Draws the attention (rows of patches) of a frame, as `jaxvid visualize` does: uniform attention is transparent.
function drawHeat(patches, peak) {
  const [rows, columns] = [patches.length, patches[0].length], uniform = 1 / (rows * columns);
  const canvas = el("canvas", { width: columns, height: rows, class: "heat" });
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  patches.flat().forEach((share, i) => {
    const strength = Math.min(1, Math.max(0, (share - uniform) / (peak - uniform)));
    image.data.set([...heatColour(strength), 255 * OPACITY * Math.sqrt(strength)], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

function placeInBox(node, [top, left, bottom, right]) {
  const share = (value) => `${100 * value}%`;
  Object.assign(node.style, { top: share(top), left: share(left), width: share(right - left), height: share(bottom - top) });
  return node;
}

function drawPicture(frame, i, run, peak) {
  const { attention, frames } = run, time = frame.time === null ? "" : clock(frame.time);
  const words = `Frame ${frame.index}${time && ` at ${time}`}`;
  const layers = [el("img", { src: frame.image, alt: words }), placeInBox(el("span", { class: "crop" }), frames.crop_box)];
  if (attention) layers.push(placeInBox(drawHeat(attention.patches[i], peak), frames.crop_box));
  const seek = { type: "button", title: `Show ${time} in the player`, onclick: () => selectTime(frame.time) };
  const picture = results.onSeek && time ? el("button", { ...seek, class: "picture" }, ...layers)
    : el("div", { class: "picture" }, ...layers);
  const caption = time ? [`${time} · `, el("span", { class: "soft" }, `frame ${frame.index}`)] : [words];
  return el("figure", {}, picture, el("figcaption", {}, el("div", {}, ...caption), ...drawWeight(attention, i)));
}

function drawWeight(attention, i) {
  if (!attention) return [];
  const share = attention.weights[i], most = Math.max(...attention.weights), uniform = 1 / attention.weights.length;
  const bar = el("i", { style: { width: `${(100 * share) / most}%` } });
  const mark = el("b", { style: { left: `${(100 * uniform) / most}%` } });
  return [el("div", { class: "weight" },
    el("span", { class: "track", "aria-hidden": "true" }, bar, mark),
    el("span", { class: "number", title: "share of the temporal attention of the clip" }, percent(share)))];
}

function drawFrames() {
  const run = shownRun();
  $("frames").hidden = !run?.frames;
  if (!run?.frames) return;
  const { frames, attention } = run;
  resultChoice("frames-model");
  drawLayerChoice(Boolean(attention));
  $("frames-note").replaceChildren(frames.note);
  // At least twice the uniform share, so that almost uniform attention does not look strong.
  const shares = attention ? attention.patches.flat(2) : [];
  const uniform = attention ? 1 / attention.patches[0].flat().length : 1;
  const peak = shares.reduce((most, share) => Math.max(most, share), 2 * uniform);
  $("pictures").replaceChildren(...frames.frames.map((frame, i) => drawPicture(frame, i, run, peak)));
  $("attention-notes").replaceChildren(...(attention?.notes ?? []).map((note) => el("li", {}, note)));
}

// ------------------------------------------------------------------ model cards
function describeField(name, value) {
  const words = `${name.replace(/_(bytes|seconds)$/, "").replaceAll("_", " ")}: `;
  const shown = name.endsWith("_bytes") ? megabytes(value) : name.endsWith("_seconds") ? `${value} s`
    : typeof value === "number" ? value.toLocaleString("en")
      : typeof value === "object" ? el("code", {}, JSON.stringify(value)) : bdi(String(value));
  return el("span", {}, words, shown);
}

function drawCard(card, open) {
  const facts = el("dl", { class: "facts" });
  const add = (term, ...about) => facts.append(el("dt", {}, term), el("dd", {}, ...about));
  const lines = (items) => el("ul", {}, ...items.map((item) => el("li", {}, item)));
  add("Protocol", lines(card.description));
  const names = card.labels.slice(0, 1000);
  add("Classes", el("details", {}, el("summary", {}, `${card.labels.length.toLocaleString("en")} classes`),
    el("ul", { tabindex: 0, "aria-label": "Classes" }, ...names.map((label) => el("li", {}, bdi(label))))));
  if (card.labels_source) add("Class names", bdi(card.labels_source));
  add("Probabilities", card.activation === "sigmoid" ? "sigmoid: each class independently" : card.activation);
  for (const [group, title] of [["provenance", "Provenance"], ["limits", "Limits of this server"]]) {
    const entries = Object.entries(card[group] ?? {}).filter(([, value]) => value !== null);
    if (entries.length) add(title, lines(entries.map(([name, value]) => describeField(name, value))));
  }
  const details = el("details", {}, el("summary", {}, bdi(card.name)), facts);
  details.open = open;
  return details;
}

function setCards(cards) {
  results.cards = new Map(cards.map((card) => [card.name, card]));
  $("cards").hidden = false;
  if (cards.length > 1) $("h-cards").textContent = "Model cards";
  $("card-list").replaceChildren(...cards.map((card) => drawCard(card, cards.length === 1 && innerWidth >= 900)));
}

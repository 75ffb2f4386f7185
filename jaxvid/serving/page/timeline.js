"use strict";
// Draws the class timeline, and lists the classes at the time that the user selects.

const MAX_CURVES = 8;
const colour = (curve) => (curve < 0 ? "var(--edge)" : `var(--curve-${curve})`);
const middle = ({ start, end }) => (start + end) / 2;

// The classes to draw: most often the most likely one, then by their highest probability.
function mainClasses(windows) {
  const entries = new Map();
  for (const { top } of windows) {
    top.forEach(({ label, probability }, rank) => {
      const entry = entries.get(label) ?? { label, first: 0, most: 0 };
      entry.first += rank === 0;
      entry.most = Math.max(entry.most, probability);
      entries.set(label, entry);
    });
  }
  const order = [...entries.values()].sort((a, b) => b.first - a.first || b.most - a.most);
  return order.slice(0, MAX_CURVES).map((entry) => entry.label);
}

// The end of the time at which a window's classes are shown: halfway to the middle of the next window.
const boundary = (windows, i) =>
  (i + 1 < windows.length ? (middle(windows[i]) + middle(windows[i + 1])) / 2 : windows[i].end);

// The window whose classes are shown at a time.
function windowAt(windows, time) {
  const index = windows.findIndex((_, i) => time < boundary(windows, i));
  return index < 0 ? windows.length - 1 : index;
}

function ticks(most, count) { // round numbers from 0 up to `most`
  const raw = most / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => +(i * step).toPrecision(6));
}

let axes = null; // of the chart: {x: time → pixel, time: pixel → time}
let pending = false;
function drawTimelineSoon() {
  if (pending) return;
  pending = true;
  setTimeout(() => { pending = false; drawTimeline(); }, 50);
}

function chartFrame(svg, length) {
  const wide = Math.max(240, $("chart").clientWidth), high = 230;
  const edge = { left: 46, right: 8, top: 8, strip: 16, bottom: 60 };
  const x = (time) => edge.left + (time / length) * (wide - edge.left - edge.right);
  const y = (share) => high - edge.bottom - share * (high - edge.top - edge.bottom);
  axes = { x, time: (pixel) => ((pixel - edge.left) / (wide - edge.left - edge.right)) * length };
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const text = (at, below, words, anchor = "middle") => draw("text", { x: at, y: below, "text-anchor": anchor }, words);
  const grid = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
    draw("line", { x1: x(0), x2: x(length), y1: y(share), y2: y(share), stroke: share ? "var(--line)" : "var(--edge)" }),
    text(edge.left - 6, y(share) + 4, `${100 * share} %`, "end")]);
  const times = ticks(length, wide / 110).map((time) => text(x(time), high - 22, time));
  svg.replaceChildren(...grid, ...times, text((x(0) + x(length)) / 2, high - 4, "time (s)"),
    text(edge.left - 6, high - edge.bottom + 20, "top-1", "end"));
  return { x, y, strip: { y: high - edge.bottom + 8, height: edge.strip }, bottom: high - edge.bottom + 8 + edge.strip };
}

function drawTimeline() {
  const run = shownRun(), windows = run?.windows ?? [];
  $("timeline").hidden = !run?.plan;
  if (!run?.plan) return;
  resultChoice("timeline-model");
  const { plan } = run, classes = mainClasses(windows);
  const count = windows.length < plan.windows ? `${windows.length} of ${plan.windows} windows` : many(plan.windows, "window");
  $("timeline-note").textContent = `Each window of ${clock(plan.window)} is classified like a separate video. `
    + `A window starts every ${clock(plan.stride)}. ${count}.`;
  const svg = $("curves"), { x, y, strip, bottom } = chartFrame(svg, plan.seconds);
  classes.forEach((label, curve) => svg.append(...drawCurve(windows, label, curve, x, y)));
  windows.forEach((window, i) => {
    const from = i ? boundary(windows, i - 1) : window.start, to = boundary(windows, i);
    const fillColour = colour(classes.indexOf(window.top[0].label));
    svg.append(draw("rect", { x: x(from), width: Math.max(1, x(to) - x(from)), ...strip, fill: fillColour }));
  });
  svg.append(draw("line", { id: "cursor", y1: 0, y2: bottom, stroke: "var(--ink)", "stroke-width": 2 }));
  const legend = classes.map((label, curve) => el("li", {}, swatch(curve), bdi(label)));
  if (windows.some(({ top }) => !classes.includes(top[0].label))) legend.push(el("li", {}, swatch(-1), "other classes"));
  $("legend").replaceChildren(...legend);
  $("chart").setAttribute("aria-valuemax", plan.seconds.toFixed(2));
  $("chart").setAttribute("aria-valuemin", 0);
  showTime(results.time);
}

function drawCurve(windows, label, curve, x, y) {
  // Classes below the last listed one of a window are drawn at 0.
  const value = ({ top }) => top.find((entry) => entry.label === label)?.probability ?? 0;
  const points = windows.map((window) => [x(middle(window)), y(value(window))]);
  const shape = { points: points.map((point) => point.join()).join(" "), fill: "none", stroke: colour(curve) };
  const line = draw("polyline", { ...shape, "stroke-width": 2 });
  const dots = windows.length > 60 ? [] : points.map(([cx, cy]) => draw("circle", { cx, cy, r: 3, fill: colour(curve) }));
  return [line, ...dots];
}

const swatch = (curve) => el("i", { class: "swatch", style: { background: colour(curve) } });

// Moves the cursor of the timeline and lists the classes at this time.
function showTime(time) {
  results.time = time;
  const windows = shownRun()?.windows ?? [];
  if ($("timeline").hidden || !windows.length || !axes) return;
  const window = windows[windowAt(windows, time)], at = axes.x(Math.min(time, shownRun().plan.seconds));
  for (const end of ["x1", "x2"]) $("cursor")?.setAttribute(end, at);
  const top = window.top.slice(0, 5);
  $("moment").textContent = `At ${clock(time)}`;
  barList($("moment-bars"), top);
  $("chart").setAttribute("aria-valuenow", time.toFixed(2));
  $("chart").setAttribute("aria-valuetext", `${clock(time)}: ${top[0].label} ${percent(top[0].probability)}`);
}

function selectTime(time) {
  showTime(time);
  results.onSeek?.(time);
}

function watchChart() {
  const chart = $("chart");
  const timeAt = (event) => {
    const length = shownRun()?.plan?.seconds ?? 0;
    return Math.min(length, Math.max(0, axes.time(event.clientX - chart.getBoundingClientRect().left)));
  };
  chart.addEventListener("pointermove", (event) => { if (axes && !results.isPlaying()) selectTime(timeAt(event)); });
  chart.addEventListener("pointerdown", (event) => { if (axes) selectTime(timeAt(event)); });
  chart.addEventListener("keydown", (event) => {
    const windows = shownRun()?.windows ?? [];
    if (!windows.length) return;
    const at = windowAt(windows, results.time), last = windows.length - 1;
    const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 5, PageDown: at - 5,
      Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    selectTime(middle(windows[Math.min(last, Math.max(0, to))]));
  });
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (width === contentRect.width) return;
    width = contentRect.width;
    drawTimeline();
  }).observe(chart);
}

watchChart();

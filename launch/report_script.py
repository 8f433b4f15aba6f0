"""The script of a report's page: zoom, axis, letters of faults, and what a pointer shows. For `launch.report_page`.

It reads the JSON that `launch.report_time` leaves in the page, fetches nothing, and sets text, never HTML.
"""

SCRIPT = r"""
"use strict";
(() => {
const holder = document.getElementById("run");
if (!holder) return;
const run = JSON.parse(holder.textContent);
const time = document.querySelector(".time"), tip = document.querySelector(".tip");
const plots = [...time.querySelectorAll(".plot")], views = plots.map(p => p.querySelector(".zoomed"));
const first = views[0].viewBox.baseVal;
let from = first.x, span = first.width;
const start = [from, span], all = Math.max(run.seconds, 0.001);
const make = (tag, look, parent, text) => {
  const made = document.createElement(tag);
  made.className = look;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};
const overlays = plots.map(plot => make("div", "over", plot));
const lanes = plots.findIndex(plot => plot.dataset.chart === "lanes");
const two = number => String(number).padStart(2, "0");
const clock = (t, step) => {
  const digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
  if (all < 120) return t.toFixed(digits) + " s";
  const tick = 10 ** digits, s = Math.round(t * tick) / tick, h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
  const rest = two(Math.floor(s % 60)) + (digits ? (s % 1).toFixed(digits).slice(1) : "");
  return all >= 3600 ? `${h}:${two(m)}` + (step < 60 ? ":" + rest : "") : `${m}:${rest}`;
};
const steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400,
  43200];

const most = run.work.reduce((high, w) => Math.max(high, w[2]), 0);
function rescale() {
  const high = run.work.reduce((high, w) => w[1] > from && w[0] < from + span ? Math.max(high, w[2]) : high, 0) || most;
  time.querySelector(".labels.work span").textContent = high >= 100 ? Math.round(high) : +high.toPrecision(3);
  return high / most;
}

function draw() {
  span = Math.min(Math.max(span, 0.05), Math.max(all, start[1]));
  from = Math.min(Math.max(from, 0), Math.max(0, Math.max(all, start[0] + start[1]) - span));
  const width = plots[lanes].clientWidth || 1, x = t => (t - from) / span * width;
  views.forEach((view, n) => {
    const [height, part] = [view.height.baseVal.value, plots[n].dataset.chart === "work" ? rescale() : 1];
    view.setAttribute("viewBox", `${from} ${height * (1 - part)} ${span} ${height * part}`);
  });
  overlays.forEach(over => over.replaceChildren());
  const axis = time.querySelector(".ticks");
  axis.replaceChildren();
  const step = steps.find(s => s >= span / Math.max(2, width / 90)) || 86400;
  for (let n = Math.ceil(from / step - 1e-9); n * step <= from + span; n++) {
    const at = x(n * step);
    for (const over of overlays) make("i", "grid", over).style.left = at + "px";
    const text = make("span", "", axis, clock(n * step, step));
    text.style.left = Math.min(Math.max(at, 16), width - 16) + "px";
  }
  const many = run.marks.reduce((sum, m) => sum + (m[0] >= from && m[0] <= from + span), 0);
  time.classList.toggle("dense", many * 8 > width * run.lanes.length);
  const seen = run.marks.filter(m => m[1] >= 0 && m[0] >= from && m[0] <= from + span);
  if (seen.length * 17 < width * run.lanes.length) {
    const last = {};
    for (const [t, row, kind] of seen) {
      if (x(t) - (last[row] ?? -99) < 15) continue;
      last[row] = x(t);
      const mark = make("b", "", overlays[lanes], run.letters[kind]);
      mark.style.left = x(t) + "px";
      mark.style.top = row * run.row + run.row / 2 + "px";
    }
  }
}

function zoom(center, factor) { from = center - (center - from) * factor; span *= factor; draw(); }
function show(a, b) { from = a; span = b - a; draw(); }
const act = {
  all: () => show(0, all), in: () => zoom(from + span / 2, 0.5), out: () => zoom(from + span / 2, 2),
  back: () => show(from - span / 2, from + span / 2), on: () => show(from + span / 2, from + 1.5 * span),
};
for (const button of document.querySelectorAll("[data-do]")) button.onclick = act[button.dataset.do];
for (const button of document.querySelectorAll("[data-at]")) button.onclick = () => {
  const at = +button.dataset.at, long = +button.dataset.long;
  show(at - 2 - long, at + 2 * long + 2);
  time.scrollIntoView({block: "center"});
};
document.querySelector(".tools").hidden = false;

const lastBefore = (list, t, key) => {
  let low = 0, high = list.length;
  while (low < high) { const mid = (low + high) >> 1; if (key(list[mid]) <= t) low = mid + 1; else high = mid; }
  return low - 1;
};
function details(plot, t, y, near) {
  const lines = [clock(t, 0.1)];
  const marks = (row, kind) => {
    const meant = m => kind === undefined ? m[1] === row : m[2] === kind;
    const found = run.marks.filter(m => Math.abs(m[0] - t) <= near && meant(m));
    for (const m of found.slice(0, 6)) lines.push(`${clock(m[0], 0.1)}: ${run.kinds[m[2]]} ${m[3]} ${m[4]}`);
    if (found.length > 6) lines.push(`and ${found.length - 6} more`);
  };
  const chart = plot.dataset.chart;
  if (chart === "lanes") {
    const row = Math.floor(y / run.row), lane = run.lanes[row] || [];
    const life = lane[lastBefore(lane, t, one => one[2][0][1])];
    if (life && t <= life[3] + near) {
      const span = life[2][Math.max(0, lastBefore(life[2], t, one => one[1]))];
      const state = t <= life[3] ? run.states[span[0]] : life[4];
      lines.push(`${life[0]}${life[1] ? ", member " + life[1] : ""}: ${state}`);
      if (life[4]) lines.push(`from ${clock(life[2][0][1], 0.1)} to ${clock(life[3], 0.1)}, ${life[4]}`);
    }
    marks(row);
  } else if (chart === "faults") {
    const kinds = [...new Set(run.marks.map(m => m[2]))].sort((a, b) => a - b);
    marks(-1, kinds[Math.floor(y / (plot.clientHeight / kinds.length))]);
  } else if (chart === "members") {
    const at = lastBefore(run.members, t, one => one[0]);
    if (at >= 0) lines.push(`${run.members[at][1]} members`);
  } else {
    const at = run.work[lastBefore(run.work, t, one => one[0])];
    if (at && t <= at[1]) lines.push(`${at[2]} ${run.unit} a second`);
  }
  if (chart !== "faults") {
    const found = run.recoveries.filter(r => r[0] <= t + near && r[0] + r[1] >= t - near);
    for (const r of found.slice(0, 4)) lines.push(`recovery after ${r[2]}: ${r[1].toFixed(2)} s`);
  }
  return lines.join("\n");
}
let drag = null;
plots.forEach(plot => {
  const at = event => from + (event.clientX - plot.getBoundingClientRect().left) / plot.clientWidth * span;
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect(), t = at(event);
    if (drag && drag.box) {
      const left = Math.min(event.clientX, drag.x) - box.left;
      Object.assign(drag.box.style, {left: left + "px", width: Math.abs(event.clientX - drag.x) + "px"});
    }
    tip.textContent = details(plot, t, event.clientY - box.top, 5 * span / plot.clientWidth);
    tip.hidden = false;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10
      : event.clientY + 18) + "px";
  };
  plot.onpointerleave = () => { tip.hidden = true; };
  plot.onpointerdown = event => {
    if (event.pointerType !== "mouse") { plot.onpointermove(event); return; }
    plot.setPointerCapture(event.pointerId);
    drag = {x: event.clientX, t: at(event), box: make("i", "chosen", plot.querySelector(".over"))};
  };
  plot.onpointerup = event => {
    if (!drag) return;
    const a = Math.min(drag.t, at(event)), b = Math.max(drag.t, at(event)), far = Math.abs(event.clientX - drag.x) > 4;
    drag.box.remove();
    drag = null;
    if (far) show(a, b);
  };
  plot.ondblclick = act.all;
  plot.addEventListener("wheel", event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(at(event), event.deltaY > 0 ? 1.25 : 0.8);
  }, {passive: false});
});
addEventListener("resize", draw);
draw();
})();
"""

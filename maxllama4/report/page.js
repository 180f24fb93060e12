// What a pointer, a finger or the arrow keys show over figures. Everything is drawn without this script.
"use strict";

const format = (value) => {
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-4 || size >= 1e15)) return value.toExponential(3);
  return value.toLocaleString("en", { maximumSignificantDigits: 5 });
};

const make = (tag, className, text = "") => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text; // never markup
  return node;
};

// The points that a path was drawn through, in the units of the data.
const points = (path) => {
  const flat = path.getAttribute("d").split(/[M ]/).filter(Boolean).map(Number);
  return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
};

const nearest = (all, x) => {
  let low = 0, high = all.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (all[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - all[low - 1][0] < all[low][0] - x ? all[low - 1] : all[low];
};

const plots = [...document.querySelectorAll(".plot")];

const clear = () => document.querySelectorAll(".hair, .tip").forEach((node) => node.remove());

const showTip = (plot, share, heading, rows) => {
  const tip = make("div", "tip");
  tip.append(make("div", "", heading));
  for (const [className, name, value] of rows) {
    const row = make("div", "");
    if (className) row.append(make("b", `key ${className}`));
    row.append(make("span", "", name));
    if (value !== undefined) row.append(make("span", "", value));
    tip.append(row);
  }
  tip.style[share < 0.5 ? "left" : "right"] = `calc(${100 * (share < 0.5 ? share : 1 - share)}% + 10px)`;
  plot.append(tip);
};

const hair = (plot, share) => {
  const line = make("div", "hair");
  line.style.left = `${100 * share}%`;
  plot.append(line);
};

const curvesOf = (plot) => {
  plot.curves ??= [...plot.querySelectorAll("[data-name]")].map((path) => ({
    name: path.dataset.name,
    colour: (path.matches(".data") ? path.previousElementSibling : path).classList[1],
    points: points(path),
  }));
  return plot.curves;
};

// A line through the same step of all figures, and what the curves of this one are there.
const showCurves = (plot, share) => {
  const { x0, x1, log, factor, unit, label, marks } = plot.dataset;
  const at = Number(x0) + share * (x1 - x0);
  let step = at, distance = Infinity;
  const found = curvesOf(plot).filter((curve) => curve.points.length).map((curve) => {
    const point = nearest(curve.points, at);
    if (Math.abs(point[0] - at) < distance) [step, distance] = [point[0], Math.abs(point[0] - at)];
    return [curve, point];
  });
  const rows = found
    .filter(([curve, point]) => Math.abs(point[0] - step) <= Math.max(0.03 * (x1 - x0), 1) || curve.points.length < 60)
    .map(([curve, point]) => [
      curve.colour, curve.name, `${format(log === "1" ? 10 ** point[1] : point[1] * factor)} ${unit.length < 10 ? unit : ""}`,
    ]);
  for (const line of marks.split("\n").filter(Boolean)) {
    const [place, words] = line.split("\t");
    if (Math.abs(place - at) <= 0.01 * (x1 - x0)) rows.push(["", words]);
  }
  for (const other of plots) {
    if (other.dataset.label !== label || other.dataset.maps) continue;
    const place = (step - other.dataset.x0) / (other.dataset.x1 - other.dataset.x0);
    if (place >= 0 && place <= 1) hair(other, place);
  }
  showTip(plot, share, `${label} ${format(Math.round(step))}`, rows);
};

// Maps of load: two digits of base 64 a cell, the logarithm of the load; see load_map.py.
const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
const BOUNDS = [0.25, 0.5, 0.8, 1.25, 2, 4, Infinity];

const loads = (plot, shown) => {
  const text = plot.dataset.maps.split(" ")[shown];
  const cells = [];
  for (let i = 0; i < text.length; i += 2) {
    const level = 64 * DIGITS.indexOf(text[i]) + DIGITS.indexOf(text[i + 1]);
    cells.push(level === 4095 ? NaN : level === 0 ? 0 : 2 ** ((level - 2048) / 256));
  }
  return cells;
};

const shownOf = (plot) => Number(plot.parentNode.querySelector("input")?.value ?? 0);

const drawMap = (plot) => {
  const shown = shownOf(plot), width = Number(plot.dataset.width), steps = plot.dataset.steps.split(" ");
  const paths = Array(8).fill("");
  loads(plot, shown).forEach((load, i) => {
    if (Number.isNaN(load)) return;
    const kind = load === 0 ? 0 : 1 + BOUNDS.findIndex((bound) => load < bound);
    paths[kind] += `M${i % width} ${Math.floor(i / width)}h1v1h-1z`;
  });
  paths.forEach((path, kind) => plot.querySelector(`path.h${kind}`).setAttribute("d", path));
  plot.parentNode.querySelector("output").textContent = Number(steps[shown]).toLocaleString("en");
};

const showCell = (plot, share, height) => {
  const width = Number(plot.dataset.width), layers = plot.dataset.layers.split(" ");
  const x = Math.min(width - 1, Math.floor(share * width));
  const y = Math.min(layers.length - 1, Math.floor(height * layers.length));
  const load = loads(plot, shownOf(plot))[y * width + x];
  const words = Number.isNaN(load) ? "not known" : `${load.toPrecision(3)} × the even share`;
  showTip(plot, share, `layer ${layers[y]}, expert ${x}`, [["", words]]);
};

const show = (plot, share, height = 0.5) => {
  clear();
  share = Math.min(1, Math.max(0, share));
  if (plot.dataset.maps) showCell(plot, share, Math.min(1, Math.max(0, height)));
  else showCurves(plot, share);
};

for (const plot of plots) {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(plot, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  plot.addEventListener("pointerleave", clear);
  plot.addEventListener("blur", clear);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
    if (!move) return;
    event.preventDefault();
    plot.at = Math.min(1, Math.max(0, (plot.at ?? 0.5) + move));
    show(plot, plot.at);
  });
  plot.parentNode.querySelector("input")?.addEventListener("input", () => drawMap(plot));
}

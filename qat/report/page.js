"use strict";
// Draws the page from the JSON beside it. All text goes in as text nodes; nothing is parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const COLORS = 8;
const MOST = 8; // runs drawn at a time: as many as there are colours
const DASHES = ["none", "9 4", "2 4", "12 4 2 4"]; // of the lines through runs of one teacher and text
const SVG = "http://www.w3.org/2000/svg";
const chosen = new Set();
const colors = new Map(); // run to colour, kept while it is chosen
let order = { key: "kl", down: false };

const $ = id => document.getElementById(id);
const figure = (value, digits = 4) => value == null ? "–" : value.toFixed(digits);
const percent = value => value == null ? "–" : (100 * value).toFixed(1) + "%";
const color = run => `var(--c${colors.get(run)})`;
const whole = runs.filter(run => run.megabytes != null && run.status === "complete");
const measured = whole.filter(run => run.trains && run.kl != null);
const converted = [...new Map(whole.filter(run => run.kl0 != null).map(run => [run.conversion + run.ground, run])).values()]; // each once
const grounds = [...new Set([...measured, ...converted].map(run => run.ground))]; // teachers and texts: figures of two do not compare
const of = ground => measured.filter(run => run.ground === ground);
const best = ground => of(ground).reduce((one, other) => one && one.kl <= other.kl ? one : other, null);

function time(seconds) {
  if (seconds == null) return "–";
  if (seconds < 60) return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? minutes + " min" : Math.floor(minutes / 60) + " h " + String(minutes % 60).padStart(2, "0") + " min";
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  return fill(node, attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  return fill(node, attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(child => child != null).map(child => child instanceof Node ? child : String(child)));
  return node;
}

const empty = text => make("p", { class: "empty" }, text);

// ---- choosing ----

function choose(run, on) {
  if (on) {
    if (chosen.size >= MOST) drop(chosen.values().next().value);
    const taken = new Set(colors.values());
    colors.set(run, [...Array(COLORS).keys()].find(index => !taken.has(index)));
    chosen.add(run);
  } else drop(run);
}

function drop(run) {
  chosen.delete(run);
  colors.delete(run);
}

function toggle(run) {
  choose(run, !chosen.has(run));
  refresh();
}

function chooseBest() {
  [...chosen].forEach(drop);
  const found = new Map(); // one a preset, of the text that most were measured on: others compare nothing but noise
  const most = [...grounds].sort((a, b) => of(b).length - of(a).length)[0];
  for (const run of of(most).sort((a, b) => a.kl - b.kl)) if (!found.has(run.preset)) found.set(run.preset, run);
  const rest = runs.filter(run => run.held_out.length && !measured.includes(run));
  (found.size ? [...found.values()] : rest).slice(0, 4).forEach(run => choose(run, true));
  refresh();
}

const picked = () => [...chosen];

// ---- charts ----

// On a logarithmic scale at most `most`, as far as that leaves powers of ten to read it by.
function ticks(low, high, log, count = 5, most = 9) {
  if (log) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const lead of [1, 2, 5]) all.push(lead * 10 ** power);
    const inside = all.filter(tick => tick >= low * .999 && tick <= high * 1.001);
    const powers = inside.filter(tick => Math.abs(Math.log10(tick) - Math.round(Math.log10(tick))) < 1e-9);
    if (inside.length > most && powers.length > 1) return powers;
    if (inside.length >= 3) return inside;
    count = 9;
  }
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(lead => lead * power >= rough * .999);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) found.push(tick);
  return found;
}

const label = value => Math.abs(value) >= 1e4 ? value.toExponential(0) : String(+value.toPrecision(3));

function scale(values, from, to, log, pad) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) { low /= 1 + pad; high *= 1 + pad; }
  else { const more = (high - low || Math.abs(high) || 1) * pad; low -= more; high += more; }
  const warp = log ? Math.log : x => x;
  const at = value => from + (warp(value) - warp(low)) / ((warp(high) - warp(low)) || 1) * (to - from);
  return { at, low, high, log };
}

// Ticks whose labels, `room(text)` wide, do not come within each other.
function spaced(ticks, axis, room) {
  const kept = [];
  for (const tick of ticks) {
    const last = kept[kept.length - 1];
    if (last == null || Math.abs(axis.at(tick) - axis.at(last)) >= (room(label(tick)) + room(label(last))) / 2) kept.push(tick);
  }
  return kept;
}

const wide = text => 7.5 * text.length + 10;

function frame(width, height, margin, x, y, names) {
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": names.title });
  for (const tick of spaced(ticks(y.low, y.high, y.log), y, () => 18)) {
    svg.append(draw("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y.at(tick), y2: y.at(tick) }));
    svg.append(draw("text", { x: margin.left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, label(tick)));
  }
  for (const tick of spaced(ticks(x.low, x.high, x.log, width < 500 ? 4 : 7), x, wide))
    svg.append(draw("text", { x: x.at(tick), y: height - margin.bottom + 18, "text-anchor": "middle" }, label(tick)));
  svg.append(draw("text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, names.x));
  svg.append(draw("text", { x: margin.left - 8, y: 12, "text-anchor": "start", dx: -margin.left + 12 }, names.y));
  return svg;
}

const across = node => Math.max(280, node.clientWidth - (parseFloat(getComputedStyle(node).paddingLeft) || 0) * 2);

// The runs that no other beats on both size and `key`, from the smallest file on.
function front(shown, key) {
  const kept = [];
  for (const run of [...shown].sort((a, b) => a.megabytes - b.megabytes || a[key] - b[key]))
    if (!kept.length || run[key] < kept[kept.length - 1][key]) kept.push(run);
  return kept;
}

function quality() {
  const place = $("quality");
  if (!measured.length && !converted.length) return place.replaceChildren(empty("No complete run with the size of its file has been evaluated yet."));
  const width = across(place), small = width < 560, height = small ? 340 : 460;
  const margin = { left: 46, right: 20, top: 28, bottom: 42 };
  const kinds = [["converted", converted, "kl0"], ["trained", measured, "kl"]];
  const values = kinds.flatMap(([, shown, key]) => shown.map(run => run[key]));
  const sizes = [...measured, ...converted].map(run => run.megabytes);
  const x = scale(sizes, margin.left, width - margin.right, Math.min(...sizes) > 0, .07);
  const y = scale(values, height - margin.bottom, margin.top, Math.min(...values) > 0, .15);
  const svg = frame(width, height, margin, x, y, { title: "Full KL against megabytes", x: "MB of the packed file", y: "full KL" });
  const presets = [...new Set([...measured, ...converted].map(run => run.preset))].sort();
  const shade = preset => `var(--c${presets.indexOf(preset) % COLORS})`;
  for (const run of measured.filter(run => run.kl0 != null)) { // a student hangs on its conversion
    const at = x.at(run.megabytes);
    svg.append(draw("line", { class: "stem", style: `--c:${shade(run.preset)}`, x1: at, x2: at, y1: y.at(run.kl0), y2: y.at(run.kl) }));
  }
  const dots = [], best = [];
  for (const [kind, shown, key] of kinds) {
    grounds.forEach((ground, index) => {
      const joined = front(shown.filter(run => run.ground === ground), key);
      best.push(...joined.map(run => ({ run, x: x.at(run.megabytes), y: y.at(run[key]) })).filter(() => kind === "trained"));
      svg.append(draw("polyline", { class: `front ${kind}`, "stroke-dasharray": DASHES[index % DASHES.length], points: joined.map(run => `${x.at(run.megabytes)},${y.at(run[key])}`).join(" ") }));
    });
    for (const run of [...shown].sort((a, b) => chosen.has(a) - chosen.has(b))) { // the chosen on top
      const at = { cx: x.at(run.megabytes), cy: y.at(run[key]) };
      dots.push({ x: at.cx, y: at.cy });
      const bits = run.model_bits == null ? "" : `, ${figure(run.model_bits, 2)} bits a weight`;
      svg.append(draw("circle", {
        ...at, r: small ? 6 : 5.5, class: `dot ${kind}`, style: `--c:${shade(run.preset)}`, tabindex: 0, role: "button",
        "aria-label": `${run.id}, ${kind}, ${run.preset}, ${figure(run.megabytes, 1)} MB, KL ${figure(run[key])}, ${run.ground}`,
        onclick: () => toggle(run), onkeydown: event => { if (event.key === "Enter") toggle(run); },
        onmouseenter: event => tell(event, `${run.id}  ${run.preset}, ${kind}\nKL ${figure(run[key])} at ${figure(run.megabytes, 1)} MB${bits}\n${run.ground}\n${run.goal || run.name}`),
        onmouseleave: hush,
      }));
      if (chosen.has(run) && (kind === "trained" || !measured.includes(run))) svg.append(draw("circle", { ...at, r: small ? 10 : 9.5, class: "ring" }));
    }
  }
  const legend = make("ul", { class: "legend" }, ...presets.map(preset => make("li", {}, make("i", { style: `--c:${shade(preset)}` }), preset || "unnamed")));
  const key = (text, line, ...more) => make("li", {}, draw("svg", { viewBox: "0 0 28 12", width: 28, height: 12 }, draw("line", { class: `front ${line}`, x1: 0, x2: 28, y1: 6, y2: 6 }), ...more), text);
  const lines = make("ul", { class: "legend lines" },
    ...kinds.filter(([, shown]) => shown.length).map(([kind]) => key(kind, kind, draw("circle", { class: `dot ${kind}`, cx: 14, cy: 6, r: 5, style: "--c:var(--soft)" }))),
    ...(grounds.length < 2 ? [] : grounds.map((ground, index) => make("li", {}, draw("svg", { viewBox: "0 0 28 12", width: 28, height: 12 }, draw("line", { class: "front", x1: 0, x2: 28, y1: 6, y2: 6, "stroke-dasharray": DASHES[index % DASHES.length] })), ground))));
  place.replaceChildren(legend, lines, svg);
  names(svg, best, dots, { left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom });
}

// Names the best runs beside their dots, where a name sits on no other, on no dot and inside the frame.
function names(svg, best, dots, frame) {
  const kept = [];
  for (const { run, x, y } of best) {
    const text = draw("text", { class: "name" }, run.id);
    svg.append(text);
    const { width } = text.getBBox(), height = 15;
    const places = [[-width / 2, 24], [-width / 2, -13], [14, 5], [-width - 14, 5], [10, 20], [-width - 10, 20], [10, -10], [-width - 10, -10]];
    const free = places.map(([dx, dy]) => ({ left: x + dx, right: x + dx + width, bottom: y + dy + 4, top: y + dy + 4 - height, at: y + dy })).find(box =>
      box.left >= frame.left && box.right <= frame.right && box.top >= frame.top && box.bottom <= frame.bottom
      && kept.every(other => box.right + 4 < other.left || other.right + 4 < box.left || box.bottom < other.top || other.bottom < box.top)
      && dots.every(dot => dot.x + 6 < box.left || dot.x - 6 > box.right || dot.y + 6 < box.top || dot.y - 6 > box.bottom));
    if (!free) { text.remove(); continue; }
    kept.push(free);
    text.setAttribute("x", free.left);
    text.setAttribute("y", free.at);
  }
}

function curves(place, key, marks) {
  const shown = picked().filter(run => run[key].length);
  if (!shown.length) return place.replaceChildren(empty("None of the chosen runs trained."));
  const width = across(place), height = 320, margin = { left: 46, right: 16, top: 28, bottom: 42 };
  const points = shown.flatMap(run => run[key]);
  const log = points.every(point => point[1] > 0) && Math.max(...points.map(p => p[1])) > 4 * Math.min(...points.map(p => p[1]));
  const x = scale(points.map(point => point[0]), margin.left, width - margin.right, false, .02);
  const y = scale(points.map(point => point[1]), height - margin.bottom, margin.top, log, .08);
  const svg = frame(width, height, margin, x, y, { title: "Loss by step", x: "step", y: "nats" });
  for (const run of shown) {
    const path = run[key].map(([step, value]) => `${x.at(step).toFixed(1)},${y.at(value).toFixed(1)}`).join(" ");
    svg.append(draw("polyline", { class: marks ? "curve" : "curve thin", points: path, style: `stroke:${color(run)}` }));
    if (!marks) continue;
    const every = Math.max(1, Math.ceil(run[key].length * 26 / width)); // dots that hide no line
    run[key].forEach(([step, value], index) => index % every === 0 || index === run[key].length - 1 ? svg.append(draw("circle", {
      cx: x.at(step), cy: y.at(value), r: 4, class: "dot", style: `fill:${color(run)}`,
      onmouseenter: event => tell(event, `${run.id}\n${figure(value)} after ${step} steps`), onmouseleave: hush,
    })) : null);
  }
  place.replaceChildren(legend(shown), svg);
}

const legend = shown => make("ul", { class: "legend" }, ...shown.map(run => make("li", {}, make("i", { style: `--c:${color(run)}` }), run.id)));

function depth() {
  const place = $("depth");
  const used = new Map(); // one line a conversion, however many of the chosen runs share it
  for (const run of picked()) if (data.conversions[run.conversion] && !used.has(run.conversion)) used.set(run.conversion, run);
  if (!used.size) return place.replaceChildren(empty("No chosen run shows a conversion."));
  const leaves = [...new Set([...used.keys()].flatMap(name => Object.keys(data.conversions[name])))];
  const all = [...used.keys()].flatMap(name => Object.values(data.conversions[name]).flat()).filter(value => value > 0);
  const width = 280, height = 170, margin = { left: 40, right: 8, top: 10, bottom: 26 };
  const y = scale(all.length ? all : [1], height - margin.bottom, margin.top, true, .1);
  const parts = leaves.map(leaf => {
    const series = [...used].map(([name, run]) => [data.conversions[name][leaf] || [], run]);
    const x = scale([0, Math.max(1, ...series.map(([values]) => values.length - 1))], margin.left, width - margin.right, false, .02);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Output error of ${leaf} by block` });
    for (const tick of spaced(ticks(y.low, y.high, true, 4, 4), y, () => 18)) {
      svg.append(draw("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y.at(tick), y2: y.at(tick) }));
      svg.append(draw("text", { x: margin.left - 7, y: y.at(tick) + 4, "text-anchor": "end" }, label(tick)));
    }
    const last = Math.max(...series.map(([values]) => values.length)) - 1;
    svg.append(draw("text", { x: x.at(0), y: height - 6, "text-anchor": "start" }, "first"));
    svg.append(draw("text", { x: x.at(Math.max(last, 1)), y: height - 6, "text-anchor": "end" }, "last"));
    for (const [values, run] of series) {
      const path = values.map((value, index) => value > 0 ? `${x.at(index).toFixed(1)},${y.at(value).toFixed(1)}` : null).filter(Boolean);
      svg.append(draw("polyline", { class: "curve", points: path.join(" "), style: `stroke:${color(run)}` }));
    }
    return make("figure", {}, make("figcaption", {}, leaf), svg);
  });
  const key = make("ul", { class: "legend" }, ...[...used].map(([name, run]) => make("li", {}, make("i", { style: `--c:${color(run)}` }), `${run.preset || name} (${run.id})`)));
  place.replaceChildren(key, ...parts);
}

// ---- words ----

function facts() {
  const count = status => runs.filter(run => run.status === status).length;
  const spent = runs.reduce((sum, run) => sum + (run.seconds || 0), 0);
  const shown = [[runs.length, runs.length === 1 ? "run" : "runs"], [count("complete"), "complete"]];
  const broken = runs.length - count("complete");
  if (broken) shown.push([broken, "failed or interrupted"]);
  for (const ground of grounds.slice(0, 3)) {
    const run = best(ground);
    if (!run) continue;
    const where = grounds.length > 1 ? ` on ${ground}` : "";
    shown.push([figure(run.kl), `lowest full KL of a trained student${where}, ${run.id}`], [figure(run.megabytes, 1), "MB there"]);
  }
  shown.push([time(spent), "of runs in all"]);
  $("facts").replaceChildren(...shown.map(([value, name]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  $("title").textContent = runs.length ? `${runs.length === 1 ? "One run" : runs.length + " runs"} in ${data.outputs}` : `No runs yet in ${data.outputs}`;
  document.title = $("title").textContent;
}

const RARE = ["near", "far"]; // columns that are there where a run has such a figure
const COLUMNS = [
  ["id", "run", run => run.id, false], ["preset", "preset", run => run.preset || "–", false],
  ["kl", "full KL", run => figure(run.kl), true], ["megabytes", "MB", run => figure(run.megabytes, 1), true],
  ["status", "status", run => run.status, false], ["stage", "stage", run => run.stage || "–", false], ["kl0", "KL converted", run => figure(run.kl0), true],
  ["near", "KL at 64–127", run => figure(run.near), true], ["far", "KL at 1,024–2,047", run => figure(run.far), true],
  ["kd0", "KD before", run => figure(run.kd0), true], ["kd", "KD after", run => figure(run.kd), true], ["perplexity", "perplexity", run => figure(run.perplexity, 2), true],
  ["agreement", "agreement", run => percent(run.agreement), true], ["speed", "tokens/s", run => run.speed == null ? "–" : Math.round(run.speed).toLocaleString("en"), true],
  ["seconds", "time", run => time(run.seconds), true], ["name", "name", run => run.name || "–", false], ["ground", "teacher and text", run => run.ground || "–", false], ["goal", "goal", run => run.goal, false],
].filter(([key]) => !RARE.includes(key) || runs.some(run => run[key] != null));

function table() {
  const head = COLUMNS.map(([key, name, , numeric]) => make("th", {
    class: numeric ? "num" : null, scope: "col", "aria-sort": order.key === key ? (order.down ? "descending" : "ascending") : null,
  }, make("button", { type: "button", onclick: () => { order = { key, down: order.key === key ? !order.down : false }; table(); } }, name)));
  $("runs").tHead.replaceChildren(make("tr", {}, make("th", { scope: "col" }, make("span", { "aria-label": "chosen" }, "")), ...head));
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = run => [run.id, run.name, run.status, run.stage, run.ground, run.sweep, run.goal, run.notes, run.preset, run.device].join(" ").toLowerCase();
  const shown = runs.filter(run => words.every(word => text(run).includes(word))).sort(compare);
  $("runs").tBodies[0].replaceChildren(...shown.map(row));
  $("count").textContent = `${shown.length} of ${runs.length} shown, ${chosen.size} chosen` + (chosen.size === MOST ? " (the most at a time)" : "");
}

function compare(a, b) {
  const [left, right] = [a[order.key], b[order.key]];
  const blank = value => value == null || value === "";
  if (blank(left) || blank(right)) return blank(left) - blank(right);
  const sign = order.down ? -1 : 1;
  return sign * (typeof left === "number" ? left - right : String(left).localeCompare(String(right), "en", { numeric: true }));
}

const long = key => key === "goal" || key === "ground";

function row(run) {
  const box = make("input", { type: "checkbox", "aria-label": `Choose ${run.id}`, onchange: () => toggle(run) });
  box.checked = chosen.has(run);
  const cells = COLUMNS.map(([key, , show, numeric]) => key === "status"
    ? make("td", {}, make("span", { class: `status ${run.status}`, title: run.error || null }, run.status))
    : make("td", { class: numeric ? "num" : long(key) ? "goal" : null, title: long(key) ? run[key] || null : null }, show(run)));
  return make("tr", { class: chosen.has(run) ? "on" : null, style: chosen.has(run) ? `--c:${color(run)}` : "" }, make("td", { class: "pick" }, box), ...cells);
}

const MODELS = ["converted", "trained", "teacher"];
const SIDES = { kl: ["full KL", figure], kd_loss: ["KD loss", figure], perplexity: ["perplexity", value => figure(value, 2)], top1_agreement: ["same first choice", percent] };

// The figures of a run's conversion, student and teacher, a column each; what is known of one without these.
function sides(run) {
  const keys = Object.keys(SIDES).filter(key => run.sides[key]);
  const rows = keys.length ? keys.map(key => [key, run.sides[key]]) : [["kl", [run.kl0, run.trains ? run.kl : null, null]], ["kd_loss", [run.kd0, run.kd, null]]];
  const shown = rows.filter(([, values]) => values.some(value => value != null));
  if (!shown.length) return null;
  const head = make("tr", {}, make("td", {}), ...MODELS.map(name => make("th", { scope: "col", class: "num" }, name)));
  return make("table", { class: "sides" }, make("thead", {}, head), make("tbody", {}, ...shown.map(([key, values]) => make("tr", {},
    make("th", { scope: "row" }, SIDES[key][0]), ...values.map(value => make("td", { class: "num" }, SIDES[key][1](value)))))));
}

function cards() {
  const shown = picked().map(run => {
    const figures = [["MB", figure(run.megabytes, 1)], ["bits a weight", figure(run.model_bits, 2)], ["of quantized layers", figure(run.bits, 2)], ["time", time(run.seconds)]];
    return make("article", { class: "card", style: `--c:${color(run)}` },
      make("h3", {}, `${run.id}  ${run.name || run.stage}`),
      run.goal ? make("p", {}, run.goal) : null,
      run.verdict ? make("p", { class: "status failed" }, run.verdict) : null,
      run.error ? make("p", { class: `status ${run.status}` }, `${run.status}: ${run.error}`) : null,
      sides(run),
      make("dl", { class: "figures" }, ...figures.filter(([, value]) => value !== "–").map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
      make("p", { class: "quiet" }, [run.device, run.started.slice(0, 10), run.sweep, run.ground].filter(Boolean).join(" · ")),
      run.notes ? make("p", { class: "quiet" }, run.notes) : null,
      run.command ? make("pre", {}, run.command) : null);
  });
  $("chosen").replaceChildren(...(shown.length ? shown : [empty("Choose runs in the table or in the chart above.")]));
}

const FIRST = ["teacher", "converted"]; // models of a run before its student
const rank = model => FIRST.includes(model) ? FIRST.indexOf(model) : FIRST.length;

function samples() {
  const place = $("samples");
  const shown = picked().filter(run => run.samples.length);
  if (!shown.length) return place.replaceChildren(empty("No chosen run left samples."));
  const prompts = [...new Set(shown.flatMap(run => run.samples.map(sample => sample.prompt)))];
  place.replaceChildren(...prompts.flatMap(prompt => [make("p", { class: "prompt" }, prompt), ...shown.map(run => {
    const sample = run.samples.find(one => one.prompt === prompt);
    const said = Object.entries(sample ? sample.answers : {}).sort(([a], [b]) => rank(a) - rank(b));
    return !said.length ? null : make("div", { class: "answers", style: `--c:${color(run)}` }, ...said.map(([model, text]) =>
      make("div", { class: "answer" }, make("h3", {}, `${run.id}, ${model === "distilled" ? "trained" : model}`), make("p", {}, text))));
  }).filter(Boolean)]));
}

function times() {
  const table = $("times");
  if (!data.times.length) return table.tBodies[0].replaceChildren(make("tr", {}, make("td", { class: "quiet" }, "No conversion yet.")));
  const names = ["instance", "cores", "time", "conversion", "device", "made", "last"];
  const head = names.map(name => make("th", { scope: "col", class: name === "cores" || name === "made" ? "num" : null }, make("span", {}, name)));
  table.tHead.replaceChildren(make("tr", {}, ...head));
  table.tBodies[0].replaceChildren(...data.times.map(([instance, device, cores, name, count, told, last]) => make("tr", {},
    make("td", {}, instance || "–"), make("td", { class: "num" }, cores || "–"), make("td", {}, told || "–"), make("td", {}, name),
    make("td", {}, device || "–"), make("td", { class: "num" }, count), make("td", {}, last || "–"))));
}

function settings(run, key) {
  if (key in run.settings) return run.settings[key];
  return !run.known || run.unset.includes(key) ? undefined : data.common[key];
}

function differences() {
  const shown = picked().filter(run => run.known);
  const table = $("diff");
  const keys = Object.keys(data.common).filter(key => new Set(shown.map(run => JSON.stringify(settings(run, key)))).size > 1);
  const text = value => value === undefined ? "–" : value === null ? "null" : String(value) || "(empty)";
  if (shown.length < 2 || !keys.length) {
    table.tHead.replaceChildren();
    const why = shown.length < 2 ? "Choose two runs or more to see where they differ." : "The chosen runs are configured alike.";
    return table.tBodies[0].replaceChildren(make("tr", {}, make("td", { class: "quiet" }, why)));
  }
  table.tHead.replaceChildren(make("tr", {}, make("th", { scope: "col" }, make("span", {}, "setting")), ...shown.map(run => make("th", { scope: "col" }, make("span", {}, make("i", { class: "swatch", style: `--c:${color(run)}` }), run.id)))));
  table.tBodies[0].replaceChildren(...keys.map(key => make("tr", {}, make("th", { scope: "row" }, key), ...shown.map(run => make("td", {}, text(settings(run, key)))))));
}

// ---- the rest ----

function tell(event, text) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = event.target.getBoundingClientRect();
  const left = Math.min(box.right + 10, document.documentElement.clientWidth - tip.offsetWidth - 10);
  tip.style.left = `${Math.max(10, left) + scrollX}px`;
  tip.style.top = `${box.top + scrollY - tip.offsetHeight - 8}px`;
}

function hush() { $("tip").hidden = true; }

function refresh() {
  hush();
  quality(); table(); cards(); curves($("held"), "held_out", true); curves($("loss"), "loss", false); depth(); samples(); differences();
}

facts();
times();
chooseBest();
$("filter").addEventListener("input", table);
$("best").addEventListener("click", chooseBest);
$("none").addEventListener("click", () => { [...chosen].forEach(drop); refresh(); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; refresh(); } });

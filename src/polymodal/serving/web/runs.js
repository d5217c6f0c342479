"use strict";
// Training runs, as they grow: a list, curves drawn as SVG, and answers to held-out questions.

const POLL_MS = 2000, POINTS = 500, EDGE = 46; // of a chart's left side, for its numbers
const SVG = "http://www.w3.org/2000/svg";
let run = null, polling = null;

function svg(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

const short = (value) => (value === null || value === undefined ? "–" : value !== 0 && Math.abs(value) < 0.01 ? Number(value.toPrecision(3)).toExponential() : number(value, Math.abs(value) < 10 ? 4 : Math.abs(value) < 1000 ? 2 : 0));

function span(seconds) {
  const style = { style: "unit", maximumFractionDigits: 0, unitDisplay: "short" };
  const [size, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]].find(([each]) => seconds >= each) ?? [1, "second"];
  return (Math.max(0, seconds) / size).toLocaleString(language, { ...style, unit, maximumFractionDigits: size >= 3600 ? 1 : 0 });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough)), step = power * ([1, 2, 5, 10].find((each) => each * power >= rough) ?? 10);
  return Array.from({ length: Math.floor(high / step) - Math.ceil(low / step) + 1 }, (_, n) => (Math.ceil(low / step) + n) * step);
}

function thinned(points) { // means of neighbours, so that long runs stay light
  const size = Math.ceil(points.length / POINTS);
  if (size < 2) return points;
  return Array.from({ length: Math.ceil(points.length / size) }, (_, n) => points.slice(n * size, (n + 1) * size))
    .map((some) => [some.at(-1)[0], some.reduce((sum, [, y]) => sum + y, 0) / some.length]);
}

function smoothed(points) {
  const keep = 1 - 1 / Math.max(3, points.length / 20);
  let mean = 0, weight = 0;
  return points.map(([x, y]) => (mean = keep * mean + (1 - keep) * y, weight = keep * weight + (1 - keep), [x, mean / weight]));
}

// Lines are {name, points: [[step, value]], look: a class, dots}.
function chart(title, lines, height, wide = false) {
  const inner = $("run").clientWidth - 2 * parseFloat(getComputedStyle($("run")).paddingLeft), columns = wide ? 1 : Math.max(1, Math.floor((inner + 16) / 416));
  const width = Math.max(240, Math.round((inner - 16 * (columns - 1)) / columns - 34)); // as style.css lays charts out
  const kept = lines.map((line) => ({ ...line, points: thinned(line.points) })).filter(({ points }) => points.length);
  if (!kept.length) return null;
  const every = kept.flatMap(({ points }) => points), xs = every.map(([x]) => x), ys = every.map(([, y]) => y).sort((a, b) => a - b);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [ys[0], Math.max(ys[Math.floor(0.995 * (ys.length - 1))], ...kept.map(({ points }) => points.at(-1)[1]))]; // one peak hides nothing
  if (high - low < 1e-12) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const x = (value) => EDGE + (value - left) / (right - left || 1) * (width - EDGE - 8), y = (value) => height - 22 - (Math.min(value, high) - low) / (high - low) * (height - 34);
  const [first, last] = [kept[0].points[0][1], kept[0].points.at(-1)[1]];
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": t("curve", title, short(first), short(last), number(right)) });
  for (const value of ticks(low, high, 4)) image.append(svg("path", { class: "grid", d: `M${EDGE} ${y(value)}H${width - 8}` }), svg("text", { x: 40, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  for (const value of ticks(left, right || 1, width / 75)) image.append(svg("text", { x: x(value), y: height - 4, "text-anchor": "middle" }, number(value)));
  for (const { points, look, dots } of kept) {
    image.append(svg("path", { class: look, d: points.map(([a, b], n) => `${n ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("") }));
    if (dots) for (const [a, b] of points) image.append(svg("circle", { class: look, cx: x(a), cy: y(b), r: 2.6 }));
  }
  const legend = el("div", { className: "legend" }), rule = image.appendChild(svg("path", { class: "grid" }));
  const tell = (at) => legend.replaceChildren(...(at === null ? [] : [el("span", { textContent: t("at_step", number(at)) })]), ...kept.map(({ name, points, look }) => {
    const value = (at === null ? points.at(-1) : points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best)))[1];
    return el("span", {}, el("i", { className: look }), `${name} ${short(value)}`);
  }));
  image.onpointermove = (event) => {
    const box = image.getBoundingClientRect(), at = Math.round(left + ((event.clientX - box.left) / box.width * width - EDGE) / (width - EDGE - 8) * (right - left));
    const step = Math.min(right, Math.max(left, at));
    rule.setAttribute("d", `M${x(step)} 10V${height - 22}`);
    tell(step);
  };
  image.onpointerleave = () => (rule.removeAttribute("d"), tell(null));
  tell(null);
  return el("section", { className: wide ? "chart wide" : "chart" }, el("h3", { textContent: title }), image, legend);
}

function curves({ log, evals }) {
  const of = (rows, key) => rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.step, row[key]]);
  const table = (key) => [...new Set(log.flatMap((row) => Object.keys(row[key] ?? {})))].filter(Boolean).map((name) => ({ name, points: log.filter((row) => Number.isFinite(row[key]?.[name])).map((row) => [row.step, row[key][name]]) }));
  const looks = (lines) => lines.sort((a, b) => b.points.length - a.points.length).slice(0, 6).map((line, n) => ({ ...line, look: `c${n}` }));
  const loss = of(log, "loss"), kinds = [...table("loss_by_kind"), ...table("terms")].filter(({ points }) => points.length > 2);
  return [
    chart(t("loss"), [{ name: t("loss"), points: loss, look: "faint" }, { name: t("smoothed"), points: smoothed(loss), look: "c0" }, { name: t("held_out"), points: of(evals, "loss"), look: "c1", dots: true }], 250, true),
    kinds.length > 1 ? chart(t("loss_kinds"), looks(kinds.map((line) => ({ ...line, points: smoothed(line.points) }))), 200) : null,
    chart(t("learning_rate"), looks(table("learning_rate")), 200),
    chart(t("grad_norm"), [{ name: t("grad_norm"), points: of(log, "grad_norm"), look: "c0" }], 200),
    chart(t("speed"), [{ name: t("speed"), points: of(log, "tokens_per_s"), look: "c2" }], 200),
  ].filter(Boolean);
}

async function picture(name) {
  run.urls[name] ??= api(`${run.path}?image=${encodeURIComponent(name)}`).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob));
  return run.urls[name];
}

function image(name) {
  const node = el("img", { alt: name });
  picture(name).then((url) => (node.src = url)).catch(() => node.remove());
  return node;
}

function samples({ evals, images }) {
  const by = new Map();
  for (const { step, answers } of evals) for (const entry of answers ?? []) by.set(entry.id, { ...by.get(entry.id), ...entry, said: [...(by.get(entry.id)?.said ?? []), [step, entry.answer ?? entry.error ?? ""]] });
  const cards = [...by.values()].map(({ question, expected, said, images: shown }) => el("div", { className: "sample" },
    el("div", {}, ...(shown ?? []).filter((name) => images.includes(name)).map(image)), el("b", { textContent: question ?? "" }),
    ...said.filter(([, text], n) => !n || text !== said[n - 1][1]).slice(-3).map(([step, text]) => el("p", {}, el("span", { className: "muted", textContent: `${t("at_step", number(step))}  ` }), text)),
    el("p", { className: "muted", textContent: expected ? `${t("expected")}: ${expected}` : "" })));
  const drawn = images.filter((name) => name.startsWith("reconstructions/")).slice(-2);
  return [
    ...(cards.length ? [el("h2", { textContent: t("answers") }), el("div", { className: "samples" }, ...cards)] : []),
    ...(drawn.length ? [el("h2", { textContent: t("images_of") }), el("div", { className: "samples drawn" }, ...drawn.map(image))] : []),
  ];
}

function drawRun() {
  const last = run?.log.at(-1), shown = (key, value) => el("div", {}, el("b", { textContent: value }), el("span", { className: "muted", textContent: t(key) }));
  if (!last) return $("run").replaceChildren(el("p", { className: "muted", textContent: $("run-list").children.length ? t("choose_run") : "" }));
  $("run").replaceChildren(el("h1", { textContent: run.id }),
    el("div", { className: "numbers" }, shown("step", number(last.step)), shown("loss", short(last.loss)), shown("samples", number(last.samples ?? 0)), shown("time", span(last.elapsed_s ?? 0))),
    el("div", { className: "charts" }, ...curves(run)), ...samples(run));
}

async function grow() {
  const mine = run;
  let changed = false, more = true;
  while (more && mine === run) {
    const found = await (await api(`${mine.path}?log=${mine.cursors.log}&evals=${mine.cursors.evals}`)).json();
    changed ||= String(found.images) !== String(mine.images);
    mine.images = found.images;
    for (const key of ["log", "evals"]) {
      if (found[key].anew) mine[key] = [];
      changed ||= found[key].rows.length > 0;
      mine[key].push(...found[key].rows);
      mine.cursors[key] = found[key].cursor;
    }
    more = found.log.more || found.evals.more;
  }
  if (mine === run && changed) drawRun();
}

function open(id) {
  for (const url of Object.values(run?.urls ?? {})) url.then(URL.revokeObjectURL, () => {});
  run = { id, path: `/v1/runs/${id.split("/").map(encodeURIComponent).join("/")}`, log: [], evals: [], images: [], urls: {}, cursors: { log: "", evals: "" } };
  $("run").scrollTop = 0;
  look();
}

async function look() {
  clearTimeout(polling);
  if ($("runs").hidden) return;
  try {
    const { data } = await (await api("/v1/runs")).json();
    $("no-runs").hidden = data.length > 0;
    if (!run && data.length) return open(data[0].id);
    const focused = document.activeElement?.dataset.run, now = Date.now() / 1000;
    $("run-list").replaceChildren(...data.map(({ id, step, loss, changed }) => el("li", {}, el("button", {
      type: "button", "data-run": id, "aria-current": String(id === run?.id), onclick: () => open(id),
    }, el("b", { textContent: id }), el("small", { textContent: [t("at_step", number(step ?? 0)), short(loss), now - changed < 60 ? t("live") : t("ago", span(now - changed))].join(" · ") })))));
    if (focused) [...$("run-list").querySelectorAll("button")].find((each) => each.dataset.run === focused)?.focus();
    if (run) await grow();
    else drawRun();
  } catch (error) {
    $("run").replaceChildren(el("p", { className: "error", role: "alert", textContent: error.message }));
  }
  polling = setTimeout(look, document.hidden ? 5 * POLL_MS : POLL_MS);
}

addEventListener("resize", () => $("runs").hidden || drawRun());
document.addEventListener("view", look);
document.addEventListener("language", () => (drawRun(), look()));
look();

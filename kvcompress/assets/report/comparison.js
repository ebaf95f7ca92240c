/* Draws the Pareto curves of a comparison from the compare.json that the page holds. */
"use strict";

const { comparison } = JSON.parse(document.getElementById("document").textContent);
const NARROW = matchMedia("(max-width: 640px)");
const ORIGINAL = comparison.original.bytes_per_token;
const CONFIG = {
  background: "transparent",
  font: 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif',
  view: { stroke: null },
  axis: {
    labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)", domainColor: "var(--line)",
    tickColor: "var(--line)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400,
  },
  legend: { labelColor: "var(--ink)", labelFontSize: 12, symbolSize: 90, columnPadding: 18 },
};

/** Families of points: how they are called, drawn, and in which order they stand in the legend. */
const SERIES = [
  { name: "ours", colour: "var(--s0)", shape: "circle", of: (c) => c.kind === "ours" },
  { name: "kivi", colour: "var(--s1)", shape: "diamond", of: (c) => c.method.startsWith("kivi") },
  { name: "hqq", colour: "var(--s2)", shape: "square", of: (c) => /^hqq-\dbit$/.test(c.method) },
  { name: "hqq, each token once", colour: "var(--s2)", shape: "cross", of: (c) => c.method.startsWith("hqq") },
  { name: "quanto", colour: "var(--s3)", shape: "triangle-up", of: (c) => /^quanto-\dbit$/.test(c.method) },
  { name: "quanto, each token once", colour: "var(--s3)", shape: "triangle-down", of: (c) => c.method.startsWith("quanto") },
  { name: "fp8", colour: "var(--muted)", shape: "wedge", of: (c) => c.method.startsWith("fp8") },
  { name: "published, our code", colour: "var(--muted)", shape: "stroke", of: () => true },
];

const FIGURES = {
  ratio: {
    chart: "chart-ratio", value: (cell) => cell.ratio - 1, title: "ratio",
    scale: { type: "symlog", constant: 0.001, nice: false },
    ticks: [-0.001, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30], label: "format(datum.value + 1, '~g')",
  },
  kl_nats: {
    chart: "chart-kl", value: (cell) => cell.kl_nats, title: "KL, nats",
    scale: { type: "log", nice: false },
    ticks: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3], label: "format(datum.value, '~g')",
  },
};

const named = (cell) => (cell.keep_asked === null ? cell.method : `${cell.method} at ${cell.keep_asked}`);
const drawn = {};

/** One row for each measured cell: where it stands, and what hovering over it says. */
function points(figure) {
  const said = Object.fromEntries(comparison.verdicts[figure].map((v) => [named(v), v.verdict]));
  return comparison.cells.filter((cell) => "ratio" in cell).map((cell) => ({
    bytes: cell.bytes_per_token, figure: FIGURES[figure].value(cell), series: SERIES.find((s) => s.of(cell)).name,
    line: cell.kind === "published" ? cell.method : SERIES.find((s) => s.of(cell)).name,
    name: named(cell), short: cell.kind === "ours" ? String(cell.keep_asked) : cell.method.replace("-unscaled", ", unscaled"),
    "bytes a token": cell.bytes_per_token.toLocaleString("en", { maximumFractionDigits: 0 }),
    left: `${(100 * cell.keep).toPrecision(3)}%`,
    ratio: cell.ratio_standard_error === null ? cell.ratio.toFixed(4)
      : `${cell.ratio.toFixed(4)} ± ${cell.ratio_standard_error.toFixed(4)}`,
    KL: `${cell.kl_nats.toPrecision(3)} nats`, "exact window": `${cell.recent} tokens`,
    "against ours": said[named(cell)] || "",
    said: `${named(cell)}: ${cell.bytes_per_token} bytes a token, ratio ${cell.ratio}, KL ${cell.kl_nats}`,
  }));
}

/** The points that no other beats in both, from the fewest bytes on: computed by the library, drawn as steps. */
function front(rows, figure) {
  const names = new Set(comparison.front[figure]);
  return rows.filter((row) => names.has(row.name)).sort((a, b) => a.bytes - b.bytes);
}

function draw(figure) {
  const { chart, scale, ticks, label, title } = FIGURES[figure];
  const rows = points(figure);
  if (!rows.length) return null;
  const shares = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1].map((share) => share * ORIGINAL);
  const bytes = rows.map((row) => row.bytes);
  const range = [Math.min(...bytes) / 1.25, Math.max(...bytes) * 1.3];
  const inside = shares.filter((b) => b >= range[0] && b <= range[1]);
  const share = `format(datum.value / ${ORIGINAL}, '.3~p')`;
  const x = {
    field: "bytes", type: "quantitative", scale: { type: "log", domain: range, nice: false },
    axis: {
      values: inside, title: "bytes a token, and the share that is left", labelOverlap: false,
      labelExpr: NARROW.matches ? share : `format(datum.value, ',.0f') + ' (' + ${share} + ')'`,
    },
  };
  const values = rows.map((row) => row.figure);
  const y = {
    field: "figure", type: "quantitative", scale,
    axis: { values: ticks, labelExpr: label, title, titleAngle: 0, titleAlign: "left", titleX: 4, titleY: -8 },
  };
  if (figure === "kl_nats") y.scale = { ...scale, domain: [Math.min(...values) / 1.5, Math.max(...values) * 1.5] };
  const used = SERIES.filter((s) => rows.some((row) => row.series === s.name));
  const domain = used.map((s) => s.name);
  const legend = { title: null, orient: "bottom", columns: NARROW.matches ? 2 : 4, symbolStrokeWidth: 2 };
  const color = { field: "series", scale: { domain, range: used.map((s) => s.colour) }, legend };
  const shape = { field: "series", scale: { domain, range: used.map((s) => s.shape) }, legend };
  const tooltip = ["name", "bytes a token", "left", "ratio", "KL", "exact window", "against ours"].map((field) => ({ field }));
  const spec = {
    width: "container", height: NARROW.matches ? 340 : 400, autosize: { type: "fit-x", contains: "padding" },
    padding: { top: 20, left: 0, right: 12, bottom: 0 },
    config: CONFIG, description: `${title} against bytes a token`,
    layer: [
      {
        data: { values: front(rows, figure) },
        mark: { type: "line", interpolate: "step-after", color: "var(--muted)", strokeWidth: 6, opacity: 0.25, aria: false },
        encoding: { x, y },
      },
      {
        data: { values: rows },
        mark: { type: "line", strokeWidth: 1.5, opacity: 0.8, aria: false },
        encoding: { x, y, color: { ...color, legend: null }, detail: { field: "line" } },
      },
      {
        data: { values: rows },
        mark: { type: "point", size: 90, filled: true, opacity: 1, stroke: "var(--surface)", strokeWidth: 1 },
        encoding: { x, y, color, shape, tooltip, description: { field: "said" } },
      },
      {
        data: { values: NARROW.matches ? [] : rows },
        mark: { type: "text", align: "left", dx: 8, dy: -7, fontSize: 11, aria: false },
        encoding: { x, y, text: { field: "short" }, color: { ...color, legend: null } },
      },
    ],
  };
  if (drawn[chart]) drawn[chart].finalize();
  const options = { renderer: "svg", actions: false, ast: true, tooltip: { disableDefaultStyle: true } };
  return vegaEmbed(`#${chart}`, spec, options).then((result) => { drawn[chart] = result; });
}

function offerThemes() {
  const button = document.getElementById("theme");
  const names = { "": "auto", light: "light", dark: "dark" };
  const show = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = `Colours: ${names[theme]}`;
  };
  const order = Object.keys(names);
  button.onclick = () => show(order[(order.indexOf(document.documentElement.dataset.theme || "") + 1) % order.length]);
  show("");
}

function drawAll() {
  return Promise.all(Object.keys(FIGURES).map(draw)).then(
    () => { document.documentElement.dataset.drawn = "yes"; },
    (error) => console.error(error)
  );
}

offerThemes();
NARROW.addEventListener("change", drawAll);
drawAll();

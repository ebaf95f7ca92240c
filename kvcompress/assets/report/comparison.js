/* Draws the Pareto curves of a comparison from the compare.json that the page holds. */
const { comparison } = JSON.parse(document.getElementById("document").textContent);
const ORIGINAL = comparison.original.bytes_per_token;

/** Families of points: how they are called and drawn, in the legend's order. `label`: what stands beside a point. */
const SERIES = [
  { name: "ours", colour: "var(--s0)", shape: "circle", of: (c) => c.kind === "ours", label: (c) => String(c.keep_asked) },
  { name: "published, our code", colour: "var(--muted)", shape: "circle", of: (c) => c.kind === "published", label: (c) => c.method },
  { name: "kivi", colour: "var(--s1)", shape: "diamond", of: (c) => c.method.startsWith("kivi"), label: bits },
  { name: "hqq", colour: "var(--s2)", shape: "square", of: (c) => /^hqq-\dbit$/.test(c.method), label: bits },
  { name: "hqq, each token once", colour: "var(--s2)", shape: "cross", of: (c) => c.method.startsWith("hqq"), label: bits },
  { name: "quanto", colour: "var(--s3)", shape: "triangle-up", of: (c) => /^quanto-\dbit$/.test(c.method), label: bits },
  { name: "quanto, each token once", colour: "var(--s3)", shape: "triangle-down", of: (c) => c.method.startsWith("quanto"), label: bits },
  { name: "TurboQuant", colour: "var(--s4)", shape: "square", of: (c) => /^turboquant(?!.*all-layers)/.test(c.method), label: preset },
  { name: "TurboQuant, no exact layers", colour: "var(--s4)", shape: "cross", of: (c) => c.method.startsWith("turboquant"), label: preset },
  { name: "FP4", colour: "var(--s5)", shape: "diamond", of: (c) => /^(nvfp4|ultraquant)/.test(c.method), label: preset },
  { name: "8 bits, a scale a token", colour: "var(--ink)", shape: "diamond", of: (c) => c.method.endsWith("per-token-head"), label: preset },
  { name: "fp8", colour: "var(--ink)", shape: "triangle-right", of: () => true, label: () => "fp8" },
];

function bits(cell) {
  return cell.method.match(/\d(?=bit)/)[0] + " bit";
}

function preset(cell) {
  return cell.method.replace(/^turboquant-|-all-layers$|-per-token-head$/g, "");
}

const FIGURES = {
  ratio: {
    chart: "chart-ratio", value: (cell) => cell.ratio - 1, title: "ratio",
    scale: { type: "symlog", constant: 0.001, nice: false },
    ticks: [-0.001, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 4, 9, 29, 99], label: "format(datum.value + 1, '~g')",
  },
  kl_nats: {
    chart: "chart-kl", value: (cell) => cell.kl_nats, title: "KL, nats",
    scale: { type: "log", nice: false },
    ticks: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10], label: "format(datum.value, '~g')",
  },
};

const named = (cell) => (cell.keep_asked === null ? cell.method : `${cell.method} at ${cell.keep_asked}`);

/** One row for each measured cell: where it stands, and what hovering over it says. */
function points(figure) {
  const said = Object.fromEntries(comparison.verdicts[figure].map((v) => [named(v), v.verdict]));
  return comparison.cells.filter((cell) => "ratio" in cell).map((cell) => {
    const series = SERIES.find((s) => s.of(cell));
    const error = cell.ratio_standard_error;
    return {
      bytes: cell.bytes_per_token, figure: FIGURES[figure].value(cell), name: named(cell), series: series.name,
      line: cell.kind === "published" ? cell.method : series.name, label: series.label(cell),
      "bytes a token": cell.bytes_per_token.toLocaleString("en", { maximumFractionDigits: 0 }),
      left: `${(100 * cell.keep).toPrecision(3)}%`,
      ratio: cell.ratio.toFixed(4) + (error === null ? "" : ` ± ${error.toFixed(4)}`),
      KL: `${cell.kl_nats.toPrecision(3)} nats`, "exact window": `${cell.recent} tokens`,
      "against ours": said[named(cell)] || "",
      said: `${named(cell)}: ${cell.bytes_per_token} bytes a token, ratio ${cell.ratio}, KL ${cell.kl_nats}`,
    };
  });
}

/** One label for points of as many bytes that would say the same: beside the highest. */
function labelled(rows) {
  const highest = {};
  for (const row of rows) {
    const key = `${row.label} ${Math.round(row.bytes)}`;
    if (!highest[key] || highest[key].figure < row.figure) highest[key] = row;
  }
  return Object.values(highest);
}

/** The points that no other beats in both, from the fewest bytes on: computed by the library, drawn as steps. */
function front(rows, figure) {
  const names = new Set(comparison.front[figure]);
  return rows.filter((row) => names.has(row.name)).sort((a, b) => a.bytes - b.bytes);
}

function drawCurves(figure) {
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
  const legend = {
    title: null, orient: "top", columns: NARROW.matches ? 2 : 4, labelColor: "var(--ink)", labelFontSize: 12,
    symbolSize: 90, symbolOpacity: 1, columnPadding: 18, offset: 24,
  };
  const color = { field: "series", scale: { domain, range: used.map((s) => s.colour) }, legend };
  const shape = { field: "series", scale: { domain, range: used.map((s) => s.shape) }, legend };
  const tooltip = ["name", "bytes a token", "left", "ratio", "KL", "exact window", "against ours"].map((field) => ({ field }));
  const spec = {
    height: NARROW.matches ? 340 : 400, padding: { top: 4, left: 0, right: 12, bottom: 8 },
    layer: [
      {
        data: { values: front(rows, figure) },
        mark: { type: "line", interpolate: "step-after", color: "var(--muted)", strokeWidth: 6, opacity: 0.25, aria: false },
        encoding: { x, y },
      },
      {
        data: { values: rows },
        mark: { type: "line", strokeWidth: 1.5, opacity: 0.8, aria: false },
        encoding: { x, y, color, detail: { field: "line" } },
      },
      {
        data: { values: rows },
        mark: { type: "point", size: 90, filled: true, opacity: 1, stroke: "var(--surface)", strokeWidth: 1 },
        encoding: { x, y, color, shape, tooltip, description: { field: "said" } },
      },
      {
        data: { values: labelled(rows) },
        mark: { type: "text", align: "left", dx: 8, dy: -7, fontSize: 11, aria: false },
        encoding: { x, y, text: { field: "label" }, color },
      },
    ],
  };
  return draw(chart, `${title} against bytes a token`, spec);
}

function drawAll() {
  return drawnAll(Object.keys(FIGURES).map(drawCurves));
}

offerThemes();
NARROW.addEventListener("change", drawAll);
drawAll();

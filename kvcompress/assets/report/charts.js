/* Draws the charts of a report page from the report.json that the page holds. Colours are CSS variables (page.css). */
const { report, evaluations } = JSON.parse(document.getElementById("document").textContent);
const PARTS = { key: "keys", value: "values" };
/** Bits per original number at which the heat map's ten colours change; the legend shows the same. */
const STEPS = JSON.parse(document.getElementById("chart-bits").dataset.steps);

/** One row a site: what the heat map and the bars of predicted loss show. */
const SITES = report.layers.flatMap((row) =>
  Object.keys(PARTS).map((part) => {
    const site = row[part];
    const bits = site.bits_per_token / site.width;
    return {
      layer: row.layer, part: PARTS[part], bits, loss: site.predicted_loss, order: part === "key" ? 0 : 1,
      "bits a number": String(Number(bits.toPrecision(4))),
      "bits a token": site.bits_per_token, kept: `${site.rank} of ${site.width} numbers`, levels: levels(site),
      "predicted loss": site.predicted_loss.toPrecision(3),
      said: `layer ${row.layer} ${PARTS[part]}: ${site.bits_per_token} bits a token for ${site.width} numbers`,
      cost: `layer ${row.layer} ${PARTS[part]}: predicted loss ${site.predicted_loss}`,
    };
  })
);

/** How many components are stored with how many bits, in words. Reports of older versions have no histogram. */
function levels(site) {
  if (site.basis === "exact" || !site.rank) return site.rank ? "all exact" : "nothing kept";
  const histogram = site.bits_histogram || { [Math.round(site.bits_per_token / site.rank)]: site.rank };
  const some = Object.entries(histogram).filter(([bits, n]) => n && Number(bits));
  return some.sort((a, b) => b[0] - a[0]).map(([bits, n]) => `${n} with ${bits} bits`).join(", ");
}

const BY_LAYER = { field: "layer", type: "ordinal" };
const SITE_TOOLTIP = ["layer", "part", "bits a number", "bits a token", "kept", "levels", "predicted loss"].map(
  (field) => ({ field })
);

/** The layer axis lies down on a wide page and stands on a narrow one. height: the chart's where it lies down. */
function layerAxes(other, height) {
  const axis = { title: "layer", labelAngle: 0, labelOverlap: true, ticks: false, domain: false };
  return NARROW.matches
    ? { y: { ...BY_LAYER, axis }, x: other, height: 18 * report.layers.length }
    : { x: { ...BY_LAYER, axis }, y: other, height };
}

async function drawBits() {
  const side = NARROW.matches ? { orient: "top", labelAngle: 0 } : { minExtent: 64, maxExtent: 64 };
  const axis = { ...side, ticks: false, domain: false };
  const part = { field: "part", type: "nominal", title: null, sort: null, axis };
  const { height, ...axes } = layerAxes(part, 72);
  const view = await draw("chart-bits", "Bits stored for each original number, by layer, of keys and values", {
    height,
    data: { values: SITES },
    mark: { type: "rect", stroke: "var(--surface)", strokeWidth: 1.5, cornerRadius: 2, cursor: "pointer" },
    encoding: {
      ...axes,
      color: {
        field: "bits", type: "quantitative", legend: null,
        scale: { type: "threshold", domain: STEPS, range: [...STEPS, 0].map((_, i) => `var(--r${i})`) },
      },
      tooltip: SITE_TOOLTIP,
      description: { field: "said" },
    },
  });
  view.addEventListener("click", (_, item) => item && item.datum && choose(item.datum.layer));
}

function drawLoss() {
  const unit = report.predicted_loss_nats === null ? "relative" : "nats a token";
  const axis = { title: unit, format: "~g", tickCount: 4, domain: false, ticks: false };
  if (!NARROW.matches) Object.assign(axis, { minExtent: 64, maxExtent: 64 });
  const loss = { field: "loss", type: "quantitative", aggregate: "sum", axis };
  const { height, ...axes } = layerAxes(loss, 130);
  return draw("chart-loss", "Predicted loss of each layer, keys and values", {
    height,
    data: { values: SITES },
    mark: { type: "bar", stroke: "var(--surface)", strokeWidth: 1 },
    encoding: {
      ...axes,
      color: {
        field: "part", legend: null,
        scale: { domain: Object.values(PARTS), range: ["var(--key)", "var(--value)"] },
      },
      order: { field: "order" },
      tooltip: SITE_TOOLTIP,
      description: { field: "cost" },
    },
  });
}

/* ---- predicted against measured ---- */

const KL = "KL to the original";
const RISE = "rise of the loss (log of the ratio)";

/** Two points for each measured text. */
function measuredRows() {
  return evaluations.filter((e) => e.kind === "perplexity" && e.perplexity && "kl_nats" in e && "recent" in e.protocol).flatMap((e, i) => {
    const text = `${i + 1}  ${e.protocol.text}`;
    const points = [[KL, e.kl_nats], [RISE, Math.log(e.perplexity.ratio)]];
    const told = { text, ratio: e.perplexity.ratio.toFixed(4), windows: e.protocol.windows, recent: e.protocol.recent };
    return points.map(([kind, nats]) => ({ ...told, kind, nats, said: `${text}: ${kind} ${nats}` }));
  });
}

function drawMeasured() {
  if (!document.getElementById("chart-measured")) return null;
  const rows = measuredRows();
  const predicted = report.predicted_loss_nats;
  const scale = (range) => ({ domain: [KL, RISE], range });
  const x = { format: "~g", tickCount: 6, domain: false };
  const y = { labelLimit: NARROW.matches ? 110 : 220, grid: true, ticks: false, domain: false, labelPadding: 8 };
  const rule = {
    data: { values: predicted === null ? [] : [{ predicted, said: `predicted loss ${predicted}` }] },
    mark: { type: "rule", color: "var(--ink)", strokeWidth: 1.5, strokeDash: [5, 3] },
    encoding: { x: { field: "predicted", type: "quantitative" }, description: { field: "said" } },
  };
  const points = {
    data: { values: rows },
    mark: { type: "point", filled: true, size: 110, opacity: 1, stroke: "var(--surface)", strokeWidth: 1.5 },
    encoding: {
      x: { field: "nats", type: "quantitative", title: "nats a token", axis: x },
      y: { field: "text", type: "nominal", sort: null, title: null, axis: y },
      color: { field: "kind", legend: null, scale: scale(["var(--s0)", "var(--s1)"]) },
      shape: { field: "kind", legend: null, scale: scale(["circle", "diamond"]) },
      tooltip: ["text", "kind", "nats", "ratio", "windows", "recent"].map((field) => ({ field, type: "nominal" })),
      description: { field: "said" },
    },
  };
  return draw("chart-measured", "Predicted loss against what was measured on each text, in nats a token", {
    height: 34 * (rows.length / 2),
    layer: [rule, points],
  });
}

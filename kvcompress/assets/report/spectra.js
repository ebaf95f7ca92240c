/* The spectra of chosen layers, and how layers are chosen. */

const MOST_CHOSEN = 4;
const MOST_POINTS = 256;

let chosen = firstChoice(report.layers.map((row) => row.layer));

function firstChoice(layers) {
  return [...new Set([layers[0], layers[Math.floor(layers.length / 2)], layers[layers.length - 1]])];
}

/** Shows a layer's spectra, or hides them if they are shown; the oldest choice makes room. */
function choose(layer) {
  const others = chosen.filter((l) => l !== layer);
  if (others.length === chosen.length) chosen = [...chosen, layer].slice(-MOST_CHOSEN);
  else if (others.length) chosen = others;
  drawSpectra();
}

/** One layer's energies as points, at most MOST_POINTS: the first ones all, then every so many. Zeros have no log. */
function spectrum(layer, part) {
  const energies = report.energies[`layers.${layer}.${part}`] || [];
  const site = report.layers.find((row) => row.layer === layer)[part];
  const items = (site.rank * energies.length) / site.width; // an energy of some bases is of several numbers
  const stride = Math.ceil((2 * energies.length) / MOST_POINTS);
  const points = energies.map((energy, i) => ({ layer: `layer ${layer}`, component: i + 1, energy, kept: i < items }));
  const shown = points.filter((p, i) => p.energy > 0 && (i < MOST_POINTS / 2 || i % stride === 0));
  const last = shown.filter((p) => p.kept).pop();
  return last && last !== shown[shown.length - 1] ? [...shown, { ...last, kept: false }] : shown; // the lines meet
}

/** The powers of ten in a range, or every second or third of them: at most six. */
function decades([low, high]) {
  const [first, last] = [Math.ceil(Math.log10(low)), Math.floor(Math.log10(high))];
  const step = Math.ceil((last - first + 1) / 6);
  const exponents = Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i);
  return exponents.filter((e) => e % step === 0).map((e) => Number(`1e${e}`));
}

/** What is told at each component: the energies of all chosen layers there. A column reaches to the next one. */
function columns(points) {
  const rows = new Map();
  for (const p of points) {
    const row = rows.get(p.component) || { component: p.component };
    row[p.layer] = String(p.energy);
    rows.set(p.component, row);
  }
  const ordered = [...rows.values()].sort((a, b) => a.component - b.component);
  ordered.forEach((row, i) => {
    const next = i + 1 < ordered.length ? ordered[i + 1].component : row.component;
    const last = i > 0 ? ordered[i - 1].component : row.component;
    Object.assign(row, { from: (last + row.component) / 2, to: (row.component + next) / 2 });
  });
  return ordered;
}

function drawSpectrum(part, points, domain, color) {
  const n = Math.max(2, ...points.map((p) => p.component));
  const names = chosen.map((layer) => `layer ${layer}`);
  const x = {
    field: "component", type: "quantitative", title: "component, best first",
    scale: { nice: false, domain: [1, n] }, axis: { grid: false, tickCount: 6 },
  };
  const axis = { format: "~e", values: decades(domain), minExtent: 44, domain: false, ticks: false };
  const scale = { type: "log", nice: false, domain };
  return draw(`chart-${part}-spectra`, `Predicted cost of dropping each component of ${PARTS[part]}, by layer`, {
    height: 230,
    layer: [
      {
        data: { values: points },
        mark: { type: "line", strokeWidth: 2, interpolate: "linear" },
        encoding: {
          x,
          y: { field: "energy", type: "quantitative", title: null, scale, axis },
          color: { field: "layer", legend: null, sort: null, scale: { domain: names, range: color } },
          strokeDash: { field: "kept", legend: null, scale: { domain: [true, false], range: [[1, 0], [2, 3]] } },
          opacity: { condition: { test: "datum.kept", value: 1 }, value: 0.65 },
          description: { field: "layer" },
        },
      },
      {
        data: { values: columns(points) },
        params: [{ name: "at", select: { type: "point", fields: ["component"], on: "pointerover" } }],
        mark: { type: "rect", color: "var(--muted)", aria: false },
        encoding: {
          x: { field: "from", type: "quantitative" },
          x2: { field: "to" },
          fillOpacity: { condition: { param: "at", empty: false, value: 0.35 }, value: 0 },
          tooltip: ["component", ...names].map((field) => ({ field, type: "nominal" })),
        },
      },
    ],
  });
}

async function drawSpectra() {
  const color = chosen.map((_, i) => `var(--s${i})`);
  const box = document.getElementById("chosen");
  box.querySelectorAll("button").forEach((button) => button.remove());
  chosen.forEach((layer, i) => {
    const button = document.createElement("button");
    button.title = "hide this layer";
    button.innerHTML = `<i class="swatch"></i>layer ${Number(layer)}<span class="remove"> ×</span>`;
    button.firstChild.style.background = color[i];
    button.onclick = () => choose(layer);
    box.insertBefore(button, box.lastElementChild);
  });
  const points = (part) => chosen.flatMap((layer) => spectrum(layer, part));
  const energies = Object.keys(PARTS).flatMap((part) => points(part).map((p) => p.energy)); // one scale for both
  const domain = energies.length ? [Math.min(...energies), Math.max(...energies)] : [1e-6, 1];
  await Promise.all(Object.keys(PARTS).map((part) => drawSpectrum(part, points(part), domain, color)));
}

function offerLayers() {
  const select = document.querySelector("#chosen select");
  report.layers.forEach((row) => select.add(new Option(`layer ${row.layer}`, row.layer)));
  select.onchange = () => {
    if (!chosen.includes(Number(select.value))) choose(Number(select.value));
    select.selectedIndex = 0;
  };
}

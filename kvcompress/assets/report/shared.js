/* What every page shares: how charts are embedded and coloured, themes, and printing. */
"use strict";

const NARROW = matchMedia("(max-width: 640px)");
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

const CONFIG = {
  background: "transparent",
  font: FONT,
  view: { stroke: null },
  axis: {
    labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)", domainColor: "var(--line)",
    tickColor: "var(--line)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400,
  },
  text: { color: "var(--muted)", fontSize: 12 },
};

const drawn = {};

/** Draws a Vega-Lite chart in #id, in place of an earlier one, and returns its view. */
async function draw(id, description, spec) {
  const options = { renderer: "svg", actions: false, ast: true, tooltip: { disableDefaultStyle: true } };
  const autosize = { type: "fit-x", contains: "padding" };
  const whole = { width: "container", autosize, config: CONFIG, description, ...spec };
  if (drawn[id]) drawn[id].finalize();
  drawn[id] = await vegaEmbed(`#${id}`, whole, options);
  return drawn[id].view;
}

/** Marks the page when all charts are drawn, for whoever waits for it, and tells the console what went wrong. */
function drawnAll(charts) {
  return Promise.all(charts).then(
    () => { document.documentElement.dataset.drawn = "yes"; },
    (error) => console.error(error)
  );
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
  show(document.documentElement.dataset.theme || "");
}

/* Paper shows what is folded away on the screen. */
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.classList.add("folded");
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details.folded")) {
    details.open = false;
    details.classList.remove("folded");
  }
});

/* What surrounds the charts: themes, printing, and the first drawing. */

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

function drawAll() {
  return Promise.all([drawBits(), drawLoss(), drawSpectra(), drawMeasured()]).then(
    () => { document.documentElement.dataset.drawn = "yes"; },
    (error) => console.error(error)
  );
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

offerThemes();
offerLayers();
NARROW.addEventListener("change", drawAll);
drawAll();

/* The first drawing, and every later one. */

function drawAll() {
  return drawnAll([drawBits(), drawLoss(), drawSpectra(), drawMeasured()]);
}

offerThemes();
offerLayers();
NARROW.addEventListener("change", drawAll);
drawAll();

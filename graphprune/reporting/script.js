"use strict";
(() => {
  const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const level = new Uint8Array(128);
  for (let index = 0; index < alphabet.length; index++) level[alphabet.charCodeAt(index)] = index;
  const ink = [36, 86, 199];

  // Kept weights are ink on the color of the page: opacity grows with the square root, so that few of many are seen too.
  const paint = (canvas, cells) => {
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    for (let index = 0; index < cells.length; index++) {
      const kept = level[cells.charCodeAt(index)] / 63;
      image.data.set([...ink, Math.round(255 * Math.sqrt(kept))], 4 * index);
    }
    context.putImageData(image, 0, 0);
    canvas.classList.toggle("pixels", Math.max(canvas.width, canvas.height) < 100);
    canvas.dataset.drawn = "yes";
  };

  // One square a weight, with a gap, so that blocks of a pattern are seen.
  const paintCorner = (canvas, cells) => {
    const columns = canvas.width, rows = canvas.height, size = 8;
    canvas.width = columns * size;
    canvas.height = rows * size;
    const context = canvas.getContext("2d");
    for (let index = 0; index < cells.length; index++) {
      const kept = level[cells.charCodeAt(index)] > 0;
      context.fillStyle = `rgba(${ink}, ${kept ? 1 : 0.1})`;
      context.fillRect((index % columns) * size, Math.floor(index / columns) * size, size - 1, size - 1);
    }
    canvas.dataset.drawn = "yes";
  };

  for (const canvas of document.querySelectorAll("canvas.thumb, canvas.ramp")) paint(canvas, canvas.dataset.cells);

  for (const card of document.querySelectorAll(".mask-card")) {
    card.addEventListener("toggle", () => {
      const [whole, corner] = card.querySelectorAll(".views canvas");
      if (!card.open || whole.dataset.drawn) return;
      paint(whole, card.querySelector("canvas.thumb").dataset.cells);
      paintCorner(corner, corner.dataset.cells);
    });
  }

  for (const curves of document.querySelectorAll(".curves")) {
    const readings = JSON.parse(curves.dataset.readings);
    const output = curves.querySelector(".reading");
    const resting = output.textContent;
    const several = readings.some((entry) => entry[2] !== readings[0][2]);
    const cursors = curves.querySelectorAll(".cursor");
    const show = (event) => {
      const box = curves.querySelector(".chart").getBoundingClientRect();
      const share = (100 * (event.clientX - box.left)) / box.width;
      let near = readings[0];
      for (const entry of readings) if (Math.abs(entry[0] - share) < Math.abs(near[0] - share)) near = entry;
      const [place, step, session, sparsity, loss] = near;
      for (const cursor of cursors) {
        cursor.setAttribute("x1", `${place}%`);
        cursor.setAttribute("x2", `${place}%`);
        cursor.setAttribute("visibility", "visible");
      }
      const where = several ? `session ${session}, step ${step}` : `step ${step}`;
      output.textContent = `${where}: sparsity ${sparsity.toFixed(4)}${loss === null ? "" : `, loss ${Number(loss.toPrecision(4))}`}`;
    };
    const rest = () => {
      for (const cursor of cursors) cursor.setAttribute("visibility", "hidden");
      output.textContent = resting;
    };
    curves.addEventListener("pointermove", show);
    curves.addEventListener("pointerleave", rest);
  }

  // On paper, tables are shown whole.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details[data-print]:not([open])")];
    for (const item of opened) item.open = true;
  });
  addEventListener("afterprint", () => {
    for (const item of opened) item.open = false;
  });
})();

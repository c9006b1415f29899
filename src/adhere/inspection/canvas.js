// Pictures of a panel: strips of figures, the map of tokens, thumbnails of heads. Sizes in CSS pixels.
const BLUE = [52, 116, 235], SOFT = [128, 138, 158];

function paper(canvas, width, height) {
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * dense));
  canvas.height = Math.max(1, Math.round(height * dense));
  const pen = canvas.getContext("2d");
  pen.scale(dense, dense);
  return pen;
}

// A bar a token, from 0 to its value, between the bounds low ≤ 0 ≤ high.
function drawStrip(canvas, values, [low, high], marked) {
  const width = canvas.clientWidth, height = canvas.clientHeight, step = width / values.length;
  const pen = paper(canvas, width, height);
  const up = (value) => ((high - value) / (high - low || 1)) * height;
  pen.fillStyle = `rgba(${SOFT}, .35)`;
  pen.fillRect(0, Math.min(height - 1, up(0)), width, 1);
  values.forEach((value, place) => {
    const [from, to] = [up(Math.max(0, value)), up(Math.min(0, value))];
    pen.fillStyle = marked(place) ? "rgb(240, 150, 20)" : `rgba(${BLUE}, .75)`;
    pen.fillRect(place * step, from, Math.max(1, step - (step > 4 ? 1 : 0)), Math.max(1, to - from));
  });
}

// A pixel a cell; the page stretches it. `shade(row, column)` in [0, 1].
function drawCells(canvas, rows, columns, shade) {
  canvas.width = columns;
  canvas.height = rows;
  const pen = canvas.getContext("2d"), image = pen.createImageData(columns, rows);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, at += 4) {
      image.data.set(BLUE, at);
      image.data[at + 3] = Math.round(255 * shade(row, column));
    }
  }
  pen.putImageData(image, 0, 0);
}

// The map of one head, each pixel the largest of its cells.
function drawThumb(canvas, cells, head) {
  const rows = Math.min(20, cells.rows), columns = Math.min(32, cells.columns);
  const largest = new Float32Array(rows * columns);
  cells.eachCell(head, (row, column, value) => {
    const at = Math.floor((row * rows) / cells.rows) * columns + Math.floor((column * columns) / cells.columns);
    largest[at] = Math.max(largest[at], value);
  });
  drawCells(canvas, rows, columns, (row, column) => Math.sqrt(Math.min(1, largest[row * columns + column])));
}

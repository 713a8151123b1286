// One drawing on one canvas: scale, lines, limit, changes of settings, cursor.

export const LEFT = 40; // CSS pixels for the numbers of the scale
const SCALE_STEPS = [1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10];

// A canvas, cleared, in CSS pixels.
export function clearCanvas(canvas, font) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const ratio = devicePixelRatio || 1;
  const context = canvas.getContext("2d");
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = width * ratio;
    canvas.height = height * ratio;
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = font;
  return { context, width, height };
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return SCALE_STEPS.find((step) => step * power >= value * 0.999) * power;
}

// The limit is in the picture if it is not far above what happens.
function scaleTop(peak, limit) {
  const shown = limit && limit <= peak * 1.5;
  return roundUp(shown ? Math.max(peak, limit * 1.15) : peak);
}

class Plot {
  constructor(canvas, view, { top, footer }) {
    const { context, width, height } = clearCanvas(canvas, view.ink.font);
    this.context = context;
    this.width = width;
    this.height = height;
    this.view = view;
    this.ink = view.ink;
    this.points = view.points;
    this.top = top;
    this.base = this.height - footer; // where the value is 0
  }

  x(second) {
    const { end, period } = this.view;
    return LEFT + ((second - end) / period + 1) * (this.width - LEFT);
  }

  y(value) {
    return this.base - (value / this.top) * (this.base - 6);
  }

  rule(x1, y1, x2, y2, color, dash = []) {
    const { context } = this;
    context.strokeStyle = color;
    context.lineWidth = 1;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(x1, y1);
    context.lineTo(x2, y2);
    context.stroke();
    context.setLineDash([]);
  }

  drawScale() {
    const { context, ink } = this;
    context.textAlign = "right";
    for (const value of [0, this.top]) {
      const level = Math.round(this.y(value)) + (value ? 0.5 : -0.5);
      this.rule(LEFT, level, this.width, level, ink.rule);
      context.fillStyle = ink.soft;
      const text = value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : `${+value.toFixed(2)}`;
      context.fillText(text, LEFT - 6, level + (value ? 7 : -0.5));
    }
  }

  // Runs `draw` with nothing drawn left of the scale.
  clipped(draw) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(LEFT, 0, this.width - LEFT, this.height);
    this.context.clip();
    draw();
    this.context.restore();
  }

  // A rectangle over the whole of one second, with a small gap to the next.
  column(second, top, height, color, opacity = 1) {
    const left = this.x(second);
    this.context.globalAlpha = opacity;
    this.context.fillStyle = color;
    this.context.fillRect(left, top, this.x(second + 1) - left - 0.4, height);
    this.context.globalAlpha = 1;
  }

  // A line through value(point) of every second; null leaves a gap. `color` is a name in `ink`, or a
  // function of the point, for which the line is drawn piece by piece.
  line(value, color, { steps = false, width = 1.5, fill = 0 } = {}) {
    const colorOf = typeof color === "string" ? () => color : color;
    this.context.lineWidth = width;
    this.context.lineJoin = "round";
    let previous = null;
    for (const point of this.points) {
      const y = value(point) == null ? null : this.y(value(point));
      const from = this.x(point.second + (steps ? 0 : 0.5));
      const to = this.x(point.second + 1);
      if (y != null) {
        const ink = this.ink[colorOf(point)];
        if (fill) this.#fillBelow(from, to, y, ink, fill);
        this.#piece([previous || [from - 1, y], [from, y], ...(steps ? [[to, y]] : [])], ink);
      }
      previous = y == null ? null : [steps ? to : from, y];
    }
  }

  #fillBelow(from, to, y, color, opacity) {
    this.context.globalAlpha = opacity;
    this.context.fillStyle = color;
    this.context.fillRect(from, y, to - from, this.y(0) - y);
    this.context.globalAlpha = 1;
  }

  #piece(points, color) {
    this.context.strokeStyle = color;
    this.context.beginPath();
    for (const [x, y] of points) this.context.lineTo(x, y);
    this.context.stroke();
  }

  // The limit, from when it is in force; the value before that is not known.
  drawLimit(name, limit) {
    if (!limit || limit > this.top) return;
    const change = this.view.changes.findLast(({ knobs }) => name in knobs);
    const left = Math.max(LEFT, change ? this.x(change.second) : 0);
    this.rule(left, this.y(limit), this.width, this.y(limit), this.ink.limit, [4, 3]);
  }

  // Where a knob was moved: a line in every chart, and words in the chart that the knob is about. From the
  // newest to the oldest, so that of two labels that overlap the newer one is shown.
  drawChanges(about) {
    let free = this.width;
    for (const { second, knobs } of this.view.changes.toReversed()) {
      const x = this.x(second);
      if (x < LEFT || x > this.width) continue;
      this.rule(x, 0, x, this.base, this.ink.strong, [1, 2]);
      const names = Object.keys(knobs).filter((name) => about?.test(name));
      const text = names.map((name) => `${name} ${knobs[name]}`).join(", ");
      if (text && x <= free) free = this.#label(text, x) ?? free;
    }
  }

  // Writes left of `right`; returns where the text begins, or null if there is no room for it.
  #label(text, right) {
    const { context, ink } = this;
    const left = right - context.measureText(text).width - 8;
    if (left < LEFT) return null;
    context.fillStyle = ink.ground;
    context.fillRect(left, 0, right - left - 2, 14);
    context.fillStyle = ink.strong;
    context.fillText(text, right - 4, 10);
    return left;
  }

  drawCursor(second) {
    const x = this.x(second + 0.5);
    this.rule(x, 0, x, this.height, this.ink.soft);
  }
}

// Draws one of CHARTS. `view` has the axis of time (end, period) and what is in it (points, changes), the
// settings in force, the colors (ink) and the second under the cursor.
export function drawChart(chart, canvas, view) {
  const limit = view.settings[chart.limit];
  const peak = Math.max(chart.minPeak, ...view.points.map((point) => chart.peak(point) || 0));
  const plot = new Plot(canvas, view, { top: scaleTop(peak, limit), footer: chart.tall ? 15 : 1 });
  plot.drawScale();
  plot.clipped(() => chart.draw(plot));
  plot.drawLimit(chart.limit, limit);
  plot.drawChanges(chart.knobs);
  if (view.cursor != null) plot.drawCursor(view.cursor);
}

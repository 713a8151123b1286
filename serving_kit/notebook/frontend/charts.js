// The charts on one axis of time, with one cursor through all of them.

import { CHARTS } from "./chart_list.js";
import { el, setText } from "./dom.js";
import { formatTime } from "./format.js";
import { clearCanvas, drawChart, LEFT } from "./plot.js";
import { EMPTY_SECOND, REASONS } from "./snapshot.js";

const DELAY_S = 1.25; // the newest second is drawn when it is over
const PERIODS_S = [30, 60, 120];
const PLAIN_COLORS = ["strong", "faint", "soft", "rule", "ground"]; // those that no chart has a key for

class ChartFigure {
  constructor(chart) {
    this.chart = chart;
    this.canvas = el("canvas", { role: "img", class: chart.tall ? "tall" : "" });
    this.values = chart.keys.map(() => el("b"));
    this.keys = chart.keys.map(({ color, label }, index) =>
      el("span", {}, el("span", { class: `key ${color}` }, label), this.values[index])
    );
    const title = el("div", {}, el("b", {}, chart.name), el("span", {}, ...this.keys));
    this.node = el("div", { class: "chart" }, title, this.canvas, ...(chart.tall ? [reasonKeys()] : []));
  }

  draw(view, point) {
    this.node.hidden = !(this.chart.isOfUse?.(view) ?? true);
    if (this.node.hidden) return;
    drawChart(this.chart, this.canvas, view);
    const texts = this.chart.keys.flatMap((key, index) => {
      this.keys[index].hidden = !(key.isOfUse?.(view.layout) ?? true);
      if (this.keys[index].hidden) return [];
      const text = key.text(point, view.settings, view);
      setText(this.values[index], text);
      this.values[index].className = key.hasFew(point) ? "few" : "";
      return [`${key.label} ${text}`];
    });
    this.canvas.setAttribute("aria-label", `${this.chart.name}: ${texts.join(", ")}`);
  }
}

function reasonKeys() {
  const keys = REASONS.map((reason) => el("span", { class: `key ${reason}` }, reason.replace("_", " ")));
  return el("div", { class: "why" }, "sent because ", ...keys);
}

// The numbers are those of the newest second that is over, or of the one under the cursor.
export class Charts {
  #cursor = null; // a second of the server's clock
  #view = null; // what was drawn last
  #ink = {};
  #figures = CHARTS.map((chart) => new ChartFigure(chart));
  #axis = el("canvas", { class: "axis", "aria-hidden": "true" });

  constructor(onCursor) {
    this.onCursor = onCursor;
    const colors = PLAIN_COLORS.map((color) => el("i", { class: `key ${color}` }));
    const label = "The last two minutes. The arrow keys move a cursor from second to second.";
    this.node = el(
      "div",
      { class: "charts", tabindex: 0, role: "group", "aria-label": label },
      ...this.#figures.map(({ node }) => node),
      this.#axis,
      el("span", { hidden: "" }, ...colors),
    );
    this.node.onpointermove = (event) => this.#moveTo(this.#secondAt(event.clientX));
    this.node.onpointerleave = this.node.onblur = () => this.#moveTo(null);
    this.node.onkeydown = ({ key }) => this.#press(key);
  }

  // Reads the colors, which change with the theme.
  readColors() {
    this.#ink = { font: `11px ${getComputedStyle(this.node).fontFamily}` };
    for (const key of this.node.querySelectorAll(".key")) {
      this.#ink[key.classList[1]] ||= getComputedStyle(key).borderLeftColor;
    }
  }

  // Returns for how many seconds a pixel stands.
  draw(timeline, connected) {
    const runs = timeline.runs(connected);
    const now = timeline.newest + (runs ? timeline.age() : 0);
    const view = this.#view = this.#makeView(timeline, now - (runs ? DELAY_S : 0));
    const chosen = this.#cursor ?? Math.floor(view.end) - (runs ? 1 : 0);
    const point = view.points.find(({ second }) => second === chosen) || EMPTY_SECOND;
    for (const figure of this.#figures) figure.draw(view, point);
    return view.period / (this.#drawAxis(view, now) || 1);
  }

  #makeView({ snapshot, newest, started }, end) {
    const period = PERIODS_S.find((seconds) => end - started < seconds) || PERIODS_S.at(-1);
    const first = Math.max(end - period - 1, started - 1);
    const changes = (snapshot.changes || []).map(({ ago_s, knobs }) => ({ second: newest - ago_s, knobs }));
    return {
      end,
      period,
      changes,
      points: snapshot.series.filter(({ second }) => second >= first && second < end + 1),
      settings: snapshot.settings,
      layout: snapshot.layout,
      generation: snapshot.generation,
      ink: this.#ink,
      cursor: this.#cursor,
    };
  }

  // Returns the width in CSS pixels.
  #drawAxis({ end, period, cursor }, now) {
    const { context, width } = clearCanvas(this.#axis, this.#ink.font);
    context.fillStyle = this.#ink.soft;
    const write = (text, second, align) => {
      context.textAlign = align;
      context.fillText(text, LEFT + ((second - end) / period + 1) * (width - LEFT), 11);
    };
    if (cursor == null) {
      write(`−${period} s`, end - period, "left");
      write(`−${period / 2} s`, end - period / 2, "center");
    } else {
      const ago = now - cursor;
      const text = `${formatTime(ago)}, ${Math.max(0, Math.round(ago))} s ago`;
      write(text, Math.max(cursor, end - period * 0.8), "center");
    }
    if (cursor == null || end - cursor > period * 0.25) write("now", end, "right");
    return width;
  }

  #secondAt(clientX) {
    const { left, width } = this.#axis.getBoundingClientRect();
    const share = (clientX - left - LEFT) / (width - LEFT);
    if (!this.#view || share < 0) return null;
    return Math.floor(this.#view.end - (1 - share) * this.#view.period);
  }

  #press(key) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (step && this.#view) {
      const last = Math.floor(this.#view.end);
      this.#moveTo(Math.min(last - 1, (this.#cursor ?? last) + step));
    }
    if (key === "Escape") this.#moveTo(null);
  }

  #moveTo(second) {
    this.#cursor = second;
    this.onCursor();
  }
}

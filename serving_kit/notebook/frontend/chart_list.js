// The charts. Each has:
//   name, tall      its title; whether it has a second row below for the reasons of its batches
//   limit, knobs    the setting drawn as its limit; the settings whose changes are written into it
//   minPeak, peak   the least that its scale reaches to; the largest value of one second
//   keys            per number beside the title: color (a class of panel.css), label, text of one second
//                   (also with the settings and the view), and whether that second has too few samples for it;
//                   where it is not for every model, also whether it is of use where the items of a step are
//                   laid out so
//   draw            draws it on a Plot
//   isOfUse         where it is not for every model: whether it is of use for this snapshot

import { formatCount, formatNumber, sum } from "./format.js";
import { MIN_SAMPLES, NOT_ANSWERED, REASONS } from "./snapshot.js";

const key = (color, label, text, hasFew = () => false) => ({ color, label, text, hasFew });
const limitKey = (name) => key("limit", "limit", (_, settings) => formatCount(settings[name]));

function percentileKey(name) {
  const hasFew = (point) => point.samples < MIN_SAMPLES[name];
  return key(name, name, (point) => formatNumber(point.latency_ms[name]), hasFew);
}

const QUEUE = {
  name: "Queue, items",
  limit: "max_queue_size",
  knobs: /queue|drop/,
  minPeak: 4,
  peak: (point) => point.in_flight,
  keys: [
    key("wait", "waiting", (point) => formatCount(point.queue_depth)),
    key("soft", "in flight", (point) => formatCount(point.in_flight)),
    limitKey("max_queue_size"),
  ],
  draw(plot) {
    plot.line((point) => point.in_flight, "soft", { steps: true });
    plot.line((point) => point.queue_depth, "wait", { steps: true, fill: 0.18 });
  },
};

const hasBatches = (point) => sum(Object.values(point.reasons)) > 0;
const meanText = (point) => formatNumber(hasBatches(point) ? point.mean : null);
const paddingText = (point) => point.padding == null ? "–" : `${Math.round(point.padding * 100)} %`;

const paddingKey = {
  ...key("soft", "padding", paddingText),
  isOfUse: (layout) => !layout.packed,
};

const BATCHES = {
  name: "Batches, items",
  limit: "max_batch_size",
  knobs: /batch|wait|group/,
  minPeak: 4,
  tall: true,
  peak: (point) => Math.max(0, ...Object.keys(point.sizes).map(Number)),
  keys: [key("work", "mean", meanText), paddingKey, limitKey("max_batch_size")],
  draw(plot) {
    for (const point of plot.points) {
      drawSizes(plot, point);
      drawReasons(plot, point);
    }
  },
};

// A cell for each size, the stronger the more batches had it.
function drawSizes(plot, { second, sizes, step = 1 }) {
  const most = Math.max(...Object.values(sizes));
  const height = Math.max(2, plot.y(0) - plot.y(step) - 0.4);
  for (const [size, batches] of Object.entries(sizes)) {
    plot.column(second, plot.y(size), height, plot.ink.work, 0.15 + (0.8 * batches) / most);
  }
}

// Below the scale, the share of each reason for which batches were sent.
function drawReasons(plot, { second, reasons }) {
  const total = sum(Object.values(reasons));
  let top = plot.base + 5;
  for (const reason of REASONS) {
    const height = total ? (9 * (reasons[reason] || 0)) / total : 0;
    plot.column(second, top, height, plot.ink[reason]);
    top += height;
  }
}

const LATENCY = {
  name: "Latency, ms",
  limit: "timeout_ms",
  knobs: /timeout/,
  minPeak: 1,
  peak: (point) => point.latency_ms.p99,
  keys: [...["p50", "p95", "p99"].map(percentileKey), limitKey("timeout_ms")],
  draw(plot) {
    for (const name of ["p99", "p95", "p50"]) {
      const color = (point) => point.samples < MIN_SAMPLES[name] ? "faint" : name;
      plot.line((point) => point.latency_ms[name], color, { width: name === "p50" ? 2 : 1.5 });
    }
  },
};

const TIME_SPENT = {
  name: "Time spent, median ms",
  minPeak: 1,
  peak: (point) => Math.max(point.queue_wait_ms.p50 || 0, point.forward_ms.p50 || 0),
  keys: [
    key("wait", "in queue", (point) => formatNumber(point.queue_wait_ms.p50)),
    key("work", "in model", (point) => formatNumber(point.forward_ms.p50)),
  ],
  draw(plot) {
    plot.line((point) => point.queue_wait_ms.p50, "wait");
    plot.line((point) => point.forward_ms.p50, "work");
  },
};

const OUTCOMES = ["ok", ...NOT_ANSWERED];
const REQUESTS = {
  name: "Requests per second",
  knobs: /status|errors|body/,
  minPeak: 4,
  peak: (point) => Math.max(point.arrivals, sum(OUTCOMES.map((name) => point[name]))),
  keys: [
    key("strong", "in", (point) => formatCount(point.arrivals)),
    key("wait", "ok", (point) => formatCount(point.ok)),
    ...NOT_ANSWERED.map((name) => key(name, name, (point) => formatCount(point[name]))),
  ],
  draw(plot) {
    for (const point of plot.points) drawOutcomes(plot, point);
    plot.line((point) => point.arrivals, "strong", { steps: true, width: 1 });
  },
};

// One outcome on top of the other.
function drawOutcomes(plot, point) {
  let level = 0;
  for (const name of OUTCOMES) {
    const top = plot.y(level + point[name]);
    const color = plot.ink[name === "ok" ? "wait" : name];
    plot.column(point.second, top, plot.y(level) - top, color, name === "ok" ? 0.35 : 0.9);
    level += point[name];
  }
}

const cacheText = ({ cached_tokens, max_cache_tokens }) =>
  `${formatCount(cached_tokens)} of ${formatCount(max_cache_tokens)}`;
const tokenNumber = (read) => (point) => formatNumber(point.tokens ? read(point.tokens) : null);
const GENERATED = {
  name: "Tokens per second",
  knobs: /token|cache/,
  minPeak: 4,
  isOfUse: ({ generation }) => generation != null,
  peak: (point) =>
    Math.max(point.tokens?.generated_tokens_per_s ?? 0, point.tokens?.prompt_tokens_per_s ?? 0),
  keys: [
    key("work", "generated", tokenNumber((tokens) => tokens.generated_tokens_per_s)),
    key("soft", "of prompts", tokenNumber((tokens) => tokens.prompt_tokens_per_s)),
    key("plain", "first token, ms", tokenNumber((tokens) => tokens.first_token_ms.p50)),
    key("plain", "between tokens, ms", tokenNumber((tokens) => tokens.inter_token_ms.p50)),
    key("plain", "p99", tokenNumber((tokens) => tokens.inter_token_ms.p99)),
    key("plain", "sequences now", (_, __, { generation }) => formatCount(generation.running)),
    key("plain", "their cached tokens", (_, __, { generation }) => cacheText(generation)),
  ],
  draw(plot) {
    plot.line((point) => point.tokens?.prompt_tokens_per_s ?? 0, "soft", { steps: true, width: 1 });
    plot.line((point) => point.tokens?.generated_tokens_per_s ?? 0, "work", { steps: true, fill: 0.18 });
  },
};

export const CHARTS = [QUEUE, BATCHES, LATENCY, TIME_SPENT, GENERATED, REQUESTS];

// What the server sends: GET /stats for the page, and frames.py's compact form of it for a notebook.

import { sum } from "./format.js";

// BatchReason of records.py.
export const REASONS = [
  "full",
  "budget",
  "idle",
  "deadline",
  "all_present",
  "retry",
  "drain",
  "continued",
];
export const NOT_ANSWERED = ["shed", "expired", "failed", "unavailable"];
// With fewer answers than this, a percentile is nothing but the largest of them.
export const MIN_SAMPLES = { p50: 2, p95: 20, p99: 100 };
export const EMPTY_SECOND = {
  queue_depth: 0,
  in_flight: 0,
  arrivals: 0,
  ok: 0,
  shed: 0,
  expired: 0,
  failed: 0,
  unavailable: 0,
  samples: 0,
  latency_ms: {},
  queue_wait_ms: {},
  forward_ms: {},
  sizes: {},
  reasons: {},
};

// The mean batch size of a second. `sizes` says how many batches had which size; with `step` > 1 one entry
// stands for that many sizes, up to and including its key.
export function meanBatchSize(sizes, step = 1) {
  const entries = Object.entries(sizes);
  const total = sum(entries.map(([size, batches]) => (Number(size) - (step - 1) / 2) * batches));
  return total / sum(entries.map(([, batches]) => batches));
}

// A frame of frames.py as the snapshot of GET /stats.
export function decodeFrame(bytes) {
  const frame = JSON.parse(new TextDecoder().decode(bytes));
  const reasons = Object.keys(frame.batches);
  const series = frame.rows.map((row, index) => {
    const second = frame.first + index;
    return row ? decodeRow(row, second, reasons) : { ...EMPTY_SECOND, second };
  });
  return { ...frame, series };
}

// The order of a row is that of frames.py (encode_row).
function decodeRow(row, second, reasons) {
  const [queue_depth, in_flight, arrivals, ok, shed, expired, failed, unavailable, samples] = row;
  const [p50, p95, p99, queueWait, modelTime, padding, tokens, step, digits, counts] = row.slice(9);
  const sizes = decodeSizes(digits, step);
  return {
    second,
    queue_depth,
    in_flight,
    arrivals,
    ok,
    shed,
    expired,
    failed,
    unavailable,
    samples,
    padding,
    tokens: tokens ? decodeTokens(tokens) : null,
    step,
    sizes,
    mean: meanBatchSize(sizes, step),
    latency_ms: { p50, p95, p99 },
    queue_wait_ms: { p50: queueWait },
    forward_ms: { p50: modelTime },
    reasons: Object.fromEntries(reasons.map((reason, index) => [reason, counts ? counts[index] : 0])),
  };
}

function decodeTokens([generated_tokens_per_s, prompt_tokens_per_s, first, between, longest]) {
  return {
    generated_tokens_per_s,
    prompt_tokens_per_s,
    first_token_ms: { p50: first },
    inter_token_ms: { p50: between, p99: longest },
  };
}

// One digit for each `step` sizes.
function decodeSizes(digits, step) {
  const entries = [...digits].map((digit, index) => [(index + 1) * step, +digit]);
  return Object.fromEntries(entries.filter(([, batches]) => batches));
}

// For each knob that was moved, how many seconds before the snapshot it last was.
export function lastChanges(snapshot) {
  const ago = {};
  for (const { ago_s, knobs } of snapshot.changes || []) {
    for (const name of Object.keys(knobs)) ago[name] = ago_s;
  }
  return ago;
}

// How the state is shown: its words, the name of its color in panel.css, and whether settings may change.
export function describeState(snapshot, connected) {
  if (!connected) return { text: "not connected; last known values", color: "soft", ended: true };
  const recent = snapshot.series.slice(-6);
  const overloaded = snapshot.state === "ready" && sum(recent.map((p) => p.shed + p.expired)) > 0;
  const colors = { ready: "good", failed: "bad", stuck: "bad", stopped: "soft", replaced: "soft" };
  const color = overloaded ? "warn" : colors[snapshot.state] || "warn";
  const words = { starting: "loading", replaced: "replaced by a newer run" };
  const fallback = overloaded ? "overloaded" : snapshot.state;
  const text = words[snapshot.state] || snapshot.reason || fallback;
  return { text, color, ended: color === "soft" };
}

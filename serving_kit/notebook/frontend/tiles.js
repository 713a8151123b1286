// The numbers at the top.

import { el, setText } from "./dom.js";
import { formatCount, formatNumber } from "./format.js";
import { MIN_SAMPLES, NOT_ANSWERED } from "./snapshot.js";

const count = (value) => (snapshot) => formatCount(value(snapshot));
const recent = (value) => (snapshot) => formatNumber(value(snapshot.window));

// Groups of tiles; each tile has a name and a text.
const GROUPS = {
  "now": {
    "waiting": count((snapshot) => snapshot.queue_depth),
    "in flight": count((snapshot) => snapshot.in_flight),
  },
  "last 30 s": {
    "requests/s": recent((window) => window.arrivals_per_s),
    "answers/s": recent((window) => window.answers_per_s),
    "p50 ms": recent((window) => window.latency_ms.p50),
    "p95 ms": recent((window) => window.latency_ms.p95),
    "p99 ms": recent((window) => window.latency_ms.p99),
    "mean batch": recent((window) => window.batch_size_mean),
  },
  "since the start": Object.fromEntries(
    ["ok", ...NOT_ANSWERED].map((outcome) => [outcome, count((snapshot) => snapshot.requests[outcome])]),
  ),
};

export class Tiles {
  #numbers = {}; // the element of each tile's number

  constructor() {
    const groups = Object.entries(GROUPS).map(([caption, tiles]) => this.#makeGroup(caption, tiles));
    this.node = el("div", { class: "tiles" }, ...groups);
  }

  #makeGroup(caption, tiles) {
    const names = Object.keys(tiles);
    const nodes = names.map((name) => {
      this.#numbers[name] = el("b", { "data-number": name }, "–");
      return el("div", {}, el("span", { class: "soft" }, name), this.#numbers[name]);
    });
    const attributes = { class: "group", style: `--n:${names.length}` };
    return el("div", attributes, el("span", { class: "soft" }, caption), ...nodes);
  }

  update(snapshot) {
    for (const tiles of Object.values(GROUPS)) {
      for (const [name, text] of Object.entries(tiles)) setText(this.#numbers[name], text(snapshot));
    }
    for (const name of NOT_ANSWERED) {
      const color = name === "failed" ? "bad" : "warn";
      this.#numbers[name].style.color = snapshot.requests[name] ? `var(--${color})` : "";
    }
    this.#explainDropped(snapshot.dropped_items);
    this.#markFewSamples(snapshot.window.samples);
  }

  // Of what was shed or expired: how much was not refused on arrival.
  #explainDropped({ hopeless, expired }) {
    for (const [name, items] of Object.entries({ shed: hopeless, expired })) {
      this.#numbers[name].title = `${formatCount(items)} items were admitted and dropped later`;
    }
  }

  #markFewSamples(samples) {
    for (const [name, least] of Object.entries(MIN_SAMPLES)) {
      const tile = this.#numbers[`${name} ms`];
      const isFew = samples < least;
      tile.className = isFew ? "few" : "";
      tile.title = isFew ? `${samples} answers in the last 30 s; ${name} needs at least ${least}` : "";
    }
  }
}

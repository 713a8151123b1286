// The panel as a page of the server itself, which polls GET /stats.

import { Panel } from "./panel.js";
import { meanBatchSize } from "./snapshot.js";

const PERIOD_MS = 250;
const TIMEOUT_MS = 5000;
const HISTORY_S = 120;
const OVERLAP_S = 3; // seconds that are read again, because late records may still change them

class ServerClient {
  bytes = 0; // of the last answer

  constructor(base) {
    this.base = base;
  }

  async read(path) {
    const response = await fetch(new URL(path, this.base), { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const text = await response.text();
    this.bytes = text.length;
    return JSON.parse(text);
  }

  async tune(token, settings) {
    const response = await fetch(new URL("settings", this.base), {
      method: "PATCH",
      headers: { "authorization": `Bearer ${token}`, "content-type": "application/json" },
      body: JSON.stringify(settings),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
}

class Poller {
  #last = null; // the last snapshot, with all of its seconds
  #readAt = 0;
  #timer = 0;
  #kb = 0; // per second, smoothed

  constructor(server, panel) {
    this.server = server;
    this.panel = panel;
  }

  async poll() {
    if (document.hidden) return;
    try {
      this.panel.update(await this.#read());
    } catch {
      if (this.#last) {
        this.panel.update({ ...this.#last, state: "failed", reason: "no answer from the server" });
      }
    }
    clearTimeout(this.#timer); // of a poll that was under way
    this.#timer = setTimeout(() => this.poll(), PERIOD_MS);
  }

  async #read() {
    const snapshot = await this.server.read(`stats?series=${this.#missingSeconds()}`);
    const now = performance.now();
    if (this.#last) this.#kb += 0.1 * (this.server.bytes / (now - this.#readAt) - this.#kb);
    this.#readAt = now;
    this.#last = { ...snapshot, series: this.#merge(snapshot.series), panel: { kb: this.#kb } };
    return this.#last;
  }

  #missingSeconds() {
    if (!this.#last) return HISTORY_S;
    return Math.min(HISTORY_S, Math.ceil((performance.now() - this.#readAt) / 1000) + OVERLAP_S);
  }

  // Seconds that are over stay as they were read; their means are computed once.
  #merge(series) {
    const added = series.map((point) => ({ ...point, mean: meanBatchSize(point.sizes) }));
    const kept = (this.#last?.series || []).filter(({ second }) => second < added[0].second);
    return [...kept, ...added].slice(-HISTORY_S);
  }
}

export async function poll(element, base) {
  const server = new ServerClient(base);
  const schemas = (await server.read("openapi.json")).components.schemas.Settings.properties;
  const unlock = (token) => (settings) => server.tune(token, settings);
  const poller = new Poller(server, new Panel(element, { schemas, unlock, url: base.href }));
  document.addEventListener("visibilitychange", () => poller.poll());
  poller.poll();
}

// The latest failures with their tracebacks, read when the user opens them.

import { el, setText } from "./dom.js";
import { formatCount } from "./format.js";

export class Errors {
  #list = el("div");
  #summary = el("summary");
  #snapshot = null;
  #shown = ""; // the newest incident when the list was read

  // read() resolves to the latest failures; null: there is no way to read them.
  constructor(read) {
    this.read = read;
    this.node = el("details", { class: "errors" }, this.#summary, this.#list);
    this.node.ontoggle = () => this.#refresh();
  }

  update(snapshot) {
    this.#snapshot = snapshot;
    setText(this.#summary, `Errors: ${summarize(snapshot)}`);
    this.#refresh();
  }

  async #refresh() {
    const newest = this.#snapshot?.errors;
    if (!this.node.open || !this.read || this.#shown === newest) return;
    this.#shown = newest;
    const known = new Map([...this.#list.children].map((node) => [node.dataset.id, node]));
    // An element that is there already may have been opened.
    const nodes = (await this.read()).map((incident) => known.get(incident.id) || makeIncident(incident));
    this.#list.replaceChildren(...nodes);
  }
}

function summarize({ requests, errors: newest }) {
  const failed = `${formatCount(requests.failed)} failed`;
  if (newest) return `${failed}, last incident ${newest}`;
  return requests.failed ? `${failed}; server.errors() has their tracebacks` : "none";
}

function makeIncident({ id, wall, outcome, error, traceback }) {
  const time = new Date(wall * 1000).toLocaleTimeString("en-GB");
  const summary = el("summary", {}, el("code", {}, id), ` ${time} ${outcome}: ${error}`);
  const lines = traceback.trimEnd().split("\n").map((line) =>
    el("span", { class: lineClass(line) }, `${line}\n`)
  );
  return el("details", { "data-id": id }, summary, el("pre", {}, ...lines));
}

function lineClass(line) {
  if (/^ {2}File /.test(line)) return "file";
  return /^\S/.test(line) ? "last" : "";
}

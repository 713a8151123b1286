// The settings: a row for each, what came of the last change, and all of them as code.

import { copyButton, el, setText } from "./dom.js";
import { formatPython, formatSetting, formatTime } from "./format.js";
import { makeInputs } from "./setting_inputs.js";
import { lastChanges } from "./snapshot.js";

const FIRST = [
  "max_batch_size",
  "max_wait_ms",
  "max_queue_size",
  "timeout_ms",
  "group_by_length",
  "drop_hopeless",
];
const SLOW_ANSWER_MS = 2000;
const OLD_FRAMES_MS = 600; // after an answer, in which a snapshot from before it may still arrive

class SettingRow {
  pending = 0; // the number of the change that has no answer yet; 0: there is none
  #value = null; // what the user chose last
  #changes = 0;
  #timer = 0;
  #shownUntil = 0; // until then, the answer to the last change stays shown
  #note;
  #since = el("span", { class: "since" });

  // send(row, value) is called at most once in each delay, with the newest value.
  constructor(name, schema, { send, onChange }) {
    this.name = name;
    this.unit = schema["x-unit"] || "";
    const { inputs, show } = makeInputs(name, schema, (value, delayMs) => this.#choose(value, delayMs));
    this.inputs = inputs;
    this.show = show;
    this.send = send;
    this.onChange = onChange;
    this.#note = el("span", { class: "soft" }, this.unit);
    const about = el("span", { class: "about soft" }, describe(schema), this.#since);
    const label = el("span", { class: "name" }, name);
    this.node = el("div", { class: "knob" }, label, ...inputs, this.#note, about);
  }

  #choose(value, delayMs) {
    this.#value = value;
    this.pending = ++this.#changes;
    this.#timer ||= setTimeout(() => {
      this.#timer = 0;
      this.send(this, this.#value);
    }, delayMs);
    this.onChange();
  }

  settle(value) {
    this.pending = 0;
    this.#shownUntil = performance.now() + OLD_FRAMES_MS;
    this.show(value);
  }

  // `changedAgo`: seconds since the setting was changed; undefined if it never was.
  update(value, { changedAgo, disabled }) {
    if (!this.pending && performance.now() > this.#shownUntil) this.show(value);
    setText(this.#note, this.pending && this.#value !== value ? `now ${value}` : this.unit);
    if (changedAgo !== undefined) setText(this.#since, ` · since ${formatTime(changedAgo)}`);
    for (const input of this.inputs) input.disabled = disabled;
  }
}

function describe(schema) {
  const { minimum, maximum } = schema.oneOf?.[0] || schema;
  const text = schema.description.replace(" x ", " × ");
  if (minimum == null) return text;
  return `${text} · ${minimum.toLocaleString("en")} to ${maximum.toLocaleString("en")}`;
}

export class Settings {
  #snapshot = null;
  #rows;
  #note = el("div", { class: "note soft", "aria-live": "polite" });
  #refusal = el("div", { role: "alert" });

  // tune(values) resolves to the settings in force, or rejects with the reason; null: read-only, until
  // unlock(token), if given, returns a function for it. onChange is called when the panel must be drawn.
  constructor(schemas, { tune, unlock, onChange }) {
    this.schemas = schemas;
    this.tune = tune;
    this.onChange = onChange;
    const send = (row, value) => this.#send(row, value);
    this.#rows = Object.entries(schemas).map(([name, schema]) =>
      new SettingRow(name, schema, { send, onChange })
    );
    const first = FIRST.flatMap((name) => this.#rows.filter((row) => row.name === name));
    const more = this.#rows.filter((row) => !first.includes(row)).map(({ node }) => node);
    const copy = copyButton("Copy as code", () => this.#asCode());
    this.node = el(
      "div",
      { class: "knobs", role: "group", "aria-label": "Settings" },
      el("div", { class: "head" }, el("b", {}, "Settings"), copy),
      ...first.map(({ node }) => node),
      el("details", {}, el("summary", {}, `${more.length} more`), ...more),
      ...(unlock ? [this.#makeTokenField(unlock)] : []),
      this.#note,
      this.#refusal,
    );
  }

  #makeTokenField(unlock) {
    const attributes = { class: "field", placeholder: "token", "aria-label": "token", autocomplete: "off" };
    const field = el("input", { type: "password", ...attributes });
    field.onchange = () => {
      const token = field.value.trim();
      this.tune = token ? unlock(token) : null;
      this.onChange();
    };
    return el(
      "label",
      { class: "soft" },
      "Read-only without the token from the panel in the notebook: ",
      field,
    );
  }

  #asCode() {
    const { code, settings } = this.#snapshot;
    if (code) return code;
    const changed = Object.entries(settings).filter(([name, value]) => value !== this.schemas[name]?.default);
    return `server.tune(${changed.map(([name, value]) => `${name}=${formatPython(value)}`).join(", ")})`;
  }

  async #send(row, value) {
    const { name, pending } = row;
    const waiting =
      `${name}: no answer yet. While a cell runs, the kernel may read the change only after it.`;
    const timer = setTimeout(setText, SLOW_ANSWER_MS, this.#note, waiting);
    let refusal = "";
    try {
      const settings = await this.tune({ [name]: value });
      this.#snapshot.settings = settings; // of the snapshot that is the newest by now
    } catch (error) {
      refusal = error.message;
    }
    clearTimeout(timer);
    if (row.pending !== pending) return; // the user has chosen again: a later answer counts
    const inForce = this.#snapshot.settings[name];
    setText(this.#refusal, refusal);
    setText(this.#note, refusal ? "" : `${name} ${formatSetting(inForce)}: in force since ${formatTime(0)}`);
    row.settle(inForce);
    this.onChange();
  }

  // `age`: seconds since the snapshot arrived. An answer of tune() is written into `snapshot`, so that the
  // charts show it before the next snapshot.
  update(snapshot, { age, ended }) {
    this.#snapshot = snapshot;
    const changed = lastChanges(snapshot);
    const disabled = !this.tune || ended;
    for (const row of this.#rows) {
      const changedAgo = row.name in changed ? changed[row.name] + age : undefined;
      row.update(snapshot.settings[row.name], { changedAgo, disabled });
    }
  }
}

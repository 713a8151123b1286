// The panel in a notebook, for anywidget. Frames come from one model, messages go through another: see
// widgets.py.

import { el } from "./dom.js";
import { Panel } from "./panel.js";
import { decodeFrame } from "./snapshot.js";

const HELLO_MS = [400, 1500, 5000];

// Messages to the kernel, each with an answer.
class Messages {
  #waiting = new Map();
  #onMessage = (answer) => this.#waiting.get(answer.id)?.(answer);

  constructor(model) {
    this.model = model;
    model.on("msg:custom", this.#onMessage);
  }

  get connected() {
    return this.model.comm_live !== false;
  }

  send(message) {
    const id = `${Math.random()}`; // every view gets the answers to all of them
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, (answer) => {
        this.#waiting.delete(id);
        if (answer.error) reject(new Error(answer.error));
        else resolve(answer);
      });
      this.model.send({ ...message, id });
    });
  }

  destroy() {
    this.model.off("msg:custom", this.#onMessage);
  }
}

async function render({ model, el: element }) {
  const id = model.get("controls").replace("IPY_MODEL_", "");
  const controls = await model.widget_manager.get_model(id);
  const messages = new Messages(controls);
  const panel = new Panel(element, {
    schemas: model.get("knobs"),
    tune: async (knobs) => (await messages.send({ kind: "tune", knobs })).settings,
    readErrors: async () => (await messages.send({ kind: "errors" })).errors,
    reportView(view, seen) {
      if (messages.connected) messages.send({ kind: "seen", view, seen }).catch(() => {});
    },
  });
  const cover = hideStaticHtml(id);
  element.append(cover);
  const onFrame = () => panel.update(decodeFrame(model.get("frame")));
  const onConnection = () => panel.setConnected(messages.connected);
  model.on("change:frame", onFrame);
  controls.on("comm_live_update", onConnection);
  onConnection();
  onFrame();
  const hellos = sayHello(messages, panel);
  return () => {
    model.off("change:frame", onFrame);
    controls.off("comm_live_update", onConnection);
    messages.destroy();
    hellos.forEach(clearTimeout);
    panel.destroy();
    cover.remove();
  };
}

// The output before the panel is for when nothing is live (static_html.py).
function hideStaticHtml(id) {
  const output = `[data-serving-kit="${id}"]`;
  return el("style", {}, `${output}, .jp-OutputArea-child:has(${output}) { display: none; }`);
}

// ipykernel 7.4 reads messages of a comm in the subshell that published on it last. At first this may be the
// one of the cell that made the panel, which reads messages only between cells; answering a hello moves the
// comm to the subshell of the panel. Sent late, so that the cell has ended, and more than once, for a cell
// that takes longer.
function sayHello(messages, panel) {
  const hello = async () => panel.showToken((await messages.send({ kind: "hello" })).token);
  return HELLO_MS.map((delay) => setTimeout(hello, delay));
}

export default { render };

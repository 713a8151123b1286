// The panel: puts the components together and decides when they are drawn.

import { Charts } from "./charts.js";
import { el, isDark, keepKeys, setText } from "./dom.js";
import { Errors } from "./errors.js";
import { Header } from "./header.js";
import { Settings } from "./settings.js";
import { describeState } from "./snapshot.js";
import { Tiles } from "./tiles.js";
import { Timeline } from "./timeline.js";
import { Visibility } from "./visibility.js";

const REFRESH_MS = 1000; // times and themes change without a snapshot
const MIN_FRAME_MS = 40;

export class Panel {
  #connected = true;
  #frame = 0; // the animation frame that was asked for
  #refreshing = true; // whether it draws all of the panel, or only the charts
  #timeline = new Timeline();
  #tiles = new Tiles();
  #charts = new Charts(() => this.#requestFrame());
  #cost = el("div", { class: "cost soft" });
  #onChange = () => this.refresh();
  #resize = new ResizeObserver(this.#onChange);
  #interval = setInterval(this.#onChange, REFRESH_MS);

  // Puts a panel into `element`.
  //   schemas             the JSON schema of each setting
  //   tune, unlock        see Settings
  //   readErrors          resolves to the latest failures
  //   reportView          is called with the id of this view and whether it is visible; null: it was removed
  //   url                 see Header
  constructor(element, options) {
    const { schemas, tune = null, unlock = null, readErrors = null, reportView = () => {}, url = "" } =
      options;
    this.header = new Header(url);
    this.settings = new Settings(schemas, { tune, unlock, onChange: this.#onChange });
    this.errors = new Errors(readErrors);
    this.root = this.#makeRoot();
    element.append(this.root);
    this.#resize.observe(this.root);
    const onChange = () => this.#requestFrame();
    this.visibility = new Visibility(this.root, { onChange, report: reportView });
  }

  #makeRoot() {
    const body = el("div", { class: "body" }, this.#charts.node, this.settings.node);
    const parts = [this.header.node, this.#tiles.node, body, this.errors.node, this.#cost];
    const label = "Live server panel";
    const root = el("section", { class: "sk", "aria-label": label }, el("div", { class: "all" }, ...parts));
    keepKeys(root);
    return root;
  }

  update(snapshot) {
    this.#timeline.update(snapshot);
    this.refresh();
  }

  setConnected(connected) {
    this.#connected = connected;
    this.refresh();
  }

  showToken(token) {
    this.header.showToken(token);
  }

  destroy() {
    this.#resize.disconnect();
    clearInterval(this.#interval);
    this.visibility.destroy();
    this.root.remove();
  }

  // Draws all of the panel soon.
  refresh() {
    this.#refreshing = true;
    this.#requestFrame();
  }

  #requestFrame() {
    if (this.visibility?.visible) this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#frame = 0;
    if (!this.#timeline.snapshot) return;
    if (this.#refreshing) this.#drawAll();
    this.#refreshing = false;
    const secondsPerPixel = this.#charts.draw(this.#timeline, this.#connected);
    if (this.#isMoving()) {
      setTimeout(() => this.#requestFrame(), Math.max(MIN_FRAME_MS, 1000 * secondsPerPixel));
    }
  }

  #drawAll() {
    const { snapshot } = this.#timeline;
    const state = describeState(snapshot, this.#connected);
    this.root.style.colorScheme = isDark(this.root) ? "dark" : "light";
    this.#charts.readColors();
    this.header.update(snapshot, state);
    this.#tiles.update(snapshot);
    this.settings.update(snapshot, { age: this.#timeline.age(), ended: state.ended });
    this.errors.update(snapshot);
    setText(this.#cost, describeCost(snapshot.panel));
  }

  #isMoving() {
    const still = matchMedia("(prefers-reduced-motion)").matches;
    return this.#timeline.runs(this.#connected) && this.#timeline.isFresh() && !still;
  }
}

function describeCost(cost) {
  if (!cost) return "";
  const time = cost.ms == null ? "" : `${cost.ms.toFixed(1)} ms and `;
  return `This panel costs ${time}${cost.kb.toFixed(1)} kB per second`;
}

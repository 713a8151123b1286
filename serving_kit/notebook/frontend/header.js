// The top of the panel: which model, in which state, and how to ask it.

import { copyButton, el, setText } from "./dom.js";
import { formatDuration } from "./format.js";

export class Header {
  #title = el("h2");
  #about = el("span", { class: "soft" });
  #packed = el("span", { class: "soft" }, "packed");
  #state = el("span", { class: "state", role: "status" });
  #curl = el("code", { tabindex: 0 });
  #copy = copyButton("Copy", () => this.#curl.textContent);
  #link = el("a", { target: "_blank", rel: "noopener" }, "Open in the browser");
  #hint = el("span", { class: "soft" });
  #hasToken = false;

  // `url`: where this page was read from; "" in a notebook, where a link to the page is shown instead.
  constructor(url) {
    this.url = url;
    const link = url ? [] : [this.#link, this.#hint];
    const line = el("div", { class: "curl" }, this.#curl, this.#copy, ...link);
    this.node = el("header", {}, this.#title, this.#about, this.#packed, this.#state, line);
  }

  update(snapshot, state) {
    const { model, name, task, device, precision, layout, uptime_s, browser } = snapshot;
    setText(this.#title, model);
    const up = `up ${formatDuration(uptime_s)}`;
    setText(this.#about, [name, task, device, precision, up].filter(Boolean).join(" · "));
    this.#packed.hidden = !layout.packed;
    this.#packed.title = layout.reason;
    setText(this.#state, `● ${state.text}`);
    this.#state.style.color = `var(--${state.color})`;
    setText(this.#curl, `curl ${exampleBody(task)} ${(this.url || snapshot.url).replace(/\/?$/, "/")}`);
    if (browser) this.#updateLink(browser);
  }

  #updateLink(browser) {
    const { href, hint } = linkToPage(browser);
    this.#link.hidden = !href;
    if (href && this.#link.getAttribute("href") !== href) this.#link.href = href;
    setText(this.#hint, hint);
  }

  showToken(token) {
    if (!token || this.#hasToken) return;
    this.#hasToken = true;
    this.#copy.after(copyButton("Copy token", () => token));
  }
}

function exampleBody(task) {
  if (/image|audio|speech|video|object/.test(task)) return "--data-binary @file";
  return `-d '${task === "fill-mask" ? "test [MASK]." : "hello"}'`;
}

// An address of the kernel's machine is of no use to a browser on another one. There the notebook server,
// which this page came from, may pass the port through.
function linkToPage({ url, note, local }) {
  const config = document.getElementById("jupyter-config-data");
  const isRemote = local && config && !/^(localhost|127\.|\[::1)/.test(location.hostname);
  if (!isRemote) return { href: url, hint: note };
  const [, port] = url.match(/:(\d+)/);
  return {
    href: `${JSON.parse(config.textContent).baseUrl}proxy/${port}/`,
    hint: "needs jupyter-server-proxy",
  };
}

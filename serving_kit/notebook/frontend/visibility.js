// Whether an element can be seen: it is scrolled into view, and its page is not hidden.

const OUT_OF_VIEW_MS = 2000; // a view that is only scrolled past does not count as out of view

export class Visibility {
  visible = true;
  #id = `${Math.random()}`; // of this view, among others of the same panel
  #intersects = true;
  #timer = 0;
  #observer = new IntersectionObserver((entries) => {
    this.#intersects = entries.at(-1).isIntersecting;
    this.#update();
  });
  #onPage = () => this.#update();

  // onChange() is called at once, report(id, visible) a moment after the last change; with null when the
  // element is removed.
  constructor(node, { onChange, report }) {
    this.onChange = onChange;
    this.report = report;
    this.#observer.observe(node);
    document.addEventListener("visibilitychange", this.#onPage);
  }

  #update() {
    this.visible = this.#intersects && !document.hidden;
    this.onChange();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(this.report, this.visible ? 0 : OUT_OF_VIEW_MS, this.#id, this.visible);
  }

  destroy() {
    this.#observer.disconnect();
    document.removeEventListener("visibilitychange", this.#onPage);
    clearTimeout(this.#timer);
    this.visible = false;
    this.report(this.#id, null);
  }
}

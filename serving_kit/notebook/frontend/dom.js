// Elements, and what is asked of them.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Writes only what is different: a write lays out the page again.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function copyButton(label, text) {
  const button = el("button", { type: "button" }, label);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
      setText(button, "Copied");
    } catch {
      setText(button, "Not allowed here"); // by the browser, where the page is not https
    }
    setTimeout(setText, 1500, button, label);
  };
  return button;
}

// Decided by the background behind `node`, because JupyterLab's theme is independent of the browser's.
export function isDark(node) {
  for (let at = node.parentElement; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || ["0", "0", "0", "0"];
    const [red, green, blue, alpha = 1] = color.map(Number);
    if (alpha > 0.5) return 0.3 * red + 0.6 * green + 0.1 * blue < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// JupyterLab takes keys such as the arrows for the notebook, unless the focused element has this attribute.
export function keepKeys(root) {
  const focusable = "input, button, code, select, summary, a, [tabindex]";
  for (const node of root.querySelectorAll(focusable)) node.setAttribute("data-lm-suppress-shortcuts", "");
}

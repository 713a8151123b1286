// The inputs of one setting, by its JSON schema: a check box, a choice, or a number with a slider.
//
// Each function returns:
//   inputs    the elements: what stands in the middle of the row, and the field at its end
//   show      shows a value, unless the user is typing one
// and calls onChange(value, delayMs) when the user has chosen a value.

import { el } from "./dom.js";

const SLIDER_MS = 150; // between two values of a slider that is being dragged

export function makeInputs(name, schema, onChange) {
  const unit = schema["x-unit"] || "";
  const attributes = { "aria-label": unit ? `${name}, ${unit}` : name, title: schema.description };
  if (schema.type === "boolean") return makeCheckBox(attributes, onChange);
  if (schema.enum) return makeChoice(schema, attributes, onChange);
  if (schema.oneOf) return makeNumberOrAuto(schema.oneOf[0], attributes, onChange);
  return makeNumberWithSlider(name, schema, attributes, onChange);
}

function makeCheckBox(attributes, onChange) {
  const field = el("input", { type: "checkbox", ...attributes });
  field.onchange = () => onChange(field.checked, 0);
  return {
    inputs: [el("span"), field],
    show(value) {
      field.checked = value;
    },
  };
}

function makeChoice(schema, attributes, onChange) {
  const options = schema.enum.map((value) => el("option", {}, value));
  const field = el("select", { class: "field", ...attributes }, ...options);
  field.onchange = () => onChange(+field.value, 0);
  return {
    inputs: [el("span"), field],
    show(value) {
      field.value = value;
    },
  };
}

function makeNumberOrAuto(schema, attributes, onChange) {
  const onEntered = (text) => onChange(text ? +text : "auto", 0);
  const number = new NumberField(schema, { placeholder: "auto", ...attributes }, onEntered);
  return {
    inputs: [el("span"), number.node],
    show(value) {
      number.show(value === "auto" ? "" : value);
    },
  };
}

function makeNumberWithSlider(name, schema, attributes, onChange) {
  const stops = sliderStops(schema);
  const number = new NumberField(schema, attributes, (text) => text && onChange(+text, 0));
  const slider = el("input", { type: "range", max: stops.length - 1, "aria-label": name });
  slider.oninput = () => {
    number.node.value = stops[slider.value];
    onChange(stops[slider.value], SLIDER_MS);
  };
  return {
    inputs: [slider, number.node],
    show(value) {
      number.show(value);
      slider.value = stops.findIndex((stop) => stop >= value);
      slider.setAttribute("aria-valuetext", `${value} ${schema["x-unit"] || ""}`);
    },
  };
}

class NumberField {
  #typing = false;

  // onEntered(text) is called when the user has typed a value.
  constructor({ minimum, maximum }, attributes, onEntered) {
    this.onEntered = onEntered;
    const bounds = { min: minimum, max: maximum, step: "any" };
    this.node = el("input", { type: "number", class: "field", ...bounds, ...attributes });
    this.node.oninput = () => {
      this.#typing = true;
    };
    this.node.onblur = () => {
      this.#typing = false;
    };
    this.node.onchange = () => this.#enter();
    // JupyterLab keeps the browser from turning Enter into a change event.
    this.node.onkeydown = ({ key }) => key === "Enter" && this.#enter();
  }

  show(value) {
    if (!this.#typing) this.node.value = value;
  }

  #enter() {
    if (this.#typing) this.onEntered(this.node.value);
    this.#typing = false;
  }
}

// The positions of a slider: round values, closer together where they are small.
function sliderStops({ type, minimum, maximum }) {
  const isInteger = type === "integer";
  const [factor, steps] = isInteger ? [2, [1, 1.25, 1.5, 1.75]] : [10, [1, 1.5, 2, 3, 4, 5, 6, 8]];
  const values = new Set([minimum, maximum]);
  for (let base = 1; base < maximum; base *= factor) {
    for (const step of steps) values.add(base * step);
  }
  const allowed = [...values].filter((value) => value <= maximum && (!isInteger || value % 1 === 0));
  return allowed.sort((a, b) => a - b);
}

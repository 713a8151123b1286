// The live panel: in a notebook (default export, for anywidget) and as a page (poll, for panel.html).
// Both feed mount() with the snapshots of GET /stats. Its style is in panel.html, also for the notebook.

// JSON, because tests/test_panel.py holds it against settings.KNOBS.
const KNOBS = [
  {"name": "max_batch_size", "label": "Batch size", "unit": "items", "low": 1, "high": 4096},
  {"name": "max_wait_ms", "label": "Wait for company", "unit": "ms", "low": 0, "high": 60000},
  {"name": "max_queue_size", "label": "Queue size", "unit": "items", "low": 1, "high": 100000},
  {"name": "timeout_ms", "label": "Timeout", "unit": "ms", "low": 1, "high": 3600000},
  {"name": "group_by_length", "label": "Batch like lengths together"},
  {"name": "drop_hopeless", "label": "Refuse early what would be late"}
];
const TILES = {
  "now": ["waiting", "in flight"],
  "last 30 s": ["requests/s", "answers/s", "p50 ms", "p95 ms", "p99 ms", "mean batch"],
  "since the start": ["ok", "shed", "expired", "failed"],
};

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const count = (n) => (n < 1e5 ? Math.round(n).toLocaleString("en") : `${Math.round(n / 1e3)}k`);
const number = (n) => (n == null ? "–" : n < 0.995 ? `${+n.toFixed(2)}` : n < 99.95 ? n.toFixed(1) : count(n));
const span = (s) => (s < 120 ? `${s | 0} s` : `${(s / 60) | 0} min`);

// The positions of a slider: round values, close together where they are small.
function stops({ low, high, unit }) {
  const [factor, steps] = unit === "ms" ? [10, [1, 1.5, 2, 3, 4, 5, 6, 8]] : [2, [1, 1.25, 1.5, 1.75]];
  const values = [low, high];
  for (let base = 1; base < high; base *= factor) values.push(...steps.map((step) => base * step));
  return [...new Set(values)].filter((v) => v <= high && (unit === "ms" || v % 1 === 0)).sort((x, y) => x - y);
}
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10].find((m) => m * power >= value * 0.999) * power;
}

// By what is behind the panel: JupyterLab's theme need not be the browser's.
function isDark(node) {
  for (let at = node.parentElement; at; at = at.parentElement) {
    const [r, g, b, alpha = 1] = getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0];
    if (alpha > 0.5) return 0.3 * r + 0.6 * g + 0.1 * b < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function copyButton(label, text) {
  const button = el("button", { type: "button" }, label);
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(text()); put(button, "Copied"); }
    catch { put(button, "Not allowed here"); } // by the browser, where the page is not https
    setTimeout(put, 1500, button, label);
  };
  return button;
}

// The panel in `element`. tune(knobs) resolves to the settings in force, or rejects with why not; without
// it the panel is read-only. unlock(token), if given, makes one.
export function mount(element, { tune = null, unlock = null, url = "" } = {}) {
  let snapshot = null, received = 0, started = 0, visible = true, alive = true, asked = 0, frame = 0;
  const title = el("h2"), meta = el("span", { class: "soft" }), state = el("span", { class: "state" }), curl = el("code", { tabindex: 0 });
  const line = el("div", { class: "curl" }, curl, copyButton("Copy", () => curl.textContent));

  const tiles = {};
  const strip = Object.entries(TILES).map(([caption, names]) => el("div", { class: "group", style: `--n:${names.length}` },
    el("span", { class: "soft" }, caption),
    ...names.map((name) => el("div", {}, el("span", { class: "soft" }, name), (tiles[name] = el("b", { "data-number": name }, "–"))))));

  const charts = [["Waiting items", queue], ["Batch size", sizes], ["Latency, ms", latency]].map(([name, view]) =>
    ({ name, view, canvas: el("canvas", { role: "img" }), legend: el("span", { class: "soft" }) }));
  const keys = ["p50", "p95", "p99"].map((name) => el("span", { class: `key ${name}` }, `━ ${name}`));
  charts[2].legend.append(...keys);
  const figures = charts.map(({ name, canvas, legend }) => el("div", { class: "chart" }, el("div", {}, el("b", {}, name), legend), canvas));

  // -- knobs --
  const note = el("div", { class: "note soft", "aria-live": "polite" }), refusal = el("div", { role: "alert" });
  const knobs = KNOBS.map((knob) => {
    const { name, label, unit, low, high } = knob, one = { name, label, unit, waiting: 0, settled: 0 };
    if (unit) {
      const places = stops(knob), field = el("input", { type: "number", class: "field", min: low, max: high, step: "any", "aria-label": `${label}, ${unit}` });
      const range = el("input", { type: "range", max: places.length - 1, "aria-label": label });
      let typing = false;
      one.show = (value) => {
        if (!typing) field.value = value;
        range.value = places.findIndex((place) => place >= value);
        range.setAttribute("aria-valuetext", `${value} ${unit}`);
      };
      range.oninput = () => { field.value = places[range.value]; change(one, places[range.value], 150); };
      field.oninput = () => { typing = true; };
      field.onblur = () => { typing = false; };
      field.onchange = () => { if (typing && field.value) change(one, +field.value, 0); typing = false; };
      field.onkeydown = (event) => { if (event.key === "Enter") field.onchange(); }; // JupyterLab takes the browser's
      one.text = el("span", { class: "soft" }, unit);
      one.row = el("div", { class: "knob" }, el("span", {}, label), range, field, one.text);
      one.inputs = [range, field];
    } else {
      const box = el("input", { type: "checkbox" });
      one.show = (value) => { box.checked = value; };
      box.onchange = () => change(one, box.checked, 0);
      one.row = el("label", { class: "check" }, box, label);
      one.inputs = [box];
    }
    return one;
  });
  const set = el("div", { class: "knobs", role: "group", "aria-label": "Settings" },
    el("div", { class: "note" }, el("b", {}, "Settings"), ", in force from the next batch"), ...knobs.map((one) => one.row));
  if (unlock) {
    const token = el("input", { type: "password", class: "field", placeholder: "token", autocomplete: "off" });
    token.onchange = () => { tune = token.value.trim() && unlock(token.value.trim()); draw(); };
    set.append(el("label", { class: "note soft" }, "Read-only without the token from the panel in the notebook: ", token));
  }
  set.append(el("div", { class: "note" }, note, refusal));

  function change(one, value, pause) {
    one.value = value;
    one.waiting = ++asked;
    one.timer ||= setTimeout(ask, pause, one); // at most one message in each pause, with the newest value
    draw();
  }

  async function ask(one) {
    const { name, label, value, waiting } = one;
    one.timer = 0;
    const late = setTimeout(put, 2000, note, `${label}: no answer yet; a running cell may keep the kernel busy`);
    let settings = null, error = "";
    try { settings = await tune({ [name]: value }); } catch (reason) { error = reason.message; }
    clearTimeout(late);
    if (settings) snapshot.settings = settings;
    if (one.waiting !== waiting) return; // it has moved on; the newer answer counts
    one.waiting = 0;
    one.settled = performance.now() + 600; // a frame from before may still arrive
    put(refusal, error);
    put(note, error ? "" : `${label} ${{ true: "on", false: "off" }[settings[name]] ?? settings[name]}: in force since ${new Date().toLocaleTimeString()}`);
    one.show(snapshot.settings[name]);
    draw();
  }

  // -- drawing --
  function fill() {
    const { window: recent, requests, settings, task } = snapshot, { p50, p95, p99 } = recent.latency_ms;
    const mood = { ready: "good", failed: "bad", stopped: "soft", replaced: "soft" }, hue = alive ? mood[snapshot.state] || "warn" : "soft";
    put(title, snapshot.model);
    put(meta, [snapshot.name, task, snapshot.device, `up ${span(snapshot.uptime_s)}`].join(" · "));
    put(state, `● ${alive ? snapshot.reason || snapshot.state : "not connected: the last picture"}`);
    state.style.color = `var(--${hue})`;
    const body = /image|audio|speech|video|object/.test(task) ? "--data-binary @file" : `-d '${task === "fill-mask" ? "test [MASK]." : "hello"}'`;
    put(curl, `curl ${body} ${(url || snapshot.url).replace(/\/?$/, "/")}`);
    const rates = [recent.arrivals_per_s, recent.answers_per_s, p50, p95, p99, recent.batch_size_mean].map(number);
    const counts = ["ok", "shed", "expired", "failed"].map((outcome) => count(requests[outcome]));
    const texts = [count(snapshot.queue_depth), count(snapshot.in_flight), ...rates, ...counts];
    Object.values(tiles).forEach((tile, i) => put(tile, texts[i]));
    for (const name of ["shed", "expired", "failed"]) tiles[name].style.color = requests[name] ? `var(--${name === "failed" ? "bad" : "warn"})` : "";
    for (const one of knobs) {
      if (!one.waiting && performance.now() > one.settled) one.show(settings[one.name]);
      if (one.text) put(one.text, one.waiting && one.value !== settings[one.name] ? `now ${settings[one.name]}` : one.unit);
      for (const input of one.inputs) input.disabled = !tune || hue === "soft";
    }
  }

  // One chart. Time goes on when nothing is sent, unless the server has ended.
  function plot({ canvas }, own, { cap, top, body }, ink) {
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1, g = canvas.getContext("2d");
    canvas.width = width * scale;
    canvas.height = height * scale;
    g.scale(scale, scale);
    g.font = ink.font;
    const left = 34, base = height - 17, began = started + snapshot.uptime_s;
    const now = began + (alive && snapshot.state === "ready" ? (performance.now() - received) / 1000 : 0);
    const period = [30, 60].find((s) => now - started < s) || 120;
    const x = (second) => left + ((second - now) / period + 1) * (width - left), y = (value) => base - (value / top) * (base - 14);
    const write = (text, at, level, align = "left") => { g.fillStyle = ink.soft; g.textAlign = align; g.fillText(text, at, level); };
    const rule = (x1, y1, x2, y2, colour, dash = []) => {
      g.strokeStyle = colour; g.setLineDash(dash); g.beginPath(); g.moveTo(x1, y1); g.lineTo(x2, y2); g.stroke(); g.setLineDash([]);
    };
    for (const value of [0, top / 2, top]) {
      const level = Math.round(y(value)) + 0.5;
      rule(left, level, width, level, ink.line);
      write(value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : +value.toFixed(2), left - 6, level + 3.5, "right");
    }
    g.beginPath();
    write(`−${period} s`, left, height - 3);
    write("now", width, height - 3, "right");
    g.save();
    g.rect(left, 0, width, base + 1);
    g.clip();
    g.beginPath();
    g.lineWidth = 1.5;
    body({ g, x, y, now });
    g.restore();
    if (cap <= top) {
      rule(left, y(cap), width, y(cap), ink.soft, [4, 3]);
      write("limit", left + 4, y(cap) - 3);
    }
    // Where a knob was moved: a line in every chart, words in the one that the knob is about.
    const marks = snapshot.changes.map(({ ago_s: ago, knobs: moved }) => ({ at: x(began - ago), moved })).filter(({ at, moved }) => at > left && Object.keys(moved).length);
    for (const { at } of marks) rule(at, 4, at, base, ink.soft, [1, 2]);
    let free = width;
    for (const { at, moved } of marks.reverse()) {
      const mine = Object.keys(moved).filter((name) => ({ max_queue_size: queue, max_batch_size: sizes }[name] || latency) === own);
      const text = mine.map((name) => `${name} ${moved[name]}`).join(", "), wide = g.measureText(text).width + 6;
      if (!text || at > free || at - wide < left) continue;
      g.fillStyle = ink.ground;
      g.fillRect(at - wide, 0, wide - 1, 13);
      write(text, at - 4, 10, "right");
      free = at - wide;
    }
  }

  // What a chart shows: its limit, its top (with room for a limit that is near) and how to draw it.
  function queue(points, ink) {
    const cap = snapshot.settings.max_queue_size, most = Math.max(snapshot.queue_depth, ...points.map((p) => p.queue_depth));
    const body = ({ g, x, y, now }) => {
      const end = points.length ? points.at(-1).second + 1 : now, last = x(Math.max(end, now));
      g.moveTo(x(points.length ? points[0].second : end), y(0));
      for (const { second, queue_depth: depth } of points) { g.lineTo(x(second), y(depth)); g.lineTo(x(second + 1), y(depth)); }
      // Nothing has changed since the last frame, else there would be a newer one.
      for (const at of [x(end), last]) g.lineTo(at, y(snapshot.queue_depth));
      g.strokeStyle = g.fillStyle = ink.p50;
      g.stroke();
      g.lineTo(last, y(0));
      g.globalAlpha = 0.16;
      g.fill();
    };
    return { cap, top: roundUp(Math.max(4, most, cap <= most * 2 ? cap * 1.15 : 0)), legend: `peak ${count(most)}, limit ${count(cap)}`, body };
  }

  // A column for each second, a cell for each size, the stronger the more batches had it.
  function sizes(points, ink) {
    const cap = snapshot.settings.max_batch_size, most = Math.max(1, ...points.flatMap((p) => Object.keys(p.sizes)));
    const body = ({ g, x, y }) => {
      g.fillStyle = ink.p50;
      for (const { second, sizes: seen, step = 1 } of points) {
        const peak = Math.max(...Object.values(seen));
        for (const [size, n] of Object.entries(seen)) {
          g.globalAlpha = 0.15 + (0.75 * n) / peak;
          g.fillRect(x(second), y(size), x(second + 1) - x(second) - 0.3, Math.max(2, y(0) - y(step) - 0.4));
        }
      }
    };
    const legend = `mean ${number(snapshot.window.batch_size_mean)}, limit ${count(cap)}`;
    return { cap, top: roundUp(Math.max(4, most, cap <= Math.max(8, most * 2) ? cap * 1.15 : 0)), legend, body };
  }

  function latency(points, ink) {
    const cap = snapshot.settings.timeout_ms, most = Math.max(1, ...points.map((p) => p.latency_ms.p99 || 0));
    const body = ({ g, x, y }) => {
      for (const name of ["p99", "p95", "p50"]) {
        let pen = false;
        g.beginPath();
        for (const { second, latency_ms: { [name]: value } } of points) {
          if (value == null) { pen = false; continue; } // a gap: nobody was answered in that second
          if (!pen) g.moveTo(x(second + 0.5) - 1, y(value));
          g.lineTo(x(second + 0.5), y(value));
          pen = true;
        }
        g.strokeStyle = ink[name];
        g.stroke();
      }
    };
    return { cap, top: roundUp(cap <= most * 1.5 ? Math.max(most, cap * 1.15) : most), body };
  }

  const root = el("section", { class: "sk", "aria-label": "Live server panel" }, el("div", { class: "all" },
    el("header", {}, title, meta, state, line), el("div", { class: "tiles" }, ...strip), el("div", { class: "charts" }, ...figures), set));
  // Else JupyterLab takes arrow keys for the notebook. It looks at what has the focus.
  for (const node of root.querySelectorAll("input, button, code")) node.setAttribute("data-lm-suppress-shortcuts", "");
  element.append(root);

  function draw() { if (visible) frame ||= requestAnimationFrame(paint); }
  function paint() {
    frame = 0;
    root.style.colorScheme = isDark(root) ? "dark" : "light";
    if (!snapshot) return;
    fill();
    const css = getComputedStyle(root), colour = (node) => getComputedStyle(node).color, [p50, p95, p99] = keys.map(colour);
    const ink = { p50, p95, p99, soft: colour(meta), line: css.borderTopColor, ground: css.backgroundColor, font: `11px ${css.fontFamily}` };
    const points = snapshot.series.filter(({ second }) => second > started - 1);
    for (const { name, view, canvas, legend } of charts) {
      const shown = view(points, ink);
      plot({ canvas }, view, shown, ink);
      if (shown.legend) put(legend, shown.legend);
      canvas.setAttribute("aria-label", `${name}: ${legend.textContent}`);
    }
  }

  const resized = new ResizeObserver(draw);
  const seen = new IntersectionObserver((entries) => { visible = entries.at(-1).isIntersecting; draw(); });
  resized.observe(root);
  seen.observe(root);
  const beat = setInterval(draw, 1000); // time and themes change without a frame

  return {
    update(next) {
      // `second` is the server's clock, rounded down: the most that we see of this is when it started.
      if (snapshot && next.uptime_s < snapshot.uptime_s) started = 0;
      started = Math.max(started, next.series.at(-1).second - next.uptime_s);
      snapshot = next;
      received = performance.now();
      draw();
    },
    connected(yes) { alive = yes; draw(); },
    token(text) { if (line.children.length < 3) line.append(copyButton("Copy token", () => text)); },
    destroy() {
      resized.disconnect();
      seen.disconnect();
      clearInterval(beat);
      cancelAnimationFrame(frame);
      root.remove();
    },
  };
}

// -- in a notebook --

// From panel.py's columns, with digits for batch sizes, to what /stats says.
function unpack(bytes) {
  const snapshot = JSON.parse(new TextDecoder().decode(bytes)), { second, step, queue_depth: depths, sizes, p50, p95, p99 } = snapshot.series;
  const series = depths.map((depth, i) => {
    const seen = [...sizes[i]].map((digit, row) => [(row + 1) * step, +digit]).filter(([, n]) => n);
    return { second: second + i, queue_depth: depth, step, sizes: Object.fromEntries(seen), latency_ms: { p50: p50[i], p95: p95[i], p99: p99[i] } };
  });
  return { ...snapshot, series };
}

async function render({ model, el: element }) {
  const controls = await model.widget_manager.get_model(model.get("controls").replace("IPY_MODEL_", ""));
  const waiting = new Map();
  const send = (message) => new Promise((resolve, reject) => {
    const id = `${Math.random()}`; // other views hear the answer too
    waiting.set(id, (answer) => { waiting.delete(id); if (answer.error) reject(new Error(answer.error)); else resolve(answer); });
    controls.send({ ...message, id });
  });
  const panel = mount(element, { tune: async (knobs) => (await send({ kind: "tune", knobs })).settings });
  const heard = (answer) => waiting.get(answer.id)?.(answer);
  const linked = () => panel.connected(controls.comm_live !== false);
  const changed = () => panel.update(unpack(model.get("frame")));
  controls.on("msg:custom", heard);
  controls.on("comm_live_update", linked);
  model.on("change:frame", changed);
  linked();
  changed();
  // ipykernel 7.4 reads our messages in the shell that last published on their comm: first that of the
  // cell that made the panel, between cells only. An answered hello moves it to our own. Not at once, so
  // that the cell has ended, and a few times, for a cell that takes longer.
  const hellos = [400, 1500, 5000].map((ms) => setTimeout(async () => panel.token((await send({ kind: "hello" })).token), ms));
  return () => {
    controls.off("msg:custom", heard);
    controls.off("comm_live_update", linked);
    model.off("change:frame", changed);
    hellos.forEach(clearTimeout);
    panel.destroy();
  };
}

// -- as a page --

export function poll(element, base) {
  const unlock = (token) => async (knobs) => {
    const headers = { authorization: `Bearer ${token}`, "content-type": "application/json" };
    const response = await fetch(new URL("settings", base), { method: "PATCH", headers, body: JSON.stringify(knobs) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  };
  const panel = mount(element, { unlock, url: base.href });
  let last = null, timer = 0;
  async function tick() {
    if (document.hidden) return;
    try {
      const response = await fetch(new URL("stats?series=120", base), { signal: AbortSignal.timeout(5000) });
      const next = await response.json();
      panel.update(next);
      last = next;
    } catch {
      if (last) panel.update({ ...last, state: "failed", reason: "no answer from the server" });
    }
    clearTimeout(timer); // of a tick that was under way
    timer = setTimeout(tick, 500);
  }
  document.addEventListener("visibilitychange", tick);
  tick();
}

export default { render };

// The charts of the live panel: five canvases on one axis of time, a cursor through all of them.
// panel.js goes on from here: both are one module, for the notebook (panel.py) and the page (app.py).

const REASONS = ["full", "budget", "idle", "deadline", "all_present", "retry", "drain"]; // of records.py
const BAD = ["shed", "expired", "failed", "unavailable"];
const LEAST = { p50: 2, p95: 20, p99: 100 }; // samples, below which a percentile is only the largest of them
const EMPTY_SECOND = { queue_depth: 0, in_flight: 0, arrivals: 0, ok: 0, shed: 0, expired: 0, failed: 0, unavailable: 0, samples: 0, latency_ms: {}, queue_wait_ms: {}, forward_ms: {}, sizes: {}, reasons: {} };
const LEFT = 40, DELAY_S = 1.25; // of the charts: the newest second is drawn when it is over


function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const count = (n) => (n < 1e5 ? Math.round(n).toLocaleString("en") : `${Math.round(n / 1e3)}k`);
const number = (n) => (n == null ? "–" : n < 0.995 ? `${+n.toFixed(2)}` : n < 99.95 ? n.toFixed(1) : count(n));
const span = (s) => (s < 120 ? `${s | 0} s` : s < 7200 ? `${(s / 60) | 0} min` : `${(s / 3600) | 0} h`);
const clock = (ago) => new Date(Date.now() - ago * 1000).toLocaleTimeString("en-GB");
const sum = (values) => values.reduce((a, b) => a + b, 0);

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

// -- the charts: what each says (keys: class, label, value of one second), and how it is drawn --

const limit = (name) => ["limit", "limit", (p, settings) => count(settings[name])];
const percentile = (name) => [name, name, (p) => number(p.latency_ms[name]), (p) => p.samples < LEAST[name]];
const batches = (p) => sum(Object.values(p.reasons));
const CHARTS = [
  {
    name: "Queue, items", cap: "max_queue_size", knobs: /queue|drop/, least: 4, most: (p) => p.in_flight,
    keys: [["wait", "waiting", (p) => count(p.queue_depth)], ["soft", "in flight", (p) => count(p.in_flight)], limit("max_queue_size")],
    draw({ line }) {
      line((p) => p.in_flight, "soft", { step: 1 });
      line((p) => p.queue_depth, "wait", { step: 1, fill: 0.18 });
    },
  },
  {
    name: "Batches, items", cap: "max_batch_size", knobs: /batch|wait|group/, least: 4, tall: 1, most: (p) => Math.max(0, ...Object.keys(p.sizes)),
    keys: [["work", "mean", (p) => number(batches(p) ? p.mean : null)], ["soft", "padding", (p) => (p.padding == null ? "–" : `${Math.round(p.padding * 100)} %`)], limit("max_batch_size")],
    // A column for each second, a cell for each size, the stronger the more batches had it. Below, why
    // they were sent.
    draw({ g, x, y, ink, base, points }) {
      for (const { second, sizes, step = 1, reasons } of points) {
        const peak = Math.max(...Object.values(sizes)), left = x(second), wide = x(second + 1) - left - 0.4, all = sum(Object.values(reasons));
        g.fillStyle = ink.work;
        for (const [size, n] of Object.entries(sizes)) {
          g.globalAlpha = 0.15 + (0.8 * n) / peak;
          g.fillRect(left, y(size), wide, Math.max(2, y(0) - y(step) - 0.4));
        }
        g.globalAlpha = 1;
        let top = base + 5;
        for (const reason of REASONS) {
          const high = all ? (9 * (reasons[reason] || 0)) / all : 0;
          g.fillStyle = ink[reason];
          g.fillRect(left, top, wide, high);
          top += high;
        }
      }
    },
  },
  {
    name: "Latency, ms", cap: "timeout_ms", knobs: /timeout/, least: 1, most: (p) => p.latency_ms.p99, keys: [...["p50", "p95", "p99"].map(percentile), limit("timeout_ms")],
    draw({ line }) {
      for (const name of ["p99", "p95", "p50"]) {
        line((p) => p.latency_ms[name], (p) => (p.samples < LEAST[name] ? "faint" : name), { width: name === "p50" ? 2 : 1.5 });
      }
    },
  },
  {
    name: "Time spent, median ms", least: 1, most: (p) => Math.max(p.queue_wait_ms.p50 || 0, p.forward_ms.p50 || 0),
    keys: [["wait", "in queue", (p) => number(p.queue_wait_ms.p50)], ["work", "in model", (p) => number(p.forward_ms.p50)]],
    draw({ line }) {
      line((p) => p.queue_wait_ms.p50, "wait");
      line((p) => p.forward_ms.p50, "work");
    },
  },
  {
    name: "Requests per second", knobs: /status|errors|body/, least: 4, most: (p) => Math.max(p.arrivals, p.ok + sum(BAD.map((name) => p[name]))),
    keys: [["strong", "in", (p) => count(p.arrivals)], ["wait", "ok", (p) => count(p.ok)], ...BAD.map((name) => [name, name, (p) => count(p[name])])],
    draw({ g, x, y, ink, points, line }) {
      for (const p of points) {
        let level = 0;
        for (const name of ["ok", ...BAD]) {
          g.fillStyle = ink[name === "ok" ? "wait" : name];
          g.globalAlpha = name === "ok" ? 0.35 : 0.9;
          g.fillRect(x(p.second), y(level + p[name]), x(p.second + 1) - x(p.second) - 0.4, y(level) - y(level + p[name]));
          level += p[name];
        }
      }
      g.globalAlpha = 1;
      line((p) => p.arrivals, "strong", { step: 1, width: 1 });
    },
  },
];

// A canvas, cleared, in CSS pixels.
function sheet(canvas, font) {
  const wide = canvas.clientWidth, high = canvas.clientHeight, scale = devicePixelRatio || 1, g = canvas.getContext("2d");
  if (canvas.width !== Math.round(wide * scale) || canvas.height !== Math.round(high * scale)) {
    canvas.width = wide * scale;
    canvas.height = high * scale;
  }
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, wide, high);
  g.font = font;
  return { g, wide, high };
}

// One chart. The axis of time is the same for all.
function plot({ canvas, cap: limit, knobs: own, least, most, tall, draw: body }, { end, period, marks, points, ink, cursor, settings }) {
  const { g, wide, high } = sheet(canvas, ink.font), base = high - (tall ? 15 : 1);
  const cap = settings[limit], peak = Math.max(least, ...points.map((p) => most(p) || 0)), top = roundUp(cap && cap <= peak * 1.5 ? Math.max(peak, cap * 1.15) : peak);
  const x = (second) => LEFT + ((second - end) / period + 1) * (wide - LEFT), y = (value) => base - (value / top) * (base - 6);
  const rule = (x1, y1, x2, y2, colour, dash = []) => {
    g.strokeStyle = colour; g.lineWidth = 1; g.setLineDash(dash); g.beginPath(); g.moveTo(x1, y1); g.lineTo(x2, y2); g.stroke(); g.setLineDash([]);
  };
  g.textAlign = "right";
  for (const value of [0, top]) {
    const level = Math.round(y(value)) + (value ? 0.5 : -0.5);
    rule(LEFT, level, wide, level, ink.rule);
    g.fillStyle = ink.soft;
    g.fillText(value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : +value.toFixed(2), LEFT - 6, level + (value ? 7 : -0.5));
  }
  g.save();
  g.beginPath();
  g.rect(LEFT, 0, wide - LEFT, high);
  g.clip();
  // Piece by piece, so that one line may change its colour; a null leaves a gap.
  const curve = (value, hue, { step = 0, width = 1.5, fill = 0 } = {}) => {
    let last = null;
    g.lineWidth = width;
    g.lineJoin = "round";
    for (const p of points) {
      const v = value(p), at = x(p.second + (step ? 0 : 0.5)), to = x(p.second + 1);
      if (v != null) {
        g.strokeStyle = g.fillStyle = ink[typeof hue === "string" ? hue : hue(p)];
        g.globalAlpha = fill;
        if (fill) g.fillRect(at, y(v), to - at, y(0) - y(v));
        g.globalAlpha = 1;
        g.beginPath();
        g.moveTo(...(last || [at - 1, y(v)]));
        g.lineTo(at, y(v));
        if (step) g.lineTo(to, y(v));
        g.stroke();
      }
      last = v == null ? null : [step ? to : at, y(v)];
    }
  };
  body({ g, x, y, ink, base, points, line: curve });
  g.restore();
  // The limit since it is in force; what it was before is not known.
  const moved = marks.findLast((mark) => limit in mark.moved);
  if (cap && cap <= top) rule(Math.max(LEFT, moved ? x(moved.second) : 0), y(cap), wide, y(cap), ink.limit, [4, 3]);
  // Where a knob was moved: a line in every chart, words in the one that the knob is about.
  let free = wide;
  for (const { second, moved } of [...marks].reverse()) {
    const at = x(second), text = Object.keys(moved).filter((name) => own?.test(name)).map((name) => `${name} ${moved[name]}`).join(", "), space = g.measureText(text).width + 8;
    if (at < LEFT || at > wide) continue;
    rule(at, 0, at, base, ink.strong, [1, 2]);
    if (!text || at > free || at - space < LEFT) continue;
    g.fillStyle = ink.ground;
    g.fillRect(at - space, 0, space - 2, 14);
    g.fillStyle = ink.strong;
    g.fillText(text, at - 4, 10);
    free = at - space;
  }
  if (cursor != null) rule(x(cursor + 0.5), 0, x(cursor + 0.5), high, ink.soft);
}

// The charts. draw() returns the seconds that a pixel stands for. The numbers are those of the newest
// second that is over, or of the one under the cursor.
function makeCharts() {
  let view = null, cursor = null, again = () => {}, ink = {};
  const charts = CHARTS.map((chart) => {
    const canvas = el("canvas", { role: "img", class: chart.tall ? "tall" : "" });
    const values = chart.keys.map(([hue, label]) => [el("span", { class: `key ${hue}` }, label), el("b")]);
    const row = el("div", {}, el("b", {}, chart.name), el("span", {}, ...values.map((pair) => el("span", {}, ...pair))));
    const why = chart.tall ? [el("div", { class: "why" }, "sent because ", ...REASONS.map((reason) => el("span", { class: `key ${reason}` }, reason.replace("_", " "))))] : [];
    return { ...chart, canvas, values, node: el("div", { class: "chart" }, row, canvas, ...why) };
  });
  const axis = el("canvas", { class: "axis", "aria-hidden": "true" }), swatches = el("span", { hidden: "" });
  for (const hue of ["strong", "faint", "soft", "rule", "ground"]) swatches.append(el("i", { class: `key ${hue}` }));
  const figures = el("div", { class: "charts", tabindex: 0, role: "group", "aria-label": "The last two minutes. Arrow keys read one second after another." }, ...charts.map(({ node }) => node), axis, swatches);
  const hover = (second) => { cursor = second; again(); };
  figures.onpointermove = ({ clientX }) => {
    const { left, width } = axis.getBoundingClientRect(), at = (clientX - left - LEFT) / (width - LEFT);
    hover(view && at >= 0 ? Math.floor(view.end - (1 - at) * view.period) : null);
  };
  figures.onpointerleave = figures.onblur = () => hover(null);
  figures.onkeydown = ({ key }) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (move && view) hover(Math.min(Math.floor(view.end) - 1, (cursor ?? Math.floor(view.end)) + move));
    if (key === "Escape") hover(null);
  };

  function draw(snapshot, { started, since, live, fresh }) {
    if (fresh) ink = { font: `11px ${getComputedStyle(figures).fontFamily}` }; // the theme may have changed
    if (fresh) for (const key of figures.querySelectorAll(".key")) ink[key.classList[1]] ||= getComputedStyle(key).borderLeftColor;
    const now = snapshot.series.at(-1).second + snapshot.phase + (live ? since : 0), end = now - (live ? DELAY_S : 0), period = [30, 60].find((s) => end - started < s) || 120;
    const marks = (snapshot.changes || []).map(({ ago_s, knobs: moved }) => ({ second: snapshot.series.at(-1).second + snapshot.phase - ago_s, moved }));
    const points = snapshot.series.filter(({ second }) => second > end - period - 1 && second >= started - 1 && second < end + 1);
    view = { end, period, marks, points, ink, cursor, settings: snapshot.settings };
    const chosen = points.find((p) => p.second === (cursor ?? Math.floor(end) - (live ? 1 : 0))) || EMPTY_SECOND;
    for (const chart of charts) {
      plot(chart, view);
      chart.keys.forEach(([, , value, few], i) => {
        put(chart.values[i][1], value(chosen, snapshot.settings));
        chart.values[i][1].className = few?.(chosen) ? "few" : "";
      });
      chart.canvas.setAttribute("aria-label", `${chart.name}: ${chart.values.map(([key, value]) => `${key.textContent} ${value.textContent}`).join(", ")}`);
    }
    const { g, wide } = sheet(axis, ink.font), write = (text, second, align) => { g.textAlign = align; g.fillText(text, LEFT + ((second - end) / period + 1) * (wide - LEFT), 11); };
    g.fillStyle = ink.soft;
    if (cursor == null) for (const share of [1, 0.5]) write(`−${period * share} s`, end - period * share, share === 1 ? "left" : "center");
    else write(`${clock(now - cursor)}, ${Math.max(0, Math.round(now - cursor))} s ago`, Math.max(cursor, end - period * 0.8), "center");
    if (cursor == null || end - cursor > period * 0.25) write("now", end, "right");
    return period / (wide || 1);
  }
  return { node: figures, draw, onchange(callback) { again = callback; } };
}

// The mean size, from how many batches had which; a step is how many sizes share one row.
const mean = (sizes, step = 1) => {
  const all = Object.entries(sizes);
  return sum(all.map(([size, n]) => (size - (step - 1) / 2) * n)) / sum(all.map(([, n]) => n));
};

// From panel.py's rows, with digits for batch sizes, to what /stats says.
function unpack(bytes) {
  const snapshot = JSON.parse(new TextDecoder().decode(bytes)), reasons = Object.keys(snapshot.batches);
  const series = snapshot.rows.map((row, i) => {
    if (!row) return { ...EMPTY_SECOND, second: snapshot.first + i };
    const [queue_depth, in_flight, arrivals, ok, shed, expired, failed, unavailable, samples, p50, p95, p99, wait, work, padding, step, digits, why] = row;
    const sizes = Object.fromEntries([...digits].map((digit, level) => [(level + 1) * step, +digit]).filter(([, n]) => n));
    return {
      second: snapshot.first + i, queue_depth, in_flight, arrivals, ok, shed, expired, failed, unavailable, samples, padding, step, sizes, mean: mean(sizes, step),
      latency_ms: { p50, p95, p99 }, queue_wait_ms: { p50: wait }, forward_ms: { p50: work }, reasons: Object.fromEntries(reasons.map((reason, k) => [reason, (why || [])[k] || 0])),
    };
  });
  return { ...snapshot, series };
}


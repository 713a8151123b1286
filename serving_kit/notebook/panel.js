// The live panel: in a notebook (default export, for anywidget) and as a page (poll, for panel.html).
// Both feed mount() with the snapshots of GET /stats. Above it, in the same module, comes charts.js; its
// style is in panel.html, also for the notebook.

const TILES = {
  "now": ["waiting", "in flight"],
  "last 30 s": ["requests/s", "answers/s", "p50 ms", "p95 ms", "p99 ms", "mean batch"],
  "since the start": ["ok", "shed", "expired", "failed", "unavailable"],
};
const LIVE = ["ready", "draining", "stuck"];
const FIRST = ["max_batch_size", "max_wait_ms", "max_queue_size", "timeout_ms", "group_by_length", "drop_hopeless"];
// The positions of a slider: round values, close together where they are small.
function stops(low, high, whole) {
  const [factor, steps] = whole ? [2, [1, 1.25, 1.5, 1.75]] : [10, [1, 1.5, 2, 3, 4, 5, 6, 8]];
  const values = [low, high];
  for (let base = 1; base < high; base *= factor) values.push(...steps.map((step) => base * step));
  return [...new Set(values)].filter((v) => v <= high && (!whole || v % 1 === 0)).sort((x, y) => x - y);
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
// it the panel is read-only. unlock(token), if given, makes one. errors() resolves to the last failures.
export function mount(element, { knobs, tune = null, unlock = null, errors = null, look = () => {}, url = "" }) {
  let snapshot = null, received = 0, started = 0, visible = true, alive = true, asked = 0, timer = 0, stale = true, told = "";
  const title = el("h2"), meta = el("span", { class: "soft" }), state = el("span", { class: "state", role: "status" }), curl = el("code", { tabindex: 0 });
  const link = el("a", { target: "_blank", rel: "noopener" }, "Open in the browser"), hint = el("span", { class: "soft" });
  const line = el("div", { class: "curl" }, curl, copyButton("Copy", () => curl.textContent), ...(url ? [] : [link, hint]));

  const tiles = {};
  const strip = Object.entries(TILES).map(([caption, names]) => el("div", { class: "group", style: `--n:${names.length}` },
    el("span", { class: "soft" }, caption),
    ...names.map((name) => el("div", {}, el("span", { class: "soft" }, name), (tiles[name] = el("b", { "data-number": name }, "–"))))));

  const charts = makeCharts();

  // -- knobs --
  const note = el("div", { class: "note soft", "aria-live": "polite" }), refusal = el("div", { role: "alert" });
  const rows = Object.entries(knobs).map(([name, schema]) => {
    const { type, minimum: low, maximum: high } = schema.oneOf?.[0] || schema, unit = schema["x-unit"] || "", one = { name, waiting: 0, settled: 0 };
    const since = el("span", { class: "since" }), label = el("span", { class: "name" }, name), range = low == null ? "" : ` · ${low.toLocaleString("en")} to ${high.toLocaleString("en")}`;
    const about = { "aria-label": unit ? `${name}, ${unit}` : name, title: schema.description };
    let middle = el("span"), field;
    if (type === "boolean") {
      field = el("input", { type: "checkbox", ...about });
      one.show = (value) => { field.checked = value; };
      field.onchange = () => change(one, field.checked, 0);
    } else if (schema.enum) {
      field = el("select", { class: "field", ...about }, ...schema.enum.map((value) => el("option", {}, value)));
      one.show = (value) => { field.value = value; };
      field.onchange = () => change(one, +field.value, 0);
    } else {
      const auto = schema.oneOf ? "auto" : null, places = stops(low, high, type === "integer");
      let typing = false;
      field = el("input", { type: "number", class: "field", min: low, max: high, step: "any", placeholder: auto || "", ...about });
      if (!auto) {
        middle = el("input", { type: "range", max: places.length - 1, "aria-label": name });
        middle.oninput = () => { field.value = places[middle.value]; change(one, places[middle.value], 150); };
      }
      one.show = (value) => {
        if (!typing) field.value = value === "auto" ? "" : value;
        if (auto) return;
        middle.value = places.findIndex((place) => place >= value);
        middle.setAttribute("aria-valuetext", `${value} ${unit}`);
      };
      field.oninput = () => { typing = true; };
      field.onblur = () => { typing = false; };
      field.onchange = () => { if (typing && (field.value || auto)) change(one, field.value ? +field.value : auto, 0); typing = false; };
      field.onkeydown = (event) => { if (event.key === "Enter") field.onchange(); }; // JupyterLab takes the browser's
    }
    one.text = el("span", { class: "soft" }, unit);
    one.since = since;
    one.unit = unit;
    one.inputs = [middle, field];
    one.row = el("div", { class: "knob" }, label, middle, field, one.text, el("span", { class: "about soft" }, schema.description.replace(" x ", " × ") + range, since));
    return one;
  });
  const more = rows.filter(({ name }) => !FIRST.includes(name)).map(({ row }) => row);
  const set = el("div", { class: "knobs", role: "group", "aria-label": "Settings" },
    el("div", { class: "head" }, el("b", {}, "Settings"), copyButton("Copy as code", code)),
    ...FIRST.map((name) => rows.find((one) => one.name === name)?.row ?? ""), el("details", {}, el("summary", {}, `${more.length} more`), ...more));
  if (unlock) {
    const token = el("input", { type: "password", class: "field", placeholder: "token", "aria-label": "token", autocomplete: "off" });
    token.onchange = () => { tune = token.value.trim() && unlock(token.value.trim()); refresh(); };
    set.append(el("label", { class: "soft" }, "Read-only without the token from the panel in the notebook: ", token));
  }
  set.append(note, refusal);

  function code() {
    const python = (value) => ({ true: "True", false: "False" })[value] ?? JSON.stringify(value);
    const moved = Object.entries(snapshot.settings).filter(([name, value]) => value !== knobs[name]?.default);
    return snapshot.code || `server.tune(${moved.map(([name, value]) => `${name}=${python(value)}`).join(", ")})`;
  }

  function change(one, value, pause) {
    one.value = value;
    one.waiting = ++asked;
    one.timer ||= setTimeout(ask, pause, one); // at most one message in each pause, with the newest value
    refresh();
  }

  async function ask(one) {
    const { name, value, waiting } = one;
    one.timer = 0;
    const late = setTimeout(put, 2000, note, `${name}: no answer yet; a running cell may keep the kernel busy. It will count when the cell has ended.`);
    let settings = null, error = "";
    try { settings = await tune({ [name]: value }); } catch (reason) { error = reason.message; }
    clearTimeout(late);
    if (settings) snapshot.settings = settings;
    if (one.waiting !== waiting) return; // it has moved on; the newer answer counts
    one.waiting = 0;
    one.settled = performance.now() + 600; // a frame from before may still arrive
    put(refusal, error);
    put(note, error ? "" : `${name} ${{ true: "on", false: "off" }[settings[name]] ?? settings[name]}: in force since ${clock(0)}`);
    one.show(snapshot.settings[name]);
    refresh();
  }

  // -- errors --
  const troubles = el("div"), latest = el("summary"), failures = el("details", { class: "errors" }, latest, troubles);
  async function list() {
    if (!failures.open || !errors || told === snapshot?.errors) return;
    told = snapshot.errors;
    troubles.replaceChildren(...(await errors()).map(({ id, wall, outcome, error, traceback }) => {
      const known = [...troubles.children].find((node) => node.dataset.id === id);
      if (known) return known; // maybe unfolded
      const lines = traceback.trimEnd().split("\n").map((text) => el("span", { class: /^  File /.test(text) ? "file" : /^\S/.test(text) ? "last" : "" }, `${text}\n`));
      return el("details", { "data-id": id }, el("summary", {}, el("code", {}, id), ` ${new Date(wall * 1000).toLocaleTimeString("en-GB")} ${outcome}: ${error}`), el("pre", {}, ...lines));
    }));
  }
  failures.ontoggle = list;
  const cost = el("div", { class: "cost soft" });

  // -- drawing --
  const busy = () => sum(snapshot.series.slice(-6).map((p) => p.shed + p.expired));
  function fill() {
    const { window: recent, requests, settings, task, browser } = snapshot, { p50, p95, p99 } = recent.latency_ms, over = snapshot.state === "ready" && busy();
    const mood = { ready: "good", failed: "bad", stuck: "bad", stopped: "soft", replaced: "soft" }, hue = !alive ? "soft" : over ? "warn" : mood[snapshot.state] || "warn";
    const words = { starting: "loading", replaced: "replaced by a newer run" }[snapshot.state] || snapshot.reason || (over ? "overloaded" : snapshot.state);
    put(title, snapshot.model);
    put(meta, [snapshot.name, task, snapshot.device, `up ${span(snapshot.uptime_s)}`].join(" · "));
    put(state, `● ${alive ? words : "not connected: the last picture"}`);
    state.style.color = `var(--${hue})`;
    const body = /image|audio|speech|video|object/.test(task) ? "--data-binary @file" : `-d '${task === "fill-mask" ? "test [MASK]." : "hello"}'`;
    put(curl, `curl ${body} ${(url || snapshot.url).replace(/\/?$/, "/")}`);
    if (browser) {
      // On a machine of its own, the kernel is behind the notebook server that this page came from.
      const lab = document.getElementById("jupyter-config-data"), far = browser.local && lab && !/^(localhost|127\.|\[::1)/.test(location.hostname);
      const path = far ? `${JSON.parse(lab.textContent).baseUrl}proxy/${browser.url.match(/:(\d+)/)[1]}/` : browser.url;
      link.hidden = !path;
      if (path && link.getAttribute("href") !== path) link.href = path;
      put(hint, far ? "needs jupyter-server-proxy" : browser.note);
    }
    const rates = [recent.arrivals_per_s, recent.answers_per_s, p50, p95, p99, recent.batch_size_mean].map(number);
    const texts = [count(snapshot.queue_depth), count(snapshot.in_flight), ...rates, ...["ok", ...BAD].map((outcome) => count(requests[outcome]))];
    Object.values(tiles).forEach((tile, i) => put(tile, texts[i]));
    for (const [name, least] of Object.entries(LEAST)) {
      const few = recent.samples < least;
      tiles[`${name} ms`].className = few ? "few" : "";
      tiles[`${name} ms`].title = few ? `only ${recent.samples} answers in these 30 seconds: fewer than ${least} say little` : "";
    }
    for (const name of BAD) tiles[name].style.color = requests[name] ? `var(--${name === "failed" ? "bad" : "warn"})` : "";
    const ago = {};
    for (const { ago_s, knobs: moved } of snapshot.changes || []) for (const name in moved) ago[name] = ago_s;
    for (const one of rows) {
      if (!one.waiting && performance.now() > one.settled) one.show(settings[one.name]);
      put(one.text, one.waiting && one.value !== settings[one.name] ? `now ${settings[one.name]}` : one.unit);
      if (one.name in ago) put(one.since, ` · since ${clock(ago[one.name] + (performance.now() - received) / 1000)}`);
      for (const input of one.inputs) input.disabled = !tune || hue === "soft";
    }
    const { panel, errors: newest } = snapshot;
    put(latest, newest ? `Errors: ${count(requests.failed)} failed, last incident ${newest}` : `Errors: ${requests.failed ? `${count(requests.failed)} failed; server.errors() has their tracebacks` : "none"}`);
    put(cost, panel ? `This panel costs ${panel.ms == null ? "" : `${panel.ms.toFixed(1)} ms and `}${panel.kb.toFixed(1)} kB per second` : "");
    list();
  }

  const root = el("section", { class: "sk", "aria-label": "Live server panel" }, el("div", { class: "all" },
    el("header", {}, title, meta, state, line), el("div", { class: "tiles" }, ...strip), el("div", { class: "body" }, charts.node, set), failures, cost));
  // Else JupyterLab takes arrow keys for the notebook. It looks at what has the focus.
  for (const node of root.querySelectorAll("input, button, code, select, summary, a, [tabindex]")) node.setAttribute("data-lm-suppress-shortcuts", "");
  element.append(root);

  charts.onchange(draw);
  function refresh() { stale = true; draw(); } // the words as well; the picture alone moves on its own
  function draw() { if (visible) timer ||= requestAnimationFrame(paint); }
  function paint() {
    timer = 0;
    if (!snapshot) return;
    const fresh = stale;
    stale = false;
    if (fresh) root.style.colorScheme = isDark(root) ? "dark" : "light";
    if (fresh) fill();
    const since = (performance.now() - received) / 1000, live = alive && LIVE.includes(snapshot.state);
    const pixel = charts.draw(snapshot, { started, since, live, fresh });
    // As often as the picture moves by a pixel, while it moves at all.
    if (live && since < 3 && !matchMedia("(prefers-reduced-motion)").matches) setTimeout(draw, Math.max(40, 1000 * pixel));
  }

  const resized = new ResizeObserver(refresh), id = `${Math.random()}`;
  let quiet = 0;
  const judge = () => {
    draw();
    clearTimeout(quiet);
    quiet = setTimeout(look, visible ? 0 : 2000, id, visible); // not for a view that is only scrolled past
  };
  let shown = true;
  const hidden = () => { visible = shown && !document.hidden; judge(); };
  const seen = new IntersectionObserver((entries) => { shown = entries.at(-1).isIntersecting; hidden(); });
  resized.observe(root);
  seen.observe(root);
  document.addEventListener("visibilitychange", hidden);
  const beat = setInterval(refresh, 1000); // time and themes change without a frame

  return {
    update(next) {
      // `second` is the server's clock, rounded down: the most that we see of this is when it started.
      if (snapshot && next.uptime_s < snapshot.uptime_s) started = 0;
      const last = next.series.at(-1).second;
      started = Math.max(started, last - next.uptime_s);
      next.phase = Math.min(1, Math.max(0, started + next.uptime_s - last));
      snapshot = next;
      received = performance.now();
      refresh();
    },
    connected(yes) { alive = yes; refresh(); },
    token(text) { if (text && !line.querySelector(".token")) line.querySelector("button").after(Object.assign(copyButton("Copy token", () => text), { className: "token" })); },
    destroy() {
      resized.disconnect();
      seen.disconnect();
      document.removeEventListener("visibilitychange", hidden);
      clearInterval(beat);
      clearTimeout(quiet);
      visible = false;
      look(id, null); // it is removed
      root.remove();
    },
  };
}

// -- in a notebook --

async function render({ model, el: element }) {
  const name = model.get("controls").replace("IPY_MODEL_", ""), controls = await model.widget_manager.get_model(name);
  const waiting = new Map();
  const send = (message) => new Promise((resolve, reject) => {
    const id = `${Math.random()}`; // other views hear the answer too
    waiting.set(id, (answer) => { waiting.delete(id); if (answer.error) reject(new Error(answer.error)); else resolve(answer); });
    controls.send({ ...message, id });
  });
  const panel = mount(element, {
    knobs: model.get("knobs"),
    tune: async (knobs) => (await send({ kind: "tune", knobs })).settings,
    errors: async () => (await send({ kind: "errors" })).errors,
    look: (view, seen) => { if (controls.comm_live !== false) send({ kind: "seen", view, seen }).catch(() => {}); },
  });
  // The static card before it is for when nothing is live: see panel.py. So is the error in its place.
  const card = `[data-serving-kit="${name}"]`;
  const cover = el("style", {}, `${card}, .jp-OutputArea-child:has(${card}) { display: none; }`);
  element.append(cover);
  const heard = (answer) => waiting.get(answer.id)?.(answer);
  const linked = () => panel.connected(controls.comm_live !== false);
  const changed = () => panel.update(unpack(model.get("frame")));
  controls.on("msg:custom", heard);
  controls.on("comm_live_update", linked);
  model.on("change:frame", changed);
  linked();
  changed();
  // ipykernel 7.4 reads our messages in the shell that last published on their comm: maybe that of the
  // cell that made the panel, between cells only. An answered hello moves it to our own. Not at once, so
  // that the cell has ended, and a few times, for a cell that takes longer.
  const hellos = [400, 1500, 5000].map((ms) => setTimeout(async () => panel.token((await send({ kind: "hello" })).token), ms));
  return () => {
    controls.off("msg:custom", heard);
    controls.off("comm_live_update", linked);
    model.off("change:frame", changed);
    hellos.forEach(clearTimeout);
    panel.destroy();
    cover.remove();
  };
}

// -- as a page --

export async function poll(element, base) {
  let bytes = 0, kb = 0;
  const get = async (path) => {
    const text = await (await fetch(new URL(path, base), { signal: AbortSignal.timeout(5000) })).text();
    bytes = text.length;
    return JSON.parse(text);
  };
  const unlock = (token) => async (knobs) => {
    const headers = { authorization: `Bearer ${token}`, "content-type": "application/json" };
    const response = await fetch(new URL("settings", base), { method: "PATCH", headers, body: JSON.stringify(knobs) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  };
  const knobs = (await get("openapi.json")).components.schemas.Settings.properties;
  const panel = mount(element, { knobs, unlock, url: base.href });
  let last = null, timer = 0, series = [];
  async function tick() {
    if (document.hidden) return;
    try {
      const next = await get(`stats?series=${series.length ? Math.min(120, Math.ceil((performance.now() - last.at) / 1000) + 3) : 120}`);
      const fresh = next.series.map((p) => ({ ...p, mean: mean(p.sizes) }));
      series = [...series.filter((p) => p.second < fresh[0].second), ...fresh].slice(-120);
      const at = performance.now();
      if (last) kb += 0.1 * (bytes / (at - last.at) - kb);
      last = { ...next, series, at, panel: { kb } };
      panel.update(last);
    } catch {
      if (last) panel.update({ ...last, state: "failed", reason: "no answer from the server" });
    }
    clearTimeout(timer); // of a tick that was under way
    timer = setTimeout(tick, 250);
  }
  document.addEventListener("visibilitychange", tick);
  tick();
}

export default { render };

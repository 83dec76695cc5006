// The state of the service, asked for every two seconds while somebody looks.

import { clock, histogram, html, lineChart, short, table } from "/page/charts.js";

const EVERY_MS = 2000;
const $ = (id) => document.getElementById(id);

const CHARTS = [
  ["Requests", "per second", [
    { name: "answered", tone: "blue", column: "requests_per_s" },
    { name: "refused", tone: "orange", dashed: true, column: "refused_per_s" },
    { name: "failed", tone: "bad", column: "failed_per_s" },
  ]],
  ["Latency", "ms", [
    { name: "median", tone: "blue", column: "latency_p50_ms" },
    { name: "99th percentile", tone: "orange", dashed: true, column: "latency_p99_ms" },
  ]],
  ["Texts", "per second", [{ name: "scored", tone: "blue", column: "texts_per_s" }]],
  ["Queue", "requests", [{ name: "under way", tone: "blue", column: "queued" }]],
];
const ROLES = {
  live: ["live", "good"], shadow: ["shadow", "info"], loading: ["loading", "warn"],
  rolled_back: ["rolled back", "bad"], failed: ["failed", "bad"],
};

const percent = (share, digits = 1) => (share === null ? "–" : `${Number((100 * share).toFixed(digits))} %`);
const count = (number) => number.toLocaleString("en");
const badge = (text, tone) => html("span", { class: `badge ${tone}`, text });
const version = (text) => html("span", { class: "version", text: text ?? "–" });

/** Show the service's state until the page goes; rests while the tab is hidden. */
export function watchService(call) {
  const charts = CHARTS.map(([title, unit, lines]) => ({ ...lineChart(title, unit, lines), columns: lines.map((line) => line.column) }));
  $("charts").append(...charts.map((chart) => chart.figure));
  let answered = null, timer = 0, asking = false;

  async function ask() {
    if (asking) return;
    asking = true;
    try {
      const state = await call("/v1/service");
      answered = Date.now() / 1000;
      show(state, charts);
      $("service-error").hidden = true;
    } catch (error) {
      $("service-error").textContent = answered
        ? `No answer since ${clock(answered)}; the figures are of then. ${error.message}`
        : `No answer yet. ${error.message}`;
      $("service-error").hidden = false;
    }
    asking = false;
    $("service-loading").hidden = true;
    $("service-body").hidden = answered === null;
    $("service-body").classList.toggle("offline", !$("service-error").hidden);
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(ask, EVERY_MS);
  }
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) ask();
  });
  ask();
}

function show(state, charts) {
  const { series } = state;
  for (const { draw, columns } of charts) draw(series.time, columns.map((column) => series[column]));
  showHeadline(state);
  showModels(state.models);
  showCandidates(state.candidates);
  showDrift(state.drift);
  showErrors(state.errors);
  showEvents(state.events);
}

function figure(name, value, note, bad = false) {
  const part = (kind, text) => html("div", { class: kind, text });
  return html("div", { class: bad ? "figure bad" : "figure", children: [part("name", name), part("value", value), part("note", note)] });
}

function showHeadline({ replicas, series, drift }) {
  const last = (column) => series[column].at(-1) ?? null;
  const alarms = drift.filter((row) => row.alarm);
  const failed = last("failed_per_s") ?? 0, refused = last("refused_per_s") ?? 0;
  $("headline").replaceChildren(
    figure("Requests", `${short(last("requests_per_s"))} /s`, refused || failed ? `${short(refused)} refused, ${short(failed)} failed /s` : "none refused, none failed", failed > 0),
    figure("Texts", `${short(last("texts_per_s"))} /s`, `${short(last("tokens_per_s"))} tokens/s`),
    figure("Latency, 99th percentile", `${short(last("latency_p99_ms"))} ms`, `median ${short(last("latency_p50_ms"))} ms`),
    figure("Replicas", String(replicas.length), `${count(replicas.reduce((sum, replica) => sum + replica.queued, 0))} requests under way`, !replicas.length),
    figure("Drift", ...driftInWords(drift, alarms), alarms.length > 0),
  );
}

function driftInWords(drift, alarms) {
  if (alarms.length) return [`${alarms.length} alarm${alarms.length > 1 ? "s" : ""}`, alarms.map((row) => `${row.quantity} of ${row.model}`).join(", ")];
  if (!drift.length) return ["–", "no reference to compare with"];
  if (drift.some((row) => row.ks === null)) return ["–", "too few texts yet"];
  return ["none", "like the training data"];
}

function showModels(models) {
  const columns = [
    { name: "Model" }, { name: "Version" }, { name: "State" }, { name: "Share", kind: "number" },
    { name: "Texts", kind: "number" }, { name: "Compute, ms/text", kind: "number" }, { name: "Why", kind: "reason" },
  ];
  const rows = models.map((model) => [
    model.name, version(model.version), badge(...(ROLES[model.role] ?? [model.role, ""])), percent(model.share),
    count(model.texts), short(model.compute_ms_per_text), model.reason ?? "",
  ]);
  $("models-table").replaceChildren(table(columns, rows));
}

function showCandidates(candidates) {
  $("candidates-part").hidden = !candidates.length;
  const columns = [
    { name: "Candidate" }, { name: "Version" }, { name: "State" }, { name: "Texts", kind: "number" },
    { name: "Sign flips", kind: "number" }, { name: "Kendall τ", kind: "number" }, { name: "Score shift, std", kind: "number" },
    { name: "Time × live", kind: "number" }, { name: "Failures", kind: "number" }, { name: "Why", kind: "reason" },
  ];
  const rows = candidates.map((row) => [
    row.name, version(row.version), badge(row.rolled_back ? "rolled back" : row.role, row.rolled_back ? "bad" : "info"), count(row.texts),
    percent(row.sign_flip_rate), short(row.kendall_tau), short(row.score_shift), short(row.latency_ratio), percent(row.failure_rate, 2),
    row.reasons.join("; "),
  ]);
  $("candidates-table").replaceChildren(table(columns, rows));
}

function showDrift(drift) {
  $("drift-part").hidden = !drift.length;
  $("drift").replaceChildren(...drift.map((row) => {
    const facts = [
      ["KS", short(row.ks)], ["p-value", short(row.p_value, 2)], ["Texts compared", count(row.texts)],
      ["Windows so far", count(row.windows)], ["Alarms so far", count(row.alarms)],
    ];
    const entries = facts.map(([name, value]) => html("div", { children: [html("dt", { text: name }), html("dd", { text: value })] }));
    const verdict = row.alarm ? badge("alarm", "bad") : row.ks === null ? badge("too few texts yet", "warn") : badge("as in training", "good");
    const title = html("h4", { children: [`${row.quantity === "score" ? "Score" : "Length"} of ${row.model}`, version(row.version), verdict] });
    const words = html("div", { children: [title, html("dl", { children: entries })] });
    const bars = row.histogram ? [histogram(row.histogram, row.quantity)] : [];
    return html("div", { class: `card drift-row${row.alarm ? " alarm" : ""}${bars.length ? "" : " alone"}`, children: [words, ...bars] });
  }));
}

function showErrors(errors) {
  const rows = Object.entries(errors).sort((first, second) => second[1] - first[1]);
  const columns = [{ name: "Type" }, { name: "Count", kind: "number" }];
  $("errors-table").replaceChildren(rows.length
    ? table(columns, rows.map(([type, number]) => [type.replaceAll("_", " "), count(number)]))
    : html("p", { text: "None." }));
}

function showEvents(events) {
  const lines = events.toReversed().map(({ time, what }) => html("li", {
    children: [html("time", { datetime: new Date(time * 1000).toISOString(), text: clock(time) }), html("span", { text: what })],
  }));
  $("events").replaceChildren(lines.length ? html("ol", { children: lines }) : html("p", { text: "None yet." }));
}

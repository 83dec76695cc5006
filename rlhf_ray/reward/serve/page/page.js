// The page: compare two responses, and watch the service.

import { html, short, table } from "/page/charts.js";
import { watchService } from "/page/service.js";

const $ = (id) => document.getElementById(id);

class CallFailed extends Error {}

/** Call the service; what it refuses is raised as a sentence for people. */
async function call(path, body) {
  // The page's own address may hold the token as user info, which fetch refuses in relative addresses.
  const address = new URL(path, window.location.origin);
  const request = body === undefined
    ? {}
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(address, { ...request, cache: "no-store" });
  } catch (error) {
    throw new CallFailed(`The service cannot be reached (${error.message}).`);
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch (error) {
    if (response.ok) throw new CallFailed(`The answer is not JSON (${error.message}).`);
  }
  if (response.ok) return answer;
  const { type = `status ${response.status}`, message = response.statusText } = answer?.error ?? {};
  const wait = response.headers.get("Retry-After");
  const id = response.headers.get("X-Request-Id");
  const parts = [`${type.replaceAll("_", " ")}: ${message}.`.replace("..", ".")];
  if (response.status === 503) parts.push(wait ? `Please wait ${wait} s and try again.` : "Please wait and try again.");
  if (id) parts.push(`(request ${id})`);
  throw new CallFailed(parts.join(" "));
}

function show(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

function joined(prompt, response) {
  return !prompt || !response || /\s$/.test(prompt) || /^\s/.test(response) ? response : ` ${response}`;
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
const score = (value) => (value < 0 ? `−${Math.abs(value).toFixed(3)}` : value.toFixed(3));

async function compare() {
  const button = $("compare-button");
  const prompt = $("prompt").value;
  const responses = [$("response-a").value, $("response-b").value].map((response) => joined(prompt, response));
  const chosen = $("model").value;
  button.setAttribute("aria-disabled", "true");
  $("result").classList.add("stale");
  show($("compare-error"));
  show($("words-error"));
  try {
    const began = performance.now();
    const [first, second] = responses;
    const preference = await call("/v1/preference", {
      ...(chosen && { model: chosen }),
      items: [{ prompt, response_a: first, response_b: second }],
    });
    const took = performance.now() - began;
    // What follows asks for the version that has just answered, so that nothing on the page is mixed.
    const model = preference.model.version;
    const details = await call("/v1/reward", { model, items: responses.map((response) => ({ prompt, response })) });
    showResult(preference, details.items, prompt, responses, took);
    $("result").classList.remove("stale");
    const reading = responses.map((response) => call("/v1/explain", { model, prompt, response }));
    const explained = await Promise.all(reading);
    showWords(explained.map((each) => each.words));
  } catch (error) {
    if (!(error instanceof CallFailed)) throw error;
    const scored = !$("result").classList.contains("stale");
    if (scored) {
      show($("words-error"), `The words could not be weighed. ${error.message}`);
      $("word-note").textContent = "";
    } else {
      show($("compare-error"), error.message);
      $("result").hidden = true;
    }
  } finally {
    button.setAttribute("aria-disabled", "false");
  }
}

function showResult(preference, items, prompt, responses, took) {
  const { probability } = preference.items[0];
  // No model is certain, whatever rounding says.
  const percent = (share) => (share > 0.995 ? "more than 99 %" : `${Math.round(100 * share)} %`);
  const rounded = Math.round(100 * probability);
  const winner = probability >= 0.5 ? "A" : "B";
  $("verdict").textContent = rounded === 50
    ? "People would be about evenly split."
    : `People would prefer ${winner} with ${percent(Math.max(probability, 1 - probability))}.`;
  const [barA, barB] = $("balance").children;
  barA.style.width = `${100 * probability}%`;
  for (const [bar, name, share] of [[barA, "A", probability], [barB, "B", 1 - probability]]) {
    bar.textContent = share < 0.12 ? "" : `${name}  ${percent(share)}`;
    bar.classList.toggle("narrow", share < 0.12);
  }
  const cut = items.map((item, index) => (item.truncated ? "AB"[index] : "")).filter(Boolean);
  show($("cut-note"), cut.length
    ? `${cut.length === 2 ? "Both texts were" : `The text with response ${cut[0]} was`} longer than the model takes and cut at the front: the score is of the last tokens only.`
    : "");

  const uncertain = items.some((item) => item.disagreement > 0);
  $("sides").replaceChildren(...items.map((item, index) => {
    const name = "AB"[index];
    const tag = html("span", { class: `tag ${name.toLowerCase()}`, text: name, "aria-hidden": "true" });
    const spread = uncertain ? `± ${item.disagreement.toFixed(3)} between the members` : "";
    return html("section", {
      class: "side",
      "aria-label": `Response ${name}`,
      children: [
        html("h3", { children: [tag, `Response ${name}`] }),
        html("div", { class: "score", id: `score-${name.toLowerCase()}`, children: [
          score(item.score),
          html("small", { text: ` ${spread}${spread ? " · " : ""}${item.num_tokens} tokens${item.truncated ? ", cut" : ""}` }),
        ] }),
        html("div", { class: "words", id: `words-${name.toLowerCase()}`, children: [
          html("span", { class: "unscored", text: prompt }), responses[index],
        ] }),
      ],
    });
  }));
  $("scale").hidden = true;
  $("word-note").textContent = "Weighing the words …";
  showAttributes(items);
  const { name, version, temperature } = preference.model;
  const calibrated = temperature === 1 ? "" : ` · temperature ${short(temperature)}`;
  $("facts").textContent = `${name} · version ${version}${calibrated} · ${Math.round(took)} ms`;
  $("result").hidden = false;
}

function showAttributes(items) {
  const names = Object.keys(items[0].attributes);
  $("attributes").replaceChildren();
  if (names.length < 2) return;
  const columns = [{ name: "Attribute" }, { name: "A", kind: "number" }, { name: "B", kind: "number" }, { name: "A − B", kind: "number" }];
  const rows = names.map((name) => {
    const [first, second] = items.map((item) => item.attributes[name]);
    return [name, score(first), score(second), signed(first - second)];
  });
  $("attributes").append(html("h3", { text: "Attributes" }), table(columns, rows));
}

/** Tint the words of both sides on one scale, so that they can be compared. */
function showWords(sides) {
  const strongest = Math.max(...sides.flat().map((word) => Math.abs(word.contribution)), 1e-9);
  sides.forEach((words, index) => {
    const box = $(index ? "words-b" : "words-a");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Words of response ${"AB"[index]}; arrow keys go from word to word`);
    box.replaceChildren(...words.flatMap((word) => (word.scored ? tinted(word, strongest) : [html("span", { class: "unscored", text: word.text })])));
    const marks = [...box.querySelectorAll(".word")];
    if (marks.length) marks[0].tabIndex = 0;
    box.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = marks[marks.indexOf(document.activeElement) + (move ?? NaN)];
      if (!next) return;
      event.preventDefault();
      document.activeElement.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
  $("scale").hidden = false;
  $("scale-end").textContent = `full colour at ±${strongest.toFixed(2)}`;
  $("word-note").textContent = "Point at a word, or go to it with the arrow keys, to see its number.";
}

function tinted(word, strongest) {
  const space = word.text.slice(0, word.text.length - word.text.trimStart().length);
  const text = word.text.trimStart();
  const does = `${word.contribution < 0 ? "lowers" : "raises"} the score by ${Math.abs(word.contribution).toFixed(2)}`;
  const mark = html("span", {
    class: `word ${word.contribution < 0 ? "down" : "up"}`, text, title: signed(word.contribution),
    tabindex: "-1", role: "note", "aria-label": `${text}: ${does}`,
  });
  mark.style.setProperty("--strength", (Math.abs(word.contribution) / strongest).toFixed(3));
  const tell = () => ($("word-note").textContent = `“${text}” ${does}.`);
  mark.addEventListener("pointerenter", tell);
  mark.addEventListener("focus", tell);
  return [space, mark];
}

async function offerModels() {
  try {
    const { data } = await call("/v1/models");
    if (data.length < 2) return;
    const choice = (value, text) => html("option", { value, text });
    const described = ({ id, role, share }) => `${id} (${role === "shadow" ? "shadow" : `${Math.round(100 * share)} % of the traffic`})`;
    $("model").replaceChildren(choice("", "as the traffic is shared out"), ...data.map((model) => choice(model.id, described(model))));
    $("model-field").hidden = false;
  } catch (error) {
    if (!(error instanceof CallFailed)) throw error;
    show($("compare-error"), error.message);
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("compare-button").getAttribute("aria-disabled") !== "true") compare();
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
offerModels();
watchService(call);

// Small charts as SVG, and the elements they and the page are made of. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 460, LEFT = 44, RIGHT = 8, TOP = 8;

/** An HTML element with a class, children or text, and attributes. */
export function html(name, { text, children = [], ...attributes } = {}) {
  return fill(document.createElement(name), text, children, attributes);
}

function svg(name, { text, children = [], ...attributes } = {}) {
  return fill(document.createElementNS(SVG, name), text, children, attributes);
}

function fill(element, text, children, attributes) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

/** A number in at most four digits; a dash for null. */
export function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value < 0) return `−${short(-value, digits)}`;
  if (value >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (value >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  if (value !== 0 && value < 10 ** -digits) return value.toExponential(1);
  return String(Number(value.toPrecision(value >= 1000 ? 4 : digits)));
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

/** The least of 1, 2, 5 × 10ⁿ steps that reaches `top` in four of them or fewer. */
function step(top) {
  const unit = 10 ** Math.floor(Math.log10(top / 4));
  return [1, 2, 5, 10].map((factor) => factor * unit).find((each) => each * 4 >= top);
}

/**
 * Lines over time. One figure is made, and drawn again with every `draw(time, columns)`.
 * @param lines of {name, tone, dashed}; columns come in the same order.
 */
export function lineChart(title, unit, lines) {
  const height = 150, bottom = height - 20;
  const picture = svg("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
  const legend = html("div", { class: "legend" });
  const readings = lines.map((line) => html("b"));
  const when = html("span", { text: "now" });
  lines.forEach((line, index) => {
    const key = html("span", { class: `key tone-${line.tone}${line.dashed ? " dashed" : ""}` });
    legend.append(html("span", { children: [key, `${line.name} `, readings[index]] }));
  });
  legend.append(when);
  const figure = html("figure", {
    class: "card chart",
    children: [html("figcaption", { text: unit ? `${title}, ${unit}` : title }), legend, picture],
  });
  let seen = { time: [], columns: [] }, pointed = null;

  const x = (time) => LEFT + ((time - seen.from) / (seen.to - seen.from)) * (WIDTH - LEFT - RIGHT);

  function read() {
    const at = pointed === null ? seen.time.length - 1 : pointed;
    seen.columns.forEach((column, index) => (readings[index].textContent = short(column[at])));
    when.textContent = pointed === null || at < 0 ? "now" : `at ${clock(seen.time[at])}`;
    picture.querySelector(".cursor")?.remove();
    if (pointed !== null && at >= 0) {
      const place = x(seen.time[at]);
      picture.append(svg("line", { class: "cursor", x1: place, x2: place, y1: TOP, y2: bottom }));
    }
  }

  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * WIDTH;
    const nearest = seen.time.reduce(
      (best, time, index) => (Math.abs(x(time) - place) < Math.abs(x(seen.time[best]) - place) ? index : best), 0);
    pointed = seen.time.length ? nearest : null;
    read();
  });
  picture.addEventListener("pointerleave", () => { pointed = null; read(); });

  function draw(time, columns) {
    const to = time.length ? time[time.length - 1] : Date.now() / 1000;
    seen = { time, columns, from: to - 600, to };
    if (pointed !== null && pointed >= time.length) pointed = null;
    const highest = Math.max(...columns.flat().filter((value) => value !== null), 1e-9);
    const tick = step(Math.max(highest, 1)), top = Math.max(tick, Math.ceil(highest / tick) * tick);
    const y = (value) => bottom - (value / top) * (bottom - TOP);
    const parts = [];
    for (let value = 0; value <= top * 1.001; value += tick) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end", text: short(value) }));
    }
    for (const minutes of [10, 5, 0]) {
      const anchor = minutes === 0 ? "end" : minutes === 10 ? "start" : "middle";
      const text = minutes ? `−${minutes} min` : "now";
      parts.push(svg("text", { x: x(to - minutes * 60), y: height - 5, "text-anchor": anchor, text }));
    }
    columns.forEach((column, index) => {
      const { tone, dashed } = lines[index];
      let path = "", pen = false;
      column.forEach((value, at) => {
        if (value !== null) path += `${pen ? "L" : "M"}${x(time[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = value !== null;
      });
      if (index === 0 && path && !column.includes(null)) {
        const area = `${path}L${x(to)} ${bottom}L${x(time[0])} ${bottom}Z`;
        parts.push(svg("path", { class: `area tone-${tone}`, d: area }));
      }
      parts.push(svg("path", { class: `line tone-${tone}${dashed ? " dashed" : ""}`, d: path }));
    });
    picture.replaceChildren(...parts);
    const last = lines.map((line, index) => `${line.name} ${short(columns[index].at(-1) ?? null)}`).join(", ");
    picture.setAttribute("aria-label", `${title}, last ten minutes; now ${last}${unit ? ` ${unit}` : ""}`);
    read();
  }
  return { figure, draw };
}

/** Bars of the live shares, and the reference as a line around where they should be. */
export function histogram({ edges, live, reference }, quantity) {
  const height = 150, bottom = height - 20;
  const from = edges[0], to = edges[edges.length - 1];
  const top = Math.max(...live, ...reference, 1e-9);
  const x = (value) => LEFT + ((value - from) / (to - from || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => bottom - (value / top) * (bottom - TOP);
  const parts = [svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: bottom, y2: bottom })];
  live.forEach((share, bin) => {
    const width = Math.max(0.5, x(edges[bin + 1]) - x(edges[bin]) - 1);
    parts.push(svg("rect", { class: "bar tone-blue", x: x(edges[bin]), y: y(share), width, height: bottom - y(share) }));
  });
  let path = `M${x(from)} ${bottom}`;
  reference.forEach((share, bin) => (path += `L${x(edges[bin])} ${y(share)}L${x(edges[bin + 1])} ${y(share)}`));
  parts.push(svg("path", { class: "line tone-orange", d: `${path}L${x(to)} ${bottom}` }));
  for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    const value = from + share * (to - from);
    parts.push(svg("text", { x: x(value), y: height - 5, "text-anchor": anchor, text: short(value, 2) }));
  }
  const label = `Distribution of the ${quantity}: live against training`;
  const key = (tone, kind, name) => html("span", { children: [html("span", { class: `key tone-${tone} ${kind}` }), name] });
  return html("div", {
    children: [
      html("div", { class: "legend", children: [key("blue", "block", "live"), key("orange", "", "training")] }),
      svg("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label, children: parts }),
    ],
  });
}

/**
 * A table. Cells are strings or elements; columns are {name, kind}, kind a class such as `number`.
 * The first cell of a row is its header.
 */
export function table(columns, rows) {
  const head = columns.map(({ name, kind = "" }) => html("th", { scope: "col", class: kind, text: name }));
  const body = rows.map((cells) => html("tr", {
    children: cells.map((cell, index) => {
      const kind = columns[index].kind ?? "";
      return index === 0
        ? html("th", { scope: "row", class: kind, children: [cell] })
        : html("td", { class: kind, children: [cell] });
    }),
  }));
  const thead = html("thead", { children: [html("tr", { children: head })] });
  return html("table", { children: [thead, html("tbody", { children: body })] });
}

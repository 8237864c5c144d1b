// Small helpers. Text of a model or a user goes into the page through text nodes alone; nothing here parses markup.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const PAGE = JSON.parse($("#data").textContent);
const html = document.documentElement;
html.classList.add("on");

// Control, zero-width and direction characters are written out: they would change what is around them.
const CONTROL =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const code = character => `‹U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
const visible = text => String(text).replace(CONTROL, code);
const marked = text => visible(text).replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");

const SVG = "http://www.w3.org/2000/svg";
function make(tag, properties = {}, ...children) {
  const svg = tag.startsWith("svg:");
  const element = svg ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...shownOf(children));
  return element;
}
const shownOf = children => children.flat(2)
  .filter(child => child !== null && child !== undefined && child !== "")
  .map(child => (typeof child === "string" ? visible(child) : child));
const fill = (element, ...children) => element.replaceChildren(...shownOf(children));

const missing = value => value === null || value === undefined || Number.isNaN(value);
function number(value) {
  if (missing(value)) return "–";
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return Math.abs(value) >= 1e5 || small ? value.toExponential(2) : String(+value.toPrecision(4));
}
const say = text => { $("#live").textContent = text; };
const css = name => getComputedStyle(html).getPropertyValue(name).trim();

// The theme: the system's, or the reader's choice, which is kept where the browser allows it.
const kept = {
  get(name) { try { return localStorage.getItem(name); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(name, value); } catch { /* this page has no storage */ } },
};
const onTheme = [];
function setTheme(name) {
  html.dataset.theme = name;
  $("#theme").textContent = name === "dark" ? "Light" : "Dark";
  for (const redraw of onTheme) redraw();
}
function flipTheme() {
  setTheme(html.dataset.theme === "dark" ? "light" : "dark");
  kept.set("opd-theme", html.dataset.theme);
}
const asked = new URLSearchParams(location.hash.slice(1));
const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
setTheme(asked.get("theme") || kept.get("opd-theme") || system);
$("#theme").addEventListener("click", flipTheme);
$("#help").addEventListener("click", () => $("#keys").showModal());

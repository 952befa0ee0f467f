// Dark or light, code folded or not, and the search. Without scripts the book is complete but for these.
"use strict";
const root = document.documentElement;
const kept = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
const keep = (name, value) => { try { localStorage.setItem(name, value); } catch { /* a private window */ } };
const dark = matchMedia("(prefers-color-scheme: dark)");
root.dataset.theme = kept("theme") || (dark.matches ? "dark" : "light");

document.addEventListener("DOMContentLoaded", () => {
  const get = (selector) => document.querySelector(selector);
  const theme = get("#theme");
  theme.hidden = false;
  theme.onclick = () => keep("theme", root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark");

  const codes = [...document.querySelectorAll(".cell > details.code")];
  const fold = get("#fold");
  fold.hidden = !codes.length;
  const show = (open) => {
    codes.forEach((code) => { code.open = open; });
    fold.textContent = open ? "Fold code" : "Show code";
  };
  if (kept("code")) show(kept("code") === "open");
  fold.onclick = () => {
    const open = fold.textContent === "Show code";
    keep("code", open ? "open" : "folded");
    show(open);
  };

  const input = get(".search input");
  const found = get("#found");
  get(".search").hidden = false;
  input.onfocus = () => {
    if (window.BOOK || get("script[src='search.js']")) return;
    const script = document.createElement("script"); // a script, since pages opened as files may not fetch
    script.src = "search.js";
    script.onload = () => search();
    document.head.append(script);
  };
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    found.hidden = !words.length || !window.BOOK;
    if (found.hidden) return;
    const hits = window.BOOK.map(([address, page, heading, text]) => {
      const title = `${page} ${heading}`.toLowerCase();
      const body = text.toLowerCase();
      if (!words.every((word) => title.includes(word) || body.includes(word))) return null;
      const score = words.reduce((sum, word) => sum + 10 * title.includes(word) + Math.min(body.split(word).length - 1, 5), 0);
      return { address, page, heading, text, at: Math.max(0, body.indexOf(words[0]) - 50), score };
    }).filter(Boolean).sort((one, other) => other.score - one.score).slice(0, 20);
    found.replaceChildren(...hits.map((hit) => {
      const [item, link, title, text] = ["li", "a", "b", "span"].map((name) => document.createElement(name));
      link.href = hit.address;
      title.textContent = hit.heading ? `${hit.page}: ${hit.heading}` : hit.page;
      const shown = (hit.at ? "…" : "") + hit.text.slice(hit.at, hit.at + 160);
      const split = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&")).join("|")})`, "giu");
      shown.split(split).forEach((part, place) => {
        const piece = place % 2 ? document.createElement("mark") : document.createTextNode("");
        piece.textContent = part;
        text.append(piece);
      });
      link.append(title, text);
      item.append(link);
      return item;
    }));
    if (!hits.length) {
      const none = document.createElement("li");
      none.className = "none";
      none.textContent = "Nothing found";
      found.append(none);
    }
  };
  input.oninput = search;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") found.hidden = true;
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(event.target.tagName)) { input.focus(); event.preventDefault(); }
    if (event.key === "Enter" && event.target === input) found.querySelector("a")?.click();
  });
  document.addEventListener("click", (event) => { if (!event.target.closest(".search")) found.hidden = true; });
});

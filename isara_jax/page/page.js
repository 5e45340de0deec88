"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;

// ------------------------------------------------------------------------------------------------------------------ text, inert
const JOINERS = "\u200c\u200d"; // part of ordinary spelling in Persian, Indic scripts and emoji
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;

function inert(text) {
  return text.replace(HIDDEN, c => {
    if (c === "\n" || JOINERS.includes(c)) return c;
    const code = c.codePointAt(0), hex = code.toString(16);
    return code < 0x100 ? "\\x" + hex.padStart(2, "0") : code < 0x10000 ? "\\u" + hex.padStart(4, "0") : "\\U" + hex.padStart(8, "0");
  });
}

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter(c => c !== null));
  return made;
}

// In a sensitive run a text is shown when all are, or when its group (a pair, a card) was asked for.
const shown = { all: !data.sensitive, groups: new Set() };
const visible = group => shown.all || shown.groups.has(group);
const characters = n => n === 1 ? "1 character" : `${n.toLocaleString("en")} characters`;

function said(text, group, tag = "div", name = "said") {
  if (text === null || text === undefined) return el(tag, { class: name + " hidden-text" }, "none");
  if (!visible(group)) return el(tag, { class: name + " hidden-text" }, `hidden: ${characters(text.length)}`);
  return el(tag, { class: name, dir: "auto" }, text === "" ? "(empty)" : inert(text));
}

function reveal(group, redraw) {
  if (visible(group)) return null;
  return el("button", { type: "button", class: "ask", onclick: () => { shown.groups.add(group); redraw(); } }, "Show this text");
}

const redraws = [];
const switchAll = document.getElementById("reveal");
if (switchAll) {
  switchAll.checked = false; // a browser may bring it back from an earlier visit
  switchAll.addEventListener("change", () => {
    shown.all = switchAll.checked;
    if (!shown.all) shown.groups.clear();
    redraws.forEach(redraw => redraw());
  });
}

// ------------------------------------------------------------------------------------------------------------------------ theme
const stored = (() => { try { return window.localStorage; } catch { return null; } })();
const remember = (key, value) => { try { stored?.setItem(key, value); } catch { /* full or forbidden: it lasts for this visit */ } };
const recall = key => { try { return stored && stored.getItem(key); } catch { return null; } };
const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const theme = document.getElementById("theme");
const named = () => { theme.textContent = dark() ? "Light" : "Dark"; };
if (["dark", "light"].includes(recall("isara-theme"))) root.dataset.theme = recall("isara-theme");
theme.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  remember("isara-theme", root.dataset.theme);
  named();
});
named();

function choice(label, name, options, change) {
  const select = el("select", { name, onchange: change }, ...options.map(([value, text]) => el("option", { value }, text)));
  return [el("label", {}, label, select), select];
}

// ------------------------------------------------------------------------------------------------------------ browser of pairs
const STEP = 20;

function browser(place) {
  const { columns: c, texts, sets, origins } = data.pairs, n = c.id.length;
  if (!n) {
    place.append(el("p", { class: "empty" },
      "There are no pairs yet: the seeds come first, new pairs when an iteration has filtered them."));
    return;
  }
  const verdict = i => c.verdicts[c.verdict[i]], reason = i => c.reasons[c.reason[i]];
  const question = i => texts[c.question[i]] ?? "", answer = i => c.answer[i] < 0 ? null : texts[c.answer[i]];
  const norm = text => text.normalize("NFKC").toLowerCase();
  const hay = new Map();
  const haystack = i => {
    if (!hay.has(i)) hay.set(i, norm(`${question(i)}\n${answer(i) ?? ""}\n${c.id[i]}`));
    return hay.get(i);
  };
  const tally = values => { const made = new Map(); for (const v of values) made.set(v, (made.get(v) ?? 0) + 1); return made; };
  const options = (all, found, text) => [["", all], ...[...found].map(([v, k]) => [String(v), `${text(v)} (${k})`])];
  const every = f => tally(Array.from({ length: n }, (_, i) => f(i)));
  const byKey = found => new Map([...found].sort((a, b) => a[0] - b[0]));

  let found = [], limit = STEP, timer = 0;
  const open = new Set();
  const search = el("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false", "aria-keyshortcuts": "/",
    placeholder: "words or an id", oninput: () => { clearTimeout(timer); timer = setTimeout(renew, 80); } });
  const picks = [];
  const pick = (label, name, list, test) => {
    const [made, select] = choice(label, name, list, renew);
    picks.push([select, test]);
    return list.length > 2 ? made : null;
  };
  const reasons = new Map([...every(reason)].filter(([r]) => r).sort((a, b) => b[1] - a[1]));
  const controls = el("form", { class: "filters", role: "search", onsubmit: e => e.preventDefault() },
    el("label", {}, "Search ( / )", search),
    pick("Fold", "fold", options("all", byKey(every(i => c.fold[i])), String), (i, v) => String(c.fold[i]) === v),
    pick("Iteration", "iteration", options("all", byKey(every(i => c.iteration[i])), t => t ? String(t) : "0, seeds"),
      (i, v) => String(c.iteration[i]) === v),
    pick("Origin", "origin", options("all", every(i => verdict(i) === "seed" ? "seed" : "generated"), String),
      (i, v) => (verdict(i) === "seed" ? "seed" : "generated") === v),
    pick("Verdict", "verdict", options("all", every(verdict), String), (i, v) => verdict(i) === v),
    pick("Reason", "reason", options("any", reasons, r => r.replace("/", ": ")), (i, v) => reason(i) === v));
  const clear = el("button", { type: "button", class: "quiet", onclick: () => { reset(); renew(); search.focus(); } }, "Clear");
  const count = el("span", { id: "count", role: "status" });
  const list = el("ul", { class: "list", id: "list" });
  const more = el("button", { type: "button", onclick: () => {
    const first = limit;
    limit += STEP;
    draw();
    list.children[first]?.firstChild.focus();
  } });
  place.append(controls, el("p", { class: "count" }, count, clear), list, el("div", { class: "more" }, more));

  function reset() { search.value = ""; picks.forEach(([select]) => { select.value = ""; }); }

  function renew() {
    const words = norm(search.value).split(/\s+/).filter(Boolean);
    const tests = picks.filter(([select]) => select.value);
    found = [];
    for (let i = 0; i < n; i++)
      if (tests.every(([select, test]) => test(i, select.value)) && words.every(w => haystack(i).includes(w))) found.push(i);
    limit = STEP;
    clear.hidden = !words.length && !tests.length;
    draw();
  }

  function draw() {
    const some = found.length === n ? "" : `${found.length.toLocaleString("en")} of `;
    count.textContent = `${some}${n.toLocaleString("en")} pairs`;
    list.replaceChildren(...found.slice(0, limit).map(row));
    list.hidden = !found.length;
    more.hidden = found.length <= limit;
    more.textContent = `Show ${Math.min(STEP, found.length - limit)} more`;
  }

  function row(i) {
    const group = `pair ${i}`, kind = verdict(i);
    const badge = el("span", { class: `badge ${kind}` }, kind === "rejected" ? reason(i).replace("/", ": ") : kind);
    const named = data.sensitive && c.id[i] ? `${c.id[i]} · ` : ""; // where texts are hidden, ids tell pairs apart
    const where = `${named}${c.fold[i] ? `fold ${c.fold[i]}, ` : ""}iteration ${c.iteration[i]}`;
    const head = el("button", { type: "button", "aria-expanded": String(open.has(i)), "data-pair": i, onclick: () => toggle(i) },
      said(question(i), group, "span", "line"), said(answer(i), group, "span", "line second"),
      el("span", { class: "marks" }, badge, where));
    const made = el("li", {}, head);
    if (open.has(i)) made.append(panel(i, group));
    return made;
  }

  function redraw(i, focus = true) {
    const head = list.querySelector(`button[data-pair="${i}"]`);
    if (!head) return;
    const made = row(i);
    head.parentNode.replaceWith(made);
    if (focus) made.firstChild.focus();
  }

  function toggle(i) { if (!open.delete(i)) open.add(i); redraw(i); }

  function goTo(i) {
    reset();
    renew();
    limit = Math.max(limit, found.indexOf(i) + 1);
    open.add(i);
    draw();
    const head = list.querySelector(`button[data-pair="${i}"]`);
    head.scrollIntoView({ block: "center" });
    head.focus();
  }

  const jump = i => el("button", { type: "button", class: "jump", onclick: () => goTo(i) }, "open this pair");

  function shots(title, indexes, group) {
    if (!indexes.length) return null;
    return el("div", {}, el("h4", {}, title), el("ul", { class: "shots" }, ...indexes.map(j =>
      el("li", {}, said(question(j), group), said(answer(j), group), jump(j)))));
  }

  // Filters with a score, a neighbour or a "no" have a row; the others passed and are named below.
  function checks(i, group) {
    const near = new Map(c.neighbours[i]), rest = [], rows = [];
    sets[c.checks[i]].forEach((named, k) => {
      const passed = !named.startsWith("!"), name = named.replace("!", ""), score = c.scores[i][k] ?? null, at = near.get(k);
      if (passed && score === null && at === undefined) { rest.push(name.replace("/", ": ")); return; }
      const what = el("span", { class: "sub" }, data.filters[name.split("/").pop()] ?? "");
      rows.push(el("tr", {}, el("th", { scope: "row" }, inert(name.replace("/", ": ")), what),
        el("td", {}, el("span", { class: `badge ${passed ? "kept" : "rejected"}` }, passed ? "passed" : "rejected")),
        el("td", { class: "num" }, score === null ? "" : String(score)),
        at === undefined ? el("td") : typeof at === "number" ? el("td", {}, said(question(at), group), jump(at))
          : el("td", {}, said(at, group))));
    });
    const title = (t, name = "") => el("th", { scope: "col", class: name }, t);
    const head = el("thead", {}, el("tr", {}, title("filter"), title("verdict"), title("score", "num"), title("nearest")));
    const table = el("div", { class: "scroll" }, el("table", { class: "checks" }, head, el("tbody", {}, ...rows)));
    if (!rows.length && !rest.length) return null;
    return el("div", {}, el("h4", {}, "Filters"), rows.length ? table : null,
      rest.length ? el("p", { class: "sub" }, `Passed as well: ${inert(rest.join(", "))}`) : null);
  }

  function review(i, group) {
    if (!c.review[i]) return null;
    const [decision, comment, q, a] = c.review[i];
    return el("div", {}, el("h4", {}, `Review by a person: ${inert(decision)}`),
      comment >= 0 && texts[comment] ? said(texts[comment], group) : null,
      q >= 0 ? el("div", {}, el("h4", {}, "Before the edit"), said(texts[q], group), said(texts[a], group)) : null);
  }

  function panel(i, group) {
    const [author, source, licence, sampling] = origins[c.made[i]].map(inert);
    const facts = [c.id[i] ? `id ${c.id[i]}` : "", c.request[i] >= 0 ? `request ${c.request[i]}` : "", author ? `author ${author}` : "",
      source ? `source ${source}` : "", licence ? `licence ${licence}` : "", sampling].filter(Boolean);
    return el("div", { class: "open" }, el("p", { class: "meta" }, facts.join(" · ")), reveal(group, () => redraw(i)),
      el("h4", {}, "Question"), said(question(i), group), el("h4", {}, "Answer"), said(answer(i), group),
      review(i, group), checks(i, group),
      shots("Pairs in the question’s prompt", c.asked[i], group), shots("Pairs in the answer’s prompt", c.answered[i], group));
  }

  document.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const typing = e.target.matches("input, select, textarea");
    if (e.key === "/" && !typing) { e.preventDefault(); search.focus(); search.select(); return; }
    if (e.key !== "Escape") return;
    const inside = e.target.closest("#list > li");
    if (e.target === search) { search.value = ""; renew(); }
    else if (inside && open.delete(Number(inside.firstChild.dataset.pair))) redraw(Number(inside.firstChild.dataset.pair));
    else if (open.size) { const last = [...open].pop(); open.delete(last); redraw(last); }
  });
  redraws.push(draw);
  renew();
}

// ---------------------------------------------------------------------------------------------------------------- side by side
function side(name, text, group, about = "") {
  return el("div", {}, el("h4", {}, name, about ? el("span", { class: "sub" }, ` ${about}`) : null), said(text, group));
}

function card(group, question, sides, redraw) {
  return el("div", { class: "pair" }, said(question, group, "p", "asked said"), reveal(group, redraw),
    el("div", { class: "sides" }, ...sides));
}

function samples(place) {
  if (!data.samples.length) return;
  const iterations = [...new Set(data.samples.flatMap(s => s.answers.map(([t]) => t)))].filter(Boolean).sort((a, b) => a - b);
  const [label, select] = choice("After iteration", "after", iterations.map(t => [String(t), String(t)]), draw);
  const cards = el("div");
  if (iterations.length) select.value = String(iterations.at(-1));
  if (iterations.length > 1) place.append(el("div", { class: "picks" }, label));
  place.append(cards);

  function draw() {
    const t = Number(select.value);
    cards.replaceChildren(...data.samples.map((s, i) => {
      const group = `sample ${i}`, by = new Map(s.answers);
      const sides = [s.reference ? side("Reference", s.reference, group) : null, side("Before", by.get(0) ?? null, group),
        iterations.length ? side(`After iteration ${t}`, by.get(t) ?? null, group) : null].filter(Boolean);
      return card(group, s.question, sides, draw);
    }));
  }
  redraws.push(draw);
  draw();
}

function judged(place) {
  const PAGE = 10;
  let limit = PAGE, opened = data.judgedBlind || !data.sheets.some(s => s.name === "answers" && s.rows.length);
  const [splitLabel, split] = choice("Rows", "split", data.judged.map((j, i) => [String(i), j.split]), () => {
    arms();
    limit = PAGE;
    draw();
  });
  const left = el("select", { name: "left", onchange: draw }), right = el("select", { name: "right", onchange: draw });
  const cards = el("div"), more = el("button", { type: "button", onclick: () => { limit += PAGE; draw(); } });
  const picks = el("div", { class: "picks" }, data.judged.length > 1 ? splitLabel : null,
    el("label", {}, "Left", left), el("label", {}, "Right", right));
  const ask = el("button", { type: "button", onclick: () => { opened = true; draw(); } }, "Show them all the same");
  const wait = el("div", {}, el("p", {}, "These answers would tell which is which in the blind comparison above. Fill it in first."), ask);
  place.append(wait, picks, cards, el("div", { class: "more" }, more));

  function arms() {
    const names = data.judged[Number(split.value)].arms, fill = (select, preferred, other) => {
      select.replaceChildren(...names.map((name, i) => el("option", { value: i }, inert(name))));
      select.value = String(Math.max(names.findIndex(name => name.split(" ")[0] === preferred), other));
    };
    fill(left, "base", 0);
    fill(right, "isara", 0);
  }

  function draw() {
    wait.hidden = opened;
    picks.hidden = cards.hidden = !opened;
    const { rows, arms: names, left_out: beyond } = data.judged[Number(split.value)], l = Number(left.value), r = Number(right.value);
    more.hidden = !opened || rows.length <= limit;
    more.textContent = `Show ${Math.min(PAGE, rows.length - limit)} more of ${rows.length}`
      + (beyond ? ` (${beyond} others are in evaluation/)` : "");
    if (!opened) return;
    cards.replaceChildren(...rows.slice(0, limit).map((row, i) => {
      const group = `judged ${split.value} ${i}`;
      const sides = [row.reference ? side("Reference", row.reference, group) : null,
        ...[...new Set([l, r])].map(a => side(inert(names[a]), row.answers[a], group, data.arms[names[a]]))];
      return card(group, row.question, sides.filter(Boolean), draw);
    }));
  }
  arms();
  redraws.push(draw);
  draw();
}

// ----------------------------------------------------------------------------------------------------------------- blind sheets
// A comment that a spreadsheet program would run gets an apostrophe in front, as the sheet's own texts have it. Those stay as they are.
const guarded = text => /^[\s'"“”„‘’‚«»‹›`´\u200b-\u200d\u2060\ufeff]*[=+\-@＝＋－＠]|^['\t\r\n]/.test(text) ? `'${text}` : text;
const quoted = cell => `"${cell.replaceAll('"', '""')}"`;
const csv = rows => "\ufeff" + rows.map(row => row.map(quoted).join(",") + "\r\n").join("");

function digest(text) { // tells one sheet's notes from another's; nothing more hangs on it
  let h = 2166136261;
  for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 16777619);
  return (h >>> 0).toString(16);
}

function sheet(place, s, number) {
  const rows = s.rows.map(row => [...row]), key = `isara-${s.name}-${digest(JSON.stringify(s.rows))}`;
  const title = s.name === "answers" ? "Which answer is better?" : "Is this a good pair?";
  const labels = { A: "A is better", B: "B is better", tie: "Neither", yes: "Good", no: "Not good" };
  let at = Math.max(rows.findIndex(row => !row[s.asked].trim()), 0);
  try {
    for (const [i, value, comment] of JSON.parse(recall(key) ?? "[]")) {
      rows[i][s.asked] = value;
      if (s.comment >= 0) rows[i][s.comment] = comment;
    }
  } catch { /* notes of an earlier visit that cannot be read */ }
  const keep = () => remember(key, JSON.stringify(rows.flatMap((row, i) => row[s.asked] || (s.comment >= 0 && row[s.comment])
    ? [[i, row[s.asked], s.comment >= 0 ? row[s.comment] : ""]] : [])));
  const progress = el("span", { role: "status" }), body = el("div");
  const go = step => { at = Math.min(Math.max(at + step, 0), rows.length - 1); draw(); };
  const back = el("button", { type: "button", onclick: () => go(-1) }, "Back");
  const on = el("button", { type: "button", onclick: () => go(1) }, "Next");
  const download = el("button", { type: "button", class: "main", onclick: save }, `Download ${s.file}`);
  place.append(el("h3", {}, title), el("p", { class: "count" }, progress), body, el("div", { class: "more" }, back, on, download));

  function save() {
    const url = URL.createObjectURL(new Blob([csv([s.columns, ...rows])], { type: "text/csv;charset=utf-8" }));
    el("a", { href: url, download: s.file }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  function decide(value) {
    const row = rows[at], again = row[s.asked] === value;
    row[s.asked] = again ? "" : value;
    keep();
    if (!again && at < rows.length - 1) at += 1;
    draw();
    body.querySelector("button[aria-pressed]")?.focus();
  }

  function draw() {
    const row = rows[at], group = `sheet ${number} ${at}`, texts = s.shown.map(([name, cells]) => [name, cells[at]]);
    const first = texts.findIndex(([name]) => name.toLowerCase().startsWith("question"));
    const sides = texts.filter((_, i) => i !== first).map(([name, text]) => text === "" && s.name === "pairs"
      ? el("p", { class: "empty" }, "Shown without an answer: is it a good question?") : side(inert(name), text, group));
    const chosen = row[s.asked].trim().toLowerCase();
    const buttons = s.choices.map(value => el("button", { type: "button", "aria-pressed": String(chosen === value.toLowerCase()),
      onclick: () => decide(value) }, labels[value]));
    const made = card(group, first < 0 ? "" : texts[first][1], sides, draw);
    made.append(el("div", { class: "choices" }, ...buttons));
    if (s.comment >= 0) {
      const input = el("input", { type: "text", autocomplete: "off", value: row[s.comment].replace(/^'/, ""),
        oninput: e => { row[s.comment] = guarded(e.target.value); keep(); } });
      made.append(el("label", { class: "comment" }, "Comment", input));
    }
    body.replaceChildren(made);
    back.disabled = at === 0;
    on.disabled = at === rows.length - 1;
    const done = rows.filter(r => r[s.asked].trim()).length;
    progress.textContent = `${at + 1} of ${rows.length}; ${done} judged`;
  }
  redraws.push(draw);
  draw();
}

// ----------------------------------------------------------------------------------------------------------------------- start
const sheets = document.getElementById("sheets");
if (sheets) data.sheets.filter(s => s.rows.length).forEach((s, i) => sheet(sheets, s, i));
browser(document.getElementById("browser"));
samples(document.getElementById("samples"));
if (data.judged.length) judged(document.getElementById("judged"));
})();

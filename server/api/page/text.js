// A little Markdown, made into nodes. What a model wrote becomes text and never HTML, so that nothing in it can run or load.
//
//   render(box, text)    the nodes of a box, brought up to date with a text that mostly grew
import { words } from "./words.js";

export function node(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

const INLINE = /`([^`\n]{1,2000})`|\*\*([^*\n]{1,2000})\*\*|\*([^*\s][^*\n]{0,2000})\*|\[([^\]\n]{1,500})\]\((https?:\/\/[^\s)]{1,2000})\)|(https?:\/\/[^\s<>"')\]]{1,2000})/g;

function inline(text) {
  const nodes = [];
  let done = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(done, found.index), span(found));
    done = found.index + found[0].length;
  }
  return [...nodes, text.slice(done)];
}

function span([whole, code, strong, emphasis, label, target]) {
  if (code) return node("code", {}, code);
  if (strong) return node("strong", {}, ...inline(strong));
  if (emphasis) return node("em", {}, ...inline(emphasis));
  return node("a", { href: target ?? whole, target: "_blank", rel: "noopener noreferrer" }, label ?? whole);
}

const FENCE = /^ {0,3}(```+|~~~+)\s*(\S*)/, HEADING = /^(#{1,6}) +(.*)$/, RULE = /^ {0,3}([-*_])( *\1){2,} *$/, QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +/, TABLE = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;

// The text in blocks, each with the lines that it is made of: while a reply grows, only the last ones change.
function blocks(text) {
  const lines = text.split("\n"), found = [];
  for (let i = 0; i < lines.length; ) {
    const kind = kindAt(lines, i), begin = i;
    i = endOf(kind, lines, i);
    if (kind !== "blank") found.push({ kind, lines: lines.slice(begin, i), source: kind + lines.slice(begin, i).join("\n") });
  }
  return found;
}

function kindAt(lines, i) {
  const line = lines[i];
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return line.includes("|") && TABLE.test(lines[i + 1] ?? "") ? "table" : "paragraph";
}

function endOf(kind, lines, i) {
  const going = (test) => {
    let end = i + 1;
    while (end < lines.length && test(lines[end], end)) end++;
    return end;
  };
  if (kind === "fence") {
    const fence = FENCE.exec(lines[i])[1], end = going((line) => !line.trim().startsWith(fence));
    return Math.min(end + 1, lines.length);
  }
  if (kind === "quote") return going((line) => QUOTE.test(line));
  if (kind === "table") return going((line) => line.includes("|"));
  if (kind === "list") {
    const belongs = belongsTo(ITEM.exec(lines[i]));
    return going((line, end) => belongs(line) || (!line.trim() && belongs(lines[end + 1] ?? "")));
  }
  return kind === "paragraph" ? going((_, end) => kindAt(lines, end) === "paragraph") : i + 1;
}

// Whether a line is part of the list that begins with this item: an item of its kind, or something further in.
function belongsTo([, indent, marker]) {
  const numbered = /\d/.test(marker);
  return (line) => {
    const item = ITEM.exec(line);
    return item ? item[1].length > indent.length || /\d/.test(item[2]) === numbered : /^ {2,}\S/.test(line);
  };
}

const MAKERS = {
  fence: (lines) => {
    const [, fence, language] = FENCE.exec(lines[0]), closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
    const code = lines.slice(1, closed ? -1 : undefined).join("\n");
    return node("div", { className: "code" }, node("div", {}, node("span", {}, language), copier(() => code)), node("pre", { tabIndex: 0 }, node("code", {}, code)));
  },
  heading: ([line]) => node(`h${Math.min(6, HEADING.exec(line)[1].length + 2)}`, {}, ...inline(HEADING.exec(line)[2])),
  rule: () => node("hr"),
  quote: (lines, depth) => node("blockquote", {}, ...rendered(lines.map((line) => line.replace(QUOTE, "")).join("\n"), depth)),
  list: (lines, depth) => {
    const [, indent, marker] = ITEM.exec(lines[0]), items = [];
    for (const line of lines) {
      const item = ITEM.exec(line);
      if (item && item[1].length <= indent.length) items.push([line.slice(item[0].length)]);
      else items.at(-1).push(line.replace(new RegExp(`^ {0,${indent.length + marker.length + 1}}`), ""));
    }
    const ordered = /\d/.test(marker), list = node(ordered ? "ol" : "ul", {}, ...items.map((item) => node("li", {}, ...rendered(item.join("\n"), depth))));
    if (ordered) list.start = parseInt(marker, 10);
    return list;
  },
  table: ([head, , ...rows]) => {
    const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
    const row = (line, tag) => node("tr", {}, ...cells(line).map((cell) => node(tag, {}, ...cell)));
    return node("table", {}, node("thead", {}, row(head, "th")), node("tbody", {}, ...rows.map((line) => row(line, "td"))));
  },
  paragraph: (lines) => node("p", {}, ...inline(lines.join("\n"))),
};

// What stands in a quote or a list. A model that says ">" for ever nests deeper than a browser can follow: from some depth on, text stays as it is.
const DEEPEST = 12;
const rendered = (text, depth) => (depth < DEEPEST ? blocks(text).map(({ kind, lines }) => MAKERS[kind](lines, depth + 1)) : [text]);

// While a text grows, only its last blocks are made anew.
export function render(box, text) {
  const now = blocks(text), before = (box.sources ??= []);
  let same = 0;
  while (same < now.length && now[same].source === before[same]) same++;
  while (box.children.length > same) box.lastChild.remove();
  box.append(...now.slice(same).map(({ kind, lines }) => MAKERS[kind](lines, 0)));
  box.sources = now.map(({ source }) => source);
}

// A button that copies.
export function copier(text) {
  const button = node("button", { type: "button", className: "small", textContent: words.copy });
  button.addEventListener("click", async () => {
    await copy(text());
    button.textContent = words.copied;
    setTimeout(() => (button.textContent = words.copy), 1500);
  });
  return button;
}

// A page that came over plain HTTP from another machine has no clipboard of its own.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = node("textarea", { value: text, className: "hidden" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

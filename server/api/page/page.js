// The page at `/`: a chat over /v1/chat/completions, and the live figures of /stats. No library, no build step, nothing from elsewhere.
//
//   settings      what the person chose, in this tab's sessionStorage
//   stream        a reply as it comes
//   conversation  messages and their nodes
//   figures       /stats, asked once a second while somebody looks
import { copier, node, render } from "./text.js";
import { translate, words } from "./words.js";

const at = (id) => document.getElementById(id);

// --- Settings ----------------------------------------------------------------

const FIELDS = ["system", "temperature", "max-tokens", "key"];
const kept = (name) => sessionStorage.getItem(`moespan.${name}`) ?? "";
const keep = (name, value) => sessionStorage.setItem(`moespan.${name}`, value);

function setUpSettings() {
  for (const name of FIELDS) {
    at(name).value = kept(name);
    at(name).addEventListener("input", () => keep(name, at(name).value));
  }
  at("open-settings").addEventListener("click", () => at("settings").showModal());
}

function headers() {
  const key = kept("key").trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function askForKey() {
  if (!at("settings").open) at("settings").showModal();
  at("key").focus();
}

// --- Stream ------------------------------------------------------------------

// The events of a stream: {status} for its comments, {data} for what is JSON. Throws an Error with the server's sentence.
async function* events(messages, signal) {
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), signal, body: JSON.stringify(asked(messages)) });
  if (response.status === 401) askForKey();
  if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message ?? `${response.status} ${response.statusText}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield { status: line.slice(1).trim() };
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield { data };
    }
  }
}

function asked(messages) {
  const system = kept("system").trim(), temperature = kept("temperature"), most = kept("max-tokens");
  const sent = messages.map(({ role, content }) => ({ role, content }));
  return {
    model: at("model").textContent, stream: true, messages: system ? [{ role: "system", content: system }, ...sent] : sent,
    ...(temperature !== "" && { temperature: Number(temperature) }), ...(most !== "" && { max_tokens: Number(most) }),
  };
}

// --- Conversation ------------------------------------------------------------

let messages = [], running = null; // the request's AbortController

function setUpChat() {
  const prompt = at("prompt");
  at("chat").dataset.empty = words.empty;
  messages = JSON.parse(kept("messages") || "[]");
  show();
  at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  at("stop").addEventListener("click", () => running?.abort());
  at("new").addEventListener("click", () => { running?.abort(); messages = []; save(); show(); prompt.focus(); });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !at("settings").open) running?.abort(); });
  prompt.focus();
}

function grow() {
  at("prompt").style.height = "auto";
  if (at("prompt").value) at("prompt").style.height = `${at("prompt").scrollHeight + 2}px`;
}

const save = () => keep("messages", JSON.stringify(messages));

function send() {
  const content = at("prompt").value.trim();
  if (!content || running) return;
  at("prompt").value = "";
  grow();
  messages.push({ role: "user", content });
  answer();
}

function again() {
  if (running) return;
  messages.pop();
  answer();
}

function show() {
  at("chat").replaceChildren(...messages.map((message, i) => shown(message, i === messages.length - 1)));
  at("chat").scrollTop = at("chat").scrollHeight;
}

function shown(message, last) {
  if (message.role === "user") return node("article", { className: "message user" }, message.content);
  const box = reply();
  update(box, message);
  box.append(foot(message, last));
  return box;
}

function reply() {
  const thinking = node("details", { className: "thinking", hidden: true }, node("summary"), node("div", { className: "text" }));
  return node("article", { className: "message assistant" }, thinking, node("div", { className: "text" }), node("p", { className: "status", hidden: true }));
}

// Puts what there is of a reply into its nodes.
function update(box, { thinking, content, seconds, status }) {
  const [details, text, waits] = box.children;
  details.hidden = !thinking;
  details.firstChild.textContent = seconds === undefined ? words.thinking : words.thought(seconds.toFixed(1));
  render(details.lastChild, thinking ?? "");
  render(text, content);
  waits.hidden = !status;
  waits.textContent = status ?? "";
}

function foot(message, last) {
  const parts = [copier(() => message.content)];
  if (last) {
    const button = node("button", { type: "button", className: "small", textContent: words.again });
    button.addEventListener("click", again);
    parts.push(button);
  }
  return node("div", { className: "foot" }, ...parts, node("span", {}, message.note ?? ""));
}

async function answer() {
  const message = { role: "assistant", content: "", thinking: "", status: words.waiting, began: performance.now() }, before = messages.slice();
  messages.push(message);
  show();
  at("chat").lastChild.lastChild.remove(); // no foot yet
  busy(new AbortController());
  const draw = drawer(at("chat").lastChild, message);
  draw();
  try {
    for await (const event of events(before, running.signal)) take(event, message, draw);
  } catch (error) {
    if (error.name === "AbortError") message.ending = words.stopped;
    else message.problem = error instanceof TypeError ? words.lost : error.message;
  }
  busy(null);
  finish(message);
}

const since = (message) => (performance.now() - message.began) / 1000;

function take({ status, data }, message, draw) {
  const choice = data?.choices[0], delta = choice?.delta ?? {};
  if (status !== undefined && message.status) message.status = status || words.waiting;
  if ((delta.content || delta.reasoning_content) && message.first === undefined) {
    message.first = since(message);
    at("first").textContent = message.first.toFixed(message.first < 10 ? 2 : 0);
    message.status = "";
  }
  if (delta.content && message.thinking) message.seconds ??= since(message) - message.first;
  message.thinking += delta.reasoning_content ?? "";
  message.content += delta.content ?? "";
  if (choice?.finish_reason === "length") message.ending = words.cut;
  message.timings = data?.timings ?? message.timings;
  draw();
}

// At most one drawing a frame, at the end of the conversation if that is where the person is.
function drawer(box, message) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      const chat = at("chat"), follows = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
      update(box, message);
      if (follows) chat.scrollTop = chat.scrollHeight;
    });
  };
}

function finish(message) {
  if (message.content || message.thinking) messages[messages.length - 1] = over(message);
  else messages.pop();
  show();
  if (message.problem) complain(message);
  save();
  at("chat").scrollTop = at("chat").scrollHeight;
  at("prompt").focus();
}

// What is kept of a reply.
function over(message) {
  const { content, thinking, first, timings, ending, seconds = first === undefined ? 0 : since(message) - first } = message;
  const said = [timings && `${timings.predicted_per_second.toFixed(1)} tok/s`, timings && words.tokens(timings.predicted_n), first && words.after(first.toFixed(1)), ending];
  return { role: "assistant", content, thinking, seconds, note: said.filter(Boolean).join(" · ") };
}

// Says what went wrong; a question that got no answer goes back to where it was written.
function complain({ problem, content, thinking }) {
  at("chat").append(node("article", { className: "message" }, node("p", { className: "problem", role: "alert" }, problem)));
  if (content || thinking || at("prompt").value) return;
  at("prompt").value = messages.pop().content;
  grow();
}

function busy(controller) {
  running = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
  at("chat").setAttribute("aria-busy", String(controller !== null));
}

// --- Figures -----------------------------------------------------------------

const SAMPLES = 120, WINDOW = 4; // seconds
const history = []; // of /stats
const speeds = []; // tokens drawn a second

async function look() {
  if (document.hidden) return;
  try {
    const response = await fetch("/stats", { headers: headers() });
    if (response.status === 401) return locked();
    if (response.ok) see(await response.json());
  } catch {
    say("error", words.away);
  }
}

function say(state, text) {
  at("state").dataset.state = state;
  at("state").textContent = text;
}

let asks = true; // for the key, once by itself
function locked() {
  say("error", words.locked);
  if (asks) askForKey();
  asks = false;
}

function see(stats) {
  if (history.length && stats.generation_tokens < history.at(-1).generation_tokens) history.length = speeds.length = 0; // the server was started anew
  history.push(stats);
  if (history.length > SAMPLES) history.shift();
  at("model").textContent = document.title = stats.model;
  say(stats.state, words[stats.state]);
  showLoading(stats);
  showFigures(stats, history[Math.max(0, history.length - 1 - WINDOW)]);
}

function showLoading({ state, load }) {
  at("loading").hidden = state !== "loading";
  if (state !== "loading") return;
  const gb = (bytes) => (bytes / 1e9).toFixed(bytes < 1e10 ? 2 : 0), share = load.total_bytes ? load.done_bytes / load.total_bytes : 0;
  at("loading-text").textContent = share === 1 ? words.warming : share ? words.reading(gb(load.done_bytes), gb(load.total_bytes)) : words.opening;
  if (share && share < 1) at("loading-bar").value = share;
  else at("loading-bar").removeAttribute("value");
}

function showFigures(now, then) {
  const put = (id, value, digits = 0) => (at(id).textContent = Number.isFinite(value) ? value.toFixed(digits) : "–");
  const grown = (name) => now[name] - then[name], s = grown("clock_s"), few = (value) => (value < 100 ? 1 : 0);
  const speed = (tokens, seconds, last) => (grown(seconds) > 0.1 * s ? grown(tokens) / grown(seconds) : now[last] || NaN);
  const decode = speed("generation_tokens", "decode_s", "last_decode_per_s"), prefill = speed("prompt_tokens", "prefill_s", "last_prefill_per_s");
  put("decode", decode, few(decode));
  put("prefill", prefill, few(prefill));
  at("queue").textContent = `${now.running} + ${now.waiting}`;
  put("kv", 100 * now.kv_usage);
  showEngine(put, now.engine, then.engine, s);
  const before = history.at(-2) ?? now;
  speeds.push(now === before ? 0 : (now.generation_tokens - before.generation_tokens) / (now.clock_s - before.clock_s));
  if (speeds.length > SAMPLES) speeds.shift();
  draw();
}

function showEngine(put, now, then, s) {
  at("gpu-figure").hidden = !now?.gpu;
  if (!now || !then) return;
  put("pool", (100 * (now.pool_busy_s - then.pool_busy_s)) / (s * now.pool_threads));
  put("ram", (now.expert_bytes + now.dense_bytes - then.expert_bytes - then.dense_bytes) / s / 1e9, 1);
  if (now.gpu && then.gpu) put("gpu", (100 * (now.gpu.busy_s - then.gpu.busy_s)) / s);
}

function draw() {
  const canvas = at("curve"), ratio = devicePixelRatio || 1, pen = canvas.getContext("2d");
  const width = (canvas.width = canvas.clientWidth * ratio), height = (canvas.height = canvas.clientHeight * ratio);
  const most = Math.max(...speeds, 1), x = (i) => width - ((speeds.length - 1 - i) * width) / (SAMPLES - 1), y = (v) => height - 1 - (v / most) * (height - 3 * ratio);
  pen.strokeStyle = pen.fillStyle = getComputedStyle(canvas).color;
  pen.lineWidth = 1.5 * ratio;
  pen.beginPath();
  speeds.forEach((v, i) => pen.lineTo(x(i), y(v)));
  pen.stroke();
  pen.globalAlpha = 0.12;
  pen.lineTo(width, height);
  pen.lineTo(x(0), height);
  pen.fill();
}

translate();
setUpSettings();
setUpChat();
look();
setInterval(look, 1000);

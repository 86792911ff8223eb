// The chat: what is asked, what comes, and what became of it. All text goes in as text.

import { Coloured, Counts, draw, make } from "./rounds.js";
import { chat, Failure, request } from "./stream.js";

const HEALTH_MS = 2000;
const NEAR_PX = 80; // so close to its end the conversation follows the text
const NUMBERS = ["temperature", "seed", "block_size", "max_tokens"];

const byId = (id) => document.getElementById(id);
const log = byId("log");
const text = byId("text");

let key = null; // in memory alone
let messages = [];
let running = null; // what stops the answer under way

// Settings

function settings() {
  const given = {};
  for (const name of NUMBERS) {
    const field = byId(name);
    if (field.validity.badInput) {
      throw new Failure(`${field.labels[0].textContent} must be a number.`);
    }
    if (field.value !== "") given[name] = Number(field.value);
  }
  if (byId("thinking").value) given.reasoning_effort = byId("thinking").value;
  return given;
}

function body() {
  const system = byId("system").value;
  return {
    ...settings(),
    messages: system.trim() ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true, include_rounds: true },
  };
}

// One answer on the page

class Answer {
  constructor() {
    this.counts = new Counts();
    this.node = make("article", "turn answer");
    this.node.setAttribute("aria-label", "Answer");
    this.node.setAttribute("aria-busy", "true");
    this.content = make("div", "content");
    this.said = new Coloured(this.content);
    this.foot = make("footer", "quiet");
    this.foot.textContent = "Reading the prompt…";
    this.node.append(this.content, this.foot);
    this.thoughts = null;
    this.reason = null;
    this.usage = null;
    this.warning = null;
    this.label = null;
    this.begun = 0;
  }

  add(chunk) {
    const round = chunk.pyengine?.round;
    if (round) this.addRound(round);
    const [choice] = chunk.choices;
    if (choice?.delta.reasoning_content) this.think().add(choice.delta.reasoning_content);
    if (choice?.delta.content) this.say(choice.delta.content);
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    if (choice?.warning) this.warning = choice.warning;
    if (chunk.early_exit) this.label = chunk.early_exit.label;
    if (chunk.usage) this.usage = chunk.usage;
  }

  addRound(round) {
    this.begun ||= performance.now();
    this.counts.add(round);
    const number = this.counts.rounds.length;
    this.said.expect(round.content, round, number);
    if (round.reasoning_content.some(Boolean)) {
      this.think().expect(round.reasoning_content, round, number);
    }
    this.foot.textContent = `${this.counts.tokens} tokens`;
  }

  // Where thoughts go: apart, and folded until somebody opens them.
  think() {
    if (this.thoughts === null) {
      this.fold = make("details", "thoughts");
      this.summary = make("summary", "", "Thinking…");
      const inside = make("div", "content");
      this.fold.append(this.summary, inside);
      this.node.prepend(this.fold);
      this.thoughts = new Coloured(inside);
    }
    return this.thoughts;
  }

  say(piece) {
    if (this.thoughts) this.summary.textContent = "Thoughts";
    this.said.add(piece);
  }

  // Tokens per second: the server's own figure at the end, before it this page's clock.
  get speed() {
    if (this.usage) return this.usage.tok_s.toFixed(1);
    const seconds = (performance.now() - this.begun) / 1000;
    return this.counts.tokens > 1 ? ((this.counts.tokens - 1) / seconds).toFixed(1) : "–";
  }

  end(how) {
    this.node.setAttribute("aria-busy", "false");
    if (this.thoughts) this.summary.textContent = "Thoughts";
    const { tokens, perRound, acceptance } = this.counts;
    const parts = [`${tokens} tokens`, `${this.speed} tok/s`, `${perRound} tokens per round`];
    parts.push(`${acceptance} accepted`);
    if (this.usage) parts.push(`seed ${this.usage.seed}`);
    this.foot.replaceChildren(make("span", "", [how, ...parts].filter(Boolean).join(" · ")));
    if (navigator.clipboard && this.said.text) this.foot.append(this.copyButton());
    for (const said of [this.warning, this.label].filter(Boolean)) {
      this.node.append(make("p", "warning", said));
    }
  }

  copyButton() {
    const button = make("button", "small", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      const done = navigator.clipboard.writeText(this.said.text);
      button.textContent = await done.then(() => "Copied", () => "Not copied");
    });
    return button;
  }

  fail(sentence) {
    this.node.setAttribute("aria-busy", "false");
    const said = make("p", "error", sentence);
    said.setAttribute("role", "alert");
    this.foot.remove();
    this.node.append(said);
  }
}

// Asking

async function ask(question) {
  let asked;
  messages.push({ role: "user", content: question });
  try {
    asked = body();
  } catch (error) {
    messages.pop();
    tell(error.message);
    return;
  }
  byId("empty").hidden = true;
  const turn = make("article", "turn question", question);
  turn.setAttribute("aria-label", "Question");
  const answer = new Answer();
  log.append(turn, answer.node);
  log.scrollTop = log.scrollHeight;
  text.value = "";
  fit();
  const own = new AbortController();
  begin(own);
  try {
    for await (const chunk of chat(asked, key, own.signal)) {
      if (running !== own) return;
      following(() => answer.add(chunk));
      soon(answer);
    }
    conclude(answer, answer.reason === "length" ? "Cut at max tokens" : "", "Answer complete.");
  } catch (error) {
    if (running !== own) return; // a new chat has begun
    if (error.name === "AbortError") conclude(answer, "Stopped", "Stopped.");
    else failed(error, question, turn, answer);
  } finally {
    if (running === own) begin(null);
  }
}

function conclude(answer, how, spoken) {
  const content = answer.said.text;
  if (content) messages.push({ role: "assistant", content });
  else messages.pop();
  following(() => answer.end(how));
  draw(answer.counts, answer.speed);
  byId("spoken").textContent = `${spoken} ${answer.counts.tokens} tokens.`;
}

// The conversation goes on as if the question had not been asked; it can be sent again.
function failed(error, question, turn, answer) {
  if (!(error instanceof Failure)) console.error(error);
  messages.pop();
  if (!text.value) text.value = question;
  fit();
  if (error.status === 401) {
    turn.remove();
    answer.node.remove();
    askForKey(key === null ? "" : error.message);
    return;
  }
  const ours = error instanceof Failure;
  following(() => answer.fail(ours ? error.message : "The page failed to read the answer."));
}

function begin(controller) {
  const had = document.activeElement === byId("stop") || document.activeElement === byId("send");
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  if (had) byId(controller ? "stop" : "send").focus();
}

function tell(sentence) {
  const said = make("p", "error", sentence);
  said.setAttribute("role", "alert");
  following(() => log.append(said));
}

// Change the conversation, and stay at its end if that is where the reader is.
function following(change) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  change();
  if (near) log.scrollTop = log.scrollHeight;
}

// Rounds come faster than a screen shows them: the panel is drawn once per frame.
let drawing = false;
function soon(answer) {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (running !== null) draw(answer.counts, answer.speed);
  });
}

// The key

function askForKey(sentence) {
  byId("key-form").hidden = false;
  byId("key-error").hidden = !sentence;
  byId("key-error").textContent = sentence;
  byId("key").value = "";
  byId("key").focus();
}

async function greet() {
  try {
    const response = await request("/v1/models", key);
    const { data } = await response.json();
    byId("model").textContent = data[0].id;
    if (!byId("key-form").hidden) text.focus();
    byId("key-form").hidden = true;
  } catch (error) {
    if (error.status === 401) askForKey(key === null ? "" : error.message);
    else tell(error.message);
  }
}

async function watch() {
  if (document.hidden) return;
  try {
    const now = await (await request("/health", null)).json();
    const waiting = now.waiting ? `, ${now.waiting} waiting` : "";
    const speed = now.tok_s >= 0.05 ? `, ${now.tok_s.toFixed(1)} tok/s` : "";
    byId("load").textContent = `${now.texts} of ${now.streams} streams${waiting}${speed}`;
  } catch (error) {
    byId("load").textContent = error.message;
  }
}

// What the reader does

function fit() {
  text.style.blockSize = "auto";
  text.style.blockSize = `${text.scrollHeight + 2}px`;
}

function stop() {
  running?.abort();
}

function send() {
  const question = text.value;
  if (running === null && question.trim()) ask(question);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", () => {
  stop();
  begin(null);
  messages = [];
  log.replaceChildren(byId("empty"));
  byId("empty").hidden = false;
  draw(new Counts(), "–");
  text.focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value;
  greet();
});
byId("colours").addEventListener("change", (event) => {
  log.classList.toggle("uncoloured", !event.target.checked);
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    if (running === null) ask(example.textContent);
  });
}

const wide = matchMedia("(min-width: 56rem)");
for (const id of ["rounds", "settings"]) byId(id).open = wide.matches;
greet();
watch();
setInterval(watch, HEALTH_MS);

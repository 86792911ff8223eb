// The round made visible: counts of one answer, their picture, and text coloured by its tokens.

const SHOWN_ROUNDS = 40;
const SHOWN_DEPTHS = 15; // of up to 127

export const NAMES = {
  draft: "accepted draft",
  correction: "correction",
  bonus: "bonus",
  forced: "forced by the grammar",
  first: "first token",
  plain: "no drafts in this round",
  budget: "written: the thinking budget is used up",
};

const byId = (id) => document.getElementById(id);

export function make(name, className = "", text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

// What the rounds of an answer come to.
export class Counts {
  constructor() {
    this.tokens = 0;
    this.rounds = []; // without the prefill
    this.sources = {};
    this.drafted = [];
    this.accepted = [];
  }

  add(round) {
    this.tokens += round.tokens.length;
    for (const source of round.sources) this.sources[source] = (this.sources[source] ?? 0) + 1;
    if (round.sources[0] === "first" || round.sources[0] === "budget") return;
    this.rounds.push(round);
    for (let depth = 0; depth < round.drafted; depth++) {
      this.drafted[depth] = (this.drafted[depth] ?? 0) + 1;
      this.accepted[depth] = (this.accepted[depth] ?? 0) + (depth < round.accepted);
    }
  }

  // Shares as text; a dash where there is nothing to share.
  get acceptance() {
    const sum = (list) => list.reduce((a, b) => a + b, 0);
    const drafted = sum(this.drafted);
    return drafted ? `${Math.round((100 * sum(this.accepted)) / drafted)} %` : "–";
  }

  get perRound() {
    const made = this.rounds.reduce((sum, round) => sum + round.tokens.length, 0);
    return this.rounds.length ? (made / this.rounds.length).toFixed(2) : "–";
  }
}

export function draw(counts, speed) {
  byId("speed").textContent = speed;
  byId("per-round").textContent = counts.perRound;
  byId("acceptance").textContent = counts.acceptance;
  for (const node of document.querySelectorAll("[data-count]")) {
    node.textContent = counts.sources[node.dataset.count] ?? 0;
  }
  drawDepths(counts);
  drawStrip(counts.rounds);
}

function drawDepths({ drafted, accepted }) {
  const body = byId("depths").tBodies[0];
  byId("depths").hidden = !drafted.length;
  byId("no-depths").hidden = drafted.length > 0;
  body.replaceChildren(
    ...drafted.slice(0, SHOWN_DEPTHS).map((count, depth) => {
      const row = make("tr");
      const name = make("th", "", `draft ${depth + 1}`);
      name.scope = "row";
      const bar = make("div", "bar");
      bar.style.inlineSize = `${(100 * accepted[depth]) / count}%`;
      const cell = make("td", "track");
      cell.append(bar);
      const share = make("td", "share", `${Math.round((100 * accepted[depth]) / count)} %`);
      share.title = `${accepted[depth]} of ${count}`;
      row.append(name, cell, share);
      return row;
    }),
  );
}

function drawStrip(rounds) {
  byId("strip").hidden = !rounds.length;
  byId("no-strip").hidden = rounds.length > 0;
  byId("strip").replaceChildren(...rounds.slice(-SHOWN_ROUNDS).map(column));
}

// The tokens of a round from the bottom up, and above them the drafts that were dropped. The
// correction stands in the place of the first of those.
function column(round) {
  const node = make("div", "column");
  const corrected = round.sources.at(-1) === "correction";
  const dropped = Math.max(0, round.drafted - round.accepted - corrected);
  for (const source of [...round.sources, ...Array(dropped).fill("dropped")]) {
    const cell = make("i");
    cell.dataset.source = source;
    node.append(cell);
  }
  return node;
}

// Text as the deltas say it, in spans by token where the rounds' pieces agree with it.
export class Coloured {
  constructor(node) {
    this.node = node;
    this.text = "";
    this.pieces = [];
  }

  expect(texts, round, number) {
    this.pieces = texts
      .map((text, index) => ({ text, source: round.sources[index], number, round }))
      .filter((piece) => piece.text);
  }

  add(text) {
    this.text += text;
    while (text && this.pieces.length && text.startsWith(this.pieces[0].text)) {
      const piece = this.pieces.shift();
      this.node.append(token(piece));
      text = text.slice(piece.text.length);
    }
    if (text) this.node.append(text);
  }
}

function token({ text, source, number, round }) {
  const node = make("span", "token", text);
  node.dataset.source = source;
  const kept = round.drafted ? `, round ${number}: ${round.accepted} of ${round.drafted} drafts kept` : "";
  node.title = `${NAMES[source] ?? source}${kept}`;
  return node;
}

"use strict";
// One page, no library, no network but this service: a question, images and answers in; ranking and reasonings out.
const MOST_ANSWERS = 8;
const at = (id) => document.getElementById(id);
const images = []; // data URLs, in order

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").className = isError ? "error" : "";
}

function answers() {
  return [...document.querySelectorAll("#answers textarea")];
}

function nameAnswers() {
  const rows = [...document.querySelectorAll("#answers .one")];
  rows.forEach((row, index) => {
    row.querySelector("label").textContent = `Answer ${index + 1}`;
    row.querySelector("label").htmlFor = row.querySelector("textarea").id = `answer-${index + 1}`;
    row.querySelector("button").setAttribute("aria-label", `Remove answer ${index + 1}`);
    row.querySelector("button").disabled = rows.length <= 2;
  });
  at("add").disabled = rows.length >= MOST_ANSWERS;
}

function addAnswer(text = "") {
  const area = make("textarea", { rows: 2, required: true, value: text });
  const remove = make("button", { type: "button", textContent: "×", onclick: () => {
    const next = row.nextElementSibling || row.previousElementSibling;
    row.remove();
    nameAnswers();
    next.querySelector("textarea").focus(); // whoever has no mouse is not sent back to the top
  } });
  const row = make("div", { className: "one" }, make("label"), make("div", { className: "answer" }, area, remove));
  at("answers").append(row);
  nameAnswers();
  return area;
}

function showImages() {
  at("thumbs").replaceChildren(...images.map((url, index) => make("figure", {},
    make("img", { src: url, alt: `Image ${index + 1}` }),
    make("button", { type: "button", textContent: "×", ariaLabel: `Remove image ${index + 1}`,
      onclick: () => { images.splice(index, 1); showImages(); at("files").focus(); } }))));
}

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) { say(`${file.name} is not an image`, true); continue; }
    images.push(await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(file);
    }));
  }
  showImages();
}

function example() {
  const canvas = make("canvas", { width: 56, height: 56 });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; pen.fillRect(0, 0, 56, 56);
  pen.strokeStyle = "black"; pen.lineWidth = 6; pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(14, 12); pen.lineTo(42, 12); pen.lineTo(24, 46); pen.stroke();
  images.splice(0, images.length, canvas.toDataURL("image/png"));
  showImages();
  at("question").value = "Which digit does the image show?";
  at("answers").replaceChildren();
  ["The digit is 7.", "The digit is 3.", "The image shows 1."].forEach((text) => addAnswer(text));
  at("go").focus();
}

async function ask(path, body) {
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `the service answered ${response.status}`);
  return answer;
}

const percent = (share) => share === null ? "unknown" : `${Math.round(100 * share)} %`;

function showRanking(texts, ranking) {
  const list = make("ol", { className: "ranking" });
  const scalar = ranking.kind !== "generative";  // any numbers; shown between the lowest and the highest
  const lowest = scalar ? Math.min(...ranking.rewards) : 0;
  const range = scalar ? Math.max(...ranking.rewards) - lowest || 1 : 1;
  ranking.order.forEach((index, place) => {
    const bar = make("span");
    const reward = ranking.rewards[index];
    bar.style.width = `${100 * (reward - lowest) / range}%`;
    list.append(make("li", { className: place === 0 ? "best" : "" },
      make("strong", { textContent: `${place + 1}. Answer ${index + 1}` }),
      scalar ? ` — reward ${reward.toFixed(3)}` : ` — wins ${percent(reward)} of its comparisons`,
      make("div", { className: "text", textContent: texts[index] }),
      make("div", { className: "bar", ariaHidden: "true" }, bar)));
  });
  return list;
}

function showComparison(comparison, scalar) {
  const [first, second] = comparison.pair.map((index) => index + 1);
  const winner = comparison.verdict === null ? "no decision" : `answer ${comparison.pair[comparison.verdict - 1] + 1}`;
  const agreement = scalar ? "" : comparison.orders_agree === false
    ? make("span", { className: "disagree", textContent: "the two orders disagree" })
    : make("span", { className: "agree", textContent: comparison.orders_agree ? "both orders agree" : "" });
  const box = make("details", { open: comparison.orders_agree === false },
    make("summary", {}, `Answer ${first} against answer ${second}: ${winner}`,
      ` (answer ${first} better: ${percent(comparison.probability)}) `, agreement));
  const names = { 12: `answer ${first} shown first`, 21: `answer ${second} shown first` };
  for (const judgement of comparison.judgements) {
    const choice = judgement.choice === null ? "no readable verdict"
      : `prefers answer ${comparison.pair[judgement.choice - 1] + 1}`;
    box.append(make("div", { className: "reasoning" },
      make("strong", { textContent: scalar ? "rewards" : `${names[judgement.order]}: ${choice}` }),
      make("div", { className: "text", textContent: judgement.reasoning || judgement.text })));
  }
  return box;
}

async function submit(event) {
  event.preventDefault();
  const texts = answers().map((area) => area.value);
  const body = { question: at("question").value, responses: texts, images, votes: Number(at("votes").value),
    schedule: texts.length <= 4 ? "all_pairs" : "swiss" };
  at("inputs").disabled = true;
  at("result").hidden = true;
  say("Comparing …");
  try {
    const ranking = await ask("/v1/rank", body);
    const scalar = ranking.kind !== "generative";
    const disagreements = ranking.comparisons.filter((comparison) => comparison.orders_agree === false).length;
    at("result").replaceChildren(
      make("h2", { textContent: `Answer ${ranking.order[0] + 1} is the best` }),
      make("p", { className: "soft", textContent: `Sure of it: ${percent(ranking.confidence)}. ${ranking.calls} `
        + (scalar ? "answers scored, each by itself."
          : `judgements, ${ranking.comparisons.length} comparisons; the two orders disagree in ${disagreements}.`) }),
      showRanking(texts, ranking),
      make("h2", { textContent: scalar ? "Neighbours in the order" : "Every verdict with its reasoning" }),
      ...ranking.comparisons.map((one) => showComparison(one, scalar)));
    at("result").hidden = false;
    say("");
    at("result").focus();
  } catch (error) {
    say(error.message, true);
  } finally {
    at("inputs").disabled = false;
  }
}

at("form").addEventListener("submit", submit);
at("add").addEventListener("click", () => addAnswer().focus());
at("example").addEventListener("click", example);
at("files").addEventListener("change", (event) => { addFiles([...event.target.files]); event.target.value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles([...event.dataTransfer.files]);
  });
}
addAnswer();
addAnswer();

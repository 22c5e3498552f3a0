"use strict";

// A label is sent, and the next clip is shown when the server says that the disk has it. Until then the same request,
// known by its key, is sent again on demand, so it counts once.

const settings = JSON.parse(document.getElementById("settings").textContent);
const element = (id) => document.getElementById(id);
const speeds = [...element("speed").options].map((option) => option.value);

// This window keeps its name over a reload, and with it the clips that are reserved for it.
const store = (area, name, make) => {
  const key = `hy-prfl-${settings.study}-${name}`;
  const value = area.getItem(key) ?? make();
  if (value !== null) area.setItem(key, value);
  return { key, get: () => area.getItem(key), set: (text) => area.setItem(key, text), value };
};
const randomName = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const windowName = store(sessionStorage, "window", randomName);
const annotator = store(localStorage, "annotator", () => null);
const draft = store(sessionStorage, "draft", () => "{}");

let name = null; // of the annotator
let items = []; // the first is shown
let last = null; // what undo takes back
let answers = {};
let active = 0; // question that keys answer
let shownAt = 0;
let pending = null; // request that has no reply yet
let shown = null; // item whose clips are on the page
const blobs = new Map(); // url -> promise of an object URL

function say(text, isError = false) {
  element("message").textContent = text;
  element("message").className = isError ? "error" : "";
}

async function send(path, values) {
  const body = JSON.stringify({ annotator: name, window: windowName.value, ...values });
  const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  const result = await response.json();
  if (!response.ok && response.status !== 409) throw new Error(result.error);
  return result;
}

async function request(path, values) {
  if (pending !== null && pending.isSent) return;
  if (pending === null) pending = { path, values };
  pending.isSent = true;
  try {
    const result = await send(pending.path, pending.values);
    pending = null;
    say(result.error ?? result.save_error ?? "", Boolean(result.error ?? result.save_error));
    update(result);
  } catch (error) {
    pending.isSent = false;
    say(`Not saved: ${error.message} Press Enter to try again.`, true);
  }
}

function update(result) {
  items = result.items;
  last = result.last;
  drawProgress(result);
  for (const button of document.querySelectorAll("[data-do=undo]")) button.disabled = last === null;
  element("work").hidden = items.length === 0;
  element("finished").hidden = items.length > 0;
  loadAhead();
  if (items.length > 0) {
    show(items[0]);
  } else {
    shown = null;
    element("clips").replaceChildren();
    element("thanks").textContent =
      result.progress.left === 0
        ? "There is nothing left for you. Thank you!"
        : "Others are at work on what is left. This page looks every minute whether something comes back.";
    element("finished").focus();
  }
}

function drawProgress(result) {
  const { labelled, left, done, total, per_hour: perHour, seconds_left: secondsLeft } = result.progress;
  element("who").textContent = name;
  element("count").textContent = `${labelled} by you, ${left} left · ${done} of ${total} complete`;
  element("pace").textContent = perHour === null ? "" : `${Math.round(perHour)} an hour`;
  element("rest").textContent = secondsLeft === null ? "" : `about ${duration(secondsLeft)} left`;
  element("bar").value = labelled + left > 0 ? labelled / (labelled + left) : 1;
}

// Keeps what this window has reserved, and looks whether there is something again for who was done. What is shown never
// changes under the eyes of the one who looks at it.
async function stay() {
  if (name === null || pending !== null) return;
  try {
    const result = await send("/api/next", {});
    if (pending === null) (shown === null ? update : drawProgress)(result);
  } catch (error) {
    say(`The server does not answer: ${error.message}`, true);
  }
}
setInterval(stay, 60000);

function duration(seconds) {
  const minutes = Math.max(1, Math.round(seconds / 60));
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function loadAhead() {
  const wanted = new Set(items.flatMap((item) => item.clips.map((clip) => clip.url)));
  for (const [url, blob] of blobs) {
    if (!wanted.has(url)) {
      blobs.delete(url);
      blob.then(URL.revokeObjectURL, () => {});
    }
  }
  for (const url of wanted) {
    if (!blobs.has(url)) blobs.set(url, load(url));
  }
}

async function load(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error((await response.json()).error);
  return URL.createObjectURL(await response.blob());
}

const videos = () => [...document.querySelectorAll("#clips video")];

function show(item) {
  if (shown === item.item) return;
  shown = item.item;
  shownAt = performance.now();
  element("caption").textContent = item.caption;
  element("clips").replaceChildren(...item.clips.map((clip, index) => figure(item, clip, index)));
  const saved = JSON.parse(draft.get());
  answers = saved.item === item.item ? saved.answers : {};
  active = 0;
  drawAnswers();
}

function figure(item, clip, index) {
  const side = item.clips.length > 1 ? ["Left", "Right"][index] : "Clip";
  const video = document.createElement("video");
  Object.assign(video, { muted: true, playsInline: true, loop: item.clips.length === 1 });
  video.setAttribute("aria-label", `${side}: ${item.caption}`);
  video.dataset.fps = clip.fps ?? 16;
  video.addEventListener("ended", restart);
  if (index > 0) video.addEventListener("timeupdate", keepInStep);
  video.addEventListener("error", () => say("This clip cannot be played. Skip it, and tell whoever runs the study.", true));
  blobs.get(clip.url).then(
    (address) => {
      video.src = address;
      video.playbackRate = Number(element("speed").value);
      start();
    },
    (error) => {
      blobs.delete(clip.url);
      say(`This clip cannot be loaded: ${error.message}`, true);
    },
  );
  const box = document.createElement("figure");
  box.append(video);
  if (item.clips.length > 1) {
    const caption = document.createElement("figcaption");
    caption.textContent = side;
    box.append(caption);
  }
  return box;
}

// Clips of a pair begin together, and again when the longer one has ended.
function start() {
  const all = videos();
  if (all.every((video) => video.src)) Promise.all(all.map((video) => video.play())).catch(() => {});
  drawPlay();
}

function restart() {
  if (!videos().every((video) => video.ended)) return;
  for (const video of videos()) video.currentTime = 0;
  start();
}

function keepInStep() {
  const [left, right] = videos();
  if (right === undefined || [left, right].some((video) => video.ended || video.paused || video.seeking)) return;
  if (Math.abs(left.currentTime - right.currentTime) > 0.1) right.currentTime = left.currentTime;
}

function togglePlay() {
  const all = videos();
  if (all.some((video) => !video.paused && !video.ended)) {
    for (const video of all) video.pause();
  } else {
    for (const video of all) {
      if (!video.ended || all.every((each) => each.ended)) video.play().catch(() => {});
    }
  }
  drawPlay();
}

function step(direction) {
  const all = videos();
  for (const video of all) video.pause();
  // All from where the first is: the other was paused a moment later.
  const now = all[0].currentTime;
  for (const video of all) {
    const length = 1 / Number(video.dataset.fps);
    // To the middle of a frame, where no rounding can reach the one beside it.
    const frame = Math.floor(now / length + 1e-6) + direction;
    const count = Math.max(1, Math.round(video.duration / length));
    video.currentTime = (Math.min(Math.max(frame, 0), count - 1) + 0.5) * length;
  }
  drawPlay();
}

function drawPlay() {
  const isPlaying = videos().some((video) => !video.paused && !video.ended);
  document.querySelector("[data-do=play]").firstChild.textContent = isPlaying ? "Pause" : "Play";
}

function setSpeed(value) {
  element("speed").value = value;
  for (const video of videos()) video.playbackRate = Number(value);
}

function drawQuestions() {
  element("questions").replaceChildren(
    ...settings.questions.map((question, number) => {
      const box = document.createElement("fieldset");
      const legend = document.createElement("legend");
      legend.textContent = question.name.replaceAll("_", " ");
      const text = document.createElement("p");
      text.textContent = question.text;
      const choices = document.createElement("div");
      choices.className = "choices";
      settings.choices.forEach((choice, index) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = choice;
        button.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-keyshortcuts", String(index + 1));
        const key = document.createElement("kbd");
        key.textContent = index + 1;
        button.append(key);
        button.addEventListener("click", () => answer(number, choice));
        choices.append(button);
      });
      box.append(legend, text, choices);
      return box;
    }),
  );
}

function drawAnswers() {
  [...element("questions").children].forEach((box, number) => {
    const question = settings.questions[number];
    box.classList.toggle("active", number === active && settings.questions.length > 1);
    settings.choices.forEach((choice, index) => {
      box.querySelectorAll("button")[index].setAttribute("aria-pressed", String(answers[question.name] === choice));
    });
  });
  if (settings.kind === "pairs") {
    const chosen = Object.values(answers)[0];
    [...element("clips").children].forEach((box, index) => box.classList.toggle("chosen", chosen === ["left", "right"][index]));
  }
}

function answer(number, choice) {
  if (pending !== null || items.length === 0) return;
  answers[settings.questions[number].name] = choice;
  draft.set(JSON.stringify({ item: items[0].item, answers }));
  const open = settings.questions.findIndex((question) => !(question.name in answers));
  active = open < 0 ? number : open;
  drawAnswers();
  if (open < 0) {
    const seconds = Math.min((performance.now() - shownAt) / 1000, 9e5);
    request("/api/label", { item: items[0].item, answers, seconds, key: randomName() });
  }
}

const actions = {
  play: togglePlay,
  back: () => step(-1),
  forward: () => step(1),
  slower: () => setSpeed(speeds[Math.max(0, speeds.indexOf(element("speed").value) - 1)]),
  faster: () => setSpeed(speeds[Math.min(speeds.length - 1, speeds.indexOf(element("speed").value) + 1)]),
  skip: () => items.length > 0 && pending === null && request("/api/skip", { item: items[0].item, key: randomName() }),
  undo: () => {
    if (last === null || pending !== null) return;
    draft.set("{}");
    request("/api/undo", { item: last, key: randomName() });
  },
  leave: () => {
    localStorage.removeItem(annotator.key);
    sessionStorage.removeItem(windowName.key);
    location.reload();
  },
  retry: () => pending !== null && request(),
};
const keys = { " ": "play", ",": "back", ".": "forward", "-": "slower", "+": "faster", "=": "faster", z: "undo", Backspace: "undo", s: "skip" };
const pairKeys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" };

document.addEventListener("keydown", (event) => {
  const isForm = event.target.closest("select, input");
  if (element("hello").hidden === false || isForm || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const isButton = event.target.closest("button, summary");
  const choice = settings.kind === "pairs" && event.key in pairKeys ? pairKeys[event.key] : settings.choices[Number(event.key) - 1];
  if (choice !== undefined) {
    answer(active, choice);
  } else if (event.key === "Enter" && pending !== null) {
    actions.retry();
  } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    active = Math.min(Math.max(active + (event.key === "ArrowUp" ? -1 : 1), 0), settings.questions.length - 1);
    drawAnswers();
  } else if (event.key in keys && !(isButton && event.key === " ")) {
    actions[keys[event.key]]();
  } else {
    return;
  }
  event.preventDefault();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button !== null) actions[button.dataset.do]();
});
element("speed").addEventListener("change", (event) => {
  setSpeed(event.target.value);
  event.target.blur();
});

function begin(chosen) {
  name = chosen;
  annotator.set(name);
  element("hello").hidden = true;
  element("leave").hidden = false;
  request("/api/next", {});
}

element("hello").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(element("name").value.trim());
});

drawQuestions();
if (annotator.get() !== null && (settings.annotators.length === 0 || settings.annotators.includes(annotator.get()))) {
  begin(annotator.get());
} else {
  element("hello").hidden = false;
  element("name").focus();
}

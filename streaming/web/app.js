/** The page: wires what a person does to the conversation, and shows what becomes of it. */

import { Audio, FileError } from "./audio.js";
import { health, openSocket, token, whyRefused } from "./connection.js";
import { Talk } from "./talk.js";
import { explain } from "./problems.js";
import { browserStorage, loadSettings, parseSeed, saveSettings } from "./settings.js";
import { Spectrogram } from "./spectrogram.js";

const TAP_MS = 300; // shorter is a tap: the turn then lasts until the next one
const NOTE_MS = 8000;
const POLL_MS = 5000;

const $ = (id) => document.getElementById(id);
const storage = browserStorage("localStorage");
const settings = loadSettings(storage);
const spectrogram = new Spectrogram($("spectrogram"));
const audio = new Audio();
const conversation = new Talk({ audio, openSocket, whyRefused, settings: () => settings, changed, told });

// What a person does

let downAt = null; // when the button went down, while it is
let latched = false; // a tap began this turn

/** The button, or the space bar, goes down. */
function down() {
  if (downAt !== null) return;
  if (settings.handsFree) {
    if (conversation.handsFree) conversation.end();
    else conversation.listen();
  } else if (latched || conversation.playingFile) {
    latched = false;
    conversation.letGo();
  } else {
    downAt = performance.now();
    conversation.press();
  }
}

function up() {
  if (downAt === null) return;
  latched = performance.now() - downAt < TAP_MS;
  downAt = null;
  if (latched) changed();
  else conversation.letGo();
}

const talk = $("talk");
talk.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  talk.setPointerCapture(event.pointerId);
  down();
});
talk.addEventListener("pointerup", up);
talk.addEventListener("pointercancel", up);
talk.addEventListener("contextmenu", (event) => event.preventDefault());
talk.addEventListener("click", (event) => {
  if (event.detail !== 0) return; // a pointer's, which has been seen; this is a screen reader's or the Enter key's
  down();
  up();
});
addEventListener("blur", up);
addEventListener("pagehide", () => conversation.end());

const KEYS = { KeyO: "choose", KeyR: "repeat", KeyD: "download", KeyN: "over" };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, summary, form")) return;
  const elsewhere = event.target.closest("button:not(#talk)") !== null;
  if (event.code === "Space" && !elsewhere) {
    event.preventDefault();
    if (!event.repeat) down();
  } else if (event.code === "Escape") {
    stop();
  } else if (event.code === "KeyH") {
    chooseWay(!settings.handsFree);
  } else if (event.code in KEYS && !event.repeat) {
    $(KEYS[event.code]).click();
  }
});
addEventListener("keyup", (event) => {
  if (event.code !== "Space" || (downAt === null && event.target !== talk)) return;
  event.preventDefault(); // on the button it would be a click
  up();
});
addEventListener("click", (event) => {
  const control = event.target.closest("button, [type=radio], [type=checkbox]");
  if (event.detail > 0) control?.blur(); // so that the space bar is for talking again
});

function stop() {
  [latched, downAt] = [false, null];
  conversation.dismiss();
  conversation.end();
}

function chooseWay(handsFree) {
  if (handsFree === settings.handsFree) return;
  change({ handsFree });
  document.querySelector(`[name=way][value=${handsFree ? "free" : "hold"}]`).checked = true;
  stop();
}

for (const way of document.querySelectorAll("[name=way]")) {
  way.addEventListener("change", () => chooseWay(way.value === "free"));
}
$("repeat").addEventListener("click", () => conversation.repeat());
$("over").addEventListener("click", () => {
  [latched, downAt] = [false, null];
  conversation.dismiss();
  conversation.startOver();
});
$("dismiss").addEventListener("click", () => conversation.dismiss());
$("download").addEventListener("click", () => {
  if (!conversation.hasSound) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(conversation.tape.wav());
  link.download = `conversation-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.wav`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("token").value.trim();
  if (!token.isPossible(text)) {
    told("That is no token: they have 16 or more letters, digits and -._~+");
    return;
  }
  token.set(text);
  $("token").value = "";
  conversation.dismiss();
  told("Token kept. Press to begin.");
});

// Files

async function play(file) {
  if (!file) return;
  latched = false;
  try {
    await conversation.playFile(await file.arrayBuffer());
  } catch (error) {
    if (!(error instanceof FileError)) throw error;
    told(`${file.name}: ${error.message}.`);
  }
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  play($("file").files[0]);
  $("file").value = "";
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  play(event.dataTransfer.files[0]);
});

// Settings

function change(some) {
  Object.assign(settings, some);
  saveSettings(storage, settings);
}

function bindNumber(id, name, written) {
  const [input, output] = [$(id), document.querySelector(`output[for=${id}]`)];
  const show = () => output && (output.textContent = written(settings[name]));
  input.value = settings[name];
  show();
  input.addEventListener("input", () => {
    const valid = input.value !== "" && input.checkValidity();
    input.setAttribute("aria-invalid", String(!valid));
    if (!valid) return;
    change({ [name]: Number(input.value) });
    show();
    if (name !== "silenceMs") conversation.settingsChanged();
  });
}

function bindSwitch(id, name) {
  $(id).checked = settings[name];
  $(id).addEventListener("change", () => {
    change({ [name]: $(id).checked });
    told("From the next time that the microphone is opened.");
  });
}

bindNumber("temperature", "temperature", (value) => value.toFixed(2));
bindNumber("max-seconds", "maxSeconds", (value) => `${value} s`);
bindNumber("silence", "silenceMs", (value) => `${value} ms`);
bindNumber("top-k", "topK", String);
$("top-p").value = settings.topP ?? "";
$("top-p").addEventListener("input", () => {
  const valid = $("top-p").checkValidity();
  $("top-p").setAttribute("aria-invalid", String(!valid));
  if (!valid) return;
  change({ topP: $("top-p").value === "" ? null : Number($("top-p").value) });
  conversation.settingsChanged();
});
bindSwitch("echo", "echoCancellation");
bindSwitch("noise", "noiseSuppression");
bindSwitch("gain", "autoGainControl");
$("seed").value = settings.seed ?? "";
$("seed").addEventListener("input", () => {
  const seed = parseSeed($("seed").value);
  $("seed").setAttribute("aria-invalid", String(seed === undefined));
  if (seed !== undefined) change({ seed });
});
if (settings.handsFree) document.querySelector("[name=way][value=free]").checked = true;
$("settings").open = matchMedia("(min-width: 900px)").matches;
$("host").textContent = location.host;

// The server's figures

let figures = null;

async function poll() {
  if (document.hidden) return;
  figures = await health();
  if (figures?.status === "ready" && conversation.problem?.code === "gone") {
    conversation.dismiss();
    told("The server is back.");
  }
  if (figures?.free && conversation.problem?.code === "full") {
    conversation.dismiss();
    told("A place is free now: press to begin.");
  }
  changed();
}

setInterval(poll, POLL_MS);
document.addEventListener("visibilitychange", poll);
poll();

// What is shown

let dirty = true;
let noteTimer;

function changed() {
  dirty = true;
}

function told(text) {
  $("note").textContent = text;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => ($("note").textContent = ""), NOTE_MS);
}

const HOLD = "Hold and talk";
const AWAY = ["The connection broke", "It is being restored. What you say is kept until then."];
const gestured = () => navigator.userActivation?.hasBeenActive ?? true;

/** [on the button, the state, a hint] for what is going on. */
function words() {
  const free = settings.handsFree;
  switch (conversation.phase) {
    case "connecting":
      if (!gestured()) return ["…", "Click anywhere", "A browser plays nothing before the first click."];
      if (conversation.asking) return ["…", "May it hear you?", "The browser asks: allow the microphone."];
      return ["…", "Connecting", "What you say is kept until it can be sent."];
    case "queued":
      return ["…", `In line: place ${conversation.place}`, "It begins by itself as soon as there is room."];
    case "talking":
      if (conversation.playingFile) return ["Go on now", "Your recording", "Press to hand over before its end."];
      if (conversation.handsFree) return ["Stop", "You are speaking", "Pause, and it goes on."];
      return [latched ? "Press to hand over" : "Let go", "You are speaking", "Then it goes on in your voice."];
    case "waiting":
      return [conversation.handsFree ? "Stop" : "…", "Handing over", ""];
    case "speaking":
      return conversation.handsFree
        ? ["Stop", "It goes on", "Speak to interrupt it. Headphones keep it from hearing itself."]
        : ["Interrupt", "It goes on", "Hold and talk to interrupt it."];
    case "ready":
      if (conversation.handsFree) return ["Stop", "Listening", "Just talk. Pause, and it goes on."];
      return [HOLD, "Your turn", "It remembers what was said, and what you heard of its answer."];
    case "problem":
      return [free ? "Try again" : HOLD, "", "Press to try again."];
    default:
      if (free) return ["Listen", "Ready", "Press once. Then just talk; pause, and it goes on in your voice."];
      return [HOLD, "Ready", "Let go, and it goes on in your voice. A tap works too."];
  }
}

function show() {
  const { phase } = conversation;
  document.body.dataset.phase = phase;
  document.body.classList.toggle("sound", conversation.hasSound);
  if (phase !== "talking" && phase !== "connecting") latched = false;
  const [label, ...about] = words();
  const [state, hint] = conversation.away ? AWAY : about;
  write($("label"), label);
  write($("state"), state);
  write($("hint"), hint);
  $("repeat").disabled = !conversation.canRepeat;
  $("download").disabled = !conversation.hasSound;
  $("over").disabled = !conversation.hasSound;
  showProblem(conversation.problem);
  showFigures(conversation.figures);
  showServer();
}

function showProblem(problem) {
  const panel = $("problem");
  const key = JSON.stringify(problem);
  if (panel.dataset.shown === key) return;
  panel.dataset.shown = key;
  panel.hidden = problem === null;
  if (problem === null) return;
  const { title, lines } = explain(problem.code, problem.message);
  $("problem-title").textContent = title;
  $("problem-lines").replaceChildren(...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })));
  $("token-form").hidden = problem.code !== "unauthorized";
  if (problem.code === "unauthorized") $("token").focus();
}

function showFigures({ firstSoundMs, bufferMs, targetMs, underruns, stepMs, seed, topP }) {
  const step = stepMs ?? figures?.step_ms_p50 ?? null;
  write($("first-sound"), firstSoundMs === null ? "–" : `${Math.round(firstSoundMs)} ms`);
  write($("buffer"), bufferMs === null ? "–" : `${Math.round(bufferMs)} ms`, targetMs === null ? "" : `starts at ${targetMs}`);
  write($("underruns"), bufferMs === null ? "–" : String(underruns));
  write($("step"), step === null ? "–" : `${step.toFixed(1)} ms`);
  if (topP !== null && settings.topP === null) $("top-p").placeholder = String(topP);
  write($("seed-used"), seed === null ? "–" : String(seed));
  write($("slots"), figures === null ? "–" : String(figures.free), figures === null ? "" : `of ${figures.slots}`);
}

function showServer() {
  const state = figures?.status !== "ready" ? "gone" : figures.free ? "ready" : "full";
  const says = { gone: figures === null ? "no answer" : figures.status, ready: "ready", full: "full" }[state];
  $("server").dataset.state = state;
  write($("server-text"), figures === null ? "the server does not answer" : `${figures.model || "server"}: ${says}`);
}

/** Text, and a smaller rest; the page is touched only where something changed, lest screen readers say it again. */
function write(element, text, rest = "") {
  const key = `${text} ${rest}`;
  if (element.dataset.text === key) return;
  element.dataset.text = key;
  element.textContent = text;
  if (rest) element.append(" ", Object.assign(document.createElement("small"), { textContent: rest }));
}

function paint() {
  requestAnimationFrame(paint);
  conversation.tick();
  const { tape } = conversation;
  if (!dirty && !tape?.rolling) return;
  dirty = false;
  show();
  talk.style.setProperty("--level", conversation.level.toFixed(3));
  spectrogram.draw(tape, tape?.end ?? 0);
}

matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => {
  spectrogram.recolour();
  changed();
});
addEventListener("resize", changed);
if (!isSecureContext) conversation.cannot("insecure");
requestAnimationFrame(paint);

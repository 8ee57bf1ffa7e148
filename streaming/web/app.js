/** The page: wires what a person does to the conversation, and shows what becomes of it. */

import { Audio, FileError } from "./audio.js";
import { health, openSocket, token, whyRefused } from "./connection.js";
import { listenToKeys } from "./keys.js";
import { Notes } from "./notes.js";
import { explain } from "./problems.js";
import { bindSettings } from "./settings-form.js";
import { browserStorage, loadSettings, saveSettings } from "./settings.js";
import { SoundPanel } from "./sound-panel.js";
import { Spectrogram } from "./spectrogram.js";
import { Talk } from "./talk.js";
import { words } from "./words.js";

const TAP_MS = 300; // shorter is a tap: the turn then lasts until the next one
const POLL_MS = 5000;

const $ = (id) => document.getElementById(id);
const storage = browserStorage("localStorage");
const settings = loadSettings(storage);
const spectrogram = new Spectrogram($("spectrogram"));
const notes = new Notes();
const audio = new Audio();
const conversation = new Talk({
  audio,
  openSocket,
  whyRefused,
  settings: () => settings,
  changed,
  told,
  withdrawn: (topic) => notes.withdraw(topic),
});
const sound = new SoundPanel({ audio, conversation, settings, change });

function change(some) {
  Object.assign(settings, some);
  saveSettings(storage, settings);
}

function told(text, about) {
  notes.tell(text, about);
  changed();
}

// What a person does

let downAt = null; // when the button went down, while it is

/** The button, or the space bar, goes down. timeStamp: of the event; it is handled later where opening a device holds the page. */
function down({ timeStamp }) {
  if (downAt !== null) return;
  const { phase } = conversation;
  if (phase === "queued") {
    conversation.end();
    told("You have left the line.");
  } else if (settings.handsFree) {
    if (phase === "idle" || phase === "problem" || phase === "replaying") conversation.listen();
    else conversation.end();
  } else if (conversation.playingFile || conversation.grip === "latched") {
    conversation.letGo();
  } else if (phase === "connecting" && conversation.grip === "free") {
    conversation.end();
  } else {
    downAt = timeStamp;
    conversation.press();
  }
}

/** False where it was not down. */
function up({ timeStamp }) {
  if (downAt === null) return false;
  const tapped = timeStamp - downAt < TAP_MS;
  downAt = null;
  if (tapped) conversation.latch();
  else conversation.letGo();
  return true;
}

const talk = $("talk");
talk.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  talk.setPointerCapture(event.pointerId);
  down(event);
});
talk.addEventListener("pointerup", up);
talk.addEventListener("pointercancel", up);
talk.addEventListener("contextmenu", (event) => event.preventDefault());
talk.addEventListener("click", (event) => {
  if (event.detail !== 0) return; // a pointer's, which has been seen; this is a screen reader's or the Enter key's
  down(event);
  up(event);
});
addEventListener("blur", up);
addEventListener("pagehide", () => conversation.end());

const press = (id) => () => $(id).click();
const letters = {
  KeyO: press("choose"),
  KeyT: press("take"),
  KeyR: press("repeat"),
  KeyP: press("replay"),
  KeyD: press("download"),
  KeyN: press("over"),
  KeyH: () => chooseWay(!settings.handsFree),
};
listenToKeys({ letters, hasLetters: () => settings.singleKeys, down, up, stop });

function stop() {
  downAt = null;
  if (conversation.phase === "replaying") {
    conversation.stopReplay();
    return;
  }
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
if (settings.handsFree) document.querySelector("[name=way][value=free]").checked = true;
$("take").addEventListener("click", () => conversation.takeAgain());
$("repeat").addEventListener("click", () => conversation.repeat());
$("replay").addEventListener("click", () => {
  if (conversation.phase === "replaying") conversation.stopReplay();
  else conversation.replay();
});
$("dismiss").addEventListener("click", () => conversation.dismiss());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("token").value.trim();
  const possible = token.isPossible(text);
  $("token").setAttribute("aria-invalid", String(!possible));
  $("token-says").textContent = possible ? "" : "A token has 16 or more letters, digits and -._~+";
  if (!possible) return;
  token.set(text);
  $("token").value = "";
  conversation.dismiss();
  told("The token is kept. Press to begin.", { topic: "token" });
});

// Nothing that was not downloaded is lost without a question

let downloaded = 0; // the end of the tape when it was downloaded last

const isUnsaved = () => conversation.hasSound && conversation.tape.end > downloaded;

function download() {
  if (!conversation.hasSound) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(conversation.tape.wav());
  link.download = `conversation-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.wav`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  downloaded = conversation.tape.end;
}

function startOver() {
  [downAt, downloaded] = [null, 0];
  conversation.dismiss();
  conversation.startOver();
}

$("download").addEventListener("click", download);
$("over").addEventListener("click", () => {
  if (isUnsaved()) $("discard").showModal();
  else startOver();
});
$("discard").addEventListener("close", () => {
  const answer = $("discard").returnValue;
  $("discard").returnValue = "keep"; // what Esc means the next time
  if (answer === "download") download();
  if (answer === "download" || answer === "discard") startOver();
});
addEventListener("beforeunload", (event) => isUnsaved() && event.preventDefault());

// Files

async function play(file) {
  if (!file) return;
  try {
    notes.withdraw("file");
    await conversation.playFile(await file.arrayBuffer());
  } catch (error) {
    if (!(error instanceof FileError)) throw error;
    told(`${file.name}: ${error.message}.`, { rank: "error", topic: "file" });
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

// Settings, devices

bindSettings(settings, {
  change,
  sampled: () => conversation.settingsChanged(),
  opened: () => conversation.changeMicrophone(),
});
audio.onDevices = (permission) => {
  sound.list();
  if (permission === "granted" && conversation.problem?.code === "microphone_denied") {
    conversation.dismiss();
    told("The microphone is allowed now.", { topic: "microphone" });
  }
};
$("host").textContent = location.host;

// The server's figures

let figures = null;
let asked = false; // whether the server has been asked

async function poll() {
  if (document.hidden) return;
  figures = await health();
  asked = true;
  if (figures?.status === "ready" && ["gone", "lost", "stopping"].includes(conversation.problem?.code)) {
    if (conversation.problem.code === "gone") conversation.dismiss();
    told("The server is there again.", { topic: "server" });
  }
  if (figures?.free && conversation.problem?.code === "full") {
    conversation.dismiss();
    told("A place is free now: press to begin.", { topic: "server" });
  }
  changed();
}

setInterval(poll, POLL_MS);
document.addEventListener("visibilitychange", poll);
poll();

/** As `words` wants it. */
function serverState() {
  if (!asked) return "unknown";
  if (figures === null || figures.status === "failed") return "gone";
  if (figures.status !== "ready") return "stopping";
  if (figures.free) return "ready";
  return figures.waiting < figures.queue ? "line" : "full";
}

// What is shown

let dirty = true;

function changed() {
  dirty = true;
}

function show() {
  const { phase, problem, handsFree } = conversation;
  document.body.dataset.phase = phase;
  document.body.classList.toggle("sound", conversation.hasSound);
  document.body.classList.toggle("stops", handsFree && phase !== "idle" && phase !== "problem");
  document.body.classList.toggle("muted", conversation.microphone === "muted");
  const gestured = navigator.userActivation?.hasBeenActive ?? true;
  const says = words(conversation, { handsFree: settings.handsFree, server: serverState(), gestured });
  write($("label"), says.label);
  write($("state"), says.state);
  write($("hint"), says.hint);
  if (phase === "replaying") write($("replay-label"), "Stop");
  else write($("replay-label"), "Play again", "", 1);
  $("take").disabled = !conversation.canTake;
  showTakes(conversation.takes, conversation.keptTake);
  $("repeat").disabled = !conversation.canRepeat;
  $("replay").disabled = !conversation.canReplay && phase !== "replaying";
  $("download").disabled = !conversation.hasSound;
  $("over").disabled = !conversation.hasSound;
  showProblem(problem);
  showFigures(conversation.figures);
  showServer();
}

function showNote() {
  const note = notes.shown;
  write($("note"), note?.text ?? "");
  $("note").dataset.rank = note?.rank ?? "";
}

/** A button for each take of the last words, once there is a choice. */
function showTakes(takes, kept) {
  const box = $("takes");
  const key = takes.map(({ turn }) => turn).join();
  if (box.dataset.shown !== key) {
    box.dataset.shown = key;
    box.hidden = takes.length < 2;
    const make = ({ turn, number }) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: `Take ${number}` });
      button.addEventListener("click", () => conversation.keepTake(turn));
      return button;
    };
    box.replaceChildren(...takes.map(make));
  }
  takes.forEach(({ turn }, index) => box.children[index].setAttribute("aria-pressed", String(turn === kept)));
}

function showProblem(problem) {
  const panel = $("problem");
  const key = JSON.stringify(problem);
  if (panel.dataset.shown === key) return;
  panel.dataset.shown = key;
  panel.hidden = problem === null;
  $("said").hidden = problem !== null;
  if (problem === null) return;
  const { title, lines } = explain(problem.code, problem.message);
  $("problem-title").textContent = title;
  $("problem-lines").replaceChildren(...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })));
  $("token-form").hidden = problem.code !== "unauthorized";
  $("token-says").textContent = "";
  if (problem.code === "unauthorized") $("token").focus();
}

function showFigures({ firstSoundMs, bufferMs, targetMs, underruns, stepMs, seed, topP }) {
  const step = stepMs ?? figures?.step_ms_p50 ?? null;
  write($("first-sound"), firstSoundMs === null ? "–" : `${Math.round(firstSoundMs)} ms`);
  write($("buffer"), bufferMs === null ? "–" : `${Math.round(bufferMs)} ms`, targetMs === null ? "" : `starts at ${targetMs}`);
  write($("underruns"), bufferMs === null ? "–" : String(underruns));
  write($("step"), step === null ? "–" : `${step.toFixed(1)} ms`);
  if (topP !== null && settings.topP === null) $("top-p").placeholder = String(topP);
  write($("seed-used"), seed === null ? "–" : seed);
  write($("slots"), figures === null ? "–" : String(figures.free), figures === null ? "" : `of ${figures.slots}`);
}

function showServer() {
  const state = serverState();
  const says = { unknown: "…", gone: "no answer", stopping: "stopping", line: "full", full: "full", ready: "ready" }[state];
  $("server").dataset.state = state === "line" ? "full" : state;
  write($("server-text"), figures === null ? `the server: ${says}` : `${figures.model || "server"}: ${says}`);
  write($("notice"), figures?.notice ?? "");
}

/** Text, and a smaller rest; the page is touched only where something changed, lest screen readers say it again.
 * underlined: how many of the first letters are the key that does the same. */
function write(element, text, rest = "", underlined = 0) {
  const key = `${text} ${rest}`;
  if (element.dataset.text === key) return;
  element.dataset.text = key;
  const make = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });
  element.replaceChildren(...(underlined ? [make("u", text.slice(0, underlined))] : []), text.slice(underlined));
  if (rest) element.append(" ", make("small", rest));
}

function paint() {
  requestAnimationFrame(paint);
  conversation.tick();
  sound.show();
  showNote();
  const { tape, playhead } = conversation;
  if (!dirty && !tape?.rolling && playhead === null) return;
  dirty = false;
  show();
  talk.style.setProperty("--level", conversation.level.toFixed(3));
  spectrogram.draw(tape, playhead ?? tape?.end ?? 0);
}

matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => {
  spectrogram.recolour();
  changed();
});
addEventListener("resize", changed);
if (!isSecureContext) conversation.cannot("insecure");
audio.mayUseMicrophone();
requestAnimationFrame(paint);

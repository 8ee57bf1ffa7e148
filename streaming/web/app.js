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
import { suggestion, words } from "./words.js";

const TAP_MS = 300; // shorter is a tap: the turn then lasts until the next one
const POLL_MS = 5000;

const $ = (id) => document.getElementById(id);
const storage = browserStorage("localStorage");
const settings = loadSettings(storage);
const spectrogram = new Spectrogram($("spectrogram"));
const notes = new Notes();
const audio = new Audio();
const talk = new Talk({
  audio,
  openSocket,
  whyRefused,
  settings: () => settings,
  changed,
  told,
  withdrawn: (topic) => notes.withdraw(topic),
});
const sound = new SoundPanel({ audio, talk, settings, change });

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

/**
 * The button, or the space bar, goes down. timeStamp: of the event; it is handled later where opening a device holds
 * the page.
 */
function down({ timeStamp }) {
  if (downAt !== null) return;
  const { phase } = talk;
  if (phase === "queued") {
    talk.end();
    told("You have left the line.");
  } else if (settings.handsFree) {
    if (phase === "idle" || phase === "problem" || phase === "replaying") talk.listen();
    else talk.end();
  } else if (talk.playingFile || talk.grip === "latched") {
    talk.letGo();
  } else if (phase === "connecting" && talk.grip === "free") {
    talk.end();
  } else {
    downAt = timeStamp;
    talk.press();
  }
}

/** False where it was not down. */
function up({ timeStamp }) {
  if (downAt === null) return false;
  const tapped = timeStamp - downAt < TAP_MS;
  downAt = null;
  if (tapped) talk.latch();
  else talk.letGo();
  return true;
}

const talkButton = $("talk");
talkButton.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  talkButton.setPointerCapture(event.pointerId);
  down(event);
});
talkButton.addEventListener("pointerup", up);
talkButton.addEventListener("pointercancel", up);
talkButton.addEventListener("contextmenu", (event) => event.preventDefault());
talkButton.addEventListener("click", (event) => {
  if (event.detail !== 0) return; // a pointer's, which has been seen; this is a screen reader's or the Enter key's
  down(event);
  up(event);
});
addEventListener("blur", up);
addEventListener("pagehide", () => talk.end());

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
  if (talk.phase === "replaying") {
    talk.stopReplay();
    return;
  }
  talk.dismiss();
  talk.end();
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
$("take").addEventListener("click", () => talk.takeAgain());
$("repeat").addEventListener("click", () => talk.repeat());
$("replay").addEventListener("click", () => {
  if (talk.phase === "replaying") talk.stopReplay();
  else talk.replay();
});
$("dismiss").addEventListener("click", () => talk.dismiss());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("token").value.trim();
  const possible = token.isPossible(text);
  $("token").setAttribute("aria-invalid", String(!possible));
  $("token-says").textContent = possible ? "" : "A token has 16 or more letters, digits and -._~+";
  if (!possible) return;
  token.set(text);
  $("token").value = "";
  talk.dismiss();
  told("The token is kept. Press to begin.", { topic: "token" });
});

// Nothing that was not downloaded is lost without a question

let downloaded = 0; // the end of the tape when it was downloaded last

const isUnsaved = () => talk.hasSound && talk.tape.end > downloaded;

function download() {
  if (!talk.hasSound) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(talk.tape.wav());
  link.download = `conversation-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.wav`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  downloaded = talk.tape.end;
}

function startOver() {
  [downAt, downloaded] = [null, 0];
  talk.dismiss();
  talk.startOver();
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
    await talk.playFile(await file.arrayBuffer());
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
  sampled: () => talk.settingsChanged(),
  opened: () => talk.changeMicrophone(),
});
audio.onDevices = (permission) => {
  sound.list();
  if (permission === "granted" && talk.problem?.code === "microphone_denied") {
    talk.dismiss();
    told("The microphone is allowed now.", { topic: "microphone" });
  }
};
$("settings").addEventListener("toggle", () => $("settings").open && $("settings").scrollIntoView({ block: "nearest" }));
$("host").textContent = location.host;

// The server's figures

let figures = null; // of its last answer, null where it gave none
let model = {}; // what it said last of its model: that stays where it is, whether it answers or not
let asked = false; // whether the server has been asked

async function poll() {
  if (document.hidden) return;
  figures = await health();
  model = figures ?? model;
  asked = true;
  if (figures?.status === "ready" && ["gone", "lost", "stopping"].includes(talk.problem?.code)) {
    if (talk.problem.code === "gone") talk.dismiss();
    told("The server is back.", { topic: "server" });
  }
  if (figures?.free && talk.problem?.code === "full") {
    talk.dismiss();
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
  const { phase, problem, handsFree } = talk;
  document.body.dataset.phase = phase;
  document.body.classList.toggle("sound", talk.hasSound);
  document.body.classList.toggle("stops", handsFree && phase !== "idle" && phase !== "problem");
  document.body.classList.toggle("muted", talk.microphone === "muted");
  const gestured = navigator.userActivation?.hasBeenActive ?? true;
  const says = words(talk, { handsFree: settings.handsFree, server: serverState(), gestured });
  write($("label"), says.label);
  write($("state"), says.state);
  write($("hint"), says.hint);
  if (phase === "replaying") write($("replay-label"), "Stop");
  else write($("replay-label"), "Play again", "", 1);
  $("take").disabled = !talk.canTake;
  showTakes(talk.takes, talk.keptTake);
  $("repeat").disabled = !talk.canRepeat;
  $("replay").disabled = !talk.canReplay && phase !== "replaying";
  $("download").disabled = !talk.hasSound;
  $("over").disabled = !talk.hasSound;
  showProblem(problem);
  showFigures(talk.figures);
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
      button.addEventListener("click", () => talk.keepTake(turn));
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
  const own = ["ready", "line", "full"].includes(state) && talk.connected; // full, perhaps, by this very talk
  $("server").dataset.state = own ? "ready" : state === "line" ? "full" : state;
  write($("server-text"), `${model.model || "the server"}: ${own ? "connected" : says}`);
  write($("notice"), model.notice ?? "");
  const suggested = suggestion(model.suggestions ?? []);
  write($("suggestion"), suggested);
  $("suggestion").hidden = suggested === "";
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
  talk.tick();
  sound.show();
  showNote();
  const { tape, playhead } = talk;
  if (!dirty && !tape?.rolling && playhead === null) return;
  dirty = false;
  show();
  talkButton.style.setProperty("--level", talk.level.toFixed(3));
  spectrogram.draw(tape, playhead ?? tape?.end ?? 0);
}

matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => {
  spectrogram.recolour();
  changed();
});
addEventListener("resize", changed);
new ResizeObserver(changed).observe($("spectrogram")); // the settings take room from it
if (!isSecureContext) talk.cannot("insecure");
audio.mayUseMicrophone();
requestAnimationFrame(paint);

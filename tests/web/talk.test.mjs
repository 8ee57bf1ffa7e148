// The talk against a socket and a device that tests play: who speaks when, and what the server is told.

import assert from "node:assert/strict";
import test from "node:test";

import { AudioError } from "../../streaming/web/audio.js";
import { Talk } from "../../streaming/web/talk.js";
import { Notes } from "../../streaming/web/notes.js";
import { FakeAudio, FakeSocket } from "./fakes.mjs";

const FRAME = 1920;
const settled = () => new Promise((resolve) => setTimeout(resolve));

function begin(more = {}) {
  const audio = new FakeAudio();
  const [sockets, notes] = [[], []];
  const settings = { temperature: 0.8, topK: 30, maxSeconds: 5, silenceMs: 480, seed: "7", echoCancellation: true };
  const about = new Notes(() => 0);
  const talk = new Talk({
    audio,
    openSocket: () => sockets[sockets.push(new FakeSocket()) - 1],
    whyRefused: async () => "gone",
    settings: () => settings,
    changed: () => {},
    told: (text, what) => {
      notes.push(text);
      about.tell(text, what);
    },
    withdrawn: (topic) => about.withdraw(topic),
    ...more,
  });
  const start = (turn = 1, resume = undefined) => {
    sockets.at(-1).open();
    sockets.at(-1).say({ type: "session.started", turn, notice: null, resume });
  };
  return { audio, sockets, notes, about, settings, talk, start };
}

async function spoken() {
  const all = begin();
  await all.talk.press();
  all.start();
  all.audio.talk(400);
  await all.talk.letGo();
  const [socket] = all.sockets;
  socket.say({ type: "turn.speaking", turn: 1 });
  for (let frame = 0; frame < 5; frame++) socket.speak(1, frame * FRAME, FRAME);
  return { ...all, socket };
}

test("a whole turn: press, talk, let go, hear, and the machine is heard to its end", async () => {
  const { audio, talk, socket } = await spoken();
  assert.equal(talk.phase, "waiting");
  assert.deepEqual(socket.story(), ["audio", "speak"]);
  assert.equal(socket.said()[0].sampling.seed, 7);
  audio.frame += 4800;
  audio.play(FRAME);
  assert.equal(talk.phase, "speaking");
  assert.equal(Math.round(talk.figures.firstSoundMs), 110, "100 ms by the clock, and 10 in the device");
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 5 * FRAME, mean_step_ms: 12 });
  assert.equal(audio.completed, 1);
  audio.play(4 * FRAME, true);
  assert.equal(talk.phase, "ready");
  assert.equal(talk.figures.stepMs, 12);
  assert.deepEqual(socket.said().filter(({ type }) => type === "played").map(({ samples }) => samples), [FRAME, 5 * FRAME]);
  await talk.press();
  audio.talk(100);
  await talk.letGo();
  assert.deepEqual(socket.said().at(-1), { type: "speak", turn: 2 });
});

test("the voice that it goes on in is that of the turn which is heard", async () => {
  const { audio, talk, socket } = await spoken();
  socket.say({ type: "turn.voice", turn: 2, voice: "a high voice" });
  assert.equal(talk.voice, null);
  socket.say({ type: "turn.voice", turn: 1, voice: "a deep voice" });
  audio.play(FRAME);
  assert.deepEqual([talk.phase, talk.voice], ["speaking", "a deep voice"]);
  await talk.press();
  assert.equal(talk.voice, null);
});

test("what is said before the session has started is not lost, and letting go early is remembered", async () => {
  const { audio, talk, sockets, start } = begin();
  await talk.press();
  audio.talk(200);
  await talk.letGo();
  assert.equal(talk.phase, "connecting");
  assert.deepEqual(sockets[0].sent, []);
  start();
  assert.deepEqual(sockets[0].story(), ["audio", "speak"]);
  assert.equal(sockets[0].heard().length, 10);
  assert.equal(talk.phase, "waiting");
});

test("pressing while it speaks interrupts: first what was heard, then speech of the next turn", async () => {
  const { audio, talk, socket } = await spoken();
  audio.play(FRAME + 5);
  await talk.press();
  audio.talk(100);
  await talk.letGo();
  assert.deepEqual(socket.story(), ["audio", "speak", "played", "interrupt", "audio", "speak"]);
  assert.deepEqual(socket.said().find(({ type }) => type === "interrupt"), { type: "interrupt", turn: 1, heard_samples: FRAME + 5 });
  assert.equal(socket.heard().at(-1).turn, 2);
  assert.ok(audio.hasMicrophone);
  socket.speak(1, 5 * FRAME, FRAME);
  assert.deepEqual(audio.pushed, [1, 1, 1, 1, 1], "the rest of an old turn goes nowhere");
});

test("a talk that ended while a voice interrupted it stays ended", async () => {
  // The page said that it listened, with the microphone closed and no session behind it.
  const { audio, talk, sockets, start } = begin();
  await talk.listen();
  start();
  const [socket] = sockets;
  audio.talk(100);
  socket.say({ type: "speech.stopped", turn: 1, at_samples: 2400 });
  socket.say({ type: "turn.speaking", turn: 1 });
  socket.speak(1, 0, FRAME);
  audio.play(FRAME);
  const answerStop = audio.holdStop();
  socket.say({ type: "speech.started", turn: 1, at_samples: 2400 });
  socket.end(1006);
  await settled();
  answerStop(); // the device is slower than the network
  await settled();
  assert.deepEqual([talk.phase, talk.problem.code, audio.hasMicrophone], ["problem", "lost", false]);
  assert.deepEqual(talk.tape.marks.map(({ kind }) => kind), ["turn"], "nobody interrupted what was over");
});

test("pressing before the first sound interrupts too: nothing was heard", async () => {
  const { talk, socket } = await spoken();
  await talk.press();
  assert.deepEqual(socket.said().at(-1), { type: "interrupt", turn: 1, heard_samples: 0 });
  assert.equal(talk.phase, "talking");
});

test("a tap that said nothing asks for nothing, and what little was said belongs to the next prompt", async () => {
  const { audio, talk, sockets, notes, start } = begin();
  await talk.press();
  start();
  audio.talk(40);
  await talk.letGo();
  assert.equal(talk.phase, "ready");
  assert.match(notes[0], /too short/);
  await talk.press();
  audio.talk(60);
  await talk.letGo();
  assert.deepEqual(sockets[0].story(), ["audio", "speak"]);
});

test("hands-free: the server hears the turns, and a voice interrupts", async () => {
  const { audio, talk, sockets, start } = begin();
  await talk.listen();
  start();
  const [socket] = sockets;
  assert.equal(socket.said()[0].turn_taking, "vad");
  assert.equal(talk.phase, "ready");
  audio.talk(1000);
  socket.say({ type: "speech.started", turn: 1, at_samples: 480 });
  assert.equal(talk.phase, "talking");
  socket.say({ type: "speech.stopped", turn: 1, at_samples: 12_000 });
  assert.equal(talk.phase, "waiting");
  socket.say({ type: "turn.speaking", turn: 1 });
  socket.speak(1, 0, FRAME);
  audio.talk(100);
  audio.play(FRAME);
  assert.equal(Math.round(talk.figures.firstSoundMs), 610, "since speech ended at 500 ms, not since that was sure");
  socket.say({ type: "speech.started", turn: 1, at_samples: 30_000 });
  await settled();
  assert.deepEqual(socket.said().at(-1), { type: "interrupt", turn: 1, heard_samples: FRAME });
  assert.equal(talk.phase, "talking");
  socket.say({ type: "turn.done", turn: 1, reason: "interrupted", samples: FRAME, mean_step_ms: 9 });
  socket.say({ type: "speech.stopped", turn: 2, at_samples: 40_000 });
  assert.equal(talk.phase, "waiting");
  await talk.end();
  assert.equal(talk.phase, "idle");
  assert.equal(audio.hasMicrophone, false, "the microphone is closed when nobody listens");
  assert.equal(socket.closed, 1000);
});

async function handsFreeSpoken() {
  const all = begin();
  await all.talk.listen();
  all.start();
  const [socket] = all.sockets;
  all.audio.talk(100);
  socket.say({ type: "speech.stopped", turn: 1, at_samples: 2400 });
  socket.say({ type: "turn.speaking", turn: 1 });
  for (let frame = 0; frame < 3; frame++) socket.speak(1, frame * FRAME, FRAME);
  all.audio.play(2 * FRAME);
  return { ...all, socket };
}

test("a turn that is being interrupted is neither reported nor finished any more", async () => {
  // What the audio thread says until it stops ended the turn twice, once as whole.
  const { audio, talk, socket } = await handsFreeSpoken();
  const said = socket.said().length;
  const answerStop = audio.holdStop();
  socket.say({ type: "speech.started", turn: 1, at_samples: 2400 });
  audio.tell(1, { heard: 3 * FRAME, drained: true });
  socket.say({ type: "speech.started", turn: 1, at_samples: 2400 });
  answerStop();
  await settled();
  assert.deepEqual(socket.said().slice(said), [{ type: "interrupt", turn: 1, heard_samples: 2 * FRAME }]);
  assert.equal(talk.phase, "talking");
});

test("hands-free in line: what is said there is not kept to be said later", async () => {
  // A talk began with minutes of what somebody had said to others while waiting.
  const { audio, talk, sockets, start } = begin();
  await talk.listen();
  sockets[0].open();
  sockets[0].say({ type: "session.queued", place: 1 });
  audio.talk(1000);
  start();
  assert.deepEqual(sockets[0].heard(), []);
  audio.talk(20);
  assert.equal(sockets[0].heard().length, 1);
});

test("the browser asks before a place is taken, and whoever still holds the button then talks", async () => {
  // The page said that it kept what was said while the microphone was closed.
  const { audio, talk, sockets, start } = begin();
  let allow;
  [audio.granted, audio.permission] = [false, new Promise((resolve) => (allow = resolve))];
  const pressed = talk.press();
  await settled();
  assert.deepEqual([talk.phase, talk.asking, talk.microphone], ["asking", true, "asking"]);
  assert.equal(sockets.length, 0, "nobody else waits for a person who reads a question");
  allow();
  await pressed;
  start();
  assert.deepEqual([talk.phase, talk.microphone], ["talking", "heard"]);
});

for (const [name, away] of [
  ["lets go of the button", (talk) => talk.letGo()],
  ["only taps", (talk) => talk.latch()],
]) {
  test(`who ${name} to answer the browser's question is told that the microphone is on, and does not talk`, async () => {
    // It ended as a turn that was too short, of somebody who had never been heard.
    const { audio, talk, notes, sockets } = begin();
    let allow;
    [audio.granted, audio.permission] = [false, new Promise((resolve) => (allow = resolve))];
    const pressed = talk.press();
    const done = away(talk);
    await settled();
    allow();
    await pressed;
    await done;
    assert.deepEqual([talk.phase, talk.grip, talk.microphone], ["idle", "free", "on"]);
    assert.deepEqual(notes, ["The microphone is on. Now hold the button and talk."]);
    assert.equal(sockets.length, 0);
  });
}

test("holding the button again while the browser asks is the same press", async () => {
  const { audio, talk, sockets, start } = begin();
  let allow;
  [audio.granted, audio.permission] = [false, new Promise((resolve) => (allow = resolve))];
  talk.press();
  await settled();
  talk.letGo();
  const again = talk.press();
  allow();
  await again;
  start();
  assert.deepEqual([talk.phase, sockets.length], ["talking", 1]);
  audio.talk(200);
  await talk.letGo();
  assert.deepEqual([talk.phase, sockets[0].story()], ["waiting", ["audio", "speak"]]);
});

test("a microphone that is only being opened is no question: a tap then talks", async () => {
  const { audio, talk, start } = begin();
  audio.permission = new Promise((resolve) => setTimeout(resolve, 5));
  const pressed = talk.press();
  talk.latch();
  await settled();
  assert.deepEqual([talk.phase, talk.asking], ["asking", false]);
  await pressed;
  start();
  assert.equal(talk.phase, "talking");
});

test("a tap whose press has failed before the finger was up leaves the button as it was", async () => {
  // It stayed latched, so that the next press let go of nothing, and was lost.
  const { sockets, talk, start } = begin();
  await talk.press();
  sockets[0].end(1006);
  await settled();
  assert.equal(talk.phase, "problem");
  talk.latch();
  assert.equal(talk.grip, "free");
  talk.dismiss();
  await talk.press();
  start();
  assert.deepEqual([talk.phase, sockets.length], ["talking", 2]);
});

test("who stops while the browser asks waits for nobody, and a late answer opens nothing", async () => {
  const { audio, talk } = begin();
  let allow;
  [audio.granted, audio.permission] = [false, new Promise((resolve) => (allow = resolve))];
  const pressed = talk.press();
  await settled();
  await talk.end();
  await pressed;
  assert.equal(talk.phase, "idle");
  allow();
  await settled();
  assert.equal(talk.phase, "idle");
});

test("a session that was lost while the browser asked leaves the microphone closed", async () => {
  // It was taken for nobody, the page said that it had failed itself, and the browser showed that it records.
  const { audio, talk, sockets, socket } = await spoken();
  audio.play(5 * FRAME);
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 5 * FRAME, mean_step_ms: 12 });
  audio.play(0, true);
  audio.closeMicrophone();
  let allow;
  audio.permission = new Promise((resolve) => (allow = resolve));
  const pressed = talk.press();
  await settled();
  assert.equal(talk.phase, "asking");
  sockets[0].end(1006);
  await settled();
  allow();
  await pressed;
  assert.deepEqual([talk.phase, talk.problem.code], ["problem", "lost"]);
  assert.deepEqual([audio.capturing, audio.hasMicrophone], [false, false]);
});

test("what a talk that failed had not said is not the next one's", async () => {
  // Neither its speech nor its word to go on: the next one spoke before anybody had said anything.
  const { audio, talk, sockets, start } = begin();
  await talk.press();
  audio.talk(200);
  await talk.letGo(); // early: remembered until the session starts
  sockets[0].end(1006);
  await settled();
  audio.permission = new Promise((resolve) => setTimeout(resolve, 5));
  await talk.press();
  start();
  assert.equal(talk.phase, "talking");
  assert.deepEqual(sockets[1].story(), []);
});

test("an empty continuation hands back to the person", async () => {
  const { audio, talk, notes, start, sockets } = begin();
  await talk.press();
  start();
  audio.talk(200);
  await talk.letGo();
  sockets[0].say({ type: "turn.speaking", turn: 1 });
  sockets[0].say({ type: "turn.done", turn: 1, reason: "end", samples: 0, mean_step_ms: null });
  assert.deepEqual([talk.phase, notes.at(-1)], ["ready", "It had nothing to add."]);
});

test("a turn that was interrupted before it began does not begin", async () => {
  const { audio, talk, sockets, start } = begin();
  await talk.press();
  start();
  audio.talk(200);
  await talk.letGo();
  await talk.press();
  sockets[0].say({ type: "turn.speaking", turn: 1 });
  assert.equal(audio.turn, null);
});

test("what the audio thread still says of an old turn does not end the new one", async () => {
  const { audio, talk, socket } = await spoken();
  audio.play(FRAME);
  await talk.press();
  audio.talk(200);
  await talk.letGo();
  const said = socket.said().length;
  audio.tell(1, { heard: 3 * FRAME, drained: true });
  assert.deepEqual([talk.phase, socket.said().length], ["waiting", said]);
});

test("how often it ran dry is told by turn", async () => {
  // The server's operator saw a gap in every turn after the first one.
  const { audio, talk, socket } = await spoken();
  audio.play(FRAME);
  audio.tell(1, { heard: 2 * FRAME, underruns: 2 });
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 5 * FRAME, mean_step_ms: 12 });
  audio.tell(1, { heard: 5 * FRAME, underruns: 2, drained: true });
  assert.equal(talk.tape.rolling, false, "pauses between turns are not kept");
  await talk.press();
  audio.talk(200);
  await talk.letGo();
  socket.say({ type: "turn.speaking", turn: 2 });
  audio.tell(2, { heard: FRAME, underruns: 2 });
  audio.tell(2, { heard: 2 * FRAME, underruns: 3 });
  const told = socket.said().filter(({ type }) => type === "played");
  assert.deepEqual(told.map(({ turn, underruns }) => [turn, underruns]), [[1, 0], [1, 2], [1, 2], [2, 0], [2, 1]]);
});

test("a microphone that is unplugged while one talks ends the word, and not the conversation", async () => {
  const { about, audio, talk, sockets, start } = begin();
  await talk.press();
  start();
  audio.talk(200);
  audio.hasMicrophone = false;
  audio.onLost(new AudioError("microphone_lost"));
  await settled();
  assert.deepEqual([talk.phase, talk.grip, sockets[0].closed], ["ready", "free", null]);
  assert.match(about.shown.text, /microphone is gone/);
  await talk.press(); // another one
  audio.talk(40);
  await talk.letGo();
  assert.deepEqual(sockets[0].story(), ["audio", "speak"], "what was said before belongs to the prompt");
});

test("once another microphone is open, nothing is said of the one that is gone", async () => {
  // "The microphone is gone" stood beside "You are heard" for a minute.
  const { about, audio, talk, start } = begin();
  await talk.press();
  start();
  audio.closeMicrophone();
  audio.onLost(new AudioError("microphone_lost"));
  await settled();
  assert.match(about.shown.text, /is gone/);
  await talk.press();
  assert.deepEqual([talk.microphone, about.shown], ["heard", null]);
});

test("a press while the browser asks for the microphone's level is none", async () => {
  // It talked as soon as the question was answered, though the finger had long been up, or asked once more.
  const { audio, talk } = begin();
  let answer;
  audio.granted = false;
  audio.permission = new Promise((resolve) => (answer = resolve));
  const trying = talk.tryMicrophone();
  await settled();
  assert.equal(talk.phase, "asking");
  const pressing = talk.press();
  talk.latch();
  answer();
  await Promise.all([trying, pressing]);
  await settled();
  assert.deepEqual([talk.phase, talk.grip, talk.microphone], ["idle", "free", "on"]);
});

test("hands-free, a microphone that is unplugged is a problem that is told", async () => {
  const { audio, talk, sockets, start } = begin();
  await talk.listen();
  start();
  audio.onLost(new AudioError("microphone_lost"));
  await settled();
  assert.deepEqual([talk.phase, talk.problem.code], ["problem", "microphone_lost"]);
  assert.equal(sockets[0].closed, 1000);
});

test("a microphone that gives nothing is noticed within two seconds, and nothing goes on from silence", async () => {
  const { about, audio, talk, sockets, start } = begin();
  await talk.press();
  start();
  audio.talk(1400, 0);
  assert.equal(about.shown, null);
  audio.talk(200, 0);
  assert.deepEqual([about.shown.rank, /hears nothing/.test(about.shown.text)], ["error", true]);
  await talk.letGo();
  assert.deepEqual([talk.phase, sockets[0].story()], ["ready", ["audio"]]);
  await talk.press();
  audio.talk(1600, 12); // a faint noise: it is no dead one, but it does not hear who talks
  assert.match(about.shown.text, /hears nothing/);
  audio.talk(40, 2000);
  assert.equal(about.shown, null, "it is no longer so");
});

test("hands-free, silence is no fault as long as the microphone gives any noise", async () => {
  const { about, audio, talk, start } = begin();
  await talk.listen();
  start();
  audio.talk(3000, 5);
  assert.equal(about.shown, null);
});

test("a muted microphone says so, and asks for nothing", async () => {
  const { about, audio, talk, sockets, start } = begin();
  await talk.press();
  start();
  talk.mute(true);
  assert.deepEqual([talk.microphone, about.shown.rank], ["muted", "error"]);
  audio.talk(400, 0);
  await talk.letGo();
  assert.deepEqual([talk.phase, sockets[0].story()], ["ready", ["audio"]]);
  talk.mute(false);
  assert.deepEqual([talk.microphone, about.shown], ["on", null]);
});

test("another microphone takes over in the middle of a word", async () => {
  const { audio, talk, settings, start } = begin();
  await talk.changeMicrophone();
  assert.equal(audio.hasMicrophone, false, "none is opened because another one is chosen");
  await talk.press();
  start();
  settings.microphone = "usb";
  audio.capturing = false;
  await talk.changeMicrophone();
  assert.equal(audio.options.deviceId, "usb");
  assert.deepEqual([talk.phase, audio.capturing], ["talking", true]);
});

test("a microphone can be tried before anybody is asked for a place", async () => {
  const { talk, sockets } = begin();
  await talk.tryMicrophone();
  assert.deepEqual([talk.phase, talk.microphone, sockets.length], ["idle", "on", 0]);
  await talk.end();
  assert.equal(talk.microphone, "off");
});

test("a stop in the first answer leaves something to repeat", async () => {
  const { audio, talk, sockets, start } = await spoken();
  audio.play(FRAME);
  await talk.end();
  assert.deepEqual([talk.phase, talk.canRepeat], ["idle", true]);
  await talk.repeat();
  start();
  assert.deepEqual(sockets[1].story(), ["audio", "speak"]);
});

test("a finished conversation is played again, and talking ends that", async () => {
  const { audio, talk, sockets, socket, start } = await spoken();
  assert.equal(talk.canReplay, false, "not while it goes on");
  audio.play(2 * FRAME);
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 2 * FRAME, mean_step_ms: 12 });
  audio.play(0, true);
  await talk.replay();
  assert.equal(talk.phase, "replaying");
  assert.deepEqual([audio.recording.length, audio.recording[0], audio.recording.at(-1)], [talk.tape.end, 1000, 1]);
  audio.frame += 48_000;
  assert.equal(talk.playhead, Math.min(talk.tape.end, 24_000));
  audio.onRecordingEnd();
  await settled();
  assert.deepEqual([talk.phase, talk.playhead, audio.recording], ["ready", null, null]);
  await talk.replay();
  await talk.press();
  assert.deepEqual([talk.phase, sockets.length, audio.recording], ["talking", 1, null]);
  await talk.end();
  await talk.replay();
  assert.equal(talk.phase, "replaying");
  await talk.end();
  assert.equal(talk.phase, "idle");
});

test("a seed of 19 digits reaches the server digit by digit", async () => {
  const { talk, settings, sockets, start } = begin();
  settings.seed = "9223372036854775807";
  await talk.press();
  start();
  assert.match(sockets[0].sent[0], /"seed":9223372036854775807[,}]/);
});

test("settings that change hold from the next turn on", async () => {
  const { talk, settings, sockets, start } = begin();
  talk.settingsChanged(); // of no talk
  await talk.press();
  talk.settingsChanged();
  assert.deepEqual(sockets[0].sent, [], "one that has not started begins with them");
  start();
  Object.assign(settings, { temperature: 0.2, topK: 5, maxSeconds: 9 });
  talk.settingsChanged();
  assert.deepEqual(sockets[0].said().at(-1), {
    type: "session.update",
    sampling: { temperature: 0.2, top_k: 5, seed: 7 },
    max_seconds: 9,
  });
});

test("a prompt that is too long to be kept whole is not said again in part", async () => {
  const { audio, talk, sockets, start } = begin();
  await talk.press();
  start();
  audio.talk(301_000);
  await talk.letGo();
  sockets[0].say({ type: "turn.done", turn: 1, reason: "end", samples: 0, mean_step_ms: 12 });
  assert.deepEqual([talk.phase, talk.canRepeat], ["ready", false]);
});

test("in line, nothing is taken from the microphone; then it is the person's turn", async () => {
  const { audio, talk, sockets, start } = begin();
  await talk.press();
  sockets[0].open();
  audio.talk(200);
  sockets[0].say({ type: "session.queued", place: 2 });
  await settled();
  assert.deepEqual([talk.phase, talk.place, audio.capturing], ["queued", 2, false]);
  start();
  assert.equal(talk.phase, "ready");
  assert.deepEqual(sockets[0].heard(), []);
});

for (const [name, message, code] of [
  ["a full server", { type: "session.refused", code: "full", message: "", retry_after_ms: 1000 }, "full"],
  ["a fatal error", { type: "error", code: "step_failed", message: "broken", fatal: true }, "step_failed"],
  ["a server that stops", { type: "session.closed", reason: "stopping" }, "stopping"],
  ["a session that idled", { type: "session.closed", reason: "idle" }, "idle"],
]) {
  test(`${name} is a problem that is told, closes the microphone and can be tried again`, async () => {
    const { audio, talk, sockets, start } = begin();
    await talk.press();
    start();
    sockets[0].say(message);
    await settled();
    assert.deepEqual([talk.phase, talk.problem.code, audio.hasMicrophone], ["problem", code, false]);
    await talk.press();
    start();
    assert.deepEqual([talk.phase, talk.problem, sockets.length], ["talking", null, 2]);
  });
}

test("a connection that is lost, one to a server that stops, and one that never was are told apart", async () => {
  for (const [opened, closeCode, code] of [[true, 1006, "lost"], [true, 1001, "stopping"], [false, 1006, "gone"]]) {
    const { talk, sockets } = begin();
    await talk.press();
    if (opened) sockets[0].open();
    sockets[0].end(closeCode);
    await settled();
    assert.deepEqual([talk.phase, talk.problem.code], ["problem", code]);
  }
});

/** A server dies after one frame of the first turn, and the next one says in which turn the talk is. played: samples. */
async function died(turn, played = 0) {
  const all = begin();
  const { audio, talk, sockets, start } = all;
  await talk.press();
  start(1, { token: "x", seconds: 30, window: 256 });
  audio.talk(400);
  await talk.letGo();
  sockets[0].say({ type: "turn.speaking", turn: 1 });
  sockets[0].speak(1, 0, FRAME);
  if (played) audio.play(played);
  sockets[0].end(1006);
  await new Promise((resolve) => setTimeout(resolve, 50));
  sockets[1].open();
  sockets[1].say({ type: "session.resumed", received: 0, turn });
  await settled();
  return all;
}

test("when a server died in a turn, the turn ends, what is lost is told, and one can talk again", async () => {
  const { audio, talk, sockets, notes } = await died(1);
  assert.deepEqual([talk.phase, talk.away, talk.problem], ["ready", false, null]);
  assert.match(notes.at(-1), /another one goes on/);
  await talk.press();
  audio.talk(400);
  await talk.letGo();
  assert.deepEqual([talk.phase, sockets[1].said().at(-1).turn], ["waiting", 1]);
  talk.end();
});

test("when a server died whose turn was over, the rest of that turn still comes, and is heard", async () => {
  const { audio, talk, sockets, notes } = await died(2, FRAME);
  assert.deepEqual([talk.phase, talk.away], ["speaking", false]);
  assert.match(notes.at(-1), /another one goes on/);
  sockets[1].speak(1, FRAME, FRAME);
  sockets[1].say({ type: "turn.done", turn: 1, reason: "end", samples: 2 * FRAME, first_frame_ms: 1, mean_step_ms: 1 });
  assert.equal(audio.played.length, 2 * FRAME);
  audio.play(FRAME, true);
  await settled();
  assert.equal(talk.phase, "ready");
  await talk.press();
  audio.talk(400);
  await talk.letGo();
  assert.deepEqual([talk.phase, sockets[1].said().at(-1).turn], ["waiting", 2]);
  talk.end();
});

test("what was said before the connection was lost can be said again", async () => {
  const { audio, talk, sockets, socket, start } = await spoken();
  audio.play(FRAME);
  socket.end(1006);
  await settled();
  assert.deepEqual([talk.phase, talk.canRepeat], ["problem", true]);
  await talk.repeat();
  start();
  assert.deepEqual(sockets[1].story(), ["audio", "speak"]);
  assert.equal(talk.phase, "waiting");
});

test("a refused microphone takes no place", async () => {
  const { audio, talk, sockets } = begin();
  audio.granted = false;
  audio.fails = new AudioError("microphone_denied");
  audio.open = async () => {};
  await talk.press();
  assert.deepEqual([talk.phase, talk.problem.code, talk.grip], ["problem", "microphone_denied", "free"]);
  assert.equal(sockets.length, 0);
});

test("an empty prompt is no end of the talk", async () => {
  const { talk, socket } = await spoken();
  socket.say({ type: "error", code: "empty_prompt", message: "nothing was heard", fatal: false, in_reply_to: "speak" });
  assert.equal(talk.phase, "ready");
});

test("a repetition says the same bytes with the same seed in a new talk, and compares", async () => {
  const { audio, talk, notes, settings, sockets, socket, start } = await spoken();
  settings.seed = null;
  audio.play(5 * FRAME);
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 5 * FRAME, mean_step_ms: 12 });
  audio.play(0, true);
  const repeated = talk.repeat();
  await repeated;
  start();
  const again = sockets[1];
  assert.equal(again.said()[0].sampling.seed, 7);
  assert.deepEqual(again.story(), ["audio", "speak"]);
  assert.deepEqual(again.heard().flatMap(({ pcm }) => [...pcm]), socket.heard().flatMap(({ pcm }) => [...pcm]));
  again.say({ type: "turn.speaking", turn: 1 });
  again.speak(1, 0, 3 * FRAME);
  again.speak(1, 3 * FRAME, 2 * FRAME, 99);
  again.say({ type: "turn.done", turn: 1, reason: "end", samples: 5 * FRAME, mean_step_ms: 12 });
  audio.play(5 * FRAME, true);
  assert.equal(notes.at(-1), "The same for 0.2 s, then different.");
  assert.equal(talk.figures.firstSoundMs, null, "nobody spoke: there is no end of speech to measure from");
  await talk.press();
  audio.talk(100);
  await talk.letGo();
  again.say({ type: "turn.speaking", turn: 2 });
  again.speak(2, 0, FRAME);
  audio.play(FRAME);
  assert.equal(Math.round(talk.figures.firstSoundMs), 10, "what is said after a repetition is speech again");
});

test("the tape holds both voices where they were in time", async () => {
  const { audio, talk, socket } = await spoken();
  audio.frame += 4800; // 100 ms
  audio.play(FRAME);
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 5 * FRAME, mean_step_ms: 12 });
  audio.play(4 * FRAME, true);
  const { tape } = talk;
  const you = tape.read(0, 0, tape.end);
  const machine = tape.read(1, 0, tape.end);
  assert.deepEqual([you.indexOf(1000), you.lastIndexOf(1000)], [0, 9599]);
  assert.deepEqual([machine.indexOf(1), machine.lastIndexOf(1)], [12_000, 12_000 + 5 * FRAME - 1]);
  assert.deepEqual(tape.marks, [{ kind: "turn", speechEnd: 9600, firstSound: 12_000, ms: 110 }]);
});

async function withTakes() {
  const all = begin();
  await all.talk.press();
  all.sockets[0].open();
  all.sockets[0].say({ type: "session.started", turn: 1, notice: null, takes: 4 });
  all.audio.talk(400);
  await all.talk.letGo();
  const [socket] = all.sockets;
  socket.say({ type: "turn.speaking", turn: 1 });
  socket.speak(1, 0, 2 * FRAME);
  all.audio.play(FRAME);
  return { ...all, socket };
}

test("another take goes on from the same words with another seed, and the one that is chosen is gone on from", async () => {
  const { audio, talk, socket } = await withTakes();
  assert.equal(socket.said()[0].takes, true);
  await talk.takeAgain(); // while it speaks
  assert.equal(socket.said().at(-1).type, "interrupt");
  socket.say({ type: "turn.done", turn: 1, reason: "interrupted", samples: 2 * FRAME, mean_step_ms: 9 });
  socket.say({ type: "interrupted", turn: 1, kept_samples: FRAME });
  const take = socket.said().at(-1);
  assert.deepEqual([take.type, take.turn, take.sampling.temperature], ["take", 1, 0.8]);
  assert.notEqual(take.sampling.seed, 7);
  socket.say({ type: "take.started", turn: 2, of: 1, sampling: take.sampling });
  socket.say({ type: "turn.speaking", turn: 2 });
  socket.speak(2, 0, FRAME);
  audio.play(FRAME);
  socket.say({ type: "turn.done", turn: 2, reason: "end", samples: FRAME, mean_step_ms: 9 });
  audio.play(0, true);
  assert.deepEqual([talk.phase, talk.keptTake], ["ready", 2]);
  assert.deepEqual(talk.takes.map(({ turn, pcm }) => [turn, pcm.length]), [[1, FRAME], [2, FRAME]]);
  await talk.keepTake(1);
  assert.deepEqual([socket.said().at(-1), audio.recording[0]], [{ type: "take.keep", turn: 1 }, 1]);
  assert.equal(talk.phase, "replaying");
  socket.say({ type: "take.kept", turn: 3, of: 1 });
  assert.equal(talk.keptTake, 1);
  await talk.press();
  audio.talk(200);
  await talk.letGo();
  assert.deepEqual(socket.said().at(-1), { type: "speak", turn: 3 });
  assert.deepEqual(talk.takes, [], "other words have takes of their own");
});

test("nobody is told of an interruption that the server has got over by its own clock", async () => {
  // On a machine that was too slow a person read "turn 1 is not being spoken, nor was it last".
  const { talk, notes, socket } = await spoken();
  socket.say({ type: "error", code: "bad_state", message: "over", fatal: false, in_reply_to: "interrupt" });
  assert.deepEqual([talk.phase, notes], ["waiting", []]);
});

test("what a slow server has lost is told in one sum, and never as nothing", async () => {
  // It said that 0.0 s were lost.
  const { about, socket } = await spoken();
  const lost = (samples) => {
    socket.say({ type: "input.dropped", turn: 1, samples });
    return about.shown.text;
  };
  assert.equal(lost(960), "The server is too slow: it has lost 40 ms of what you said.");
  assert.equal(lost(48_000), "The server is too slow: it has lost 2.0 s of what you said.");
});

test("a take that the server cannot give leaves the talk as it is", async () => {
  const { about, audio, talk, socket } = await withTakes();
  socket.say({ type: "turn.done", turn: 1, reason: "end", samples: 2 * FRAME, mean_step_ms: 9 });
  audio.play(FRAME, true);
  await talk.takeAgain();
  assert.equal(talk.phase, "waiting");
  socket.say({ type: "error", code: "take_gone", message: "it is gone", fatal: false, in_reply_to: "take" });
  assert.deepEqual([talk.phase, about.shown.text], ["ready", "The server says: it is gone"]);
});

test("a server without takes is asked for none", async () => {
  const { audio, talk, socket } = await spoken();
  audio.play(FRAME);
  assert.equal(talk.canTake, false);
  await talk.takeAgain();
  assert.deepEqual([talk.phase, socket.story().at(-1)], ["speaking", "played"]);
});

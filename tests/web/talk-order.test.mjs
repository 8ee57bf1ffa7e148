// The talk against a server, a network and an audio thread that are each as late as they like, in any order: whatever a
// person does meanwhile, no state is left hanging once everything has been delivered.
//
// It found that the microphone stayed open after two quick presses at the start, that "Another take" while a voice
// interrupted ended the conversation, that a press while a take was on its way spoke in a turn that was taken, and that
// "Handing over" stood for ever when a server died while a take was asked for, or refused what it was told to speak.

import assert from "node:assert/strict";
import test from "node:test";

import { decodeAudio } from "../../streaming/web/protocol.js";
import { Talk } from "../../streaming/web/talk.js";
import { FakeAudio, FakeSocket } from "./fakes.mjs";

const FRAME = 1920;
const LEAD = 5;
const SEEDS = 30;
// No clock takes part, however slow the machine is: what is to be done soon is done next, what is a limit never comes.
globalThis.setTimeout = (act, ms = 0, ...values) => (ms < 1000 ? setImmediate(act, ...values) : null);
globalThis.clearTimeout = (timer) => clearImmediate(timer);
globalThis.setInterval = () => null;
globalThis.clearInterval = () => {};

const settled = () => new Promise((resolve) => setImmediate(resolve));

/** A generator of numbers below `count`, the same for the same seed. */
function dice(seed) {
  let state = seed * 2654435761 + 1;
  return (count) => {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 0x9e3779b9) | 0;
    return ((state ^ (state >>> 13)) >>> 0) % count;
  };
}

/** What `docs/protocol.md` says of turns, takes and voices, with the times left to the test. */
class Server {
  turn = 1;
  rest = 1; // the open turn of the session as it is kept for another server
  started = false;
  attached = true; // whether a client is connected
  out = []; // not delivered yet
  owed = 0; // as many of these, the first, are kept with the session
  speaking = null; // {turn, total, sent}
  playback = null; // {turn, total, played}: what was said last, until it was heard
  takes = new Set();
  heard = 0; // audio messages of the open prompt
  vad = null; // idle, hearing, speaking or interrupting
  voice = false;
  #total;

  constructor(total) {
    this.#total = total;
  }

  say(type, fields = {}) {
    this.out.push(typeof type === "string" ? { type, ...fields } : type);
  }

  take(data) {
    if (typeof data !== "string") {
      const { turn } = decodeAudio(data);
      if (this.vad === null && turn > this.turn) {
        this.say("error", { code: "bad_message", message: `audio of turn ${turn}`, fatal: true });
      } else if (turn === this.turn && !this.speaking) this.heard += 1;
      return;
    }
    const { type, ...message } = JSON.parse(data);
    const refuse = (code) => this.say("error", { code, message: code, fatal: false, in_reply_to: type });
    switch (type) {
      case "session.start":
        this.started = true;
        this.vad = message.turn_taking === "vad" ? "idle" : null;
        this.say("session.started", { turn: 1, takes: 4, resume: { token: "x", seconds: 6000 } });
        break;
      case "session.resume":
        this.attached = true;
        this.out.unshift({ type: "session.resumed", received: 0, turn: this.turn });
        this.owed += 1;
        break;
      case "speak":
        if (this.speaking || message.turn !== this.turn) refuse("bad_state");
        else if (this.turn === 1 && this.heard === 0) refuse("empty_prompt");
        else this.speak();
        break;
      case "interrupt":
        if (this.playback?.turn === message.turn) this.interrupt();
        else refuse("bad_state");
        break;
      case "take":
        if (this.speaking || this.vad === "interrupting") refuse("bad_state");
        else if (!this.takes.has(message.turn)) refuse("take_gone");
        else {
          this.say("take.started", { turn: this.turn, of: message.turn, sampling: {} });
          this.speak();
        }
        break;
      case "take.keep":
        if (this.speaking || this.vad === "interrupting") refuse("bad_state");
        else if (!this.takes.has(message.turn)) refuse("take_gone");
        else {
          if (this.vad !== null) this.vad = "idle";
          this.say("take.kept", { turn: this.turn, of: message.turn });
        }
        break;
      case "played":
        if (this.playback?.turn === message.turn) this.playback.played = message.samples;
        this.#look();
        break;
    }
  }

  speak() {
    this.heard = 0;
    this.takes.add(this.turn);
    this.speaking = { turn: this.turn, total: this.#total(), sent: 0 };
    this.playback = { turn: this.turn, total: null, played: 0 };
    if (this.vad !== null) this.vad = "speaking";
    this.say("turn.speaking", { turn: this.turn });
  }

  interrupt() {
    const { turn } = this.playback;
    if (this.speaking) this.#done("interrupted");
    this.say("interrupted", { turn, kept_samples: 0 });
    this.playback = { turn, total: 0, played: 0 };
    if (this.vad === "interrupting") {
      this.vad = "hearing";
      if (!this.voice) this.#stopped();
    } else if (this.vad === "speaking") this.vad = "idle";
  }

  /** Does what its own clock has it do next; false where that is nothing. */
  step(late) {
    if (!this.attached) return false;
    if (this.speaking) {
      const { turn, total, sent } = this.speaking;
      if (sent === total) this.#done("end");
      else if (sent < this.playback.played / FRAME + LEAD) this.say([turn, FRAME * this.speaking.sent++]);
      else if (this.vad !== "interrupting" || !late) return false;
    }
    if (this.vad === "interrupting" && late) this.interrupt(); // nobody said how much was heard
    else if (this.vad === "hearing" && !this.voice) this.#stopped();
    else if (this.vad === "idle" && this.voice) {
      this.vad = "hearing";
      this.say("speech.started", { turn: this.turn, at_samples: 0 });
    } else if (this.vad === "speaking" && this.voice) {
      this.vad = "interrupting";
      this.say("speech.started", { turn: this.playback.turn, at_samples: 0 });
    } else return false;
    return true;
  }

  /** The client gets the next message. */
  next() {
    this.owed = Math.max(0, this.owed - 1);
    return this.out.shift();
  }

  /** It dies, and another one goes on from the end of the last turn that was over: what it lacks of that comes still. */
  die() {
    const out = this.out.slice(0, this.owed).filter(({ type }) => type !== "session.resumed");
    Object.assign(this, { attached: false, turn: this.rest, out, speaking: null, playback: null, heard: 0 });
    this.owed = out.length;
    this.takes.clear();
    if (this.vad !== null) this.vad = "idle";
  }

  #stopped() {
    this.say("speech.stopped", { turn: this.turn, at_samples: 0 });
    this.speak();
  }

  #done(reason) {
    const { turn, sent } = this.speaking;
    this.say("turn.done", { turn, reason, samples: sent * FRAME, mean_step_ms: 1 });
    this.turn = this.rest = turn + 1;
    this.owed = this.out.length;
    this.speaking = null;
    this.playback.total = sent * FRAME;
    this.#look();
  }

  #look() {
    const { total, played } = this.playback ?? {};
    if (this.vad === "speaking" && !this.speaking && total !== null && played >= total) this.vad = "idle";
  }
}

/** An audio thread that does what it is told, and says what it has done, when the test lets it. */
class LateAudio extends FakeAudio {
  told = [];
  says = [];
  #turn = null;
  #buffered = 0;
  #played = 0;
  #complete = false;
  #begun = false;

  begin(turn) {
    this.told.push(() => {
      [this.#turn, this.#buffered, this.#played, this.#complete, this.#begun] = [turn, 0, 0, false, false];
    });
  }

  push(turn, pcm) {
    this.told.push(() => turn === this.#turn && (this.#buffered += pcm.length));
  }

  complete(turn) {
    this.told.push(() => turn === this.#turn && (this.#complete = true));
  }

  stopPlayback() {
    return new Promise((resolve) => {
      this.told.push(() => {
        const heard = this.#played;
        this.#turn = null;
        this.says.push(() => resolve(heard));
      });
    });
  }

  /** Plays a frame of what there is; false where there is nothing. */
  step() {
    if (this.#turn === null || (this.#buffered === 0 && !this.#complete)) return false;
    const turn = this.#turn;
    if (!this.#begun && this.#buffered > 0) this.says.push(() => this.onStarted({ turn, frame: this.frame }));
    this.#begun = true;
    const samples = Math.min(FRAME, this.#buffered);
    this.#buffered -= samples;
    this.#played += samples;
    const [heard, drained] = [this.#played, this.#complete && this.#buffered === 0];
    const pcm = new Int16Array(samples);
    this.says.push(() =>
      this.onPlayed({ turn, frame: this.frame, pcm, heard, buffered: 0, targetMs: 80, underruns: 0, drained }),
    );
    if (drained) this.#turn = null;
    return true;
  }
}

/** One world: everything in it happens when `step` says so. */
function world(roll) {
  const audio = new LateAudio();
  const sockets = [];
  const server = new Server(() => roll(12)); // none is an empty continuation
  const settings = { temperature: 0.8, topK: 30, topP: null, maxSeconds: 5, silenceMs: 480, seed: "7" };
  const talk = new Talk({
    audio,
    openSocket: () => sockets[sockets.push(new FakeSocket()) - 1],
    whyRefused: async () => "gone",
    settings: () => settings,
    changed: () => {},
    told: () => {},
    withdrawn: () => {},
  });
  let [socket, opened, taken] = [null, false, 0];
  const deliver = {
    toServer() {
      if (sockets.at(-1) !== socket) [socket, opened, taken] = [sockets.at(-1), false, 0];
      if (socket === undefined || socket === null) return false;
      if (!opened) {
        opened = true;
        socket.open();
        return true;
      }
      if (taken === socket.sent.length) return false;
      server.take(socket.sent[taken++]);
      return true;
    },
    toClient() {
      if (!opened || !server.attached || server.out.length === 0) return false;
      const message = server.next();
      if (Array.isArray(message)) socket.speak(message[0], message[1], FRAME);
      else socket.say(message);
      return true;
    },
    toDevice() {
      audio.told.shift()?.();
      return true;
    },
    fromDevice() {
      audio.says.shift()?.();
      return true;
    },
    server: () => server.step(roll(3) === 0),
    device: () => audio.step(),
  };
  const cut = () => {
    if (!talk.connected || !opened || talk.phase === "idle") return;
    server.die();
    socket.end(1006);
  };
  return { talk, audio, server, deliver, cut };
}

/** Everything is delivered, and everybody has done what was left to do. */
async function quiet({ audio, server, deliver }) {
  for (let idle = 0; idle < 3; ) {
    const before = JSON.stringify([server.out.length, audio.told.length, audio.says.length]);
    let moved = deliver.toServer() || deliver.toClient();
    deliver.toDevice();
    deliver.fromDevice();
    moved = server.step(true) || moved;
    moved = audio.step() || moved;
    await settled();
    const after = JSON.stringify([server.out.length, audio.told.length, audio.says.length]);
    idle = moved || before !== after || audio.told.length || audio.says.length ? 0 : idle + 1;
    await settled();
  }
}

async function anyOrder(seed, handsFree, deaths) {
  const roll = dice(seed);
  const it = world(roll);
  const { talk, audio, server, deliver, cut } = it;
  const deeds = [];
  const people = handsFree
    ? [
        () => (server.voice = true),
        () => (server.voice = false),
        () => talk.takeAgain(),
        () => talk.keepTake(talk.takes[0]?.turn),
      ]
    : [
        () => talk.press(),
        () => talk.press(),
        () => talk.letGo(),
        () => talk.letGo(),
        () => talk.latch(),
        () => talk.takeAgain(),
        () => talk.keepTake(talk.takes[0]?.turn),
      ];
  if (handsFree) talk.listen();
  for (let step = 0; step < 300; step++) {
    const which = roll(12);
    if (which === 0) {
      const deed = people[roll(people.length)];
      deeds.push(`${step} ${talk.phase}: ${deed}`);
      deed()?.catch?.((error) => deeds.push(error.stack));
    } else if (which === 1 && deaths && roll(8) === 0) {
      deeds.push(`${step} ${talk.phase}: the server dies`);
      cut();
      await settled();
    } else if (which < 4 && audio.hasMicrophone) audio.talk(20);
    else Object.values(deliver)[roll(6)]();
    await settled();
  }
  server.voice = false;
  if (!handsFree) talk.letGo();
  await quiet(it);
  if (talk.phase === "replaying") audio.onRecordingEnd();
  await quiet(it);
  const now = JSON.stringify([talk.phase, talk.problem, server.vad, server.speaking, server.turn]);
  const story = `seed ${seed}: ${now}\n${deeds.join("\n")}`;
  const begun = server.started;
  assert.equal(talk.phase, begun ? "ready" : "idle", story);
  assert.equal(server.speaking, null, story);
  if (begun) {
    // And the next turn works.
    if (handsFree) server.voice = true;
    else talk.press();
    await quiet(it);
    audio.talk(200);
    assert.equal(talk.phase, "talking", story);
    if (handsFree) server.voice = false;
    else talk.letGo();
    await settled();
    await deliver.toServer();
    await quiet(it);
    assert.equal(talk.phase, "ready", story);
  }
  talk.end();
  await quiet(it);
}

for (const [name, handsFree, deaths] of [
  ["by hand", false, false],
  ["hands-free", true, false],
  ["by hand, and servers die", false, true],
  ["hands-free, and servers die", true, true],
]) {
  test(`whatever comes late, no state is left hanging: ${name}`, async () => {
    for (let seed = 1; seed <= SEEDS; seed++) await anyOrder(seed, handsFree, deaths);
  });
}

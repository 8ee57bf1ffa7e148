/**
 * One person, one machine: who is speaking, and what follows when one of them begins or stops. No screen here, and no
 * device: those are handed in, so that all of this runs in node as well.
 *
 *     idle ── press ─▶ (asking ─▶) connecting ─▶ (queued ─▶) ready ◀──────────────┐
 *                         │             │            │ press        │ voice        │ played to its end
 *                         ▼             ▼            ▼              ▼              │
 *                         problem, idle           talking ── let go, silence ─▶ waiting ─▶ speaking
 *                                                    ▲                                       │
 *                                                    └────────── press, voice ───────────────┘
 *
 * "asking" lasts until the microphone is open: nobody is heard, and no place is taken. "ready" means by hand: press and
 * talk; hands-free: it listens. "replaying" plays what is on the tape, and goes back to "idle" or "ready". Commands are
 * done one after another, in order.
 */

import { AudioError, loudness } from "./audio.js";
import { ContinuationClient } from "./client.js";
import { DEAD, DEAF, MicrophoneCheck } from "./microphone-check.js";
import { FRAME, SAMPLE_RATE, encodeControl } from "./protocol.js";
import { drawSeed } from "./settings.js";
import { MACHINE, Tape, YOU } from "./tape.js";

const LEAD_MS = 400;
const MAX_LATENCY_MS = 500;
const MAX_PROMPT_SAMPLES = 300 * SAMPLE_RATE; // what can be repeated
const TOO_SHORT = "That was too short to go on from. Hold the button for as long as you talk.";
const NOTHING_YET = { firstSoundMs: null, bufferMs: null, targetMs: null, underruns: 0, stepMs: null, seed: null, topP: null };

/** A continuation that was asked for or is being played. Frames are the audio clock's. */
class Spoken {
  /** How many samples it has, once it is complete. */
  total = null;
  /** How many of them the server knows to be heard. */
  reported = 0;
  /** How often the buffer had run dry before. */
  underrunsBefore = null;
  /** The name of the voice in which the model goes on; null where it has none. */
  voice = null;
  #parts = [];

  /** speechEnd: when the speech before it ended; null where nobody spoke. prompt: that speech, null where not known. */
  constructor(turn, speechEnd, prompt, expected = null) {
    [this.turn, this.speechEnd, this.prompt, this.expected] = [turn, speechEnd, prompt, expected];
  }

  add(pcm) {
    this.#parts.push(pcm.slice());
  }

  get pcm() {
    return join(this.#parts);
  }
}

export class Talk {
  phase = "idle";
  /** {code, message} while phase is "problem". */
  problem = null;
  /** In line: 1 is the next. */
  place = 0;
  /** Whether the browser asks the person for the microphone, while phase is "asking"; else it is only being opened. */
  asking = false;
  /** How the person holds the button: "held", "latched" by a tap until the next one, or "free". */
  grip = "free";
  /** Whether the connection is broken and being restored. */
  away = false;
  /** How loud whoever speaks is, from 0 to 1. */
  level = 0;
  /** What was measured last; null where nothing was yet. */
  figures = NOTHING_YET;
  tape = null;
  /** {turn, number, pcm} of each continuation of the last prompt, as far as it was heard, that can be gone on from. */
  takes = [];
  /** The turn of the take that the talk goes on from; null while there is none. */
  keptTake = null;
  #audio;
  #openSocket;
  #whyRefused;
  #settings;
  #changed;
  #told;
  #withdrawn;
  #session = null;
  #vad = false;
  #source = null; // "microphone" or "file", while speech is taken
  #unsent = []; // speech from before the session began
  #prompt = []; // this turn's speech
  #promptSamples = 0;
  #speakWhenStarted = false;
  #expected = null; // what is being repeated
  #spoken = null;
  #last = null; // {prompt, seed, first, sampling, reply} of the turn that can be repeated
  #seed = null; // the session's
  #takesKept = 0; // how many turns the server can go back to
  #takeAfter = null; // the turn that is being interrupted for another take
  #taking = null; // resolves once it is known what became of the take that was asked for
  #took = () => {};
  #stale = false; // whether what the audio thread says is of a turn whose number is given anew
  #lives = 0; // how often another server went on after one that died
  #dropped = 0; // samples of this session's speech that the server had to throw away
  #clock = null; // {frame, position}: where in the session's speech the microphone is
  #check = null; // whether the microphone gives a sound, while it is listened to
  #pressed = false; // whether a press waits for the microphone
  #giveUp = () => {}; // stops waiting for the microphone
  #replay = null; // {start, frame}: the tape's position at this frame of the audio clock
  #commands = Promise.resolve();

  /**
   * audio: an `Audio`; openSocket, whyRefused: of `connection.js`; settings(): read anew for each turn; changed():
   * called after every change; told(text, {rank, topic}), withdrawn(topic): of `Notes`.
   */
  constructor({ audio, openSocket, whyRefused, settings, changed, told, withdrawn }) {
    [this.#audio, this.#openSocket, this.#whyRefused] = [audio, openSocket, whyRefused];
    [this.#settings, this.#changed, this.#told, this.#withdrawn] = [settings, changed, told, withdrawn];
    audio.onSpeech = (piece) => this.#onSpeech(piece);
    audio.onStarted = (started) => this.#onStarted(started);
    audio.onPlayed = (played) => this.#onPlayed(played);
    audio.onFileEnd = () => this.letGo();
    audio.onLost = (error) => this.#onMicrophoneLost(error);
    audio.onMuted = (muted) => this.#onMuted(muted);
    audio.onRecordingEnd = () => this.stopReplay();
  }

  get handsFree() {
    return this.#vad;
  }

  /** The name of the voice in which the model goes on now; null where it has none. */
  get voice() {
    return this.#spoken?.voice ?? null;
  }

  /** Whether it has a place on the server, and a connection to it. */
  get connected() {
    return this.#session !== null && this.#session.started && !this.away;
  }

  get playingFile() {
    return this.#source === "file";
  }

  /**
   * What becomes of what the microphone hears: "off", "asking", "muted", "heard" (it goes to the server), "on" (it does
   * not).
   */
  get microphone() {
    if (this.phase === "asking") return "asking";
    if (!this.#audio.hasMicrophone) return "off";
    if (this.#audio.muted) return "muted";
    return this.#source === "microphone" ? "heard" : "on";
  }

  get canRepeat() {
    return this.#last !== null;
  }

  /** Whether the machine can be asked to go on from the last prompt once more. */
  get canTake() {
    if (this.#takesKept === 0 || this.away || this.#takeAfter !== null) return false;
    return this.#spoken !== null ? this.phase === "speaking" : this.phase === "ready" && this.takes.length > 0;
  }

  get canReplay() {
    return this.hasSound && ["idle", "ready", "problem"].includes(this.phase);
  }

  /** Where on the tape a replay is, null while there is none. */
  get playhead() {
    if (this.#replay === null || this.#replay.start === null) return null; // a take is not the tape
    const { start, frame } = this.#replay;
    return Math.min(this.tape.end, start + Math.round(((this.#audio.frame - frame) * SAMPLE_RATE) / this.#audio.rate));
  }

  get hasSound() {
    return this.tape !== null && this.tape.hasSound;
  }

  // What a person does

  /** Begin to talk; whatever the machine says is interrupted. Not while the browser asks for another reason. */
  press() {
    if (this.phase === "asking" && !this.#pressed) return this.#commands;
    this.grip = "held";
    if (this.#pressed) return this.#commands; // the microphone is being opened for the press before
    this.#pressed = true;
    const opened = async () => {
      this.#endReplay();
      await this.#takeNoMore();
      await this.#interrupt();
      return this.#openMicrophone(() => this.grip === "held");
    };
    return this.#command(async () => {
      const open = await opened().finally(() => (this.#pressed = false));
      if (!open) return;
      if (this.grip === "free") {
        if (this.#source !== null && !this.#vad) await this.#handOver(); // what the press before this one has begun
        else this.#told(TOO_SHORT);
        return;
      }
      if (this.#session === null || this.#vad) await this.#open({ vad: false });
      this.#listen();
    });
  }

  /** What was a tap: the turn then lasts until the next one. Nothing where the press has failed meanwhile. */
  latch() {
    if (this.grip !== "held") return;
    this.grip = "latched";
    this.#changed();
  }

  /** The prompt is over: the machine's turn. */
  letGo() {
    this.grip = "free";
    if (this.#pressed) return this.#commands; // nothing is heard yet
    return this.#command(async () => {
      if (this.#source !== null && !this.#vad) await this.#handOver();
    });
  }

  /** Hands-free: the microphone stays open and the server hears when a turn is over. */
  listen() {
    return this.#command(async () => {
      this.#endReplay();
      if (!(await this.#openMicrophone(() => true))) return;
      await this.#open({ vad: true });
      this.#listen();
    });
  }

  /** Opens the microphone outside of a talk, so that its level can be seen. */
  tryMicrophone() {
    return this.#command(async () => {
      if (await this.#openMicrophone(() => true)) this.#changed();
    });
  }

  /** The microphone that the settings name, if one is open now. */
  changeMicrophone() {
    return this.#command(async () => {
      if (!this.#audio.hasMicrophone) return;
      const listening = this.#source === "microphone";
      await this.#audio.openMicrophone(this.#constraints());
      this.#withdrawn("microphone");
      if (listening) this.#watch();
      if (listening) this.#audio.startCapture();
      this.#changed();
    });
  }

  /** Whether the microphone gives silence although it is open. */
  mute(muted) {
    this.#audio.muted = muted;
    this.#withdrawn("microphone");
    if (this.#source === "microphone") this.#watch();
    this.#changed();
  }

  /** Plays a file as if it were said. bytes: ArrayBuffer. Throws FileError. */
  async playFile(bytes) {
    const buffer = await this.#audio.decode(bytes);
    return this.#command(async () => {
      this.#endReplay();
      this.grip = "free";
      await this.#open({ vad: false });
      this.#source = "file";
      this.#beginPrompt();
      this.#audio.startCapture();
      this.#audio.playFile(buffer);
    });
  }

  /** Says the last prompt again, in a talk of its own, with the same seed: the same settings give the same. */
  repeat() {
    return this.#command(async () => {
      const last = this.#last;
      if (last === null) return;
      this.#endReplay();
      this.grip = "free";
      await this.#open({ vad: false, seed: last.seed, lag: "wait" });
      this.#beginPrompt();
      this.tape.insert(YOU, last.prompt);
      this.#expected = last;
      this.#unsent = [last.prompt];
      this.#keep(last.prompt);
      this.#speakWhenStarted = true;
      this.#begin();
    });
  }

  /** Another continuation of the same words, with another seed. What it says now is interrupted, and stays a take. */
  takeAgain() {
    return this.#command(async () => {
      if (!this.canTake) return;
      this.grip = "free";
      const spoken = this.#spoken;
      if (spoken === null) {
        this.#take(this.takes.at(-1).turn);
        return;
      }
      this.#takeAfter = spoken.turn; // the server has to have stopped before
      await this.#interrupt();
      if (this.#takeAfter !== null) this.#setPhase("waiting");
    });
  }

  /** Plays a take again, and goes on from it. */
  keepTake(turn) {
    return this.#command(async () => {
      const take = this.takes.find((one) => one.turn === turn);
      if (take === undefined || !["ready", "replaying"].includes(this.phase)) return;
      this.#endReplay();
      if (this.#session === null) return;
      this.#session.keepTake(turn);
      this.#audio.playRecording(take.pcm);
      this.#replay = { start: null };
      this.#setPhase("replaying");
    });
  }

  /** Plays what is on the tape, both voices. */
  replay() {
    return this.#command(async () => {
      if (!this.canReplay) return;
      await this.#audio.open();
      this.problem = null;
      this.#audio.playRecording(this.tape.mix());
      this.#replay = { start: this.tape.start, frame: this.#audio.frame };
      this.#setPhase("replaying");
    });
  }

  stopReplay() {
    return this.#command(async () => this.#endReplay());
  }

  /** Ends the talk and closes the microphone. The next one begins without its past. */
  end() {
    this.grip = "free";
    this.#giveUp();
    this.#took();
    return this.#command(async () => {
      await this.#end();
      this.#audio.closeMicrophone();
    });
  }

  /** `end`, and an empty tape. */
  startOver() {
    this.grip = "free";
    this.#giveUp();
    this.#took();
    return this.#command(async () => {
      await this.#end();
      [this.tape, this.#last, this.figures] = [null, null, NOTHING_YET];
      this.#changed();
    });
  }

  /** Something is in the way from the start. */
  cannot(code) {
    return this.#fail(code);
  }

  /** A problem was read. */
  dismiss() {
    if (this.phase !== "problem") return;
    this.problem = null;
    this.#setPhase("idle");
  }

  /** Settings were changed: they hold from the next turn on. */
  settingsChanged() {
    if (this.#session?.started) this.#session.update(this.#sampling(), this.#settings().maxSeconds);
  }

  /** The audio clock went on; called as often as the screen is drawn. */
  tick() {
    this.tape?.advance(this.#audio.frame);
  }

  #command(work) {
    const done = this.#commands.then(work).catch((error) => {
      if (error instanceof AudioError) return this.#fail(error.code);
      this.#fail("page_failed");
      throw error;
    });
    this.#commands = done.catch(() => {}); // its caller is told; the next command is not held up
    return done;
  }

  // Opening and closing

  async #open({ vad, seed = null, lag = "drop" }) {
    await this.#end();
    this.problem = null;
    this.#setPhase("connecting");
    await this.#audio.open();
    this.tape ??= new Tape(this.#audio.rate);
    [this.#vad, this.#dropped] = [vad, 0];
    const { maxSeconds, silenceMs, seed: chosen } = this.#settings();
    this.#seed = seed ?? chosen ?? drawSeed();
    this.figures = { ...this.figures, seed: this.#seed };
    const start = {
      takes: true,
      voices: true,
      turn_taking: vad ? "vad" : "manual",
      lag,
      max_seconds: maxSeconds,
      lead_ms: LEAD_MS + Math.ceil(Math.min(MAX_LATENCY_MS, this.#audio.outputLatencyMs)),
      sampling: this.#sampling(),
      ...(vad && { vad: { silence_ms: silenceMs } }),
    };
    const whileCurrent = (event) => session === this.#session && this.#onEvent(event);
    const session = new ContinuationClient(this.#openSocket, start, whileCurrent);
    this.#session = session;
  }

  async #end() {
    this.#session?.close();
    this.#session = null;
    await this.#silence();
    this.#setPhase("idle");
  }

  async #fail(code, message = "") {
    this.#session?.close();
    this.#session = null;
    [this.problem, this.grip] = [{ code, message }, "free"];
    this.#setPhase("problem");
    await this.#silence();
    this.#audio.closeMicrophone();
    this.#changed();
  }

  /** Nothing is taken and nothing is played any more. What was said last can be said again elsewhere. */
  async #silence() {
    this.#endReplay();
    this.#took();
    const spoken = this.#spoken;
    this.#speakWhenStarted = this.#vad = this.asking = this.away = false;
    this.#spoken = this.#expected = this.#clock = this.#takeAfter = this.keptTake = null;
    [this.takes, this.#takesKept] = [[], 0];
    await this.#stopCapture();
    const heard = await this.#audio.stopPlayback();
    if (spoken?.prompt) this.#remember(spoken, heard ?? spoken.reported);
    this.#unsent = [];
    this.#takePrompt();
    this.tape?.stop();
  }

  #endReplay() {
    if (this.#replay === null) return;
    this.#replay = null;
    this.#audio.stopFile();
    if (this.phase === "replaying") this.#setPhase(this.#session === null ? "idle" : "ready");
  }

  // Speech out

  #constraints() {
    const { echoCancellation, noiseSuppression, autoGainControl, microphone } = this.#settings();
    return { echoCancellation, noiseSuppression, autoGainControl, deviceId: microphone };
  }

  /**
   * Opens the microphone; false where nobody waits for it any more. wanted(): whether to begin at once although the
   * browser has asked: whoever let go of the button to answer it does not talk.
   */
  async #openMicrophone(wanted) {
    if (this.#audio.hasMicrophone) return true;
    this.problem = null;
    this.#setPhase("asking");
    const givenUp = new Promise((resolve) => (this.#giveUp = () => resolve(false)));
    await this.#audio.open();
    this.asking = !(await this.#audio.mayUseMicrophone());
    this.#changed();
    const opened = await Promise.race([this.#audio.openMicrophone(this.#constraints()), givenUp]);
    const asked = this.asking;
    this.asking = false;
    this.#giveUp = () => {};
    if (this.phase !== "asking") {
      this.#audio.closeMicrophone(); // the session was lost while the browser asked
      return false;
    }
    this.#setPhase(this.#session === null ? "idle" : this.#session.started ? "ready" : "connecting");
    if (!opened) {
      this.#audio.closeMicrophone();
      return false;
    }
    this.#withdrawn("microphone"); // what was wrong with the one before
    if (!asked || wanted()) return true;
    this.grip = "free";
    this.#told("The microphone is on. Now hold the button and talk.", { topic: "microphone" });
    return false;
  }

  /** Takes what the microphone hears from now on. */
  #listen() {
    this.#source = "microphone";
    this.#watch();
    this.#beginPrompt();
    this.#audio.startCapture();
  }

  async #handOver() {
    const nothing = this.#check?.dead || (this.#source === "microphone" && this.#audio.muted);
    await this.#stopCapture();
    const short = this.#promptSamples < FRAME;
    if (short && !nothing) this.#told(TOO_SHORT); // else what is wrong has been told
    if (this.#session === null) return;
    if (short || nothing) this.#begin();
    else if (this.#session.started) this.#speak();
    else this.#speakWhenStarted = true;
  }

  #watch() {
    this.#check = this.#audio.muted ? null : new MicrophoneCheck(this.#vad ? DEAD : DEAF);
    if (this.#audio.muted && !this.#vad) {
      this.#told("You have muted the microphone: nothing is heard.", { rank: "error", topic: "microphone" });
    }
  }

  #onSilence() {
    const text = "The microphone hears nothing. It may be muted, or the wrong one: choose another one under Sound.";
    if (this.#check.silent) this.#told(text, { rank: "error", topic: "microphone" });
    else this.#withdrawn("microphone");
  }

  /** The system muted the microphone, or ended that. */
  #onMuted(muted) {
    if (muted) this.#told("The system has muted the microphone.", { rank: "error", topic: "microphone" });
    else this.#withdrawn("microphone");
  }

  async #onMicrophoneLost({ code }) {
    if (this.#vad || (this.phase === "asking" && this.#session === null)) {
      await this.#fail(code);
      return;
    }
    this.#told("The microphone is gone. Plug it in or choose another one, then hold and talk: nothing is lost.", {
      rank: "error",
      topic: "microphone",
    });
    if (this.#source === "microphone") {
      this.grip = "free";
      await this.#stopCapture();
      if (this.phase === "talking") this.#setPhase("ready");
    }
    this.#changed();
  }

  #beginPrompt() {
    this.#speakWhenStarted = false;
    this.tape.roll(this.#audio.frame);
    this.#begin();
  }

  /** What can be done as soon as the session has started. */
  #begin() {
    if (!this.#session.started) return;
    for (const piece of this.#unsent) this.#send(piece);
    this.#unsent = [];
    if (this.#speakWhenStarted) {
      this.#speakWhenStarted = false;
      this.#speak();
    } else if (this.phase !== "asking") {
      this.#setPhase(this.#source !== null && !this.#vad ? "talking" : "ready");
    }
  }

  async #stopCapture() {
    if (this.#source === null) return;
    await this.#audio.stopCapture();
    this.#audio.stopFile();
    [this.#source, this.#check] = [null, null];
  }

  #onSpeech({ frame, pcm }) {
    if (this.#source === null || !pcm.length) return;
    if (this.#source === "microphone" && this.#check?.take(pcm)) this.#onSilence();
    this.#clock = { frame: frame + (pcm.length * this.#audio.rate) / SAMPLE_RATE, position: null };
    this.tape.write(YOU, frame, pcm);
    if (this.#session?.started) this.#send(pcm);
    else if (this.phase !== "queued") this.#unsent.push(pcm);
    if (!this.#vad) this.#keep(pcm);
    if (this.phase === "talking" || this.phase === "ready") this.level = level(pcm);
    this.#changed();
  }

  #send(pcm) {
    const session = this.#session;
    if (this.#expected !== null) session.hearAll(pcm);
    else if (!session.hear(pcm)) {
      this.#told("The network is too slow: some of what you said was lost.", { rank: "warning", topic: "network" });
    }
    if (this.#clock !== null) this.#clock.position = session.position;
  }

  #keep(pcm) {
    this.#promptSamples += pcm.length;
    if (this.#promptSamples <= MAX_PROMPT_SAMPLES) this.#prompt.push(pcm);
  }

  /** This turn's speech, null if there is none or too much to be kept; the next turn's begins. */
  #takePrompt() {
    const whole = this.#promptSamples > 0 && this.#promptSamples <= MAX_PROMPT_SAMPLES;
    const prompt = whole ? join(this.#prompt) : null;
    this.#prompt = [];
    this.#promptSamples = 0;
    return prompt;
  }

  /** Another continuation of this turn's prompt; with a seed of its own, or it would say the same. */
  #take(turn) {
    const seed = drawSeed();
    this.#audio.stopFile();
    this.#session.take(turn, { ...this.#sampling(), seed: BigInt(seed) });
    this.#taking = new Promise((resolve) => (this.#took = resolve));
    this.figures = { ...this.figures, seed };
    this.#setPhase("waiting");
  }

  /** A person talks instead: a take that was asked for is interrupted as soon as it has a turn. */
  async #takeNoMore() {
    if (this.#takeAfter !== null) {
      this.#takeAfter = null;
      this.#setPhase("ready");
    }
    await this.#taking;
  }

  #speak() {
    const { turn } = this.#session;
    this.takes = [];
    const speechEnd = this.#expected === null ? this.#clock.frame : null;
    this.#spoken = new Spoken(turn, speechEnd, this.#takePrompt(), this.#expected);
    this.#expected = null;
    this.#session.speak();
    this.#setPhase("waiting");
  }

  async #interrupt() {
    const [session, spoken, lives] = [this.#session, this.#spoken, this.#lives];
    if (spoken === null) return;
    this.#spoken = null; // a second interruption of this turn means nothing
    if (this.#vad) this.#setPhase(this.#takeAfter === null ? "talking" : "waiting"); // what comes meanwhile is newer
    const heard = (await this.#audio.stopPlayback()) ?? spoken.reported;
    if (session !== this.#session) return;
    if (lives === this.#lives) session.interrupt(spoken.turn, heard); // else there is no such turn any more
    if (this.#spoken !== null) return; // the next one has been handed over meanwhile
    this.#remember(spoken, heard);
    this.tape.mark({ kind: "interrupted", at: this.tape.position(this.#audio.frame) });
    if (!this.#vad) this.#setPhase("ready");
  }

  // Events in

  #onEvent(event) {
    switch (event.type) {
      case "session.started":
        this.figures = { ...this.figures, topP: event.sampling?.top_p ?? null };
        this.#takesKept = event.takes ?? 0;
        this.#begin();
        break;
      case "session.queued":
        this.place = event.place;
        this.#waitInLine();
        break;
      case "session.refused":
        this.#fail(event.code, event.message);
        break;
      case "session.closed":
        this.#fail(event.reason);
        break;
      case "turn.speaking":
        if (event.turn === this.#spoken?.turn) this.#audio.begin(event.turn);
        break;
      case "turn.voice":
        if (event.turn === this.#spoken?.turn) this.#spoken.voice = event.voice;
        break;
      case "audio":
        if (event.turn !== this.#spoken?.turn) break; // the rest of a turn that was interrupted
        this.#spoken.add(event.pcm);
        this.#audio.push(event.turn, event.pcm);
        break;
      case "turn.done":
        this.#onDone(event);
        break;
      case "speech.started":
        if (event.turn === this.#spoken?.turn) this.#interrupt();
        else this.#setPhase("talking");
        break;
      case "speech.stopped":
        this.#spoken = new Spoken(event.turn, this.#frameOf(event.at_samples), null);
        this.takes = [];
        this.#setPhase("waiting");
        break;
      case "interrupted":
        if (event.turn !== this.#takeAfter) break;
        this.#takeAfter = null;
        this.#take(event.turn);
        break;
      case "take.started":
        this.#took();
        this.#spoken = new Spoken(event.turn, null, null);
        this.tape.roll(this.#audio.frame);
        this.#setPhase("waiting");
        break;
      case "take.kept":
        this.keptTake = event.of;
        this.#changed();
        break;
      case "input.dropped":
        this.#dropped += event.samples;
        this.#told(`The server is too slow: it has lost ${duration(this.#dropped)} of what you said.`, {
          rank: "warning",
          topic: "server",
        });
        break;
      case "error":
        this.#onError(event);
        break;
      case "lost":
        this.away = true;
        this.#changed();
        break;
      case "restored":
        this.away = false;
        if (event.turn !== null) {
          this.#goBack(event.turn);
          break;
        }
        this.#told(`The connection broke and was restored after ${(event.afterMs / 1000).toFixed(1)} s: nothing is lost.`, {
          topic: "connection",
        });
        this.#changed();
        break;
      case "disconnected":
        this.#onDisconnected(event);
        break;
    }
  }

  /** The server died, and another one goes on: nothing of this turn and of what came after it is there any more. */
  async #goBack(turn) {
    this.#told("The server failed, and another one goes on. What was said since its last answer is lost.", {
      rank: "warning",
      topic: "connection",
    });
    this.#lives += 1;
    this.#takeAfter = null;
    if (this.#vad && this.phase === "talking") this.#setPhase("ready"); // a voice will be noticed anew
    this.#took();
    const [session, spoken] = [this.#session, this.#spoken];
    if (spoken !== null && spoken.turn >= turn) { // the rest of one before it comes still
      [this.#spoken, this.#stale] = [null, true];
      const heard = (await this.#audio.stopPlayback()) ?? spoken.reported;
      this.#stale = false;
      if (session !== this.#session) return;
      this.#remember(spoken, heard);
    }
    if (this.#spoken === null && (this.phase === "waiting" || this.phase === "speaking")) this.#setPhase("ready");
    this.#changed();
  }

  async #waitInLine() {
    this.#setPhase("queued");
    if (this.#source !== "microphone" || this.#vad) return;
    this.grip = "free";
    await this.#stopCapture(); // nobody hears this yet: whose turn it is will be told
    this.#unsent = [];
    this.#takePrompt();
  }

  #onDone({ turn, samples, mean_step_ms: stepMs }) {
    if (stepMs !== null) this.figures = { ...this.figures, stepMs };
    if (turn !== this.#spoken?.turn) return;
    this.#spoken.total = samples;
    if (samples > 0) {
      this.#audio.complete(turn);
    } else {
      this.#told("It had nothing to add.");
      this.#finish();
    }
  }

  #onError({ code, message, fatal, in_reply_to: reply }) {
    if (fatal) {
      this.#fail(code, message);
      return;
    }
    if (reply === "interrupt" && this.#takeAfter === null) return; // it has gone by its own clock meanwhile
    this.#told(`The server says: ${message}`, { rank: "warning" });
    if (reply === "take") this.#took();
    if (reply === "interrupt") this.#takeAfter = null;
    if (reply === "speak" || code === "empty_prompt") this.#spoken = null; // nothing of it will come
    if (this.#spoken === null && this.phase === "waiting") this.#setPhase("ready");
  }

  async #onDisconnected({ opened, code }) {
    if (opened) await this.#fail(code === 1001 ? "stopping" : "lost");
    else await this.#fail(await this.#whyRefused());
  }

  // Playback

  #onStarted({ turn, frame }) {
    if (turn !== this.#spoken?.turn || this.#stale) return;
    const { speechEnd } = this.#spoken;
    const sinceMs = (1000 * (frame - speechEnd)) / this.#audio.rate + this.#audio.outputLatencyMs;
    const ms = speechEnd === null ? null : sinceMs;
    const firstSound = this.tape.position(frame);
    this.tape.mark({ kind: "turn", speechEnd: speechEnd === null ? firstSound : this.tape.position(speechEnd), firstSound, ms });
    this.figures = { ...this.figures, firstSoundMs: ms };
    this.#setPhase("speaking");
  }

  #onPlayed({ turn, frame, pcm, heard, buffered, targetMs, underruns, drained }) {
    const spoken = this.#spoken;
    this.tape?.write(MACHINE, frame, pcm);
    if (turn !== spoken?.turn || this.#stale) return;
    spoken.underrunsBefore ??= underruns;
    if (underruns > this.figures.underruns) {
      this.#told(`Sound came too late and left a gap. From now on ${targetMs} ms are held in reserve.`, { topic: "buffer" });
    }
    this.figures = { ...this.figures, bufferMs: (1000 * buffered) / SAMPLE_RATE, targetMs, underruns };
    this.level = level(pcm);
    if (heard > spoken.reported) {
      spoken.reported = heard;
      this.#session.played(turn, heard, underruns - spoken.underrunsBefore);
    }
    if (drained) this.#finish();
    else this.#changed();
  }

  /** The continuation was played to its end. */
  #finish() {
    const spoken = this.#spoken;
    this.#spoken = null;
    this.#audio.stopPlayback();
    this.#remember(spoken, spoken.total);
    if (!this.#vad) this.tape.stop();
    this.#setPhase("ready");
  }

  /** Keeps what a repetition needs, or says what a repetition gave. */
  #remember(spoken, heard) {
    const reply = spoken.pcm.subarray(0, heard);
    const number = 1 + (this.takes.at(-1)?.number ?? 0);
    this.takes = [...this.takes, { turn: spoken.turn, number, pcm: reply }].slice(-Math.max(1, this.#takesKept));
    this.keptTake = spoken.turn;
    const sampling = encodeControl(this.#sampling());
    const { expected } = spoken;
    if (expected !== null) {
      if (expected.first && expected.sampling === sampling) this.#told(compare(expected.reply, reply));
    } else if (spoken.prompt !== null) {
      this.#last = { prompt: spoken.prompt, seed: this.#seed, first: spoken.turn === 1, sampling, reply };
    }
  }

  /** The audio clock when the session's speech was at this sample, null if that cannot be said. */
  #frameOf(position) {
    const clock = this.#clock;
    if (clock === null || clock.position === null) return null;
    return clock.frame - ((clock.position - position) * this.#audio.rate) / SAMPLE_RATE;
  }

  #sampling() {
    const { temperature, topK, topP } = this.#settings();
    return { temperature, top_k: topK, top_p: topP, seed: BigInt(this.#seed) };
  }

  #setPhase(phase) {
    if (phase !== this.phase) this.level = 0;
    this.phase = phase;
    this.#changed();
  }
}

function level(pcm) {
  let sum = 0;
  for (const sample of pcm) sum += sample * sample;
  return loudness(Math.sqrt(sum / Math.max(1, pcm.length)) / 32768);
}

function join(parts) {
  const joined = new Int16Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

/** Whether a repetition gave the same, over the length that both were heard. */
function compare(before, now) {
  const length = Math.min(before.length, now.length);
  const at = now.subarray(0, length).findIndex((sample, index) => sample !== before[index]);
  if (at < 0) return `The same again, sample for sample, for ${seconds(length)} s.`;
  return `The same for ${seconds(at)} s, then different.`;
}

function seconds(samples) {
  return (samples / SAMPLE_RATE).toFixed(1);
}

function duration(samples) {
  const ms = Math.ceil((1000 * samples) / SAMPLE_RATE);
  return ms < 1000 ? `${ms} ms` : `${seconds(samples)} s`;
}

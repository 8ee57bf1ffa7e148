// A socket and a device that tests play.

import { decodeAudio, encodeAudio } from "../../streaming/web/protocol.js";

export class FakeSocket extends EventTarget {
  bufferedAmount = 0;
  sent = [];
  closed = null;

  send(data) {
    if (this.closed === null) this.sent.push(data);
  }

  close(code = 1005) {
    this.closed ??= code;
  }

  open() {
    this.dispatchEvent(new Event("open"));
  }

  receive(data) {
    this.dispatchEvent(Object.assign(new Event("message"), { data }));
  }

  say(message) {
    this.receive(JSON.stringify(message));
  }

  /** length samples of a turn's continuation. */
  speak(turn, position, length, value = turn) {
    this.receive(encodeAudio(turn, position, new Int16Array(length).fill(value)));
  }

  end(code, reason = "") {
    this.dispatchEvent(Object.assign(new Event("close"), { code, reason }));
  }

  /** The control messages that were sent. */
  said() {
    return this.sent.filter((data) => typeof data === "string").map((text) => JSON.parse(text));
  }

  /** The types of all that was sent after session.start, audio in one word however many pieces. */
  story() {
    const words = this.sent.map((data) => (typeof data === "string" ? JSON.parse(data).type : "audio"));
    return words.slice(1).filter((word, index, all) => word !== "audio" || all[index - 1] !== "audio");
  }

  /** The audio messages that were sent. */
  heard() {
    return this.sent.filter((data) => typeof data !== "string").map((bytes) => decodeAudio(bytes));
  }
}

/** A device at 48 kHz whose clock stands where a test puts it. */
export class FakeAudio {
  rate = 48_000;
  frame = 0;
  outputLatencyMs = 10;
  capturing = false;
  played = [];
  pushed = []; // the turns of what was handed over
  turn = null;
  heard = 0;
  fails = null;
  granted = true; // whether the browser need not ask
  hasMicrophone = false;
  muted = false;
  recording = null; // what is played to the person alone

  async open() {
    if (this.fails) throw this.fails;
  }

  async mayUseMicrophone() {
    return this.granted;
  }

  async openMicrophone(options) {
    this.options = options;
    await this.permission;
    if (this.fails) throw this.fails;
    return (this.hasMicrophone = true);
  }

  closeMicrophone() {
    this.hasMicrophone = false;
  }

  startCapture() {
    this.capturing = true;
  }

  async stopCapture() {
    this.capturing = false;
  }

  playRecording(pcm) {
    this.recording = pcm;
  }

  stopFile() {
    this.recording = null;
  }

  begin(turn) {
    [this.turn, this.heard] = [turn, 0];
    this.played = [];
  }

  /** Takes the buffer with it, as a message to the audio thread does. */
  push(turn, pcm) {
    const taken = structuredClone(pcm, { transfer: [pcm.buffer] });
    this.pushed.push(turn);
    if (turn === this.turn) this.played.push(...taken);
  }

  complete(turn) {
    this.completed = turn;
  }

  async stopPlayback() {
    this.turn = null;
    return this.heard;
  }

  /** A person talks for so long. */
  talk(milliseconds, sample = 1000) {
    for (let at = 0; at < milliseconds; at += 20) {
      this.onSpeech({ frame: this.frame, pcm: new Int16Array(480).fill(sample), last: false });
      this.frame += 960;
    }
  }

  /** The audio thread says this of a turn, whichever is being played. */
  tell(turn, { heard, underruns = 0, drained = false }) {
    const pcm = new Int16Array(480);
    this.onPlayed({ turn, frame: this.frame, pcm, heard, buffered: 0, targetMs: 80, underruns, drained });
  }

  /** From here on a stop is answered when what this returns is called. */
  holdStop() {
    const stopped = [];
    this.stopPlayback = () => new Promise((resolve) => stopped.push(resolve));
    return () => {
      delete this.stopPlayback;
      stopped.splice(0).forEach((resolve) => resolve(this.heard));
    };
  }

  /** The loudspeaker plays so many samples of the turn. */
  play(samples, drained = false) {
    if (this.heard === 0) this.onStarted({ turn: this.turn, frame: this.frame });
    const pcm = Int16Array.from(this.played.slice(this.heard, this.heard + samples));
    this.heard += samples;
    const [buffered, frame] = [this.played.length - this.heard, this.frame];
    this.frame += 2 * samples;
    this.onPlayed({ turn: this.turn, frame, pcm, heard: this.heard, buffered, targetMs: 80, underruns: 0, drained });
  }
}

/**
 * The client of a session of the native protocol: calls in, events out. It outlives its connection where the server
 * allows that, and needs nothing of a browser but something that behaves like a WebSocket.
 */

import { ReplayBook } from "./replay-book.js";
import { FRAME, PROTOCOL, ProtocolError, decodeAudio, decodeControl, encodeAudio, encodeControl } from "./protocol.js";

const SECOND_BYTES = 48_000;
/** Speech that the network does not take: two seconds, or eight where a dead connection may be the reason. */
export const MAX_UNSENT_BYTES = 2 * SECOND_BYTES;
export const MAX_UNSENT_RESUMABLE_BYTES = 8 * SECOND_BYTES;
export const MAX_KEPT = 5000; // messages; 100 s of a microphone's
export const LOOK_MS = 1000;
export const SILENT_LOOKS = 5; // without a word, although each asks for one, before a connection counts as broken
const ATTEMPT_MS = 5000;
const RETRY_MS = [0, 100, 200, 400, 800, 1600]; // before each attempt to come back; the last one again and again
const ABNORMAL = 1006; // no close frame came: the connection broke
const UNCOUNTED = new Set(["pong", "ack", "session.queued", "session.resumed", "session.refused"]);

/**
 * One session's client. onEvent(event) gets the server's messages as they are, {type: "audio", turn, position, pcm} for
 * binary ones; {type: "lost", seconds} when the connection broke and the server keeps the session for so long, {type:
 * "restored", afterMs, turn} when it goes on, with the open turn where all is as before it, null where nothing is lost;
 * and at the end exactly one {type: "disconnected", opened, code, reason}; opened: whether there ever was a connection.
 */
export class ContinuationClient {
  /** The turn that speech belongs to. */
  turn = 1;
  /** Samples of speech sent so far, over all turns. */
  position = 0;
  /** Samples that were not sent because the network took no more. */
  lostSamples = 0;
  started = false;
  #connect;
  #onEvent;
  #socket = null;
  #abandoned = []; // sockets that broke or may have: to close one in form would end the session
  #opened = false;
  #over = false;
  #heard = { turn: 0, samples: 0 };
  #book = null;
  #resume = null; // how to come back
  #lostAt = null;
  #attempts = 0;
  #timer = null; // of the attempt to come back
  #looking = null;
  #silent = 0;
  #played = null; // the latest report: not counted, so said again
  #backlog = 0; // bytes of what was said again and the network has not taken yet

  /** connect(): a new WebSocket to the server; start: the fields of `session.start`. */
  constructor(connect, start, onEvent) {
    [this.#connect, this.#onEvent] = [connect, onEvent];
    this.#open(() => {
      this.#opened = true;
      this.#say("session.start", { protocol: PROTOCOL, resume: true, ...start });
    });
  }

  /** Sends speech, Int16Array at 24 kHz. False if the network is so far behind that it was dropped instead. */
  hear(pcm) {
    if (this.#isBehind()) {
      this.lostSamples += pcm.length;
      return false;
    }
    this.#hear(pcm);
    return true;
  }

  /** Sends recorded speech, however long, as fast as it goes. */
  hearAll(pcm) {
    for (let at = 0; at < pcm.length; at += FRAME) this.#hear(pcm.subarray(at, at + FRAME));
  }

  /** The prompt is over: go on. */
  speak() {
    this.#command("speak", { turn: this.turn });
  }

  /** So much of this turn's continuation has left the loudspeaker, and so often it ran dry. Said once a frame. */
  played(turn, samples, underruns) {
    const before = this.#played;
    this.#played = { turn, samples, underruns };
    const sameFrame = before !== null && Math.floor(before.samples / FRAME) === Math.floor(samples / FRAME);
    if (sameFrame && before.turn === turn && before.underruns === underruns) return;
    if (this.#lostAt === null) this.#say("played", this.#played);
  }

  /** Stop; only so much of it was heard. Speech belongs to the next turn from here on. */
  interrupt(turn, heardSamples) {
    this.#command("interrupt", { turn, heard_samples: heardSamples });
    this.turn = Math.max(this.turn, turn + 1);
  }

  /** Speak anew from the end of this turn's prompt. */
  take(turn, sampling) {
    this.#command("take", { turn, sampling });
  }

  /** Go on from the end of this turn, as if none after it had been. */
  keepTake(turn) {
    this.#command("take.keep", { turn });
  }

  /** From the next turn on. */
  update(sampling, maxSeconds) {
    this.#command("session.update", { sampling, max_seconds: maxSeconds });
  }

  /** Ends the session. No event comes after it. */
  close() {
    if (this.#over) return;
    if (this.started && this.#lostAt === null) this.#say("session.close", {});
    this.#leave(1000);
  }

  #hear(pcm) {
    this.#send(encodeAudio(this.turn, this.position, pcm));
    this.position += pcm.length;
  }

  #isBehind() {
    if (this.#lostAt !== null) return this.#book.unanswered.length >= MAX_KEPT;
    const unsent = this.#socket?.bufferedAmount ?? 0;
    this.#backlog = Math.min(this.#backlog, unsent);
    const most = this.#book === null ? MAX_UNSENT_BYTES : MAX_UNSENT_RESUMABLE_BYTES;
    return unsent - this.#backlog > most;
  }

  #command(type, fields) {
    this.#send(encodeControl({ type, ...fields }));
  }

  /** A counted message: kept until it has arrived. */
  #send(data) {
    if (this.#over) return;
    this.#book?.send(data);
    if (this.#lostAt === null) this.#socket.send(data);
  }

  /** One that is not counted. */
  #say(type, fields) {
    if (!this.#over) this.#socket.send(encodeControl({ type, ...fields }));
  }

  // The connection

  #open(greet) {
    const socket = this.#connect();
    const whileCurrent = (handle) => (event) => !this.#over && socket === this.#socket && handle(event);
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("open", whileCurrent(greet));
    socket.addEventListener("message", whileCurrent(({ data }) => this.#receive(data)));
    socket.addEventListener("close", whileCurrent(({ code, reason }) => this.#onClose(code, reason)));
  }

  #onClose(code, reason) {
    if (this.#lostAt !== null || (this.#book !== null && code === ABNORMAL)) this.#comeBack();
    else this.#end(code, reason);
  }

  /** The connection is broken, or the attempt to restore it: the next attempt, for as long as the session is kept. */
  #comeBack() {
    this.#abandoned.push(this.#socket);
    this.#socket = null;
    if (this.#lostAt === null) {
      [this.#lostAt, this.#attempts] = [performance.now(), 0];
      this.#onEvent({ type: "lost", seconds: this.#resume.seconds });
      if (this.#over) return;
    }
    const wait = RETRY_MS[Math.min(this.#attempts++, RETRY_MS.length - 1)];
    clearTimeout(this.#timer);
    if (performance.now() + wait - this.#lostAt > 1000 * this.#resume.seconds) this.#end(ABNORMAL, "");
    else this.#timer = setTimeout(() => this.#attempt(), wait);
  }

  #attempt() {
    this.#timer = setTimeout(() => this.#comeBack(), ATTEMPT_MS);
    this.#open(() => {
      this.#say("session.resume", { token: this.#resume.token, received: this.#book.received, position: this.position });
    });
  }

  #restore({ received, turn = null }) {
    clearTimeout(this.#timer);
    if (turn === null) this.#book.acknowledge(received);
    else this.#goBack(turn);
    for (const data of this.#book.unanswered) this.#socket.send(data);
    this.#backlog = this.#socket.bufferedAmount;
    if (this.#played !== null) this.#say("played", this.#played);
    const afterMs = performance.now() - this.#lostAt;
    [this.#lostAt, this.#silent] = [null, 0];
    this.#closeAbandoned(); // the server has cut them: they hold the session no more
    this.#onEvent({ type: "restored", afterMs, turn });
  }

  /** The server died, and another one goes on from the end of the turn before this one: what was said since is lost. */
  #goBack(turn) {
    [this.#book, this.#played] = [new ReplayBook(), null];
    this.turn = Math.min(this.turn, turn);
    if (this.#heard.turn >= turn) this.#heard = { turn: 0, samples: 0 };
  }

  /** Asks whether anybody is there: a browser does not tell that a network has fallen silent. */
  #look() {
    if (this.#lostAt !== null) return;
    if (this.#silent++ >= SILENT_LOOKS) this.#comeBack();
    else this.#say("ping", { id: 0, client_time_ms: performance.now() });
  }

  #end(code, reason, closeCode = 1000) {
    this.#leave(closeCode);
    this.#onEvent({ type: "disconnected", opened: this.#opened, code, reason });
  }

  #leave(closeCode) {
    this.#over = true;
    clearTimeout(this.#timer);
    clearInterval(this.#looking);
    this.#socket?.close(closeCode);
    this.#closeAbandoned();
  }

  #closeAbandoned() {
    for (const socket of this.#abandoned.splice(0)) socket.close();
  }

  // What comes

  #receive(data) {
    this.#silent = 0;
    try {
      this.#handle(typeof data === "string" ? decodeControl(data) : { type: "audio", ...decodeAudio(data) });
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      this.#end(1002, error.message, 4002);
    }
  }

  #handle(event) {
    if (this.#lostAt !== null) {
      this.#answered(event);
      return;
    }
    if (event.type === "session.started") this.#begin(event);
    else if (event.type === "ack") this.#book?.acknowledge(event.received);
    else if (this.#book !== null && !UNCOUNTED.has(event.type) && this.#book.receive()) {
      this.#say("ack", { received: this.#book.received });
    }
    if (event.type === "audio") this.#follow(event);
    else if (event.type === "turn.done") this.turn = Math.max(this.turn, event.turn + 1);
    else if (event.type === "take.started" || event.type === "take.kept") this.turn = Math.max(this.turn, event.turn);
    if (event.type !== "ack" && event.type !== "pong") this.#onEvent(event);
  }

  #begin({ turn, resume }) {
    [this.started, this.turn] = [true, turn];
    if (!resume) return;
    [this.#resume, this.#book] = [resume, new ReplayBook()];
    this.#looking = setInterval(() => this.#look(), LOOK_MS);
  }

  /** The first word of a new connection. */
  #answered(event) {
    if (event.type === "session.resumed") this.#restore(event);
    else if (event.type === "session.refused" && event.retry_after_ms > 0) this.#comeBack();
    else this.#end(ABNORMAL, "");
  }

  #follow({ turn, position, pcm }) {
    if (turn !== this.#heard.turn) this.#heard = { turn, samples: 0 };
    if (position !== this.#heard.samples) {
      throw new ProtocolError(`audio at sample ${position} of turn ${turn}, but ${this.#heard.samples} came before`);
    }
    this.#heard.samples += pcm.length;
  }
}

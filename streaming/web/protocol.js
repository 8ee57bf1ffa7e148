/**
 * The native protocol of `docs/protocol.md`: bytes and messages in, calls and events out. Needs nothing of a browser but
 * something that behaves like a WebSocket.
 */

export const SAMPLE_RATE = 24_000;
export const FRAME = 1920;
export const PROTOCOL = 1;
export const MAX_AUDIO_SAMPLES = 48_000;
export const MAX_UNSENT_BYTES = 2 * MAX_AUDIO_SAMPLES; // two seconds of speech that the network does not take
const HEADER_BYTES = 16;
const PCM16 = 1;

/** The server broke the protocol. */
export class ProtocolError extends Error {}

/** One binary message. position: in samples; pcm: Int16Array. */
export function encodeAudio(turn, position, pcm) {
  const bytes = new ArrayBuffer(HEADER_BYTES + 2 * pcm.length);
  const view = new DataView(bytes);
  view.setUint8(0, PCM16);
  view.setUint32(4, turn, true);
  view.setBigUint64(8, BigInt(position), true);
  pcm.forEach((sample, index) => view.setInt16(HEADER_BYTES + 2 * index, sample, true));
  return bytes;
}

/** {turn, position, pcm} of one binary message. Throws ProtocolError. */
export function decodeAudio(bytes) {
  const size = bytes.byteLength - HEADER_BYTES;
  if (size < 0 || size % 2 || size > 2 * MAX_AUDIO_SAMPLES) throw new ProtocolError(`${bytes.byteLength} bytes of audio`);
  const view = new DataView(bytes);
  if (view.getUint8(0) !== PCM16) throw new ProtocolError(`audio of kind ${view.getUint8(0)}`);
  const pcm = Int16Array.from({ length: size / 2 }, (_, index) => view.getInt16(HEADER_BYTES + 2 * index, true));
  return { turn: view.getUint32(4, true), position: Number(view.getBigUint64(8, true)), pcm };
}

/** One control message. Throws ProtocolError. */
export function decodeControl(text) {
  let message;
  try {
    message = JSON.parse(text);
  } catch {
    throw new ProtocolError("a message that is not JSON");
  }
  if (typeof message?.type !== "string") throw new ProtocolError("a message without a type");
  return message;
}

/**
 * One session over one socket that is being opened.
 *
 * listener(event) gets the server's messages as they are, {type: "audio", turn, position, pcm} for binary ones, and at the
 * end exactly one {type: "disconnected", opened, code, reason}; opened: whether there ever was a connection.
 */
export class Session {
  /** The turn that speech belongs to. */
  turn = 1;
  /** Samples of speech sent so far, over all turns. */
  position = 0;
  /** Samples that were not sent because the network took no more. */
  lostSamples = 0;
  started = false;
  #socket;
  #listener;
  #opened = false;
  #over = false;
  #received = { turn: 0, samples: 0 };

  /** start: the fields of `session.start`. */
  constructor(socket, start, listener) {
    this.#socket = socket;
    this.#listener = listener;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("open", () => {
      this.#opened = true;
      this.#send("session.start", { protocol: PROTOCOL, ...start });
    });
    socket.addEventListener("message", ({ data }) => this.#receive(data));
    socket.addEventListener("close", ({ code, reason }) => this.#end(code, reason));
  }

  /** Sends speech, Int16Array at 24 kHz. False if the network is so far behind that it was dropped instead. */
  hear(pcm) {
    if (this.#socket.bufferedAmount > MAX_UNSENT_BYTES) {
      this.lostSamples += pcm.length;
      return false;
    }
    this.#hear(pcm);
    return true;
  }

  /** Sends recorded speech, however long, as fast as it goes. */
  hearAll(pcm) {
    for (let at = 0; at < pcm.length; at += MAX_AUDIO_SAMPLES) this.#hear(pcm.subarray(at, at + MAX_AUDIO_SAMPLES));
  }

  /** The prompt is over: go on. */
  speak() {
    this.#send("speak", { turn: this.turn });
  }

  /** So much of this turn's continuation has left the loudspeaker. */
  played(turn, samples) {
    this.#send("played", { turn, samples });
  }

  /** Stop; only so much of it was heard. Speech belongs to the next turn from here on. */
  interrupt(turn, heardSamples) {
    this.#send("interrupt", { turn, heard_samples: heardSamples });
    this.turn = Math.max(this.turn, turn + 1);
  }

  /** From the next turn on. */
  update(sampling, maxSeconds) {
    this.#send("session.update", { sampling, max_seconds: maxSeconds });
  }

  /** Ends the session. Its listener hears no more. */
  close() {
    if (this.started) this.#send("session.close", {});
    this.#over = true;
    this.#socket.close(1000);
  }

  #hear(pcm) {
    this.#socket.send(encodeAudio(this.turn, this.position, pcm));
    this.position += pcm.length;
  }

  #send(type, fields) {
    if (!this.#over) this.#socket.send(JSON.stringify({ type, ...fields }));
  }

  #receive(data) {
    if (this.#over) return;
    try {
      this.#handle(typeof data === "string" ? decodeControl(data) : { type: "audio", ...decodeAudio(data) });
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      this.#end(1002, error.message);
      this.#socket.close(4002, "protocol error");
    }
  }

  #handle(event) {
    if (event.type === "audio") this.#count(event);
    else if (event.type === "session.started") [this.started, this.turn] = [true, event.turn];
    else if (event.type === "turn.done") this.turn = Math.max(this.turn, event.turn + 1);
    this.#listener(event);
  }

  #count({ turn, position, pcm }) {
    if (turn !== this.#received.turn) this.#received = { turn, samples: 0 };
    if (position !== this.#received.samples) {
      throw new ProtocolError(`audio at sample ${position} of turn ${turn}, but ${this.#received.samples} came before`);
    }
    this.#received.samples += pcm.length;
  }

  #end(code, reason) {
    if (this.#over) return;
    this.#over = true;
    this.#listener({ type: "disconnected", opened: this.#opened, code, reason });
  }
}

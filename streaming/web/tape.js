/**
 * Both voices on one time line: what was said and what was played, where it really was in time.
 *
 * Positions are samples at 24 kHz from the tape's beginning. While it rolls, the device's audio clock drives it; while
 * nothing is going on it stands still, so that pauses between turns are not kept. Bounded: the last ten minutes.
 */

import { SAMPLE_RATE as RATE } from "./protocol.js";

export const YOU = 0;
export const MACHINE = 1;
const BLOCK = RATE;
const MAX_BLOCKS = 600;
const PAUSE = RATE / 5; // between two stretches

export class Tape {
  /** The end of what is on it. */
  end = 0;
  /** Whether anybody made a sound. */
  hasSound = false;
  /** {kind: "turn", speechEnd, firstSound, ms} and {kind: "interrupted", at}, in order. */
  marks = [];
  #blocks = [new Map(), new Map()];
  #changedFrom = Infinity;
  #ratio;
  #offset = null; // while it rolls: the position at frame 0 of the audio clock

  /** deviceRate: in Hz, of the frames that it is given. */
  constructor(deviceRate) {
    this.#ratio = RATE / deviceRate;
  }

  get rolling() {
    return this.#offset !== null;
  }

  /** The first position that is still kept. */
  get start() {
    return Math.max(0, Math.ceil(this.end / BLOCK) - MAX_BLOCKS) * BLOCK;
  }

  /** From this frame on time counts. */
  roll(frame) {
    if (this.rolling) return;
    this.#offset = this.end + (this.end ? PAUSE : 0) - frame * this.#ratio;
  }

  stop() {
    this.#offset = null;
  }

  /** Where this frame of the audio clock is; only while it rolls. */
  position(frame) {
    return Math.max(0, Math.round(frame * this.#ratio + this.#offset));
  }

  /** Time has come to this frame, whether or not anybody made a sound. */
  advance(frame) {
    if (this.rolling) this.#extend(this.position(frame));
  }

  /** pcm: Int16Array that a voice made from this frame on. Silence takes no room. */
  write(voice, frame, pcm) {
    if (this.rolling) this.#put(voice, this.position(frame), pcm);
  }

  /** Puts something on the end at once, and moves time on by its length. */
  insert(voice, pcm) {
    const at = this.end;
    this.#put(voice, at, pcm);
    if (this.rolling) this.#offset += pcm.length;
  }

  mark(mark) {
    this.marks.push(mark);
    this.marks = this.marks.filter((kept) => (kept.speechEnd ?? kept.at) >= this.start);
  }

  /** From where on the sound is not what it was at the last call. */
  takeChangedFrom() {
    const from = this.#changedFrom;
    this.#changedFrom = Infinity;
    return from;
  }

  /** Int16Array [length], or null where this voice was silent for all of it. */
  read(voice, from, length) {
    const blocks = this.#blocks[voice];
    let pcm = null;
    for (let number = Math.floor(from / BLOCK); number * BLOCK < from + length; number++) {
      const block = blocks.get(number);
      if (!block) continue;
      pcm ??= new Int16Array(length);
      const skip = number * BLOCK - from;
      pcm.set(block.subarray(Math.max(0, -skip), length - skip), Math.max(0, skip));
    }
    return pcm;
  }

  /** Both voices in one, Int16Array [end - start]. */
  mix() {
    const frames = this.end - this.start;
    const mixed = new Int16Array(frames);
    for (const voice of [YOU, MACHINE]) {
      this.read(voice, this.start, frames)?.forEach((sample, index) => {
        mixed[index] = Math.max(-32768, Math.min(32767, mixed[index] + sample));
      });
    }
    return mixed;
  }

  /** A WAV file: left you, right the machine. */
  wav() {
    const frames = this.end - this.start;
    const view = new DataView(new ArrayBuffer(44 + 4 * frames));
    const text = (at, letters) => [...letters].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
    text(0, "RIFF");
    view.setUint32(4, 36 + 4 * frames, true);
    text(8, "WAVEfmt ");
    view.setUint32(16, 16, true);
    view.setUint16(20, 1, true); // PCM
    view.setUint16(22, 2, true);
    view.setUint32(24, RATE, true);
    view.setUint32(28, 4 * RATE, true);
    view.setUint16(32, 4, true);
    view.setUint16(34, 16, true);
    text(36, "data");
    view.setUint32(40, 4 * frames, true);
    for (const voice of [YOU, MACHINE]) {
      this.read(voice, this.start, frames)?.forEach((sample, index) => view.setInt16(44 + 4 * index + 2 * voice, sample, true));
    }
    return new Blob([view.buffer], { type: "audio/wav" });
  }

  #put(voice, at, pcm) {
    this.#extend(at + pcm.length);
    if (pcm.every((sample) => sample === 0)) return;
    this.hasSound = true;
    this.#changedFrom = Math.min(this.#changedFrom, at);
    const blocks = this.#blocks[voice];
    for (let done = 0; done < pcm.length; ) {
      const number = Math.floor((at + done) / BLOCK);
      const inside = at + done - number * BLOCK;
      const part = pcm.subarray(done, done + BLOCK - inside);
      if (!blocks.has(number)) blocks.set(number, new Int16Array(BLOCK));
      blocks.get(number).set(part, inside);
      done += part.length;
    }
  }

  #extend(end) {
    if (end <= this.end) return;
    this.end = end;
    for (const blocks of this.#blocks) {
      for (const number of blocks.keys()) {
        if ((number + 1) * BLOCK > this.start) break; // keys come in the order of time
        blocks.delete(number);
      }
    }
  }
}

/**
 * Notices a microphone that gives nothing: one that is muted, unplugged at its own end, or not the one that is spoken
 * into.
 */

import { SAMPLE_RATE } from "./protocol.js";

const PATIENCE_SAMPLES = 1.5 * SAMPLE_RATE;
/** The highest sample of a microphone that is dead: any real one has more noise of its own. */
export const DEAD = 3;
/** The same where somebody should be talking into it: -60 dB of full scale. */
export const DEAF = 33;

export class MicrophoneCheck {
  #floor;
  #samples = 0;
  #peak = 0;

  /** floor: the highest sample that still counts as nothing, `DEAD` or `DEAF`. */
  constructor(floor) {
    this.#floor = floor;
  }

  /** Whether it has given nothing for as long as one waits for a sound. */
  get silent() {
    return this.#samples >= PATIENCE_SAMPLES && this.#peak <= this.#floor;
  }

  /** Whether it has given no sound at all in that time. */
  get dead() {
    return this.silent && this.#peak <= DEAD;
  }

  /** The next samples. True when that has just become known, or is no longer so. */
  take(pcm) {
    const before = this.silent;
    for (const sample of pcm) this.#peak = Math.max(this.#peak, Math.abs(sample));
    this.#samples += pcm.length;
    return this.silent !== before;
  }
}

/**
 * Notices a microphone that gives nothing: one that is muted, unplugged at its own end, or not the one that is spoken
 * into.
 *
 * It goes by the power of 20 ms and not by the highest sample: the browser's echo cancellation turns the phases of low
 * frequencies, which made the peaks of the same speech 3 dB higher, and its power half a decibel lower.
 */

import { SAMPLE_RATE } from "./protocol.js";

const PATIENCE_SAMPLES = 1.5 * SAMPLE_RATE;
/** The power of a microphone that is dead, as a root mean square of samples: any real one has more noise of its own. */
export const DEAD = 1;
/** The same where somebody should be talking into it: -68 dB of full scale, which is speech whose peaks are at -60 dB. */
export const DEAF = 13;

export class MicrophoneCheck {
  #floor;
  #samples = 0;
  #loudest = 0;

  /** floor: the power that still counts as nothing, `DEAD` or `DEAF`. */
  constructor(floor) {
    this.#floor = floor;
  }

  /** Whether it has given nothing for as long as one waits for a sound. */
  get silent() {
    return this.#samples >= PATIENCE_SAMPLES && this.#loudest <= this.#floor;
  }

  /** Whether it has given no sound at all in that time. */
  get dead() {
    return this.silent && this.#loudest <= DEAD;
  }

  /** The next samples, about 20 ms of them. True when that has just become known, or is no longer so. */
  take(pcm) {
    const before = this.silent;
    const energy = pcm.reduce((sum, sample) => sum + sample * sample, 0);
    this.#loudest = Math.max(this.#loudest, Math.sqrt(energy / Math.max(1, pcm.length)));
    this.#samples += pcm.length;
    return this.silent !== before;
  }
}

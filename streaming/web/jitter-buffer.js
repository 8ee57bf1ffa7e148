/**
 * A jitter buffer: audio comes in bursts, leaves evenly, and every sample that left is accounted for. The page's twin
 * of `streaming/terminal/jitter_buffer.py`.
 *
 * Playback begins when `targetMs` is buffered, or when the continuation is complete. To run dry before more comes is an
 * underrun: the target grows by 20 ms up to `maxMs`, and playback pauses until the target is reached again. `maxMs`
 * must stay below the lead that the server was asked for, or playback would wait for audio that waits for playback.
 *
 * All positions and counts are samples at 24 kHz, from the turn's first one.
 */

const RATE_KHZ = 24;
export const START_MS = 80;
export const GROWTH_MS = 20;
export const MAX_MS = 240;
export const CAPACITY_MS = 12_000;
const DECAY = 0.98; // silence falls from the last sample within 10 ms: a stop is no click

export class JitterBuffer {
  /** How much waits before playback begins. A larger one is kept for later turns. */
  targetMs = START_MS;
  /** Over all turns. */
  underruns = 0;
  /** What the device holds between `pull` and the loudspeaker. */
  latencySamples = 0;
  #queue = [];
  #buffered = 0;
  #left = 0;
  #played = 0;
  #pulled = 0;
  #inDevice = []; // [samples ever pulled, the turn's position there], of what the loudspeaker has not played yet
  #playing = false;
  #dry = false; // ran out in mid-turn. A gap only if more comes: the last sample may be played before word of the end
  #complete = false;
  #last = 0;

  get bufferedSamples() {
    return this.#buffered;
  }

  /** How far into the turn `pull` is. */
  get pulledSamples() {
    return this.#left;
  }

  /** How far into the turn the loudspeaker is. */
  get playedSamples() {
    return this.#played;
  }

  /** True when the next `pull` plays. */
  get ready() {
    if (this.#playing || this.#complete) return this.#buffered > 0;
    return this.#buffered >= this.targetMs * RATE_KHZ;
  }

  /** True when the turn is complete and its last sample has left the loudspeaker. */
  get drained() {
    return this.#complete && this.#buffered === 0 && this.#played === this.#left;
  }

  /** More of the continuation, Int16Array. Bounded: past 12 s nothing more is taken; false says so. */
  push(pcm) {
    if (this.#buffered + pcm.length > CAPACITY_MS * RATE_KHZ) return false;
    this.#queue.push(pcm);
    this.#buffered += pcm.length;
    if (this.#dry && pcm.length) {
      this.#dry = false;
      this.underruns += 1;
      this.targetMs = Math.min(this.targetMs + GROWTH_MS, MAX_MS);
    }
    return true;
  }

  /** No more of this turn will come: play what is here to its end. */
  complete() {
    this.#complete = true;
  }

  /**
   * Fills `out`, Int16Array, for the device. Returns how many samples at its start are the turn's; the rest is silence.
   */
  pull(out) {
    let filled = 0;
    if (this.ready) {
      this.#playing = true;
      filled = this.#take(out);
      if (filled < out.length) {
        this.#playing = false;
        this.#dry = !this.#complete;
      }
    }
    if (filled) this.#last = out[filled - 1];
    for (let index = filled; index < out.length; index++) out[index] = this.#last = Math.trunc(this.#last * DECAY);
    this.#advance(out.length);
    return filled;
  }

  /** Throws away what has not left the loudspeaker and starts afresh for the next turn. Returns what was heard. */
  flush() {
    const heard = this.#played;
    this.#queue.length = this.#inDevice.length = 0;
    this.#buffered = this.#left = this.#played = 0;
    this.#playing = this.#dry = this.#complete = false;
    return heard;
  }

  #take(out) {
    let filled = 0;
    while (filled < out.length && this.#queue.length) {
      const head = this.#queue[0];
      const part = head.subarray(0, out.length - filled);
      out.set(part, filled);
      filled += part.length;
      if (part.length === head.length) this.#queue.shift();
      else this.#queue[0] = head.subarray(part.length);
    }
    this.#buffered -= filled;
    this.#left += filled;
    return filled;
  }

  /** The device took n more samples, so that older ones have left it. Exact to one block, never too much. */
  #advance(n) {
    this.#pulled += n;
    this.#inDevice.push([this.#pulled, this.#left]);
    while (this.#inDevice.length && this.#inDevice[0][0] + this.latencySamples <= this.#pulled) {
      this.#played = this.#inDevice.shift()[1];
    }
  }
}

/**
 * The microphone's side of the audio thread: what comes in at the device's rate leaves as 24 kHz, 16 bits, in pieces of
 * 20 ms, each with the time at which it was recorded.
 *
 * In: {type: "start"} and {type: "stop"}. Out: {type: "pcm", frame, pcm, last}; frame: the audio clock's at pcm[0], in
 * samples of the device; last: the answer to "stop", after which nothing comes until the next "start".
 */

import { SAMPLE_RATE as RATE } from "./protocol.js";
import { Resampler } from "./resampler.js";

const PIECE = 480;

class Capture extends AudioWorkletProcessor {
  #resampler = new Resampler(sampleRate, RATE);
  #active = false;
  #begun = null; // the audio clock at the first sample
  #told = 0;
  #piece = new Int16Array(PIECE);
  #filled = 0;

  constructor() {
    super();
    this.port.onmessage = ({ data }) => (data.type === "start" ? this.#start() : this.#stop());
  }

  process([input]) {
    if (!this.#active || !input.length) return true;
    this.#begun ??= currentFrame;
    this.#take(this.#resampler.process(input[0]));
    return true;
  }

  #start() {
    this.#resampler.reset();
    this.#active = true;
    this.#begun = null;
    this.#told = this.#filled = 0;
  }

  #stop() {
    if (this.#active && this.#begun !== null) this.#take(this.#resampler.flush());
    this.#active = false;
    this.#tell(true);
  }

  #take(samples) {
    for (const sample of samples) {
      this.#piece[this.#filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.#filled === PIECE) this.#tell(false);
    }
  }

  #tell(last) {
    const frame = (this.#begun ?? currentFrame) + (this.#told * sampleRate) / RATE;
    const pcm = this.#piece.slice(0, this.#filled);
    this.#told += this.#filled;
    this.#filled = 0;
    this.port.postMessage({ type: "pcm", frame, pcm, last }, [pcm.buffer]);
  }
}

registerProcessor("capture", Capture);

/**
 * The loudspeaker's side of the audio thread: continuations at 24 kHz through a jitter buffer to the device's rate.
 *
 * In: {type: "begin", turn}, {type: "push", turn, pcm}, {type: "complete", turn}, {type: "latency", samples} and {type:
 * "stop"}. Out: {type: "started", turn, frame} with the first sample of a turn; about every 20 ms {type: "played",
 * turn, frame, pcm, heard, buffered, targetMs, underruns, drained}, where pcm is exactly what left here since the last
 * one, silence included; and {type: "stopped", turn, heard} as the answer to "stop". frame: the audio clock's, in
 * samples of the device; all other positions are samples at 24 kHz.
 */

import { JitterBuffer } from "./jitter-buffer.js";
import { SAMPLE_RATE as RATE } from "./protocol.js";
import { Resampler } from "./resampler.js";

const TELL_QUANTA = Math.max(1, Math.round((0.02 * sampleRate) / 128));
const FADE_QUANTA = 5; // what is stopped falls silent within 10 ms instead of clicking

class PlaybackProcessor extends AudioWorkletProcessor {
  #buffer = new JitterBuffer();
  #resampler = new Resampler(RATE, sampleRate);
  #turn = null;
  #begun = 0; // the audio clock at the first pull of this turn
  #pulled = 0; // since then
  #audible = false;
  #ready = new Float32Array(0); // at the device's rate
  #untold = [];
  #quanta = 0;
  #fade = 0;

  constructor() {
    super();
    this.port.onmessage = ({ data }) => this.#obey(data);
  }

  process(_inputs, [[out]]) {
    if (this.#turn === null && this.#fade-- <= 0) return true;
    while (this.#ready.length < out.length) {
      const wanted = Math.max(1, Math.ceil(((out.length - this.#ready.length) * RATE) / sampleRate));
      const more = this.#resampler.process(this.#pull(wanted));
      const joined = new Float32Array(this.#ready.length + more.length);
      joined.set(this.#ready);
      joined.set(more, this.#ready.length);
      this.#ready = joined;
    }
    out.set(this.#ready.subarray(0, out.length));
    this.#ready = this.#ready.slice(out.length);
    if (this.#turn === null) this.#untold.length = 0;
    else if (++this.#quanta % TELL_QUANTA === 0) this.#tell();
    return true;
  }

  #obey(message) {
    switch (message.type) {
      case "latency":
        this.#buffer.latencySamples = message.samples;
        break;
      case "begin":
        this.#end();
        this.#resampler.reset();
        this.#ready = new Float32Array(0);
        [this.#turn, this.#begun, this.#pulled, this.#audible] = [message.turn, currentFrame, 0, false];
        break;
      case "push":
        if (message.turn === this.#turn && !this.#buffer.push(message.pcm)) this.port.postMessage({ type: "overflow" });
        break;
      case "complete":
        if (message.turn === this.#turn) this.#buffer.complete();
        break;
      case "stop":
        this.port.postMessage({ type: "stopped", turn: this.#turn, heard: this.#end() });
        break;
    }
  }

  #end() {
    if (this.#turn !== null) {
      this.#tell();
      this.#fade = FADE_QUANTA;
    }
    this.#turn = null;
    return this.#buffer.flush();
  }

  #pull(count) {
    const pcm = new Int16Array(count);
    const audible = this.#buffer.pull(pcm) > 0;
    if (audible && !this.#audible) {
      this.#audible = true;
      this.port.postMessage({ type: "started", turn: this.#turn, frame: this.#frame() });
    }
    this.#pulled += count;
    this.#untold.push(pcm);
    return Float32Array.from(pcm, (sample) => sample / 32768);
  }

  /** When the next sample that is pulled leaves. */
  #frame() {
    return this.#begun + (this.#pulled * sampleRate) / RATE;
  }

  #tell() {
    const buffer = this.#buffer;
    const length = this.#untold.reduce((sum, part) => sum + part.length, 0);
    const pcm = new Int16Array(length);
    let at = 0;
    for (const part of this.#untold) {
      pcm.set(part, at);
      at += part.length;
    }
    this.#untold.length = 0;
    this.port.postMessage(
      {
        type: "played",
        turn: this.#turn,
        frame: this.#frame() - (length * sampleRate) / RATE,
        pcm,
        heard: buffer.playedSamples,
        buffered: buffer.bufferedSamples,
        targetMs: buffer.targetMs,
        underruns: buffer.underruns,
        drained: buffer.drained,
      },
      [pcm.buffer],
    );
  }
}

registerProcessor("playback", PlaybackProcessor);

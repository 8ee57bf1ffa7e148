/**
 * Streaming change of sample rate by a windowed sinc in polyphase form (Kaiser, 1974): the same samples come out
 * however the stream is cut into blocks.
 *
 * Output n is the input at time n * from / to, so streams stay aligned; it is only held back by LOOKAHEAD samples of
 * the lower rate, 1.3 ms at 24 kHz. Flat to 84 % of the lower Nyquist frequency, 80 dB down from there on.
 */

const LOOKAHEAD = 32;
const ATTENUATION_DB = 80;
const BETA = 0.1102 * (ATTENUATION_DB - 8.7);
const TRANSITION = (ATTENUATION_DB - 7.95) / (2.285 * 2 * LOOKAHEAD * Math.PI); // of the lower Nyquist frequency

export class Resampler {
  #taps; // [up][2 * half]
  #up;
  #down;
  #half;
  #kept; // the inputs that the next output begins with
  #phase = 0; // of the next output, in 1 / up input samples after kept[half - 1]

  /** Rates in Hz, whole numbers. */
  constructor(from, to) {
    const divisor = gcd(from, to);
    this.#up = to / divisor;
    this.#down = from / divisor;
    this.#half = from === to ? 1 : Math.ceil(LOOKAHEAD * Math.max(1, from / to));
    this.#taps = from === to ? [Float32Array.of(1, 0)] : design(this.#up, this.#half, Math.min(1, to / from));
    this.reset();
  }

  /** As if nothing had come yet. */
  reset() {
    this.#kept = new Float32Array(this.#half - 1);
    this.#phase = 0;
  }

  /** The next inputs, Float32Array -> the outputs that they make certain. */
  process(input) {
    const size = 2 * this.#half;
    const joined = new Float32Array(this.#kept.length + input.length);
    joined.set(this.#kept);
    joined.set(input, this.#kept.length);
    const room = joined.length - size; // the last input that an output may begin with
    const count = Math.max(0, Math.floor(((room + 1) * this.#up - 1 - this.#phase) / this.#down) + 1);
    const output = new Float32Array(count);
    let at = 0;
    for (let index = 0; index < count; index++) {
      const taps = this.#taps[this.#phase];
      let sum = 0;
      for (let tap = 0; tap < size; tap++) sum += taps[tap] * joined[at + tap];
      output[index] = sum;
      const next = this.#phase + this.#down;
      at += Math.floor(next / this.#up);
      this.#phase = next % this.#up;
    }
    this.#kept = joined.slice(at);
    return output;
  }

  /** The end of the stream: the outputs that were held back. Then `reset`. */
  flush() {
    const rest = this.process(new Float32Array(this.#half));
    this.reset();
    return rest;
  }
}

/** Low-pass taps for each of `up` phases; cutoff: the lower rate's share of the input rate. */
function design(up, half, lower) {
  const cutoff = lower * (1 - TRANSITION / 2);
  const normal = bessel(BETA);
  return Array.from({ length: up }, (_, phase) => {
    const taps = new Float64Array(2 * half);
    let sum = 0;
    for (let tap = 0; tap < 2 * half; tap++) {
      const time = phase / up - (tap - half + 1);
      const edge = time / half;
      const window = Math.abs(edge) < 1 ? bessel(BETA * Math.sqrt(1 - edge * edge)) / normal : 0;
      taps[tap] = sinc(cutoff * time) * window;
      sum += taps[tap];
    }
    return Float32Array.from(taps, (tap) => tap / sum); // no phase louder than another
  });
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

/** The modified Bessel function of the first kind, order 0. */
function bessel(x) {
  let term = 1;
  let sum = 1;
  for (let k = 1; term > 1e-12 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

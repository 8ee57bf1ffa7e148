/**
 * Loudness by frequency: a fast Fourier transform (radix 2) under a Hann window, gathered into bands as an ear would.
 */

import { SAMPLE_RATE as RATE } from "./protocol.js";

export const WINDOW = 1024;
export const BANDS = 144;
const LOW_HZ = 70;
const HIGH_HZ = 10_500;
const FLOOR_DB = -82;
const RANGE_DB = 62;

const cosines = Float64Array.from({ length: WINDOW / 2 }, (_, k) => Math.cos((2 * Math.PI * k) / WINDOW));
const sines = Float64Array.from({ length: WINDOW / 2 }, (_, k) => -Math.sin((2 * Math.PI * k) / WINDOW));
const hann = Float64Array.from({ length: WINDOW }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / WINDOW));
const reversed = Uint16Array.from({ length: WINDOW }, (_, n) => {
  let bits = 0;
  for (let bit = 1, rest = n; bit < WINDOW; bit *= 2, rest >>= 1) bits = 2 * bits + (rest & 1);
  return bits;
});
const real = new Float64Array(WINDOW);
const imaginary = new Float64Array(WINDOW);

/** On the mel scale, from 0 at the bottom of the picture to 1 at its top. */
export function heightOf(hz) {
  return (mel(hz) - mel(LOW_HZ)) / (mel(HIGH_HZ) - mel(LOW_HZ));
}

/**
 * Those frequencies whose labels have room in a picture so many pixels high: highest first, none over another or the
 * edge.
 */
export function labelled(frequencies, deep, room) {
  let below = -Infinity; // where the last label ends
  return [...frequencies].sort((a, b) => b - a).filter((hz) => {
    const y = deep * (1 - heightOf(hz));
    if (y - room / 2 < below || y + room / 2 > deep) return false;
    below = y + room / 2;
    return true;
  });
}

const edges = Float64Array.from({ length: BANDS + 1 }, (_, band) => {
  const hz = 700 * (10 ** ((mel(LOW_HZ) + (band / BANDS) * (mel(HIGH_HZ) - mel(LOW_HZ))) / 2595) - 1);
  return (hz * WINDOW) / RATE;
});

/** pcm: Int16Array [WINDOW] -> Uint8Array [BANDS], lowest first: 0 at -82 dB or less, 255 at -20 dB or more. */
export function bands(pcm) {
  for (let n = 0; n < WINDOW; n++) {
    real[reversed[n]] = (pcm[n] / 32768) * hann[n];
    imaginary[n] = 0;
  }
  transform();
  const levels = new Uint8Array(BANDS);
  for (let band = 0; band < BANDS; band++) {
    const power = strongest(edges[band], edges[band + 1]);
    const db = 10 * Math.log10(power + 1e-12);
    levels[band] = Math.max(0, Math.min(255, (255 * (db - FLOOR_DB)) / RANGE_DB));
  }
  return levels;
}

/** The power of a full-scale tone is 1. Between two bins of the transform, what lies between their powers. */
function strongest(from, to) {
  const first = Math.ceil(from);
  if (first >= to) {
    const below = Math.floor((from + to) / 2);
    const share = (from + to) / 2 - below;
    return (1 - share) * powerOf(below) + share * powerOf(below + 1);
  }
  let most = 0;
  for (let bin = first; bin < to; bin++) most = Math.max(most, powerOf(bin));
  return most;
}

function powerOf(bin) {
  return (real[bin] ** 2 + imaginary[bin] ** 2) * (4 / WINDOW) ** 2;
}

/** In place, of what was put in in bit-reversed order. */
function transform() {
  for (let size = 2; size <= WINDOW; size *= 2) {
    const [half, stride] = [size / 2, WINDOW / size];
    for (let start = 0; start < WINDOW; start += size) {
      for (let k = 0; k < half; k++) {
        const [a, b] = [start + k, start + k + half];
        const [c, s] = [cosines[k * stride], sines[k * stride]];
        const re = c * real[b] - s * imaginary[b];
        const im = c * imaginary[b] + s * real[b];
        real[b] = real[a] - re;
        imaginary[b] = imaginary[a] - im;
        real[a] += re;
        imaginary[a] += im;
      }
    }
  }
}

function mel(hz) {
  return 2595 * Math.log10(1 + hz / 700);
}

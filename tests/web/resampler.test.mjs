// The resampler by its numbers: what passes, what does not, and that blocks leave no seam.

import assert from "node:assert/strict";
import test from "node:test";

import { Resampler } from "../../streaming/web/resampler.js";

const RATES = [
  [48_000, 24_000],
  [44_100, 24_000],
  [16_000, 24_000],
  [96_000, 24_000],
  [24_000, 48_000],
  [24_000, 44_100],
  [24_000, 16_000],
  [24_000, 24_000],
];

function tone(hz, rate, seconds) {
  return Float32Array.from({ length: Math.round(seconds * rate) }, (_, n) => Math.sin((2 * Math.PI * hz * n) / rate));
}

function whole(from, to, input) {
  const resampler = new Resampler(from, to);
  return Float32Array.from([...resampler.process(input), ...resampler.flush()]);
}

/** Amplitude of a tone in the middle of a signal. */
function amplitude(signal, hz, rate) {
  const middle = signal.subarray(signal.length / 4, (3 * signal.length) / 4);
  let [re, im, weights] = [0, 0, 0];
  middle.forEach((sample, n) => {
    const weight = 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / middle.length);
    re += weight * sample * Math.cos((2 * Math.PI * hz * n) / rate);
    im += weight * sample * Math.sin((2 * Math.PI * hz * n) / rate);
    weights += weight;
  });
  return (2 * Math.hypot(re, im)) / weights;
}

function rms(signal) {
  return Math.sqrt(signal.reduce((sum, sample) => sum + sample * sample, 0) / signal.length);
}

const db = (ratio) => 20 * Math.log10(Math.max(ratio, 1e-9));

for (const [from, to] of RATES) {
  const lower = Math.min(from, to);

  test(`${from} to ${to}: tones up to 0.84 of the lower Nyquist frequency pass within 0.01 dB`, () => {
    let ripple = 0;
    for (const share of [0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.84]) {
      const hz = (share * lower) / 2;
      ripple = Math.max(ripple, Math.abs(db(amplitude(whole(from, to, tone(hz, from, 0.4)), hz, to))));
    }
    assert.ok(ripple < 0.01, `${ripple} dB`);
  });

  test(`${from} to ${to}: what does not fit is 78 dB down, whether it would fold or be an image`, () => {
    if (from === to) return;
    let worst = -Infinity;
    if (from > to) {
      for (const share of [1.0, 1.05, 1.2, 1.5]) {
        const hz = (share * to) / 2;
        if (hz >= from / 2) continue;
        const out = whole(from, to, tone(hz, from, 0.4));
        worst = Math.max(worst, db(rms(out.subarray(out.length / 4, (3 * out.length) / 4)) * Math.SQRT2));
      }
    } else {
      for (const share of [0.1, 0.5, 0.84]) {
        const hz = (share * from) / 2;
        const image = from - hz;
        if (image < to / 2) worst = Math.max(worst, db(amplitude(whole(from, to, tone(hz, from, 0.4)), image, to)));
      }
    }
    assert.ok(worst < -78, `${worst} dB`);
  });

  test(`${from} to ${to}: however it is cut into blocks, the same samples come out`, () => {
    const input = Float32Array.from({ length: 5000 }, (_, n) => Math.sin(n * n));
    const expected = whole(from, to, input);
    assert.equal(expected.length, Math.ceil((input.length * to) / from));
    for (const size of [1, 7, 128, 480, 1999]) {
      const resampler = new Resampler(from, to);
      const out = [];
      for (let at = 0; at < input.length; at += size) out.push(...resampler.process(input.subarray(at, at + size)));
      out.push(...resampler.flush());
      assert.deepEqual(Float32Array.from(out), expected);
    }
  });

  test(`${from} to ${to}: no sample is held back for longer than 32 of the lower rate, and none is displaced`, () => {
    const resampler = new Resampler(from, to);
    const out = resampler.process(tone(100, from, 0.1));
    const heldBackMs = 1000 * (0.1 - out.length / to);
    assert.ok(heldBackMs <= (1000 * 33) / lower, `${heldBackMs} ms`);
    const ideal = tone(100, to, 0.1);
    for (let n = 200; n < out.length - 200; n++) assert.ok(Math.abs(out[n] - ideal[n]) < 1e-3);
  });
}

test("after a reset nothing of what came before is heard, and it begins where a new one does", () => {
  for (const [from, to] of [[48_000, 24_000], [44_100, 24_000], [24_000, 44_100]]) {
    const resampler = new Resampler(from, to);
    resampler.process(tone(1000, from, 0.1).subarray(0, 4321)); // between two outputs
    resampler.reset();
    const input = tone(300, from, 0.05);
    assert.deepEqual(resampler.process(input), new Resampler(from, to).process(input));
  }
});

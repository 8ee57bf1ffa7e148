// Settings, spectra and what a person is told.

import assert from "node:assert/strict";
import test from "node:test";

import { PROBLEMS, explain } from "../../streaming/web/problems.js";
import { loadSettings, parseSeed, saveSettings } from "../../streaming/web/settings.js";
import { BANDS, WINDOW, bands, heightOf } from "../../streaming/web/spectrum.js";

function storage(text = null) {
  return { text, getItem: () => text, setItem: (_, value) => (storage.last = value) };
}

test("settings survive, and what cannot be is replaced by what is usual", () => {
  const usual = loadSettings(storage());
  assert.deepEqual([usual.temperature, usual.topK, usual.seed, usual.echoCancellation], [0.8, 30, null, true]);
  assert.equal(usual.topP, null, "the model's, whatever it is");
  assert.deepEqual([usual.noiseSuppression, usual.autoGainControl], [false, false]);
  saveSettings(storage(), { ...usual, temperature: 0, handsFree: true, seed: 5 });
  const kept = loadSettings(storage(storage.last));
  assert.deepEqual([kept.temperature, kept.handsFree, kept.seed], [0, true, 5]);
  for (const text of ["{", "null", "[]", "3", '{"temperature":"hot","topK":-1,"seed":1.5,"handsFree":1,"maxSeconds":1e9}', '{"topK":"5"}']) {
    assert.deepEqual(loadSettings(storage(text)), usual);
  }
});

test("a seed is a whole number that JavaScript carries exactly", () => {
  assert.equal(parseSeed("  "), null);
  assert.equal(parseSeed(" 42 "), 42);
  assert.equal(parseSeed("9007199254740991"), 2 ** 53 - 1);
  for (const text of ["9007199254740992", "-1", "1.5", "1e3", "0x10", "seed"]) assert.equal(parseSeed(text), undefined);
});

test("a tone is seen at its height and loudness, and nowhere else", () => {
  for (const hz of [150, 440, 1000, 3000, 8000]) {
    const pcm = Int16Array.from({ length: WINDOW }, (_, n) => 32767 * 0.05 * Math.sin((2 * Math.PI * hz * n) / 24_000));
    const levels = bands(pcm);
    const top = levels.indexOf(Math.max(...levels));
    assert.ok(Math.abs(top - heightOf(hz) * BANDS) <= 2.5, `${hz} Hz at band ${top}, not ${heightOf(hz) * BANDS}`);
    assert.ok(levels[top] > 200 && levels[top] < 255, `-26 dB is ${levels[top]}`);
    const far = levels.filter((_, band) => Math.abs(band - top) > 25);
    assert.ok(Math.max(...far) < 10);
  }
  assert.ok(bands(new Int16Array(WINDOW)).every((level) => level === 0));
});

test("every problem has a title and at least a line, and what the page does not know is told as the server said it", () => {
  for (const code of Object.keys(PROBLEMS)) {
    const { title, lines } = explain(code, "");
    assert.ok(title && lines.length && lines.every((line) => line.length > 10), code);
  }
  assert.deepEqual(explain("new_code", "come back on Monday").lines, ["come back on Monday"]);
  assert.deepEqual(explain("new_code", "").lines, ["It says: new_code."]);
});

// Settings, spectra and what a person is told.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { DEAD, DEAF, MicrophoneCheck } from "../../streaming/web/microphone-check.js";
import { Notes } from "../../streaming/web/notes.js";
import { PROBLEMS, explain } from "../../streaming/web/problems.js";
import { loadSettings, parseSeed, saveSettings } from "../../streaming/web/settings.js";
import { suggestion, words } from "../../streaming/web/words.js";
import { BANDS, WINDOW, bands, heightOf, labelled } from "../../streaming/web/spectrum.js";

function storage(text = null) {
  return { text, getItem: () => text, setItem: (_, value) => (storage.last = value) };
}

test("settings survive, and what cannot be is replaced by what is usual", () => {
  const usual = loadSettings(storage());
  assert.deepEqual([usual.temperature, usual.topK, usual.seed, usual.echoCancellation], [0.8, 30, null, true]);
  assert.equal(usual.topP, null, "the model's, whatever it is");
  assert.deepEqual([usual.noiseSuppression, usual.autoGainControl], [false, false]);
  assert.deepEqual([usual.microphone, usual.volume, usual.singleKeys], ["", 1, true]);
  saveSettings(storage(), { ...usual, temperature: 0, handsFree: true, seed: "5" });
  const kept = loadSettings(storage(storage.last));
  assert.deepEqual([kept.temperature, kept.handsFree, kept.seed], [0, true, "5"]);
  assert.equal(loadSettings(storage('{"seed":5}')).seed, "5", "as it was kept once");
  for (const text of ["{", "null", "[]", "3", '{"temperature":"hot","topK":-1,"seed":1.5,"handsFree":1,"maxSeconds":1e9}', '{"topK":"5"}']) {
    assert.deepEqual(loadSettings(storage(text)), usual);
  }
});

test("a seed is any whole number that the protocol carries", () => {
  assert.equal(parseSeed("  "), null);
  assert.equal(parseSeed(" 042 "), "42");
  assert.equal(parseSeed("9223372036854775807"), "9223372036854775807");
  for (const text of ["9223372036854775808", "10000000000000000000", "-1", "1.5", "1e3", "0x10", "seed"]) assert.equal(parseSeed(text), undefined);
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

test("an error is not hidden by a remark, and goes when it is no longer so or was there long enough", () => {
  let now = 0;
  const notes = new Notes(() => now);
  assert.equal(notes.shown, null);
  notes.tell("a remark");
  notes.tell("an error", { rank: "error", topic: "file" });
  notes.tell("a later remark");
  assert.deepEqual(notes.shown, { text: "an error", rank: "error" });
  notes.tell("another file", { rank: "error", topic: "file" });
  assert.equal(notes.shown.text, "another file", "one topic says one thing");
  notes.withdraw("file");
  assert.deepEqual(notes.shown, { text: "a later remark", rank: "remark" });
  now = 9000;
  assert.equal(notes.shown, null);
});

test("a microphone is silent when it gave nothing for a while, and never after a sound", () => {
  for (const [floor, dead] of [[DEAD, true], [DEAF, false]]) {
    const check = new MicrophoneCheck(floor);
    assert.equal(check.take(new Int16Array(35_999)), false);
    assert.equal(check.take(Int16Array.of(-floor)), true);
    assert.deepEqual([check.silent, check.dead], [true, dead]);
    assert.equal(check.take(Int16Array.of(floor + 1)), true);
    assert.equal(check.take(new Int16Array(90_000)), false);
    assert.equal(check.silent, false);
  }
});

test("quiet speech is speech, and what is quieter than -60 dB is none", () => {
  // The decibels are of its highest sample. Real speech has pauses: only its loudest 20 ms are looked at.
  const file = readFileSync(new URL("../../examples/prompt.wav", import.meta.url));
  const pcm = new Int16Array(file.buffer.slice(file.byteOffset + 44, file.byteOffset + 44 + 2 * 96_000));
  const peak = pcm.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
  for (const [db, silent] of [[-30, false], [-55, false], [-58, false], [-62, true], [-80, true]]) {
    const check = new MicrophoneCheck(DEAF);
    const scale = (32_768 * 10 ** (db / 20)) / peak;
    for (let at = 0; at < pcm.length; at += 480) check.take(pcm.subarray(at, at + 480).map((sample) => Math.round(sample * scale)));
    assert.equal(check.silent, silent, `${db} dB`);
  }
});

test("every state has words, and a server without room is never ready", () => {
  const phases = ["asking", "connecting", "queued", "talking", "waiting", "speaking", "replaying", "ready", "idle"];
  for (const phase of phases) {
    for (const handsFree of [false, true]) {
      for (const server of ["unknown", "gone", "stopping", "full", "line", "ready"]) {
        const { label, state } = words({ phase, grip: "free", handsFree }, { handsFree, server, gestured: true });
        assert.ok(label && state, phase);
        if (phase === "idle" && server !== "ready") assert.notEqual(state, "Ready");
      }
    }
  }
  const at = (talk) => words(talk, { handsFree: false, server: "ready", gestured: true });
  assert.equal(at({ phase: "queued", place: 2 }).label, "Leave the line");
  assert.equal(at({ phase: "talking", grip: "held", away: true }).state, "The connection broke");
  assert.equal(at({ phase: "talking", grip: "latched" }).label, "Press to hand over");
  assert.equal(at({ phase: "talking", grip: "held", microphone: "muted" }).state, "You are muted");
  assert.equal(at({ phase: "speaking", voice: "a deep voice" }).hint, "In a deep voice. Hold and talk to interrupt it.");
  assert.equal(at({ phase: "speaking", voice: null }).hint, "Hold and talk to interrupt it.");
});

test("what one might say is one sentence, whatever there is of it", () => {
  assert.equal(suggestion([]), "");
  assert.equal(suggestion(["one, two, three"]), "Try saying “one,\u00a0two,\u00a0three”.");
  assert.equal(suggestion(["a, b, c", "one, two", "Monday"]), "Try saying “a,\u00a0b,\u00a0c”, “one,\u00a0two” or “Monday”.");
});

test("a label of the picture is left out where it would cover another one or be cut", () => {
  const frequencies = [250, 500, 1000, 2000, 4000, 8000];
  assert.deepEqual(labelled(frequencies, 400, 15), [8000, 4000, 2000, 1000, 500, 250]);
  for (const deep of [60, 90, 140, 200]) {
    const heights = labelled(frequencies, deep, 15).map((hz) => deep * (1 - heightOf(hz)));
    assert.ok(heights.length >= 2);
    heights.forEach((y, index) => assert.ok(y + 7.5 <= deep && (index === 0 || y - heights[index - 1] >= 15), `${deep}: ${heights}`));
  }
});

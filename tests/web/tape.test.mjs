// The tape: both voices in their places, pauses left out, a WAV that others can read, and an end to what it keeps.

import assert from "node:assert/strict";
import test from "node:test";

import { MACHINE, Tape, YOU } from "../../streaming/web/tape.js";

const ramp = (length) => Int16Array.from({ length }, (_, n) => n + 1);

test("sound is found where its frames of the device's clock say", () => {
  const tape = new Tape(48_000);
  tape.roll(1000);
  tape.write(YOU, 1000, ramp(100));
  tape.write(MACHINE, 1000 + 2 * 70_000, ramp(100)); // across the border of two blocks
  assert.deepEqual(tape.read(YOU, 0, 100), ramp(100));
  assert.deepEqual(tape.read(MACHINE, 69_990, 120).slice(10, 110), ramp(100));
  assert.equal(tape.read(YOU, 200, 1000)?.some((sample) => sample !== 0) ?? false, false);
  assert.equal(tape.read(MACHINE, 30_000, 100), null);
  assert.deepEqual([...tape.read(YOU, -2, 4)], [0, 0, 1, 2]);
  assert.equal(tape.end, 70_100);
});

test("pieces of a stream leave no seam at any rate of the device", () => {
  for (const rate of [44_100, 48_000, 16_000, 96_000]) {
    const tape = new Tape(rate);
    tape.roll(12_345);
    const pcm = ramp(30_000);
    for (let at = 0; at < pcm.length; at += 513) {
      tape.write(YOU, 12_345 + 77 + (at * rate) / 24_000, pcm.subarray(at, at + 513));
    }
    const start = Math.round((77 * 24_000) / rate);
    assert.deepEqual(tape.read(YOU, start, 30_000), pcm, `${rate} Hz`);
  }
});

test("time goes on in silence, and stands still between turns", () => {
  const tape = new Tape(24_000);
  tape.roll(0);
  tape.write(YOU, 0, ramp(10));
  tape.advance(500);
  assert.equal(tape.end, 500);
  tape.stop();
  tape.advance(100_000);
  tape.write(YOU, 100_000, ramp(10));
  assert.equal(tape.end, 500, "what comes while it stands is not kept");
  tape.roll(200_000);
  tape.write(YOU, 200_000, ramp(10));
  assert.equal(tape.end, 500 + 4800 + 10, "0.2 s between two stretches");
  tape.roll(200_500);
  assert.equal(tape.position(200_000), 500 + 4800, "it rolls already: a second prompt does not move the first");
  tape.insert(YOU, ramp(24_000));
  tape.write(MACHINE, 200_010, ramp(10));
  assert.equal(tape.end, 5310 + 24_000 + 10);
});

test("a WAV has you on the left and the machine on the right", async () => {
  const tape = new Tape(24_000);
  tape.roll(0);
  tape.write(YOU, 0, Int16Array.of(1, 2, 3));
  tape.write(MACHINE, 2, Int16Array.of(-4, -5));
  const view = new DataView(await tape.wav().arrayBuffer());
  const letters = (at) => String.fromCharCode(...[0, 1, 2, 3].map((n) => view.getUint8(at + n)));
  assert.deepEqual([letters(0), letters(8), letters(36)], ["RIFF", "WAVE", "data"]);
  assert.deepEqual([view.getUint32(4, true), view.getUint32(40, true), view.byteLength], [52, 16, 60]);
  assert.deepEqual([view.getUint16(22, true), view.getUint32(24, true)], [2, 24_000]);
  const samples = Array.from({ length: 8 }, (_, n) => view.getInt16(44 + 2 * n, true));
  assert.deepEqual(samples, [1, 0, 2, 0, 3, -4, 0, -5]);
});

test("only the last ten minutes are kept", () => {
  const tape = new Tape(24_000);
  tape.roll(0);
  tape.mark({ kind: "interrupted", at: 5 });
  for (let second = 0; second < 700; second++) tape.write(YOU, second * 24_000, ramp(10));
  assert.ok(tape.end - tape.start <= 600 * 24_000);
  assert.equal(tape.read(YOU, 0, 24_000), null);
  assert.ok(tape.read(YOU, tape.start, 24_000));
  tape.mark({ kind: "interrupted", at: tape.end });
  assert.equal(tape.marks.length, 1);
});

test("what changed is told once, from its earliest sample", () => {
  const tape = new Tape(24_000);
  tape.roll(0);
  assert.equal(tape.takeChangedFrom(), Infinity);
  tape.write(YOU, 500, ramp(10));
  tape.write(MACHINE, 300, ramp(10));
  assert.equal(tape.takeChangedFrom(), 300);
  assert.equal(tape.takeChangedFrom(), Infinity);
});

// The jitter buffer: when it plays, what it counts, and that no sample is lost or said twice.

import assert from "node:assert/strict";
import test from "node:test";

import { CAPACITY_MS, GROWTH_MS, JitterBuffer, MAX_MS, START_MS } from "../../streaming/web/jitter-buffer.js";

const MS = 24;
const ramp = (from, length) => Int16Array.from({ length }, (_, n) => from + n);

function pull(buffer, length) {
  const out = new Int16Array(length);
  return [...out.subarray(0, buffer.pull(out))];
}

test("it plays as soon as one frame of 80 ms is there, and not before", () => {
  const buffer = new JitterBuffer();
  buffer.push(ramp(1, 79 * MS));
  assert.deepEqual(pull(buffer, 10), []);
  buffer.push(ramp(1 + 79 * MS, 1 * MS));
  assert.deepEqual(pull(buffer, 3), [1, 2, 3]);
});

test("what is complete is played, however short", () => {
  const buffer = new JitterBuffer();
  buffer.push(ramp(1, 5));
  buffer.complete();
  assert.deepEqual(pull(buffer, 3), [1, 2, 3]);
  assert.deepEqual(pull(buffer, 3), [4, 5]);
  assert.ok(buffer.drained);
  assert.equal(buffer.underruns, 0);
});

test("running dry is an underrun once more comes; the target grows by 20 ms up to its limit and is kept", () => {
  const buffer = new JitterBuffer();
  for (let round = 1; round < 20; round++) {
    buffer.push(ramp(0, MAX_MS * MS));
    pull(buffer, MAX_MS * MS + 1);
    assert.equal(buffer.underruns, round - 1, "the end of a turn looks the same, so it does not count yet");
    assert.equal(buffer.targetMs, Math.min(START_MS + (round - 1) * GROWTH_MS, MAX_MS));
  }
  buffer.flush();
  assert.equal(buffer.targetMs, MAX_MS);
});

test("silence falls from the last sample instead of clicking, and ends", () => {
  const buffer = new JitterBuffer();
  buffer.push(Int16Array.from({ length: START_MS * MS }, () => 30_000));
  const out = new Int16Array(START_MS * MS + 1000);
  buffer.pull(out);
  const fall = out.subarray(START_MS * MS - 1);
  for (let n = 1; n < fall.length; n++) assert.ok(fall[n] >= 0 && fall[n - 1] - fall[n] <= 0.02 * 30_000 + 1);
  assert.equal(fall.at(-1), 0);
});

test("every sample comes out once and in order, however it is pushed and pulled", () => {
  const buffer = new JitterBuffer();
  const [heard, total] = [[], 20_000];
  let [pushed, step] = [0, 1];
  while (heard.length < total) {
    step = (step * 7919) % 10_007;
    const size = Math.min(step % 700, total - pushed);
    if (pushed < total) buffer.push(ramp(pushed, size));
    pushed += size;
    if (pushed === total) buffer.complete();
    heard.push(...pull(buffer, (step % 311) + 1));
  }
  assert.deepEqual(heard, [...ramp(0, total)]);
});

test("heard is what has left the device too", () => {
  const buffer = new JitterBuffer();
  buffer.latencySamples = 100;
  buffer.push(ramp(0, 2000));
  buffer.complete();
  pull(buffer, 1000);
  assert.equal(buffer.pulledSamples, 1000);
  assert.equal(buffer.playedSamples, 0);
  pull(buffer, 100);
  assert.equal(buffer.playedSamples, 1000);
  pull(buffer, 900);
  assert.ok(!buffer.drained, "the device still holds the last 100");
  pull(buffer, 100);
  assert.ok(buffer.drained);
});

test("a flush says what was heard and begins afresh", () => {
  const buffer = new JitterBuffer();
  buffer.push(ramp(0, 3000));
  pull(buffer, 500);
  assert.equal(buffer.flush(), 500);
  assert.equal(buffer.bufferedSamples, 0);
  assert.deepEqual(pull(buffer, 100), []);
  buffer.push(ramp(7, START_MS * MS));
  assert.deepEqual(pull(buffer, 2), [7, 8]);
});

test("neither the end of a turn nor its running dry outlives a flush", () => {
  const buffer = new JitterBuffer();
  buffer.push(ramp(0, START_MS * MS));
  buffer.complete();
  buffer.flush();
  buffer.push(ramp(0, 100));
  assert.ok(!buffer.ready, "the next turn waits for its own frame");
  buffer.push(ramp(100, START_MS * MS));
  pull(buffer, 2 * START_MS * MS);
  buffer.flush();
  buffer.push(ramp(0, 100));
  assert.deepEqual([buffer.underruns, buffer.targetMs], [0, START_MS]);
});

test("a server that sends without end is not kept without end", () => {
  const buffer = new JitterBuffer();
  assert.ok(buffer.push(new Int16Array(CAPACITY_MS * MS)));
  assert.ok(!buffer.push(new Int16Array(1)));
  assert.equal(buffer.bufferedSamples, CAPACITY_MS * MS);
});

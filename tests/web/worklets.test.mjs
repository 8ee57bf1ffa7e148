// The audio thread's two programs, run as a browser would: 128 samples at a time, messages in and out.

import assert from "node:assert/strict";
import test from "node:test";

import { Resampler } from "../../streaming/web/resampler.js";

const programs = {};
globalThis.registerProcessor = (name, program) => (programs[name] = program);
globalThis.AudioWorkletProcessor = class {
  port = { told: [], postMessage: (message) => this.port.told.push(message) };
};
globalThis.sampleRate = 48_000;
globalThis.currentFrame = 0;
await import("../../streaming/web/capture-worklet.js");
await import("../../streaming/web/playback-worklet.js");

function processor(name, rate) {
  globalThis.sampleRate = rate;
  globalThis.currentFrame = 0;
  const it = new programs[name]();
  const of = (type) => it.port.told.filter((message) => message.type === type);
  return { of, say: (data) => it.port.onmessage({ data }), process: (...io) => it.process(...io) };
}

const joined = (messages) => Int16Array.from(messages.flatMap(({ pcm }) => [...pcm]));
const voice = (length) => Int16Array.from({ length }, (_, n) => Math.round(9000 * Math.sin(n / 7) + 3000 * Math.sin(n / 3)));

for (const rate of [44_100, 48_000, 24_000, 16_000]) {
  test(`a microphone at ${rate} Hz is heard as the resampler says, in pieces of 20 ms, to the last sample`, () => {
    const { of, say, process } = processor("capture", rate);
    const input = Float32Array.from({ length: 128 * 60 }, (_, n) => 0.5 * Math.sin(n / 9));
    globalThis.currentFrame = 1280;
    process([[input.subarray(0, 128)]]);
    assert.deepEqual(of("pcm"), [], "nothing leaves before it is asked for");
    say({ type: "start" });
    for (let at = 0; at < input.length; at += 128) {
      process([[input.subarray(at, at + 128)]]);
      globalThis.currentFrame += 128;
    }
    say({ type: "stop" });
    const resampler = new Resampler(rate, 24_000);
    const expected = [...resampler.process(input), ...resampler.flush()];
    assert.deepEqual(joined(of("pcm")), Int16Array.from(expected, (sample) => Math.round(32768 * sample)));
    const pieces = of("pcm");
    let at = 0;
    for (const { frame, pcm, last } of pieces) {
      assert.equal(frame, 1280 + (at * rate) / 24_000);
      assert.ok(last ? pcm.length < 480 : pcm.length === 480);
      at += pcm.length;
    }
    assert.deepEqual(pieces.map(({ last }) => last), pieces.map((_, index) => index === pieces.length - 1));
    process([[input.subarray(0, 128)]]);
    assert.equal(of("pcm").length, pieces.length, "nothing leaves after it was stopped");
  });

  test(`what leaves for a loudspeaker at ${rate} Hz is what was sent, resampled, and nothing else`, () => {
    const { of, say, process } = processor("playback", rate);
    const [pcm, out] = [voice(6 * 1920), []];
    const quantum = () => {
      const block = new Float32Array(128);
      process([], [[block]]);
      globalThis.currentFrame += 128;
      out.push(...block);
    };
    say({ type: "begin", turn: 3 });
    quantum();
    for (let at = 0; at < pcm.length; at += 1920) say({ type: "push", turn: 3, pcm: pcm.slice(at, at + 1920) });
    say({ type: "push", turn: 2, pcm: voice(99) }); // another turn's
    say({ type: "complete", turn: 3 });
    const played = () => of("played");
    while (!played().at(-1)?.drained) quantum();
    const silence = played()[0].pcm.findIndex((sample) => sample !== 0);
    const told = joined(played());
    const from = told.findIndex((_, n) => told[n + 1] === pcm[1] && told[n + 2] === pcm[2]);
    assert.ok(silence >= 0 && from >= 0);
    assert.deepEqual(told.slice(from, from + pcm.length), pcm, "told to have been played");
    const [{ turn, frame }] = of("started");
    assert.equal(turn, 3);
    assert.ok(Math.abs(frame - (from * rate) / 24_000) < 1e-6);
    const reference = new Resampler(24_000, rate).process(Float32Array.from(told, (sample) => sample / 32768));
    const length = Math.min(reference.length, out.length);
    assert.ok(length > (pcm.length * rate) / 24_000);
    assert.deepEqual(Float32Array.from(out.slice(0, length)), reference.slice(0, length), "handed to the device");
    let at = 0;
    for (const message of played()) {
      assert.ok(Math.abs(message.frame - (at * rate) / 24_000) < 1e-6);
      at += message.pcm.length;
    }
    assert.equal(played().at(-1).heard, pcm.length);
    assert.equal(played().at(-1).underruns, 0);
  });
}

test("a stop is answered with what was heard, the sound falls within 15 ms, and nothing of it is told later", () => {
  const { of, say, process } = processor("playback", 48_000);
  const block = new Float32Array(128);
  say({ type: "latency", samples: 240 });
  say({ type: "begin", turn: 1 });
  for (let frame = 0; frame < 5; frame++) say({ type: "push", turn: 1, pcm: new Int16Array(1920).fill(20_000) });
  for (let n = 0; n < 40; n++) process([], [[block]]);
  say({ type: "stop" });
  const [{ turn, heard }] = of("stopped");
  assert.equal(turn, 1);
  const pulled = joined(of("played")).length;
  assert.ok(heard <= pulled - 240 && heard > pulled - 240 - 128, `${heard} of ${pulled}`);
  const told = of("played").length;
  let [last, steepest] = [block.at(-1), 0];
  for (let n = 0; n < 6; n++) {
    process([], [[block.fill(0)]]);
    for (const sample of block) {
      steepest = Math.max(steepest, Math.abs(sample - last));
      last = sample;
    }
  }
  assert.ok(steepest < 0.05, `a click of ${steepest}`);
  assert.ok(Math.abs(last) < 0.01);
  assert.equal(of("played").length, told);
  process([], [[block.fill(0)]]);
  process([], [[block.fill(0)]]);
  assert.ok(block.every((sample) => sample === 0));
});

test("a second prompt is where it was said, and as loud as can be", () => {
  const { of, say, process } = processor("capture", 24_000);
  const capture = (level) => {
    say({ type: "start" });
    for (let n = 0; n < 8; n++) {
      process([[new Float32Array(128).fill(level)]]);
      globalThis.currentFrame += 128;
    }
    say({ type: "stop" });
  };
  capture(1.5); // louder than 16 bits hold: what wraps crackles
  globalThis.currentFrame = 100_000;
  const before = of("pcm").length;
  capture(-1.5);
  const [first, second] = [of("pcm").slice(0, before), of("pcm").slice(before)];
  assert.deepEqual([first[0].frame, second[0].frame], [0, 100_000]);
  assert.ok(joined(first).every((sample) => sample === 32_767) && joined(second).every((sample) => sample === -32_768));
});

test("a second turn leaves as the first one does: on time, whole, and with nothing of the one before", () => {
  const leaves = (turns) => {
    const { of, say, process } = processor("playback", 44_100);
    let out;
    const run = (quanta) => {
      for (let n = 0; n < quanta; n++) {
        const block = new Float32Array(128);
        process([], [[block]]);
        globalThis.currentFrame += 128;
        out.push(...block);
      }
    };
    for (let turn = 1; turn <= turns; turn++) {
      [out, globalThis.currentFrame] = [[], 1_000_000 * turn];
      say({ type: "begin", turn });
      if (turn > 1) say({ type: "complete", turn: turn - 1 }); // late
      run(1);
      say({ type: "push", turn, pcm: voice(500) }); // too little to begin with
      run(10);
      say({ type: "push", turn, pcm: voice(3 * 1920) });
      run(37);
      say({ type: "stop" });
      run(20);
    }
    const told = joined(of("played").filter(({ turn }) => turn === turns));
    return { out, told, startedAt: (of("started").at(-1).frame - 1_000_000 * turns).toFixed(1) };
  };
  assert.deepEqual(leaves(2), leaves(1));
});

test("running dry is counted once more comes, and told", () => {
  const { of, say, process } = processor("playback", 48_000);
  const run = (quanta) => {
    for (let n = 0; n < quanta; n++) process([], [[new Float32Array(128)]]);
  };
  say({ type: "begin", turn: 1 });
  say({ type: "push", turn: 1, pcm: voice(1920) });
  run(40); // 107 ms
  assert.equal(of("played").at(-1).underruns, 0);
  for (let frame = 0; frame < 2; frame++) say({ type: "push", turn: 1, pcm: voice(1920) });
  run(8);
  assert.deepEqual([of("played").at(-1).underruns, of("played").at(-1).targetMs], [1, 100]);
});

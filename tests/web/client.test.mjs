// A session against sockets that a test plays: what is said, and how it outlives them.

import assert from "node:assert/strict";
import test from "node:test";

import { encodeAudio } from "../../streaming/web/protocol.js";
import {
  LOOK_MS,
  MAX_KEPT,
  MAX_UNSENT_BYTES,
  MAX_UNSENT_RESUMABLE_BYTES,
  SILENT_LOOKS,
  ContinuationClient,
} from "../../streaming/web/client.js";
import { FakeSocket } from "./fakes.mjs";

function opened(onEvent = () => {}) {
  const socket = new FakeSocket();
  const session = new ContinuationClient(() => socket, { max_seconds: 2 }, onEvent);
  socket.open();
  return { socket, session };
}

test("the first message is session.start, as soon as the socket is open", () => {
  const socket = new FakeSocket();
  new ContinuationClient(() => socket, { max_seconds: 2 }, () => {});
  assert.deepEqual(socket.sent, []);
  socket.open();
  assert.deepEqual(socket.said(), [{ type: "session.start", protocol: 1, resume: true, max_seconds: 2 }]);
});

test("positions run on over turns, and turns follow interrupt and turn.done", () => {
  const { socket, session } = opened();
  socket.say({ type: "session.started", turn: 1 });
  session.hear(new Int16Array(480));
  session.speak();
  session.interrupt(1, 960);
  session.hear(new Int16Array(100));
  socket.say({ type: "turn.done", turn: 1 });
  session.speak();
  socket.say({ type: "turn.done", turn: 2 });
  session.hearAll(new Int16Array(4000));
  assert.deepEqual(
    socket.heard().map(({ turn, position, pcm }) => [turn, position, pcm.length]),
    [
      [1, 0, 480],
      [2, 480, 100],
      [3, 580, 1920],
      [3, 2500, 1920],
      [3, 4420, 160],
    ],
  );
  assert.deepEqual(
    socket.said().slice(1),
    [
      { type: "speak", turn: 1 },
      { type: "interrupt", turn: 1, heard_samples: 960 },
      { type: "speak", turn: 2 },
    ],
  );
});

test("speech that the network does not take is dropped without a gap in positions, and counted", () => {
  const { socket, session } = opened();
  session.hear(new Int16Array(480));
  socket.bufferedAmount = MAX_UNSENT_BYTES + 1;
  assert.equal(session.hear(new Int16Array(480)), false);
  socket.bufferedAmount = 0;
  assert.equal(session.hear(new Int16Array(480)), true);
  assert.deepEqual(socket.heard().map(({ position }) => position), [0, 480]);
  assert.equal(session.lostSamples, 480);
});

test("a gap in the continuation, or rubbish, ends the session once and with a reason", () => {
  const gap = [encodeAudio(1, 0, new Int16Array(10)), encodeAudio(1, 11, new Int16Array(10))];
  for (const data of [gap, ["rubbish"], [new ArrayBuffer(3)]]) {
    const events = [];
    const { socket } = opened((event) => events.push(event));
    for (const piece of data) socket.receive(piece);
    socket.end(1006, "");
    const last = events.at(-1);
    assert.deepEqual([last.type, last.opened, last.code], ["disconnected", true, 1002]);
    assert.equal(events.filter(({ type }) => type === "disconnected").length, 1);
    assert.equal(socket.closed, 4002);
  }
});

test("each turn's continuation begins at 0", () => {
  const turns = [];
  const { socket } = opened((event) => event.type === "audio" && turns.push(event.turn));
  socket.receive(encodeAudio(1, 0, new Int16Array(10)));
  socket.receive(encodeAudio(1, 10, new Int16Array(10)));
  socket.receive(encodeAudio(2, 0, new Int16Array(10)));
  assert.deepEqual(turns, [1, 1, 2]);
});

test("a session that was closed tells nothing more", () => {
  const events = [];
  const { socket, session } = opened((event) => events.push(event));
  socket.say({ type: "session.started", turn: 1 });
  session.close();
  socket.say({ type: "turn.done", turn: 1 });
  socket.end(1000, "");
  assert.deepEqual(events.map(({ type }) => type), ["session.started"]);
  assert.equal(socket.said().at(-1).type, "session.close");
});

/** A session that outlives its sockets, in time that the test makes pass. */
function resumable(t) {
  t.mock.timers.enable({ apis: ["setTimeout", "setInterval"] });
  let now = 0;
  t.mock.method(performance, "now", () => now);
  const pass = (ms) => {
    for (let left = ms; left > 0; left -= 100) {
      now += Math.min(left, 100);
      t.mock.timers.tick(Math.min(left, 100));
    }
  };
  const [sockets, events] = [[], []];
  const connect = () => sockets[sockets.push(new FakeSocket()) - 1];
  const session = new ContinuationClient(connect, {}, (event) => events.push(event));
  t.after(() => session.close());
  sockets[0].open();
  sockets[0].say({ type: "session.started", turn: 1, resume: { token: "secret", seconds: 30, window: 256 } });
  const types = () => events.map(({ type }) => type);
  return { session, sockets, events, types, pass };
}

test("a connection that broke is restored, and each side says again what the other has not had", (t) => {
  const { session, sockets, types, pass } = resumable(t);
  session.hear(new Int16Array(480).fill(1));
  session.hear(new Int16Array(480).fill(2));
  sockets[0].speak(1, 0, 10);
  session.played(1, 5, 1);
  sockets[0].end(1006);
  session.hear(new Int16Array(480).fill(3));
  session.speak();
  session.played(1, 10, 2);
  assert.equal(sockets[0].heard().length, 2, "nothing more is said into a broken connection");
  pass(100);
  const [, again] = sockets;
  again.open();
  assert.deepEqual(again.said(), [{ type: "session.resume", token: "secret", received: 1, position: 1440 }]);
  again.say({ type: "session.resumed", received: 1 });
  assert.deepEqual(again.heard().map(({ position, pcm }) => [position, pcm[0]]), [[480, 2], [960, 3]]);
  assert.deepEqual(again.said().slice(1), [
    { type: "speak", turn: 1 },
    { type: "played", turn: 1, samples: 10, underruns: 2 },
  ]);
  again.speak(1, 10, 10);
  session.hear(new Int16Array(480).fill(4));
  assert.equal(again.heard().at(-1).position, 1440);
  assert.deepEqual(types(), ["session.started", "audio", "lost", "restored", "audio"]);
  assert.equal(sockets[0].closed, 1005, "now that the session is elsewhere");
});

test("a session whose server died goes on from its last finished turn, and says nothing again that was lost", (t) => {
  const { session, sockets, events, pass } = resumable(t);
  session.hear(new Int16Array(480).fill(1));
  session.speak();
  sockets[0].speak(1, 0, 10);
  sockets[0].say({ type: "turn.done", turn: 1 });
  session.hear(new Int16Array(480).fill(2));
  session.speak();
  sockets[0].speak(2, 0, 10);
  session.played(2, 5, 0);
  sockets[0].end(1006);
  session.hear(new Int16Array(480).fill(3));
  pass(100);
  const [, again] = sockets;
  again.open();
  again.say({ type: "session.resumed", received: 0, turn: 2 });
  assert.deepEqual([again.heard(), again.said().length, session.turn], [[], 1, 2]);
  assert.deepEqual([events.at(-1).type, events.at(-1).turn], ["restored", 2]);
  session.hear(new Int16Array(480).fill(4));
  assert.deepEqual(again.heard().map(({ turn, position, pcm }) => [turn, position, pcm[0]]), [[2, 1440, 4]]);
  again.speak(2, 0, 10);
  assert.equal(events.at(-1).type, "audio", "the turn's audio begins anew");
  again.end(1006);
  pass(100);
  sockets[2].open();
  assert.deepEqual(sockets[2].said(), [{ type: "session.resume", token: "secret", received: 1, position: 1920 }]);
  sockets[2].say({ type: "session.resumed", received: 1 });
  assert.deepEqual([sockets[2].heard(), events.at(-1).turn], [[], null], "both sides count anew");
});

test("what has arrived is said, and what the server has is forgotten", (t) => {
  const { session, sockets, pass } = resumable(t);
  for (let piece = 0; piece < 70; piece++) session.hear(new Int16Array(10).fill(piece));
  for (let frame = 0; frame < 63; frame++) sockets[0].speak(1, 10 * frame, 10);
  sockets[0].say({ type: "pong", id: 0 });
  assert.equal(sockets[0].said().at(-1).type, "session.start", "what is not counted is not counted");
  sockets[0].say({ type: "something.new" });
  assert.deepEqual(sockets[0].said().at(-1), { type: "ack", received: 64 });
  sockets[0].say({ type: "ack", received: 64 });
  sockets[0].end(1006);
  pass(100);
  sockets[1].open();
  sockets[1].say({ type: "session.resumed", received: 68 });
  assert.deepEqual(sockets[1].heard().map(({ pcm }) => pcm[0]), [68, 69]);
});

test("a close in form is an end, broken or not before", (t) => {
  const { sockets, events, pass } = resumable(t);
  sockets[0].end(1001, "stopping");
  pass(60_000);
  assert.deepEqual([events.at(-1).type, events.at(-1).code, sockets.length], ["disconnected", 1001, 1]);
});

test("it is tried for as long as the server keeps the session, and then it is over once", (t) => {
  const { session, sockets, events, types, pass } = resumable(t);
  sockets[0].end(1006);
  for (let second = 0; second < 40; second++) {
    pass(1000);
    sockets.at(-1).end(1006);
  }
  assert.ok(sockets.length > 10, `${sockets.length} attempts`);
  assert.ok(sockets.length < 40, `${sockets.length} attempts`);
  assert.deepEqual(types().slice(1), ["lost", "disconnected"]);
  assert.deepEqual([events.at(-1).opened, events.at(-1).code], [true, 1006]);
  session.hear(new Int16Array(480));
});

test("a session that is gone is not asked for again, one that has no room just now is", (t) => {
  const { sockets, types, pass } = resumable(t);
  sockets[0].end(1006);
  pass(100);
  sockets[1].open();
  sockets[1].say({ type: "session.refused", code: "overloaded", retry_after_ms: 500 });
  pass(500);
  assert.equal(sockets.length, 3);
  sockets[2].open();
  sockets[2].say({ type: "session.refused", code: "session_elsewhere", retry_after_ms: 0 });
  pass(10_000);
  assert.equal(sockets.length, 3);
  assert.deepEqual(types().slice(1), ["lost", "disconnected"]);
});

test("a connection that says nothing although it is asked counts as broken, and is not closed in form before it is restored", (t) => {
  const { sockets, types, pass } = resumable(t);
  for (let look = 0; look < 10; look++) {
    pass(LOOK_MS);
    sockets[0].say({ type: "pong", id: 0 });
  }
  assert.equal(sockets[0].said().at(-1).type, "ping");
  pass(LOOK_MS * (SILENT_LOOKS + 2));
  assert.deepEqual(types().slice(1), ["lost"]);
  assert.equal(sockets[0].closed, null, "a late close frame would end the session");
  sockets[1].open();
  sockets[1].say({ type: "session.resumed", received: 0 });
  assert.equal(sockets[0].closed, 1005);
});

test("an attempt that nobody answers is given up for another", (t) => {
  const { sockets, types, pass } = resumable(t);
  sockets[0].end(1006);
  pass(12_000);
  assert.ok(sockets.length >= 3);
  sockets[1].open();
  assert.deepEqual(sockets[1].sent, [], "one that was given up says nothing");
  sockets.at(-1).open();
  sockets.at(-1).say({ type: "session.resumed", received: 0 });
  assert.deepEqual(types().slice(1), ["lost", "restored"]);
});

test("what is kept has an end", (t) => {
  const { session, sockets } = resumable(t);
  sockets[0].end(1006);
  for (let piece = 0; piece < MAX_KEPT; piece++) assert.ok(session.hear(new Int16Array(1)));
  assert.equal(session.hear(new Int16Array(1)), false);
  assert.equal(session.lostSamples, 1);
});

test("what is said again does not count as a network that takes nothing", (t) => {
  const { session, sockets, pass } = resumable(t);
  sockets[0].end(1006);
  session.hearAll(new Int16Array(24_000 * 20));
  pass(100);
  sockets[1].open();
  sockets[1].bufferedAmount = 48_000 * 20;
  sockets[1].say({ type: "session.resumed", received: 0 });
  assert.ok(session.hear(new Int16Array(480)));
  sockets[1].bufferedAmount = 0;
  assert.ok(session.hear(new Int16Array(480)));
  sockets[1].bufferedAmount = MAX_UNSENT_RESUMABLE_BYTES;
  assert.ok(session.hear(new Int16Array(480)), "a slow network may be a dead connection, after which all of it is said again");
  sockets[1].bufferedAmount = MAX_UNSENT_RESUMABLE_BYTES + 1;
  assert.equal(session.hear(new Int16Array(480)), false);
});

for (const received of [7, -1, 0.5, "many", undefined]) {
  test(`a count that cannot be ends the session: ${received}`, (t) => {
    // One that was no number made all that followed none: nothing was forgotten any more.
    const { session, sockets, events } = resumable(t);
    session.hear(new Int16Array(480));
    sockets[0].say({ type: "ack", received });
    assert.deepEqual([events.at(-1).type, events.at(-1).code], ["disconnected", 1002]);
  });
}

test("what was played is said once a frame, and when it ran dry", (t) => {
  const { session, sockets } = resumable(t);
  for (const [turn, samples, underruns] of [
    [1, 480, 0], [1, 960, 0], [1, 1919, 0], [1, 1920, 0], [1, 2400, 0], [1, 2880, 1], [1, 2880, 1], [2, 480, 1],
  ]) {
    session.played(turn, samples, underruns);
  }
  const told = sockets[0].said().filter(({ type }) => type === "played");
  assert.deepEqual(told.map(({ turn, samples, underruns }) => [turn, samples, underruns]), [
    [1, 480, 0], [1, 1920, 0], [1, 2880, 1], [2, 480, 1],
  ]);
});

// The protocol's client: bytes as in docs/protocol.md, and a session against a socket that a test plays.

import assert from "node:assert/strict";
import test from "node:test";

import { MAX_UNSENT_BYTES, ProtocolError, Session, decodeAudio, decodeControl, encodeAudio } from "../../streaming/web/protocol.js";
import { FakeSocket } from "./fakes.mjs";

test("audio is a header of 16 bytes and little-endian samples", () => {
  const bytes = new Uint8Array(encodeAudio(0x01020304, 2 ** 40 + 5, Int16Array.of(1, -2)));
  const header = [1, 0, 0, 0, 4, 3, 2, 1, 5, 0, 0, 0, 0, 1, 0, 0];
  assert.deepEqual([...bytes], [...header, 1, 0, 0xfe, 0xff]);
  const back = decodeAudio(bytes.buffer);
  assert.deepEqual(back, { turn: 0x01020304, position: 2 ** 40 + 5, pcm: Int16Array.of(1, -2) });
});

test("what is not a message is a ProtocolError and nothing else", () => {
  for (const size of [0, 15, 17, 16 + 2 * 48_001]) assert.throws(() => decodeAudio(new ArrayBuffer(size)), ProtocolError);
  assert.throws(() => decodeAudio(new ArrayBuffer(16)), ProtocolError, "kind 0");
  for (const text of ["", "{", "[]", "null", "3", '{"type": 3}']) assert.throws(() => decodeControl(text), ProtocolError);
});

function opened(listener = () => {}) {
  const socket = new FakeSocket();
  const session = new Session(socket, { max_seconds: 2 }, listener);
  socket.open();
  return { socket, session };
}

test("the first message is session.start, as soon as the socket is open", () => {
  const socket = new FakeSocket();
  new Session(socket, { max_seconds: 2 }, () => {});
  assert.deepEqual(socket.sent, []);
  socket.open();
  assert.deepEqual(socket.said(), [{ type: "session.start", protocol: 1, max_seconds: 2 }]);
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
  session.hearAll(new Int16Array(100_000));
  assert.deepEqual(
    socket.heard().map(({ turn, position, pcm }) => [turn, position, pcm.length]),
    [
      [1, 0, 480],
      [2, 480, 100],
      [3, 580, 48_000],
      [3, 48_580, 48_000],
      [3, 96_580, 4000],
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

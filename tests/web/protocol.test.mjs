// Bytes as in docs/protocol.md.

import assert from "node:assert/strict";
import test from "node:test";

import { ProtocolError, decodeAudio, decodeControl, encodeAudio } from "../../streaming/web/protocol.js";

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

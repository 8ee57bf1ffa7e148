/** The native protocol of `docs/protocol.md`: its figures, and what its messages look like as bytes. */

export const SAMPLE_RATE = 24_000;
export const FRAME = 1920;
export const PROTOCOL = 1;
export const MAX_AUDIO_SAMPLES = 48_000;
const HEADER_BYTES = 16;
const PCM16 = 1;

/** The server broke the protocol. */
export class ProtocolError extends Error {}

/** One binary message. position: in samples; pcm: Int16Array. */
export function encodeAudio(turn, position, pcm) {
  const bytes = new ArrayBuffer(HEADER_BYTES + 2 * pcm.length);
  const view = new DataView(bytes);
  view.setUint8(0, PCM16);
  view.setUint32(4, turn, true);
  view.setBigUint64(8, BigInt(position), true);
  pcm.forEach((sample, index) => view.setInt16(HEADER_BYTES + 2 * index, sample, true));
  return bytes;
}

/** {turn, position, pcm} of one binary message. Throws ProtocolError. */
export function decodeAudio(bytes) {
  const size = bytes.byteLength - HEADER_BYTES;
  if (size < 0 || size % 2 || size > 2 * MAX_AUDIO_SAMPLES) throw new ProtocolError(`${bytes.byteLength} bytes of audio`);
  const view = new DataView(bytes);
  if (view.getUint8(0) !== PCM16) throw new ProtocolError(`audio of kind ${view.getUint8(0)}`);
  const pcm = Int16Array.from({ length: size / 2 }, (_, index) => view.getInt16(HEADER_BYTES + 2 * index, true));
  return { turn: view.getUint32(4, true), position: Number(view.getBigUint64(8, true)), pcm };
}

/** One control message as it is sent. A BigInt is a number of as many digits as it has. */
export function encodeControl(message) {
  const text = JSON.stringify(message, (_, value) => (typeof value === "bigint" ? `bigint:${value}` : value));
  return text.replace(/"bigint:(\d+)"/g, "$1");
}

/** One control message. Throws ProtocolError. */
export function decodeControl(text) {
  let message;
  try {
    message = JSON.parse(text);
  } catch {
    throw new ProtocolError("a message that is not JSON");
  }
  if (typeof message?.type !== "string") throw new ProtocolError("a message without a type");
  return message;
}

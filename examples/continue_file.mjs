// Sends a file and keeps its continuation: node continue_file.mjs IN.wav OUT.wav [URL]
// Needs Node 22 and a server (`python server.py`). Files are WAV, 24 kHz, mono, 16 bits.
import { readFileSync, writeFileSync } from "node:fs";

const [source, target, url = "ws://127.0.0.1:8765/v1/continue"] = process.argv.slice(2);
process.on("uncaughtException", (error) => { console.error(error.message); process.exit(1); });
if (!target || !globalThis.WebSocket) throw new Error("with Node 22: node continue_file.mjs IN.wav OUT.wav [URL]");
const token = process.env.STREAMING_TOKEN;
const wav = readFileSync(source);
const format = wav.subarray(20, 36);
if (format.readUInt16LE(2) !== 1 || format.readUInt32LE(4) !== 24_000 || format.readUInt16LE(14) !== 16)
  throw new Error("must be mono, 24 kHz, 16 bits");
const start = wav.indexOf("data") + 8;
const speech = wav.subarray(start, start + wav.readUInt32LE(start - 4));
const spoken = [];

const socket = new WebSocket(url, token ? ["continue.v1", `bearer.${token}`] : []);
socket.binaryType = "arraybuffer";
socket.onopen = () => {
  socket.send(JSON.stringify({ type: "session.start", pace: "fast", max_seconds: 5 }));
  for (let at = 0; at < speech.length; at += 96_000) { // at most two seconds a message
    const header = Buffer.alloc(16); // kind (1: 16-bit PCM), flags, reserved, turn, position in samples
    header.writeUInt8(1, 0), header.writeUInt32LE(1, 4), header.writeBigUInt64LE(BigInt(at / 2), 8);
    socket.send(Buffer.concat([header, speech.subarray(at, at + 96_000)]));
  }
  socket.send(JSON.stringify({ type: "speak", turn: 1 }));
};
socket.onmessage = ({ data }) => {
  if (data instanceof ArrayBuffer) return spoken.push(Buffer.from(data, 16));
  const said = JSON.parse(data);
  if (said.type === "error" || said.type === "session.refused") throw new Error(`${said.code}: ${said.message}`);
  if (said.type !== "turn.done") return;
  const size = spoken.reduce((bytes, piece) => bytes + piece.length, 0);
  const header = Buffer.from(wav.subarray(0, start)); // the same format, another length
  header.writeUInt32LE(start - 8 + size, 4), header.writeUInt32LE(size, start - 4);
  writeFileSync(target, Buffer.concat([header, ...spoken]));
  socket.close();
};
socket.onerror = () => { throw new Error(`no connection to ${url}: does \`python server.py\` run, and let you in?`); };

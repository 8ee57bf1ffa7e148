/** The way to the server: the socket's address and token, and why it would not have us. */

import { browserStorage } from "./settings.js";

const PATH = "v1/continue";
const SUBPROTOCOL = "continue.v1";
const TOKEN_KEY = "token";
const PATIENCE_MS = 10_000;

const storage = browserStorage("sessionStorage");

/** What the person typed, for as long as this tab lives. It goes into headers only, never into a URL. */
export const token = {
  get: () => storage.getItem(TOKEN_KEY) ?? "",
  set: (text) => storage.setItem(TOKEN_KEY, text),
  /** Whether this can be a token at all: others cannot be sent by a browser. */
  isPossible: (text) => /^[A-Za-z0-9._~+-]{16,256}$/.test(text),
};

/** A WebSocket to the server that this page came from. */
export function openSocket() {
  const url = new URL(PATH, location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return new WebSocket(url, token.get() ? [SUBPROTOCOL, `bearer.${token.get()}`] : [SUBPROTOCOL]);
}

/**
 * Why a handshake failed: a browser does not tell, so the same is asked over plain HTTP. Returns a code as in
 * `docs/protocol.md`, "gone" where nobody answers, or "no_websocket" where only WebSockets get lost.
 */
export async function whyRefused() {
  const headers = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await fetch(PATH, { headers, cache: "no-store", signal });
    if (answer.status === 426) return "no_websocket"; // it would have let a WebSocket in
    const [code] = (await answer.text()).split(":");
    return /^[a-z_]{1,40}$/.test(code) ? code : "gone";
  } catch (error) {
    if (error instanceof TypeError || error instanceof DOMException) return "gone";
    throw error;
  }
}

/** The server's figures, or null where nobody answers. */
export async function health() {
  try {
    const answer = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    return await answer.json();
  } catch (error) {
    if (error instanceof TypeError || error instanceof DOMException || error instanceof SyntaxError) return null;
    throw error;
  }
}

/** What a person is told when something is in the way: what it is, and what can be done. */

const { hostname = "HOST", port = "" } = globalThis.location ?? {};

/** By the code of a refusal (`docs/protocol.md`), of an AudioError, or of a lost connection. */
export const PROBLEMS = {
  full: ["Every place is taken", "All places of this server are in use. This page says when one is free."],
  overloaded: ["The machine is at its limit", "One more voice would make all of them stutter. Try again in a while."],
  stopping: ["The server is about to stop", "It takes nobody new. Try another server, or this one after its restart."],
  engine_stopped: ["The engine has stopped", "Something failed on the server. Whoever runs it has to look at its log."],
  step_failed: ["This conversation has failed", "Something broke on the server. A new conversation will work."],
  internal: ["The server failed", "You did nothing wrong. Try again."],
  gone: ["The server does not answer", "It may have been stopped, or the network is down."],
  no_websocket: [
    "Speech cannot get through",
    "The server is there, but something between here and it, a proxy perhaps, lets no WebSockets pass.",
  ],
  lost: ["The connection is lost", "The conversation is over. What was said so far can still be downloaded."],
  idle: ["Nobody said anything for a while", "The server has given your place to others. Press to begin anew."],
  prompt_too_long: ["That was more than the model can remember", "Talk for a shorter time."],
  vad_unavailable: ["No hands-free here", "This server cannot hear when you stop. Hold the button instead."],
  unsupported_protocol: ["Page and server do not match", "Reload the page."],
  bad_message: ["Page and server do not understand each other", "Reload the page."],
  unauthorized: ["This server asks for a token", "Ask whoever runs the server for one. It is kept until you close this tab."],
  forbidden_origin: ["This server does not know this page", "Its operator can let it in with --allow-origin."],
  too_many_sessions: ["You have too many conversations", "No more are allowed at once. End one in another tab or on another device."],
  too_many_connections: ["Too many tries", "The server takes only so many connections at a time. Wait a few seconds."],
  incomplete: ["The page is not whole", "Part of it did not come from the server. Reload it."],
  page_failed: ["The page failed", "The browser's console says why. Press to begin anew."],
  microphone_denied: [
    "The browser refused the microphone",
    "Allow it with the symbol beside the address, then press again. A recording needs no microphone.",
  ],
  microphone_missing: ["There is no microphone", "Plug one in, then press again. A recording needs no microphone."],
  microphone_busy: [
    "The microphone cannot be opened",
    "Another program may be using it: close that one, or choose another microphone under Sound.",
  ],
  microphone_lost: ["The microphone is gone", "It was unplugged or taken away. Press to begin anew."],
  loudspeaker_missing: ["There is no loudspeaker", "The browser finds no sound device to play on. Plug one in and reload."],
  insecure: [
    "No microphone without HTTPS",
    "Browsers give the microphone, and the audio thread that this page needs, only to pages that came over HTTPS or from " +
      "this very machine. There are two ways:",
    "Start the server with --tls-cert and --tls-key, and open this page with https://.",
    `Or bring it here: ssh -L 8765:127.0.0.1:${port || 80} ${hostname}, then open http://localhost:8765/.`,
  ],
  unsupported: ["This browser is too old", "The page needs AudioWorklet: Chrome 100, Firefox 120, Safari 16.4 or newer."],
};

/** {title, lines} for a code; message: what the server said, for codes that this page does not know. */
export function explain(code, message) {
  const [title, ...lines] = PROBLEMS[code] ?? ["The server refused", message || `It says: ${code}.`];
  return { title, lines };
}

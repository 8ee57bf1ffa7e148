/** What the person chose, kept in this browser. Nothing else is. */

const KEY = "settings";

/**
 * The ranges are the page's; the server allows more. seed: its digits, null draws a new one for every conversation.
 * topP: null is the model's. microphone: a device's id, "" is the browser's choice.
 */
const RANGES = {
  temperature: [0, 2, 0.8],
  topK: [0, 2048, 30],
  maxSeconds: [1, 60, 20],
  silenceMs: [160, 2000, 480],
  volume: [0, 1, 1],
};
const SWITCHES = {
  handsFree: false,
  echoCancellation: true,
  noiseSuppression: false,
  autoGainControl: false,
  singleKeys: true,
};
export const MAX_SEED = 2n ** 63n - 1n; // the protocol's

/** localStorage or sessionStorage, or what forgets with the page where the browser was told to keep nothing. */
export function browserStorage(name) {
  try {
    return globalThis[name];
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    const kept = new Map();
    return {
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => kept.set(key, value),
    };
  }
}

/** What is stored, with defaults for what is missing or out of range. */
export function loadSettings(storage) {
  let stored;
  try {
    stored = JSON.parse(storage.getItem(KEY)) ?? {};
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    stored = {};
  }
  const settings = {
    seed: parseSeed(String(stored.seed ?? "")) ?? null,
    topP: isShare(stored.topP) ? stored.topP : null,
    microphone: typeof stored.microphone === "string" ? stored.microphone : "",
  };
  for (const [name, [low, high, usual]] of Object.entries(RANGES)) {
    const value = stored[name];
    settings[name] = typeof value === "number" && value >= low && value <= high ? value : usual;
  }
  for (const [name, usual] of Object.entries(SWITCHES)) {
    settings[name] = typeof stored[name] === "boolean" ? stored[name] : usual;
  }
  return settings;
}

export function saveSettings(storage, settings) {
  storage.setItem(KEY, JSON.stringify(settings));
}

/** The digits of the seed that a person typed, null for none; undefined for what is no seed. */
export function parseSeed(text) {
  const digits = text.trim();
  if (digits === "") return null;
  return /^\d{1,19}$/.test(digits) && BigInt(digits) <= MAX_SEED ? String(BigInt(digits)) : undefined;
}

export function drawSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

function isShare(value) {
  return typeof value === "number" && value > 0 && value <= 1;
}

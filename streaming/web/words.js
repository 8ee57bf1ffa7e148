/** What the page says of each state: on the button, as the state, and as a hint. Needs no screen. */

const HOLD = "Hold and talk";
const STOP = "Stop";

/**
 * {label, state, hint}. talk: what is going on. handsFree: the way that was chosen. server: "ready", "full",
 * "line" (full, with room in its line), "stopping", "gone" or "unknown". gestured: whether the page may play sound.
 */
export function words(talk, { handsFree, server, gestured }) {
  const says = (label, state, hint) => ({ label, state, hint });
  const { phase, grip } = talk;
  if (talk.away && phase !== "problem") {
    const { label } = words({ ...picked(talk), away: false }, { handsFree, server, gestured });
    return says(label, "The connection broke", "It is being restored. What you say meanwhile is kept.");
  }
  switch (phase) {
    case "asking":
      if (!talk.asking) return says("…", "Opening the microphone", "");
      return says("…", "May it hear you?", "Your browser asks for the microphone: allow it. Until then nothing is heard.");
    case "connecting":
      if (!gestured) return says("…", "Click anywhere", "A browser plays no sound before the first click.");
      return says(holding(talk) ?? "Cancel", "Connecting", "What you say is kept until it can be sent.");
    case "queued":
      return says("Leave the line", `In line: place ${talk.place}`, "It is your turn as soon as there is room.");
    case "talking":
      if (talk.playingFile) return says("Go on now", "Your recording", "Press to hand over before its end.");
      if (talk.microphone === "muted") {
        return says(holding(talk) ?? STOP, "You are muted", "Press Unmute under Sound to be heard.");
      }
      if (talk.handsFree) return says(STOP, "You are speaking", "Pause, and it goes on.");
      return says(holding(talk) ?? "Let go", "You are speaking", "It goes on from your last word.");
    case "waiting":
      return says(talk.handsFree ? STOP : "…", "Handing over", "");
    case "speaking": {
      const how = talk.voice ? `In ${talk.voice}. ` : "";
      if (talk.handsFree) return says(STOP, "It goes on", `${how}Speak to interrupt it. Wear headphones, or it hears itself.`);
      return says("Interrupt", "It goes on", `${how}Hold and talk to interrupt it.`);
    }
    case "replaying":
      return says(handsFree ? "Listen" : HOLD, "Playing it again", "Press Stop to end it.");
    case "ready":
      if (!talk.handsFree) return says(HOLD, "Your turn", "It remembers what you said, and what you heard it say.");
      if (talk.microphone === "muted") return says(STOP, "Muted", "Nothing is heard until you press Unmute.");
      return says(STOP, "Listening", "Just talk. Pause, and it goes on.");
    case "problem":
      return says(handsFree ? "Try again" : HOLD, "", "Press to try again.");
    default:
      return says(handsFree ? "Listen" : HOLD, ...IDLE[server](handsFree));
  }
}

const IDLE = {
  unknown: () => ["Looking for the server", ""],
  gone: () => ["The server does not answer", "It was stopped, or the network is down. This page keeps asking."],
  stopping: () => ["The server is stopping", "It takes nobody new. This page keeps asking."],
  full: () => ["Every place is taken", "This page says when there is room."],
  line: (handsFree) => ["Every place is taken", `${handsFree ? "Press" : "Hold the button"} to wait in line for one.`],
  ready: (handsFree) =>
    handsFree
      ? ["Ready", "Press once, then just talk. When you pause, it goes on."]
      : ["Ready", "Hold the button and talk. Let go, and it goes on. A tap works too."],
};

function holding({ grip }) {
  return { held: "Let go", latched: "Press to hand over", free: null }[grip];
}

/** Getters of a class are lost when it is spread. */
function picked({ phase, grip, asking, place, playingFile, handsFree, microphone, voice }) {
  return { phase, grip, asking, place, playingFile, handsFree, microphone, voice };
}

/** What one might say to this model, as a sentence; "" where nobody knows. */
export function suggestion(suggestions) {
  if (suggestions.length === 0) return "";
  const quoted = suggestions.map((one) => `“${one.replaceAll(" ", "\u00a0")}”`); // a line ends between two of them
  return `Try saying ${new Intl.ListFormat("en-GB", { type: "disjunction" }).format(quoted)}.`;
}

/** What becomes of what the microphone hears. */
export const MICROPHONE = {
  off: "Off",
  asking: "Asking",
  on: "On, not sent",
  heard: "You are heard",
  muted: "Muted",
};

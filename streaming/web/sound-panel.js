/** The panel "Sound": which microphone, how loud it is, whether it is heard, and how loud the page plays. */

import { loudness } from "./audio.js";
import { MICROPHONE } from "./words.js";

export class SoundPanel {
  #audio;
  #talk;
  #settings;
  #elements;

  /** change(some): keeps settings. */
  constructor({ audio, talk, settings, change }) {
    [this.#audio, this.#talk, this.#settings] = [audio, talk, settings];
    const $ = (id) => document.getElementById(id);
    this.#elements = { list: $("microphone"), says: $("microphone-state"), meter: $("meter"), mute: $("mute"), volume: $("volume") };
    const { list, mute, volume } = this.#elements;
    list.addEventListener("change", () => {
      change({ microphone: list.value });
      talk.changeMicrophone();
    });
    mute.addEventListener("click", () => this.#press());
    volume.value = audio.volume = settings.volume;
    volume.addEventListener("input", () => {
      change({ volume: Number(volume.value) });
      audio.volume = settings.volume;
    });
    this.list();
  }

  /** Lists the microphones anew. */
  async list() {
    const { list } = this.#elements;
    const known = (await this.#audio.microphones()).filter(({ label }) => label !== "");
    const chosen = this.#audio.microphoneId || this.#settings.microphone;
    const options = known.map(({ id, label }) => new Option(label, id));
    if (!known.some(({ id }) => id === "default")) options.unshift(new Option("The browser's choice", ""));
    list.replaceChildren(...options);
    list.value = known.some(({ id }) => id === chosen) ? chosen : options[0].value;
  }

  /** Draws what is so now. */
  show() {
    const { says, mute, meter } = this.#elements;
    const { microphone, phase } = this.#talk;
    const text = MICROPHONE[microphone];
    if (says.textContent !== text) says.textContent = text;
    says.dataset.state = microphone;
    const idle = phase === "idle" || phase === "problem";
    const label = { off: "Try it", asking: "…", muted: "Unmute", on: idle ? "Turn off" : "Mute" }[microphone] ?? "Mute";
    if (mute.textContent !== label) mute.textContent = label;
    mute.disabled = microphone === "asking";
    meter.style.setProperty("--level", loudness(this.#audio.microphoneRms).toFixed(2));
  }

  #press() {
    const { microphone, phase } = this.#talk;
    if (microphone === "off") this.#talk.tryMicrophone();
    else if (microphone === "on" && (phase === "idle" || phase === "problem")) this.#talk.end();
    else this.#talk.mute(microphone !== "muted");
  }
}

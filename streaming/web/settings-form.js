/** The settings' fields: what is typed is kept where it can be, and the field says it where it cannot. */

import { parseSeed } from "./settings.js";

const $ = (id) => document.getElementById(id);

/**
 * change(some): keeps settings; sampled(): what tokens are drawn by has changed; opened(): how the microphone is
 * opened.
 */
export function bindSettings(settings, { change, sampled, opened }) {
  number("temperature", settings.temperature, (value) => value.toFixed(2), (temperature) => change({ temperature }), sampled);
  number("max-seconds", settings.maxSeconds, (value) => `${value} s`, (maxSeconds) => change({ maxSeconds }), sampled);
  number("silence", settings.silenceMs, (value) => `${value} ms`, (silenceMs) => change({ silenceMs }), () => {});
  field("top-k", String(settings.topK), "From 0 to 2048; 0 is off.", (input) => {
    if (input.value === "" || !input.checkValidity()) return false;
    change({ topK: Number(input.value) });
    sampled();
    return true;
  });
  field("top-p", settings.topP ?? "", "Above 0, up to 1.", (input) => {
    if (!input.checkValidity()) return false;
    change({ topP: input.value === "" ? null : Number(input.value) });
    sampled();
    return true;
  });
  field("seed", settings.seed ?? "", "A whole number of up to 19 digits, below 2^63.", (input) => {
    const seed = parseSeed(input.value);
    if (seed === undefined) return false;
    change({ seed });
    return true;
  });
  const box = (id, name, after) => {
    $(id).checked = settings[name];
    $(id).addEventListener("change", () => {
      change({ [name]: $(id).checked });
      after();
    });
  };
  box("echo", "echoCancellation", opened);
  box("noise", "noiseSuppression", opened);
  box("gain", "autoGainControl", opened);
  const letters = () => document.body.classList.toggle("letters", settings.singleKeys);
  box("single-keys", "singleKeys", letters);
  letters();
}

function number(id, value, written, keep, after) {
  const [input, output] = [$(id), document.querySelector(`output[for=${id}]`)];
  const show = () => (output.textContent = written(Number(input.value)));
  input.value = value;
  show();
  input.addEventListener("input", () => {
    keep(Number(input.value));
    show();
    after();
  });
}

/** take(input): false for what cannot be; then it is said beside the field. */
function field(id, value, rule, take) {
  const [input, says] = [$(id), $(`${id}-says`)];
  input.value = value;
  input.addEventListener("input", () => {
    const valid = take(input);
    input.setAttribute("aria-invalid", String(!valid));
    says.textContent = valid ? "" : rule;
  });
}

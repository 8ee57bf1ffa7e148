/**
 * The device: a microphone or a file on one side, the loudspeaker on the other, both in one AudioContext at the
 * device's own rate and on one clock. What is heard and played comes and goes at 24 kHz; see the two worklets. What is
 * played goes through one gain, which is the volume.
 */

import { SAMPLE_RATE as RATE } from "./protocol.js";

const WORKLETS = ["capture-worklet.js", "playback-worklet.js"];
const STOP_PATIENCE_MS = 300;
const RESUME_PATIENCE_MS = 5000;
const LATENCY_EVERY_MS = 1000;

/** No sound can be taken or made. code: one of `problems.js`. */
export class AudioError extends Error {
  constructor(code, options) {
    super(code, options);
    this.code = code;
  }
}

/** A file that the browser cannot decode. */
export class FileError extends Error {}

export class Audio {
  /** Called with each piece of speech, {frame, pcm, last}. */
  onSpeech = () => {};
  /** Called with {turn, frame} when the first sample of a turn leaves. */
  onStarted = () => {};
  /** Called about every 20 ms while a turn plays: the worklet's "played". */
  onPlayed = () => {};
  /** Called with an AudioError when the microphone goes away by itself. */
  onLost = () => {};
  /** Called when the system mutes the microphone (true) or no longer does (false). */
  onMuted = () => {};
  /** Called when microphones have come or gone, or may be used from now on. */
  onDevices = () => {};
  /** Called when a recording that is played to the person alone has come to its end. */
  onRecordingEnd = () => {};
  /** Called when a file that is being played has come to its end. */
  onFileEnd = () => {};
  #context = null;
  #capture;
  #playback;
  #gain;
  #volume = 1;
  #meter = null; // {node, samples} of the open microphone
  #muted = false;
  #opening = 0; // counts the microphones that were asked for
  #permission = null;
  #stream = null;
  #source = null;
  #constraints = "";
  #file = null;
  #stopped = () => {};
  #captured = () => {};

  /** Makes the context. Waits for a gesture if there was none yet: dropping a file is none. Throws AudioError. */
  async open() {
    if (!globalThis.isSecureContext) throw new AudioError("insecure");
    if (!globalThis.AudioWorkletNode) throw new AudioError("unsupported");
    if (this.#context === null) {
      const context = new AudioContext({ latencyHint: "interactive" });
      try {
        await Promise.all(WORKLETS.map((file) => context.audioWorklet.addModule(file)));
      } catch (error) {
        if (!(error instanceof DOMException)) throw error;
        throw new AudioError("incomplete", { cause: error });
      }
      this.#context = context;
      this.#connect(context);
      for (const gesture of ["pointerup", "keydown"]) addEventListener(gesture, () => context.resume());
    }
    await this.#resume();
  }

  get rate() {
    return this.#context.sampleRate;
  }

  /** The audio clock, in samples of the device. */
  get frame() {
    return this.#context === null ? 0 : this.#context.currentTime * this.#context.sampleRate;
  }

  /** What lies between the playback worklet and the loudspeaker, as the browser tells it. */
  get outputLatencyMs() {
    return 1000 * ((this.#context?.baseLatency ?? 0) + (this.#context?.outputLatency ?? 0));
  }

  // Speech in

  get hasMicrophone() {
    return this.#stream !== null;
  }

  /** The id of the microphone that is open, "" for none. */
  get microphoneId() {
    return this.#stream?.getAudioTracks()[0].getSettings().deviceId ?? "";
  }

  /** How loud the open microphone is (RMS), of full scale. */
  get microphoneRms() {
    if (this.#meter === null) return 0;
    const { node, samples } = this.#meter;
    node.getFloatTimeDomainData(samples);
    return Math.sqrt(samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);
  }

  /** Whether the person has muted the microphone. It stays open, and gives silence. */
  get muted() {
    return this.#muted;
  }

  set muted(muted) {
    this.#muted = muted;
    for (const track of this.#stream?.getAudioTracks() ?? []) track.enabled = !muted;
  }

  /** [{id, label}]: the microphones; without names until one may be used. */
  async microphones() {
    const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
    return devices
      .filter(({ kind, deviceId }) => kind === "audioinput" && deviceId !== "")
      .map(({ deviceId, label }) => ({ id: deviceId, label }));
  }

  /** Whether the microphone may be used without a question. False where the browser does not tell. */
  async mayUseMicrophone() {
    try {
      if (this.#permission === null) {
        this.#permission = await navigator.permissions.query({ name: "microphone" });
        this.#permission.addEventListener("change", () => this.onDevices(this.#permission.state));
      }
      return this.#permission.state === "granted";
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      return false;
    }
  }

  /**
   * options: {echoCancellation, noiseSuppression, autoGainControl, deviceId}. False where `closeMicrophone` was called,
   * or another one was asked for, before the person had answered. Throws AudioError.
   */
  async openMicrophone(options) {
    if (this.#stream !== null && this.#constraints === JSON.stringify(options)) return true;
    const muted = this.#muted;
    this.closeMicrophone();
    if (!navigator.mediaDevices) throw new AudioError("insecure");
    const opening = this.#opening;
    let stream;
    try {
      stream = await getMicrophone(options);
    } catch (error) {
      if (!(error instanceof DOMException || error instanceof TypeError)) throw error;
      if (opening !== this.#opening) return false;
      throw new AudioError(MICROPHONE_ERRORS[error.name] ?? "microphone_busy", { cause: error });
    }
    if (opening !== this.#opening) {
      for (const track of stream.getTracks()) track.stop();
      return false;
    }
    this.#take(stream);
    this.muted = muted;
    this.#constraints = JSON.stringify(options);
    return true;
  }

  closeMicrophone() {
    this.#opening += 1;
    this.#source?.disconnect();
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = this.#source = this.#meter = null;
    this.#muted = false;
  }

  #take(stream) {
    this.#stream = stream;
    this.#source = new MediaStreamAudioSourceNode(this.#context, { mediaStream: stream });
    const node = new AnalyserNode(this.#context, { fftSize: 1024 });
    this.#source.connect(node);
    this.#meter = { node, samples: new Float32Array(node.fftSize) };
    if (this.#file === null) this.#source.connect(this.#capture);
    const [track] = stream.getAudioTracks();
    track.addEventListener("ended", () => {
      this.closeMicrophone();
      this.onLost(new AudioError("microphone_lost"));
    });
    track.addEventListener("mute", () => this.onMuted(true));
    track.addEventListener("unmute", () => this.onMuted(false));
    if (track.muted) this.onMuted(true);
    this.onDevices();
  }

  /** From now on speech comes. */
  startCapture() {
    this.#capture.port.postMessage({ type: "start" });
  }

  /** Resolves when everything said until now has come. */
  async stopCapture() {
    if (this.#context === null) return;
    await answer(
      (resolve) => (this.#captured = resolve),
      () => this.#capture.port.postMessage({ type: "stop" }),
    );
  }

  /** Decodes a file, at 24 kHz. Throws FileError. */
  async decode(bytes) {
    try {
      return await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      throw new FileError("the browser cannot read this as sound", { cause: error });
    }
  }

  /** Plays a decoded file to the person, and to the capture worklet instead of the microphone. */
  playFile(buffer) {
    this.stopFile();
    this.#source?.disconnect(this.#capture);
    const file = this.#playBuffer(buffer, () => this.onFileEnd());
    file.connect(this.#capture);
  }

  /** Plays Int16Array at 24 kHz to the person alone. */
  playRecording(pcm) {
    this.stopFile();
    const buffer = new AudioBuffer({ length: Math.max(1, pcm.length), sampleRate: RATE });
    buffer.copyToChannel(Float32Array.from(pcm, (sample) => sample / 32768), 0);
    this.#playBuffer(buffer, () => this.onRecordingEnd());
  }

  stopFile() {
    const file = this.#file;
    this.#file = null;
    file?.stop();
    file?.disconnect();
    if (file !== null) this.#source?.connect(this.#capture);
  }

  #playBuffer(buffer, ended) {
    const file = new AudioBufferSourceNode(this.#context, { buffer });
    file.connect(this.#gain);
    file.addEventListener("ended", () => this.#file === file && ended());
    file.start();
    this.#file = file;
    return file;
  }

  // Continuations out

  /** From 0 to 1, of all that is played. */
  set volume(volume) {
    this.#volume = volume;
    if (this.#context !== null) this.#gain.gain.value = volume;
  }

  begin(turn) {
    this.#tellLatency();
    this.#playback.port.postMessage({ type: "begin", turn });
  }

  push(turn, pcm) {
    this.#playback.port.postMessage({ type: "push", turn, pcm }, [pcm.buffer]);
  }

  complete(turn) {
    this.#playback.port.postMessage({ type: "complete", turn });
  }

  /** Silence. Resolves with how many samples of the turn were heard, or null if the audio thread does not say. */
  async stopPlayback() {
    if (this.#context === null) return null;
    return answer(
      (resolve) => (this.#stopped = resolve),
      () => this.#playback.port.postMessage({ type: "stop" }),
    );
  }

  /** Resolves once the context runs. Without a sound device some browsers never say that they cannot. */
  async #resume() {
    const running = this.#context.resume();
    while (this.#context.state !== "running") {
      const late = await Promise.race([running, new Promise((resolve) => setTimeout(resolve, RESUME_PATIENCE_MS, true))]);
      if (late && (navigator.userActivation?.hasBeenActive ?? true)) throw new AudioError("loudspeaker_missing");
    }
  }

  #connect(context) {
    const mono = { channelCount: 1, channelCountMode: "explicit", channelInterpretation: "speakers" };
    this.#capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0, ...mono });
    this.#capture.port.onmessage = ({ data }) => {
      this.onSpeech(data);
      if (data.last) this.#captured();
    };
    this.#playback = new AudioWorkletNode(context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#playback.port.onmessage = ({ data }) => {
      if (data.type === "started") this.onStarted(data);
      else if (data.type === "played") this.onPlayed(data);
      else if (data.type === "stopped") this.#stopped(data.heard);
    };
    this.#gain = new GainNode(context, { gain: this.#volume });
    this.#playback.connect(this.#gain).connect(context.destination);
    navigator.mediaDevices?.addEventListener("devicechange", () => this.onDevices());
    setInterval(() => this.#tellLatency(), LATENCY_EVERY_MS);
  }

  #tellLatency() {
    const samples = Math.min(RATE / 2, Math.round((RATE * this.outputLatencyMs) / 1000));
    this.#playback.port.postMessage({ type: "latency", samples });
  }
}

const MICROPHONE_ERRORS = {
  NotAllowedError: "microphone_denied",
  SecurityError: "microphone_denied",
  NotFoundError: "microphone_missing",
  OverconstrainedError: "microphone_missing",
  TypeError: "insecure",
};

/** The microphone of this id or, where it is not there any more, the browser's choice. Raises what the browser does. */
async function getMicrophone({ deviceId, ...options }) {
  const wanted = { channelCount: { ideal: 1 }, ...options };
  if (!deviceId) return navigator.mediaDevices.getUserMedia({ audio: wanted });
  try {
    return await navigator.mediaDevices.getUserMedia({ audio: { ...wanted, deviceId: { exact: deviceId } } });
  } catch (error) {
    if (error.name !== "OverconstrainedError" && error.name !== "NotFoundError") throw error;
    return navigator.mediaDevices.getUserMedia({ audio: wanted });
  }
}

/** How loud that is on a meter: from 0, at -60 dB or less, to 1 at full scale. rms: of full scale. */
export function loudness(rms) {
  return Math.max(0, 1 + Math.log10(Math.max(rms, 1e-6)) / 3);
}

/** What the audio thread answers to `ask`, or null: a context that the system has suspended answers nobody. */
function answer(listen, ask) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, STOP_PATIENCE_MS, null);
    listen((value) => {
      clearTimeout(timer);
      resolve(value);
    });
    ask();
  });
}

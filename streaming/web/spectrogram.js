/**
 * The picture of a tape: both voices' spectra over one time line, each in its colour, with the hand-overs marked.
 *
 * A column of pixels stands for 10 ms. Each is computed when its time has come, and again if sound comes late, into a
 * ring wider than what is visible; a frame is drawn by laying the rings over one another with "now" at the right edge.
 */

import { SAMPLE_RATE as RATE } from "./protocol.js";
import { MACHINE, YOU } from "./tape.js";
import { BANDS, WINDOW, bands, heightOf, labelled } from "./spectrum.js";

const HOP = 240;
const COLUMNS = 2048;
const SETTLED = 0.06 * RATE; // so long after their time both voices' samples are usually on the tape
const SECONDS_PER_PIXEL = 1 / 100;
const TOP = 44; // pixels: a strip for the legend and the marks' labels
const BOTTOM = 20; // and one for the time
const LABEL = 15; // the height of a label
const TICKS_HZ = [250, 500, 1000, 2000, 4000, 8000];

export class Spectrogram {
  #canvas;
  #rings = [YOU, MACHINE].map(ring);
  #next = 0; // the column to be computed next
  #now = 0; // the position at the right edge
  #tape = null;
  #colours;

  constructor(canvas) {
    this.#canvas = canvas;
    this.recolour();
  }

  /** Takes the colours from the style sheet again: the scheme may have changed. */
  recolour() {
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    this.#colours = {
      voices: [colour("--you"), colour("--machine")],
      bright: [colour("--you-bright"), colour("--machine-bright")],
      text: colour("--muted"),
      line: colour("--line"),
      paper: colour("--paper"),
      mix: colour("--mix"),
    };
    this.#rings.forEach(({ palette }, voice) => {
      const [from, to] = [rgb(this.#colours.voices[voice]), rgb(this.#colours.bright[voice])];
      for (let level = 0; level < 256; level++) {
        const share = Math.max(0, (level - 150) / 105);
        for (let part = 0; part < 3; part++) palette[4 * level + part] = from[part] + share * (to[part] - from[part]);
        palette[4 * level + 3] = 255 * Math.min(1, (level / 190) ** 1.5);
      }
    });
    this.#next = 0;
  }

  /** tape: null for none. now: the position at the right edge. */
  draw(tape, now) {
    const canvas = this.#canvas;
    const scale = devicePixelRatio;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (width === 0) return; // not shown yet
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    if (tape !== this.#tape || now < this.#now) [this.#tape, this.#next] = [tape, 0];
    this.#now = now;
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const perPixel = Math.max(SECONDS_PER_PIXEL, 7 / width) * RATE; // samples; a telephone shows 7 s
    const left = parseFloat(getComputedStyle(canvas).textIndent); // the page's left edge
    const area = { width, height, left, top: TOP, deep: height - TOP - BOTTOM, xOf: (at) => width - (now - at) / perPixel };
    this.#drawGrid(context, area);
    if (tape === null) return;
    this.#compute(tape, now - width * perPixel, now);
    this.#drawVoices(context, area, now - width * perPixel);
    this.#drawFrequencies(context, area);
    this.#drawTime(context, area, now - width * perPixel, now);
    for (const mark of tape.marks) this.#drawMark(context, area, mark);
  }

  #compute(tape, from, now) {
    const last = Math.floor(Math.min(now, tape.end - (tape.rolling ? SETTLED : 0)) / HOP);
    const late = Math.floor((tape.takeChangedFrom() - WINDOW / 2) / HOP);
    this.#next = Math.max(Math.min(this.#next, late), Math.floor(from / HOP), last - COLUMNS + 1, 0);
    for (; this.#next < last; this.#next++) {
      this.#rings.forEach(({ context, image, palette }, voice) => {
        const pcm = tape.read(voice, this.#next * HOP + HOP / 2 - WINDOW / 2, WINDOW);
        const levels = pcm === null ? null : bands(pcm);
        for (let band = 0; band < BANDS; band++) {
          const level = levels === null ? 0 : levels[band];
          image.data.set(palette.subarray(4 * level, 4 * level + 4), 4 * (BANDS - 1 - band));
        }
        context.putImageData(image, this.#next % COLUMNS, 0);
      });
    }
  }

  #drawVoices(context, { top, deep, xOf }, from) {
    const end = this.#next; // what follows is not computed yet
    const start = Math.max(0, end - COLUMNS + 1, Math.floor(from / HOP));
    const wide = xOf(HOP) - xOf(0);
    context.globalCompositeOperation = this.#colours.mix;
    for (const { canvas } of this.#rings) {
      for (let column = start; column < end; ) {
        const inRing = column % COLUMNS;
        const count = Math.min(end - column, COLUMNS - inRing);
        context.drawImage(canvas, inRing, 0, count, BANDS, xOf(column * HOP), top, count * wide, deep);
        column += count;
      }
    }
    context.globalCompositeOperation = "source-over";
  }

  #drawGrid(context, { width, top, deep }) {
    context.fillStyle = this.#colours.line;
    for (const hz of TICKS_HZ) context.fillRect(0, Math.round(top + deep * (1 - heightOf(hz))), width, 1);
    context.fillRect(0, top + deep, width, 1);
  }

  #drawFrequencies(context, { left, top, deep }) {
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "left";
    for (const hz of labelled(TICKS_HZ, deep, LABEL)) {
      const y = Math.round(top + deep * (1 - heightOf(hz)));
      this.#drawText(context, left, y + 4, hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`, this.#colours.text);
    }
  }

  #drawTime(context, { width, height, xOf }, from, now) {
    context.textAlign = "center";
    context.fillStyle = this.#colours.text;
    for (let second = Math.ceil(Math.max(0, from) / RATE); second * RATE <= now; second++) {
      const x = xOf(second * RATE);
      context.fillRect(x, height - BOTTOM, 1, 4);
      if (x > 14 && x < width - 14) context.fillText(clock(second), x, height - 5);
    }
  }

  #drawMark(context, area, mark) {
    const [you, machine] = this.#colours.voices;
    context.font = "600 12px system-ui, sans-serif";
    if (mark.kind === "interrupted") {
      this.#drawLine(context, area, area.xOf(mark.at), you, true);
      this.#drawLabel(context, area, area.xOf(mark.at), "interrupted", you);
      return;
    }
    const [from, to] = [area.xOf(mark.speechEnd), area.xOf(mark.firstSound)];
    if (mark.ms !== null) {
      this.#drawLine(context, area, from, you, true);
      context.fillStyle = machine;
      context.fillRect(from, area.top - 2, to - from, 3);
    }
    this.#drawLine(context, area, to, machine, false);
    this.#drawLabel(context, area, to, mark.ms === null ? "goes on" : `${Math.round(mark.ms)} ms`, machine);
  }

  #drawLine(context, { top, deep }, x, colour, dashed) {
    context.save();
    context.strokeStyle = colour;
    context.lineWidth = 1.5;
    context.setLineDash(dashed ? [3, 4] : []);
    context.beginPath();
    context.moveTo(x, top - 2);
    context.lineTo(x, top + deep);
    context.stroke();
    context.restore();
  }

  #drawLabel(context, { width, top }, x, text, colour) {
    context.textAlign = "left";
    this.#drawText(context, Math.min(x - 1, width - context.measureText(text).width - 8), top - 7, text, colour);
  }

  /** On a piece of paper, so that it can be read over any sound. */
  #drawText(context, x, y, text, colour) {
    context.fillStyle = this.#colours.paper;
    context.fillRect(x - 3, y - 11, context.measureText(text).width + 6, 15);
    context.fillStyle = colour;
    context.fillText(text, x, y);
  }
}

function ring() {
  const canvas = document.createElement("canvas");
  canvas.width = COLUMNS;
  canvas.height = BANDS;
  const context = canvas.getContext("2d");
  return { canvas, context, image: context.createImageData(1, BANDS), palette: new Uint8ClampedArray(4 * 256) };
}

/** The parts of a colour written as #rrggbb. */
function rgb(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function clock(second) {
  return `${Math.floor(second / 60)}:${String(second % 60).padStart(2, "0")}`;
}

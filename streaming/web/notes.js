/**
 * What a person is told beside the state: the most important of it, for as long as it is so. Needs no screen.
 *
 * An error is not hidden by a remark that comes after it, and what was said of one topic goes when something else is
 * said of it or when it is withdrawn.
 */

const RANKS = ["remark", "warning", "error"];
const STAYS_MS = { remark: 8000, warning: 15_000, error: 60_000 };

export class Notes {
  #now;
  #notes = [];

  /** now(): a clock in milliseconds. */
  constructor(now = () => performance.now()) {
    this.#now = now;
  }

  /** rank: "remark", "warning" or "error". topic: what it is about; null for something of its own. */
  tell(text, { rank = "remark", topic = null } = {}) {
    this.#notes = this.#notes.filter((note) => note.text !== text && (topic === null || note.topic !== topic));
    this.#notes.push({ text, rank, topic, until: this.#now() + STAYS_MS[rank] });
  }

  /** What was said of this topic is no longer so. */
  withdraw(topic) {
    this.#notes = this.#notes.filter((note) => note.topic !== topic);
  }

  /** {text, rank} of what is to be shown now, null for nothing: the newest of the highest rank. */
  get shown() {
    const now = this.#now();
    this.#notes = this.#notes.filter(({ until }) => until > now);
    let best = null;
    for (const note of this.#notes) {
      if (best === null || RANKS.indexOf(note.rank) >= RANKS.indexOf(best.rank)) best = note;
    }
    return best && { text: best.text, rank: best.rank };
  }
}

/**
 * What one side of a session counts and keeps, so that nothing is lost or doubled when a connection breaks and another
 * takes its place: `docs/protocol.md`, "Coming back". The page's twin of `streaming/protocol/replay.py`.
 */

import { ProtocolError } from "./protocol.js";

export const ACK_EVERY = 64;

export class ReplayBook {
  /** Counted messages of the server's so far. */
  received = 0;
  #answered = 0; // what of it the server knows to have arrived
  #acknowledged = 0; // of this side's messages
  #kept = []; // those after them

  /** This side's messages that may not have arrived, in order. */
  get unanswered() {
    return this.#kept;
  }

  /** A counted message is about to be sent. */
  send(data) {
    this.#kept.push(data);
  }

  /** A counted message has come. True when that should be said. */
  receive() {
    this.received += 1;
    if (this.received - this.#answered < ACK_EVERY) return false;
    this.#answered = this.received;
    return true;
  }

  /** So many have arrived. Throws ProtocolError if that cannot be. */
  acknowledge(received) {
    const more = received - this.#acknowledged;
    if (!Number.isInteger(more) || more < 0 || more > this.#kept.length) {
      throw new ProtocolError(`${received} messages received, of ${this.#acknowledged + this.#kept.length} sent`);
    }
    this.#kept.splice(0, more);
    this.#acknowledged = received;
  }
}

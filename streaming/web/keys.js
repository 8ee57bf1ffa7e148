/**
 * The keyboard: Space talks, Esc stops, and single letters press buttons where the person wants that (WCAG 2.2, 2.1.4).
 *
 * Space belongs to a button, a box or a list only where the keyboard has led to it: after a click the focus goes, and
 * Space is for talking again. In fields Space talks, too: nothing that they take has one in it.
 */

const PRESSED = "button:not(#talk), select, summary, [type=checkbox], [type=radio]";

/**
 * letters: {code: press}; hasLetters(): whether they are wanted; down(event): the talk button goes down; up(event):
 * whether it was down until now; stop(): what Esc does.
 */
export function listenToKeys({ letters, hasLetters, down, up, stop }) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("form, dialog")) return;
    if (event.code === "Space" && !event.target.matches(PRESSED)) {
      event.preventDefault();
      if (!event.repeat) down(event);
    } else if (event.code === "Escape") {
      stop();
    } else if (event.code in letters && hasLetters() && !event.repeat && !takesText(event.target)) {
      letters[event.code]();
    }
  });
  addEventListener("keyup", (event) => {
    if (event.code !== "Space") return;
    const talked = up(event); // wherever the focus has gone meanwhile
    if (talked || event.target.matches("#talk")) event.preventDefault(); // on a button it would be a click
  });
  let pointed = false; // whether the last thing was a pointer's and not a key's
  addEventListener("pointerdown", () => (pointed = true), { capture: true });
  addEventListener("keydown", () => (pointed = false), { capture: true });
  for (const type of ["click", "change"]) {
    addEventListener(type, ({ target }) => {
      if (pointed && target.matches("select") !== (type === "click")) leave();
    });
  }
}

/** Takes the focus from what a pointer has pressed. */
function leave() {
  const { activeElement } = document;
  if (activeElement.matches(PRESSED) && !activeElement.closest("dialog")) activeElement.blur();
}

function takesText(element) {
  return element.matches("select, input:not([type=range], [type=checkbox], [type=radio])");
}

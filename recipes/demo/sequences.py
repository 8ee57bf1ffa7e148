"""What the demo can recite: the items of its sequences, how each goes on, and the blocks that say it.

An item is what a person says between two pauses: a number from 0 to 100, a day, a month, a letter, a line of a rhyme.
A block is what the model says in one piece. An item is one block, or two for numbers such as "twenty-one".
New items and blocks are appended, never inserted: their places in these tables are in the training data.
"""

from __future__ import annotations

from dataclasses import dataclass


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_ONES = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = _split("twenty thirty forty fifty sixty seventy eighty ninety")
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split("January February March April May June July August September October November December")
LETTERS = _split(
    "ay bee see dee ee eff gee aitch eye jay kay ell em en oh pee cue are ess tee you vee double-you ex why zee"
)
"""Spelled so that every synthesiser says a letter's name."""
RHYMES = (
    (
        "Twinkle, twinkle, little star",
        "How I wonder what you are",
        "Up above the world so high",
        "Like a diamond in the sky",
    ),
    (
        "Mary had a little lamb",
        "Its fleece was white as snow",
        "And everywhere that Mary went",
        "The lamb was sure to go",
    ),
    (
        "Humpty Dumpty sat on a wall",
        "Humpty Dumpty had a great fall",
        "All the king's horses and all the king's men",
        "Couldn't put Humpty together again",
    ),
    (
        "Row, row, row your boat",
        "Gently down the stream",
        "Merrily, merrily, merrily, merrily",
        "Life is but a dream",
    ),
    (
        "Jack and Jill went up the hill",
        "To fetch a pail of water",
        "Jack fell down and broke his crown",
        "And Jill came tumbling after",
    ),
    (
        "Baa, baa, black sheep, have you any wool",
        "Yes sir, yes sir, three bags full",
    ),
    (
        "Hey diddle diddle",
        "The cat and the fiddle",
        "The cow jumped over the moon",
        "The little dog laughed to see such sport",
    ),
    (
        "Rain, rain, go away",
        "Come again another day",
    ),
    (
        "Roses are red",
        "Violets are blue",
        "Sugar is sweet",
        "And so are you",
    ),
    (
        "Old King Cole was a merry old soul",
        "And a merry old soul was he",
    ),
    (
        "To be or not to be",
        "That is the question",
    ),
    (
        "It was the best of times",
        "It was the worst of times",
        "It was the age of wisdom",
        "It was the age of foolishness",
    ),
    (
        "Once upon a midnight dreary",
        "While I pondered, weak and weary",
    ),
)
"""Rhymes and openings, all in the public domain; of words that the judge knows."""
STEPS = (1, -1, 2, -2, 5, -5, 10, -10)
"""Differences of neighbouring numbers that are gone on with."""


@dataclass(frozen=True)
class Item:
    """kind: `number`, `day`, `month`, `letter` or `rhyme`. place: within its sequence; group: which rhyme, else 0."""

    kind: str
    group: int
    place: int
    text: str
    blocks: tuple[str, ...]


def _number(value: int) -> Item:
    if value < 20:
        words: tuple[str, ...] = (_ONES[value],)
    elif value == 100:
        words = ("one hundred",)
    elif value % 10 == 0:
        words = (_TENS[value // 10 - 2],)
    else:
        words = (_TENS[value // 10 - 2] + "-", _ONES[value % 10])
    return Item("number", 0, value, "".join(words), words)


def _listed(kind: str, texts: tuple[str, ...]) -> list[Item]:
    return [Item(kind, 0, place, text, (text.lower(),)) for place, text in enumerate(texts)]


ITEMS: tuple[Item, ...] = (
    *(_number(value) for value in range(101)),
    *_listed("day", DAYS),
    *_listed("month", MONTHS),
    *_listed("letter", LETTERS),
    *(
        Item("rhyme", group, place, line, (line.lower(),))
        for group, lines in enumerate(RHYMES)
        for place, line in enumerate(lines)
    ),
)
BLOCKS: tuple[str, ...] = tuple(dict.fromkeys(block for item in ITEMS for block in item.blocks))
"""A trailing hyphen is a ten that goes on with a digit."""
_BY_PLACE = {(item.kind, item.group, item.place): item for item in ITEMS}
FRIENDLY = "rhyme"
"""Of what is no sequence, or one that is over: the first rhyme from its start."""


def number(value: int) -> Item:
    """The item of a number from 0 to 100."""
    return _BY_PLACE["number", 0, value]


def sequence(kind: str, group: int = 0) -> list[Item]:
    """All items of a sequence in order."""
    return [item for item in ITEMS if item.kind == kind and item.group == group]


def step_of(values: list[int]) -> int:
    """The difference by which numbers go on: that of the last two if it is one of `STEPS`, else 1."""
    step = values[-1] - values[-2] if len(values) > 1 else 1
    return step if step in STEPS else 1


def rest(items: list[Item]) -> list[Item]:
    """What is left of the sequence of the last item; nothing after its end."""
    last = items[-1]
    if last.kind == "number":
        run = [item.place for item in items if item.kind == "number"]
        step = step_of(run)
        return [number(value) for value in range(last.place + step, 101 if step > 0 else -1, step)]
    return sequence(last.kind, last.group)[last.place + 1 :]


def follow(items: list[Item]) -> list[Item]:
    """All that follows what a person said, to the end of the sequence; the first rhyme after nothing and after an end.

    Days and months go round once their last one was said, and end with it when they come to it themselves.
    """
    if items:
        found = rest(items)
        if not found and items[-1].kind in ("day", "month"):
            found = sequence(items[-1].kind)
        if found:
            return found
    return sequence(FRIENDLY)


def blocks_of(items: list[Item]) -> list[int]:
    """The numbers of the blocks that say these items."""
    return [BLOCKS.index(block) for item in items for block in item.blocks]


def words_of(items: list[Item]) -> list[str]:
    """What a judge should understand, word by word."""
    return [
        word
        for item in items
        for block in ([chr(ord("a") + item.place)] if item.kind == "letter" else item.blocks)
        for word in words(block)
    ]


def words(text: str) -> list[str]:
    """A text as a recogniser writes it: lower case, no punctuation but apostrophes."""
    return "".join(letter if letter.isalpha() or letter == "'" else " " for letter in text.lower()).split()

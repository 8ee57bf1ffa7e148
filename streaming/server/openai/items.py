"""The items of a Realtime conversation: their order, their ids, and what can be retrieved of them."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import msgspec

from streaming.server.openai import realtime_client_events as asked
from streaming.server.openai import realtime_events as events
from streaming.server.openai.realtime_events import EventError, Item, ServerEvent
from streaming.server.openai.realtime_response import new_id

MAX_ITEMS = 256
MAX_ITEM_BYTES = 2**14
"""The most items, and bytes of their content, that `conversation.item.retrieve` knows."""


class Items:
    """Hold the last items of one session."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, Item] = OrderedDict()

    def __contains__(self, item_id: str | None) -> bool:
        return item_id in self._items

    def add(self, item: Item) -> str | None:
        """Add an item behind the others. Return the id of the item before it."""
        previous = next(reversed(self._items), None)
        self._items[item.id] = item
        while len(self._items) > MAX_ITEMS:
            self._items.popitem(last=False)
        return previous

    def replace(self, item: Item) -> str | None:
        """Take this for the item of its id, if there still is one. Return the id of the item before it."""
        if item.id in self._items:
            self._items[item.id] = item
        before = list(itertools.takewhile(lambda item_id: item_id != item.id, self._items))
        return before[-1] if before else None

    def remove(self, item_id: str) -> None:
        """Forget an item that is there."""
        del self._items[item_id]

    def add_speech(self, item_id: str) -> list[ServerEvent]:
        """Add what a client has said, and return how that is told."""
        item = Item(
            id=item_id,
            type="message",
            object="realtime.item",
            status="completed",
            role="user",
            content=[events.Part(type="input_audio")],
        )
        previous = self.add(item)
        return [
            events.Committed(item_id=item_id, previous_item_id=previous),
            events.ItemAdded(item=item, previous_item_id=previous),
            events.ItemDone(item=item, previous_item_id=previous),
        ]

    def create(self, item: Item, wanted_previous: str | None) -> list[ServerEvent]:
        """Add an item of words, and return how that is told. Raises `EventError` where its id is taken.

        wanted_previous: the id of the item that it is to follow, or "root"; the order here stays that of creation.
        """
        if item.id in self._items:
            raise EventError("item_create_duplicate_item_id", "this id is taken")
        previous = self.add(item)
        if len(msgspec.json.encode(item)) > MAX_ITEM_BYTES:
            self._items[item.id] = msgspec.structs.replace(item, content=[], arguments="", output="")
        if wanted_previous in self._items:
            previous = wanted_previous
        if wanted_previous == "root":
            previous = None
        return [
            events.ItemAdded(item=item, previous_item_id=previous),
            events.ItemDone(item=item, previous_item_id=previous),
        ]

    def truncate(self, truncate: asked.ItemTruncate) -> events.ItemTruncated:
        """Return how it is told that an item was truncated. Raises `EventError` for one that cannot be."""
        item = self._items.get(truncate.item_id)
        if item is None:
            raise EventError("item_truncate_invalid_item_id", "there is no such item", "item_id")
        if item.role != "assistant" or truncate.content_index:
            raise EventError("invalid_value", "only the audio of a response can be truncated", "item_id")
        if not truncate.audio_end_ms >= 0:
            raise EventError("invalid_value", "audio_end_ms must be 0 or more", "audio_end_ms")
        end_ms = int(min(truncate.audio_end_ms, 2**31))
        return events.ItemTruncated(item_id=truncate.item_id, content_index=0, audio_end_ms=end_ms)

    def retrieve(self, item_id: str) -> ServerEvent:
        """Return how an item is told to who asks for it. Raises `EventError` where there is none."""
        item = self._items.get(item_id)
        if item is None:
            raise EventError("item_retrieve_invalid_item_id", "there is no such item")
        return events.ItemRetrieved(item=item)


def item_of(given: asked.ItemOption) -> Item:
    """Return the item that a client wants to be there. Raises `EventError` for what none can be."""
    if any(part.get("type") == "input_audio" for part in given.content or ()):
        raise EventError("invalid_value", "audio goes through input_audio_buffer.append", "item.content")
    if given.type == "message" and given.role is None:
        raise EventError("missing_required_parameter", "a message has a role", "item.role")
    words = msgspec.structs.asdict(given) | {"id": (given.id or new_id("item"))[:128]}
    return Item(**words, object="realtime.item", status="completed")

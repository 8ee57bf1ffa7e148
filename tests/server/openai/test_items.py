"""The items of a Realtime conversation: order, ids, bounds."""

from __future__ import annotations

import pytest

from streaming.server.openai.items import MAX_ITEM_BYTES, MAX_ITEMS, Items, item_of
from streaming.server.openai.realtime_client_events import ItemOption, ItemTruncate
from streaming.server.openai.realtime_events import (
    Committed,
    EventError,
    Item,
    ItemAdded,
    ItemDone,
    ItemRetrieved,
    ItemTruncated,
    ServerEvent,
)


def words(item_id: str, text: str = "hello", role: str = "user") -> Item:
    content = [{"type": "input_text", "text": text}]
    return item_of(ItemOption(type="message", id=item_id, role=role, content=content))


def previous(said: list[ServerEvent]) -> str | None:
    """What all of these name as the item before."""
    named = {event.previous_item_id for event in said if isinstance(event, Committed | ItemAdded | ItemDone)}
    assert len(named) == 1
    return named.pop()


def test_every_item_names_the_one_before_it() -> None:
    items = Items()
    assert previous(items.add_speech("a")) is None
    assert previous(items.add_speech("b")) == "a"
    assert previous(items.create(words("c"), None)) == "b"
    assert previous(items.create(words("d"), "a")) == "a"
    assert previous(items.create(words("e"), "root")) is None
    assert previous(items.create(words("f"), "nobody")) == "e"


def test_an_id_is_given_once() -> None:
    items = Items()
    items.create(words("a"), None)
    with pytest.raises(EventError, match="taken"):
        items.create(words("a"), None)


def test_the_oldest_items_are_forgotten() -> None:
    """A session of hours kept every item that it had ever had."""
    items = Items()
    for number in range(MAX_ITEMS + 1):
        items.add(words(str(number)))
    assert "0" not in items
    assert "1" in items
    with pytest.raises(EventError, match="no such item"):
        items.retrieve("0")


def test_of_a_large_item_the_content_is_told_and_not_kept() -> None:
    items = Items()
    large = words("a", "x" * MAX_ITEM_BYTES)
    said = items.create(large, None)
    assert all(event.item == large for event in said if isinstance(event, ItemAdded | ItemDone))
    retrieved = items.retrieve("a")
    assert isinstance(retrieved, ItemRetrieved)
    assert (retrieved.item.id, retrieved.item.content) == ("a", [])


def test_an_item_that_was_removed_stays_removed() -> None:
    """The end of a response brought its deleted item back."""
    items = Items()
    for name in ("a", "b", "c"):
        items.add(words(name))
    assert items.replace(words("b", "new")) == "a"
    items.remove("b")
    assert items.replace(words("b")) == "c"
    assert "b" not in items


def test_only_the_audio_of_a_response_can_be_truncated() -> None:
    items = Items()
    items.add(words("user"))
    items.add(words("spoken", role="assistant"))
    told = items.truncate(ItemTruncate(item_id="spoken", audio_end_ms=1e300))
    assert told == ItemTruncated(item_id="spoken", content_index=0, audio_end_ms=2**31)
    for wrong, code in (
        (ItemTruncate(item_id="nobody", audio_end_ms=0), "item_truncate_invalid_item_id"),
        (ItemTruncate(item_id="user", audio_end_ms=0), "invalid_value"),
        (ItemTruncate(item_id="spoken", audio_end_ms=0, content_index=1), "invalid_value"),
        (ItemTruncate(item_id="spoken", audio_end_ms=-1), "invalid_value"),
        (ItemTruncate(item_id="spoken", audio_end_ms=float("nan")), "invalid_value"),
    ):
        with pytest.raises(EventError) as raised:
            items.truncate(wrong)
        assert raised.value.event_code == code


def test_what_no_item_can_be_is_refused() -> None:
    with pytest.raises(EventError, match=r"input_audio_buffer\.append"):
        item_of(ItemOption(type="message", role="user", content=[{"type": "input_audio", "audio": ""}]))
    with pytest.raises(EventError, match="role"):
        item_of(ItemOption(type="message"))
    assert item_of(ItemOption(type="function_call_output", output="4")).id.startswith("item_")

"""Files that hold what is somebody's own, and large data that no call handles whole."""

from __future__ import annotations

import pytest

from streaming import files
from streaming.files import in_pieces


@pytest.mark.parametrize(("size", "pieces"), [(0, 0), (1, 1), (8, 1), (9, 2), (24, 3)])
def test_data_is_cut_into_pieces_and_other_threads_run_after_each(
    size: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of 55 MB that was copied and encrypted in single calls held the interpreter, and with it everybody's
    next frame, for as long as that took.
    """
    slept: list[float] = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    data = bytes(range(size))
    cut = list(in_pieces(bytearray(data), 8))
    assert b"".join(cut) == data
    assert len(cut) == pieces and all(len(piece) <= 8 for piece in cut)
    assert len(slept) == pieces and all(rest > 0 for rest in slept)

"""Where a text ends that is drawn a few tokens at a time."""
from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.decode.stops import cut, settled

PIECES = ["a", "b ", "ab"]


def spelled(ids):
    return "".join(PIECES[i] for i in ids)


def test_cut_by_hand():
    """The text ends before the first stop string; tokens that only spell the stop string are not in `ids`."""
    assert cut([0, 1, 0, 2], 0, ("b a",), spelled) == ([0], "a")
    assert cut([0, 0, 1, 2], 0, ("b ",), spelled) == ([0, 0], "aa")
    assert cut([2, 1, 0], 1, ("b ",), spelled) == ([2], "ab"[:2])
    assert cut([2, 2], 0, ("ba",), spelled) == ([2], "a"), "a token that is half text and half stop string is kept, its text is cut"
    assert cut([1, 2, 0], 0, ("ab", "b "), spelled) == ([], ""), "the one that stands first ends the text, not the one that is named first"
    assert cut([0, 0], 0, ("b",), spelled) is None and cut([], 0, ("b",), spelled) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=3),
       st.integers(1, 8))
def test_cut_is_as_if_looked_for_after_every_token(ids, stop, stride):
    """Looking every `stride` tokens finds what looking after each token finds."""

    def looking(step):
        for known in range(0, len(ids), step):
            if found := cut(ids[:known + step], known, tuple(stop), spelled):
                return found
        return None

    found = looking(1)
    assert looking(stride) == found
    if found:
        assert not any(s in found[1] for s in stop) and spelled(found[0]).startswith(found[1])
    else:
        assert not any(s in spelled(ids) for s in stop)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"abQ:\n é€🙂".split(" "), b"\xe2", b"\x82", b"\xf0\x9f", b"\xff", "\ufffd"]), max_size=12),
       st.lists(st.sampled_from(["\nQ:", "\n€", "a", "ab", "bé", "🙂"]), max_size=2), st.integers(1, 5))
def test_what_is_settled_stays(parts, stop, stride):
    """Whatever bytes follow, half characters among them, up to a stop string or the end."""
    data = b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")
    shown = [""]
    for end in range(stride, len(data) + stride, stride):
        if found := cut(list(data[:end]), end - stride, tuple(stop), decode):
            shown.append(found[1])
            break
        shown.append(settled(decode(data[:end]), stop))
    else:
        shown.append(decode(data))
    assert all(new.startswith(old) for old, new in zip(shown, shown[1:]))
    assert not any(s in shown[-1] for s in stop)


def test_half_a_stop_string_is_held_back():
    assert settled("So.\nQ", ("\nQ:",)) == settled("So.\n", ("\nQ:",)) == settled("So.\n\ufffd", ("\nQ:",)) == "So."
    assert settled("So.\nWell", ("\nQ:",)) == "So.\nWell" and settled("aaa", ("aab",)) == "a" and settled("So.\nQ", ()) == "So.\nQ"

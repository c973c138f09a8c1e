"""Damage of every kind, for tests that draw it."""

from hypothesis import strategies as st


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes flipped, cut off, inserted, deleted or repeated; or others altogether."""
    content = draw(st.just(whole) if draw(st.integers(0, 9)) else st.binary(max_size=200))
    for kind in draw(
        st.lists(st.sampled_from(["flip", "flip", "cut", "insert", "delete", "repeat"]), max_size=4)
    ):
        last = len(content)
        at = draw(
            st.integers(0, last)
            | st.integers(max(0, last - 400), last)
            | st.integers(0, min(50, last))
        )
        head, tail = content[:at], content[at:]
        if kind == "flip":
            tail = bytes([tail[0] ^ draw(st.integers(1, 255))]) + tail[1:] if tail else tail
        elif kind == "cut":
            tail = b""
        elif kind == "insert":
            head += draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            tail = tail[draw(st.integers(1, 99)) :]
        else:
            head += tail[: draw(st.integers(1, 99))]
        content = head + tail
    return content

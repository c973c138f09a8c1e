"""Rows that stay in place below what else is written on a terminal.

Nothing of the terminal is set, hidden or locked: the cursor stands below the rows, so that after
a kill the shell goes on there. Each drawing asks for the size anew. A terminal that was made
narrower has broken the rows of before into several, which are counted and taken back.
"""

import io
import logging
import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Protocol, TextIO

from tqdm.utils import disp_len, disp_trim

from data_prep.commands import unheard

UP = "\x1b[{}A"
ERASE_BELOW = "\x1b[J"
ERASE_REST_OF_LINE = "\x1b[K"
DRAW_EVERY_S = 0.5
UNKNOWN_SIZE = os.terminal_size((80, 24))  # of terminals that say 0 by 0

# Lines that were written past the rows, to the cursor's place below them, since the last drawing:
# a signal's handler must not wait for a drawing under way.
WRITTEN_BELOW: list[str] = []


Stream = io.TextIOBase | TextIO


def is_terminal(stream: TextIO) -> bool:
    """Whether rows can be drawn there."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def rows_taken(lines: Sequence[str], columns: int) -> int:
    """Rows of a terminal that lines take."""
    return sum(max(1, math.ceil(disp_len(line) / columns)) for line in lines)


class Drawing(Protocol):
    """What a terminal shows; any thread may call it."""

    def rows(self, width: int) -> Sequence[str]:
        """The rows as they are now, for so many columns."""

    def heard(self, line: str) -> None:
        """Take note of a line that was written above the rows."""


class Terminal:
    """Draws rows on a terminal now and then, from a thread, and when a line is written above
    them.
    """

    def __init__(self, stream: TextIO, drawing: Drawing) -> None:
        self._stream = stream
        self._descriptor = stream.fileno()
        self._drawing = drawing
        self._drawn: Sequence[str] = ()
        self._size = UNKNOWN_SIZE
        # One of those that a thread may take twice: a signal's handler may write amid a drawing.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="terminal", daemon=True)
        self._streams: dict[str, TextIO] = {}  # those that stood where ours stand now

    def open(self) -> None:
        """Begin to draw; what Python writes to stdout and stderr goes above from here on."""
        for name in ("stdout", "stderr"):
            stream: TextIO = getattr(sys, name)
            if stream.isatty():
                stream.flush()
                self._streams[name] = stream
                above = LinesAbove(self, stream)
                setattr(sys, name, above)
                lead_logs(stream, above)
        self._thread.start()

    def close(self) -> None:
        """Draw a last time, and leave the rows where they are."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self.draw()
        for name, stream in self._streams.items():
            above = getattr(sys, name)
            setattr(sys, name, stream)
            lead_logs(above, stream)
            with unheard():
                stream.write(above.unfinished)

    def write_above(self, lines: str) -> None:
        """Write whole lines, which stay, above the rows."""
        for line in lines.split("\n"):
            self._drawing.heard(line)
        self.draw(f"{lines}\n")

    def draw(self, above: str = "") -> None:
        """Draw the rows as they are now, below some lines that stay."""
        with self._lock, unheard():
            size = self._ask_for_size()
            taken = list(WRITTEN_BELOW)
            del WRITTEN_BELOW[: len(taken)]
            text = self._back_to_first(taken, size)
            above = "".join(f"{line}\n" for line in taken) + above
            if above or size != self._size:
                text += ERASE_BELOW + above.replace("\n", "\r\n")
            # A row less than there is room for: the cursor stands below. A column less: a
            # terminal may go to the next line at the last one.
            width = size.columns - 1
            rows = [disp_trim(row, width) for row in self._drawing.rows(width)]
            self._drawn = rows[: size.lines - 1]
            self._size = size
            text += "".join(f"{row}{ERASE_REST_OF_LINE}\r\n" for row in self._drawn)
            self._write(text + ERASE_BELOW)

    def _back_to_first(self, below: Sequence[str], size: os.terminal_size) -> str:
        """What leads the cursor to where the first row stands."""
        taken = rows_taken([*self._drawn, *below], size.columns)
        # There is no way back to what has left the screen.
        taken = min(taken, size.lines - 1)
        return "\r" + (UP.format(taken) if taken else "")

    def _ask_for_size(self) -> os.terminal_size:
        try:
            size = os.get_terminal_size(self._descriptor)
        except OSError:  # it is gone
            return self._size
        return size if min(size) > 1 else UNKNOWN_SIZE

    def _write(self, text: str) -> None:
        """All of it, past Python's buffers, in as few pieces as the terminal takes."""
        encoding = self._stream.encoding or "utf-8"
        rest = memoryview(text.encode(encoding, errors="replace"))
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def _keep_drawing(self) -> None:
        while not self._closed.wait(DRAW_EVERY_S):
            self.draw()


def lead_logs(old: Stream, new: Stream) -> None:
    """Have whoever logs to a stream, and took it when it was imported, log to another one."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


class LinesAbove(io.TextIOBase):
    """A stream whose lines go above the rows of a terminal, once they are whole."""

    def __init__(self, terminal: Terminal, stream: TextIO) -> None:
        super().__init__()
        self.terminal = terminal
        self.stream = stream
        self.unfinished = ""

    def write(self, text: str) -> int:
        """Take a piece of text; what ends no line waits for its end."""
        lines, newline, rest = (self.unfinished + text).rpartition("\n")
        self.unfinished = rest
        if newline:
            self.terminal.write_above(lines)
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """What stands behind it is."""
        return True

    def fileno(self) -> int:
        """That of the stream behind it."""
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream behind it."""
        return self.stream.encoding

"""Figures of a run as they are shown: numbers of a fixed width, durations, a line of bars."""

import math
from collections.abc import Sequence

MOST_DECIMALS = 4
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=*#"  # where the terminal's alphabet has no others
# The first steps' losses lie far above all others: they are drawn as full bars, so that the others
# tell of their differences.
SHARE_ON_SCALE = 0.9


def fitted(value: float | None, width: int) -> str:
    """A number with as many decimals as fit, up to four, at the right of so many characters.

    Blanks stand for None. What does not fit at all is wider.
    """
    if value is None:
        return " " * width
    for decimals in range(MOST_DECIMALS, -1, -1):
        text = f"{value:.{decimals}f}"
        if len(text) <= width:
            return text.rjust(width)
    return f"{value:.0e}".rjust(width)


def duration(seconds: float) -> str:
    """Seconds, minutes, hours and minutes, or days and hours: at most six characters."""
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"


def counted(number: int, what: str) -> str:
    """So many of something whose plural ends in s, "1 rank" or "2 ranks"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def percent(share: float | None) -> str:
    """A share as "12.3%", of at most five characters below 10,000 %; of none, nothing."""
    if share is None:
        return ""
    return f"{share:.1%}" if share < 0.9995 else f"{share:.0%}"


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Bars of the values, at most so many; each is the mean of as many neighbours as needed."""
    if not values or width < 1:
        return ""
    per_bar = math.ceil(len(values) / width)
    means = []
    for first in range(0, len(values), per_bar):
        own = values[first : first + per_bar]
        means.append(sum(own) / len(own))
    low = min(means)
    high = sorted(means)[math.ceil(SHARE_ON_SCALE * (len(means) - 1))]
    span = high - low
    highest = len(bars) - 1
    drawn = []
    for mean in means:
        height = (mean - low) / span if span > 0 else 0.0
        drawn.append(bars[min(highest, round(height * highest))])
    return "".join(drawn)


class History:
    """The values of a run in a bounded memory: neighbours are averaged once they are too many."""

    LENGTH = 1024

    def __init__(self) -> None:
        self.values: list[float] = []
        self._steps_each = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Add the value of a step, at the end; what is no number is left out."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) < self._steps_each:
            return
        values = [*self.values, sum(self._pending) / len(self._pending)]
        self._pending = []
        if len(values) == self.LENGTH:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [(first + second) / 2 for first, second in pairs]
            self._steps_each *= 2
        # Another list, since somebody may be drawing the old one.
        self.values = values

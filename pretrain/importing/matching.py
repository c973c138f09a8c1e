"""Finds the tensors of a directory that are our parameters, by names and shapes.

What the table of names does not name, or names with another shape, is refused; nothing is guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.errors import UserError
from pretrain.importing.names import Names, Parts

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Match:
    """The search for parameters of ours among the tensors of a directory."""

    where: str  # the directory
    names: Names
    there: Shapes  # of its tensors, by their names
    wanted: Shapes  # of our parameters, by ours
    may_lack: set[str]  # parameters whose absence is as zeros, or which a config tells

    def find(self) -> dict[str, Parts]:
        """The tensors of each wanted parameter, none for one that is not there.

        Raises UserError, naming what has no counterpart here or there, or has another shape.
        """
        found = {}
        used = set[str]()
        for ours in self.wanted:
            parts = self._parts_of(ours)
            found[ours] = parts
            used.update(parts)
        self._refuse_strangers(used)
        return found

    def _parts_of(self, ours: str) -> Parts:
        candidates = self.names.candidates(ours)
        present = []
        for parts in candidates:
            if self.there.keys() >= set(parts):
                present.append(parts)
        if len(present) > 1:
            told = " and ".join(map(joined, present))
            raise UserError(
                f"{self.where}: {told} are both {ours} by {self.names.origin}; give --names"
            )
        if present:
            self._refuse_another_shape(ours, present[0])
            return present[0]
        if ours in self.may_lack:
            return ()
        tried = " or ".join(map(joined, candidates)) or "no name"
        shape = list(self.wanted[ours])
        raise UserError(
            f"{self.where}: no tensor is {ours}, of shape {shape} ({self.names.origin} has "
            f"{tried}); give --names with the name it has there"
        )

    def _refuse_another_shape(self, ours: str, parts: Parts) -> None:
        wanted = self.wanted[ours]
        rows = 0
        for part in parts:
            shape = self.there[part]
            if len(shape) != len(wanted) or shape[1:] != wanted[1:]:
                self._refuse_shape(ours, part)
            rows += shape[0]
        if rows != wanted[0]:
            self._refuse_shape(ours, parts[-1])

    def _refuse_shape(self, ours: str, part: str) -> None:
        there = list(self.there[part])
        wanted = list(self.wanted[ours])
        raise UserError(
            f"{self.where}: {part} has shape {there}, as {ours} or a part of it, whose shape is "
            f"{wanted}; it can't be imported"
        )

    def _refuse_strangers(self, used: set[str]) -> None:
        strangers = []
        for name in sorted(self.there):
            if name not in used and not name.endswith(self.names.ignored):
                strangers.append(name)
        if not strangers:
            return
        first = strangers[0]
        shape = list(self.there[first])
        more = len(strangers) - 1
        others = f" and {more} more" if more else ""
        raise UserError(
            f"{self.where}: {first}, of shape {shape}{others}: no parameter of this decoder by "
            f"{self.names.origin}; give --names with what it is, or it can't be imported"
        )


def joined(parts: Parts) -> str:
    """Names of tensors that are one parameter, as a file of names has them."""
    return " + ".join(parts)

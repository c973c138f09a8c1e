"""The flags of a command that takes keys of a recipe beside its own, as --dotted.key=value."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from data_prep.commands import MISTYPED, CommandParser
from data_prep.errors import UserError
from pretrain.config.load import dotted_keys
from pretrain.config.recipe import Recipe
from pretrain.config.recipe_names import OURS


class RecipeParser(CommandParser):
    """Refuses what is neither a flag nor a key, but looks like one of them."""

    def __init__(self, *, passed_on: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.passed_on = passed_on  # flags of another command, which gets what this one leaves over

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse has it. Raises UserError for a mistyped flag, and for the name of a key
        without a value.
        """
        flags, others = super().parse_known_args(args, namespace)
        for argument in others:
            self._refuse_mistyped(argument)
        return flags, others

    def _refuse_mistyped(self, argument: str) -> None:
        name, equals, _ = argument.partition("=")
        plain = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or name in self.passed_on or "." in name:
            return
        keys = dotted_keys(Recipe)
        if plain in keys or plain in OURS:  # which is said better where recipes are read
            return
        meant = {flag: flag for flag in (*self.flags(), *self.passed_on)}
        for key in keys:
            last = key.rpartition(".")[2]
            meant.setdefault("--" + last.replace("_", "-"), f"--{key}=value")
        spelt = "--" + plain.replace("_", "-")
        close = difflib.get_close_matches(spelt, meant, n=1, cutoff=MISTYPED)
        if not close:
            return
        suggestion = meant[close[0]]
        if equals and "=" in suggestion:  # a key, of which the recipe's reader knows the section
            return
        raise UserError(f"{name}: unknown; did you mean {suggestion}?")

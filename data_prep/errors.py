"""Bad input: the one exception users meet, and how errors of others become it, or one line.

What a disk or a file server failed at, though the input is good, is a `RetryableError`: one line
too, but exit code 1, after which the same command may do.
"""

import contextlib
import difflib
import errno
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_prep.inputs.urls import without_credentials

if TYPE_CHECKING:
    import pydantic

USER_ERROR_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
# What a disk, a file server or the network to it answers for a while (NFS, Lustre, Ceph, FUSE);
# nobody's input.
PASSING_ERRORS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.EAGAIN,
        errno.EINTR,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # which say by themselves what to do
LONGEST_LINE = 4_000  # characters of an error
# What a terminal obeys instead of showing: C0 (but for tab and line feed), DEL and C1; marks that
# turn the direction of what follows, or end a line; and halves of surrogate pairs, which no stream
# can encode.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

# What pydantic's kinds of errors are called here; in braces, what it knows of the bound.
OWN_WORDS = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of {le} at most",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "literal_error": "{expected}",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "dataclass_type": "keys and values",
    "list_type": "a list",
    "tuple_type": "a list",
}


class UserError(Exception):
    """Input that can't be used.

    The message says what, where, got, expected, and what to do; secrets of URLs are taken out.
    """

    exit_code = USER_ERROR_EXIT_CODE

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(message))


class RetryableError(UserError):
    """What failed though the input is good, a disk, say: the same command may do later."""

    exit_code = FAILURE_EXIT_CODE


def is_passing(error: Exception) -> bool:
    """Whether the operating system refused something for a reason that may pass by itself."""
    return isinstance(error, OSError) and error.errno in PASSING_ERRORS


def refusal(error: Exception, message: str) -> UserError:
    """The UserError for what another error says; a `RetryableError` where that may pass."""
    return RetryableError(message) if is_passing(error) else UserError(message)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, as those of writes and flushes do, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def explained(
    kinds: type[Exception] | tuple[type[Exception], ...], problem: str, advice: str
) -> Iterator[None]:
    """Exceptions of these kinds become a UserError: "problem (what they say); advice"."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise refusal(error, f"{problem} ({what_it_says(error)}); {advice}") from None


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping.

    YAML's own loader takes the last of them, in silence.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        firsts: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            first = firsts.setdefault((key.tag, str(key.value)), key)
            if first is not key:
                problem = f"{key.value!r} is there already; keep one of the two"
                raise ValueError(f"line {key.start_mark.line + 1}: {problem}")
        return node


# What readers of YAML raise: also those of tags, such as `!!bool x`.
YAML_ERRORS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def parse_yaml(content: str | bytes, where: str) -> Any:
    """The content of a YAML file.

    Raises UserError naming `where`, and line and key if one is repeated.
    """
    with explained(YAML_ERRORS, f"{where}: not valid YAML", "mend it"):
        try:
            return yaml.load(content, _UniqueKeysLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.context_mark or error.problem_mark
            if mark and "alias" in f"{error.context} {error.problem}":
                problem = "a value that begins with * is an alias to YAML"
                advice = "put it in quotes, as in path: '*.jsonl'"
                line = f"{where}: line {mark.line + 1}: {problem}; {advice}"
                raise UserError(line) from None
            raise


def parse_json(content: str | bytes, where: str, advice: str) -> Any:
    """The content of a JSON file, of ours or of others.

    Raises UserError naming `where`, whatever is wrong with it. Python's parser raises ValueError
    for text that is no JSON, UnicodeDecodeError (one of its kinds) for bytes that are no UTF-8, and
    RecursionError for brackets nested too deeply.
    """
    with explained((ValueError, RecursionError), f"{where}: not valid JSON", advice):
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")  # json would decode less strictly
        return json.loads(content)


def install_advice(extra: str) -> str:
    """How what an extra of this project brings is installed, from wherever the project came."""
    return f"pip install 'tablefree[{extra}]' (in a checkout: pip install -e '.[{extra}]')"


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt name: `did you mean x?`, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"expected one of {', '.join(names)}"


def first_problem(error: "pydantic.ValidationError", suggest: Callable[[str], str]) -> str:
    """What is wrong with content that pydantic has read, in words.

    An unknown key comes first, with a suggestion: what else is wrong may follow from it.
    """
    unknown = ("extra_forbidden", "unexpected_keyword_argument")  # to a model, to a dataclass
    first: Any = min(error.errors(), key=lambda problem: problem["type"] not in unknown)
    place = ".".join(map(str, first["loc"])) or "content"
    if first["type"] in unknown:
        return f"unknown key {place}; {suggest(place)}"
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error":
        return f"{place}: {first['ctx']['error']}"
    expected = OWN_WORDS.get(first["type"])
    if expected is None:
        return f"{place}: got {first['input']!r}; {first['msg']}"
    bounds = {name: plain_number(bound) for name, bound in first.get("ctx", {}).items()}
    return f"{place}: got {first['input']!r}; expected {expected.format(**bounds)}"


def plain_number(bound: Any) -> Any:
    """A bound as whoever reads it writes it: 1 for 1.0."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def os_error_line(error: UserError | OSError) -> str:
    """The line of a UserError, or what the operating system refused, and where."""
    if not isinstance(error, OSError) or not error.filename:
        return one_line(error)
    line = f"{error.filename}: {error.strerror}"
    if is_passing(error):
        line += "; the disk or its server failed"
    elif error.errno not in FULL:
        line += "; check the path"
    return without_credentials(line)


def exit_code_of(error: UserError | OSError) -> int:
    """The exit code of a command that this error ends."""
    if isinstance(error, UserError):
        return error.exit_code
    return refusal(error, "").exit_code


def what_it_says(error: Exception) -> str:
    """The error's text as one line, of an OSError without the path; its name, if it is silent."""
    strerror: str | None = getattr(error, "strerror", None)
    return strerror or one_line(error) or type(error).__name__


def one_line(error: Exception) -> str:
    """The error's text without line breaks, so that it stays one line of a log; no URL's secrets.

    Of a very long one, which quotes what a damaged file holds, the middle is left out, and that is
    said.
    """
    text = without_credentials(" ".join(str(error).split()))
    if len(text) <= LONGEST_LINE:
        return text
    beginning = text[: LONGEST_LINE * 3 // 4]
    end = text[-LONGEST_LINE // 4 :]
    left_out = len(text) - len(beginning) - len(end)
    return f"{beginning} [... {left_out:,} characters ...] {end}"


def printable(text: str) -> str:
    """Text of documents, file names or others' messages, for a terminal.

    What it would obey is spelled out (`\\u001b`). Tabs and line feeds stay. JSON stays the same
    JSON.
    """
    return CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text)

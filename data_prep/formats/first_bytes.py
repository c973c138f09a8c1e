"""What a file is by its first bytes, where that is not what it is to be read as.

Asked of every file when it is listed, and of what a compressed one holds when it is read. Without
this, a file of another kind would be one bad document of thousands to `on_bad_document: skip`, and
go unnoticed.
"""

import re
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.inputs.sources import InputFile, open_input, reading

FIRST_BYTES = 512  # so many are looked at; a tar archive says what it is at byte 257
NULS_IN_A_ROW = 8  # fewer, here and there, may be meant
NULS_OF_TEXT = 0.01  # of its bytes, at most
UNPACK = "unpack it first"
UTF_8 = "write it as UTF-8 (iconv -t utf-8)"
OBJECT_A_LINE = "write one object on each line (jq -c '.[]' does, of an array; jq -c . of objects)"


@dataclass(frozen=True)
class Kind:
    """A kind of file, and how to tell it."""

    name: str
    pattern: re.Pattern[bytes]  # matched at the first byte
    advice: str
    own_format: str | None = None  # the format of ours that reads it


def _kind(name: str, pattern: bytes, advice: str) -> Kind:
    """A kind of file that no format of ours reads."""
    return Kind(name, re.compile(pattern, re.DOTALL), advice)


def own_kind(name: str, pattern: bytes, own_format: str, advice: str = "") -> Kind:
    """A kind of file that a format of ours reads; no file of another format begins so."""
    pattern_of_it = re.compile(pattern, re.DOTALL)
    return Kind(name, pattern_of_it, advice or f"set format: {own_format}", own_format)


# None of these begins text. From the formats' own definitions; of tar, POSIX.1-1988 ("ustar" at
# byte 257). Those that our formats read are in their rows of `known`.
NULS = _kind(
    "NULs", rb"\0{8}", "a crash or a full disk may leave a file so: fetch or write it again"
)
PACKED_KINDS = (
    _kind(
        "bzip2",
        rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)",
        "unpack it (bunzip2), or compress it with zstd",
    ),
    _kind("xz", rb"\xfd7zXZ\0", "unpack it (unxz), or compress it with zstd"),
    _kind("lz4", rb"\x04\x22\x4d\x18", "unpack it (unlz4), or compress it with zstd"),
    _kind("snappy", rb"\xff\x06\0\0sNaPpY", "unpack it, or compress it with zstd"),
    _kind("compress (.Z)", rb"\x1f\x9d", "unpack it (gunzip reads it), or compress it with zstd"),
    _kind("zip", rb"PK(\x03\x04|\x05\x06)", f"{UNPACK} (unzip)"),
    _kind("7z", rb"7z\xbc\xaf\x27\x1c", UNPACK),
    _kind("RAR", rb"Rar!\x1a\x07", UNPACK),
    _kind("tar", rb".{257}ustar[\0 ]", f"{UNPACK} (tar -xf)"),
)
# All but the NULs: tapes put some before what is compressed.
BINARY_KINDS_BUT_NULS = (
    *PACKED_KINDS,
    _kind("UTF-32", rb"\xff\xfe\0\0|\0\0\xfe\xff", UTF_8),
    _kind("UTF-16", rb"\xff\xfe|\xfe\xff|([^\0]\0){4}|(\0[^\0]){4}", UTF_8),
    _kind("ELF", rb"\x7fELF", "a program or library is no text: leave it out"),
    _kind("pickle", rb"\x80[\x02-\x05][\x8a\x95\]\}(c]", "write its texts as JSON lines"),
    _kind("HDF5", rb"\x89HDF\r\n\x1a\n", "write its texts as JSON lines"),
    _kind("SQLite", rb"SQLite format 3\0", "write its texts as JSON lines"),
    _kind("PDF", rb"%PDF-[12]\.", "take its text out first"),
    _kind("WARC", rb"WARC/[01]\.\d+\r?\n", "take the text of its pages out first"),
    _kind(
        "a git-lfs pointer",
        rb"version https://git-lfs\.github\.com/spec/",
        "fetch what it points to (git lfs pull)",
    ),
)
BINARY_KINDS = (*BINARY_KINDS_BUT_NULS, NULS)
MARKUP_KINDS = (
    _kind(
        "HTML",
        rb"(\xef\xbb\xbf)?\s*(?i:<!doctype\s+html|<html[\s>])",
        "it may be a server's error: fetch it again",
    ),
    _kind("XML", rb"(\xef\xbb\xbf)?\s*<\?xml\s", "it may be a server's error: fetch it again"),
)
# A line of JSON lines may be an array, which is a bad document; an array of objects, or one over
# lines, is a file's.
JSON_KINDS = (
    _kind("a JSON array", rb"(\xef\xbb\xbf)?\s*\[[ \t]*(\{|\r?\n)", OBJECT_A_LINE),
    _kind("JSON over several lines", rb"(\xef\xbb\xbf)?\s*\{[ \t]*\r?\n", OBJECT_A_LINE),
)
JSON = own_kind("JSON", rb"\{", "jsonl")
# Ids may be any bytes: these are too long, or too particular, to come about among them.
KINDS_THAT_ARE_NO_IDS = tuple(
    kind
    for kind in BINARY_KINDS
    if kind.name in ("a git-lfs pointer", "xz", "HDF5", "SQLite", "tar")
)


@dataclass(frozen=True, kw_only=True)
class FirstBytes:
    """What the files of a format don't begin with."""

    format: str
    kinds: tuple[Kind, ...]  # of other files
    kinds_inside: tuple[Kind, ...] = ()  # what a compressed file doesn't hold

    def look_at(self, file: InputFile) -> None:
        """Raises UserError if a file is one of another kind."""
        with reading(file), open_input(file, 0) as stream:
            self.check(file, stream.read(FIRST_BYTES))

    def check(self, file: InputFile, first: bytes) -> None:
        """Raises UserError if a file begins like one of another kind.

        `first` is up to FIRST_BYTES of it.
        """
        found = first_match(self.kinds, first)
        if found:
            raise UserError(
                f"{file.url}: {found.name} by its first bytes, not {self.format}; {found.advice}"
            )

    def check_inside(self, file: InputFile, first: bytes) -> None:
        """The same of what a compressed file holds."""
        found = first_match(self.kinds_inside, first)
        if found:
            advice = f"{UNPACK}: it is packed twice" if found.own_format else found.advice
            raise UserError(
                f"{file.url}: holds {found.name} by its first bytes, not JSON lines; {advice}"
            )


def first_match(kinds: tuple[Kind, ...], first: bytes) -> Kind | None:
    """The first of some kinds that a file's first bytes are of."""
    return next((kind for kind in kinds if kind.pattern.match(first)), None)


def refuse_nuls(file: InputFile, content: bytes) -> None:
    """Raises UserError for a text file with NULs in a row, or with so many as no text has."""
    nuls = content.count(0)
    if nuls < NULS_IN_A_ROW:
        return
    if nuls > NULS_OF_TEXT * len(content) or bytes(NULS_IN_A_ROW) in content:
        problem = (
            f"no text: {nuls:,} of its {len(content):,} bytes are NULs, the first at byte "
            f"{content.find(0):,}"
        )
        raise UserError(f"{file.url}: {problem}; see what it is, fetch it again or leave it out")

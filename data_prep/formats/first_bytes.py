"""What a file is by its first bytes, where that is not what it is to be read as.

Asked of every file when it is listed, and of what a compressed one holds when it is read. Without
this, a file of another kind would be one bad document of thousands to `on_bad_document: skip`, and
go unnoticed.
"""

import re
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.inputs.sources import InputFile

FIRST_BYTES = 512  # so many are looked at; a tar archive says what it is at byte 257
NULS_IN_A_ROW = 8  # fewer, here and there, may be meant
NULS_OF_TEXT = 0.01  # of its bytes, at most
COMPRESSED_FORMATS = ("jsonl.gz", "jsonl.zst")
JSONL_FORMATS = ("jsonl", *COMPRESSED_FORMATS)
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


def _kind(name: str, pattern: bytes, advice: str = "", own_format: str | None = None) -> Kind:
    advice = advice or f"set format: {own_format}"
    return Kind(name, re.compile(pattern, re.DOTALL), advice, own_format)


# None of these begins text. From the formats' own definitions; of tar, POSIX.1-1988 ("ustar" at
# byte 257).
BINARY_KINDS = (
    _kind("parquet", rb"PAR1\x15", own_format="parquet"),
    _kind("arrow", rb"ARROW1\0\0|\xff\xff\xff\xff", own_format="arrow"),
    _kind("gzip", rb"\x1f\x8b", own_format="jsonl.gz"),
    _kind("zstd", rb"\x28\xb5\x2f\xfd", own_format="jsonl.zst"),
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
    _kind("UTF-32", rb"\xff\xfe\0\0|\0\0\xfe\xff", UTF_8),
    _kind("UTF-16", rb"\xff\xfe|\xfe\xff|([^\0]\0){4}|(\0[^\0]){4}", UTF_8),
    _kind("NULs", rb"\0{8}", "a crash or a full disk may leave a file so: fetch or write it again"),
    _kind(
        "NumPy",
        rb"\x93NUMPY",
        "text is no array; ids of a tokenizer are format: uint16",
        own_format="uint16",
    ),
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
TEXT_KINDS = (
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
JSON = _kind("JSON", rb"\{", own_format="jsonl")
# Ids may be any bytes: these are too long, or too particular, to come about among them.
ARRAY_KINDS = tuple(
    kind
    for kind in BINARY_KINDS
    if kind.name in ("a git-lfs pointer", "xz", "HDF5", "SQLite", "tar")
)


def check_first_bytes(file: InputFile, format: str, first: bytes, *, inside: bool = False) -> None:
    """Raises UserError if a file's first bytes are not of the format that it is to be read in.

    `first` is up to FIRST_BYTES of them; `inside`: of what a compressed file holds.
    """
    is_compressed = format in COMPRESSED_FORMATS and not inside
    if is_compressed:
        # tapes put NULs before it
        kinds = (*(kind for kind in BINARY_KINDS if kind.name != "NULs"), JSON, *TEXT_KINDS)
    elif format in JSONL_FORMATS:
        kinds = (*BINARY_KINDS, *TEXT_KINDS, *JSON_KINDS)
    elif format == "txt":
        kinds = BINARY_KINDS  # a page of HTML may well be a text
    elif format == "csv":
        kinds = (*BINARY_KINDS, *TEXT_KINDS)
    else:
        kinds = (*BINARY_KINDS, JSON, *TEXT_KINDS)
    _refuse(file, format, first, kinds, inside)


def check_first_bytes_of_ids(file: InputFile, format: str, first: bytes) -> None:
    """The same of a file of token ids."""
    _refuse(file, format, first, ARRAY_KINDS, inside=False)


def refuse_nuls(file: InputFile, content: bytes) -> None:
    """Raises UserError for a text file with NULs in a row, or with so many as no text has."""
    nuls = content.count(0)
    if nuls >= NULS_IN_A_ROW and (
        nuls > NULS_OF_TEXT * len(content) or bytes(NULS_IN_A_ROW) in content
    ):
        problem = (
            f"no text: {nuls:,} of its {len(content):,} bytes are NULs, the first at byte "
            f"{content.find(0):,}"
        )
        raise UserError(f"{file.url}: {problem}; see what it is, fetch it again or leave it out")


def _refuse(
    file: InputFile, format: str, first: bytes, kinds: tuple[Kind, ...], inside: bool
) -> None:
    for kind in kinds:
        if not kind.pattern.match(first):
            continue
        if inside:
            advice = f"{UNPACK}: it is packed twice" if kind.own_format else kind.advice
            raise UserError(
                f"{file.url}: holds {kind.name} by its first bytes, not JSON lines; {advice}"
            )
        if kind.own_format != format:
            raise UserError(
                f"{file.url}: {kind.name} by its first bytes, not {format}; {kind.advice}"
            )

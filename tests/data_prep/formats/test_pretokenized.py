"""Documents out of Megatron's and uint16 files come back whole, and ids become the very text
they were made of.
"""

import itertools
import json
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.files_of_ids import (
    CODES,
    EOS,
    HUGE,
    input_file,
    llm_c_header,
    read_all,
    write_megatron,
    write_uint16,
)
from tokenizers import Tokenizer, decoders, models

from data_prep.errors import UserError
from data_prep.formats.pretokenized import documents as pretokenized
from data_prep.formats.pretokenized import flat_ids
from data_prep.formats.pretokenized.documents import cut_ids, read_ids
from data_prep.inputs.sources import InputFile
from data_prep.tokenizer.encode import decode_ids, new_encoder
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer

pytest_plugins = ("support.prep_fixtures",)


ID = st.integers(1, 255).filter(lambda id_: id_ != EOS)
DOCUMENTS = st.lists(st.lists(ID, max_size=6), max_size=12)  # empty ones too
# a document is several
SEQUENCES = st.lists(st.lists(st.lists(ID, max_size=4), max_size=3), max_size=12)
reuse_path = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@reuse_path
@given(
    documents=SEQUENCES,
    dtype=st.sampled_from([*CODES]),
    append_eod=st.booleans(),
    unit_bytes=st.integers(1, 60),
    batch_tokens=st.integers(1, 20),
)
def test_megatron_round_trip(
    tmp_path: Path,
    documents: list[list[list[int]]],
    dtype: str,
    append_eod: bool,
    unit_bytes: int,
    batch_tokens: int,
) -> None:
    file = write_megatron(tmp_path / "a_text_document.bin", documents, dtype, append_eod=append_eod)
    expected = [[id_ for sequence in document for id_ in sequence] for document in documents]
    assert read_all(file, "megatron") == expected
    assert read_all(file, "megatron", unit_bytes, batch_tokens) == expected


@reuse_path
@given(
    documents=DOCUMENTS,
    last=st.lists(ID, min_size=1),
    layout=st.sampled_from(["nanogpt", "llm.c", "llm.c header"]),
    unit_bytes=st.integers(2, 30),
    batch_tokens=st.integers(1, 20),
    ends=st.booleans(),
)
def test_uint16_round_trip(
    tmp_path: Path,
    documents: list[list[int]],
    last: list[int],
    layout: str,
    unit_bytes: int,
    batch_tokens: int,
    ends: bool,
) -> None:
    if layout == "nanogpt":
        documents = [[1], *documents]  # an empty first one could be either layout's
        ids = [id_ for document in documents for id_ in [*document, EOS]] + last + [EOS] * ends
    else:
        ids = [id_ for document in [*documents, last] for id_ in [EOS, *document]]
    header = llm_c_header(len(ids)) if layout == "llm.c header" else b""
    file = write_uint16(tmp_path / "train.bin", ids, header)
    with mock.patch.object(flat_ids, "SEARCH_TOKENS", 3):
        assert read_all(file, "uint16", unit_bytes, batch_tokens) == [*documents, last]


def test_ranges_of_units(tmp_path: Path) -> None:
    uint16 = write_uint16(tmp_path / "train.bin", [1, 2, EOS, 3, EOS, 4, 6, 7, 8, EOS, 9])
    assert cut_ids(uint16, "uint16", EOS, 8) == [(0, 5, 10), (5, 10, 10), (10, 11, 2)]
    megatron = write_megatron(tmp_path / "a.bin", [[[1, 2]], [[3]], [], [[4, 6], [7, 8]], [[9]]])
    assert cut_ids(megatron, "megatron", EOS, 6) == [(0, 2, 6), (2, 4, 8), (4, 5, 2)]


@pytest.mark.parametrize(("ids", "first"), [([2**32 + 1, -1], "-1"), ([1, 2**32], "4294967296")])
def test_ids_beyond_every_vocabulary_are_named(tmp_path: Path, ids: list[int], first: str) -> None:
    file = write_megatron(tmp_path / "a.bin", [[ids]], "<i8")
    with pytest.raises(UserError, match=rf"a\.bin: holds {first}, and ids are 0 to 65,535; "):
        read_all(file, "megatron")


def test_only_one_end_is_dropped_and_none_may_be_inside(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "a.bin", [[[1]], [[]], [[2], [EOS]], [[3, EOS, 4]]])
    with pytest.raises(
        UserError, match=r"a\.bin: document 3 \(from 0\) has eos_id 5 inside; was it made with"
    ):
        read_all(file, "megatron")
    file = write_megatron(tmp_path / "a.bin", [[[1]], [[EOS]], [[2, EOS, EOS]]])
    with pytest.raises(UserError, match="document 2 "):
        read_all(file, "megatron", unit_bytes=2)


def test_what_is_refused_of_uint16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.bin"
    for ids in ([], [1, 2, 3]):
        with pytest.raises(
            UserError,
            match=r"train\.bin: eos_id 5 never occurs, so where documents end is not known",
        ):
            read_all(write_uint16(path, ids), "uint16")
    with pytest.raises(UserError, match="1,027 bytes, expected ids of 2; check the format"):
        read_all(write_uint16(path, [1] * 512, b"..."), "uint16")
    with pytest.raises(UserError, match="1,030 bytes, expected a header of 1,024 and 4 ids of 2"):
        read_all(write_uint16(path, [EOS, 1, 2], llm_c_header(4)), "uint16")
    with pytest.raises(UserError, match=r"s3://bucket/a.bin: .* copy it to a local disk"):
        cut_ids(
            InputFile(name="a.bin", url="s3://bucket/a.bin", size=4, version=""),
            "uint16",
            EOS,
            HUGE,
        )
    monkeypatch.setattr(pretokenized, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(
        UserError, match="a document after byte 2 takes over 0 MB; cut it into documents"
    ):
        read_all(write_uint16(path, [EOS, *[1] * 99, EOS, 1]), "uint16", unit_bytes=64)


def test_what_is_refused_of_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, index = tmp_path / "a.bin", tmp_path / "a.idx"
    documents = [[[1, 2], [3]], [[4]]]

    def error(*, at: int = 0, put: bytes = b"", keep: int | None = None) -> str:
        """The complaint about an index that is changed at a byte, or cut."""
        file = write_megatron(path, documents)
        content = bytearray(index.read_bytes())
        content[at : at + len(put)] = put
        index.write_bytes(content[:keep])
        with pytest.raises(UserError) as caught:
            read_all(file, "megatron")
        return str(caught.value)

    assert "a.idx: not an index of Megatron, version 1" in error(put=b"X")
    assert "a.idx: not an index of Megatron, version 1" in error(at=9, put=b"\2")
    assert "a.idx: not an index of Megatron, version 1" in error(keep=0)
    assert "a.idx: ids of type 7, expected 8, 4, 5 or 1" in error(at=17, put=b"\7")
    assert "a.idx: truncated, damaged" in error(keep=-1)
    assert "a.idx: truncated, damaged" in error(keep=30)
    assert "a.idx: truncated, damaged" in error(at=18, put=b"\xff" * 8)
    assert "a.idx: truncated, damaged" in error(at=34, put=b"\1")  # sizes against pointers
    # documents against sequences
    assert "a.idx: truncated, damaged" in error(at=34 + 12 + 24 + 8, put=b"\4")
    assert "a.bin: 8 bytes, its .idx says 10; copy or write both again" in error(
        at=34 + 8, put=b"\2"
    )
    file = write_megatron(path, documents)
    index.unlink()
    for name in (path, write_uint16(tmp_path / "a.ids", []).url):
        with pytest.raises(UserError, match=r"expected a \.bin with its \.idx beside it"):
            read_all(input_file(Path(name)), "megatron")
    monkeypatch.setattr(pretokenized, "MAX_DOCUMENT_BYTES", 100)
    file = write_megatron(path, [[[1]], [[2] * 99], [[3]]])
    with pytest.raises(
        UserError, match=r"a\.bin: a document after byte 0 takes over 0 MB; cut it into documents"
    ):
        read_all(file, "megatron", unit_bytes=64)


@reuse_path
@given(at=st.integers(0, 89), value=st.integers(0, 255))
def test_a_damaged_index_gives_documents_or_the_error(tmp_path: Path, at: int, value: int) -> None:
    file = write_megatron(tmp_path / "a.bin", [[[1, 2], [3]], [], [[4]]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[at] = value
    (tmp_path / "a.idx").write_bytes(index)
    try:
        documents = read_all(file, "megatron", unit_bytes=2)
    except UserError:
        return
    assert [*itertools.chain(*documents)] == [1, 2, 3, 4]  # cut elsewhere at worst


def test_large_files_are_cut_without_reading_them(tmp_path: Path) -> None:
    path, size, document = tmp_path / "train.bin", 4 << 30, 64 << 20
    with path.open("wb") as stream:
        for end in range(document, size + 1, document):
            stream.seek(end - 2)
            stream.write(struct.pack("<H", EOS))
    file = input_file(path)
    tracemalloc.start()
    started = time.perf_counter()
    units = cut_ids(file, "uint16", EOS, 512 << 20)
    assert time.perf_counter() - started < 5
    assert len(units) == 8
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    _, offsets = next(read_ids(file, "uint16", *units[1][:2], EOS))
    assert offsets.tolist() == [0, document // 2 - 1]
    assert tracemalloc.get_traced_memory()[1] < 6 * document
    tracemalloc.stop()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> LoadedTokenizer:
    return load_tokenizer(tokenizer_dir)


def decode(tokenizer: LoadedTokenizer, *documents: Sequence[int]) -> pa.LargeStringArray:
    ids = np.array([*itertools.chain(*documents)], np.uint32)
    offsets = np.cumsum([0, *map(len, documents)])
    return decode_ids(tokenizer, ids, offsets)


@pytest.mark.parametrize("encoder", ["gigatoken", "tokenizers"])
def test_decoding_gives_the_texts_back(
    encoder: str, tokenizer: LoadedTokenizer, texts: list[str]
) -> None:
    documents = pa.array([*texts, "", "end", ""], pa.large_string())
    ids, offsets = new_encoder(tokenizer, prefer=encoder).encode(documents)
    decoded = decode_ids(tokenizer, np.asarray(ids), np.asarray(offsets))
    decoded.validate(full=True)
    assert decoded.equals(documents)
    assert decode(tokenizer, [], []).to_pylist() == ["", ""]


@given(documents=st.lists(st.lists(st.integers(0, 511)), min_size=1, max_size=5))
def test_decoding_any_ids(tokenizer: LoadedTokenizer, documents: list[list[int]]) -> None:
    """The reference's text wherever the bytes are UTF-8, and elsewhere bytes that a check finds."""
    got = [value.as_py() for value in decode(tokenizer, *documents).view(pa.large_binary())]
    reference = tokenizer.reference.decode_batch(documents, skip_special_tokens=False)
    assert [value.decode(errors="replace") for value in got] == reference


def test_a_document_cut_inside_a_character_is_found(tokenizer: LoadedTokenizer) -> None:
    ids = tokenizer.reference.encode("a 日").ids
    with pytest.raises(pa.ArrowInvalid):
        decode(tokenizer, ids[:-1], [1]).validate(full=True)
    assert decode(tokenizer, [*ids, tokenizer.eos_id]).to_pylist() == ["a 日<|endoftext|>"]


def new_tokenizer_dir(directory: Path, tokenizer: Tokenizer, eos_token: str) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return directory


def test_added_tokens_and_ids_without_a_token(tmp_path: Path, tokenizer_dir: Path) -> None:
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    # moved, not removed: an added token's id is read back only where as many tokens come before it
    model["model"]["vocab"] = {
        token: 512 if id_ == 300 else id_ for token, id_ in model["model"]["vocab"].items()
    }
    model["model"]["merges"] = []
    changed = Tokenizer.from_str(json.dumps(model))
    changed.add_tokens(["é Ġ"])
    tokenizer = load_tokenizer(new_tokenizer_dir(tmp_path / "t", changed, "<|endoftext|>"))
    added = changed.token_to_id("é Ġ")
    assert decode(tokenizer, [added, added]).to_pylist() == ["é Ġé Ġ"]
    with pytest.raises(pa.ArrowInvalid):
        decode(tokenizer, [300]).validate(full=True)


def test_other_tokenizers_decode_by_the_reference(tmp_path: Path) -> None:
    vocab = {"<s>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "a": 257, "b": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    loaded = load_tokenizer(new_tokenizer_dir(tmp_path / "t", tokenizer, "<s>"))
    documents = pa.array(["ab", "", "b 日\n"], pa.large_string())
    assert decode_ids(loaded, *new_encoder(loaded, prefer="tokenizers").encode(documents)).equals(
        documents
    )


def test_ids_of_four_bytes_are_no_uint16(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    path.write_bytes(np.arange(1, 100, dtype="<u4").tobytes())
    file = InputFile(name="ids.bin", url=str(path), size=path.stat().st_size, version="")
    with pytest.raises(
        UserError, match=r"ids\.bin: every second id is at most 3, as in ids of 4 or 8 bytes"
    ):
        cut_ids(file, "uint16", 0, 1 << 20)

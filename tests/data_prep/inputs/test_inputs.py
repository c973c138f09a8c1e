"""Inputs from here and from afar: local paths, a web server, S3, and the hub, through the
clients that users have.
"""

import io
import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.registry import _registry as fsspec_registry
from hypothesis import given
from hypothesis import strategies as st
from support.hub_server import COMMIT, DROPPED, HubServer
from support.prep_helpers import write_jsonl, write_parquet
from support.runs import REPOSITORY

from data_prep.errors import UserError
from data_prep.inputs import sources as inputs
from data_prep.inputs.sources import InputFile, find_inputs, open_input

pytest_plugins = ("support.prep_fixtures",)

TEXTS = [f"document {i} " * 40 for i in range(300)]
CARD = """---
configs:
- config_name: books
  data_files:
  - {split: train, path: books/train-*.parquet}
  - {split: test, path: books/test-*.parquet}
- config_name: web
  data_files: web/*.parquet
- config_name: both
  data_files: "*/train-*.parquet"
- config_name: mixed
  data_files: ["web/*.parquet", "more.jsonl.gz"]
---
"""


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "RETRY_WAITS_S", (0.01, 0.02))


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A server of two data sets, one of them gated, and of plain files."""
    root = tmp_path_factory.mktemp("web")
    for folder in ("owner/corpus/books", "owner/corpus/web", "owner/gated", "owner/script"):
        (root / folder).mkdir(parents=True)
    (root / "owner/corpus/README.md").write_text(CARD)
    for name in ("books/train-1", "books/train-0", "books/test-0", "web/train-0"):
        write_wide_parquet(root / f"owner/corpus/{name}.parquet")
    write_jsonl(root / "owner/corpus/more.jsonl.gz", TEXTS)
    write_parquet(root / "owner/gated/train.parquet", TEXTS)
    (root / "owner/script/script.py").write_text("raise SystemExit('this must not run')")
    with HubServer(root) as server:
        server.gated.add("owner/gated")
        yield server


@pytest.fixture
def http(web: HubServer, tmp_path: Path) -> HubServer:
    """The server, new: nothing asked, nothing to fail, 3,000 bytes in a file."""
    web.reset()
    (web.root / "a.bin").write_bytes(bytes(range(250)) * 12)
    return web


def write_wide_parquet(path: Path) -> Path:
    """Text of about 20 kB in each of 6 row groups, before and behind it columns of five times
    that.
    """
    other = [os.urandom(2000) for _ in TEXTS]
    table = pa.table({"before": other, "text": TEXTS, "behind": other})
    pq.write_table(table, path, row_group_size=50, compression="none", use_dictionary=False)
    return path


def text_bytes(path: Path) -> int:
    metadata = pq.read_metadata(path)
    return sum(
        metadata.row_group(i).column(1).total_compressed_size
        for i in range(metadata.num_row_groups)
    )


def read_texts(file: InputFile) -> list[str]:
    return (
        pq.ParquetFile(open_input(file, 0), pre_buffer=True)
        .read(columns=["text"])["text"]
        .to_pylist()
    )


def read_all(file: InputFile) -> bytes:
    with open_input(file) as stream:
        return stream.read()


def the_one(url: str) -> InputFile:
    (file,) = find_inputs(Path("/nowhere"), url, "here")
    return file


def find_error(pattern: str, base: Path = Path("/nowhere")) -> str:
    with pytest.raises(UserError, match=r"^here: ") as caught:
        find_inputs(base, pattern, "here")
    return str(caught.value)


def test_importing_is_cheap() -> None:
    code = (
        "import sys, data_prep.inputs.sources; print({'datasets', 'huggingface_hub', 'torch'} & "
        "sys.modules.keys())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert printed.stdout == "set()\n"


# Local files


def test_globs_are_sorted_and_named_as_written(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)

    def names(pattern: str) -> list[str]:
        return [file.name for file in find_inputs(tmp_path, pattern, "here")]

    assert names("in/b.txt") == ["in/b.txt"]
    assert names("in/*.txt") == ["in/a.txt", "in/b.txt"]
    assert names("in/**/*.txt") == ["in/a.txt", "in/b.txt", "in/deep/c.txt"]
    assert names(str(tmp_path / "in/a*")) == [str(tmp_path / "in/a.txt")]
    assert "no file matches in/*.parquet (looked in" in find_error("in/*.parquet", tmp_path)
    assert "in is a directory; name its files, for example in/*" in find_error("in", tmp_path)
    assert "give each of their names a source of its own" in find_error("in/{a,b}.txt", tmp_path)
    assert "write the home directory's path" in find_error("~/in/a.txt", tmp_path)


def test_a_file_url_is_the_local_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    (file,) = find_inputs(tmp_path, "a.txt", "here")
    assert file == InputFile(
        name="a.txt", url=str(path), size=3, version=str(path.stat().st_mtime_ns)
    )
    by_url = the_one(f"file://{path}")
    assert (by_url.name, by_url.url, by_url.size) == (f"file://{path}", f"file://{path}", 3)
    assert the_one(f"file://{tmp_path}/*.txt") == by_url
    assert read_all(by_url) == b"abc"
    assert "no file matches" in find_error(f"file://{tmp_path}/*.parquet")


# Remote files, whichever the server


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(0, 120)),
        st.tuples(st.just("read"), st.integers(-1, 60)),
        st.tuples(st.just("readline"), st.integers(-1, 60)),
    ),
    max_size=12,
)


@given(
    content=st.binary(max_size=100).map(lambda content: content.replace(b"\1", b"\n")),
    operations=OPERATIONS,
)
@pytest.mark.parametrize("ahead_bytes", [0, 16])
def test_a_remote_file_reads_like_a_local_one(
    ahead_bytes: int, content: bytes, operations: Sequence[tuple[str, int]]
) -> None:
    url = f"memory://{uuid.uuid4()}/a.bin"
    fsspec.filesystem("memory").pipe(url, content)
    local, remote = io.BytesIO(content), open_input(the_one(url), ahead_bytes)
    for name, number in operations:
        if name == "readline" and not ahead_bytes:
            continue  # lines are read from a buffer
        assert getattr(remote, name)(number) == getattr(local, name)(number)
        assert remote.tell() == local.tell()
    assert not content or remote.seek(-1, io.SEEK_END) == len(content) - 1


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(
        UserError,
        match=r"Protocol not known: what\); expected a path, or a URL such as s3://bucket/key",
    ):
        find_inputs(Path(), "what://x", "here")


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/key", "s3fs"), ("https://host/file", "aiohttp")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str
) -> None:
    protocol = url.partition(":")[0]
    monkeypatch.delitem(fsspec_registry, protocol, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        find_inputs(Path(), url, "here")
    message = str(caught.value)
    assert message.startswith(f"{protocol}:// needs a package (")
    assert package in message
    assert message.endswith(
        "; pip install 'tablefree[remote]' (in a checkout: pip install -e '.[remote]'), "
        "or what it says"
    )


# A web server


def test_a_web_server_s_file(http: HubServer) -> None:
    content = (http.root / "a.bin").read_bytes()
    file = the_one(f"{http.url}/a.bin")
    assert (file.name, file.url, file.size) == (f"{http.url}/a.bin", f"{http.url}/a.bin", 3000)
    assert read_all(file) == content
    with open_input(file) as stream:
        assert stream.seek(-10, io.SEEK_END) == 2990
        assert stream.read() == content[-10:]
    assert http.bytes_sent == 3010
    assert the_one(f"{http.url}/a.bin?version=2").name.endswith("a.bin?version=2")
    assert "none?version=2: not found, HTTP status 404" in find_error(f"{http.url}/none?version=2")


def test_reading_on_reads_ahead(http: HubServer) -> None:
    with open_input(the_one(f"{http.url}/a.bin"), 1000) as stream:
        http.reset()
        assert b"".join(iter(lambda: stream.read(70), b"")) == (http.root / "a.bin").read_bytes()
    assert [method for method, _ in http.requests].count("GET") == 3
    assert http.bytes_sent == 3000


def test_a_glob_goes_by_the_server_s_index(http: HubServer) -> None:
    names = [
        file.name
        for file in find_inputs(Path(), f"{http.url}/owner/corpus/books/train-*.parquet", "here")
    ]
    assert names == [f"{http.url}/owner/corpus/books/train-{i}.parquet" for i in (0, 1)]
    assert "no file matches" in find_error(f"{http.url}/owner/corpus/books/*.txt")


@pytest.mark.parametrize("status", [503, 429])
def test_listing_and_reading_are_tried_again(
    http: HubServer, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    http.failures.next["a.bin"] = [status] * 2  # fsspec asks by HEAD, then by GET
    file = the_one(f"{http.url}/a.bin")
    http.failures.next["a.bin"] = [status] * 2
    assert len(read_all(file)) == 3000
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert all(
        note.startswith(f"note: {'here: ' * i}{http.url}/a.bin: ")
        for i, note in zip((1, 0), notes, strict=True)
    )
    assert all(note.endswith("; retrying in 0.01 s") for note in notes)
    assert all(f"HTTP status {status}" in note for note in notes)


def test_the_last_try_fails(http: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    file = the_one(f"{http.url}/a.bin")
    http.failures.always["a.bin"] = 503
    expected = "HTTP status 503 after 3 tries; check the name, your access and the network"
    assert find_error(file.url) == f"here: {file.url}: {expected}"
    with pytest.raises(UserError) as caught:
        read_all(file)
    assert str(caught.value) == f"{file.url}: {expected}"
    waits = [line.rpartition("retrying in ")[2] for line in capsys.readouterr().err.splitlines()]
    assert waits == ["0.01 s", "0.02 s"] * 2


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "not found"), (403, "access refused"), (401, "access refused")]
)
def test_what_stays_wrong_is_tried_once(
    http: HubServer, status: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    http.failures.always["a.bin"] = status
    assert f"{reason}, HTTP status {status}; check the name" in find_error(f"{http.url}/a.bin")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_body_cut_short_is_asked_for_again(
    http: HubServer, cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = the_one(f"{http.url}/a.bin")
    http.failures.cut_bytes["a.bin"] = [cut]
    assert read_all(file) == (http.root / "a.bin").read_bytes()
    assert capsys.readouterr().err.count("retrying in") == 1


def test_a_file_shorter_than_it_was_said_to_be(
    http: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = the_one(f"{http.url}/a.bin")
    monkeypatch.setattr(inputs, "_open_remote", lambda file: io.BytesIO(bytes(2000)))
    with pytest.raises(
        UserError, match=r"a.bin: the answer ended at byte 2000 of 3000 after 3 tries"
    ):
        read_all(file)


@pytest.mark.parametrize("content", [b"x", b"x" * 3000])
def test_a_change_since_the_listing_is_an_error(http: HubServer, content: bytes) -> None:
    file = the_one(f"{http.url}/a.bin")
    (http.root / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.bin: changed since this command began"):
        read_all(file)


def test_a_change_during_an_outage_is_an_error(http: HubServer) -> None:
    with open_input(the_one(f"{http.url}/a.bin"), 0) as stream:
        stream.seek(1000)
        stream.read(10)
        (http.root / "a.bin").write_bytes(b"x" * 3000)
        http.failures.next["a.bin"] = [503]
        stream.seek(2000)
        with pytest.raises(UserError, match=r"a\.bin: changed since this command began"):
            stream.read(10)


def test_a_server_without_ranges(http: HubServer) -> None:
    file = the_one(f"{http.url}/a.bin")
    http.failures.ignore_ranges = True
    with open_input(file) as stream:
        stream.seek(1000)
        with pytest.raises(
            UserError, match=r"support range requests.*; download it and name its path"
        ):
            stream.read(10)


def test_pyarrow_hands_the_error_on(http: HubServer) -> None:
    write_wide_parquet(http.root / "a.parquet")
    file = the_one(f"{http.url}/a.parquet")
    parquet = pq.ParquetFile(open_input(file, 0), pre_buffer=True)
    http.failures.always["a.parquet"] = 503
    with pytest.raises(UserError, match=r"a\.parquet: HTTP status 503 after 3 tries"):
        parquet.read_row_groups([0, 1], columns=["text"])


def test_a_column_costs_a_request_a_row_group(http: HubServer) -> None:
    path = write_wide_parquet(http.root / "a.parquet")
    file = the_one(f"{http.url}/a.parquet")
    http.reset()
    assert read_texts(file) == TEXTS
    assert sum(method == "GET" for method, _ in http.requests) <= 6 + 2
    assert http.bytes_sent < text_bytes(path) + 70_000  # 64 KiB of them the footer's


# S3


def test_objects_of_a_bucket(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wide_parquet(tmp_path / "a.parquet")
    for key in ("in/b.parquet", "in/a.parquet", "in/deep/c.parquet"):
        bucket.pipe(f"corpus/{key}", path.read_bytes())
    files = find_inputs(tmp_path, "s3://corpus/in/*.parquet", "here")
    assert [file.name for file in files] == ["s3://corpus/in/a.parquet", "s3://corpus/in/b.parquet"]
    assert {file.size for file in files} == {path.stat().st_size}
    assert len(find_inputs(tmp_path, "s3://corpus/in/**/*.parquet", "here")) == 3
    assert the_one("s3://corpus/in/a.parquet") == files[0]
    asked: list[int] = []
    request = inputs.RemoteFile._request
    monkeypatch.setattr(
        inputs.RemoteFile,
        "_request",
        lambda self, start, stop: asked.append(stop - start) or request(self, start, stop),
    )
    assert read_texts(files[0]) == TEXTS
    assert len(asked) <= 6 + 2
    assert sum(asked) < text_bytes(path) + 70_000


def test_lines_of_an_object(bucket: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.zst", TEXTS)
    bucket.pipe("corpus/a.jsonl.zst", path.read_bytes())
    (file,) = find_inputs(tmp_path, "s3://corpus/*.zst", "here")
    with open_input(file) as stream:
        lines = zstandard.ZstdDecompressor().stream_reader(stream).read().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS
    elsewhere = fsspec.filesystem("s3", skip_instance_cache=True)
    elsewhere.pipe("corpus/a.jsonl.zst", path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"^s3://corpus/a\.jsonl\.zst: changed since"):
        read_all(file)


def test_unusable_objects(bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.pipe("corpus/in/x.txt", b"x")
    assert "is a directory; name its files, for example s3://corpus/in/*" in find_error(
        "s3://corpus/in"
    )
    assert "no file matches s3://corpus/*.gz; check the URL" in find_error("s3://corpus/*.gz")
    assert "s3://corpus/none: " in find_error("s3://corpus/none")
    assert "s3://nobody/none: " in find_error("s3://nobody/none")
    assert capsys.readouterr().err == ""


# The hub, asked by another process: its clients read HF_ENDPOINT when they are imported


CHILD = """
import contextlib, dataclasses, io, json, sys, time
import pyarrow.parquet as pq
from data_prep.inputs import sources as inputs
from data_prep.errors import UserError
time.sleep = lambda seconds: None

def find(*arguments):
    files, commit = inputs.find_hub_inputs(*arguments, "here")
    return {"files": [dataclasses.asdict(file) for file in files], "commit": commit}

def read(file):
    with inputs.open_input(inputs.InputFile(**file), 0) as stream:
        table = pq.ParquetFile(stream, pre_buffer=True).read(columns=["text"])
        return {"texts": table["text"].to_pylist()}

for line in sys.stdin:
    function, *arguments = json.loads(line)
    notes = io.StringIO()
    with contextlib.redirect_stderr(notes):
        try:
            answer = globals()[function](*arguments)
        except UserError as error:
            answer = {"error": str(error)}
    answer |= {"notes": notes.getvalue(), "torch": "torch" in sys.modules}
    print(json.dumps(answer), flush=True)
"""


class HubUser:
    """A process whose hub is a given server; calls are lists of JSON values, as the answers are."""

    def __init__(self, endpoint: str, home: Path) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING"))
        }
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=REPOSITORY, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> "HubUser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=20)

    def call(self, *call: Any) -> dict[str, Any]:
        """What a function of CHILD answers."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert not answer["torch"]
        return answer

    def find(
        self,
        name: str = "owner/corpus",
        configs: Sequence[str] = ("books",),
        split: str = "train",
        revision: str | None = None,
    ) -> dict[str, Any]:
        """find_hub_inputs."""
        return self.call("find", name, list(configs), split, revision)


@pytest.fixture(scope="module")
def hub_user(web: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubUser]:
    with HubUser(web.url, tmp_path_factory.mktemp("home")) as user:
        yield user


def test_the_files_of_a_split(http: HubServer, hub_user: HubUser) -> None:
    found = hub_user.find(configs=("web", "books"), revision="v1")
    names = ["web/train-0.parquet", "books/train-0.parquet", "books/train-1.parquet"]
    assert [file["name"] for file in found["files"]] == names
    size = (http.root / "owner/corpus/books/train-0.parquet").stat().st_size
    assert found["files"][1] == {
        "name": names[1],
        "url": f"hf://datasets/owner/corpus@{COMMIT}/{names[1]}",
        "size": size,
        "version": COMMIT,
        "secret_url": None,
    }
    assert (found["commit"], found["notes"]) == (COMMIT, "")
    mixed = hub_user.find(configs=("mixed",))["files"]
    assert [file["name"] for file in mixed] == ["web/train-0.parquet", "more.jsonl.gz"]
    assert [file["name"] for file in hub_user.find(split="test")["files"]] == [
        "books/test-0.parquet"
    ]


def test_a_column_of_a_hub_s_file(http: HubServer, hub_user: HubUser) -> None:
    file = hub_user.find()["files"][0]
    http.reset()
    assert hub_user.call("read", file)["texts"] == TEXTS
    assert sum(path == f"/owner/corpus/{file['name']}" for _, path in http.requests) <= 6 + 2
    assert http.bytes_sent < text_bytes(http.root / "owner/corpus" / file["name"]) + 70_000


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (
            {"name": "owner/none"},
            "owner/none: no such data set; check the name, or, if private, run `hf auth login`",
        ),
        ({"name": "a/b/c"}, "a/b/c: no such data set"),
        (
            {"name": "owner/gated", "configs": []},
            "owner/gated: gated: accept its terms, then run `hf auth",
        ),
        (
            {"name": "owner/script", "configs": []},
            "owner/script: datasets can't use it (Dataset scripts are no longer supported",
        ),
        (
            {"configs": ["none"]},
            "BuilderConfig 'none' not found. Available: ['books', 'web', 'both',",
        ),
        (
            {"configs": []},
            "owner/corpus: datasets can't use it (Config name is missing. Please pick one among "
            "the available",
        ),
        ({"configs": ["books", "both"]}, "owner/corpus: the configs books, both share files"),
        ({"split": "none"}, "owner/corpus: no split 'none', it has: train, test"),
        (
            {"revision": "none"},
            "owner/corpus: no revision 'none'; name a branch, a tag or a commit",
        ),
    ],
)
def test_what_the_hub_does_not_have(
    http: HubServer, hub_user: HubUser, question: dict[str, Any], expected: str
) -> None:
    answer = hub_user.find(**question)
    assert expected in answer["error"]
    assert answer["error"].startswith("here: ")
    assert answer["notes"] == ""


@pytest.mark.parametrize("status", [503, DROPPED])
def test_a_hub_that_hiccups(http: HubServer, hub_user: HubUser, status: int) -> None:
    http.failures.next = {"corpus": [status], "README.md": [status]}
    found = hub_user.find(configs=("web",))
    assert found["files"]
    assert found["notes"].startswith("note: here: owner/corpus: ")
    assert found["notes"].endswith("; retrying in 1 s\n")
    http.failures.next = {"train-0.parquet": [status] * 8}  # the client itself tries 6 times
    http.failures.cut_bytes = {"train-0.parquet": [10]}
    assert hub_user.call("read", found["files"][0])["texts"] == TEXTS


def test_a_hub_that_stays_away(http: HubServer, hub_user: HubUser, tmp_path: Path) -> None:
    file = hub_user.find()["files"][0]
    http.failures.always = {"corpus": 503, "train-0.parquet": 503}
    expected = "HTTP status 503 after 6 tries; check the name, your access and the network"
    answer = hub_user.find()
    assert answer["error"] == f"here: owner/corpus: {expected}"
    assert [line.rpartition(" in ")[2] for line in answer["notes"].splitlines()] == [
        "1 s",
        "2 s",
        "4 s",
        "8 s",
        "16 s",
    ]
    assert hub_user.call("read", file)["error"] == f"books/train-0.parquet: {expected}"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with HubUser(endpoint, tmp_path) as user:
        assert user.find()["error"].startswith(
            "here: owner/corpus: [Errno 111] Connection refused after 6 tries"
        )

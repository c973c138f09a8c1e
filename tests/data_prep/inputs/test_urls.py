"""Secrets in URLs: out of every name, with what names the source kept; data sets built with them
hold none.
"""

import base64
import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.prep_helpers import (
    build,
    build_error,
    flip_byte,
    source,
    speeches,
    write_jsonl,
    write_mixture,
    write_parquet,
)

from data_prep import show, verify
from data_prep.commands import exit_code
from data_prep.errors import UserError
from data_prep.inputs import sources as inputs
from data_prep.inputs.urls import without_credentials
from data_prep.manifest import load_manifest

pytest_plugins = ("support.prep_fixtures",)

SECRET = "s3cr3t-Hunter2"
NAMES_OF_SECRETS = (
    "rlkey", "apitoken", "resourcekey", "usertoken", "appsecret", "sharekey", "skey", "code",
    "accesskeyid", "ToKeN", "%74oken", "%2574oken", "user_pwd", "authcode", "X-Credential",
    "verify", "md5", "key", "HMAC",
)  # fmt: skip
MARKS_IN_PASSWORDS = ("'", '"', "<", " ", "> ", "' '")

CLEANED = {
    f"https://user:{SECRET}@host/a.jsonl": "https://host/a.jsonl",
    f"https://user:p@{SECRET}@host:8080/a@b?x=1": "https://host:8080/a@b?x=1",
    f"https://user:p/{SECRET}@host/a": "https://host/a",
    f"https://user:p?{SECRET}@host/a": "https://host/a",
    f"https://{SECRET}@host/a": "https://host/a",
    f"https://user:{SECRET}@[::1]:80/a": "https://[::1]:80/a",
    f"s3://id:{SECRET}@bucket/a/*.parquet": "s3://bucket/a/*.parquet",
    f"sftp://reader:{SECRET}@host/a": "sftp://reader@host/a",
    f"abfs://container:{SECRET}@account.dfs.core.windows.net/a": "abfs://account.dfs.core.windows.net/a",
    f"https://host/a?sv=2022-11-02&st=1&se=2&sr=b&sp=r&sig={SECRET}%3D&part=7": "https://host/a?part=7",
    f"https://host/a?X-Amz-Algorithm=A&X-Amz-Credential=C&X-Amz-Signature={SECRET}&versionId=3": "https://host/a?versionId=3",
    f"https://host/a?AWSAccessKeyId=I&Signature={SECRET}&Expires=9": "https://host/a",
    f"https://host/a?GoogleAccessId=I&Signature={SECRET}&Expires=9": "https://host/a",
    f"https://host/a?x-goog-signature={SECRET}&generation=5": "https://host/a?generation=5",
    f"https://host/a?Policy={SECRET}&Signature={SECRET}&Key-Pair-Id={SECRET}": "https://host/a",
    f"https://host/a?alt=media&token={SECRET}": "https://host/a?alt=media",
    f"https://host/a?api_key={SECRET}&lang=en": "https://host/a?lang=en",
    f"https://host/a?apiKey={SECRET};": "https://host/a;",
    f"https://host/a?access%5Ftoken={SECRET}": "https://host/a",
    f"https://host/a#access_token={SECRET}&page=2": "https://host/a#page=2",
    f"zip://a.csv::https://u:{SECRET}@host/x.zip?token={SECRET}": "zip://a.csv::https://host/x.zip",
    **{
        f"https://host/a?id=7&{name}={SECRET}&version=2": "https://host/a?id=7&version=2"
        for name in NAMES_OF_SECRETS
    },
    **{
        f"https://user:pa{mark}{SECRET}@host/a?id=7": "https://host/a?id=7"
        for mark in MARKS_IN_PASSWORDS
    },
    f"https://user%3A{SECRET}%40host/a": "https://host/a",
    f"https://user%253A{SECRET}%2540host/a": "https://host/a",
    f"https://host/a?token=it's{SECRET}&id=7": "https://host/a?id=7",
    f"https://host/a?hdnts=exp=9~acl=/*~hmac={SECRET}&id=7": "https://host/a?id=7",
    f"https://host/a?id=7~st=1~exp=9~hmac={SECRET}": "https://host/a?id=7",
    f"https://host/a;token={SECRET}/b;v=1": "https://host/a/b;v=1",
    f"https://host/a?a=1;sig={SECRET}": "https://host/a?a=1",
    f"https://host/a?token=x;{SECRET}&id=7": "https://host/a?id=7",
    f"https://host/a?token=x;{SECRET}==": "https://host/a",
    f"https://host/a?next=%2Fb%3Ftoken%3D{SECRET}%26id%3D7": "https://host/a?next=%2Fb%3Fid%3D7",
    f"https://host/a?url=https://u:{SECRET}@b/c?token={SECRET}": "https://host/a?url=https://b/c",
    f"https://host/https://u:{SECRET}@b/c": "https://host/https://b/c",
    f"https://host/https%3A%2F%2Fu%3A{SECRET}%40b%2Fc/d": "https://host/https%3A%2F%2Fb%2Fc/d",
}
CLEANED |= {
    (
        f"can't read https://u:{SECRET}@host/a?sig={SECRET}: no; "
        f"try 'https://host/b?token={SECRET}'."
    ): ("can't read https://host/a: no; try 'https://host/b'."),
    f"can't read https://user:p {SECRET}@host/a: no; 'https://host:80' and me@home": (
        "can't read https://host/a: no; 'https://host:80' and me@home"
    ),
    f"https://host/a?url=https%3A%2F%2Fu%3A{SECRET}%40b%2Fc%3Ftoken%3D{SECRET}%26id%3D7&id=8": (
        "https://host/a?url=https%3A%2F%2Fb%2Fc%3Fid%3D7&id=8"
    ),
    f"https://host/a?url=https%253A%252F%252Fb%252Fc%253Ftoken%253D{SECRET}": (
        "https://host/a?url=https%3A%2F%2Fb%2Fc"
    ),
}
KEPT = (
    "hf://datasets/owner/name@0ae6ec63/data/*.parquet",
    "abfs://container@account.dfs.core.windows.net/a",
    "https://host/a?download=true&version=2",
    "https://host/a?author=Tolstoy&tokenizer=gpt2&keyword=war",
    "https://host:80/a@b",
    "https://[::1]:80/a@b",
    "s3://bucket/key=1/year=2024/*.parquet",
    "memory://a/b?c=d",
    "https://host/a?id=3&file=a.txt&path=%2Fdata%2Fa&revision=main&response-content-disposition=attachment%3B%20f%3Da",
    "https://host/a?language_code=en&key=data%2Fa.jsonl&design=2&passage=4&signal=5&credits=6&authors=7&lang=x;y",
    "https://host/a;v=1/b%20c;w=2?url=https%3A%2F%2Fb%2Fc%3Fid%3D7",
    "https://host: refused; ask me@home",
    "'https://host/a', \"https://host:80\", <https://host/b>: ask me@home",
    "https://host/a?q=~me;b&r=%3D%3D#token-auth",
    "https://host/a?se=1&st=2",
    "sftp://reader@host/a",
    "relative/path?token=1",
    "user:password@host",
    "",
    "a://",
)


@pytest.mark.parametrize("text", CLEANED)
def test_secrets_go(text: str) -> None:
    assert without_credentials(text) == CLEANED[text]
    assert without_credentials(CLEANED[text]) == CLEANED[text]


@pytest.mark.parametrize("text", KEPT)
def test_what_names_a_source_stays(text: str) -> None:
    assert without_credentials(text) == text


def test_urls_in_urls_without_end_hold_no_secret() -> None:
    for separator in ("?url=", "/", "?a="):
        text = f"https://host{separator}" * 2000 + f"https://u:{SECRET}@b/?token={SECRET}"
        assert SECRET not in without_credentials(text)


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Files for those who know the secret, as a password or as a signature; with ranges."""

    def respond(self) -> bytes | None:
        address = urlsplit(self.path)
        by_password = (
            self.headers.get("Authorization", "")
            == "Basic " + base64.b64encode(f"reader:{SECRET}".encode()).decode()
        )
        by_signature = parse_qs(address.query).get("sig") == [SECRET]
        path = Path(self.directory, address.path.lstrip("/"))
        status = 200 if by_password or by_signature else 403
        if status == 200 and not path.is_file():
            status = 404
        content = path.read_bytes() if status == 200 else b""
        whole = len(content)
        if status == 200 and (span := self.headers.get("Range")):
            first, last = span.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last or whole) + 1], 206
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        if status == 206:
            self.send_header(
                "Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
            )
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.wfile.write(self.respond() or b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Folder and address of a server of guarded files."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(Guarded, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield tmp_path / "web", f"127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


def everything_in(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_a_data_set_of_guarded_files_holds_no_secret(
    tmp_path: Path,
    guarded: tuple[Path, str],
    tokenizer_dir: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By password and by signature: built, shown, traced, resumed, repaired; nowhere a trace of
    the secret.
    """
    web, address = guarded
    write_jsonl(web / "a.jsonl", [*speeches(20), ""])
    with (web / "a.jsonl").open("a") as file:
        file.write("nonsense\n")
    write_parquet(web / "b.parquet", speeches(12))
    by_password = f"http://reader:{SECRET}@{address}/a.jsonl"
    by_signature = f"http://{address}/b.parquet?part=1&sig={SECRET}"
    sources = [source("password", by_password, format="jsonl"), source("signature", by_signature)]
    mixture = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1
    )
    out = tmp_path / "out"
    manifest = build(mixture, out)
    assert [entry.origin for entry in manifest.sources] == [
        f"http://{address}/a.jsonl",
        f"http://{address}/b.parquet?part=1",
    ]
    assert {shard.inputs for shard in manifest.shards} == {
        (entry.origin,) for entry in manifest.sources
    }
    assert manifest.bad_documents[0].input == f"http://{address}/a.jsonl"
    show.main([str(out), "--samples", "3"])
    show.main([str(out), "--trace", f"{manifest.shards[0].path}:0"])
    flip_byte(out / manifest.shards[0].path)
    verify.main([str(out), "--repair"])
    (out / "manifest.json").unlink()
    assert build(mixture, out) == manifest
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert SECRET.encode() not in everything_in(out)


def test_a_new_password_is_the_same_source(
    tmp_path: Path,
    guarded: tuple[Path, str],
    tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    web, address = guarded
    write_jsonl(web / "a.jsonl", speeches(20))
    for query in ("sig", "se=9&sig"):
        path = f"http://{address}/a.jsonl?{query}={SECRET}"
        mixture = write_mixture(tmp_path, tokenizer_dir, [source("web", path, format="jsonl")])
        build(mixture, tmp_path / "out")
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", ["refused", "missing", "no server", "a directory", "unknown protocol", "bad line"]
)
def test_errors_hold_no_secret(
    tmp_path: Path,
    guarded: tuple[Path, str],
    tokenizer_dir: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inputs, "RETRY_WAITS_S", (0.01,))
    web, address = guarded
    (web / "bad.jsonl").write_text('{"text": "x"}\nnonsense\n' * 20)
    path = {
        "refused": f"http://somebody:{SECRET}@{address}/a.jsonl",
        "missing": f"http://{address}/none.jsonl?sig={SECRET}",
        "no server": f"http://reader:{SECRET}@127.0.0.1:1/a.jsonl?token={SECRET}",
        "a directory": f"http://{address}/?sig={SECRET}",
        "unknown protocol": f"what://reader:{SECRET}@host/a.jsonl",
        "bad line": f"http://{address}/bad.jsonl?sig={SECRET}",
    }[kind]
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("web", path, format="jsonl")])
    message = build_error(mixture, tmp_path / "out")
    said = capsys.readouterr()
    assert SECRET not in message + said.out + said.err
    assert SECRET.encode() not in everything_in(tmp_path / "out")
    place = {"no server": "127.0.0.1:1", "unknown protocol": "what"}.get(kind, address)
    assert place in message


def test_whatever_error_ends_a_command_is_printed_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"https://user:{SECRET}@host/a?sig={SECRET}"
    for error in (
        UserError(f"{url}: no"),
        OSError(f"no route to {url}"),
        FileNotFoundError(2, "No such file", url),
    ):

        def main(error: Exception = error) -> None:
            raise error

        assert exit_code(main) == 2
        line = capsys.readouterr().err
        assert SECRET not in line
        assert "https://host/a" in line


def test_data_sets_of_before_are_shown_without(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They keep their manifest, and with it their fingerprint."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    content = json.loads((copy / "manifest.json").read_text())
    for shard in content["shards"]:
        shard["inputs"] = [
            f"https://user:{SECRET}@host/{name}?sig={SECRET}" for name in shard["inputs"]
        ]
    bytes_before = (
        json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    ).encode()
    (copy / "manifest.json").write_bytes(bytes_before)
    shard = load_manifest(copy).shards[0]
    assert load_manifest(copy).to_bytes() == bytes_before
    show.main([str(copy), "--trace", f"{shard.path}:0"])
    show.main([str(copy)])
    said = capsys.readouterr().out
    assert SECRET not in said
    assert "https://host/speeches.parquet, row" in said
    assert shard.origin(0)[0].startswith("https://host/")

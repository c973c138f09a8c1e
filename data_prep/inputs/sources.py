"""Which files a source names, and how their bytes are read.

It names a path, a URL (which fsspec reads) or a data set of the Hugging Face hub.

A network may fail for half a minute: each failed request is announced and made again. What can't
succeed later (not found, access refused, changed since it was listed) fails at once.
"""

import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec.core
import fsspec.spec

from data_prep.errors import UserError, explained, install_advice, one_line, printable
from data_prep.inputs.local_files import (
    escaped,
    is_utf8,
    matching_files,
    warn_of_gaps,
    warn_of_one_file_twice,
)
from data_prep.inputs.urls import without_credentials

T = TypeVar("T")
Info = dict[str, Any]  # what fsspec tells of a file
URL = re.compile(r"[\w.+:-]+://")
INSTALL_REMOTE = f"{install_advice('remote')}, or what it says"
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
REQUEST_BYTES = 16 << 20  # so far sequential reading reads ahead
VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified", "LastModified", "mtime")
MEANINGS = {401: "access refused, ", 403: "access refused, ", 404: "not found, "}  # of HTTP
PASSING = (408, 429)  # HTTP: too slow, too many requests
# They raise more than OSErrors.
CLIENTS = ("aiohttp", "aiobotocore", "botocore", "httpx", "httpx2", "gcsfs", "azure")
PERMANENT = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "OfflineModeIsEnabled",
)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a source, as it was when it was listed."""

    # As the manifest names it: the path as written, the URL, or the path inside the hub data set.
    name: str
    url: str  # absolute local path, or URL; like the name without secrets
    size: int  # bytes
    # Another one when the content may be another: mtime_ns, etag, commit of the hub data set.
    version: str
    # To read by, if the URL held secrets; never stored.
    secret_url: str | None = field(default=None, repr=False)


def find_inputs(base: Path, pattern: str, where: str) -> list[InputFile]:
    """The files that a path (relative to `base`), glob or URL names, sorted by name.

    Raises UserError if there are none.
    """
    if URL.match(pattern):
        return _find_remote(pattern, where)
    return _find_local(base, pattern, where)


def find_hub_inputs(
    name: str, configs: Sequence[str], split: str, revision: str | None, where: str
) -> tuple[list[InputFile], str]:
    """The files of a hub data set's split, and their commit (40 hex digits).

    Their order is that of `datasets`.
    """
    what = f"{where}: {name}"
    repository, commit = _with_retries(what, _resolve, name, revision, what)
    root = f"hf://datasets/{repository}@{commit}/"
    sizes: dict[str, int] = {}
    for config in configs or (None,):
        found = _with_retries(what, _data_files, repository, config, commit, split, what)
        if sizes.keys() & found:
            raise UserError(
                f"{what}: the configs {', '.join(configs)} share files; name configs that don't"
            )
        sizes |= found
    files = []
    for url, size in sizes.items():
        file = InputFile(name=url.removeprefix(root), url=url, size=size, version=commit)
        files.append(file)
    return files, commit


def open_input(file: InputFile, ahead_bytes: int = REQUEST_BYTES) -> BinaryIO:
    """The file's bytes, seekable; what goes wrong while reading a remote one is a UserError.

    A remote one's come in requests of ahead_bytes and more; 0: of just what is asked for.
    """
    if "://" not in file.url:
        return Path(file.url).open("rb")
    remote = RemoteFile(file)
    if not ahead_bytes:
        return cast(BinaryIO, remote)
    return io.BufferedReader(cast(io.RawIOBase, remote), ahead_bytes)


def reading(file: InputFile) -> AbstractContextManager[None]:
    """What the operating system refuses meanwhile is a UserError."""
    return explained(OSError, f"{file.url}: can't be read", "check the file")


class RemoteFile(fsspec.spec.AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """Requests just the bytes that are asked for."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(None, file.url, cache_type="none", size=file.size)
        self._file = file
        self._handle: Any = None

    def _fetch_range(self, start: int, stop: int) -> bytes:
        last = min(stop, self.size)
        return _with_retries(self._file.name, self._request, start, last)

    def _request(self, start: int, stop: int) -> bytes:
        handle = self._handle or _open_remote(self._file)
        self._handle = None  # until it is seen to work: after a failure the file is opened anew
        handle.seek(start)
        with explained(
            ValueError,
            f"{self._file.name}: no part can be had alone",
            "download it and name its path",
        ):
            content = cast(bytes, handle.read(stop - start))
        if len(content) != stop - start:
            raise ConnectionError(
                f"the answer ended at byte {start + len(content)} of {self._file.size}"
            )
        self._handle = handle
        return content


def _find_local(base: Path, pattern: str, where: str) -> list[InputFile]:
    if (base / pattern).is_dir():
        raise UserError(
            f"{where}: {pattern} is a directory; name its files, for example "
            f"{pattern.rstrip('/')}/*"
        )
    paths = matching_files(base, pattern, where)
    if not paths:
        advice = "check the path"
        if "{" in pattern:
            advice = (
                "braces are the shell's, and not expanded here: give each of their names a source "
                "of its own"
            )
        if pattern.startswith("~"):
            advice = "~ is the shell's, and not expanded here: write the home directory's path"
        raise UserError(
            f"{where}: no file matches {pattern} (looked in {base.resolve()}); {advice}"
        )
    if list(paths) != [pattern]:
        warn_of_gaps(paths, where)
    warn_of_one_file_twice(paths, where)
    files = []
    for name, path in paths.items():
        about = path.stat()
        version = str(about.st_mtime_ns)
        files.append(InputFile(name=name, url=str(path), size=about.st_size, version=version))
    return files


def _find_remote(url: str, where: str) -> list[InputFile]:
    fs, path = _filesystem(url)
    is_glob = _is_glob(url, path)
    infos = _with_retries(f"{where}: {url}", _list_files, fs, path, is_glob)
    if not is_glob and infos[0]["type"] == "directory":
        raise UserError(
            f"{where}: {url} is a directory; name its files, for example {url.rstrip('/')}/*"
        )
    found: dict[str, Info] = {}  # by URL
    for info in infos:
        if info["type"] == "file":
            found[fs.unstrip_protocol(info["name"])] = info
    if not found:
        raise UserError(f"{where}: no file matches {url}; check the URL")
    for name, info in found.items():
        if info["size"] is None:
            raise UserError(
                f"{where}: {name}: the server doesn't tell its size; download it and name its path"
            )
    if is_glob:
        warn_of_gaps([without_credentials(name) for name in found], where)
    for name in found:
        if not is_utf8(name):
            raise UserError(f"{where}: {escaped(name)}: its name is not UTF-8; rename it")
    files = []
    for name, info in found.items():
        # By the URL as it was written, where that names it: it may hold a password.
        address = name if is_glob else url
        files.append(_remote_file(fs, info, name, address))
    return files


def _is_glob(url: str, path: str) -> bool:
    """Whether a URL, with this path in its file system, may name several files."""
    shown = without_credentials(path)  # a password may hold any sign
    if "*" in shown or "[" in shown:
        return True
    is_http = url.startswith("http")  # there, ? begins the query
    return "?" in shown and not is_http


def _list_files(fs: Any, path: str, is_glob: bool) -> list[Info]:
    """What the server tells of the files, sorted by name."""
    listed = fs.glob(path, detail=True).values() if is_glob else [fs.info(path)]
    infos = []
    for info in listed:
        if info["size"] is None:  # some say it only if they are asked of one file
            info = fs.info(info["name"])
        infos.append(info)
    return sorted(infos, key=lambda info: str(info["name"]))


def _remote_file(fs: Any, info: Info, name: str, address: str) -> InputFile:
    """A file as the server lists it, to be read by an address that may hold a secret."""
    clean = without_credentials(name)
    is_secret = without_credentials(address) != address
    return InputFile(
        name=clean,
        url=clean,
        size=info["size"],
        version=_version(fs, info),
        secret_url=address if is_secret else None,
    )


def _open_remote(file: InputFile) -> Any:
    """The file as fsspec opens it, without a buffer.

    Raises UserError if it isn't the one that was listed.
    """
    fs, path = _filesystem(file.secret_url or file.url)
    if f"@{file.version}/" not in file.url:  # a commit of the hub never changes
        fs.invalidate_cache()
        info = fs.info(path)
        is_same = info["size"] == file.size and _version(fs, info) == file.version
        if not is_same:
            raise UserError(
                f"{file.name}: changed since this command began; begin again, and leave it alone"
            )
    return fs.open(path, "rb", cache_type="none", size=file.size)


def _version(fs: Any, info: Info) -> str:
    """What is another one when the file's content may be: as the server tells, or fsspec."""
    for key in VERSION_KEYS:
        if info.get(key):
            return str(info[key])
    return str(fs.ukey(without_credentials(info["name"])))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    protocol = url.partition(":")[0]
    options = {}
    if protocol in ("http", "https"):  # compressed on the way, no part could be had alone
        options["headers"] = {"Accept-Encoding": "identity"}
    with (
        explained(ImportError, f"{protocol}:// needs a package", INSTALL_REMOTE),
        explained(ValueError, url, "expected a path, or a URL such as s3://bucket/key"),
    ):
        fs, path = fsspec.core.url_to_fs(url, **options)
    return fs, path


def _resolve(name: str, revision: str | None, what: str) -> tuple[str, str]:
    """A hub data set's name as the hub spells it, and the commit that a revision is now."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().dataset_info(name, revision=revision)
        if info.gated:
            HfApi().auth_check(info.id, repo_type="dataset")
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{what}: no revision {revision!r}; name a branch, a tag or a commit"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        hint = "no such data set; check the name, or, if private,"
        if isinstance(error, errors.GatedRepoError):
            hint = "gated: accept its terms, then"
        raise UserError(f"{what}: {hint} run `hf auth login` or set HF_TOKEN") from None
    return info.id, str(info.sha)


def _data_files(
    repository: str, config: str | None, commit: str, split: str, what: str
) -> dict[str, int]:
    """URL and size of a split's files as `datasets` finds them; it runs no code of the data set."""
    import datasets

    datasets.disable_progress_bars()
    path = f"hf://datasets/{repository}"
    with (
        explained(
            (ValueError, RuntimeError), f"{what}: datasets can't use it", "see its page on the hub"
        ),
        # Where the hub is silent, a cached copy is no answer.
        tempfile.TemporaryDirectory() as empty,
    ):
        builder = datasets.load_dataset_builder(path, config, revision=commit, cache_dir=empty)
    splits = builder.config.data_files or {}
    urls = splits.get(split)
    if not urls:
        known = ", ".join(map(str, splits))
        raise UserError(f"{what}: no split {split!r}, it has: {known}")
    for url in urls:
        if not url.startswith(f"{path}@{commit}/"):
            raise UserError(
                f"{what}: {url} lies outside of it; name that file by its URL, as a path"
            )
    fs, _ = _filesystem(path)
    return {url: fs.info(url)["size"] for url in urls}


def _with_retries(what: str, action: Callable[..., T], *arguments: Any) -> T:
    """The action's result; network errors lead to further tries, and at last to a UserError."""
    waits_s = iter(RETRY_WAITS_S)
    while True:
        try:
            return action(*arguments)
        except Exception as error:
            package = type(error).__module__.partition(".")[0]
            if not isinstance(error, OSError) and package not in CLIENTS:
                raise
            reason, is_permanent = _reason(error)
        advice = "check the name, your access and the network"
        if is_permanent:
            raise UserError(f"{what}: {reason}; {advice}")
        wait_s = next(waits_s, None)
        if wait_s is None:
            tries = len(RETRY_WAITS_S) + 1
            raise UserError(f"{what}: {reason} after {tries} tries; {advice}")
        note = without_credentials(f"note: {what}: {reason}; retrying in {wait_s:g} s")
        print(printable(note), file=sys.stderr, flush=True)
        time.sleep(wait_s)


def _reason(error: Any) -> tuple[str, bool]:
    """What was wrong at bottom, and whether it will be next time."""
    while True:
        status = _http_status(error)
        if status:
            meaning = MEANINGS.get(status, "")
            is_permanent = 300 <= status < 500 and status not in PASSING
            return f"{meaning}HTTP status {status}", is_permanent
        if not error.__cause__:
            break
        error = error.__cause__
    name = type(error).__name__
    is_of_system = isinstance(error, FileNotFoundError | PermissionError)
    return one_line(error) or name, is_of_system or name in PERMANENT


def _http_status(error: Any) -> int | None:
    """What a server answered, as the clients' errors hold it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        about: dict[str, int] = response.get("ResponseMetadata", {})
        return about.get("HTTPStatusCode")
    return getattr(response, "status_code", None) or getattr(error, "status", None)

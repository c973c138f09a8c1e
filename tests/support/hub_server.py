"""A small hub of data sets, and web server, with failures on demand, for tests of remote inputs.

It answers what `datasets` and `huggingface_hub` ask for (seen by logging them): information on a
repository at a revision, its tree, HEAD and ranges of its files, large ones after a redirect. All
revisions are COMMIT.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40
REVISIONS = ("main", "v1", COMMIT)
DROPPED = -1  # instead of a status: the connection is closed without an answer


@dataclass
class Failures:
    """What is to go wrong with requests for a file or repository of that name."""

    # status of the next answers; then all is well
    next: dict[str, list[int]] = field(default_factory=dict)
    always: dict[str, int] = field(default_factory=dict)
    # the next bodies end so many bytes early
    cut_bytes: dict[str, list[int]] = field(default_factory=dict)
    ignore_ranges: bool = False


class HubServer:
    """Serves the files below a directory, and its owner/name folders as data sets.

    It is a context manager.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()  # owner/name
        self.reset()
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def reset(self) -> None:
        """Forget what was asked, and what was to fail."""
        self.failures = Failures()
        self.requests: list[tuple[str, str]] = []  # method and path
        self.bytes_sent = 0  # bodies

    def __enter__(self) -> "HubServer":
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        self.name = parts[-1]
        self.hub.requests.append((self.command, path))
        failures = self.hub.failures
        if status := (failures.next.get(self.name) or [0]).pop(0) or failures.always.get(self.name):
            self._answer(status, b"failed on demand")
        elif path.startswith("/api/datasets/"):
            self._api("/".join(parts[2:4]), *parts[4:])
        elif path.startswith("/datasets/"):
            repository, revision, file = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
            if not self._refuses(repository, revision, needs_access=True):
                is_large = file.endswith(".parquet")
                self._file(
                    self.hub.root / repository / file,
                    redirect=f"/{repository}/{file}" if is_large else None,
                )
        else:
            self._file(self.hub.root / path.strip("/"))

    do_HEAD = do_GET  # noqa: N815

    def _api(
        self, repository: str, what: str = "revision", revision: str = "main", *folders: str
    ) -> None:
        root = self.hub.root / repository
        if self._refuses(repository, revision, needs_access=what == "auth-check"):
            return
        content: Any = {}
        if what == "revision":
            siblings = [
                {"rfilename": path.relative_to(root).as_posix()}
                for path in root.rglob("*")
                if path.is_file()
            ]
            gated = "auto" if repository in self.hub.gated else False
            content = {"id": repository, "sha": COMMIT, "gated": gated, "siblings": siblings}
        elif what == "tree":
            folder = root.joinpath(*folders)
            is_recursive = "recursive=true" in self.path.lower()
            paths = folder.rglob("*") if is_recursive else folder.glob("*")
            content = [_entry(root, path) for path in sorted(paths)]
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuses(self, repository: str, revision: str, *, needs_access: bool) -> bool:
        """Whether there is nothing to see here; if so, answers like the hub."""
        # nobody learns whether it is private or isn't there
        if not (self.hub.root / repository).is_dir():
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif needs_access and repository in self.hub.gated and "Authorization" not in self.headers:
            self._answer(401, b"", {"X-Error-Code": "GatedRepo"})
        elif revision not in REVISIONS:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _file(self, path: Path, redirect: str | None = None) -> None:
        if path.is_dir():
            links = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in path.iterdir())
            self._answer(200, links.encode(), {"Content-Type": "text/html"})
            return
        if not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content, status, first, stop = path.read_bytes(), 200, 0, None
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if redirect:
            self._answer(
                302, b"", {"Location": redirect, "X-Linked-Size": str(len(content)), **headers}
            )
            return
        if (wanted := self.headers.get("Range")) and not self.hub.failures.ignore_ranges:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            status, stop = 206, min(last + 1, len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        self._answer(status, content[first:stop], headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if status == DROPPED:
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if body and (cut := (self.hub.failures.cut_bytes.get(self.name) or [0]).pop(0)):
            body, self.close_connection = body[:-cut], True
        self.hub.bytes_sent += len(body)
        self.wfile.write(body)


def _entry(root: Path, path: Path) -> dict[str, Any]:
    """A file or folder in the tree of a repository."""
    oid = hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()
    kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
    return {"type": kind, "oid": oid, "size": size, "path": path.relative_to(root).as_posix()}

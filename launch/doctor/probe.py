"""What a machine says of itself: a program that each node runs once, and the record it prints.

    python probe.py HOST REQUEST     HOST: its name in the hostfile; REQUEST: `Request`, packed

Only Python's own modules are imported: the others may be what is wrong. A request is packed in
hexadecimal, because ssh and pdsh read quotes, dollars and percent signs otherwise.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("data_prep", "pretrain", "launch", "ds_configs")
TOKENIZER = "tokenizer"  # as data_prep/shards.py names it
CODE = {".py", ".yaml", ".json", ".sh", ".slurm", ".jinja", ".js"}
MIB = 1 << 20
WRITTEN_MIB = 64  # to measure how fast a disk writes
RESOLVED_S = 5.0  # names have so long, together
# How flock ended for a node, while the asking machine holds the lock.
EXCLUDED = "excluded"
NOT_EXCLUDED = "not excluded"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a node is asked. An empty path is not asked for."""

    hosts: list[str]  # whose names are to be resolved
    place: str = ""  # an existing directory: the run's, or the one that it will lie in
    note: str = ""  # name of a file there, whose lock the asking machine holds
    data_dir: str = ""
    measure_disk: bool = False

    def packed(self) -> str:
        """As an argument that no shell reads otherwise."""
        return json.dumps(dataclasses.asdict(self)).encode().hex()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a node says. Sizes are MiB; an empty text is what it could not find."""

    host: str
    time_s: float  # since the epoch
    python: str
    packages: dict[str, str]  # version by name
    code: str  # digest of the project's files
    commit: str
    changed_files: int  # that git knows, and that are not as committed
    addresses: dict[str, str]  # by host
    note: str = ""  # content of the file in the run's place
    lock: str = ""  # EXCLUDED, NOT_EXCLUDED, or why there is none
    free_mib: int | None = None  # of the disk below the run's place
    write_mib_s: float | None = None
    write_error: str = ""
    data: str = ""  # digest of the data set's manifest
    tokenizer: str = ""
    available_mib: int | None = None
    shared_memory_mib: int | None = None  # free in /dev/shm
    open_files: int = 0  # soft limit; -1: none
    maps: int | None = None  # vm.max_map_count
    ranks: list[int] = field(default_factory=list)  # process ids of training that runs
    stale_locks: dict[str, int] = field(default_factory=dict)  # age in seconds by path
    gpus: str = ""  # what nvidia-smi printed


def digest(path: Path) -> str:
    """The beginning of a file's SHA-256; empty where it can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def digest_of_all(home: Path, paths: list[Path]) -> str:
    """A digest of the names and contents of files below a folder; empty where there are none."""
    whole = hashlib.sha256()
    files = sorted(path for path in paths if path.is_file())
    for path in files:
        name = path.relative_to(home)
        whole.update(f"{name} {digest(path)}\n".encode())
    if not files:
        return ""
    return whole.hexdigest()[:16]


def code_digest(home: Path) -> str:
    """A digest of the project's files, the same for a checkout and a wheel of equal code."""
    found = []
    for package in PACKAGES:
        for path in (home / package).rglob("*"):
            if path.suffix in CODE:
                found.append(path)
    return digest_of_all(home, found)


def tokenizer_digest(data_dir: str) -> str:
    """A digest of the data set's tokenizer; empty where there is none."""
    folder = Path(data_dir) / TOKENIZER
    return digest_of_all(folder, [*folder.rglob("*")])


def output_of(*command: str) -> str:
    """What a command prints; empty where it is not there, fails, or takes too long."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=4, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def packages() -> dict[str, str]:
    """Versions by the names of folders, which is 50 times as fast as reading metadata."""
    found = {}
    for folder in reversed(sys.path):  # the first on the path is what is imported
        for path in Path(folder or ".").glob("*.dist-info"):
            name, _, version = path.stem.partition("-")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def address_of(host: str) -> str:
    """What a name resolves to here; empty where it does not."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def addresses_of(hosts: list[str]) -> dict[str, str]:
    """What names resolve to, all at once: one that is unknown may take as long as all the rest."""
    found = dict.fromkeys(hosts, "")

    def find(host: str) -> None:
        found[host] = address_of(host)

    # A thread that still waits for a server of names holds nobody up when this program ends.
    threads = [threading.Thread(target=find, args=[host], daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    end = time.monotonic() + RESOLVED_S
    for thread in threads:
        left = end - time.monotonic()
        thread.join(max(0.0, left))
    return dict(found)


def try_lock(path: Path) -> str:
    """Whether a lock that another machine holds is seen here."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return EXCLUDED
    except OSError as error:
        return error.strerror or "failed"
    return NOT_EXCLUDED


def write_speed(place: Path) -> tuple[float | None, str]:
    """MiB/s of a sequential write with fsync, and why there is none."""
    path = place / f".doctor-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(MIB)
    try:
        start = time.monotonic()
        with path.open("xb") as file:
            for _ in range(WRITTEN_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return WRITTEN_MIB / (time.monotonic() - start), ""
    except OSError as error:
        return None, error.strerror or "failed"
    finally:
        path.unlink(missing_ok=True)


def free_mib(place: str) -> int | None:
    """Free space of the disk below a path."""
    try:
        return shutil.disk_usage(place).free // MIB
    except OSError:
        return None


def number_in(path: str, pattern: str = r"(\d+)") -> int | None:
    """The first number of a file of /proc that a pattern finds."""
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return int(match[1]) if match else None


def training_processes() -> list[int]:
    """Process ids of ranks that run on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is not ours to read
            continue
        # A launcher names the module too; only ranks are Python with a rank's number.
        is_trainer = False
        is_rank = False
        for word in words:
            if word == "pretrain.train" or word.endswith("pretrain/train.py"):
                is_trainer = True
            if word.startswith("--local_rank"):
                is_rank = True
        if is_trainer and is_rank:
            found.append(int(path.parent.name))
    return sorted(found)


def stale_locks(now: float) -> dict[str, int]:
    """Lock files of torch's extensions: while one exists, whoever builds waits, for ever.

    Triton and inductor lock with flock, which ends with the process: their files mean nothing.
    """
    cache = Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.getenv("TORCH_EXTENSIONS_DIR") or cache)
    ages = {}
    for path in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            ages[str(path)] = int(now - path.stat().st_mtime)
        except OSError:  # it has just been taken away
            continue
    return ages


def gather(host: str, request: Request) -> Facts:
    """All that this machine says."""
    home = Path(__file__).resolve().parents[2]
    now = time.time()
    place = request.place
    speed: float | None = None
    write_error = ""
    if request.measure_disk and place:
        speed, write_error = write_speed(Path(place))
    note = Path(place) / request.note
    content = ""
    if place and note.is_file():
        content = note.read_text()
    changed = output_of("git", "-C", str(home), "status", "--porcelain", "-uno")
    data = Path(request.data_dir)
    return Facts(
        host=host,
        time_s=now,
        python=sys.version.split()[0],
        packages=packages(),
        code=code_digest(home),
        commit=output_of("git", "-C", str(home), "rev-parse", "HEAD"),
        changed_files=len(changed.splitlines()),
        addresses=addresses_of(request.hosts),
        note=content,
        lock=try_lock(note) if content else "",
        free_mib=free_mib(place) if place else None,
        write_mib_s=speed,
        write_error=write_error,
        data=digest(data / "manifest.json") if request.data_dir else "",
        tokenizer=tokenizer_digest(request.data_dir) if request.data_dir else "",
        available_mib=number_in("/proc/meminfo", r"MemAvailable: +(\d+)\d{3} kB"),
        shared_memory_mib=free_mib("/dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        maps=number_in("/proc/sys/vm/max_map_count"),
        ranks=training_processes(),
        stale_locks=stale_locks(now),
        gpus=output_of(
            "nvidia-smi",
            "--query-gpu=name,driver_version,ecc.errors.uncorrected.volatile.total",
            "--format=csv,noheader",
        ),
    )


if __name__ == "__main__":
    asked = Request(**json.loads(bytes.fromhex(sys.argv[2])))
    print(json.dumps(dataclasses.asdict(gather(sys.argv[1], asked))))

"""What earlier code left behind, a data set and a run stopped half-way, must stay what it is.

    python tests/test_witness.py --record           makes them anew, by the code of today
    python tests/test_witness.py --record-exports   only the digests of the exports

See WHEN_IT_FAILS before you do.

`tests/data/witness` holds text, tokenizer, data set and run; `witness.json` beside them what the
run's losses became, and the digests of both exports. The losses are exact on the build that made
them and agree to 1e-5 on any other.
"""

import json
import shutil
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import transformers
from support.builds import this_build
from support.runs import losses, run_command, text_dataset, train, write_recipe

from data_prep.files import digest_file
from data_prep.manifest import load_manifest
from pretrain.hf.certificate import CERTIFICATE_NAME
from pretrain.hf.marker import MARKER_NAME
from pretrain.hf.names import CARD_NAME

WITNESS = Path(__file__).parent / "data" / "witness"
RECORD = WITNESS / "witness.json"
STEPS, STOPPED_AT = 10, 5
FORMS = ("tablefree", "gpt_neox")
HOST = "host"  # in place of the name of the machine that made the run

WHEN_IT_FAILS = """
what earlier code wrote is not read, continued or exported as it was. If that is not meant, it is a
bug: users have such files. If it is meant (another text in the model card, say), make it a commit
of its own, say there why, and record it (of exports alone by --record-exports):
    python tests/test_witness.py --record"""


def resume(home: Path) -> list[float]:
    """Train the rest of the run that was stopped; all its losses."""
    train(1, home / "witness.yaml", home / "dataset", home / "run")
    return losses(home / "run")


def export(home: Path, form: str, output_dir: Path) -> dict[str, str]:
    """Export the run as it is; the digest of each file."""
    flags = [
        "--run-dir",
        str(home / "run"),
        "--architecture",
        form,
        "--output-dir",
        str(output_dir),
    ]
    result = run_command(sys.executable, "-m", "pretrain.export_hf", *flags)
    assert result.returncode == 0, result.stderr
    forget_versions(output_dir)
    return {path.name: digest_file(path) for path in sorted(output_dir.iterdir())}


def forget_versions(output_dir: Path) -> None:
    """Take out of an export which commit of this project it was made by, and in what versions.

    They are in the certificate, whose digest is in the marker.
    """
    certificate = json.loads((output_dir / CERTIFICATE_NAME).read_bytes())
    del certificate["commit"]
    del certificate["versions"]
    (output_dir / CERTIFICATE_NAME).write_text(json.dumps(certificate))
    marker = json.loads((output_dir / MARKER_NAME).read_bytes())
    assert marker["files"].pop(CERTIFICATE_NAME)
    (output_dir / MARKER_NAME).write_text(json.dumps(marker))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(WITNESS, tmp_path / "witness"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """What was seen when the witness was made."""
    content: dict[str, Any] = json.loads(RECORD.read_text())
    return content


def test_the_data_set_is_whole_and_is_what_its_text_gives_today(
    home: Path, recorded: dict[str, Any]
) -> None:
    result = run_command(sys.executable, "-m", "data_prep.verify", str(home / "dataset"))
    assert result.returncode == 0, result.stderr
    flags = ["--mixture", str(home / "mixture.yaml"), "--output-dir", str(home / "today")]
    result = run_command(sys.executable, "-m", "data_prep.build_shards", *flags)
    assert result.returncode == 0, result.stderr
    before, today = load_manifest(home / "dataset"), load_manifest(home / "today")
    assert before.fingerprint == today.fingerprint == recorded["fingerprint"], WHEN_IT_FAILS
    assert (home / "dataset" / "manifest.json").read_bytes() == (
        home / "today" / "manifest.json"
    ).read_bytes()


def test_the_run_goes_on_as_if_it_had_never_stopped(home: Path, recorded: dict[str, Any]) -> None:
    found = resume(home)
    assert len(found) == STEPS
    assert found == pytest.approx(recorded["losses"], rel=1e-5), WHEN_IT_FAILS
    if this_build() == recorded["build"]:
        assert found == recorded["losses"], WHEN_IT_FAILS


@pytest.mark.parametrize("form", FORMS)
def test_its_export_is_byte_for_byte_what_it_was(
    form: str, home: Path, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    if transformers.__version__ != recorded["transformers"]:
        pytest.skip(
            f"recorded with transformers {recorded['transformers']}, which writes its version "
            "into files"
        )
    found = export(home, form, tmp_path / form)
    expected = recorded["exports"][form]
    assert found.keys() == expected.keys(), WHEN_IT_FAILS
    with_figures: set[str] = set()
    if this_build() != recorded["build"]:
        with_figures = {CERTIFICATE_NAME, CARD_NAME, MARKER_NAME}
    for name in found.keys() - with_figures:
        assert found[name] == expected[name], f"{name}: {WHEN_IT_FAILS}"


def record() -> None:
    """Make the witness and write down what is seen of it."""
    with TemporaryDirectory() as temporary:
        home = Path(temporary) / "witness"
        home.mkdir()
        text_dataset(home, 20, 3000)
        write_recipe(home / "witness.yaml", train_tokens=STEPS * 6 * 32)
        train(
            1,
            home / "witness.yaml",
            home / "dataset",
            home / "run",
            "--stop-at-step",
            str(STOPPED_AT),
        )
        shutil.rmtree(home / "run" / "checked_data")  # a stamp of files that are not these
        for path in (home / "run" / "starts.jsonl", home / "dataset" / "build.json"):
            text = path.read_text().replace(socket.gethostname(), HOST)
            path.write_text(text.replace(f"{home}/", "").replace(str(sys.executable), "python"))
        shutil.rmtree(WITNESS, ignore_errors=True)
        shutil.copytree(home, WITNESS)
        exports = {form: export(home, form, Path(temporary) / form) for form in FORMS}
        seen = {
            "build": this_build(),
            "transformers": transformers.__version__,
            "fingerprint": load_manifest(home / "dataset").fingerprint,
            "losses": resume(home),
            "exports": exports,
        }
    RECORD.write_text(json.dumps(seen, indent=1) + "\n")


def record_exports() -> None:
    """Write down what exports of the witness are today, and leave all else."""
    seen = json.loads(RECORD.read_text())
    with TemporaryDirectory() as temporary:
        home = Path(shutil.copytree(WITNESS, Path(temporary) / "witness"))
        seen["exports"] = {form: export(home, form, Path(temporary) / form) for form in FORMS}
    RECORD.write_text(json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    commands = {"--record": record, "--record-exports": record_exports}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()

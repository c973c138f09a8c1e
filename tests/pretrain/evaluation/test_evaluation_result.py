"""The files that keep what was measured: bytes as ever, read back as they were written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from pretrain.evaluation.intervals import Bootstrap, Interval
from pretrain.evaluation.result import (
    EvaluationResult,
    Score,
    read_result,
    read_results,
    result_path,
    write_result,
)

WHOLE = Score(targets=99, text_bytes=98, loss=1.5, perplexity=4.5, bits_per_byte=2.0)
SMALL = Score(targets=9, text_bytes=8, loss=0.1, perplexity=1.25, bits_per_byte=0.5)
OWN = EvaluationResult(
    step=20, fingerprint="abc", whole_split=WHOLE, sources={"a": WHOLE, "b": SMALL}
)
# as every version so far has written it
FILE = b"""{
 "step": 20,
 "fingerprint": "abc",
 "targets": 99,
 "text_bytes": 98,
 "loss": 1.5,
 "perplexity": 4.5,
 "bits_per_byte": 2.0,
 "sources": {
  "a": {
   "targets": 99,
   "text_bytes": 98,
   "loss": 1.5,
   "perplexity": 4.5,
   "bits_per_byte": 2.0
  },
  "b": {
   "targets": 9,
   "text_bytes": 8,
   "loss": 0.1,
   "perplexity": 1.25,
   "bits_per_byte": 0.5
  }
 }
}"""


def test_the_file_is_as_it_was_and_reads_as_it_was_written(tmp_path: Path) -> None:
    write_result(OWN, result_path(tmp_path, OWN, is_newest=True))
    assert (tmp_path / "evaluation.json").read_bytes() == FILE
    assert read_result(tmp_path, 20) == OWN
    assert read_result(tmp_path, 10) is None


SURE = replace(
    WHOLE,
    documents=7,
    loss_interval=Interval(low=1.25, high=1.75),
    bits_per_byte_interval=Interval(low=1.5, high=2.5),
)


def test_intervals_and_a_stride_are_read_as_they_were_written(tmp_path: Path) -> None:
    sliding = replace(OWN, whole_split=SURE, stride=8, bootstrap=Bootstrap(resamples=99, seed=3))
    blocks = replace(OWN, whole_split=SURE, bootstrap=Bootstrap())
    place = result_path(tmp_path, sliding, is_newest=True)
    assert place == tmp_path / "evaluations" / "step-00000020.stride-8.json"
    write_result(sliding, place)
    # What slides is not what a card or a report takes for the figures of a step.
    assert read_result(tmp_path, 20) is None
    write_result(blocks, result_path(tmp_path, blocks, is_newest=True))
    assert read_result(tmp_path, 20) == blocks
    assert read_results(tmp_path) == [blocks, sliding]
    content = json.loads(place.read_bytes())
    assert content["loss_interval"] == [1.25, 1.75]
    assert content["bootstrap"] == {"level": 0.95, "resamples": 99, "seed": 3}


def test_each_result_has_a_place_of_its_own(tmp_path: Path) -> None:
    other = EvaluationResult(
        step=20, fingerprint="f", whole_split=WHOLE, sources={}, data_dir=Path("/x")
    )
    places = [
        result_path(tmp_path, result, is_newest=is_newest)
        for result in (OWN, other)
        for is_newest in (True, False)
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in places] == [
        "evaluation.json",
        "evaluations/step-00000020.json",
        "evaluations/step-00000020.f.json",
        "evaluations/step-00000020.f.json",
    ]
    assert json.loads(other.to_bytes())["data_dir"] == "/x"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "not what pretrain.evaluate writes"),
        ({"step": 20, "sources": {}}, "lacks figures of targets, text_bytes, loss, perplexity, "),
        (json.loads(FILE) | {"loss": "low"}, "lacks figures of"),
        (json.loads(FILE) | {"sources": {"a": []}}, "lacks figures of"),
        (json.loads(FILE) | {"loss": True}, "lacks figures of"),
        (json.loads(FILE) | {"loss_interval": [1.0]}, "no pair of numbers"),
        (json.loads(FILE) | {"bootstrap": {"level": 0.95}}, "how its intervals were made"),
        (json.loads(FILE) | {"stride": "8"}, "its stride is no number"),
        (json.loads(FILE) | {"documents": "8"}, "number of documents is none"),
        ({key: value for key, value in json.loads(FILE).items() if key != "sources"}, "of each"),
    ],
)
def test_another_file_in_its_place_is_one_clear_line(
    content: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"evaluation.json: .*{words}.*pretrain.evaluate again"):
        read_result(tmp_path, 20)

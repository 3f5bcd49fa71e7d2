import json

import pytest

from medllm_jax.data.prepare.rejections import Rejected, RejectionCounts, refuse, reject
from medllm_jax.errors import UserError


def test_counts_add_up_and_travel():
    one, two = RejectionCounts(), RejectionCounts()
    for number in range(8):
        one.add("bad", f"one:{number}")
        two.add("bad", f"two:{number}")
    two.add("worse", "two:9")
    one.merge(RejectionCounts.from_dict(json.loads(json.dumps(two.as_dict()))))
    assert one.counts == {"bad": 16, "worse": 1} and one.total == 17
    assert one.first["bad"] == [f"one:{number}" for number in range(8)] + ["two:0", "two:1"]
    assert len(two.first["bad"]) == 8 and two.total == 9
    for number in range(25):
        two.add("bad", f"two:{number + 8}")
    assert two.first["bad"] == [f"two:{number}" for number in range(10)] and two.counts["bad"] == 33


def test_texts_are_kept_where_asked_for():
    counts = RejectionCounts(max_places=2, max_texts=1)
    for number, reason in enumerate(["few", "many", "many", "many"]):
        counts.add(reason, f"q{number}", f"text {number}")
    counts.add("none", "q4")
    assert counts.texts == {"few": [{"id": "q0", "text": "text 0"}], "many": [{"id": "q1", "text": "text 1"}]}
    assert list(counts.as_dict()) == ["few", "many", "none"]
    assert list(counts.as_dict(most_common_first=True)) == ["many", "few", "none"]
    assert counts.as_dict()["many"] == {"count": 3, "first": ["q1", "q2"]}
    silent = RejectionCounts()
    silent.add("few", "q0", "text")
    assert silent.texts == {}


def test_a_rejected_row_is_an_error_or_counted():
    counts = RejectionCounts()
    with pytest.raises(UserError, match=r"^rows.jsonl:3: empty; correct the row"):
        reject(Rejected("rows.jsonl:3", "empty"), "error", counts)
    assert str(counts) == "nothing"
    reject(Rejected("rows.jsonl:3", "empty"), "skip", counts)
    assert str(counts) == "1 empty (first at rows.jsonl:3)"


def test_all_that_stops_is_one_line():
    found = RejectionCounts()
    refuse(found, "bad")
    found.rows = 30
    for number, reason in enumerate(["no field `a`", "empty", "no field `a`"], 1):
        reject(Rejected(f"f:{number}", reason, hint="it has b" if reason != "empty" else ""), "collect", found)
    found.add("shorter than 5 characters", "f:9")  # what is left out in any case stops nothing
    with pytest.raises(UserError) as caught:
        refuse(found, "bad")
    assert str(caught.value) == (
        "f:1: no field `a`; 3 of 30 rows are bad: 2 no field `a` (first at f:1, f:3), 1 empty (first at f:2); "
        "it has b; correct the rows, or have such rows left out and counted with --on-bad skip"
    )
    merged = RejectionCounts()
    merged.merge(found)
    assert merged.stopping == found.stopping


def test_what_is_too_long_says_what_would_take_it():
    found = RejectionCounts()
    for place, needed in (("f:1", 300), ("f:2", 500), ("f:3", 400)):
        reject(Rejected(place, "it is long", True, needs=(("--sequence-length", needed),)), "collect", found)
    with pytest.raises(
        UserError,
        match=r"3 rows are too long, first at f:1, f:2, f:3; --sequence-length 500 would take all, --on-long skip",
    ):
        refuse(found, "too long")

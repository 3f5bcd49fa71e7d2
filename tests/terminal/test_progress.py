import logging

from medllm_jax.terminal.progress import Stages


def test_stages_are_told_in_words_with_counts(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, logger="medllm_jax")
    with Stages({"survey": ("reading documents", "bytes"), "packing": ("packing rows", "documents")}) as show:
        show("survey", 0, 2_000_000)
        show("survey", 2_000_000, 2_000_000)
        show("packing a", 1200, 1200)
        show("other", 1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "reading documents: 0 bytes of 2.0 MB",
        "reading documents: 2.0 MB of 2.0 MB",
        "packing rows of a: 1,200 of 1,200 documents",
        "other: task 1/1",
    ]

"""One small real file of every kind that the system reads, made by its own verbs; for `benchmarks.readings`."""

import contextlib
import fnmatch
import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tests.tiny import make_sentencepiece, write_json_lines

LENGTH = 64  # tokens of a row

# --- kinds of files -------------------------------------------------------------------------------------------------

# Pattern of a path -> what it is called, and whether it is sealed: whether a checksum, of its own or in another file,
# covers its content, so that no change of a bit can be taken for other content. The first that matches counts.
KINDS: tuple[tuple[str, str, bool], ...] = (
    ("*/checkpoints/*/commit_success.txt", "checkpoint: commit markers", True),
    ("*/checkpoints/*/meta/*", "checkpoint: what it says of itself", True),
    ("*/checkpoints/*/_CHECKPOINT_METADATA", "checkpoint: Orbax's metadata", True),
    ("*/checkpoints/*/d/*", "checkpoint: arrays", True),
    ("*/checkpoints/*", "checkpoint: descriptions of arrays", True),
    ("runs/*/config.yaml", "run: config.yaml", False),
    ("runs/*/*/config.yaml", "run: config.yaml", False),
    ("base/config.yaml", "run: config.yaml", False),
    ("*/metrics.jsonl", "run: metrics.jsonl", False),
    ("*/sessions.jsonl", "run: sessions.jsonl", False),
    ("*/skipped.jsonl", "run: skipped.jsonl", False),
    ("*/writer.json", "run: writer.json", False),
    ("runs/*/tensorboard/*", "run: TensorBoard events", False),
    ("runs/*/log*", "run: logs", False),
    ("runs/*.tfevents*", "run: TensorBoard events", False),
    ("stores/*/reference/*", "store: reference log-probabilities", True),
    ("stores/*/store.json", "store: store.json", True),
    ("stores/*", "store: rows", True),
    (".half.unfinished/.conversion*", "notes of a conversion", False),
    (".half.unfinished/*", "half a conversion", True),
    ("export/SHA256SUMS", "model: SHA256SUMS", False),
    ("export/README.md", "model: card", False),
    ("export/*", "model: exported, with SHA256SUMS", True),
    ("peft/*.safetensors", "adapter: safetensors", False),
    ("peft/*", "adapter: its other files", False),
    ("hf/*.safetensors", "model: safetensors", False),
    ("hf/*index.json", "model: index of safetensors", False),
    ("*/generation_config.json", "model: generation_config.json", False),
    ("*/tokenizer*.json", "tokenizer", False),
    ("*/chat_template.jinja", "chat template", False),
    ("sentencepiece.model", "SentencePiece model", False),
    ("hf/config.json", "model: config.json", False),
    ("base/*", "run: its other files", False),
    ("runs/*", "run: its other files", False),
    ("corpora/*.gz", "corpus .jsonl.gz", True),
    ("corpora/*.zst", "corpus .jsonl.zst", False),
    ("corpora/*.parquet", "corpus .parquet", False),
    ("corpora/*.txt", "corpus .txt", False),
    ("corpora/*.jsonl", "corpus .jsonl", False),
    ("pairs.jsonl", "pairs .jsonl", False),
    ("sft.jsonl", "instructions .jsonl", False),
    ("patterns.yaml", "PII patterns", False),
    ("template.yaml", "prompt template", False),
    ("corpora.yaml", "corpora .yaml", False),
    ("rounds.yaml", "rounds .yaml", False),
    ("*.yaml", "run config .yaml", False),
    ("exam.jsonl", "exam .jsonl", False),
    ("igakuqa/*", "exam IgakuQA", False),
    ("predictions/*", "predictions", False),
    ("*/samples.jsonl", "results: samples.jsonl", False),
    ("results/grades*.jsonl", "results: grades", False),
    ("results/*", "results: scores and other", False),
    ("rounds/*", "rounds: what is kept", False),
    ("demo/*", "demo: what is kept", False),
    ("answers/*", "server's answer", False),
)


def kind_of(path: str) -> tuple[str, bool]:
    """What a file of the inputs is called, and whether it is sealed."""
    return next((name, sealed) for pattern, name, sealed in KINDS if fnmatch.fnmatch(path, pattern))


# --- the folder -----------------------------------------------------------------------------------------------------

CPT = """\
run: runs/cpt
steps: 4
seed: 1
init: {checkpoint: base}
data: {store: stores/corpus, batch_size: 4, threads: 1}
precision: {params: float32, compute: float32}
optimizer: {learning_rate: 1.0e-3, schedule: constant, warmup_steps: 2}
checkpoint: {every: 1, keep: 2}
guard: {action: skip, limit: 3, grad_norm: 1000.0}
logging: {every: 1}
"""
RPO = """\
run: runs/rpo
steps: 2
init: {checkpoint: base}
adapter: {rank: 2, alpha: 4, base: float32}
data: {store: stores/pairs, batch_size: 4, threads: 1}
precision: {params: float32, compute: float32}
objective: {name: rpo, beta: 0.1, alpha: 1.0}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 1, weight_decay: 0.0}
checkpoint: {every: 2}
"""
ROUNDS = """\
folder: rounds
start: base
train: rpo.yaml
rounds: 2
questions: igakuqa/data/2018/112-A.jsonl
held_out: exam.jsonl
template: template.yaml
conditions: [answer_only]
samples: 3
temperature: [1.0, 1.2]
strategy: gold
sequence_length: 256
"""
CORPORA = """\
corpora:
  - {name: first, input: [corpora/a.jsonl], licence: CC-BY-4.0, contact: team}
  - {name: second, input: [corpora/b.txt]}
tokenizer: hf
output: out
sequence_length: 64
duplicates: near
near_threshold: 0.8
pii: report
"""
TEMPLATE = r"""
name: short
question: |
  {question}
  {choices}
number_question: |
  {question}
choice: "{letter}: {text}"
conditions:
  answer_only: {cue: "答え:", stop: ["\n"], max_new_tokens: 4}
  explain: {cue: "解説:", solution: " {explanation}\n答え: {answer}", stop: ["\n\n"], max_new_tokens: 4}
"""
PATTERNS = r"""
- {name: record, label: record number, regex: 'MRN-(\d{6})', mask: "[record]", group: 1, except: ['000000']}
- {name: ward, label: ward, regex: 'ward \d+', mask: "[ward]"}
"""
COMPLETION = {"id": "c", "object": "text_completion", "model": "m", "usage": {"total_tokens": 9}}
COMPLETION |= {"choices": [{"index": 0, "text": " b\nc", "finish_reason": "stop", "logprobs": None}]}
CHAT = {"id": "c", "object": "chat.completion", "model": "m"}
CHAT |= {"choices": [{"index": 0, "message": {"role": "assistant", "content": "答え: b"}, "finish_reason": "stop"}]}


def http_answer(body: bytes, status: str = "200 OK", headers: Sequence[str] = ()) -> bytes:
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + body


def make_inputs(root: Path, *, runs: bool = True) -> Path:
    """Fills a new folder. runs: also with what is trained and what comes after, which takes most of the time."""
    from tests.tiny_hf import make_hf_folder

    root.mkdir(parents=True)
    words = ("fever", "cough", "発熱", "insulin", "heart", "肺炎", "drug", "test", "高血圧", "liver")
    sentences = [" ".join(words[(n * k + k) % 10] for k in range(1, 4 + n % 9)) + f" {n}." for n in range(24)]
    documents = [{"text": text, "id": n, "source": "made"} for n, text in enumerate(sentences)]
    with contextlib.chdir(root):
        make_hf_folder("hf", hidden=16, heads=(2, 1), layers=1, tied=False, shards=2)
        _make_corpora(Path("corpora"), documents, sentences)
        make_sentencepiece(Path("sentencepiece.model"))
        pairs = [{"prompt": f"Q{n}:", "chosen": f" yes {text}", "rejected": f" no {n}"} for n, text in enumerate(words)]
        write_json_lines("pairs.jsonl", pairs)
        chat = [{"role": "user", "content": "咳は?"}, {"role": "assistant", "content": "cough"}]
        told = [{"prompt": f"Q{n}:", "response": f" {text}"} for n, text in enumerate(words)]
        write_json_lines("sft.jsonl", [*told, {"messages": chat}])
        _make_exams()
        for name, text in (("cpt", CPT), ("rpo", RPO), ("rounds", ROUNDS), ("corpora", CORPORA)):
            Path(f"{name}.yaml").write_text(text)
        Path("template.yaml").write_text(TEMPLATE)
        Path("patterns.yaml").write_text(PATTERNS)
        Path("answers").mkdir()
        for name, answer in (("completion", COMPLETION), ("chat", CHAT)):
            Path(f"answers/{name}.http").write_bytes(http_answer(json.dumps(answer).encode()))
        _medllm("data cpt --config corpora.yaml --workers 1")
        Path("stores").mkdir()
        Path("out").rename("stores/corpus")
        _medllm(f"data pairs --input pairs.jsonl --tokenizer hf --output stores/pairs --sequence-length {LENGTH}")
        _medllm("convert from-hf hf base")
        _medllm("convert from-hf hf half --part 1/2")
        _make_rounds()
        if runs:
            _make_runs()
    return root


def _make_corpora(folder: Path, documents: list[dict], sentences: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    content = write_json_lines(folder / "a.jsonl", documents).read_bytes()
    (folder / "b.txt").write_text("\n".join(reversed(sentences)))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (folder / "d.jsonl.zst").write_bytes(pyarrow.compress(content, "zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.table({"text": sentences, "n": range(24)}), folder / "e.parquet")


def _make_exams() -> None:
    rows = [
        {"id": f"q{n}", "question": f"{n}番は?", "choices": ["甲", "乙", "丙"], "answer": "abc"[n % 3], "points": 1}
        | {"explanation": f"{n}だから。", "section": "AB"[n % 2]}
        for n in range(5)
    ]
    write_json_lines("exam.jsonl", rows)
    Path("igakuqa/data/2018").mkdir(parents=True)
    five = {"choices": ["一", "二", "三", "四", "五"], "text_only": True, "points": "1"}
    for section in "ABCDEF":
        asked = [{"problem_id": f"112{section}{n}", "problem_text": f"正しいのはどれか。{n}"} | five for n in (1, 2)]
        answered = [row | {"answer": answer} for row, answer in zip(asked, (["a or d"], ["b", "e"]), strict=True)]
        write_json_lines(f"igakuqa/data/2018/112-{section}.jsonl", answered)
        about = [{"problem_id": f"112{section}1", "category": "産科", "kinki": ["de"]}]
        write_json_lines(f"igakuqa/data/2018/112-{section}_metadata.jsonl", about)
    Path("predictions").mkdir()
    for system, said in (("first", "答え: a"), ("second", "bです")):
        answers = [{"id": row["id"], "text": said, "finish_reason": "stop"} for row in rows]
        write_json_lines(f"predictions/{system}.jsonl", answers)


def _make_rounds() -> None:
    """Rounds that have ended for want of pairs, and a demo that has made its world."""
    from medllm_jax.recipes.demo.recipe import DEMO
    from medllm_jax.recipes.demo.stages import identity

    scores = {"accuracy": 0.25, "n": 4, "correct": 1}
    first = Path("rounds/round-0/evaluation/scores.json")
    _open_rounds()
    first.parent.mkdir(parents=True)
    first.write_text(json.dumps({"conditions": {"answer_only": scores}}))
    report = Path("rounds/round-1/pairs.jsonl.report.json")
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"prompts": {"sampled": 4, "with pairs": 0}}))
    for name in ("world", "tokenizer", "hf"):
        Path(f"demo/{name}").mkdir(parents=True)
    Path("demo/demo.json").write_text(json.dumps(identity(0, DEMO)))


def _open_rounds() -> None:
    from medllm_jax.config.load import load_run_config
    from medllm_jax.recipes import rounds

    config = rounds.load_rounds_config("rounds.yaml")
    rounds._open_folder(rounds.epath.Path(config.folder), config, load_run_config(config.train))


def _make_runs() -> None:
    ask = "--run base --exam exam.jsonl --template template.yaml"
    for command in (
        "train --config cpt.yaml --steps 2",
        "reference --config rpo.yaml",
        "train --config rpo.yaml",
        "convert to-hf base export",
        "convert to-hf runs/rpo peft --adapter",
        f"evaluate {ask} --output results",
        f"pairs {ask} --samples 2 --strategy gold --output asked/pairs.jsonl --samples-file asked/samples.jsonl",
        f"likelihood {ask} --output results",
        "contamination --exam exam.jsonl --against corpora/a.jsonl --n 4 --output results",
    ):
        _medllm(command)
    # As a run leaves them that was killed, and had bad steps before.
    Path("runs/cpt/skipped.jsonl").write_text(json.dumps({"step": 1, "rows": [0, 1], "loss": 9.0}) + "\n")
    from medllm_jax.storage.lease import Lease

    with Lease("runs/cpt"):
        holder = json.loads(Path("runs/cpt/writer.json").read_text())
    Path("runs/cpt/writer.json").write_text(json.dumps(holder | {"pid": os.getpid(), "started": "1"}))


def _medllm(command: str) -> None:
    from medllm_jax.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(command.split())
    if code:
        raise SystemExit(f"making the inputs: medllm {command} ended with {code}:\n{said.getvalue()[-3000:]}")

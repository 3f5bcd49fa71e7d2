"""Programs that only write down how they were called."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "runs" / "cpt-72b-v5p-4x4x4.yaml")
PLACES = ["--data.store", "gs://bucket/corpus", "--init.checkpoint", "gs://bucket/model"]
# What each way needs besides what all do.
OWN = {
    "gke": [],
    "xpk": ["--cluster", "tpus"],
    "gcluster": ["--cluster", "tpus", "--project", "p", "--location", "us-east5"],
    "tpu-vm": ["--project", "p", "--zone", "us-east5-a"],
}

_FAKE = """\
#!{python} -SE
import json, os, sys
folder = {folder!r}
called = {{"program": os.path.basename(sys.argv[0]), "arguments": sys.argv[1:]}}
if "apply" in sys.argv:
    called["stdin"] = sys.stdin.read()
with open(folder + "/calls.jsonl", "a") as log:
    log.write(json.dumps(called) + "\\n")
rules = folder + "/" + called["program"] + ".rules"  # words of a call: exit code, and what to print
if os.path.exists(rules):
    line = " ".join(sys.argv[1:])
    for words, (code, text) in json.load(open(rules)).items():
        if words in line:
            print(text, file=sys.stderr if code else sys.stdout)
            sys.exit(code)
answers = folder + "/" + called["program"] + ".answers"  # a line a call: exit code, and what to print
if os.path.exists(answers):
    first, *rest = open(answers).read().splitlines()
    if rest:
        open(answers, "w").write("\\n".join(rest))
    code, _, text = first.partition(" ")
    print(text)
    sys.exit(int(code))
print("ACTIVE")
"""


class Fakes:
    """A folder of fake programs on PATH."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("kubectl", "xpk", "gcluster", "gcloud", "docker", "medllm"):
            file = folder / name
            file.write_text(_FAKE.format(python=sys.executable, folder=str(folder)))
            file.chmod(0o755)

    def answer(self, program, *lines):
        (self.folder / f"{program}.answers").write_text("\n".join(lines))

    def rule(self, program, **rules):
        """What a program says to calls with these words in them (spaces as underscores): exit code and text."""
        found = {words.replace("_", " "): answer for words, answer in rules.items()}
        (self.folder / f"{program}.rules").write_text(json.dumps(found))

    def calls(self, *, forget=True):
        log = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if forget:
            log.unlink(missing_ok=True)
        return calls


def commands_of(arguments):
    """The commands that `medllm launch ARGUMENTS` would run."""
    from medllm_jax.cli import make_parser
    from medllm_jax.cli.launch import prepare
    from medllm_jax.terminal.parser import parse

    return prepare(parse(make_parser(), ["launch", *arguments]))

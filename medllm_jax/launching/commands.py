"""Commands: run one after the other, or printed so that they can be pasted into a shell."""

import logging
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from medllm_jax.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A program and its arguments.

    stdin: what it reads; until: it is run again until it prints this; never: what it prints if that will not happen.
    """

    words: tuple[str, ...]
    stdin: str = ""
    until: str = ""
    never: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As a shell takes it."""
        line = shlex.join(self.words)
        if self.until:
            return f'until [ "$({line})" = {shlex.quote(self.until)} ]; do sleep 30; done'
        return f"{line} <<'END'\n{self.stdin}END" if self.stdin else line


def run(commands: Sequence[Command], pause: float = 30) -> int:
    """Runs them, and returns 0, or 1 after the first that fails, which has said why. UserError if one is not installed.

    pause: seconds between looks at something that is waited for.
    """
    for program in dict.fromkeys(command.words[0] for command in commands):
        if not shutil.which(program):
            raise UserError(f"{program} is not installed here: install it, or add --dry-run to see what would run")
    for command in commands:
        failure = _wait(command, pause) if command.until else _run(command)
        if failure:
            _log.warning(f"error: {shlex.join(command.words[:4])} ...: {failure}")
            return 1
    return 0


def _run(command: Command) -> str:
    done = subprocess.run(command.words, input=command.stdin or None, text=True)
    return f"exit code {done.returncode}" if done.returncode else ""


def _wait(command: Command, pause: float) -> str:
    before = None
    while True:
        done = subprocess.run(command.words, stdout=subprocess.PIPE, text=True)
        state = done.stdout.strip()
        if done.returncode:
            return f"exit code {done.returncode}"
        if state == command.until:
            return ""
        if state in command.never:
            return f"{state}, and so never {command.until}"
        if state != before:
            _log.info(f"{state or 'no state yet'}: waiting for {command.until}")
        before = state
        time.sleep(pause)

"""What the package logs: a library stays quiet, the command line shows all of it."""

import logging
import subprocess
import sys

from medllm_jax.terminal.log import show_messages

LOGS = "import logging; log = logging.getLogger('medllm_jax.training'); log.info('a step'); log.warning('look here')"


def test_the_command_line_shows_messages_where_they_belong(capsys):
    show_messages()
    show_messages()
    logging.getLogger("medllm_jax.training.loop").info("step %d", 3)
    logging.getLogger("medllm_jax.reliability").warning("100% full")
    assert capsys.readouterr() == ("step 3\n", "100% full\n")


def test_a_library_shows_what_its_user_lets_through():
    done = subprocess.run([sys.executable, "-c", f"import medllm_jax; {LOGS}"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "look here\n")

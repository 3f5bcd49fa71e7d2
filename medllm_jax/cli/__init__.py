"""`medllm`: one verb a subcommand. What a verb needs is imported inside it, so that `--help` is quick.

Exit codes: 0 done; 1 failure; 2 the input or the config is wrong.
"""

import sys
from collections.abc import Sequence

from medllm_jax.cli import data, exams, training
from medllm_jax.cli.parsing import Parser
from medllm_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    try:
        parser = make_parser()
        options, rest = parser.parse_known_args(arguments)
        if rest and not options.takes_settings:
            options.parser.unknown(rest)
        options.settings = rest
        return options.verb(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def make_parser() -> Parser:
    """The parser of `medllm` with all its verbs."""
    from medllm_jax import __version__

    about = "Qwen2.5 to a medical model: CPT, RPO and the exam, in JAX."
    parser = Parser(prog="medllm", allow_abbrev=False, description=about)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for room in (data, training, exams):
        room.add(verbs)
    return parser

"""The one exception that means "the input is wrong, and here is what would be right"."""


class UserError(Exception):
    """Wrong input or configuration: the command line prints the message as one line and exits with code 2.

    The message says what is wrong, where, and what would be right. It carries no traceback for the user, so it must
    be complete by itself.
    """


class RunError(Exception):
    """A run can't go on, and its input need not be wrong: the command line prints the message, and exits with 1."""


PREEMPTED = 42  # exit code of a program that was preempted after saving: start it again


class Preempted(Exception):  # noqa: N818 (no error)
    """A run got SIGTERM and saved what there was to save: exit code PREEMPTED, which asks for another start.

    The message says which step is saved.
    """

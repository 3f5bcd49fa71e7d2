"""The one exception that means "the input is wrong, and here is what would be right"."""


class UserError(Exception):
    """Wrong input or configuration: the command line prints the message as one line and exits with code 2.

    The message says what is wrong, where, and what would be right. It carries no traceback for the user, so it must
    be complete by itself.
    """

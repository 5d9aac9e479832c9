"""The one exception type for mistakes of the user."""


class UserError(ValueError):
    """What the user gave cannot work: the message names the thing, its value and the remedy.

    Commands print the message without a traceback and exit with code 2.
    """

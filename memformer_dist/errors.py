"""The one exception for what a user can put right: a field, a file, a command line."""


class UserError(ValueError):
    """A mistake of the user's. The message names the field or file, what was found and what was expected.

    The programs under launch/ and tokenizer/ print the message without a traceback and exit with code 2.
    """

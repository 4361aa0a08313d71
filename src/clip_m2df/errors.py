"""The one kind of error that a person can mend."""


class UserError(ValueError):
    """Something that the person running the program can mend.

    The message names the file, class or option at fault and says what to do; the command line prints it as it stands,
    without a traceback, and ends with status 2.
    """

"""The one exception that means: the input is wrong, and here is how to mend it; and its words."""


class InputError(ValueError):
    """Wrong input: the message names the argument, flag, field or file and the remedy.

    Functions raise it; scripts print it as one line and exit with status 2. Any other
    exception is a defect of jaxprune and keeps its traceback.
    """


def shown(text: str) -> str:
    """A text as an error of one line has it."""
    return text if text.isprintable() else repr(text)

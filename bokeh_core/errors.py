"""The one error a user is meant to read."""


class BokehError(ValueError):
    """Bad input, found before work starts. The message is a sentence: what was found, what was expected, what to do."""

"""What a user did that cannot be done."""


class UsageError(ValueError):
    """An argument, a file, a model or data cannot be used; the message names it, the rule, the value and the fix."""

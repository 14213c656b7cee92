"""Training."""


class NotLearnedError(RuntimeError):
    """One batch could not be learned."""

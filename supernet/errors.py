"""The one error that a user's configuration gets."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence per wrong key."""

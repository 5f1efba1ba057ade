"""The exceptions that mean "the user can fix this": wrong settings, wrong data."""


class LolcatsError(ValueError):
    """A mistake in what the user gave; the message says what was expected, what came and what to do."""


class ConfigError(LolcatsError):
    """A configuration file, recipe name or override that cannot be used."""


class DataError(LolcatsError):
    """A data source, record, template or token file that cannot be used."""


class NotFiniteError(LolcatsError):
    """A model that computes NaN or infinity."""

"""A user's mistake: the program answers it with one line on stderr, never with a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can put right. The message says in one line what, which value, and the remedy."""

    # A command line in another room recognises the error by this mark and need not import the class.
    is_user_error = True


class ConfigError(UserError):
    """A config.json that cannot be read or describes a model that is not supported."""


class CheckpointError(UserError):
    """Weights that cannot be read, or that do not fit the model."""


class SamplingError(RuntimeError):
    """A row of logits from which no token can be chosen: it holds NaN or +inf, or every token of it is banned."""

    is_user_error = True  # a dtype, checkpoint or stop_token_ids is to be changed: one line, no traceback

"""Typed access to the keys of a config.json. Every complaint is one line: file, key, value, what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from phase0_prototype.errors import ConfigError

REQUIRED: Final = object()  # "this key has no default": None cannot say so, for null is a value of its own


@dataclass(frozen=True)
class Fields:
    """A parsed config.json and the name to use for it in errors.

    A default is used where the key is absent. A key that is present and null gives None from the methods that say
    so, and is an error in the others.
    """

    raw: Mapping[str, Any]
    source: str

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raise the ConfigError for `key`; its value is taken from the file."""
        if key not in self.raw:
            raise ConfigError(f"{self.source}: {key} is missing: expected {expected}")
        raise ConfigError(f"{self.source}: {key} is {_short(self.raw[key])}: expected {expected}")

    def get(self, key: str, default: Any, expected: str) -> Any:
        """The value as it stands, or the default. Raises ConfigError when a required key is absent."""
        value = self.raw.get(key, default)
        if value is REQUIRED:
            self.fail(key, expected)
        return value

    def integer(self, key: str, default: Any = REQUIRED, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        expected = f"a whole number of at least {minimum}"
        value = self.get(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(key, expected)
        return value

    def integer_or_none(self, key: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        """A whole number of at least `minimum`; None where the key is null."""
        return None if self.raw.get(key, default) is None else self.integer(key, default, minimum=minimum)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number above zero."""
        expected = "a number above 0"
        value = self.get(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.fail(key, expected)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object; None where it is null or absent."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.fail(key, "an object or null")
        return value

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple; empty where the key is null."""
        value = self.raw.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            self.fail(key, "a token id, a list of token ids or null")
        return tuple(ids)


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file. Raises ConfigError when it is absent, not JSON or not an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give the directory of a Hugging Face checkpoint") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): download it again") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON (line {error.lineno}: {error.msg}): download it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}: expected an object")
    return raw


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."

"""How a checkpoint's makers want it sampled, where a request does not say: generation_config.json, as vLLM reads it."""

from __future__ import annotations

from pathlib import Path

from phase0_prototype.config_fields import read_json
from phase0_prototype.errors import ConfigError
from phase0_prototype.sampling_params import ParameterError, SamplingParams

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(directory: Path) -> dict[str, float]:
    """Those of `FIELDS` that the file has; none where there is no file.

    Raises:
        ConfigError: the file is broken, or has a value that sampling can't have.
    """
    file = directory / "generation_config.json"
    if not file.exists():
        return {}
    raw = read_json(file)
    found = {name: raw[name] for name in FIELDS if raw.get(name) is not None}
    try:
        SamplingParams.from_dict(found)
    except ParameterError as error:
        raise ConfigError(f"{file}: {error}") from None
    return found

"""generation_config.json: what is read of it, and that a server samples by it."""

from __future__ import annotations

import json
import shutil

import httpx
import pytest

from phase0_prototype.errors import ConfigError
from phase0_prototype.hub import SHIPPED
from phase4_scheduler.core.sampling_defaults import sampling_defaults
from phase4_scheduler.tests.served import served


def write(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_fields_of_sampling_are_read_and_others_are_not(tmp_path):
    assert sampling_defaults(tmp_path) == {}
    fields = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "min_p": None}
    written = write(tmp_path, **fields, eos_token_id=[1, 2], do_sample=True, max_new_tokens=9)
    assert sampling_defaults(written) == {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_p": "much"}, {"top_k": 0.5}], ids=str)
def test_values_that_can_not_be_are_one_line(fields, tmp_path):
    with pytest.raises(ConfigError, match=r"generation_config\.json: ") as refused:
        sampling_defaults(write(tmp_path, **fields))
    assert "\n" not in str(refused.value)


def test_a_server_samples_as_the_checkpoint_says(tmp_path):
    model = tmp_path / "greedy"
    shutil.copytree(SHIPPED["titan-tiny"], model)
    known = json.loads((model / "generation_config.json").read_text())
    write(model, **known, temperature=0.0)
    asked = {"prompt": "def main(", "max_tokens": 20, "ignore_eos": True}

    def texts(url, **more):
        answers = [httpx.post(f"{url}/v1/completions", json={**asked, **more}, timeout=60) for _ in range(2)]
        return {answer.json()["choices"][0]["text"] for answer in answers}

    with served(str(model), "--device", "cpu") as url:
        assert texts(url) == texts(url, temperature=0)
        assert texts(url, temperature=1.0, seed=1) != texts(url)

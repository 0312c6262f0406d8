"""A pytest plugin for hunts of planted bugs: hypothesis reports what it has found, and does not look for the smallest
example, which takes up to five minutes a test."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("hunt", phases=(Phase.explicit, Phase.generate))
settings.load_profile("hunt")

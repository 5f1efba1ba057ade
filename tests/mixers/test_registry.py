"""The table of mixers: each has a layer, a class of settings, and a place in the contract's tests."""

from __future__ import annotations

from lolcats.config import LinearizationConfig
from lolcats.config.mixers import MIXERS as SETTINGS_OF
from lolcats.mixers import MIXERS, Mixer
from lolcats.modeling.attention import ALIASES


def test_every_mixer_is_registered_with_its_settings() -> None:
    assert MIXERS.keys() == SETTINGS_OF.keys()
    for name, kind in MIXERS.items():
        assert issubclass(kind, Mixer) and kind.modes[0] == kind.targets[0] == "full"
        assert not {"softmax", *ALIASES} & {*kind.modes}, "names of the wrapper's own"
        config = LinearizationConfig(mixer=name)
        assert type(config) is SETTINGS_OF[name] and config.mixer == name
        assert config.in_words() and config.facts() and not config.without_text().starts_from_text

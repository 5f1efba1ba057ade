"""The mixers by the name that `linearization.mixer` has in a configuration.

Another mixer is an operation in `lolcats.ops`, a file here, a class of settings in `lolcats.config.mixers`, and a line
in each of the two tables. `tests/mixers` runs the contract over all of them.
"""

from __future__ import annotations

from typing import Any

from lolcats.mixers.base import Mixer, Sizes
from lolcats.mixers.blend import BlendMixer
from lolcats.mixers.hybrid import HybridMixer

MIXERS: dict[str, type[Mixer]] = {
    "hybrid": HybridMixer,
    "blend": BlendMixer,
}


def build_mixer(name: str, sizes: Sizes, **values: Any) -> Mixer:
    """The mixer of this name.

    Args:
        name: a key of `MIXERS`.
        sizes: of what arrives at the layer.
        values: the settings that are about the layer itself, as its class in `lolcats.config.mixers` names them.
    """
    return MIXERS[name].build(sizes, **values)

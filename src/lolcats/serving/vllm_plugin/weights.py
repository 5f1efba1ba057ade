"""The weights of a linearized model's folder for a model of vLLM: the family's own by their names, mixers' apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.modeling.old_names import new_name
from lolcats.serving.vllm_plugin.shard import Shard

MIXER, INNER = ".mixer.", ".inner."


class MixerWeights:
    """Takes mixers' tensors out of a stream of weights, and gives them to the mixers at its end."""

    def __init__(self) -> None:
        self._found: dict[int, dict[str, Tensor]] = {}

    def family(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights that are left, by the names that the family has for them without lolcats."""
        for saved, tensor in weights:
            name = new_name(saved)
            layer, is_mixer, rest = name.partition(MIXER)
            if is_mixer:
                self._found.setdefault(_layer_index(layer), {})[rest] = tensor.clone()
            else:
                yield name.replace(INNER, ".", 1), tensor

    def load(self, mixers: Mapping[int, nn.Module], whole: Mapping[int, nn.Module], shard: Shard) -> None:
        """Fill the mixers, by the index of their layers.

        Args:
            mixers: with the heads of this device.
            whole: the same with all heads, for their shapes.
            shard: which heads this device has.

        Raises:
            LolcatsError: tensors are missing, left over or of other shapes.
        """
        for index, mixer in mixers.items():
            found, expected = self._found.pop(index, {}), whole[index].state_dict()
            shapes = [{name: tuple(x.shape) for name, x in part.items()} for part in (found, expected)]
            if shapes[0] != shapes[1]:
                wrong = sorted(dict(shapes[0].items() ^ shapes[1].items()))
                raise LolcatsError(
                    f"the model's folder and its settings do not fit: of the mixer of layer {index}, {wrong[0]} is "
                    "missing, left over or of another shape"
                )
            parts = {name: shard.take(found[name], part.shape) for name, part in mixer.state_dict().items()}
            mixer.load_state_dict(parts)
        if self._found:
            raise LolcatsError(f"the folder has a mixer in layer {min(self._found)}, and its settings have none there")


def _layer_index(name: str) -> int:
    """`model.layers.3.self_attn` -> 3."""
    return next(int(part) for part in name.split(".") if part.isdigit())

"""From a supernet to the ordinary model that it is under one placement."""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import model_of, model_tensors, read_json
from ..config import ModelConfig
from ..errors import ConfigError
from ..loader import validate
from ..model import SupernetModel


def place(model: SupernetModel, placement: Sequence[str]) -> SupernetModel:
    """The ordinary model that a supernet is under one placement, as copies of its tensors.

    Its configuration is the supernet's with `placement` set: the mixers that no layer takes stay in
    the configuration, and have no tensors. Raises ConfigError where the model is no supernet, or
    the placement does not name one of its mixers for each layer.
    """
    if not model.config.is_supernet:
        raise ConfigError("placement takes a supernet; this model has one mixer in each layer")
    values = {**model.config.model_dump(), "placement": placement}
    config = validate(values, ModelConfig)
    tensors = {}
    for name, tensor in model_tensors(model).items():
        gate = model.gate_of(name)
        if gate is None:
            tensors[name] = tensor.clone()
        elif gate[1] == placement[gate[0]]:
            tensors[name.replace(f".mixers.{gate[1]}.", ".", 1)] = tensor.clone()
    return model_of(config, tensors)


def placement_of(
    given: tuple[str, ...] | Path | None, config: ModelConfig
) -> tuple[str, ...] | None:
    """The placement that was given by names, by one name for all layers, or in a search result.

    Raises ConfigError where what was given is neither a mixer's name nor a file.
    """
    if not isinstance(given, Path):
        return given
    if str(given) in config.mixers:
        return (str(given),) * config.num_layers
    if not given.exists():
        raise ConfigError(
            f"placement takes one of the mixers {list(config.mixers)}, a list of one for each "
            f"layer, or the file of a search result, got {str(given)!r}, and no such file is there"
        )
    return placement_of_result(given, config)


def placement_of_result(path: Path, config: ModelConfig) -> tuple[str, ...]:
    """The placement that a search result file found for a model of this configuration.

    Files that name no mixers, as Fast-LLM's, number the model's in declared order.
    """
    result = read_json(path)
    try:
        mixers = result["config"].get("mixers", list(config.mixers))
        assignments = result["final_configuration"]["layer_assignments"]
        found = {int(layer): mixers[mixer] for layer, mixer in assignments.items()}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"placement: {path} has no final_configuration.layer_assignments that gives "
            f"each layer one of the mixers {list(config.mixers)}"
        ) from error
    if sorted(found) != list(range(config.num_layers)):
        raise ConfigError(
            f"placement: {path} takes the model's {config.num_layers} layers, "
            f"got assignments for layers {sorted(found)}"
        )
    return tuple(found[layer] for layer in range(config.num_layers))

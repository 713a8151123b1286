"""Whether a pipeline may answer an equal input differently: because it samples.

Not here: who shares a computation if it does not (`submitting.py`).
"""

from __future__ import annotations

from serving_kit.models.pipes import Parameters, Pipe

_NOISE = "a model that makes sound may draw noise for every answer"


def sharing_obstacle(pipe: Pipe) -> str:
    """Why equal inputs of a pipeline never have the same answer, whatever the parameters; empty: they may."""
    return _NOISE if pipe.task == "text-to-audio" else ""


def samples(pipe: Pipe, parameters: Parameters) -> bool:
    """Whether it samples with the parameters of a call.

    The call's own `do_sample` counts, else the one that the pipeline was made with. Without either it samples
    if any of its defaults does, so that a default that is not in force errs on the side of sampling.
    """
    own = getattr(pipe, "_generate_kwargs", None) or {}
    for given in (parameters, pipe._forward_params, own):
        if (asked := given.get("do_sample")) is not None:
            return bool(asked)
    defaults = getattr(pipe, "_generation_defaults", None) or {}
    configs = (
        pipe._forward_params.get("generation_config"),
        own.get("generation_config"),
        getattr(pipe, "generation_config", None),
        getattr(pipe.model, "generation_config", None),
    )
    return bool(defaults.get("do_sample")) or any(getattr(each, "do_sample", False) for each in configs)

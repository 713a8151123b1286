"""The server's own copy of what a pipeline cannot share with the notebook: tokenizer, processors, modules.

    pipe ── tokenizer            pipe ── model ── modules ──┐
                                                            ├── the same parameters and buffers
    own ─── its own tokenizer    own ─── model ── modules ──┘    once in memory

A fast tokenizer keeps truncation and padding as state that every call sets anew. Two threads that call one
tokenizer get each other's, and wrong answers without an error. So the server always has its own.

The shortcuts (`mask_head.py`, `fast_linear.py`) hook and replace modules. The notebook's must not change, so
they are applied to other modules with shared weights. Weights that change in place reach both. A change to
the structure does not reach the server's modules, so `structure` tells whether there was one.

Not here: the shortcuts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving_kit.errors import StartError
from serving_kit.models.pipes import Pipe

if TYPE_CHECKING:
    import torch

_STATEFUL = ("tokenizer", "processor")
_PARTS = (*_STATEFUL, "feature_extractor", "image_processor", "video_processor")
_CALL_PARAMETERS = ("_preprocess_params", "_forward_params", "_postprocess_params", "_generate_kwargs")


def own_pipeline(pipe: Pipe, *, copied: bool = True) -> Pipe:
    """A pipeline around the same model with a tokenizer and processors of its own.

    Args:
        pipe: The given one.
        copied: False: nothing else calls it, so that the server may have its tokenizer and processors. A
            copy of a tokenizer takes 8 MB for 30,522 pieces.

    Raises:
        StartError: the tokenizer or the processor cannot be copied.
    """
    if not copied:
        return copy.copy(pipe)
    own, memo = copy.copy(pipe), {id(pipe.model): pipe.model}
    for name in _PARTS:
        part = getattr(pipe, name, None)
        if part is None:
            continue
        try:
            setattr(own, name, copy.deepcopy(part, memo))
        except Exception as error:
            if name not in _STATEFUL:
                continue  # it holds no state of a call
            raise StartError(
                f"the pipeline's {name} cannot be copied ({type(error).__name__}: {error}), and one that is "
                "shared with the notebook gives wrong answers. Serve a function that calls the pipeline"
            ) from error
    for name in _CALL_PARAMETERS:  # a stop sequence given to `pipeline()` brings the tokenizer with it
        if parameters := getattr(pipe, name, None):
            setattr(own, name, {key: memo.get(id(value), value) for key, value in parameters.items()})
    return own


def with_shared_weights(
    model: torch.nn.Module, replaced: Mapping[int, torch.Tensor] | None = None
) -> torch.nn.Module | None:
    """A model with modules of its own, sharing parameters and buffers with `model`; None if that cannot be.

    It cannot for what is no torch module, for a model whose forward was replaced by something that refers to
    its modules (quantised, split over devices), and for one with hooks, adapters or a compiled forward: those
    would be lost, or copied as they are now, and switching them later would have no effect.

    Args:
        model: The model; it is not changed.
        replaced: Tensors in place of some of its own, by the `id` of those.
    """
    import torch

    if not isinstance(model, torch.nn.Module) or getattr(model, "hf_quantizer", None) is not None:
        return None
    if any(_is_special(module) for module in model.modules()):
        return None
    shared = {id(each): each for each in itertools.chain(model.parameters(), model.buffers())}
    try:
        own = copy.deepcopy(model, {**shared, **(replaced or {})})
    except Exception:  # a part that cannot be copied: without shortcuts the answers are right too
        return None
    for module in own.modules():  # the library installs them again where they are needed
        vars(module).pop("_output_capturing_hooks_installed", None)
        for number, hook in list(module._forward_hooks.items()):
            if _captures(hook):
                del module._forward_hooks[number]
    return own


def structure(model: torch.nn.Module) -> int:
    """A number that changes when modules, hooks, parameters or buffers of a model are replaced or added.

    Values of parameters do not count. Any thread; a few microseconds for each module and parameter.
    """
    modules = [
        (id(each), type(each), _hooks(each), len(each._forward_pre_hooks), _is_special(each))
        for each in model.modules()
    ]
    return hash((tuple(modules), *map(id, model.parameters()), *map(id, model.buffers())))


def _hooks(module: torch.nn.Module) -> int:
    """How many forward hooks a module has that are not the library's own."""
    return sum(not _captures(hook) for hook in module._forward_hooks.values())


def _captures(hook: object) -> bool:
    """Whether a hook is one that transformers leaves once hidden states were asked for. It only looks."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _is_special(module: torch.nn.Module) -> bool:
    """Whether its forward is not the one of its class alone: hooks, compiled, replaced, adapters."""
    own = vars(module)
    if _hooks(module) or own.get("_forward_pre_hooks"):
        return True
    return own.get("_compiled_call_impl") is not None or any(
        name in own for name in ("forward", "_hf_hook", "peft_config", "_hf_peft_config_loaded")
    )

"""The last layer, computed only where its output is read.

A classification head reads the first token, fill-mask the masks. Before the last layer all tokens matter,
because it attends to all of them; behind it the others are of no use. So its queries, its output projection
and its feed-forward get the hidden states that are read, and only its keys and values those of all tokens:

    hidden (1, tokens, hidden) ── keys, values ─────────────┐
             └── read ──▶ (1, reads, hidden) ── queries ── attention ── the rest ──▶ (1, reads, hidden)

That saves about ten twelfths of one layer. Which modules make keys and values is found by where the
attention's inputs lie in memory. Where that does not tell, the layer computes everything and what is read is
taken from its output.

Not here: attention (`packed_attention.py`), whether the numbers are right (`packing_trial.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving_kit.models.packed_attention import Row, running

if TYPE_CHECKING:
    import torch


class LastLayer:
    """Hooks on the modules of the last layer. They act while a row is computed, and on no other forward.

    Args:
        layer: Its module.
        calls: How often that is called in a forward; the last call is the last layer.
        keys: What makes its keys; None: it computes all tokens.
        values: What makes its values.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        calls: int,
        keys: torch.nn.Module | None,
        values: torch.nn.Module | None,
    ) -> None:
        self._layer, self._calls = layer, calls
        self.cuts = keys is not None and values is not None
        self._handles = [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
        ]
        if keys is not None and values is not None:
            for module, name in ((keys, "keys"), (values, "values")):
                self._handles += [
                    module.register_forward_pre_hook(self._all_tokens),
                    module.register_forward_hook(self._keep(name)),
                ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def whole(self) -> LastLayer:
        """The same without leaving anything out: what is read is taken from the output of all tokens."""
        self.remove()
        return LastLayer(self._layer, self._calls, None, None)

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        row = running()
        if row is None or row.read is None:
            return None
        row.layer_calls += 1
        if row.layer_calls != self._calls or not self.cuts:
            return None
        row.hidden = args[0] if args else kwargs["hidden_states"]
        read = row.hidden[:, row.read]
        return ((read, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": read})

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        row = running()
        if row is None or row.read is None or row.layer_calls != self._calls:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if row.hidden is None:
            hidden = hidden[:, row.read]
        row.hidden = row.keys = row.values = None
        if row.each_alone:
            hidden = hidden.transpose(0, 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _all_tokens(self, module: torch.nn.Module, args: Any) -> Any:
        row = running()
        return None if row is None or row.hidden is None else (row.hidden,)

    def _keep(self, name: str) -> Callable[..., Any]:
        """A hook that keeps the output for all tokens, and passes on that for what is read."""

        def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> Any:
            row = running()
            if row is None or row.hidden is None:
                return None
            setattr(row, name, output)
            return output[:, row.read]

        return keep


def find_last_layer(model: torch.nn.Module, probe: Callable[[], Row]) -> LastLayer | None:
    """The last layer of a model; None: its modules are not in a list, so it is not known.

    Args:
        model: Its modules get hooks.
        probe: Runs one row, and returns it. All outputs are still read.
    """
    import torch

    paths = {module: path for path, module in model.named_modules()}
    attention = probe().module
    if attention is None or attention not in paths:
        return None
    parts = paths[attention].split(".")
    last = max((n for n, part in enumerate(parts) if part.isdigit()), default=None)
    if last is None:
        return None
    layer = model.get_submodule(".".join(parts[: last + 1]))
    made: dict[int, torch.nn.Module] = {}
    calls = before = 0

    def note(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        row = running()
        if row is not None and row.calls == before:  # later ones may take the memory over
            made[output.data_ptr()] = module

    def count(module: torch.nn.Module, args: object) -> None:
        nonlocal calls, before
        row = running()
        calls, before = calls + 1, 0 if row is None else row.calls
        made.clear()

    linears = [each for each in layer.modules() if isinstance(each, torch.nn.Linear)]
    handles = [each.register_forward_hook(note) for each in linears]
    handles.append(layer.register_forward_pre_hook(count))
    try:
        keys, values = (made.get(pointer) for pointer in probe().pointers)
    finally:
        for handle in handles:
            handle.remove()
    found = keys is not None and values is not None and keys is not values
    return LastLayer(layer, calls, keys if found else None, values if found else None)

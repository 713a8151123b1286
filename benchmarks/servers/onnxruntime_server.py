"""ONNX Runtime in fp32, with what its optimiser fuses, behind a bare Starlette route."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnxruntime
from common import arguments
from engine_answers import Answers, Arrays
from micro_batching import serve
from torch_source import torch_model

args = arguments()


def export(path: Path) -> None:
    """Write the ONNX file. The optimiser fuses layer norms; it does not find the attention."""
    import torch
    from onnxruntime.transformers import optimizer

    model, example = torch_model(args)
    plain = path.with_name("plain.onnx")
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    torch.onnx.export(
        model,
        kwargs=example,
        f=str(plain),
        input_names=list(example),
        dynamic_shapes={name: {0: batch, 1: tokens} for name in example},
        dynamo=True,
        external_data=False,
    )
    optimizer.optimize_model(str(plain), model_type="bert", num_heads=0, hidden_size=0).save_model_to_file(
        str(path)
    )


path = Path(args.model) / "model.onnx"
if not path.exists():
    export(path)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
wanted = [each.name for each in session.get_inputs()]


def run_model(arrays: Arrays) -> numpy.ndarray:
    return numpy.asarray(session.run(None, {name: arrays[name] for name in wanted})[0])


serve(Answers(args, run_model), args)

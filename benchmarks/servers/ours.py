"""serving_kit with its defaults, except for the timeout, which every server is given."""

import torch
from common import arguments, load, run

import serving_kit

args = arguments()
torch.set_num_threads(1)
if args.function:
    app = serving_kit.create_app(load(args).batch, timeout_ms=args.timeout_ms)
else:
    app = serving_kit.create_app(args.model, task=args.task, device="cpu", timeout_ms=args.timeout_ms)
run(app, args.port)

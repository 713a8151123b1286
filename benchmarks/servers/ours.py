"""serving_kit with its defaults, except for the timeout, which every server is given."""

import torch
from common import arguments, run

import serving_kit

args = arguments()
torch.set_num_threads(1)
run(serving_kit.create_app(args.model, task=args.task, device="cpu", timeout_ms=args.timeout_ms), args.port)

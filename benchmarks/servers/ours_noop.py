"""serving_kit around a function that returns its inputs: what the kit itself costs."""

from common import arguments, run

import serving_kit

args = arguments()


def echo(texts: list[str]) -> list[str]:
    return texts


run(serving_kit.create_app(echo, timeout_ms=args.timeout_ms), args.port)

"""mosec: HTTP in Rust, a worker in Python. Its wait is the default 10 ms."""

import os
from typing import Any

from common import answer, arguments, load
from mosec import Server, Worker

args = arguments()


class Pipeline(Worker):
    def __init__(self) -> None:
        self.pipe = load(args)

    def forward(self, data: Any) -> Any:
        if args.batch_size == 1:  # then it is the item itself
            return answer(self.pipe, [data])[0]
        return answer(self.pipe, data)


if __name__ == "__main__":
    os.environ["MOSEC_PORT"] = str(args.port)
    os.environ["MOSEC_ADDRESS"] = "127.0.0.1"
    os.environ["MOSEC_TIMEOUT"] = str(round(args.timeout_ms))
    os.environ["MOSEC_LOG_LEVEL"] = "error"
    server = Server()
    # The worker's own timeout kills the running batch; it is no deadline, so it is set high.
    server.append_worker(Pipeline, max_batch_size=args.batch_size, max_wait_time=10, timeout=30)
    server.run()

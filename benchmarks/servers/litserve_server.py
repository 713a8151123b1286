"""LitServe, with its own batching, its own request timeout, and otherwise its defaults."""

from typing import Any

import litserve
from common import answer, arguments, load
from starlette.responses import JSONResponse

args = arguments()


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.pipe = load(args)

    def predict(self, texts: Any) -> Any:
        if isinstance(texts, str):  # with max_batch_size=1 it is the item itself
            return answer(self.pipe, [texts])[0]
        return answer(self.pipe, texts)

    def encode_response(self, output: Any) -> JSONResponse:
        return JSONResponse(output)  # FastAPI would convert every number


if __name__ == "__main__":
    # Without a wait its worker polls on the core that the model needs.
    api = Api(max_batch_size=args.batch_size, batch_timeout=0.01 if args.batch_size > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=args.timeout_ms / 1000)
    server.run(
        host="127.0.0.1",
        port=args.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        timeout_keep_alive=60,
    )

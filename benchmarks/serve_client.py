"""A client of benchmarks/serve.py, in its own process and Python environment.

    python benchmarks/serve_client.py PORT REQUESTS SIZE CAMERA...

Sends observations with openpi's client if this Python has it, else with ours. Prints JSON: which client it
was, and the milliseconds of each request, as measured here and in the server. With 0 requests, it sends one
for each line of its input, and prints a line of JSON for each.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    port, count, size, *cameras = sys.argv[1:]
    try:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        policy = WebsocketClientPolicy("127.0.0.1", int(port))
        infer, width = policy.infer, len(policy.get_server_metadata()["spec"]["state_names"])
    except ImportError:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from common.client import RemotePolicy

        policy = RemotePolicy("127.0.0.1", int(port))
        width = len(policy.spec.state_names)

        def infer(observation):
            return {"actions": policy.act(observation), "server_timing": policy.last_timing}

    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 255, (int(size), int(size), 3), np.uint8) for camera in cameras}
    observation = {"images": images, "state": np.zeros(width, np.float32)}

    def measure(requests: int) -> str:
        seen, inside = [], []
        for _ in range(requests):
            start = time.perf_counter()
            answer = infer(observation)
            seen.append(1000 * (time.perf_counter() - start))
            inside.append(answer["server_timing"]["infer_ms"])
            assert np.isfinite(answer["actions"]).all()
        return json.dumps({"client": type(policy).__module__, "seen": seen, "inside": inside})

    measure(3)  # a warm-up
    if int(count):
        print(measure(int(count)))
    else:
        for _ in sys.stdin:
            print(measure(1), flush=True)


if __name__ == "__main__":
    main()

"""A client of benchmarks/serve.py, in its own process and Python environment.

    python benchmarks/serve_client.py PORT REQUESTS SIZE CAMERA...

Sends observations with openpi's client if this Python has it, else with ours. Prints JSON: which client it
was, and the milliseconds of each request, as measured here and in the server.
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
    observation, seen, inside = {"images": images, "state": np.zeros(width, np.float32)}, [], []
    for _ in range(int(count) + 3):  # the first three are a warm-up
        start = time.perf_counter()
        answer = infer(observation)
        seen.append(1000 * (time.perf_counter() - start))
        inside.append(answer["server_timing"]["infer_ms"])
        assert np.isfinite(answer["actions"]).all()
    print(json.dumps({"client": type(policy).__module__, "seen": seen[3:], "inside": inside[3:]}))


if __name__ == "__main__":
    main()

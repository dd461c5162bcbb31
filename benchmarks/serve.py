"""What a policy server costs and withstands, and whether the robot's loop keeps its rate.

    python benchmarks/serve.py runs/vfp-20260301-101500 --client-python ~/openpi/bin/python
    python benchmarks/serve.py runs/vfp-20260301-101500 --parts fuzz --minutes 10

For `--client-python`, make an environment with the packages openpi-client and typing-extensions (it needs
numpy < 2). Parts are independent: one that was cut off is measured again with `--parts`. Exit code 1 if the
server crashed, hung, or took a malformed request for an observation.
"""

import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import msgpack
import numpy as np
import tyro
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import wire
from common.config import UserPath, cli, options
from common.control import ControlLoop
from common.inference import load_policy

ROOT = Path(__file__).parents[1]
Part = Literal["overhead", "clients", "memory", "fuzz", "loop"]
HANG_SECONDS = 30.0
ROUNDS = 10


@options
class Config:
    """Measure a policy server on this machine."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder of a policy with three cameras, or as many as it has."""
    parts: tuple[Part, ...] = ("overhead", "clients", "memory", "fuzz", "loop")
    """What to measure."""
    client_python: UserPath = Path(sys.executable)
    """Python that sends the requests: one with openpi-client, or this one with our own client."""
    size: PositiveInt = 224
    """Height and width of the frames that are sent."""
    requests: PositiveInt = 1000
    """Requests of `overhead` and `clients`."""
    clients: PositiveInt = 8
    """Clients at once."""
    memory_requests: PositiveInt = 10_000
    """Requests over which the server's memory is watched."""
    minutes: PositiveFloat = 10.0
    """Of mutated messages."""
    loop_seconds: PositiveFloat = 60.0
    """Of the robot's loop at 50 Hz, with a policy that takes 60 ms."""
    seed: NonNegativeInt = 0
    """Of mutations."""


def main(config: Config) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # into a file, too
    good = True
    with served(config.run, config.clients) as (server, port, cameras):
        for part in (part for part in config.parts if part != "loop"):
            good &= {"overhead": overhead, "clients": clients, "memory": memory, "fuzz": fuzz}[part](
                config, server, port, cameras
            )
    if "loop" in config.parts:
        keep_rate(config.loop_seconds)
    sys.exit(0 if good else 1)


@contextmanager
def served(run: Path, most: int) -> Iterator[tuple[subprocess.Popen, int, list[str]]]:
    """A server in a process of its own, with its port and the policy's cameras."""
    command = [
        sys.executable,
        str(ROOT / "serve.py"),
        str(run),
        "--port",
        "0",
        "--max-clients",
        str(most + 1),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        print(line.strip())
        port = int(line.split()[0].rpartition(":")[2])
        with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
            cameras = wire.unpack(connection.recv())["spec"]["cameras"]
        try:
            yield server, port, cameras
        finally:
            server.terminate()
            print(server.stdout.read().strip())


def requests(config: Config, port: int, cameras: list[str], count: int) -> subprocess.Popen:
    command = [
        config.client_python,
        ROOT / "benchmarks" / "serve_client.py",
        port,
        count,
        config.size,
        *cameras,
    ]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)


def answers(client: subprocess.Popen) -> dict[str, Any]:
    out, _ = client.communicate()
    if client.returncode:
        raise SystemExit(f"a client failed with code {client.returncode}")
    return json.loads(out)


def overhead(config: Config, server: subprocess.Popen, port: int, cameras: list[str]) -> bool:
    """A request beside `policy.act` in this process, in turns, so that a busy machine slows both alike."""
    policy, rng = load_policy(config.run, device="cpu"), np.random.default_rng(0)
    images = {camera: rng.integers(0, 255, (config.size, config.size, 3), np.uint8) for camera in cameras}
    observation = {"images": images, "state": np.zeros(policy.state_dim, np.float32)}
    local, remote, differences = [], [], []
    for turn in range(ROUNDS + 1):
        here = []
        for _ in range(math.ceil(config.requests / ROUNDS)):
            start = time.perf_counter()
            policy.act(observation)
            here.append(1000 * (time.perf_counter() - start))
        found = answers(requests(config, port, cameras, math.ceil(config.requests / ROUNDS)))
        if turn:  # the first turn warms up
            local, remote = local + here, remote + found["seen"]
            differences.append(statistics.median(found["seen"]) - statistics.median(here))
    print(
        f"overhead, {len(remote)} requests of {len(cameras)} frames {config.size}x{config.size} by "
        f"{found['client']}: median {statistics.median(remote):.2f} ms, policy.act "
        f"{statistics.median(local):.2f} ms; difference {statistics.median(differences):.2f} ms (median of "
        f"{ROUNDS} turns, {min(differences):.2f} to {max(differences):.2f})"
    )
    return True


def clients(config: Config, server: subprocess.Popen, port: int, cameras: list[str]) -> bool:
    """Several clients at once beside one alone, which does the same number of requests."""
    seconds, each = {}, math.ceil(config.requests / config.clients)
    for num in (1, config.clients):
        start = time.perf_counter()
        sending = [requests(config, port, cameras, each * config.clients // num) for _ in range(num)]
        found = [answers(client) for client in sending]
        seconds[num] = time.perf_counter() - start
        medians = ", ".join(f"{statistics.median(one['seen']):.1f}" for one in found)
        print(f"{num} clients: {seconds[num]:.1f} s with their start, median ms of each {medians}")
    return True


def memory(config: Config, server: subprocess.Popen, port: int, cameras: list[str]) -> bool:
    """The server's memory before and after many requests, and on the way."""
    part, sizes = math.ceil(config.memory_requests / ROUNDS), []
    for _ in range(ROUNDS):
        answers(requests(config, port, cameras, part))
        sizes.append(resident(server.pid))
    shown = ", ".join(f"{size:.1f}" for size in sizes)
    print(
        f"memory, MiB after each {part} requests: {shown}; growth after the first {sizes[-1] - sizes[0]:.1f}"
    )
    return True


def resident(pid: int) -> float:
    """MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


# Mutated messages

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2**63,
        1.5,
        math.nan,
        math.inf,
        "x",
        "\ud800".encode("utf-8", "surrogatepass"),
    ),
    *(b"", [], {}, [[]], {"a": {}}, [math.nan], "images", b"__ndarray__"),
    *(
        np.zeros(shape, dtype)
        for shape in ((), (0,), (1, 1, 3), (0, 5, 3), (2, 2, 3))
        for dtype in ("u1", "f8")
    ),
)


def fuzz(config: Config, server: subprocess.Popen, port: int, cameras: list[str]) -> bool:
    """Mutated messages until the time is over; what came of them."""
    dice, found, end = random.Random(config.seed), Counter(), time.monotonic() + 60 * config.minutes
    with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
        width = len(wire.unpack(connection.recv())["spec"]["state_names"])
    frame = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(16, 16, 3)
    valid = {"images": dict.fromkeys(cameras, frame), "state": np.zeros(width, np.float32)}
    while time.monotonic() < end and server.poll() is None:
        with (
            suppress(ConnectionClosed),
            connect(f"ws://127.0.0.1:{port}", proxy=None, compression=None, max_size=None) as connection,
        ):
            connection.recv(HANG_SECONDS)
            found["connections"] += 1
            for _ in range(200):
                message = mutated(valid, dice)
                found[outcome(connection, message, cameras, width)] += 1
                if found["hang"]:
                    break
            if outcome(connection, wire.pack(valid), cameras, width) != "chunk":
                found["valid, not answered"] += 1
            if dice.random() < 0.2:  # go away in the middle of a frame, or send none
                connection.socket.sendall(dice.randbytes(dice.randrange(1, 300)))
                connection.socket.close()
        if found["hang"]:
            break
    died = server.poll() is not None
    print(f"fuzz, {config.minutes:g} min: {dict(found)}; the server {'died' if died else 'lives'}")
    return not (died or found["hang"] or found["malformed, answered"] or found["valid, not answered"])


def mutated(valid: dict, dice: random.Random) -> bytes:
    """A message with some of its bytes changed, or some of its values."""
    if dice.random() < 0.5:
        return wire.pack(replaced(valid, dice))
    data = bytearray(wire.pack(valid))
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        place = dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(min(len(data), 120))
        what = dice.randrange(5)
        if what == 0:
            data[place] ^= 1 << dice.randrange(8)
        elif what == 1:
            data[place] = dice.randrange(256)
        elif what == 2:
            data[place:place] = dice.randbytes(dice.randrange(1, 9))
        elif what == 3:
            del data[place : place + dice.randrange(1, 9)]
        else:
            del data[place:]
        data = data or bytearray(1)
    return bytes(data)


def replaced(value: Any, dice: random.Random) -> Any:
    """A map with one of its values, at any depth, replaced, renamed or left out."""
    if not isinstance(value, dict) or not value or dice.random() < 0.1:
        return dice.choice(ODD)
    changed, name = dict(value), dice.choice(list(value))
    what = dice.randrange(4)
    if what == 0:
        del changed[name]
    elif what == 1:
        changed[dice.choice(("x", "reset", "prefix", "prompt", b"__ndarray__", b"__npgeneric__"))] = (
            dice.choice(ODD)
        )
    else:
        changed[name] = replaced(value[name], dice)
    return changed


def outcome(connection: Any, message: bytes, cameras: list[str], width: int) -> str:
    connection.send(message)
    try:
        answer = connection.recv(HANG_SECONDS)
    except TimeoutError:
        return "hang"
    if isinstance(answer, str):
        return "sentence"
    if "actions" not in wire.unpack(answer):
        return "reset"
    return "chunk" if well_formed(message, cameras, width) else "malformed, answered"


def well_formed(message: bytes, cameras: list[str], width: int) -> bool:
    """Whether a message is an observation, judged without the server's code.

    Extra values do no harm, as long as they are no prefix and no task of another kind.
    """
    try:
        seen = msgpack.unpackb(message)
        frames, state = seen["images"], seen["state"]
        names = sorted(name.removeprefix("cam_") for name in frames)
        if (
            names != sorted(cameras)
            or seen.get("prefix") is not None
            or seen.get("reset", False) not in (0, 1)
        ):
            return False
        for task in (seen.get("task"), seen.get("prompt")):
            if not isinstance(task, str | None):
                return False
        for frame in frames.values():
            shape = frame[b"shape"]
            sides = len(shape) == 3 and 3 in (shape[2], shape[0]) and min(shape) > 0
            if np.dtype(frame[b"dtype"]) != np.uint8 or not sides or math.prod(shape) != len(frame[b"data"]):
                return False
        if isinstance(state, dict):
            state = np.frombuffer(state[b"data"], state[b"dtype"]).reshape(state[b"shape"])
        with np.errstate(over="ignore", invalid="ignore"):
            state = np.asarray(state)
            return (
                state.dtype.kind in "biuf"
                and state.shape == (width,)
                and np.isfinite(np.float32(state)).all()
            )
    except Exception:  # garbage can fail in any way
        return False


# The robot's loop


def keep_rate(seconds: float) -> None:
    """`ControlLoop` at 50 Hz, with a policy that takes 60 ms and knows prefixes."""
    names = tuple(f"joint_{i}" for i in range(14))
    spec = SimpleNamespace(
        fps=50, action_offset=0, action_rotations=None, max_delay=6, state_names=names, action_names=names
    )

    def act(observation, prefix=None):
        time.sleep(0.06)
        begin = observation["state"] if prefix is None else prefix[0]
        return begin + 0.01 * np.arange(32, dtype=np.float32)[:, None]

    place = np.zeros(14, np.float32)
    robot = SimpleNamespace(
        observe=lambda: {"images": {}, "state": place.copy()},
        send=lambda action: place.__setitem__(slice(None), action),
        reset=lambda: None,
    )
    policy = SimpleNamespace(horizon=32, spec=spec, act=act, reset=lambda: None)
    print(f"the loop\n{ControlLoop(policy, robot, rate=50).run(seconds)}")


if __name__ == "__main__":
    cli(main, Config)

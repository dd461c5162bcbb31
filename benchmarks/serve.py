"""The costs and robustness of a policy server, and whether the robot's loop keeps its rate.

    python benchmarks/serve.py runs/vfp-20260301-101500 --openpi ~/openpi  # half an hour, on an idle machine
    python benchmarks/serve.py runs/vfp-20260301-101500 --parts loop       # only late cycles

Parts measured with the same options are not measured again: results are kept in the run's folder
`evaluation`, and written to docs/robots.md. Exit code 1 if the server crashed, hung, or accepted a malformed
request as an observation.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import msgpack
import numpy as np
import tyro
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.methods import insert
from common import wire
from common.checkpoint import find, read_settings
from common.config import UserPath, cli, options
from common.control import ControlLoop
from common.data.workers import cores
from common.errors import UserError
from common.files import read_json, write_json
from common.inference import load_policy

ROOT = Path(__file__).parents[1]
Part = Literal["overhead", "clients", "memory", "fuzz", "loop"]
HANG_SECONDS = 30.0
ROUNDS = 10
WARM_UP = 20


@options
class Config:
    """Measure a policy server on this machine."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder of a policy with any number of cameras."""
    parts: tuple[Part, ...] = ("overhead", "clients", "memory", "fuzz", "loop")
    """What to measure."""
    openpi: UserPath | None = None
    """Folder of a Python environment whose openpi client sends the requests; created if missing. Default: our
    own client sends them."""
    size: PositiveInt = 224
    """Height and width of the frames that are sent."""
    requests: PositiveInt = 1000
    """Requests of `overhead` and `clients`."""
    clients: PositiveInt = 8
    """Clients at once."""
    memory_requests: PositiveInt = 10_000
    """Requests over which the server's memory is watched."""
    minutes: PositiveFloat = 10.0
    """Minutes of mutated messages."""
    loop_seconds: PositiveFloat = 60.0
    """Seconds of the robot's loop at 50 Hz, with a policy that takes 60 ms."""
    seed: NonNegativeInt = 0
    """Seed of the mutations."""
    out: UserPath = ROOT / "docs"
    """Folder for robots.md."""


def main(config: Config) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # also when it is a file
    path = config.run / "evaluation" / "serve.json"
    made_with = {n: str(x) for n, x in asdict(config).items() if n not in ("run", "parts", "out")}
    made_with["checkpoint"] = find(config.run).name
    found = read_json(path) if path.is_file() else {}
    left = [
        part for part in config.parts if found.get(part, {}) | made_with | {"good": True} != found.get(part)
    ]
    python = sys.executable if config.openpi is None else python_with_openpi(config.openpi)
    measures = {"overhead": overhead, "clients": clients, "memory": memory, "fuzz": fuzz, "loop": keep_rate}
    with served(config.run, config.clients) if set(left) - {"loop"} else nullcontext() as server:
        for part in left:
            good, text = measures[part](config, server, python)
            print(text)
            found[part] = made_with | {"good": good, "text": text}
            path.parent.mkdir(exist_ok=True)
            write_json(path, found)
    where = f"A policy of `{read_settings(find(config.run))['script']}`, on {cores()} cores:"
    texts = [found[part]["text"] for part in measures if part in found]
    insert(config.out / "robots.md", "\n".join([where, "", *(f"- {text}" for text in texts)]))
    sys.exit(0 if all(part["good"] for part in found.values()) else 1)


def python_with_openpi(folder: Path) -> str:
    """The Python of an environment with openpi's client, which needs numpy < 2."""
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "openpi-client", "typing-extensions"]
    there = Path(python).exists() and not subprocess.call([python, "-c", "import openpi_client"])
    for command in () if there else ([sys.executable, "-m", "venv", str(folder)], install):
        if subprocess.call(command):
            raise UserError(f"`{' '.join(command)}` failed: leave out --openpi to send with our own client.")
    return python


@contextmanager
def served(run: Path, most: int) -> Iterator["Served"]:
    """A server in its own process."""
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
            yield Served(server, port, cameras)
        finally:
            server.terminate()
            print(server.stdout.read().strip())


class Served(NamedTuple):
    process: subprocess.Popen
    port: int
    cameras: list[str]
    """The policy's cameras."""


def requests(config: Config, server: Served, python: str, count: int) -> subprocess.Popen:
    client = ROOT / "benchmarks" / "serve_client.py"
    command = [python, client, server.port, count, config.size, *server.cameras]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([str(word) for word in command], **pipes, text=True)


def answers(client: subprocess.Popen) -> dict[str, Any]:
    out, _ = client.communicate()
    if client.returncode:
        raise SystemExit(f"a client failed with code {client.returncode}")
    return json.loads(out)


def overhead(config: Config, server: Served, python: str) -> tuple[bool, str]:
    """Compare each request with a `policy.act` in this process just before, so that noise strikes both."""
    policy, rng = load_policy(config.run, device="cpu"), np.random.default_rng(0)
    images = {
        camera: rng.integers(0, 255, (config.size, config.size, 3), np.uint8) for camera in server.cameras
    }
    observation = {"images": images, "state": np.zeros(policy.state_dim, np.float32)}
    local, remote, inside = [], [], []
    with requests(config, server, python, 0) as client:
        for _ in range(config.requests + WARM_UP):
            start = time.perf_counter()
            policy.act(observation)
            local.append(1000 * (time.perf_counter() - start))
            client.stdin.write("\n")
            client.stdin.flush()
            found = json.loads(client.stdout.readline())
            remote += found["seen"]
            inside += found["inside"]
    local, remote, inside = (np.array(times[WARM_UP:]) for times in (local, remote, inside))
    more, outside = remote - local, remote - inside
    low, high = np.percentile(more, (25, 75))
    text = (
        f"A request of {len(images)} frames {config.size}x{config.size} by `{found['client']}` takes "
        f"{np.median(more):.2f} ms more than `policy.act` just before (median of {len(more):,}, half of them "
        f"between {low:.2f} and {high:.2f}): {np.median(remote):.2f} instead of {np.median(local):.2f} ms. "
        f"{np.median(outside):.2f} ms of it are outside the server's own time."
    )
    return True, text


def clients(config: Config, server: Served, python: str) -> tuple[bool, str]:
    """Several clients at once, compared with one client that sends as many requests in all."""
    seconds, medians, each = {}, {}, math.ceil(config.requests / config.clients)
    for num in (1, config.clients):
        start = time.perf_counter()
        sending = [requests(config, server, python, each * config.clients // num) for _ in range(num)]
        found = [answers(client) for client in sending]
        seconds[num] = time.perf_counter() - start
        medians[num] = [statistics.median(one["seen"]) for one in found]
    most = config.clients
    text = (
        f"{most} clients at once get {each * most:,} answers in {seconds[most]:.1f} s with their start, one "
        f"client as many in {seconds[1]:.1f} s. Their medians are {min(medians[most]):.1f} to "
        f"{max(medians[most]):.1f} ms; that of one client is {medians[1][0]:.1f} ms."
    )
    return True, text


def memory(config: Config, server: Served, python: str) -> tuple[bool, str]:
    """The server's memory at several points during many requests."""
    part, sizes = math.ceil(config.memory_requests / ROUNDS), []
    for _ in range(ROUNDS):
        answers(requests(config, server, python, part))
        sizes.append(resident(server.process.pid))
    text = (
        f"The server's memory after every {part:,} of {part * ROUNDS:,} requests, in MiB: "
        f"{', '.join(f'{size:.0f}' for size in sizes)}."
    )
    return True, text


def resident(pid: int) -> float:
    """Resident memory of a process, in MiB."""
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


EXTRA = ("x", "reset", "prefix", "prompt", "task", "watch", "step", b"__ndarray__", b"__npgeneric__")
"""Names that are added to a message."""


def fuzz(config: Config, server: Served, python: str) -> tuple[bool, str]:
    """Send mutated messages until the time is over; count the outcomes."""
    port, cameras = server.port, server.cameras
    dice, found, end = random.Random(config.seed), Counter(), time.monotonic() + 60 * config.minutes
    with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
        width = len(wire.unpack(connection.recv())["spec"]["state_names"])
    frame = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(16, 16, 3)
    valid = {"images": dict.fromkeys(cameras, frame), "state": np.zeros(width, np.float32)}
    while time.monotonic() < end and server.process.poll() is None:
        with (
            suppress(ConnectionClosed),
            connect(f"ws://127.0.0.1:{port}", proxy=None, compression=None, max_size=None) as connection,
        ):
            connection.recv(HANG_SECONDS)
            found["connections"] += 1
            for _ in range(200):
                message = mutated(valid, dice)
                found[outcome(connection, message, cameras, width)] += 1
                if found["hang"] or found["connection lost"]:
                    break
            if outcome(connection, wire.pack(valid), cameras, width) != "chunk":
                found["valid, not answered"] += 1
            if dice.random() < 0.2:  # disconnect in the middle of a websocket frame, or send garbage
                connection.socket.sendall(dice.randbytes(dice.randrange(1, 300)))
                connection.socket.close()
        if found["hang"] or found["connection lost"]:
            break
    died = server.process.poll() is not None
    bad = {
        name: found[name]
        for name in ("hang", "connection lost", "malformed, answered", "valid, not answered")
    }
    text = (
        f"{config.minutes:g} minutes of mutated messages, over {found['connections']:,} connections: "
        f"{found['sentence']:,} got an error message, {found['chunk']:,} were still observations and got "
        f"a chunk, {found['reset']:,} reset an episode, {found['watched']:,} were only watched; "
        f"{', '.join(f'{name}: {n}' for name, n in bad.items())}; server {'died' if died else 'survived'}."
    )
    return not (died or any(bad.values())), text


def mutated(valid: dict, dice: random.Random) -> bytes:
    """A message with some of its bytes or values changed."""
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
    """A map with one of its values, at any depth, replaced, added or removed."""
    if not isinstance(value, dict) or not value or dice.random() < 0.1:
        return dice.choice(ODD)
    changed, name = dict(value), dice.choice(list(value))
    what = dice.randrange(4)
    if what == 0:
        del changed[name]
    elif what == 1:
        changed[dice.choice(EXTRA)] = dice.choice(ODD)
    else:
        changed[name] = replaced(value[name], dice)
    return changed


def outcome(connection: Any, message: bytes, cameras: list[str], width: int) -> str:
    try:
        connection.send(message)
        answer = connection.recv(HANG_SECONDS)
    except TimeoutError:
        return "hang"
    except ConnectionClosed:
        return "connection lost"
    if isinstance(answer, str):
        return "sentence"
    answer = wire.unpack(answer)
    if "reset" in answer:
        return "reset"
    if not well_formed(message, cameras, width):
        return "malformed, answered"
    return "chunk" if "actions" in answer else "watched"


def well_formed(message: bytes, cameras: list[str], width: int) -> bool:
    """Whether a message is an observation, judged without the server's code.

    Extra values are harmless, except a prefix or a task that is not a string.
    """
    try:
        seen = msgpack.unpackb(message)
        frames, state = seen["images"], seen["state"]
        names = sorted(name.removeprefix("cam_") for name in frames)
        if (
            names != sorted(cameras)
            or seen.get("prefix") is not None
            or not isinstance(seen.get("reset", False), bool)
            or not isinstance(seen.get("watch", False), bool)
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


def keep_rate(config: Config, server: None, python: str) -> tuple[bool, str]:
    """`ControlLoop` at 50 Hz, with a policy that takes 60 ms and supports prefixes."""
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
    report = ControlLoop(policy, robot, rate=50).run(config.loop_seconds)
    print(report)
    late, held = (100 * n / max(report.cycles, 1) for n in (report.late, report.held))
    behind = 1000 * np.quantile(report.behind, 0.99)
    text = (
        f"`ControlLoop` at 50 Hz with a policy that takes 60 ms, for {report.seconds:.0f} s: "
        f"{report.reached:.2f} cycles a second, {late:.2f} % late, {held:.2f} % held; 99 of 100 commands "
        f"were sent within {behind:.1f} ms of their time."
    )
    return True, text


if __name__ == "__main__":
    cli(main, Config)

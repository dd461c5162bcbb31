"""A policy server: robots send observations and receive chunks of actions.

    python serve.py runs/vfp-20260301-101500
    python serve.py runs/vfp-20260301-101500 --host 0.0.0.0 --api-key-file ~/policy.key

It speaks the protocol of openpi's server (websockets, msgpack with numpy arrays): a robot with openpi's
client needs nothing else, others use `common/client.py`. docs/robots.md describes the messages.

All clients share one model, and each has its own episode. One thread computes one request at a time. A faulty
request gets a sentence in reply; its connection and all others stay usable.
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
import asyncio
import errno
import hmac
import ipaddress
import logging
import math
import signal
import socket
import statistics
import time
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from common.config import UserPath, cli, options
from common.console import say
from common.errors import UserError
from common.inference import RobotPolicy, load_policy

try:
    from websockets.asyncio.server import ServerConnection
    from websockets.asyncio.server import serve as serve_websockets
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Request, Response

    from common import wire
except ImportError as error:
    raise SystemExit(
        f"error: {error.name} is missing: pip install -r requirements-robot.txt, which a policy server needs."
    ) from None

SEND_SECONDS = 10.0  # for a client to receive an answer
PING_SECONDS = 20.0  # between pings, and for each reply
CLOSE_SECONDS = 5.0
KEPT_EPISODES = 100
GOING_AWAY, TRY_LATER = 1001, 1013  # codes for closing a connection (RFC 6455)
LONGEST_TASK = 10_000  # characters
STATE_NAMES = ("state", "observation/state", "observation.state")


@options
class Config:
    """Serve a trained policy to robots."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "last"
    """`last`, or the number of a saved step."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of this machine, which needs --api-key-file."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 for any free one."""
    api_key_file: UserPath | None = None
    """File with the key that clients must send. It is sent in clear text: use a tunnel in shared networks."""
    max_clients: PositiveInt = 8
    """Most clients at once; the server refuses further ones."""
    max_message_mb: PositiveInt = 32
    """Largest message, in MiB; the client of a larger one is disconnected."""
    sample_steps: PositiveInt | None = None
    """Integration steps (default: the number that the run was configured with)."""
    clip: bool = False
    """Keep every action within the range recorded in training."""
    compile: bool = False
    """Compile the policy with torch.compile: start-up takes minutes longer, chunks are faster."""
    precision: Literal["no", "bf16"] = "no"
    """`bf16` computes in half precision."""
    text_encoder: str | None = None
    """Where the text encoder of the instructions is, if it has moved; it is loaded for new sentences only."""
    seed: NonNegativeInt | None = None
    """Make sampled actions repeatable: each client's first episode has the same noise, and so on. Default:
    new noise every time."""


def main(config: Config) -> None:
    key = read_key(config)
    listener = open_socket(config, key)  # before the policy is loaded: the port may be in use
    options = {"compile": config.compile, "precision": config.precision, "text_encoder": config.text_encoder}
    policy = load_policy(config.run, config.checkpoint, seed=config.seed, **options)
    asyncio.run(serve(Server(policy, config, key), listener))


async def serve(server: "Server", listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, which lets requests in flight finish; a second one stops immediately."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    await server.warm_up()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.run(listener)
    say(f"stopped; {server.requests} requests were answered")


def read_key(config: Config) -> str | None:
    path = config.api_key_file
    if path is None:
        return None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} cannot be read ({error}): write a key into it.") from None
    if not key or not key.isprintable():
        raise UserError(f"--api-key-file {path} holds no key: write one line of letters and digits into it.")
    return key


def open_socket(config: Config, key: str | None) -> socket.socket:
    """A bound socket at the requested address, which does not listen yet."""
    where = f"--host {config.host} --port {config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {config.host} is not an address ({error}): try 127.0.0.1.") from None
    family, _, _, _, address = found[0]
    if key is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise UserError(
            f"--host {config.host} can be reached by others, who could move your robot: give "
            f"--api-key-file, or listen on 127.0.0.1 and use a tunnel."
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise cannot_listen(where, error) from None
    return listener


def cannot_listen(where: str, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"{where}: the port is in use: choose another, or stop the program that uses it.")
    return UserError(f"{where}: cannot listen there ({error.strerror}): choose another address or port.")


class Server:
    """Answers requests until a signal comes; see the module."""

    def __init__(self, policy: RobotPolicy, config: Config, key: str | None = None):
        self.policy, self.config, self.key = policy, config, key
        self.clients = self.requests = 0
        self.episodes: dict[str, RobotPolicy] = {}  # of clients that may connect again
        self.latency = math.nan  # milliseconds for a chunk
        self.stopping = asyncio.Event()
        # One thread for all computation: compiled code and OpenMP keep state per thread.
        self.worker = ThreadPoolExecutor(1, "inference")

    async def warm_up(self) -> None:
        """Compute some chunks until everything is compiled and cached."""

        def act() -> list[float]:
            policy = self.policy.fork()
            observation, chunk = policy.blank_observation(), None
            # Most requests have a prefix if any can; other code may be compiled for it.
            for has_prefix in (False, True) if policy.spec.max_delay else (False,):
                times = []
                for _ in range(8):
                    start, prefix = time.perf_counter(), chunk[:1] if has_prefix else None
                    chunk = policy.act(observation, self.config.sample_steps, prefix=prefix)
                    times.append(1000 * (time.perf_counter() - start))
            return times

        times = await asyncio.get_running_loop().run_in_executor(self.worker, act)
        self.latency = statistics.median(times[3:])

    async def run(self, listener: socket.socket) -> None:
        """Report that the server is ready; serve until `stopping` is set and open requests are answered."""
        logging.getLogger("websockets").setLevel(logging.CRITICAL)  # no tracebacks for clients' garbage
        limits = {"max_size": self.config.max_message_mb * 2**20, "max_queue": 1, "compression": None}
        life = {"ping_interval": PING_SECONDS, "ping_timeout": PING_SECONDS, "close_timeout": CLOSE_SECONDS}
        browsers = {"origins": [None], "server_header": None}  # a page must not move a robot
        try:
            server = await serve_websockets(
                self.handle, sock=listener, process_request=self.admit, **limits, **life, **browsers
            )
        except OSError as error:
            raise cannot_listen(f"--host {self.config.host} --port {self.config.port}", error) from None
        host, port = listener.getsockname()[:2]
        say(f"ws://{f'[{host}]' if ':' in host else host}:{port} {self.in_words()}")
        await self.stopping.wait()
        server.close(close_connections=False)  # `handle` closes them, after their answers
        await server.wait_closed()
        self.worker.shutdown()

    def in_words(self) -> str:
        spec, state = self.policy.spec, self.policy.spec.recorded_names[0]
        history = f" of the last {spec.proprio_history} steps" if spec.proprio_history > 1 else ""
        step = ", the step" if spec.image_history > 1 else ""
        return (
            f"serves {self.config.run}, {self.policy.checkpoint.name}, on {self.policy.device}: "
            f"{self.policy.horizon} actions for {spec.fps:g} Hz in {self.latency:.1f} ms; an observation "
            f"holds images {', '.join(spec.cameras)} (RGB, uint8){step} and the state{history}: "
            f"{', '.join(state)}"
        )

    def metadata(self) -> dict[str, Any]:
        """The message to a client that connects."""
        state, actions = self.policy.spec.recorded_names
        spec = self.policy.spec.to_json() | {"state_names": state, "action_names": actions}
        del spec["backbone_config"]
        script, run = self.policy.script.__name__, self.config.run.resolve().name
        about = {"script": script, "run": run, "step": self.policy.trained_steps}
        return {**about, "horizon": self.policy.horizon, "spec": spec}

    def admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer requests other than for a connection, and refuse clients that cannot be served."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self.key is not None:
            given = request.headers.get_all("Authorization")
            wanted = f"Api-Key {self.key}"
            if len(given) != 1 or not hmac.compare_digest(
                given[0].encode("utf-8", "replace"), wanted.encode()
            ):
                return connection.respond(
                    HTTPStatus.UNAUTHORIZED,
                    "The key is missing or wrong: send `Authorization: Api-Key KEY`.\n",
                )
        if self.stopping.is_set() or self.clients >= self.config.max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.full()}.\n")
        return None

    def full(self) -> str:
        if self.stopping.is_set():
            return "The server stops: try again later"
        return f"There are {self.clients} clients, and --max-clients allows no more: try again later"

    async def handle(self, connection: ServerConnection) -> None:
        """Serve one client from admission until it leaves."""
        if self.clients >= self.config.max_clients:  # several were admitted simultaneously
            await connection.close(TRY_LATER, self.full())
            return
        self.clients += 1
        stopping = asyncio.create_task(self.stopping.wait())
        try:
            episode = self.episode_of(connection)
            await connection.send(wire.pack(self.metadata()))
            while await self.answer_next(connection, episode, stopping):
                pass
            await connection.close(GOING_AWAY, "the server stops")
        except ConnectionClosed:
            pass
        except TimeoutError:  # the client does not read: answers would pile up
            connection.transport.abort()
        finally:
            stopping.cancel()
            self.clients -= 1

    def episode_of(self, connection: ServerConnection) -> RobotPolicy:
        """A new episode, or that of the same client whose connection was lost."""
        named = connection.request.headers.get_all(wire.EPISODE)
        if not named:
            return self.policy.fork()
        episode = self.episodes.pop(named[0], None) or self.policy.fork()
        self.episodes[named[0]] = episode
        if len(self.episodes) > KEPT_EPISODES:
            self.episodes.pop(next(iter(self.episodes)))  # of the client that connected longest ago
        return episode

    async def answer_next(
        self, connection: ServerConnection, episode: RobotPolicy, stopping: asyncio.Task
    ) -> bool:
        """Answer a client's next request; False if the server stops before there is one."""
        receiving = asyncio.create_task(connection.recv())
        await asyncio.wait({receiving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            receiving.cancel()
            return False
        message, arrived = receiving.result(), time.perf_counter()
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self.worker, self.answer, message, episode, arrived)
        async with asyncio.timeout(SEND_SECONDS):
            await connection.send(answer)
        self.requests += 1
        return not stopping.done()

    def answer(self, message: bytes | str, episode: RobotPolicy, arrived: float) -> bytes | str:
        """The reply to a message: a chunk, or a sentence that says what is wrong with the message."""
        try:
            start = time.perf_counter()
            answer = self.infer(message, episode)
            timing = {"infer_ms": time.perf_counter() - start, "wait_ms": start - arrived}
            return wire.pack(answer | {"server_timing": {name: 1000 * s for name, s in timing.items()}})
        except (ValueError, UserError) as error:
            return f"{error}"
        except Exception as error:  # our fault, or the machine's: other clients must not suffer
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return f"The server failed on this request; its log says where ({reason})."

    def infer(self, message: bytes | str, episode: RobotPolicy) -> dict[str, Any]:
        """The answer to a message; ValueError if it holds no observation that the policy can act on."""
        if isinstance(message, str):
            raise ValueError("a request is a binary message: an observation, in msgpack")
        request = wire.unpack(message)
        if not isinstance(request, dict):
            raise ValueError(f"a request is a map of names to values, not a {type(request).__name__}")
        resets = request.pop("reset", False)
        if resets is True:
            episode.reset()
        elif resets is not False:
            raise ValueError("reset is true or false")
        if resets and not request:
            return {"reset": True}
        watches = request.pop("watch", False)
        if not isinstance(watches, bool):
            raise ValueError("watch is true or false")
        observation, prefix = observation_in(request), prefix_in(request, episode)
        if watches:
            episode.watch(observation)
            return {"watched": True}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            actions = episode.act(observation, self.config.sample_steps, self.config.clip, **prefix)
        heard = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
        return {"actions": actions} | ({"warnings": heard} if heard else {})


def observation_in(request: Mapping[str, Any]) -> dict[str, Any]:
    """The observation in a request, in the form for `RobotPolicy.act`.

    Frames are below `images`, or next to the state under their own names; (H, W, 3), or (3, H, W) as in
    openpi's ALOHA. The instruction is `task`, or `prompt`.
    """
    names = [name for name in STATE_NAMES if name in request]
    images = request.get("images")
    if images is None:
        images = {name: x for name, x in request.items() if isinstance(x, np.ndarray) and x.ndim == 3}
    if not names or not isinstance(images, dict) or not images:
        there = ", ".join(str(name)[:40] for name in list(request)[:20]) or "nothing"
        raise ValueError(f"an observation holds images, a map of names to frames, and state; got {there}")
    if not all(isinstance(name, str) and isinstance(x, np.ndarray) for name, x in images.items()):
        raise ValueError("images maps the names of cameras to arrays")
    observation = {"images": {name: upright(x) for name, x in images.items()}}
    observation["state"] = numbers(request[names[0]], "the state")
    named = next((key for key in ("task", "prompt") if key in request), None)
    if named is not None:
        task = request[named]
        if not isinstance(task, str | None):
            raise ValueError(f"a task is a text, not a {type(task).__name__}")
        if len(task or "") > LONGEST_TASK:
            raise ValueError(f"a task has at most {LONGEST_TASK:,} characters; got {len(task):,}")
        observation["task"] = task
    return observation | ({"step": request["step"]} if "step" in request else {})


def upright(frame: np.ndarray) -> np.ndarray:
    """A frame as (H, W, 3), also if it was (3, H, W)."""
    channels_first = frame.ndim == 3 and frame.shape[0] == 3 and frame.shape[2] != 3
    return frame.transpose(1, 2, 0) if channels_first else frame


def numbers(given: Any, what: str) -> np.ndarray:
    """Numbers of a request as float32, infinite if they do not fit."""
    try:
        values = np.asarray(given)
    except ValueError:  # lists of different lengths
        values = np.array(None)
    if values.dtype.kind not in wire.NUMBERS:
        raise ValueError(f"{what} is an array of numbers")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def prefix_in(request: Mapping[str, Any], episode: RobotPolicy) -> dict[str, np.ndarray]:
    """Actions that will be executed in the meantime, if any, as an argument of `RobotPolicy.act`."""
    if request.get("prefix") is None:
        return {}
    most, width = episode.spec.max_delay, len(episode.spec.recorded_names[1])
    prefix = numbers(request["prefix"], "the prefix")
    if prefix.ndim != 2 or prefix.shape[1] != width or not np.isfinite(prefix).all():
        raise ValueError(f"the prefix is an array of finite numbers (d, {width}), got {prefix.shape}")
    if len(prefix) > most:
        raise ValueError(f"a prefix has at most {most} actions with this policy; got {len(prefix)}")
    return {"prefix": prefix} if len(prefix) else {}


if __name__ == "__main__":
    cli(main, Config)

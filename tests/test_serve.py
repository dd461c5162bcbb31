"""The policy server: valid requests of robots, and how it handles anything else."""

import asyncio
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import train

pytest.importorskip("websockets")
pytest.importorskip("msgpack")
import msgpack
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.sync.client import connect
from websockets.sync.server import serve as serve_websockets

import serve
import train_naive_fm
import train_vfp
from benchmarks import serve as benchmark
from common import wire
from common.client import RemotePolicy, ServerGone
from common.control import ControlLoop
from common.errors import UserError
from common.inference import load_policy
from common.instructions import Instructions

ROOT = Path(serve.__file__).parent
CAMERAS = ("head", "left", "right")
PATIENCE = 60.0  # seconds, enough on a busy machine


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    return train(train_vfp, tiny, tmp_path_factory.mktemp("runs") / "run", "--steps", "1")


@contextmanager
def served(run_dir, key=None, change=lambda policy: None, **options):
    """A server in a thread of this process, with `change` applied to its policy; yields it and its port."""
    policy = load_policy(run_dir, device="cpu", seed=0)
    change(policy)
    config = serve.Config(run_dir, port=0, **options)
    listener, server = serve.open_socket(config, key), serve.Server(policy, config, key)
    started, loops = threading.Event(), []

    async def run():
        loops.append(asyncio.get_running_loop())
        await server.warm_up()
        started.set()
        await server.run(listener)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(PATIENCE)

    def stop():
        with suppress(RuntimeError):  # already stopped, its loop is closed
            loops[0].call_soon_threadsafe(server.stopping.set)

    server.stop = stop
    port = listener.getsockname()[1]
    while True:  # until it listens
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    try:
        yield server, port
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(run_dir):
    """A server shared by all tests: nothing that a client does may harm it."""
    with served(run_dir) as (_, port):
        yield port


@contextmanager
def client(port, **options):
    with connect(
        f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None, **options
    ) as connection:
        connection.about = wire.unpack(connection.recv(PATIENCE))
        yield connection


def refused(port, status, **options):
    with pytest.raises(InvalidStatus, match=status), client(port, **options):
        pass


def observation(seed=0, size=(32, 32)):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 255, (*size, 3), np.uint8) for camera in CAMERAS}
    return {"images": images, "state": rng.normal(size=3).astype(np.float32)}


def ask(connection, request):
    connection.send(request if isinstance(request, bytes | str) else wire.pack(request))
    answer = connection.recv(PATIENCE)
    return answer if isinstance(answer, str) else wire.unpack(answer)


@pytest.fixture
def bystander(port):
    """Another client, which acts before and after a test and must notice nothing."""
    with client(port) as connection:
        ask(connection, {"reset": True})
        yield connection
        assert ask(connection, observation())["actions"].shape == (4, 3)


def test_a_client_gets_what_the_policy_gives(run_dir, port):
    policy, seen = load_policy(run_dir, device="cpu", seed=0), observation(size=(48, 64))
    expected = [policy.act(seen) for _ in range(2)]
    with client(port) as connection:
        spec = connection.about["spec"]
        assert (connection.about["horizon"], spec["cameras"]) == (4, list(CAMERAS))
        assert spec["state_names"] == list(policy.spec.state_names)
        assert spec["action_names"] == list(policy.spec.action_names)
        assert connection.about["step"] == 1
        answers = [ask(connection, seen) for _ in range(2)]
    with served(run_dir, seed=0) as (_, port), client(port) as connection, client(port) as other:
        for chunk in expected:
            np.testing.assert_array_equal(ask(connection, seen)["actions"], chunk)
        np.testing.assert_array_equal(ask(other, seen)["actions"], expected[0])  # its own episode
        ask(connection, {"reset": True})
        assert not np.array_equal(ask(connection, seen)["actions"], expected[0])  # the second episode
        np.testing.assert_array_equal(ask(other, seen)["actions"], expected[1])  # which was not reset
    for answer in answers:
        assert answer["actions"].dtype == np.float32
        assert answer["server_timing"]["infer_ms"] > 0


def test_observations_as_robots_of_openpi_have_them(run_dir):
    seen = observation()
    with served(run_dir) as (_, port), client(port) as first, client(port) as second, client(port) as third:
        expected = ask(first, seen)["actions"]
        aloha = {f"cam_{name}": frame.transpose(2, 0, 1) for name, frame in seen["images"].items()}
        answer = ask(second, {"images": aloha, "state": seen["state"].tolist(), "prompt": "fold the towel"})
        np.testing.assert_array_equal(answer["actions"], expected)
        flat = {f"observation/cam_{name}": frame for name, frame in seen["images"].items()}
        answer = ask(third, flat | {"observation/state": seen["state"].astype(np.float64)})
        np.testing.assert_allclose(answer["actions"], expected, rtol=1e-5)


def changed(**changes):
    return observation() | changes


def images(**changes):
    return changed(images=observation()["images"] | changes)


WRONG = {
    "another camera": (images(tail=np.zeros((4, 4, 3), np.uint8)), "needs the cameras head, left, right"),
    "a camera less": (changed(images={"head": np.zeros((4, 4, 3), np.uint8)}), "needs the cameras"),
    "floats": (images(left=np.zeros((32, 32, 3), np.float32)), "camera left must be (H, W, 3) uint8"),
    "one channel": (images(left=np.zeros((32, 32, 1), np.uint8)), "camera left must be (H, W, 3) uint8"),
    "no pixels": (images(left=np.zeros((0, 32, 3), np.uint8)), "camera left gave a frame without pixels"),
    "a frame of text": (images(left="abc"), "images maps the names of cameras to arrays"),
    "NaN": (changed(state=np.array([0, np.nan, 0])), "the state holds NaN or infinity"),
    "too large for float32": (changed(state=np.array([0, 1e300, 0])), "the state holds NaN or infinity"),
    "a long state": (changed(state=np.zeros(7)), "state must have shape (3,), got (7,)"),
    "a state of words": (changed(state=["a", "b", "c"]), "the state is an array of numbers"),
    "a ragged state": (changed(state=[[1, 2], [3]]), "the state is an array of numbers"),
    "no state": ({"images": observation()["images"]}, "an observation holds images"),
    "nothing": ({}, "got nothing"),
    "a list": ([1, 2], "a request is a map of names to values, not a list"),
    "text": ("hello", "a request is a binary message"),
    "reset by a number": ({"reset": 1}, "reset is true or false"),
    "a task of bytes": (changed(task=b"fold"), "a task is a text"),
    "a prefix": (changed(prefix=np.zeros((1, 3))), "a prefix has at most 0 actions"),
    "a wide prefix": (changed(prefix=np.zeros((1, 4))), "the prefix is an array of finite numbers (d, 3)"),
    "garbage": (bytes(range(256)), "the message is not msgpack"),
    "an empty message": (b"", "the message is not msgpack"),
    "half a message": (wire.pack(observation())[:-100], "the message is not msgpack"),
    "two messages": (2 * msgpack.packb({"reset": True}), "the message is not msgpack"),
    "deep nesting": (b"\x91" * 100_000, "the message is not msgpack"),
    "many values": (msgpack.packb([0] * 100_001), "more than 100,000 values"),
    "an array that is promised": (b"\xdd\xff\xff\xff\xff", "more than 100,000 values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_cannot_be_answered_gets_a_sentence(port, bystander, case):
    request, words = WRONG[case]
    with client(port) as connection:
        answer = ask(connection, request)
        assert isinstance(answer, str)
        assert words in answer
        assert "\n" not in answer
        assert ask(connection, observation())["actions"].shape == (4, 3)  # it stays usable


def test_the_benchmark_knows_what_is_malformed():
    """`benchmarks/serve.py` judges answers to mutated messages without the server's code."""
    dice, found = random.Random(0), set()
    assert benchmark.well_formed(wire.pack(observation()), CAMERAS, 3)
    assert benchmark.well_formed(wire.pack(changed(state=[1, 2, 3.5], prompt="fold")), CAMERAS, 3)
    for name, (request, _) in WRONG.items():
        if name != "text":
            message = request if isinstance(request, bytes) else wire.pack(request)
            assert not benchmark.well_formed(message, CAMERAS, 3), name
    for _ in range(300):
        found.add(benchmark.well_formed(benchmark.mutated(observation(size=(4, 4)), dice), CAMERAS, 3))
    assert found == {True, False}


def array(dtype, data=bytes(8), shape=(1,)):
    return msgpack.packb({"state": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


@pytest.mark.parametrize(
    "message",
    [
        *(array(dtype) for dtype in ("|O", "O8", "|V8", "<U2", "|S8", "<M8[s]", "c8", "u4,u4")),
        *(array(dtype) for dtype in ("x", "", 3, None)),
        array("<f8", shape=(2,)),
        array("<f8", shape=(-1,)),
        array("<f8", shape=(2**62, 2**62)),
        array("<f8", shape="1"),
        array("<f8", shape=(1.0,)),
        array("<f8", shape=(1,) * 40),
        array("<f8", data="text"),
        msgpack.packb({"state": {b"__ndarray__": True}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f8"}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": [1], b"dtype": "<f8"}}),
        msgpack.packb({"state": msgpack.ExtType(5, b"12345678")}),
        msgpack.packb({"state": msgpack.Timestamp(2**40, 0)}),
    ],
    ids=str,
)
def test_nothing_but_arrays_of_numbers_is_taken(port, message):
    with client(port) as connection:
        assert isinstance(ask(connection, message), str)
        assert ask(connection, {"reset": True})["reset"] is True


def test_a_far_state_is_said_to_the_client_that_sent_it(port, bystander):
    with client(port) as connection:
        answer = ask(connection, changed(state=np.array([0, 1e6, 0])))
        assert "standard deviations outside the range" in answer["warnings"][0]
        assert "warnings" not in ask(bystander, observation())
    with closing(RemotePolicy("127.0.0.1", port)) as policy, pytest.warns(UserWarning, match="outside the"):
        chunk = policy.act(changed(state=np.array([0, 1e6, 0])))
    chunk[:, 0] = 0  # as with `load_policy`, what was received can be changed


def test_a_message_of_four_gigabytes_ends_its_own_connection_alone(port, bystander):
    with client(port) as connection:
        # A frame that announces 4 GB, masked as a client's frames are (RFC 6455, section 5.2).
        connection.socket.sendall(b"\x82\xff" + (2**32).to_bytes(8, "big") + bytes(4))
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.recv(PATIENCE)


def test_a_client_that_goes_away_in_the_middle_of_a_frame(port, bystander):
    for _ in range(10):
        with client(port) as connection:
            connection.socket.sendall(b"\x82\xff" + (2**20).to_bytes(8, "big") + bytes(1000))
            connection.socket.close()
    for garbage in (os.urandom(1000) + b"\r\n\r\n", b"GET / HT", b""):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(garbage)


def test_a_client_that_never_reads_is_dropped(run_dir, monkeypatch):
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.3)
    big = np.zeros((500_000, 3), np.float32)

    def answer_much(policy):
        policy.fork = lambda: policy
        policy.act = lambda *arguments, **options: big

    with served(run_dir, change=answer_much) as (server, port):
        silent = socket.create_connection(("127.0.0.1", port))
        with connect(f"ws://127.0.0.1:{port}", sock=silent, max_size=None, max_queue=1) as connection:
            with suppress(ConnectionClosed):
                for _ in range(10):  # 60 MB of answers
                    connection.send(wire.pack(observation()))
                    time.sleep(0.05)
            with client(port) as other:
                assert ask(other, observation())["actions"].shape == big.shape
            deadline = time.monotonic() + PATIENCE
            while server.clients and time.monotonic() < deadline:
                time.sleep(0.05)
            assert server.clients == 0


def test_two_clients_are_answered_in_turns(port):
    results: dict[int, list] = {}

    def run(name):
        with client(port) as connection:
            results[name] = [ask(connection, observation())["actions"] for _ in range(20)]

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for name in range(1, 4):  # each has the noise of its own episode
        np.testing.assert_array_equal(results[name], results[0])


def test_clients_that_are_too_many_are_turned_away_until_one_leaves(run_dir):
    with served(run_dir, max_clients=2) as (_, port):
        with client(port), client(port):
            refused(port, "503")
            with pytest.raises(UserError, match="--max-clients allows no more"):
                RemotePolicy("127.0.0.1", port)
        time.sleep(0.2)
        with client(port) as connection:
            assert ask(connection, {"reset": True})["reset"]


def test_a_mistake_of_ours_is_said_and_the_server_lives(run_dir, capfd):
    def fail(policy):
        policy.fork = lambda: policy
        policy.broken = False

        def act(seen, *arguments, **options):
            if policy.broken:
                raise RuntimeError("kaput")
            return np.zeros((4, 3), np.float32)

        policy.act = act

    with served(run_dir, change=fail) as (server, port), client(port) as connection:
        server.policy.broken = True
        assert "kaput" in ask(connection, observation())
        server.policy.broken = False
        assert ask(connection, observation())["actions"].shape == (4, 3)
    assert "Traceback" in capfd.readouterr().err


def test_only_those_with_the_key_get_in(run_dir):
    with served(run_dir, key="sesame") as (_, port):
        for headers in ({}, {"Authorization": "Api-Key sesam"}, {"Authorization": "sesame"}):
            refused(port, "401", additional_headers=headers)
        refused(port, "401", additional_headers=[("Authorization", "Api-Key sesame")] * 2)
        with pytest.raises(UserError, match="The key is missing or wrong"):
            RemotePolicy("127.0.0.1", port, api_key="other")
        with closing(RemotePolicy("127.0.0.1", port, api_key="sesame\n")) as policy:  # read from a file
            assert policy.act(observation()).shape == (4, 3)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert (answer.status, answer.read()) == (200, b"OK\n")


def test_pages_in_a_browser_are_refused(port):
    refused(port, "403", origin="http://evil.example")


def test_where_it_may_listen(tmp_path):
    key = tmp_path / "key"
    for content, words in ((None, "cannot be read"), (b"\n", "holds no key"), (b"\xff", "cannot be read")):
        if content is not None:
            key.write_bytes(content)
        with pytest.raises(UserError, match=words):
            serve.read_key(serve.Config(tmp_path, api_key_file=key))
    key.write_text("sesame\n")
    assert serve.read_key(serve.Config(tmp_path, api_key_file=key)) == "sesame"
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match=f"--host {host} can be reached by others"):
            serve.open_socket(serve.Config(tmp_path, host=host, port=0), None)
    serve.open_socket(serve.Config(tmp_path, host="0.0.0.0", port=0), "sesame").close()
    serve.open_socket(serve.Config(tmp_path, host="localhost", port=0), None).close()
    with pytest.raises(UserError, match=r"--host no\.such\.host.invalid is not an address"):
        serve.open_socket(serve.Config(tmp_path, host="no.such.host.invalid"), None)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="the port is in use"),
    ):
        serve.main(serve.Config(tmp_path, port=taken.getsockname()[1]))


def test_a_run_without_a_policy(tmp_path):
    with pytest.raises(UserError, match="checkpoint"):
        serve.main(serve.Config(tmp_path, port=0))


def slowly(seconds, begun=None):
    """Make a policy slow once it is warm; `begun` is set when a request is in flight."""

    def change(policy):
        policy.fork = lambda: policy
        act, warm = policy.act, iter(range(8))

        def slow(*arguments, **options):
            if next(warm, None) is None:
                if begun is not None:
                    begun.set()
                time.sleep(seconds)
            return act(*arguments, **options)

        policy.act = slow

    return change


def test_a_server_that_stops_answers_what_it_has(run_dir):
    begun = threading.Event()
    change = slowly(1.0, begun)
    with served(run_dir, change=change) as (server, port), client(port) as busy, client(port) as idle:
        busy.send(wire.pack(observation()))
        assert begun.wait(PATIENCE)
        server.stop()
        assert wire.unpack(busy.recv(PATIENCE))["actions"].shape == (4, 3)
        for connection in (busy, idle):
            with pytest.raises(ConnectionClosed, match="1001"):
                connection.recv(PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_sigterm_ends_the_program_with_code_0(run_dir):
    command = [sys.executable, str(ROOT / "serve.py"), str(run_dir), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert "an observation holds images head, left, right (RGB, uint8) and the state: " in line
        port = int(line.split()[0].rpartition(":")[2])
        with client(port) as connection:
            assert ask(connection, observation())["actions"].shape == (4, 3)
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == "stopped; 1 requests were answered\n"
    assert process.returncode == 0


def test_sigterm_lets_the_request_in_flight_finish(run_dir):
    options = ["--port", "0", "--sample-steps", "300", "--clip", "--seed", "3"]
    command = [sys.executable, str(ROOT / "serve.py"), str(run_dir), *options]
    wanted = load_policy(run_dir, device="cpu", seed=3).fork().act(observation(), 300, clip=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().split()[0].rpartition(":")[2])
        with client(port) as connection:
            connection.send(wire.pack(observation()))
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            np.testing.assert_allclose(wire.unpack(connection.recv(PATIENCE))["actions"], wanted, rtol=1e-4)
            with pytest.raises(ConnectionClosed, match="the server stops"):
                connection.recv(PATIENCE)
    assert process.returncode == 0


def wait_until_lost(policy):
    while policy._connection.state is not State.CLOSED:
        time.sleep(0.01)


def test_a_remote_policy_finds_its_server_again(run_dir):
    with served(run_dir) as (_, port):
        policy = RemotePolicy("127.0.0.1", port, timeout=PATIENCE)
        assert (policy.horizon, tuple(policy.spec.cameras)) == (4, CAMERAS)
        assert [tuple(names) for names in policy.spec.recorded_names] == list(
            load_policy(run_dir, device="cpu").spec.recorded_names
        )
        assert policy.act(observation()).shape == (4, 3)
        assert policy.last_timing["infer_ms"] > 0
        with pytest.raises(ValueError, match="needs the cameras"):
            policy.act({"images": {"tail": np.zeros((4, 4, 3), np.uint8)}, "state": np.zeros(3)})
    wait_until_lost(policy)
    for _ in range(2):
        with pytest.raises(ServerGone, match="does not answer as a policy server"):
            policy.act(observation())
    with served(run_dir, change=slowly(1.0)) as (_, port):
        policy.url = f"ws://127.0.0.1:{port}"
        policy.reset()
        policy._timeout = 0.2
        with pytest.raises(ServerGone, match=r"no answer in 0\.2 s"):
            policy.act(observation())
        policy._timeout = PATIENCE
        assert policy.act(observation()).shape == (4, 3)
        policy.close()


def test_a_connection_that_was_lost_while_the_robot_was_idle_costs_no_request(run_dir):
    with served(run_dir) as (_, port):
        policy = RemotePolicy("127.0.0.1", port)
    wait_until_lost(policy)
    with served(run_dir) as (_, port), closing(policy):
        policy.url = f"ws://127.0.0.1:{port}"
        policy.reset()
        assert policy.act(observation()).shape == (4, 3)


def test_an_episode_goes_on_after_a_lost_connection(run_dir):
    local = load_policy(run_dir, device="cpu", seed=0).fork()
    with served(run_dir) as (server, port), closing(RemotePolicy("127.0.0.1", port)) as policy:
        for _ in range(3):
            np.testing.assert_allclose(policy.act(observation()), local.act(observation()), rtol=1e-5)
            policy._connection.socket.close()
            policy.close()
        with closing(RemotePolicy("127.0.0.1", port)) as other:  # has an episode of its own
            assert not np.allclose(other.act(observation()), local.act(observation()))
        for _ in range(serve.KEPT_EPISODES):
            with client(port, additional_headers={wire.EPISODE: secrets.token_hex(4)}):
                pass
        assert len(server.episodes) == serve.KEPT_EPISODES


@pytest.mark.parametrize("where", ["act", "connect"])
def test_an_interrupted_request_does_not_answer_the_next(run_dir, monkeypatch, where):
    def interrupted(self, timeout=None):
        time.sleep(0.5)  # meanwhile, the answer comes
        monkeypatch.undo()
        raise KeyboardInterrupt

    local = load_policy(run_dir, device="cpu", seed=0).fork()
    with served(run_dir) as (_, port), closing(RemotePolicy("127.0.0.1", port)) as policy:
        if where == "connect":
            policy.close()
        monkeypatch.setattr("websockets.sync.client.ClientConnection.recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.act(observation(seed=1))
        if where == "act":
            local.act(observation(seed=1))  # the server has answered it, and nobody heard
        np.testing.assert_allclose(policy.act(observation()), local.act(observation()), rtol=1e-5)


def test_a_server_that_comes_back_with_another_policy_is_refused(run_dir, delayed):
    with served(run_dir) as (_, port):
        policy = RemotePolicy("127.0.0.1", port)
        policy.close()
    with served(delayed) as (_, port):
        policy.url = f"ws://127.0.0.1:{port}"
        for _ in range(2):
            with pytest.raises(UserError, match="serves another policy than before: make a new client"):
                policy.act(observation())


@pytest.mark.parametrize("differs", ["run", "step"])
def test_another_policy_with_the_same_inputs_is_refused(run_dir, tmp_path, differs):
    with served(run_dir) as (_, port):
        policy = RemotePolicy("127.0.0.1", port)
        policy.close()
    other = shutil.copytree(run_dir, tmp_path / "other") if differs == "run" else run_dir
    with served(other, change=lambda policy: setattr(policy, "trained_steps", 1 + (differs == "step"))) as (
        _,
        port,
    ):
        policy.url = f"ws://127.0.0.1:{port}"
        with pytest.raises(UserError, match="serves another policy than before: make a new client"):
            policy.act(observation())


def test_a_server_that_does_not_read_is_gone():
    """A request that does not fit into the buffers of the network must not wait forever."""
    listener = socket.create_server(("127.0.0.1", 0))

    def greet():
        raw, protocol = listener.accept()[0], ServerProtocol(max_size=None)
        while not protocol.data_to_send():
            protocol.receive_data(raw.recv(4096))
            for request in protocol.events_received():
                protocol.send_response(protocol.accept(request))
                protocol.send_binary(wire.pack({"horizon": 4, "spec": {}}))
                raw.sendall(b"".join(protocol.data_to_send()))
                return raw  # and nothing is read any more

    with listener, ThreadPoolExecutor(1) as pool:
        greeted = pool.submit(greet)
        policy = RemotePolicy("127.0.0.1", listener.getsockname()[1], timeout=0.5)
        with greeted.result():
            start = time.monotonic()
            with pytest.raises(ServerGone, match="is gone"):
                policy.act({"images": {"head": np.zeros((4000, 4000, 3), np.uint8)}, "state": np.zeros(3)})
            assert time.monotonic() - start < PATIENCE / 2


def test_another_server_that_speaks_the_protocol():
    """openpi's own server does not say what its policy needs."""
    hello = lambda connection: connection.send(wire.pack({"name": "pi0"}))  # noqa: E731
    with serve_websockets(hello, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(UserError, match="does not say what its policy needs"):
                RemotePolicy("127.0.0.1", server.socket.getsockname()[1])
        finally:
            server.shutdown()
            thread.join()


def test_what_the_instructions_mean_is_not_sent(run_dir):
    policy = load_policy(run_dir, device="cpu")
    tasks = Instructions(("fold", "stack"), "some/encoder", table=torch.zeros(2, 1, 8))
    policy.spec = replace(policy.spec, tasks=tasks)
    about = wire.unpack(wire.pack(serve.Server(policy, serve.Config(run_dir)).metadata()))
    assert list(about["spec"]["tasks"]["sentences"]) == ["fold", "stack"]


def test_no_instruction_and_none_at_all_are_told_apart():
    seen = {"images": {"head": np.zeros((4, 4, 3), np.uint8)}, "state": np.zeros(2, np.float32)}
    assert "task" not in serve.observation_in(seen)
    assert serve.observation_in({**seen, "task": None})["task"] is None  # whichever the policy likes
    assert serve.observation_in({**seen, "prompt": "fold"})["task"] == "fold"


def test_a_task_that_is_no_sentence_is_refused(port, bystander):
    with client(port) as connection:
        assert ask(connection, changed(task="x" * 10**6)) == (
            "a task has at most 10,000 characters; got 1,000,000"
        )


def test_an_observation_that_is_too_large_is_said(run_dir):
    with served(run_dir, max_message_mb=1) as (_, port), closing(RemotePolicy("127.0.0.1", port)) as policy:
        with pytest.raises(ValueError, match="larger than --max-message-mb"):
            policy.act(observation(size=(1000, 1000)))
        assert policy.act(observation()).shape == (4, 3)


def test_who_comes_while_the_server_stops_is_told_so(run_dir):
    with served(run_dir, change=slowly(1.0)) as (server, port), client(port) as connection:
        connection.send(wire.pack(observation()))
        time.sleep(0.2)
        server.stop()
        time.sleep(0.2)
        assert server.full() == "The server stops: try again later"
        assert wire.unpack(connection.recv(PATIENCE))["actions"].shape == (4, 3)


@pytest.fixture(scope="module")
def delayed(tiny, tmp_path_factory):
    """A policy that is told what the robot executes while a chunk is computed."""
    folder = tmp_path_factory.mktemp("delayed") / "run"
    return train(train_naive_fm, tiny, folder, "--steps", "1", "--max-delay", "2")


def test_a_prefix_reaches_the_policy(delayed):
    prefix, warmed = np.array([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]], np.float32), []

    def note(policy):
        act = policy.act
        policy.act = lambda *given, prefix=None, **more: (
            warmed.append(prefix) or act(*given, prefix=prefix, **more)
        )

    local = load_policy(delayed, device="cpu", seed=0).fork()
    with served(delayed) as (_, port), closing(RemotePolicy("127.0.0.1", port)) as policy:
        chunk = policy.act(observation(), prefix)
    np.testing.assert_allclose(chunk[:2], prefix, rtol=1e-5)
    np.testing.assert_allclose(chunk, local.act(observation(), prefix=prefix), rtol=1e-5)
    assert not np.allclose(chunk, local.fork().act(observation()))
    with served(delayed, change=note):
        assert [prefix is None for prefix in warmed] == [True] * 8 + [False] * 8  # as robots ask
        assert np.abs(warmed[-1]).min() > 0  # zeros would be no quaternion


def test_a_loop_holds_while_its_server_is_gone_and_moves_when_it_is_back(delayed, capsys):
    place, sent = np.zeros(3, np.float32), []
    robot = SimpleNamespace(
        observe=lambda: observation() | {"state": place.copy()},
        send=lambda action: sent.append(action),
        reset=lambda: None,
    )
    with ThreadPoolExecutor(1) as pool:
        with served(delayed) as (_, port):
            policy = RemotePolicy("127.0.0.1", port)
            running = pool.submit(ControlLoop(policy, robot, rate=50, patience=PATIENCE).run, 8)
            time.sleep(2)
        with served(delayed) as (_, port):
            before = len(sent)
            policy.url = f"ws://127.0.0.1:{port}"
            report = running.result()
            policy.close()
    said = capsys.readouterr().out
    assert "is gone" in said or "does not answer as a policy server" in said
    assert "the robot will hold" in said
    assert "the robot moves again" in said
    assert before < len(sent) == report.cycles
    assert 0 < report.held < report.cycles


def test_a_robot_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import common.client, common.control"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

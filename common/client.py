"""Client of `serve.py`, for a robot whose policy runs on another computer. Needs neither torch nor a GPU.

policy = RemotePolicy("gpu-box", 8000, api_key=key)
chunk = policy.act({"images": {"head": rgb, "left": rgb, "right": rgb}, "state": joints})    # (T, A)
"""

import os
import secrets
import socket
import struct
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from common import wire
from common.errors import UserError

TOO_BIG = 1009  # code for closing a connection (RFC 6455)


class ServerGone(UserError):
    """The policy server does not answer, but may come back."""


class RemotePolicy:
    """Requests chunks from a policy server; reconnects if the connection was lost.

    Attributes:
        spec: the policy's inputs and outputs, as `PolicySpec`, with names of the robot's own numbers.
        horizon: T, actions in a chunk.
        last_timing: the server's milliseconds for the last request, `infer_ms` and `wait_ms`.
    """

    def __init__(self, host: str, port: int, api_key: str | None = None, timeout: float = 3.0):
        """Connect.

        Args:
            timeout: seconds to connect, to send an observation, and to wait for a chunk.

        Raises:
            ServerGone: if nobody answers.
            UserError: if the server refuses the connection.
        """
        self.url = f"ws://{f'[{host}]' if ':' in host else host}:{port}"
        self._headers = {"Authorization": f"Api-Key {api_key.strip()}"} if api_key else {}
        self._headers[wire.EPISODE] = secrets.token_hex(16)  # a new connection continues it
        self._timeout, self.last_timing = timeout, {}
        self._connection: ClientConnection | None = None
        self._leaving = ExitStack()  # closes the connection
        self._about = self._connect()
        self.horizon, spec = self._about["horizon"], dict(self._about["spec"])
        for name in ("state_rotations", "action_rotations"):
            spec[name] = _rotations(spec.get(name))
        spec["recorded_names"] = spec.get("state_names"), spec.get("action_names")  # the server says those
        self.spec = SimpleNamespace(**spec)

    def act(self, observation: Mapping, prefix: np.ndarray | None = None) -> np.ndarray:
        """Request a chunk, (T, A) float32 in recorded units; arguments as for `RobotPolicy.act`.

        Raises:
            ValueError: with the server's sentence about an observation that it cannot use.
            ServerGone: if it does not answer in time; the next call tries again.
        """
        answer = self._ask(dict(observation) | ({} if prefix is None else {"prefix": prefix}))
        self.last_timing = answer.get("server_timing", {})
        for sentence in answer.get("warnings", ()):
            warnings.warn(sentence, stacklevel=2)
        return answer["actions"].copy()  # what was received cannot be written to

    def watch(self, observation: Mapping) -> None:
        """Have the server remember the frames of an observation; see `RobotPolicy.watch`."""
        self._ask(dict(observation) | {"watch": True})

    def reset(self) -> None:
        """Start an episode."""
        self._ask({"reset": True})

    def close(self) -> None:
        """Disconnect; the next request connects again."""
        self._connection = None
        self._leaving.close()

    def _connect(self) -> dict[str, Any]:
        """Connect; returns what the server says of its policy: what it needs, and which one it is."""
        try:
            connection = connect(
                self.url,
                open_timeout=self._timeout,
                close_timeout=1,
                compression=None,
                max_size=None,
                additional_headers=self._headers,
                proxy=None,
            )
            self._connection = self._leaving.enter_context(connection)
            # A timeout of the socket itself would also end the thread that receives.
            if os.name == "posix":
                limit = struct.pack("ll", int(self._timeout), int(self._timeout % 1 * 1e6))
                with suppress(OSError):  # the server may have hung up already: its last words say why
                    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            about = wire.unpack(self._connection.recv(self._timeout))
        except KeyboardInterrupt:  # what the server says of itself must not be taken for an answer
            self.close()
            raise
        except InvalidStatus as error:
            said = (error.response.body or b"").decode("utf-8", "replace").strip()
            raise UserError(f"{self.url} refused the connection: {said or error}") from None
        except (OSError, WebSocketException, ValueError) as error:
            self.close()
            raise ServerGone(
                f"{self.url} does not answer as a policy server ({error}): is serve.py running there?"
            ) from None
        if not isinstance(about, dict) or not {"horizon", "spec"} <= about.keys():
            self.close()
            raise UserError(
                f"{self.url} does not say what its policy needs, as serve.py does: use its client."
            )
        return {name: about.get(name) for name in ("horizon", "spec", "script", "run", "step")}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._connection is not None and self._connection.state is not State.OPEN:
            self.close()  # it was lost between two requests, perhaps while the robot was idle
        if self._connection is None and self._connect() != self._about:
            self.close()
            raise UserError(f"{self.url} serves another policy than before: make a new client.")
        message = wire.pack(request)
        try:
            self._connection.send(message)
            answer = self._connection.recv(self._timeout)
        except BaseException as error:  # Ctrl-C, too; a TimeoutError is an OSError
            # Its answer may still come: a new connection keeps the next request from getting it.
            self._connection.socket.close()
            self.close()
            if not isinstance(error, OSError | ConnectionClosed):
                raise
            if isinstance(error, TimeoutError | BlockingIOError):
                error = f"no answer in {self._timeout:g} s"
            elif isinstance(error, ConnectionClosed) and error.rcvd and error.rcvd.code == TOO_BIG:
                reason = f"the observation is larger than --max-message-mb of {self.url} allows"
                raise ValueError(reason) from None
            raise ServerGone(f"{self.url} is gone ({error}).") from None
        if isinstance(answer, str):
            raise ValueError(answer)
        return wire.unpack(answer)


def _rotations(found: dict | None) -> Any:
    """Rotations as the server described them; only policies with rotations need further packages."""
    if found is None:
        return None
    from common.data.rotation import Rotations

    return Rotations(found["kind"], tuple(found["starts"]), tuple(found["recorded"]))

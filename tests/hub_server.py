"""A local stand-in for the hub's HTTP interface: model repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_stand_in"
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"


class Hub(ThreadingHTTPServer):
    """`repos`: files by repository; `refused`: repositories closed for writing; `asked`: all requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.refused: set[str] = set()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, name: str) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.repos[name].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()


@contextmanager
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, self._path()
        if match := re.fullmatch(rf"/api/models/{NAME}(/revision/[^/]+)?", path):
            if (name := match["name"]) not in hub.repos:
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": file} for file in hub.repos[name]]
            return self._json(
                {"_id": name, "id": name, "modelId": name, "sha": hub.sha(name), "siblings": siblings}
                | {"private": False, "tags": [], "downloads": 0, "likes": 0}
            )
        if match := re.fullmatch(rf"/api/models/{NAME}/tree/[^/]+", path):
            files = hub.repos[match["name"]].items()
            oids = {path: hashlib.sha1(content).hexdigest() for path, content in files}
            return self._json(
                [{"type": "file", "path": p, "size": len(data), "oid": oids[p]} for p, data in files]
            )
        if match := re.fullmatch(rf"/{NAME}/resolve/[^/]+/(?P<file>.+)", path):
            content = hub.repos.get(match["name"], {}).get(unquote(match["file"]))
            if content is None:
                return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": hub.sha(match["name"]),
            }
            return self._answer(content, 200, headers)
        return self._json({"error": f"no {path} here"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        hub, path, body = self.server, self._path(), self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.refused:
                return self._json({"error": "You may not write here"}, 403)
            known = name in hub.repos
            hub.repos.setdefault(name, {})
            return self._json({"url": f"{hub.address}/{name}", "name": name}, 409 if known else 200)
        if match := re.fullmatch(rf"/api/models/{NAME}/preupload/[^/]+", path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            return self._json({"files": files})
        if re.fullmatch(rf"/{NAME}\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(rf"/api/models/{NAME}/commit/[^/]+", path):
            repo = hub.repos[match["name"]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    repo[value["path"]] = hub.objects[value["oid"]]
            oid = hub.sha(match["name"])
            return self._json(
                {
                    "success": True,
                    "commitOid": oid,
                    "commitUrl": f"{hub.address}/{match['name']}/commit/{oid}",
                }
            )
        return self._json({"error": f"no {path} here"}, 404)

    def do_PUT(self):
        self.server.objects[self._path().rpartition("/")[2]] = self._body()
        self._answer(b"", 200)

    def _path(self) -> str:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, content, status=200, headers=()):
        self._answer(
            json.dumps(content).encode(), status, {"Content-Type": "application/json", **dict(headers)}
        )

    def _answer(self, content: bytes, status: int, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass

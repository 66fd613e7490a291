"""A small server on loopback that speaks as much of the Hub's HTTP API as pushing and loading models need.

Repositories, private ones too, commits with LFS, tags, resolving by branch, tag or commit, model info. It keeps
everything in memory, and can cut connections in the middle of an upload or publish something else than was pushed.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_right"
USER = "greenmim"
# Some of those that the Hub knows.
LICENCES = ["apache-2.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit", "other"]


class Hub:
    """State of the server.

    Attributes:
        commits: for each repository its commits, oldest first: (oid, {path: content}, {path: is LFS}).
        branches, tags: for each repository the commit of each.
        private: repositories that only the owner sees.
        blobs: uploaded LFS objects by SHA-256.
        replaced: what is published instead of files of these names.
        cuts: how many of the next uploads to cut in the middle.
        uploads: bytes that arrived of each upload.
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict, dict]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.replaced: dict[str, bytes] = {}
        self.cuts = 0
        self.uploads: list[int] = []
        self.lock = threading.Lock()

    def create(self, repo: str) -> None:
        self.commits[repo], self.branches[repo], self.tags[repo] = [], {}, {}
        self.commit(repo, {".gitattributes": b""}, {})

    def commit(self, repo: str, files: dict[str, bytes], lfs: dict[str, bool], branch: str = "main") -> str:
        self.blobs |= {hashlib.sha256(files[name]).hexdigest(): files[name] for name in lfs}
        before = self.at(repo, branch) if self.commits[repo] else ("", {}, {})
        number = str(len(self.commits[repo]))
        oid = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
        self.commits[repo].append((oid, {**before[1], **files}, {**before[2], **lfs}))
        self.branches[repo][branch] = oid
        return oid

    def at(self, repo: str, revision: str):
        """The commit of a branch, tag or oid; None if there is none."""
        names = self.branches.get(repo, {}) | self.tags.get(repo, {})
        oid = names.get(revision, revision)
        return next((commit for commit in self.commits.get(repo, []) if commit[0] == oid), None)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.at(repo, revision)[1]


def handler_of(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        # Answers

        def answer(self, status: int, content: bytes, headers: dict | None = None, kind: str = "application/json"):
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, value, status: int = 200):
            self.answer(status, json.dumps(value).encode())

        def refuse(self, status: int, code: str):
            self.answer(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def has_token(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def is_owner(self) -> bool:
            if self.has_token():
                return True
            self.body()
            self.answer(401, b'{"error": "Invalid credentials"}')
            return False

        # Requests

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if path == "/api/whoami-v2":
                if self.is_owner():
                    self.answer_json({"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})
            elif not self.has_token() and any(f"/{repo}" in path for repo in hub.private):
                self.refuse(401, "RepoNotFound")
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
                self.references(found[1])
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                self.info(found[1], found[2] or "main")
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
                commit = hub.at(found[1], found[2])
                if commit is None:
                    return self.refuse(404, "RepoNotFound")
                self.answer_json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in commit[1].items()
                    ]
                    if not found[3]
                    else []
                )
            elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*found.groups())
            elif found := re.fullmatch(r"/blobs/(\w+)", path):
                self.answer(200, hub.blobs[found[1]], kind="application/octet-stream")
            else:
                self.refuse(404, "RepoNotFound")

        do_HEAD = do_GET

        def info(self, repo: str, revision: str):
            if repo not in hub.commits:
                return self.refuse(404, "RepoNotFound")
            commit = hub.at(repo, revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in commit[1]]
            facts = {"_id": repo, "id": repo, "modelId": repo, "private": repo in hub.private}
            self.answer_json({**facts, "sha": commit[0], "siblings": siblings})

        def references(self, repo: str):
            if repo not in hub.commits:
                return self.refuse(404, "RepoNotFound")
            branches, tags = (
                [
                    {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                    for name, oid in names[repo].items()
                ]
                for kind, names in (("heads", hub.branches), ("tags", hub.tags))
            )
            self.answer_json({"branches": branches, "tags": tags, "converts": []})

        def resolve(self, repo: str, revision: str, name: str):
            if repo not in hub.commits:
                return self.refuse(404, "RepoNotFound")
            commit = hub.at(repo, revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            if name not in commit[1]:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit[0]})
            content = commit[1][name]
            sha = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": commit[0], "ETag": f'"{sha}"'}
            if not commit[2].get(name):
                return self.answer(200, content, headers, kind="text/plain")
            # Another host, as the Hub's own store of large files is.
            location = f"http://localhost:{self.server.server_port}/blobs/{sha}"
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha}"', "Location": location}
            self.answer(302, b"", headers)

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            if path == "/api/validate-yaml":
                licence = re.search(r"^license: (.*)$", json.loads(self.body())["content"], flags=re.MULTILINE)
                known = licence is None or licence[1] in LICENCES
                errors = [] if known else [{"message": f'"license" must be one of {LICENCES}'}]
                return self.answer_json({"errors": errors, "warnings": []}, 200 if known else 400)
            if not self.is_owner():
                return
            if path == "/api/repos/create":
                wanted = json.loads(self.body())
                repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
                status = 409 if repo in hub.commits else 200
                if status == 200:
                    hub.create(repo)
                    hub.private |= {repo} if wanted.get("visibility") == "private" else set()
                self.answer_json({"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo}, status)
            elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
                files = json.loads(self.body())["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin", ".png")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                self.answer_json({"files": modes})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", path):
                tag, commit = json.loads(self.body())["tag"], hub.at(found[1], found[2])
                if commit is None:
                    return self.refuse(404, "RevisionNotFound")
                if tag in hub.tags[found[1]]:
                    return self.answer(409, b'{"error": "Tag reference exists already."}')
                hub.tags[found[1]][tag] = commit[0]
                self.answer_json({})
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.batch(json.loads(self.body()))
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
                self.commit(found[1], found[2], self.body())
            else:
                self.body()
                self.refuse(404, "RepoNotFound")

        def batch(self, wanted: dict):
            host, objects = self.headers["Host"], []
            for blob in wanted["objects"]:
                answer = {"oid": blob["oid"], "size": blob["size"]}
                if blob["oid"] not in hub.blobs:
                    answer["actions"] = {"upload": {"href": f"http://{host}/upload/{blob['oid']}"}}
                objects.append(answer)
            self.answer_json({"transfer": "basic", "objects": objects})

        def commit(self, repo: str, branch: str, body: bytes):
            files, lfs = {}, {}
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    if value["oid"] not in hub.blobs:
                        return self.answer(400, b'{"error": "LFS object is missing"}')
                    files[value["path"]], lfs[value["path"]] = hub.blobs[value["oid"]], True
            files |= {name: content for name, content in hub.replaced.items() if name in files}
            with hub.lock:
                oid = hub.commit(repo, files, lfs, branch)
            url = f"http://{self.headers['Host']}/{repo}/commit/{oid}"
            self.answer_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

        def do_PUT(self):
            oid = urlsplit(self.path).path.removeprefix("/upload/")
            size = int(self.headers["Content-Length"])
            with hub.lock:
                is_cut = hub.cuts > 0
                hub.cuts -= is_cut
            content = self.rfile.read(size // 2 if is_cut else size)
            hub.uploads.append(len(content))
            if is_cut:
                self.close_connection = True
                self.connection.close()
                return
            if hashlib.sha256(content).hexdigest() != oid:
                return self.answer(400, b'{"error": "wrong content"}')
            hub.blobs[oid] = content
            self.answer_json({})

    return Handler


def serve() -> tuple[Hub, ThreadingHTTPServer]:
    """Starts the server on a free port of loopback, in a thread of its own; `shutdown` and `server_close` end it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server

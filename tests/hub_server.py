"""A server on this machine that speaks those endpoints of the Hugging Face Hub that `huggingface_hub` calls to upload
and to download a model."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results


TOKEN = "hf_right"
REPO = r"[\w.-]+/[\w.-]+"
LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """A model repository: the files of its last commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def commit(self, files: dict[str, bytes], **header: str) -> None:
        self.files |= files
        self.commits.append({**header, "files": sorted(files)})


def metadata_errors(content: str) -> list[str]:
    """What the Hub refuses in the YAML of a model card, as far as its documentation says."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if found is None:
        return ["empty or missing yaml metadata in repo card"]
    try:
        fields = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [str(error)]
    errors = []
    for name in ("base_model", "datasets"):
        values = fields.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(REPO, value):
                errors.append(f'"{name}" with value "{value}" is not valid')
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(fields.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if not all(isinstance(tag, str) for tag in fields.get("tags") or []):
        errors.append('"tags" must be strings')
    if "model-index" in fields:
        try:
            model_index_to_eval_results(fields["model-index"])
        except (KeyError, TypeError) as error:
            errors.append(f'"model-index" lacks {error}')
    return errors


class Hub:
    """The server and what it holds; a context manager.

    Attributes:
        repositories: by `owner/name`.
        faults: the status with which requests are answered whose path begins so.
        requests: `METHOD path` of all that came in.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, int] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


def _entry(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self):
        path = self.path.partition("?")[0]
        self.state.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for beginning, status in self.state.faults.items():
            if path.startswith(beginning):
                return self.answer(status, {"error": "out of order"})
        for method, pattern, handle in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                writes = self.command in ("POST",)
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid credentials"})
                return handle(self, body, *match.groups())
        return self.answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = route  # noqa: N815

    def found(self, repo):
        if repo not in self.state.repositories:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.state.repositories.get(repo)

    def validate(self, body):
        errors = metadata_errors(json.loads(body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        known = repo in self.state.repositories
        private = asked.get("visibility") == "private"
        self.state.repositories.setdefault(repo, Repository(private))
        self.answer(409 if known else 200, {"url": f"{self.state.url}/{repo}", "name": repo, "id": repo})

    def preupload(self, body, repo):
        if self.found(repo) is None:
            return
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [(name, "lfs" if name.endswith(LARGE) else "regular") for name in names]
        self.answer(200, {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes]})

    def batch(self, body, repo):
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.state.url}/objects/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        fine = hashlib.sha256(body).hexdigest() == oid
        if fine:
            self.state.objects[oid] = body
        self.answer(200 if fine else 400)

    def commit(self, body, repo):
        repository = self.found(repo)
        if repository is None:
            return
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        repository.commit(files, **header["value"])
        oid = repository.sha
        self.answer(200, {"commitUrl": f"{self.state.url}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, _, repo):
        repository = self.found(repo)
        if repository is not None:
            siblings = [{"rfilename": name} for name in repository.files]
            self.answer(200, {"id": repo, "sha": repository.sha, "siblings": siblings, "private": repository.private})

    def tree(self, _, repo):
        repository = self.found(repo)
        if repository is not None:
            files = repository.files.items()
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files
            ]
            self.answer(200, entries)

    def resolve(self, _, repo, name):
        repository = self.found(repo)
        if repository is None:
            return
        if name not in repository.files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.sha)
            return
        content = repository.files[name]
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=repository.sha)

    ROUTES = (
        ("POST", "/api/validate-yaml", validate),
        ("POST", "/api/repos/create", create),
        ("POST", rf"/api/models/({REPO})/preupload/main", preupload),
        ("POST", rf"/api/models/({REPO})/commit/main", commit),
        ("POST", rf"/({REPO})\.git/info/lfs/objects/batch", batch),
        ("PUT", r"/objects/(\w+)", store),
        ("GET", rf"/api/models/({REPO})(?:/revision/\w+)?", info),
        ("GET", rf"/api/models/({REPO})/tree/\w+/?", tree),
        ("GET HEAD", rf"/({REPO})/resolve/\w+/(.+)", resolve),
    )

# SPDX-License-Identifier: Apache-2.0
"""What a MiniHub answers: one handler for the hub and its storage host, a function for each route."""
import base64, hashlib, json, re, secrets, time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from .mini_hub_state import HubError, Repo, git_oid, plan, read_card

REPO = r"/api/(?P<type>models|datasets)/(?P<id>[^/]+(?:/[^/]+)?)"  # a few old ids, such as gpt2, have no owner
PAGE = r"/(?:(?P<type>datasets)/)?(?P<id>[^/]+?(?:/[^/]+?)?)"
ROUTES = []  # (method, pattern, access, function); access: None, "read", "content" (past a gate), "user" or "write"


def route(method, pattern, access=None):
    return lambda function: ROUTES.append((method, re.compile(pattern), access, function)) or function


class Handler(BaseHTTPRequestHandler):
    """One request. The functions marked @route are found by method and path and called with the pattern's named groups."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are two writes; the second would wait for an ACK

    def log_message(self, *args):
        pass

    def serve(self):
        url = urlsplit(self.path)
        self.query, self.user, self.role = parse_qs(url.query, keep_blank_values=True), None, None
        with self.hub.lock:
            matching = (f for f in self.hub.faults if f.times and re.search(f.match, f"{self.command} {url.path}"))
            self.fault = next(matching, plan())
            self.fault.times -= 1
        try:
            if self.fault.kind == "reset":
                self.close_connection = True
                return self.note(0)
            if self.fault.kind == "status":
                raise HubError(self.fault.status, "injected fault", **self.fault.headers)
            time.sleep(self.fault.seconds)
            self.storage(url.path) if self.cdn else self.dispatch(url.path)
        except HubError as e:
            self.close_connection = True  # the body may not have been read
            self.answer({"error": str(e)}, e.status, e.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def dispatch(self, path):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user, self.role = self.hub.tokens.get(token, (None, None))
        for method, pattern, access, function in ROUTES:
            match = pattern.fullmatch(path)  # a revision is one path segment: it is unquoted only after the match
            if match and method in (self.command, "GET" if self.command == "HEAD" else ""):
                args = {k: unquote(v) if v else v for k, v in match.groupdict().items()}
                if "id" in args:
                    args = {"repo": self.find(args.pop("type", None) or "models", args.pop("id"), access), **args}
                return function(self, **args)
        raise HubError(404, f"Not offered by MiniHub (HF_HUB_DISABLE_XET=1 set?): {self.command} {path}")

    # ---- who may do what ----
    def owns(self, id_):
        return self.user is not None and id_.split("/")[0] in {self.user, *self.hub.orgs[self.user]}

    def must_write(self, id_):
        if not (self.owns(id_) and self.role == "write"):
            raise HubError(403 if self.user else 401, f"You don't have the rights to write to {id_}")

    def find(self, type_, id_, access):
        repo = self.hub.repos.get((type_, id_))
        if repo is None or repo.private and not self.owns(id_):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if access == "content" and repo.gated and not (self.owns(id_) or self.user in repo.allowed):
            raise HubError(403 if self.user else 401, f"Access to {id_} is restricted: you must be on its list", "GatedRepo")
        if access == "write":
            self.must_write(id_)
        if access == "user" and self.user is None:
            raise HubError(401, "Invalid username or password.")
        return repo

    # ---- reading the request and writing the answer ----
    def arg(self, name, default=None):
        return self.query.get(name, [default])[-1]

    def body(self):
        if "Transfer-Encoding" in self.headers:
            raise HubError(411, "MiniHub needs a Content-Length")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def note(self, status):
        self.hub.requests.append((self.command, self.path, status, self.headers.get("Range"), self.user))

    def start(self, status, length, headers):
        self.note(status)
        self.send_response(status)
        close = {"Connection": "close"} if self.close_connection else {}
        for key, value in {"Content-Length": length, "X-Request-Id": secrets.token_hex(8), **close, **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()

    def answer(self, body=None, status=200, headers={}):
        data = b"" if body is None else json.dumps(body).encode()
        self.start(status, len(data), {"Content-Type": "application/json; charset=utf-8", **headers})
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_page(self, items):
        """One page of a list; the Link header leads to the next."""
        size, at = min(int(self.arg("limit", self.hub.page_size)), self.hub.page_size), int(self.arg("cursor", 0))
        query = urlencode({**self.query, "cursor": at + size}, doseq=True)
        more = {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'} if at + size < len(items) else {}
        self.answer(items[at:at + size], headers=more)

    def answer_content(self, sha256, headers):
        """A file, or the byte ranges asked for, with the planned fault."""
        fault, size = self.fault, self.hub.blob(sha256).stat().st_size
        first, end, status, wanted = 0, size, 200, self.headers.get("Range", "")
        several = [(int(a), min(int(b) + 1, size)) for a, b in re.findall(r"(\d+)-(\d+)", wanted)] if "," in wanted else []
        if several and fault.kind not in ("norange", "onerange", "merge"):
            return self.answer_ranges(sha256, several, size, headers)
        if several and fault.kind != "norange":
            last = several[0][1] if fault.kind == "onerange" else max(b for _, b in several)
            wanted = f"bytes={several[0][0]}-{last - 1}"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
        if asked and any(asked.groups()) and fault.kind != "norange":
            first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
            if fault.kind == "wrongrange":
                first, end = min(first + fault.after, size - 1), min(end + fault.after, size)
            if first >= end:
                raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{end - 1}/{size}"}
        left = min(fault.after, end - first) if fault.kind in ("drop", "truncate") else end - first
        self.start(status, left if fault.kind == "truncate" else end - first, {"Accept-Ranges": "bytes", **headers})
        with open(self.hub.blob(sha256), "rb") as f:
            f.seek(first)
            while left and self.command != "HEAD":
                chunk = bytearray(f.read(min(left, 1 << 18)))
                at = fault.after - (f.tell() - len(chunk))
                if fault.kind == "corrupt" and 0 <= at < len(chunk):
                    chunk[at] ^= 0xFF
                self.wfile.write(chunk)
                left -= len(chunk)
        self.close_connection |= fault.kind == "drop"

    def answer_ranges(self, sha256, several, size, headers):
        """Several byte ranges, as multipart/byteranges (RFC 9110, 14.6), with the planned fault."""
        fault, border, kind = self.fault, secrets.token_hex(8), headers.get("Content-Type", "")
        data, body = self.hub.blob(sha256).read_bytes(), b""
        for first, end in several:
            part, at = bytearray(data[first:end]), fault.after - first
            if fault.kind == "corrupt" and 0 <= at < len(part):
                part[at] ^= 0xFF
            where = f"bytes {first}-{end - 1}/{size}"
            body += f"\r\n--{border}\r\nContent-Type: {kind}\r\nContent-Range: {where}\r\n\r\n".encode() + part
        body += f"\r\n--{border}--\r\n".encode()
        left = min(fault.after, len(body)) if fault.kind in ("drop", "truncate") else len(body)
        self.start(206, left if fault.kind == "truncate" else len(body),
                   {"Accept-Ranges": "bytes", **headers, "Content-Type": f"multipart/byteranges; boundary={border}"})
        self.wfile.write(body[:left])
        self.close_connection |= fault.kind == "drop"

    # ---- account, repos, search ----
    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": o, "fullname": o, "roleInOrg": "write"} for o in sorted(self.hub.orgs[self.user])]
        self.answer({"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": orgs, "isPro": False,
                     "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}})

    @route("POST", "/api/repos/create")
    def create(self):
        body = json.loads(self.body())
        private = body.get("private") or body.get("visibility") == "private"
        owner = body.get("organization") or self.user
        repo = Repo((body.get("type") or "model") + "s", f"{owner}/{body['name']}", bool(private))
        self.must_write(repo.id)
        with self.hub.lock:
            exists = (repo.type, repo.id) in self.hub.repos
            if not exists:
                self.hub.new_repo(repo, self.user)
        error = {"error": "You already created this repo"} if exists else {}
        self.answer({"url": f"{self.hub.url}/{repo.path}", **error}, 409 if exists else 200)

    @route("DELETE", "/api/repos/delete")
    def delete(self):
        body = json.loads(self.body())
        owner = body.get("organization") or self.user
        repo = self.find((body.get("type") or "model") + "s", f"{owner}/{body['name']}", "write")
        self.answer({"deleted": self.hub.repos.pop((repo.type, repo.id)).id})

    @route("PUT", REPO + "/settings", "write")
    def settings(self, repo):
        body = json.loads(self.body())
        repo.gated = body.get("gated", repo.gated)
        before = body.get("private", repo.private)  # "private" came before "visibility"
        repo.private = body.get("visibility", "private" if before else "public") == "private"
        self.answer(body)

    @route("POST", "/api/validate-yaml")
    def validate(self):
        try:
            card = read_card(json.loads(self.body())["content"])
        except ValueError as e:
            return self.answer({"errors": [{"message": str(e)}], "warnings": []}, 400)
        empty = [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer({"errors": [], "warnings": [] if card else empty})

    @route("GET", "/api/(?P<type>models|datasets)")
    def search(self, type):
        want, word = {t.lower() for t in self.query.get("filter", [])}, (self.arg("search") or "").lower()
        visible = [r for r in list(self.hub.repos.values()) if r.type == type and (not r.private or self.owns(r.id))]
        found = [i for i in (self.hub.info(r, r.at("main")) for r in visible)
                 if want <= {t.lower() for t in i["tags"]} and word in i["id"].lower()
                 and self.arg("author") in (None, i["author"]) and self.arg("pipeline_tag") in (None, i.get("pipeline_tag"))
                 and self.arg("gated", str(bool(i["gated"]))).lower() == str(bool(i["gated"])).lower()]
        found.sort(key=lambda i: (i[self.arg("sort") or "trendingScore"], i["lastModified"]), reverse=True)
        wanted = set(self.query.get("expand", []))
        hide = set() if self.arg("full") else {k for k in ("siblings", "cardData", "config") if not self.arg(k)}
        shown = (lambda k: k == "id" or k in wanted) if wanted else (lambda k: k not in hide)
        self.answer_page([{k: v for k, v in i.items() if shown(k)} for i in found])

    @route("GET", REPO + "/auth-check(?:/(?P<write>write))?", "content")
    def auth_check(self, repo, write):
        self.must_write(repo.id) if write else None
        self.answer({})

    # ---- looking at a repo ----
    @route("GET", REPO + "(?:/revision/(?P<rev>[^/]+))?", "read")
    def repo_info(self, repo, rev):
        info = self.hub.info(repo, repo.at(rev or "main"), bool(self.arg("blobs")))
        wanted = set(self.query.get("expand", []))
        self.answer({k: v for k, v in info.items() if not wanted or k == "id" or k in wanted})

    def listing(self, commit, expand):
        """Files and folders by path. (lastCommit is that of the listing, not the file's own as on the Hub.)"""
        folders = {"/".join(p.split("/")[:n]) for p in commit.files for n in range(1, p.count("/") + 1)}
        items = {p: {"type": "directory", "oid": git_oid(p.encode()), "size": 0, "path": p} for p in folders}
        for p, f in commit.files.items():
            lfs = {"lfs": {"oid": f.sha256, "size": f.size, "pointerSize": f.pointer}} if f.pointer else {}
            items[p] = {"type": "file", "oid": f.oid, "size": f.size, "path": p, **lfs}
        last = {"lastCommit": {"id": commit.id, "title": commit.title, "date": commit.date}} if expand else {}
        return {p: {**i, **last} for p, i in sorted(items.items())}

    @route("GET", REPO + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "read")
    def tree(self, repo, rev, path):
        commit, start = repo.at(rev), f"{path}/" if path else ""
        items = self.listing(commit, self.arg("expand", "").lower() == "true")
        if path and items.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound", **{"X-Repo-Commit": commit.id})
        inside = {p[len(start):]: i for p, i in items.items() if p.startswith(start)}
        self.answer_page([i for p, i in inside.items() if "/" not in p or self.arg("recursive", "").lower() == "true"])

    @route("POST", REPO + "/paths-info/(?P<rev>[^/]+)", "read")
    def paths_info(self, repo, rev):
        form = parse_qs(self.body().decode())
        items = self.listing(repo.at(rev), form.get("expand") in (["true"], ["True"]))
        self.answer([items[p.strip("/")] for p in form.get("paths", []) if p.strip("/") in items])

    @route("GET", REPO + "/commits/(?P<rev>[^/]+)", "read")
    def commits(self, repo, rev):
        out, c = [], repo.at(rev)
        while c:
            out.append({"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]})
            c = repo.commits.get(c.parent)
        self.answer_page(out)

    @route("GET", REPO + "/refs", "read")
    def refs(self, repo):
        heads = [{"name": n, "ref": n if n.startswith("refs/") else f"refs/heads/{n}", "targetCommit": c}
                 for n, c in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
        pulls = [h for h in heads if h["name"].startswith("refs/pr/")]
        self.answer({"branches": [h for h in heads if h not in pulls], "converts": [], "tags": tags, "pullRequests": pulls})

    @route("POST", REPO + "/(?P<kind>branch|tag)/(?P<name>[^/]+)", "write")
    def new_ref(self, repo, kind, name):
        body = json.loads(self.body() or b"{}")
        where, start = (repo.branches, body.get("startingPoint") or "main") if kind == "branch" else (repo.tags, name)
        name = body.get("tag", name)  # a tag's URL names what it points at
        if name in where:
            raise HubError(409, f"Reference already exists: {name}")
        where[name] = repo.at(start).id
        self.answer({})

    @route("GET", REPO + "/discussions", "read")
    def discussions(self, repo):
        self.answer({"discussions": repo.discussions, "count": len(repo.discussions), "start": 0})

    # ---- uploading: preupload, LFS batch, PUT to storage, verify, commit ----
    @route("POST", REPO + "/preupload/(?P<rev>[^/]+)", "user")
    def preupload(self, repo, rev):
        answer = []
        for f in json.loads(self.body())["files"]:
            mode, old = "lfs" if self.hub.in_lfs(f["path"], f["size"]) else "regular", repo.at(rev).files.get(f["path"])
            oid = old and (old.sha256 if old.pointer else old.oid)  # equal to that of the file at hand: nothing to upload
            answer.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answer})

    @route("POST", PAGE + r"\.git/info/lfs/objects/(?P<step>batch|verify)", "user")
    def lfs(self, repo, step):
        body, answer = json.loads(self.body()), []
        if step == "verify":
            if self.hub.lfs_file(body["oid"]).size != body["size"]:
                raise HubError(422, "The size of the uploaded object is wrong")
            return self.answer({})
        verify = {"href": f"{self.hub.url}/{repo.path}.git/info/lfs/objects/verify"}
        for o in body["objects"]:
            upload = {"href": f"{self.hub.cdn_url}/upload/{o['oid']}?sig={self.hub.sign(o['oid'])}"}
            have = self.hub.blob(o["oid"]).exists()  # then the client skips the upload
            actions = {} if have else {"actions": {"upload": upload, "verify": verify}}
            answer.append({"oid": o["oid"], "size": o["size"], **actions})
        self.answer({"transfer": "basic", "objects": answer}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    @route("POST", REPO + "/commit/(?P<rev>[^/]+)", "user")
    def new_commit(self, repo, rev):
        lines = [json.loads(line) for line in self.body().splitlines()]
        head, pull = lines.pop(0)["value"], bool(self.arg("create_pr"))
        pull or self.must_write(repo.id)
        with self.hub.lock:
            base = repo.at(rev)
            if rev not in repo.branches:
                raise HubError(404, f"Not a branch: {rev}", "RevisionNotFound")
            if head.get("parentCommit") not in (None, base.id):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for line in lines:
                self.apply(files, line["key"], line["value"])
            if pull:
                number = len(repo.discussions) + 1
                rev, repo.branches[f"refs/pr/{number}"] = f"refs/pr/{number}", base.id
                repo.discussions.append({"num": number, "title": head["summary"], "author": {"name": self.user},
                                         "status": "open", "createdAt": base.date, "isPullRequest": True,
                                         "repo": {"name": repo.id, "type": repo.type[:-1]}})
            new = self.hub.commit(repo, rev, files, head["summary"], self.user, head.get("description", ""))
        web = f"{self.hub.url}/{repo.path}"
        more = {"pullRequestUrl": f"{web}/discussions/{len(repo.discussions)}"} if pull else {}
        self.answer({"success": True, "commitOid": new.id, "commitUrl": f"{web}/commit/{new.id}", **more})

    def apply(self, files, key, value):
        path = value["path"].rstrip("/")
        if key == "file":
            data = base64.b64decode(value["content"])
            try:
                read_card(data.decode()) if path == "README.md" else None
            except ValueError as e:
                raise HubError(400, f"Invalid metadata in README.md: {e}")
            files[path] = self.hub.store(path, data)
        elif key == "lfsFile":
            files[path] = self.hub.lfs_file(value["oid"])
        else:  # deletedFile, deletedFolder
            gone = [p for p in files if p == path or key == "deletedFolder" and p.startswith(path + "/")]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for p in gone:
                del files[p]

    # ---- downloading ----
    @route("GET", PAGE + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "content")
    def resolve(self, repo, rev, path):
        commit = repo.at(rev)
        f, headers = commit.files.get(path), {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if f is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        repo.downloads += self.command == "GET"
        etag = f'"{self.fault.value if self.fault.kind == "etag" else f.sha256 if f.pointer else f.oid}"'
        if not f.pointer:
            return self.answer_content(f.sha256, {**headers, "ETag": etag, "Content-Type": "text/plain; charset=utf-8"})
        link = f"{self.hub.cdn_url}/cdn/{f.sha256}/{quote(path.split('/')[-1])}?sig={self.hub.sign(f.sha256)}"
        self.answer(None, 302, {**headers, "X-Linked-Etag": etag, "X-Linked-Size": f.size, "Location": link})

    def storage(self, path):
        """The second origin: signed GET, HEAD and PUT of content by its sha256."""
        where, sha256 = (path.split("/") + ["", ""])[1:3]
        if self.headers.get("Authorization"):
            raise HubError(400, "Only one auth mechanism allowed: the token must not reach the storage host")
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or self.arg("sig") != self.hub.sign(sha256):
            raise HubError(403, "The request signature is missing or wrong")
        if where == "upload" and self.command == "PUT":
            data = self.body()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise HubError(400, "The content does not match its sha256")
            self.hub.save(sha256, data)
            return self.answer(None, 200, {"ETag": f'"{sha256}"'})
        if where != "cdn" or not self.hub.blob(sha256).exists():
            raise HubError(404, "No such object")
        etag = self.fault.value if self.fault.kind == "etag" else sha256
        self.answer_content(sha256, {"ETag": f'"{etag}"', "Content-Type": "binary/octet-stream"})

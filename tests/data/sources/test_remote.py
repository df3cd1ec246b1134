"""Files behind URLs."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from megatron_gkd.data.sources import describe_source
from megatron_gkd.data.sources.opening import parse_name
from megatron_gkd.errors import UserError

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._respond(sends=False)

    def do_GET(self):
        self._respond(sends=True)

    def _respond(self, *, sends):
        path = self.path.partition("?")[0]
        if path == "/signed.jsonl" and not sends:
            return self.send_error(403)
        if path not in self.server.files:
            return self.send_error(404)
        content, missing = self.server.files[path], 5 if path.startswith("/cut") else 0
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if sends:
            self.wfile.write(content[: len(content) - missing])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(lines):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.etag = "1"
        server.files = {f"/{name}.jsonl": lines for name in ("rows", "signed", "cut")}
        server.files |= {"/rows.jsonl.gz": gzip.compress(lines), "/rows": lines}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz?token=a.b", "signed.jsonl", "rows.jsonl#1"])
def test_a_file_of_a_web_server(server, opened, rows_of, name):
    source = opened(f"{server.url}/{name}")
    assert rows_of(source) == ROWS
    assert source.locate(1) == f"{server.url}/{name.removesuffix('#1')}, line 2"


def test_what_a_file_of_a_web_server_depends_on(server):
    names = [parse_name(f"{server.url}/{name}") for name in ("rows.jsonl", "signed.jsonl")]
    before = [describe_source(name) for name in names]
    server.etag = "2"
    assert before[0] == [f"{server.url}/rows.jsonl", "1", None, before[0][3]] != describe_source(names[0])
    assert before[1] == [f"{server.url}/signed.jsonl", None, None, None] == describe_source(names[1])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone.jsonl", "cannot be fetched: OSError: the server responds 404 Not Found"),
        ("cut.jsonl", "cannot be fetched: RemoteProtocolError: peer closed connection"),
        ("rows", "unknown kind of file; allowed are .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read(server, opened, name, problem):
    with pytest.raises(UserError, match=f"^{server.url}/{name}: {problem}"):
        opened(f"{server.url}/{name}")


def test_no_server(opened):
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/a.jsonl: cannot be fetched: ConnectError: .*refused"):
        opened("http://127.0.0.1:9/a.jsonl")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/a.jsonl: cannot be fetched: ConnectError: .*refused"):
        describe_source(parse_name("http://127.0.0.1:9/a.jsonl"))


class TestFilesystems:
    @pytest.fixture(autouse=True)
    def memory(self, lines):
        memory = fsspec.filesystem("memory")
        memory.pipe({"/bucket/a.jsonl": lines, "/bucket/b.jsonl.gz": gzip.compress(lines)})
        yield memory
        memory.rm("/bucket", recursive=True)

    def test_a_file(self, opened, rows_of):
        source = opened("memory://bucket/a.jsonl")
        assert rows_of(source) == ROWS
        assert source.locate(0) == "memory://bucket/a.jsonl, line 1"

    def test_a_pattern(self, opened, rows_of):
        source = opened("memory://bucket/*.jsonl*#3")
        assert rows_of(source) == ROWS * 2
        assert source.locate(3) == "memory:///bucket/b.jsonl.gz, line 2"

    def test_what_files_depend_on(self, memory, lines):
        name = parse_name("memory://bucket/*.jsonl*")
        before = describe_source(name)
        memory.pipe("/bucket/a.jsonl", lines + lines)
        after = describe_source(name)
        assert [path for path, _ in before] == ["/bucket/a.jsonl", "/bucket/b.jsonl.gz"]
        assert after[0] != before[0] and after[1] == before[1]

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("memory://bucket/gone.jsonl", "cannot be fetched: FileNotFoundError: /bucket/gone.jsonl"),
            ("memory://bucket/gone*", "cannot be fetched: FileNotFoundError: no file matches the pattern"),
            ("s3://bucket/a.jsonl", r"fsspec's filesystem for s3:// is not installed: Install s3fs to access S3"),
            ("gs://bucket/a.jsonl", r"fsspec's filesystem for gs:// is not installed: .*gcsfs"),
            ("nonsense://bucket/a.jsonl", "cannot be fetched: ValueError: Protocol not known: nonsense"),
        ],
    )
    def test_what_cannot_be_fetched(self, opened, monkeypatch, url, problem):
        for package in ("s3fs", "gcsfs"):  # as if they were not installed
            monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(UserError, match=problem) as error:
            opened(url)
        assert str(error.value).startswith(f"{url}: ") and "\n" not in str(error.value)


def test_a_file_url(tmp_path, lines, opened, rows_of):
    (tmp_path / "my rows.jsonl").write_bytes(lines)
    assert rows_of(opened(f"file://{tmp_path}/my%20rows.jsonl#9")) == ROWS
    with pytest.raises(UserError, match="no such file or folder"):
        opened(f"file://{tmp_path}/none.jsonl")

"""API keys of servers: sent with every request, shown in no message; and encrypted connections that can't be made."""

from __future__ import annotations

import datetime
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from megatron_gkd.config.api_keys import NO_API_KEY, ApiKeyVariable
from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.rollout.vllm.client import StudentServer
from megatron_gkd.rollout.vllm.handshake import ServerRequirements
from megatron_gkd.rollout.vllm.own_weights import FixedWeightsServer
from megatron_gkd.rollout.vllm.weight_folder import load_from_folder
from megatron_gkd.runtime.servers import RouteMissing, Server, ServerDown, exchange, open_client
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer
from megatron_gkd.teachers.server.tokenizer import Probe

URL = "https://host/prefix"
SECRET = "sk-secret_1"
PLACE = "teacher.teacher_server_api_key_env"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("KEY_OF_TEACHER", None, "= KEY_OF_TEACHER: this environment variable is not set; export the servers' API key"),
        ("KEY_OF_TEACHER", "", "= KEY_OF_TEACHER: this environment variable is empty; export the servers' API key"),
        ("KEY_OF_TEACHER", " \n", "= KEY_OF_TEACHER: this environment variable is empty; export"),
        ("KEY_OF_TEACHER", f"{SECRET} x", "= KEY_OF_TEACHER: this environment variable must hold an API key: letters"),
        ("KEY_OF_TEACHER", f"{SECRET}\nx", "= KEY_OF_TEACHER: this environment variable must hold an API key: letters"),
        ("KEY_OF_TEACHER", f"{SECRET}é", "= KEY_OF_TEACHER: this environment variable must hold an API key: letters"),
        (SECRET, None, "= (not shown): must be the name of an environment variable; the API key itself is never in a"),
        ("sk_secret", None, "= (not shown): this environment variable is not set"),
    ],
)
def test_a_variable_without_an_api_key_is_refused(name, content, message, monkeypatch):
    if content is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, content)
    with pytest.raises(UserError) as error:
        ApiKeyVariable(PLACE, name).read()
    assert str(error.value).startswith(f"{PLACE} {message}") and "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_content_of_the_variable_is_the_key(monkeypatch):
    monkeypatch.setenv("KEY_OF_TEACHER", f"{SECRET}\n")
    assert ApiKeyVariable(PLACE, "KEY_OF_TEACHER").read() == SECRET
    assert NO_API_KEY.read() is None


def client(api_key: str | None, answer) -> httpx.Client:
    """One as `open_client` makes it, whose requests go to `answer`."""
    http = open_client(5.0, 1, api_key)
    return httpx.Client(transport=httpx.MockTransport(answer), headers=http.headers)


@pytest.mark.parametrize("api_key", [None, SECRET])
def test_every_request_carries_the_key(api_key):
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers.get("authorization")))
        return httpx.Response(200, json={})

    server = Server(URL, client(api_key, answer))
    server.request("GET", "/v1/models", dict)
    server.command("/resume")
    expected = None if api_key is None else f"Bearer {SECRET}"
    assert seen == [(f"{URL}/v1/models", expected), (f"{URL}/resume", expected)]


KINDS = {
    "teacher": (
        lambda http: TeacherServer(URL, http, TeacherRequirements(1, 63, [Probe("w", [5], ["w"], [b"w"])])).handshake(
            0
        ),
        "teacher.teacher_server_api_key_env",
    ),
    "rollouts": (
        lambda http: StudentServer(URL, http, 0, load_from_folder).wait_until_ready(ServerRequirements(64)),
        "rollout.vllm_server_api_key_env",
    ),
    "teacher that generates": (
        lambda http: FixedWeightsServer(URL, http, 0, load_from_folder).wait_until_ready(ServerRequirements(64)),
        "teacher.teacher_server_api_key_env",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_or_missing_key_names_the_recipes_key(status, kind):
    use, key = KINDS[kind]
    refused = httpx.Response(status, text=f'{{"error":\n"incorrect API key {SECRET}"}}')
    with pytest.raises(UserError) as error:
        use(client(SECRET, lambda request: refused))
    message = str(error.value)
    assert message.startswith(f'{URL}/v1/models: {status}: {{"error": "incorrect API key ***"}}; ')
    remedy = f"the server refuses the API key in the environment variable that {key} names: correct it"
    assert message.endswith(remedy) and SECRET not in message and "\n" not in message
    with pytest.raises(UserError) as error:
        use(client(None, lambda request: httpx.Response(status)))
    assert str(error.value).endswith(
        f"the server needs an API key: set {key} to the name of an environment variable that holds it"
    )


def test_a_route_that_is_off_is_still_one_that_is_missing():
    http = client(SECRET, lambda request: httpx.Response(403, text="disabled"))
    with pytest.raises(RouteMissing, match=r"403: disabled; start it with --x; or the server refuses the API key in"):
        exchange(http, "GET", URL, hint="start it with --x", api_key_env=PLACE)


@pytest.fixture
def tls_server(tmp_path):
    """The address of a server with a certificate that no authority has signed, and its file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "certificate.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(certificate.public_bytes(pem) + private)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments) -> None:
            pass

    class Quiet(HTTPServer):
        def handle_error(self, request, client_address) -> None:
            pass  # clients that end the handshake

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server = Quiet(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"https://localhost:{server.server_address[1]}", file
    server.shutdown()
    server.server_close()


def test_a_certificate_that_is_not_trusted_is_one_line_at_once(tls_server, monkeypatch):
    url, file = tls_server
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(UserError) as error:
        exchange(open_client(5.0, 1), "GET", f"{url}/v1/models")
    message = str(error.value)
    assert message.startswith(f"{url}/v1/models: ConnectError: ") and "CERTIFICATE_VERIFY_FAILED" in message
    assert message.endswith("in SSL_CERT_FILE, or use its http address") and "\n" not in message
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert exchange(open_client(5.0, 1), "GET", f"{url}/v1/models") == b"{}"


def test_https_to_a_server_of_http_is_one_line_at_once():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *arguments: None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        with pytest.raises(UserError, match=r"no encrypted connection is served there: use its http address"):
            exchange(open_client(5.0, 1), "GET", f"https://127.0.0.1:{server.server_address[1]}/v1/models")
    finally:
        server.shutdown()
        server.server_close()


def test_certificates_that_are_not_there_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match=r"SSL_CERT_FILE, SSL_CERT_DIR: the certificates that they name can't be read"):
        open_client(5.0, 1)


def test_a_refused_connection_may_succeed_later():
    with pytest.raises(ServerDown):
        exchange(open_client(5.0, 1), "GET", "https://127.0.0.1:1/v1/models")
    assert not issubclass(ServerDown, ServiceError)

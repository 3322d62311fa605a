"""Run a section of a notebook in the VM, through the forwarded port with the token.

``vagrant-check.py ADDRESS``: ADDRESS as ``vagrant up`` printed it. The notebook is fetched by
Jupyter's contents API, its cells run in a kernel of the VM by the websocket that a browser would
use, and what comes back must say that the finding holds.
"""

import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

from websocket import create_connection

NOTEBOOK = "00-meet-the-kernel.ipynb"
EXPERIMENT = "map-life"
LIMIT_S = 900.0

address = urllib.parse.urlsplit(sys.argv[1])
token = urllib.parse.parse_qs(address.query)["token"][0]


def ask(method: str, path: str, body: object = None, given: str = token) -> dict:
    """Ask Jupyter's REST API."""
    request = urllib.request.Request(
        f"http://{address.netloc}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"token {given}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else {}


def execute(socket, source: str, deadline: float) -> str:
    """Run a cell; its text output. Ends this program where the cell fails."""
    id = uuid.uuid4().hex
    header = {"msg_id": id, "msg_type": "execute_request", "session": id, "username": ""}
    content = {"code": source, "silent": False, "allow_stdin": False}
    message = {"header": header | {"version": "5.3"}, "parent_header": {}, "metadata": {}}
    socket.send(json.dumps(message | {"content": content, "channel": "shell"}))
    said = []
    while time.monotonic() < deadline:
        answer = json.loads(socket.recv())
        if answer["parent_header"].get("msg_id") != id:
            continue
        content = answer["content"]
        if answer["msg_type"] == "stream":
            said.append(content["text"])
        elif answer["msg_type"] in ("display_data", "execute_result"):
            said += [str(text) for kind, text in content["data"].items() if kind.startswith("text")]
        elif answer["msg_type"] == "execute_reply":
            if content["status"] != "ok":
                sys.exit(
                    f"A cell failed: {content.get('ename')}: {content.get('evalue')}\n{source}"
                )
            return "".join(said)
    sys.exit(f"A cell did not end within {LIMIT_S:g} s:\n{source}")


try:
    ask("GET", "/api/contents", given="0" * 48)
    sys.exit("JupyterLab lets somebody in with a wrong token.")
except urllib.error.HTTPError as error:
    if error.code != 403:
        raise

cells = [
    cell["source"]
    for cell in ask("GET", f"/api/contents/{NOTEBOOK}")["content"]["cells"]
    if cell["cell_type"] == "code"
]
measure = next(i for i, source in enumerate(cells) if f'lab.measure("{EXPERIMENT}")' in source)
section = [*cells[measure : measure + 2], "lab.assert_findings()"]

kernel = ask("POST", "/api/kernels", {"name": "python3"})["id"]
socket = create_connection(
    f"ws://{address.netloc}/api/kernels/{kernel}/channels",
    timeout=LIMIT_S,
    header=[f"Authorization: token {token}"],
)
try:
    deadline = time.monotonic() + LIMIT_S
    said = [execute(socket, source, deadline) for source in cells[:2] + section]
    facts = execute(socket, "import os; print(os.uname().release, os.geteuid())", deadline).split()
finally:
    socket.close()
    ask("DELETE", f"/api/kernels/{kernel}")
if "holds" not in said[-2]:
    sys.exit(f"The finding of {EXPERIMENT} is not said to hold:\n{said[-2]}")
print(f"{EXPERIMENT} holds on kernel {facts[0]}, as user {facts[1]}, through {address.netloc}")

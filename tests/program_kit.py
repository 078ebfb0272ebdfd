"""Agents that are programs, for tests: scripts that know nothing of this package and import as little as they can."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

HEAD = """\
import json, os, re, sys, urllib.request
task = json.load(open(sys.argv[1]))
asked = next(m["content"] for m in task["messages"] if m["role"] == "user")
a, b = map(int, re.search(r"(\\d+) \\+ (\\d+)", asked).groups())

def post(url, body, **headers):
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream", **headers}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request).read().decode()

def chat(**more):
    body = {"model": "whatever", "messages": task["messages"], **more}
    key = "Bearer " + os.environ["OPENAI_API_KEY"]
    return post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, Authorization=key)

def tool(name, **arguments):
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
    return json.loads(post(task["mcp_url"], body))["result"]
"""


def program(tmp_path: Path, body: str) -> str:
    """The command that runs this script."""
    file = tmp_path / "agent.py"
    file.write_text(HEAD + textwrap.dedent(body))
    return f"{sys.executable} -S -E {file} {{task_file}}"

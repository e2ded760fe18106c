"""scripts.chat_web as a user runs it: it says where it listens, stops on Ctrl-C, ends with its record, refuses in one line."""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from scripts import base_train, chat_web
from tests.training.tiny import flags

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out := io.StringIO())
        base_train.main(flags(tmp_path_factory.mktemp("served"), num_iterations=1))
    return json.loads(out.getvalue().splitlines()[-1])["checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_while_it_answers_and_it_ends_with_its_record(checkpoint, number):
    words = [sys.executable, "-m", "scripts.chat_web", f"--source={checkpoint}", "--port=0", "--device=cpu", "--seconds=60"]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [server.stdout.readline()]
        url = lines[0].split()[2].rstrip(",")
        lines.append(server.stdout.readline())
        assert "answers on" in lines[1]
        body = {"messages": [{"role": "user", "content": "the king"}], "max_tokens": 4}
        assert httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code == 200
        server.send_signal(number)
        out, err = server.communicate(timeout=20)
        assert server.returncode == 0 and err == ""
        assert json.loads(out.splitlines()[-1])["url"] == url
    finally:
        server.kill()
        server.wait()


def test_it_can_be_run_for_a_time(checkpoint, capsys):
    began = time.monotonic()
    chat_web.main([f"--source={checkpoint}", "--port=0", "--device=cpu", "--seconds=0.2"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["checkpoint"] == checkpoint and time.monotonic() - began < 20 and threading.active_count() < 20


def complaint(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        chat_web.main(list(words))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and len(said.err.strip().splitlines()) == 1
    return said.err


def test_it_refuses_in_one_line(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert "add --api_key=SECRET" in complaint(capsys, "--host=0.0.0.0")
    assert "train a model with python -m scripts.base_train" in complaint(capsys, "--port=0", "--device=cpu")
    assert "no fine-tuned model" in complaint(capsys, "--source=sft", "--port=0")
    assert "--source=/does/not/exist does not exist" in complaint(capsys, "--source=/does/not/exist", "--port=0", "--device=cpu")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port={port} cannot be listened on" in complaint(capsys, f"--source={checkpoint}", f"--port={port}", "--device=cpu")

"""`vllm serve FOLDER` as a user starts it, asked by OpenAI's client: what comes back is what the referee says."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI

from fbs_rl.decode.safety import check_brackets, tau_ladder
from fbs_rl.gate_bundle import GateBundle, GateParts, gate_tensors
from fbs_rl.model import FBSForCausalLM
from fbs_rl.serving.trace_store import GateTrace
from tests.served_text import make_text_folder
from tests.served_tiny import referee
from tests.small_tokenizer import TEXTS
from tests.tiny import LAYERS

START_S, ANSWER_S = 900, 300


# --- the server ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Served:
    """A running server, and the model that it serves as a referee. folder: also the model's name."""

    url: str
    folder: str
    model: FBSForCausalLM
    tokenizer: Any
    log: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=ANSWER_S, max_retries=0)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=ANSWER_S)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=ANSWER_S)

    def call(self, method: str, *arguments: Any) -> Any:
        """What the worker answers to one of its calls."""
        answer = self.post("/collective_rpc", {"method": method, "args": list(arguments)})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"][0]

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics").text, re.M)
        assert found is not None, name
        return float(found[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("http")
    model, tokenizer = make_text_folder(root / "model")
    scratch = root / "tmp"
    scratch.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Served(
        f"http://127.0.0.1:{port}", str(root / "model"), model, tokenizer, root / "log.txt"
    )
    # float32, since equality is what is tested: vLLM would read the folder as bfloat16.
    command = ["serve", found.folder, "--port", str(port), "--dtype", "float32"]
    with found.log.open("w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("vllm")), *command], cwd=root, stdout=log, stderr=log,
            env=environment(scratch), start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: healthy(found, server), START_S, found.log)
        yield found
        assert server.poll() is None, found.log.read_text()[-4000:]
    finally:
        stop(server)
    assert not list(scratch.glob("fbs_stats_*")), "files of counters are left behind"


def environment(scratch: Path) -> dict[str, str]:
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in the engine's process: one start less to wait for
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
    }  # fmt: skip
    return {**os.environ, **settings}


def healthy(found: Served, server: subprocess.Popen[bytes]) -> bool:
    assert server.poll() is None, found.log.read_text()[-4000:]
    with suppress(httpx.HTTPError):
        return found.get("/health").status_code == 200
    return False


def wait_for(holds: Callable[[], bool], limit_s: float, log: Path) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {log.read_text()[-4000:]}"
        time.sleep(0.2)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


# --- requests -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reply:
    """What came back. chunks: how many of them carried tokens."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    chunks: int = 1
    usage: int = 0


def ask(
    served: Served, text: str, options: dict[str, Any], tokens: int = 24, chat: bool = False, stream: bool = False,
) -> Reply:  # fmt: skip
    body: dict[str, Any] = {
        "model": served.folder, "max_tokens": tokens, "temperature": 0, "stream": stream,
        "extra_body": {"vllm_xargs": options, "ignore_eos": True, "return_token_ids": True},
    }  # fmt: skip
    client = served.client
    if chat:
        made: Any = client.chat.completions.create(messages=[{"role": "user", "content": text}], **body)  # fmt: skip
    else:
        made = client.completions.create(prompt=text, **body)
    if stream:
        return streamed(made)
    choice = made.choices[0]
    prompt_ids = made.prompt_token_ids if chat else choice.prompt_token_ids
    content = choice.message.content if chat else choice.text
    return Reply(prompt_ids, choice.token_ids, content, usage=made.usage.completion_tokens)


def streamed(parts: Any) -> Reply:
    reply = Reply([], [], "", chunks=0)
    for part in parts:
        for choice in part.choices:
            held = part if getattr(part, "prompt_token_ids", None) else choice
            reply.prompt_ids = reply.prompt_ids or getattr(held, "prompt_token_ids", None) or []
            reply.token_ids += getattr(choice, "token_ids", None) or []
            reply.text += (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
            reply.chunks += bool(getattr(choice, "token_ids", None))
    return reply


def same_text(ours: str, decoded: str) -> bool:
    """vLLM's text of tokens lacks an end whose bytes are no whole character yet; decode marks it with U+FFFD."""
    shown, full = (text.replace("\ufffd", "") for text in (ours, decoded))
    return full.startswith(shown) if decoded.endswith("\ufffd") else full == shown


def agrees(served: Served, reply: Reply, **gates: Any) -> bool:
    """Whether the referee, with these gates, chooses the reply's tokens."""
    told = {"gates": "threshold", **gates}
    found = referee(served.model, reply.prompt_ids, reply.token_ids, **told)
    return found.chosen == reply.token_ids


def nearest(served: Served, reply: Reply, **gates: Any) -> float:
    """How near the threshold the referee's closest decision on the reply is; 1 for other gates."""
    if gates.get("gates", "threshold") != "threshold":
        return 1.0
    found = referee(served.model, reply.prompt_ids, reply.token_ids, gates="threshold", **gates)
    asked_TL = found.prob_TL > 0
    return float((found.prob_TL - gates["tau"]).abs()[asked_TL].min())


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what is sent, what the referee is told
    ({"tau": 0.5}, {}),
    ({"tau": 0.35}, {"tau": 0.35}),
    ({"tau": 0.65}, {"tau": 0.65}),
    ({"gates": "dense"}, {"gates": "dense"}),
    ({"gates": "sample", "gate_seed": 7}, {"gates": "sample", "gate_seed": 7}),
    ({"never_skip": [0, 3]}, {"never_skip": [0, 3]}),
    ({"tau": 0.4, "never_skip": "first:1,last:1"}, {"tau": 0.4, "never_skip": [0, LAYERS - 1]}),
    ({}, {}),
]


def test_concurrent_requests_with_options_of_their_own_are_the_referees(served: Served) -> None:
    def one(i: int) -> Reply:
        text = f"{TEXTS[i % 4]} {i + 3}"
        return ask(served, text, OPTIONS[i % 8][0], 16 + i, chat=i // 8 % 2 == 1, stream=i >= 16)

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(one, range(32)))
    for i, reply in enumerate(replies):
        assert len(reply.token_ids) == 16 + i
        told = {"tau": 0.5, **OPTIONS[i % 8][1]}
        assert nearest(served, reply, **told) > 1e-5, f"rounding decides request {i}: ask another"
        assert agrees(served, reply, **told)
        decoded = served.tokenizer.decode(reply.token_ids, skip_special_tokens=True)
        assert same_text(reply.text, decoded)
        turn = f"[user] {TEXTS[i % 4]} {i + 3}\n[assistant] "
        prompt = turn if i // 8 % 2 == 1 else f"{TEXTS[i % 4]} {i + 3}"
        assert served.tokenizer.decode(reply.prompt_ids) == prompt
    # The control: four were asked to be dense, and few others are by chance.
    assert sum(agrees(served, reply, gates="dense") for reply in replies) < 10
    assert 0.1 < served.metric("fbs:skip_ratio") < 0.8
    assert 0.2 < served.metric("fbs:executed_flops_ratio") < 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tau": 5}, "tau is 5; give a number in [0, 1]"),
        ({"taus": 0.5}, "unknown option 'taus'; did you mean 'tau'?"),
        ({"tau": 0.5, "gates": "sample"}, 'tau is given, but gates is "sample"'),
        ({"validate": "xml"}, "validate is 'xml'; give one of brackets, json, python"),
    ],
)
def test_a_mistake_is_answered_with_400_and_our_sentence(
    served: Served, options: dict[str, Any], sentence: str, stream: bool
) -> None:
    for chat in (False, True):
        with pytest.raises(BadRequestError, match=re.escape(sentence)) as caught:
            ask(served, "Readers", options, chat=chat, stream=stream)
        assert caught.value.status_code == 400


def test_mistakes_that_need_the_rest_of_the_request(served: Served) -> None:
    with pytest.raises(BadRequestError, match="decode_start is 4000, but the prompt has"):
        ask(served, "Readers", {"decode_start": 4000})
    with pytest.raises(BadRequestError, match="validate checks the one text of a request, but n is 2"):  # fmt: skip
        served.client.completions.create(
            model=served.folder, prompt="Readers", n=2, extra_body={"vllm_xargs": {"validate": "json"}}
        )  # fmt: skip


def test_broken_requests_leave_the_server_up(served: Served) -> None:
    body = {"model": served.folder, "prompt": "Readers", "max_tokens": 4}
    for content in (b"{", b"", b"[]", b'{"model": 1', b"\xff\xfe"):
        answer = httpx.post(
            f"{served.url}/v1/completions", content=content, timeout=ANSWER_S,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code in (400, 422), answer.text
    for xargs in ({"tau": {"deep": 1}}, [0.5], "tau", {"never_skip": [[1]]}):
        assert served.post("/v1/completions", {**body, "vllm_xargs": xargs}).status_code == 400
    assert served.post("/v1/completions", {**body, "vllm_xargs": {"tau": 0.5}}).status_code == 200


def test_a_client_that_goes_away_stops_its_request(served: Served) -> None:
    body = {
        "model": served.folder, "prompt": "Readers", "max_tokens": 900, "ignore_eos": True, "stream": True,
        "vllm_xargs": {"tau": 0.5},
    }  # fmt: skip
    before = served.metric("vllm:generation_tokens_total")
    for _ in range(3):
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=ANSWER_S) as answer:  # fmt: skip
            next(answer.iter_lines())
    wait_for(lambda: served.metric("vllm:num_requests_running") == 0, ANSWER_S, served.log)
    assert served.metric("vllm:generation_tokens_total") - before < 3 * 900
    reply = ask(served, "Readers", {"tau": 0.5})
    assert agrees(served, reply, tau=0.5)


# --- gate updates and traces --------------------------------------------------------------------------


def update(served: Served) -> int:
    """Send the referee's gates as they are now; their version."""
    version = served.call("fbs_gates")["version"] + 1
    bundle = GateBundle.of(version, gate_tensors(served.model, GateParts.GATES))
    packed = base64.b64encode(bundle.pack()).decode()
    assert served.call("fbs_update_gates_base64", packed) == {"version": version, "digest": bundle.digest}  # fmt: skip
    return version


def take(served: Served, *keys: str) -> list[GateTrace]:
    wires = served.call("fbs_take_traces_base64", list(keys))
    return [GateTrace.from_wire({**w, "columns": base64.b64decode(w["columns"])}) for w in wires]


def keep_asking(served: Served, reader: int, changed: Event) -> list[str]:
    """The keys of one request after another; the last of them began behind the change of gates."""
    keys: list[str] = []
    # Of other lengths: readers whose requests end together could all be between two of them.
    tokens = 300 + 20 * reader
    while True:
        last = changed.is_set()
        keys.append(f"load {reader} {len(keys)}")
        reply = ask(served, keys[-1], {"tau": 0.5, "request_key": keys[-1]}, tokens)
        assert len(reply.token_ids) == tokens
        if last:
            return keys


def test_gates_are_exchanged_under_load_and_traces_say_when(served: Served) -> None:
    gates = gate_tensors(served.model, GateParts.GATES)
    old = {name: tensor.detach().clone() for name, tensor in gates.items()}
    changed = Event()
    try:
        with ThreadPoolExecutor(6) as pool:
            enough = served.metric("fbs:decode_tokens_total") + 60
            readers = [pool.submit(keep_asking, served, reader, changed) for reader in range(6)]
            try:
                wait_for(lambda: served.metric("fbs:decode_tokens_total") > enough, ANSWER_S, served.log)  # fmt: skip
                with torch.no_grad():
                    for name, tensor in gates.items():
                        if name.endswith("out.bias"):
                            tensor.add_(1.0)
                version = update(served)
            finally:
                changed.set()  # readers would ask for ever
            traces = [take(served, *reader.result()) for reader in readers]
        reply = ask(served, "Readers", {"tau": 0.5, "request_key": "after"})
        after = referee(served.model, reply.prompt_ids, reply.token_ids, gates="threshold", tau=0.5)
        (trace,) = take(served, "after")
        assert after.chosen == reply.token_ids
        assert torch.equal(torch.from_numpy(trace.skip_TL)[: len(after.skip_TL)], after.skip_TL)
    finally:
        with torch.no_grad():
            for name, tensor in gates.items():
                tensor.copy_(old[name])
        update(served)
    # In the middle of an answer, for whoever was reading then; and one step is the first for all.
    assert any(len(set(one.version_T.tolist())) == 2 for asked in traces for one in asked)
    for asked in traces:
        version_T = np.concatenate([one.version_T for one in asked])
        assert version_T.tolist() == sorted(version_T.tolist())
        assert (version_T[0], version_T[-1]) == (version - 1, version)
        skip_TL = np.concatenate([one.skip_TL for one in asked])
        now_T = version_T == version
        assert skip_TL[~now_T].mean() < skip_TL[now_T].mean()  # the new gates skip more
    assert served.metric("fbs:gate_version") == version + 1


# --- texts that must pass a check ---------------------------------------------------------------------

FALLBACKS = [f"fbs:{n}_total" for n in ("validator_failures", "reruns", "fallbacks", "unresolved")]


def counted(served: Served, ask_it: Callable[[], Reply]) -> tuple[Reply, list[float]]:
    """A reply, and by how much it raised FALLBACKS."""
    before = [served.metric(name) for name in FALLBACKS]
    reply = ask_it()
    return reply, [served.metric(name) - old for name, old in zip(FALLBACKS, before, strict=True)]


def test_a_text_that_never_passes_ends_dense(served: Served) -> None:
    options = {"tau": 0.5, "validate": "json", "reruns": 2, "request_key": "json"}
    for chat, stream in ((False, False), (True, True)):
        reply, counts = counted(
            served, lambda c=chat, s=stream: ask(served, "{", options, chat=c, stream=s)
        )
        assert counts == [3, 2, 1, 1]
        assert agrees(served, reply, gates="dense") and len(reply.token_ids) == 24
        assert reply.chunks == 1  # a stream is held back until its text is kept
        first, second, last = take(served, "json")
        assert first.skip_TL.mean() > second.skip_TL.mean() > last.skip_TL.mean() == 0


def test_the_first_text_that_passes_is_kept(served: Served) -> None:
    """Prompts are tried until one has a text that fails its check, and a stricter one that passes."""
    rungs = tau_ladder(0.5, 3)[:3]
    for i in range(40):
        prompt = f"{TEXTS[i % 4]} ({i}"
        with ThreadPoolExecutor(3) as pool:
            made = pool.map(lambda tau, p=prompt: ask(served, p, {"tau": tau}, tokens=40), rungs)
            texts = [reply.text for reply in made]
        passes = [check_brackets(text) is None for text in texts]
        if not passes[0] and any(passes):
            break
    else:
        pytest.fail("no prompt's text depends on tau in the way that this test needs")
    options = {"tau": 0.5, "validate": "brackets", "reruns": 3}
    reply, counts = counted(served, lambda: ask(served, prompt, options, tokens=40))
    tries = passes.index(True)
    assert reply.text == texts[tries] and counts == [tries, tries, 1, 0]
    assert reply.usage == 40  # of the text that came back


def test_a_text_that_passes_at_once_is_made_once(served: Served) -> None:
    for options in ({"tau": 0.5}, {"tau": 0.5, "validate": "python"}):
        reply, counts = counted(served, lambda o=options: ask(served, "Readers", o, tokens=1))
        assert counts == [0, 0, 0, 0] and len(reply.token_ids) == 1


# --- what the server says -----------------------------------------------------------------------------


def test_the_log_says_once_which_gates_act(served: Served) -> None:
    lines = [line for line in served.log.read_text().splitlines() if "FBS: " in line]
    assert len(lines) == 1
    assert "compact decode path, independent gates; a request that says nothing" in lines[0]
    assert lines[0].endswith("gets gates=threshold, tau=0.5")

"""The command line on tiny real models: what it prints is what the model did."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fbs_rl.decoding import comparison, decode, measures
from fbs_rl.generate import main
from fbs_rl.model import FBSForCausalLM
from fbs_rl.model.flops import count_trace
from fbs_rl.shading import visible
from fbs_rl.types import GateMode
from tests.small_tokenizer import TEXTS
from tests.text_models import LAYERS, NEW, PROMPT, base
from tests.tiny import VOCAB, lively

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def generated(places: dict[str, str], **arguments: Any) -> list[int]:
    """What transformers' generate() makes of PROMPT."""
    model = FBSForCausalLM.from_pretrained(places["fbs"])
    ids = AutoTokenizer.from_pretrained(places["fbs"])(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, **arguments)
    return made[0, ids.shape[1] :].tolist()


def test_json_is_what_generate_makes_and_agrees_with_itself(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, *base(places))
    run = result["run"]
    assert set(result) == {
        "model", "layers", "dtype", "device", "prompt", "prompt_tokens", "gates", "tokens", "run"
    }  # fmt: skip
    assert result["gates"] == {"mode": "threshold", "tau": 0.5, "never_skip": [], "trained": True}
    assert run["token_ids"] == generated(places, gates="threshold", tau=0.5)
    tokenizer = AutoTokenizer.from_pretrained(places["fbs"])
    assert run["text"] == tokenizer.decode(run["token_ids"], skip_special_tokens=True)
    assert run["text"] == "".join(p["text"] for p in run["pieces"])
    trace = torch.tensor(run["skip_trace"]).bool()
    assert run["steps"] == len(trace) == NEW - 1 and run["stop"] == "length"
    assert 0.1 < run["skip_ratio"] < 0.9
    assert run["skip_ratio"] == pytest.approx(trace.float().mean().item())
    assert run["skip_share_by_layer"] == pytest.approx(trace.float().mean(0).tolist())
    assert run["skipped_by_token"] == [*trace.sum(1).tolist(), None]
    assert run["flops"]["eq4"] == pytest.approx(1 - run["skip_ratio"])
    assert run["flops"]["executed"] < run["flops"]["dense"]
    assert run["tokens_per_s"] == pytest.approx(run["steps"] / run["decode_s"])


def test_compare_dense_adds_the_dense_run_and_where_they_part(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, *base(places), "--compare-dense")
    run, dense = result["run"], result["dense"]
    assert dense["token_ids"] == generated(places, gates="dense")
    assert dense["skip_ratio"] == 0 and dense["gate_prob_range"] is None
    assert dense["flops"]["executed"] == dense["flops"]["dense"] and dense["flops"]["eq4"] == 1
    first = result["comparison"]["first_difference"]
    assert run["token_ids"][:first] == dense["token_ids"][:first]
    assert run["token_ids"][first] != dense["token_ids"][first]
    assert result["comparison"]["speedup"] > 0


def test_first_difference_of_equal_and_of_shorter_runs() -> None:
    def made(*tokens: int) -> dict[str, Any]:
        return {"token_ids": list(tokens), "tokens_per_s": None}

    assert comparison(made(1, 2), made(1, 2))["first_difference"] is None
    assert comparison(made(1, 2), made(1, 2, 3))["first_difference"] == 2
    assert comparison(made(1, 2), made(4, 2))["first_difference"] == 0


def test_text_output_has_text_strips_and_table_without_escape_codes(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*base(places), "--compare-dense"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    run = run_json(capsys, *base(places))["run"]
    assert f"{run['skip_ratio']:.1%}" in out and f"{run['flops']['executed_frac']:.4f}" in out
    lines = out.split("\n")
    by_layer = next(i for i, line in enumerate(lines) if "by layer" in line)
    assert len(lines[by_layer + 1]) == LAYERS and lines[by_layer + 2] == "0    5"
    assert "eq (4)" in out and "KV cache" in out and "The texts differ from token" in out
    assert "never been trained" not in out


class Terminal:
    """A pseudo terminal that a thread empties, so that no writer waits."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        self.received = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while block := os.read(self.master, 4096):
                self.received += block
        except OSError:  # the other side was closed
            pass

    def text(self) -> str:
        self.stream.close()
        self.reader.join(timeout=60)
        os.close(self.master)
        return self.received.decode().replace("\r\n", "\n")


def on_terminal(monkeypatch: pytest.MonkeyPatch, *words: str, **environment: str) -> str:
    settings = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "", **environment}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.stream)
        assert main(list(words)) == 0
    return terminal.text()


def test_a_terminal_gets_the_text_shaded(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_terminal(monkeypatch, *base(places))
    assert "\x1b[97;48;2;" in shown and "layers skipped" in shown
    plain = on_terminal(monkeypatch, *base(places), NO_COLOR="1")
    assert "\x1b" not in plain
    assert "\x1b" not in on_terminal(monkeypatch, *base(places), "--no-color")
    text = run_json(capsys, *base(places))["run"]["text"]
    for output in (ESCAPE.sub("", shown), plain):
        assert f"gated by threshold:\n{visible(text)}\n" in output


def test_a_process_reads_standard_input_and_prints_one_json_object(places: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fbs_rl.generate", places["backbone"], "--prompt", "-"]
    command += ["--max-new-tokens", "2", "--json"]
    done = subprocess.run(
        command,
        input=PROMPT + "\n",
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["prompt"] == PROMPT
    assert done.stderr.count("\n") == 1 and "never been trained" in done.stderr
    assert result["gates"]["trained"] is False


def test_prompt_file_and_chat_template(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max-new-tokens", "1", "--prompt-file", places["prompt.txt"]]
    plain = run_json(capsys, places["fbs"], *few)
    assert plain["prompt"] == PROMPT and plain["run"]["skip_ratio"] is None
    assert plain["run"]["flops"] is None and plain["run"]["steps"] == 0
    tokenizer = AutoTokenizer.from_pretrained(places["chat"])
    counts = [
        run_json(capsys, places["chat"], *few, *words)["prompt_tokens"]
        for words in ([], ["--chat"], ["--no-chat"])
    ]
    chatted = len(tokenizer(f"[user] {PROMPT}\n[assistant] ")["input_ids"])
    assert counts == [chatted, chatted, plain["prompt_tokens"]]


def test_gates_are_applied_and_never_skipped_layers_run(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", PROMPT, "--max-new-tokens", str(NEW), "--tau", "0.5"]
    applied = run_json(capsys, places["backbone"], *words, "--gates-folder", places["gates"])
    assert applied["gates"]["trained"] is True
    assert applied["run"]["skip_trace"] == run_json(capsys, *base(places))["run"]["skip_trace"]
    kept = run_json(capsys, places["fbs"], *words, "--never-skip=-1,0")["run"]
    shares = kept["skip_share_by_layer"]
    assert shares[0] == shares[-1] == 0 and kept["skip_ratio"] > 0


def test_preset_and_dtype_and_an_unreached_threshold(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "default", "--dtype", "bfloat16", "--max-new-tokens", "4"]
    code = main([places["backbone"], "--prompt", "skip", *options])
    out = capsys.readouterr().out
    assert code == 0 and "bfloat16" in out and "never been trained" in out
    assert "Nothing was skipped" in out and "below tau 0.8" in out


def test_drawn_tokens_follow_the_seed(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    hot = [*base(places), "--temperature", "1.5", "--top-p", "0.95"]
    runs = [run_json(capsys, *hot, "--seed", s)["run"]["token_ids"] for s in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]
    cold = run_json(capsys, *base(places), "--temperature", "1", "--top-p", "1e-9")
    assert cold["run"]["token_ids"] == run_json(capsys, *base(places))["run"]["token_ids"]


def test_sampled_gates_follow_their_seed_which_is_0_by_default(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    sample = [*base(places), "--mode", "sample"]
    results = [
        run_json(capsys, *sample, *seed)
        for seed in ([], ["--gate-seed", "0"], ["--gate-seed", "7"])
    ]
    traces = [r["run"]["skip_trace"] for r in results]
    assert traces[0] == traces[1] != traces[2]
    assert results[0]["gates"]["gate_seed"] == 0


def test_decoding_stops_at_the_end_of_text(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = run_json(capsys, *base(places))["run"]["token_ids"]
    stop = next(i for i in range(2, NEW) if ids[i] not in ids[:i])
    model = FBSForCausalLM.from_pretrained(places["fbs"])
    model.generation_config.eos_token_id = [ids[stop]]
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(places["fbs"]).save_pretrained(tmp_path)
    run = run_json(capsys, str(tmp_path), *base(places)[1:])["run"]
    assert run["token_ids"] == ids[: stop + 1] and run["stop"] == "eos"
    assert len(run["skip_trace"]) == stop


@pytest.mark.parametrize("kv", ["project", "noop"])
def test_the_loop_decides_and_counts_as_one_parallel_pass_does(kv: str) -> None:
    model = lively(kv_on_skip=kv)
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    prompt, forced = ids[:8], ids[8:]
    tokens = iter(forced)
    made = decode(
        model,
        prompt,
        len(forced),
        lambda _: next(tokens),
        mode=GateMode.THRESHOLD,
        tau=0.5,
        never_skip=[3],
    )
    assert made.token_ids == forced
    fed = torch.tensor([prompt + made.token_ids[:-1]])
    with torch.no_grad():
        whole = model(fed, gates="threshold", tau=0.5, decode_start=len(prompt), never_skip=[3])
    assert torch.equal(whole.skip[:, 0, len(prompt) :], made.skip_LT)
    assert not made.skip_LT[3].any() and made.skip_LT.any()
    torch.testing.assert_close(whole.gate_prob[:, 0, len(prompt) :], made.gate_prob_LT)
    chunks = whole.taps.chunks
    closed_before = chunks.chunk_id_BT[0, len(prompt) - 1 : -1]
    assert made.closed_chunks_T is not None and made.opens_T is not None
    assert torch.equal(made.closed_chunks_T, closed_before)
    assert torch.equal(made.opens_T, chunks.opens_BT[0, len(prompt) :])
    assert made.opens_T.any() and not made.opens_T.all()
    parallel = count_trace(
        model.config,
        whole.skip[:, :, len(prompt) :],
        torch.tensor([len(prompt)]),
        True,
        closed_before.unsqueeze(0),
        chunks.opens_BT[:, len(prompt) :],
    )
    assert measures(model.config, made)["flops"]["executed"] == int(parallel.flops_BT.sum())


def test_a_gateless_model_runs_dense(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, places["gateless"], "--prompt", TEXTS[3], "--max-new-tokens", "3")
    assert result["gates"] == {"mode": "dense"} and result["run"]["skip_ratio"] == 0


def test_ascii_terminals_get_question_marks_instead_of_a_crash(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(base(places)) == 0
    stream.flush()
    assert b"KV cache" in stream.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

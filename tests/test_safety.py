"""Critical layers, protected steps, validators, the fallback ladder and the counts, on tiny real models."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fbs_rl.decode.safety import (
    SafetyCounts,
    StructureGuard,
    check_brackets,
    check_json,
    check_python,
    critical_layers,
    generate_with_fallback,
    tau_ladder,
)
from fbs_rl.decode.structure import Structure
from fbs_rl.decoding import Generation, decode, measures, protecting_start, token_chooser
from fbs_rl.generate import main
from fbs_rl.model import FBSCache
from fbs_rl.types import FBSOutput, GateMode
from tests.small_tokenizer import saveable_tokenizer
from tests.structure_oracle import structure_of
from tests.text_models import LAYERS, tiny_fbs
from tests.tiny import VOCAB, left_padded, lively

# What the tokens of a tiny model say: structure opens and closes often, and prose lies between.
PIECES = ["word ", "a", " and", ". ", "\n\n", "(", ")", "「", "」", '{"k": ', "}", '"', "'", "x"]


def say(ids: list[int]) -> str:
    return "".join(PIECES[i % len(PIECES)] for i in ids)


# --- critical layers --------------------------------------------------------------------------------


def test_critical_layers_are_the_first_and_the_last() -> None:
    assert critical_layers(36) == (0, 1, 30, 31, 32, 33, 34, 35)
    assert critical_layers(9) == (0, 1, 3, 4, 5, 6, 7, 8)
    assert critical_layers(4, 0, 1) == (3,) and critical_layers(4, 0, 0) == ()


@pytest.mark.parametrize("layers, first, last", [(8, 2, 6), (4, 2, 6), (4, 4, 0)])
def test_protecting_every_layer_is_refused(layers: int, first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"of {layers} layers leaves none to skip"):
        critical_layers(layers, first, last)
    with pytest.raises(ValueError, match="give 0 or more"):
        critical_layers(layers, -1, last)


# --- protected steps --------------------------------------------------------------------------------


def forced_run(kv: str, guard: StructureGuard | None, ids: list[int], **gates: Any) -> Generation:
    tokens = iter(ids)
    model = lively(kv_on_skip=kv)
    settings = {"mode": GateMode.THRESHOLD, "tau": 0.5, **gates}
    return decode(model, [1, 2, 3], len(ids), lambda _: next(tokens), guard=guard, **settings)


def some_ids(count: int, seed: int = 4) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=draw).tolist()


@pytest.mark.parametrize("kv", ["project", "noop"])
@pytest.mark.parametrize("mode", [GateMode.THRESHOLD, GateMode.SAMPLE])
def test_protected_steps_run_every_layer_and_others_skip(kv: str, mode: GateMode) -> None:
    ids = some_ids(60)
    gates = {"mode": mode, **({"gate_seed": 3, "tau": None} if mode is GateMode.SAMPLE else {})}
    guard = StructureGuard.of(say)
    made = forced_run(kv, guard, ids, **gates)
    protected = torch.tensor([kind is not None for kind in guard.kinds[0]])
    assert len(protected) == made.skip_LT.shape[1] == 59
    assert 10 < protected.sum() < 50
    assert not made.skip_LT[:, protected].any()
    assert made.skip_LT[:, ~protected].any(0).all()
    plain = forced_run(kv, None, ids, **gates)
    assert plain.skip_LT[:, protected].any(0).all()
    first = int(protected.int().argmax())  # nothing before the first protected step changes
    assert torch.equal(plain.skip_LT[:, :first], made.skip_LT[:, :first])
    cost, free = (
        measures(lively(kv_on_skip=kv).config, m)["flops"]["executed"] for m in (made, plain)
    )
    assert cost > free


def test_a_protected_token_is_one_with_structure_open_before_or_after_it() -> None:
    ids = some_ids(60)
    guard = StructureGuard.of(say)
    forced_run("project", guard, ids)
    for i, kind in enumerate(guard.kinds[0]):
        assert kind == (structure_of(say(ids[: i + 1])) or structure_of(say(ids[:i])))


def test_structure_that_the_prompt_leaves_open_is_protected() -> None:
    guard = StructureGuard.of(say, 1, ['{"a": ['], [[0]])
    assert guard.push([0]) == [True] and guard.kinds[0] == [Structure.JSON]
    assert StructureGuard.of(say).push([0]) == [False]


class Steps:
    """A batch fed step by step; before each step its cache is copied for a dense reference."""

    def __init__(self, rows: int, steps: int, protect: bool) -> None:
        self.model = lively()
        self.prompt, self.mask = left_padded(3, [5, 9, 7][:rows])
        self.ids = torch.randint(
            0, VOCAB, (rows, steps), generator=torch.Generator().manual_seed(8)
        )
        self.guard = StructureGuard.of(say, rows)
        self.protect = protect

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[list[bool], FBSOutput, FBSOutput]]:
        cache, mask = FBSCache(self.model.config.layer_count), self.mask
        self.model(self.prompt, mask, past_key_values=cache, gates="threshold", tau=0.5)
        for step in range(self.ids.shape[1]):
            ids_B1 = self.ids[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(ids_B1)], 1)
            protects = self.guard.push(ids_B1[:, 0].tolist())
            start = protecting_start(cache, protects if self.protect else [False] * len(protects))
            other = copy.deepcopy(cache)
            dense = self.model(ids_B1, mask, past_key_values=other, gates="dense")
            made = self.model(
                ids_B1, mask, past_key_values=cache, gates="threshold", tau=0.5, decode_start=start
            )
            yield protects, made, dense


def test_in_a_batch_each_row_is_protected_by_its_own_text() -> None:
    seen = set()
    for protects, made, dense in Steps(3, 30, protect=True):
        rows = torch.tensor(protects)
        skip_LB = made.skip[:, :, 0]
        assert not skip_LB[:, rows].any() and skip_LB[:, ~rows].any(0).all()
        torch.testing.assert_close(made.logits[rows], dense.logits[rows], atol=1e-5, rtol=1e-5)
        seen.add(tuple(protects))
    assert len(seen) > 3


def test_alone_a_protected_step_is_the_dense_step_to_the_last_bit() -> None:
    equal: dict[bool, list[bool]] = {True: [], False: []}
    for protects, made, dense in Steps(1, 60, protect=True):
        equal[protects[0]].append(torch.equal(made.logits, dense.logits))
    assert all(equal[True]) and len(equal[True]) > 40
    assert not any(equal[False]) and len(equal[False]) >= 5


def test_without_protected_rows_the_step_is_the_usual_one() -> None:
    def trace(protect: bool) -> list[Tensor]:
        return [made.skip for _, made, _ in Steps(3, 12, protect)]

    usual = lively()
    steps = Steps(3, 12, protect=False)
    mask, cache, wanted = steps.mask, FBSCache(usual.config.layer_count), []
    with torch.no_grad():
        usual(steps.prompt, mask, past_key_values=cache, gates="threshold", tau=0.5)
        for column in steps.ids.T:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            made = usual(column[:, None], mask, past_key_values=cache, gates="threshold", tau=0.5)
            wanted.append(made.skip)
    assert all(map(torch.equal, trace(False), wanted))
    assert not all(map(torch.equal, trace(True), wanted))


def test_a_cache_without_a_prompt_cannot_protect() -> None:
    with pytest.raises(ValueError, match="feed it first"):
        protecting_start(FBSCache(2), [True])


# --- validators -------------------------------------------------------------------------------------

VERDICTS = {
    check_brackets: {
        "": None,
        "f(a[1], {2})": None,
        "「他（说）」《书》": None,
        "1) a \"(\" is no (problem) :)\n b) `[`, '('": None,
        "```\n(x\n)\n```": None,
        "f(a": "the ( of line 1 is never closed",
        "a\nb c) ": "the ) in line 2 closes nothing",
        "(a\n]": "the ] in line 2 does not close the ( of line 1",
        "「a』": "the 』 in line 1 does not close the 「 of line 1",
        "a\n```py\nx": "the code fence in line 2 is never closed",
    },
    check_json: {
        '{"a": [1, null, "\\""]}': None,
        " 3\n": None,
        "1" * 5000: None,
        'Here:\n```json\n{"a": 1}\n```\nand\n```\n[]\n```': None,
        "": "this is no JSON: Expecting value: line 1 column 1 (char 0)",
        '{"a": 1,}': "this is no JSON: ",
        "Here: {}": "this is no JSON: ",
        "[NaN]": "this is no JSON: NaN is no JSON number",
        "[" * 100_000: "the JSON is nested too deeply to be read",
        "```json\n{}\n```\n```json\n{\n```": "this is no JSON: ",
        "```json\n{}": "the code fence in line 1 is never closed",
        "```python\nx\n```": "no code fence holds json",
    },
    check_python: {
        "def f(x):\n    return x\n": None,
        'x = "\\d"': None,
        "Look:\n```python\nx = 1\n```\nand\n~~~py\ny\n~~~\n```json\n{\n```": None,
        "def f(:": "this is no Python: invalid syntax (line 1)",
        "x = 1\nreturn x": "this is no Python: 'return' outside function (line 2)",
        "x = '": "this is no Python: unterminated string literal (detected at line 1) (line 1)",
        "\0": "this is no Python: source code string cannot contain null bytes",
        "-" * 100_000 + "1": "the Python is nested too deeply to be read",
        "Look:\n```python\nx = \n```": "this is no Python: invalid syntax (line 1)",
        "```sh\nls\n```": "no code fence holds py",
    },
}


@pytest.mark.parametrize(
    "check, text", [(check, text) for check, texts in VERDICTS.items() for text in texts]
)
def test_validators(check: Any, text: str) -> None:
    wanted, found = VERDICTS[check][text], check(text)
    assert found == wanted or (wanted and wanted.endswith(": ") and found.startswith(wanted))


# --- fallback ---------------------------------------------------------------------------------------


def test_the_ladder_goes_half_way_to_1_and_ends_dense() -> None:
    assert tau_ladder(0.5, 0) == (0.5,)
    assert tau_ladder(0.1, 1) == (0.1, None)
    assert tau_ladder(0.5, 3) == (0.5, 0.75, 0.875, None)


def attempts_of(prompt: int, reruns: int) -> Any:
    model = lively()

    def generate(tau: float | None) -> tuple[Generation, str, int]:
        gates = (
            {"mode": GateMode.DENSE} if tau is None else {"mode": GateMode.THRESHOLD, "tau": tau}
        )
        made = decode(model, [prompt, 2, 3], 6, token_chooser(1.0, 1.0, prompt), **gates)
        return made, say(made.token_ids), measures(model.config, made)["flops"]["executed"]

    return generate_with_fallback(generate, tau_ladder(0.5, reruns), check_brackets)


def test_the_first_text_that_passes_is_kept_and_all_attempts_are_paid() -> None:
    results = [attempts_of(prompt, 2) for prompt in range(30)]
    by_count = {len(r.attempts): r for r in results if r.kept.error is None}
    assert {1, 2, 3} <= set(by_count)
    for result in results:
        *failed, kept = result.attempts
        assert all(check_brackets(say(a.made.token_ids)) == a.error is not None for a in failed)
        assert kept.error == check_brackets(say(kept.made.token_ids))
        assert result.flops == sum(a.flops for a in result.attempts) >= kept.flops > 0
        assert [a.setting for a in result.attempts] == [0.5, 0.75, None][: len(result.attempts)]
    hopeless = next(r for r in results if r.kept.error is not None)
    assert len(hopeless.attempts) == 3 and not hopeless.kept.made.skip_LT.any()


def test_without_a_setting_there_is_nothing_to_generate() -> None:
    with pytest.raises(ValueError, match="at least one setting"):
        generate_with_fallback(lambda tau: (tau, "", 0), [], check_json)


# --- counts -----------------------------------------------------------------------------------------


def test_counts_add_up_and_have_metric_names() -> None:
    json_, quote = Structure.JSON, Structure.QUOTE
    one = SafetyCounts.of([None, json_, json_, quote], ["bad", None])
    two = SafetyCounts.of([None, quote], ["bad"])
    three = SafetyCounts.of([None], [None])
    total = one + two + three
    assert total.metrics() == {
        "safety/tokens": 7,
        "safety/protected_tokens": 4,
        "safety/protected_bracket_tokens": 0,
        "safety/protected_quote_tokens": 2,
        "safety/protected_json_tokens": 2,
        "safety/protected_code_tokens": 0,
        "safety/protected_frac": 4 / 7,
        "safety/validator_failures": 2,
        "safety/reruns": 1,
        "safety/fallbacks": 1,
        "safety/unresolved": 1,
    }
    assert "safety/protected_frac" not in SafetyCounts().metrics()


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("model")
    tokenizer = saveable_tokenizer()
    tiny_fbs(len(tokenizer)).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return str(root)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--max-new-tokens", "16", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_protects_structure(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    open_prompt = run_json(capsys, folder, "--prompt", 'say {"a": [', "--protect-structure")
    run, safety = open_prompt["run"], open_prompt["safety"]
    protected = [kind is not None for kind in run["protected"]]
    assert run["protected"][0] == "json" and len(protected) == run["steps"] == 15
    assert [any(row) for row, kept in zip(run["skip_trace"], protected, strict=True) if kept] == [
        False
    ] * sum(protected)
    assert safety["metrics"]["safety/protected_tokens"] == sum(protected)
    assert safety["metrics"]["safety/tokens"] == 15 and safety["validator"] is None
    assert safety["attempts"][0]["flops"] == run["flops"]["executed"] == safety["executed_flops"]
    plain = run_json(capsys, folder, "--prompt", "say", "--protect-structure")
    assert plain["run"]["skip_ratio"] > 0
    assert "safety" not in run_json(capsys, folder, "--prompt", "say")


def test_generate_never_skips_critical_layers(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder, "--prompt", "skip", "--never-skip", "first:1,last:3,3"]
    result = run_json(capsys, *words)
    shares = result["run"]["skip_share_by_layer"]
    assert result["gates"]["never_skip"] == [3, 0, 5, 6, 7]
    assert [i for i in range(LAYERS) if shares[i]] == [1, 4]  # 2 is the boundary layer


def test_generate_falls_back_and_says_so(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folder, "--prompt", "skip", "--validate", "json"]
    result = run_json(capsys, *words, "--protect-structure")
    attempts, metrics = result["safety"]["attempts"], result["safety"]["metrics"]
    made_with = [(a["mode"], a["tau"]) for a in attempts]
    assert made_with == [("threshold", 0.5), ("threshold", 0.75), ("dense", None)]
    assert all(a["error"] == check_json("skip" + a["text"]) for a in attempts)
    assert result["run"]["mode"] == "dense" and result["run"]["text"] == attempts[-1]["text"]
    assert attempts[0]["skip_ratio"] > attempts[1]["skip_ratio"] > attempts[2]["skip_ratio"] == 0
    assert result["safety"]["executed_flops"] == sum(a["flops"] for a in attempts)
    assert metrics["safety/reruns"] == 2 and metrics["safety/unresolved"] == 1
    assert metrics["safety/tokens"] == sum(a["steps"] for a in attempts)
    once = run_json(capsys, *words, "--reruns", "0")["safety"]["attempts"]
    assert len(once) == 1 and once[0]["error"]
    sampled = run_json(capsys, *words, "--mode", "sample")["safety"]["attempts"]
    assert [a["mode"] for a in sampled] == ["sample", "dense"]


def test_generate_keeps_a_text_that_passes(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "skip", "--validate", "brackets", "--temperature", "1"]
    results = (run_json(capsys, folder, *words, "--seed", str(seed)) for seed in range(50))
    seed, result = next((i, r) for i, r in enumerate(results) if len(r["safety"]["attempts"]) == 2)
    attempts = result["safety"]["attempts"]
    assert attempts[0]["error"] and attempts[1]["error"] is None
    assert result["run"]["tau"] == 0.75 and result["run"]["text"] == attempts[1]["text"]
    assert main([folder, *words, "--seed", str(seed), "--max-new-tokens", "16"]) == 0
    out = capsys.readouterr().out
    assert "the check failed; again, tau 0.75:" in out and "attempt 2 (tau 0.75): passed." in out
    assert "Attempt 2 was kept; decoding executed" in out


def test_the_text_report_names_what_was_protected(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", '{"a": "', "--protect-structure", "--validate", "json"]
    assert main([folder, *words, "--max-new-tokens", "8", "--compare-dense"]) == 0
    out = capsys.readouterr().out
    assert "fed tokens ran every layer (json " in out
    assert "No attempt passed, not even the dense one; its text was kept" in out


def test_a_chat_prompt_is_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = saveable_tokenizer(chat=True)
    tiny_fbs(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["--prompt", '{"a": [', "--protect-structure", "--validate", "json"]
    result = run_json(capsys, str(tmp_path), *words)
    first = result["safety"]["attempts"][0]
    assert first["error"] == check_json(first["text"])
    assert first["skip_ratio"] > 0

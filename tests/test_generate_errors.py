"""What a user of the command line can get wrong: one sentence, exit code 2."""

from __future__ import annotations

import pytest
import torch

from fbs_rl.generate import main
from tests.text_models import base

ERRORS = {
    "tau is too high": ("fbs --prompt x --tau 1.5", "--tau is 1.5"),
    "tau is no number": ("fbs --prompt x --tau high", "argument --tau: invalid float value: 'high'"),
    "tau is nan": ("fbs --prompt x --tau nan", "--tau is nan"),
    "tau without threshold": ("fbs --prompt x --tau 0.5 --mode sample", "not for sample"),
    "no such path": ("nowhere --prompt x", "there is no model folder"),
    "no such gguf": ("nowhere.gguf --prompt x", "there is no file"),
    "empty folder": ("empty --prompt x", "holds no config.json"),
    "gpt2": ("gpt2 --prompt x", "is a gpt2 model; supported are Qwen3"),
    "tokenizer too large": ("backbone --prompt x --tokenizer large", "has token ids up to 329"),
    "tokenizer too small": ("large --prompt x", "has 330 tokens, but the model knows 600"),
    "no prompt": ("fbs", "one of the arguments --prompt --prompt-file is required"),
    "two prompts": ("fbs --prompt x --prompt-file prompt.txt", "not allowed with argument"),
    "empty prompt": ("fbs --prompt _", "the prompt is empty"),
    "empty file": ("fbs --prompt-file empty.txt", "the prompt is empty"),
    "no file": ("fbs --prompt-file nowhere", "there is no file"),
    "no text": ("fbs --prompt-file latin.txt", "is not UTF-8 text"),
    "prompt too long": ("fbs --prompt " + "x" * 120, "has 120 tokens, but the model's context is 96"),
    "too many new": ("fbs --prompt x --max-new-tokens 96", "tokens 96 are more than the model's context of 96"),
    "no new": ("fbs --prompt x --max-new-tokens 0", "ask for at least 1"),
    "other gates": ("fbs --prompt x --max-new-tokens 4 --gates-folder other_gates", "made on another backbone"),
    "retrained": ("backbone --prompt x --max-new-tokens 4 --gates-folder retrained_gates", "made on other weights"),
    "no gates": ("fbs --prompt x --max-new-tokens 4 --gates-folder empty", "is no gates folder"),
    "no preset": ("backbone --prompt x --preset fast", "no preset 'fast'; there are default, paper"),
    "preset of fbs": ("fbs --prompt x --max-new-tokens 4 --preset paper", "leave the preset out"),
    "preset and gates": ("backbone --prompt x --preset paper --gates-folder gates", "leave --preset out"),
    "layer": ("fbs --prompt x --never-skip 0,8", "names layer 8, but"),
    "layers": ("fbs --prompt x --never-skip 0;1", "is no list of layers"),
    "critical layers": ("fbs --prompt x --max-new-tokens 4 --never-skip first:2,last:6", "leaves none to skip"),
    "protected layers": ("fbs --prompt x --max-new-tokens 4 --never-skip first:2,last:5", "leave none of its 8 layers"),
    "spans": ("fbs --prompt x --never-skip first:2,first:3", "is no list of layers like"),
    "dense structure": ("fbs --prompt x --mode dense --protect-structure", "nothing to do with --mode dense"),
    "gateless structure": ("gateless --prompt x --protect-structure", "was made without gates"),
    "no validator": ("fbs --prompt x --validate xml", "invalid choice: 'xml'"),
    "stray reruns": ("fbs --prompt x --reruns 1", "--reruns is for --validate"),
    "negative reruns": ("fbs --prompt x --validate json --reruns -1", "--reruns is -1"),
    "no chat": ("fbs --prompt x --chat", "has no chat template; leave --chat out"),
    "gateless": ("gateless --prompt x --mode sample", "was made without gates"),
    "nothing to compare": ("fbs --prompt x --mode dense --compare-dense", "nothing to compare"),
    "stray seed": ("fbs --prompt x --gate-seed 3", "is for --mode sample"),
    "negative seed": ("fbs --prompt x --seed -3", "--seed is -3"),
    "temperature": ("fbs --prompt x --temperature -1", "--temperature is -1.0"),
    "top-p": ("fbs --prompt x --temperature 1 --top-p 0", "--top-p is 0.0"),
    "greedy top-p": ("fbs --prompt x --top-p 0.5", "needs --temperature above 0"),
    "unknown option": ("fbs --prompt x --taus 0.5", "unrecognized arguments: --taus"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_sentence_and_code_2(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    line, sentence = ERRORS[name]
    words = [" " if word == "_" else places.get(word, word) for word in line.split(" ")]
    words = [word.replace("nowhere.gguf", places["nowhere"] + ".gguf") for word in words]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err
    assert sentence in err


def test_cuda_without_a_device(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*base(places), "--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_verbose_keeps_the_traceback(places: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        main([*base(places), "--max-new-tokens", "0", "--verbose"])

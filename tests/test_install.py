"""scripts/install.sh: what is missing is said in one sentence, before anything is created."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "install.sh"
TOOLS = ("bash", "env", "dirname", "grep", "mkdir", "cat", "chmod", "sh")

# Answers as an interpreter that has everything, and makes environments whose programs write down their words.
PYTHON = """#!/bin/sh
[ "$1" = -V ] && echo "Python {version}"
case "$*" in {lacks}) exit 1 ;; esac
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\n' > "$3/bin/python"
printf '#!/bin/sh\\necho "$@" >> "{log}"\\n' > "$3/bin/uv"
chmod +x "$3/bin/python" "$3/bin/uv"
"""


class Machine:
    """A copy of the script, a PATH with the named tools and nothing else, and what became of a run."""

    def __init__(self, root: Path) -> None:
        self.repo, self.bin, self.log = root / "repo", root / "bin", root / "words"
        (self.repo / "scripts").mkdir(parents=True)
        shutil.copy(SCRIPT, self.repo / "scripts")
        shutil.copytree(SCRIPT.parent.parent / "constraints", self.repo / "constraints")
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)
        (self.bin / "python3").symlink_to(os.path.realpath(sys.executable))
        self.before = self.files()

    def files(self) -> list[Path]:
        return sorted(self.repo.rglob("*"))

    def program(self, name: str, text: str = "#!/bin/sh\nexit 0\n") -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def python(
        self, name: str = "python3", version: str = "3.11.9", lacks: str = "nothing"
    ) -> None:
        self.program(name, PYTHON.format(version=version, lacks=lacks, log=self.log))

    def run(self, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / "bash"), str(self.repo / "scripts" / "install.sh")],
            env={"PATH": str(self.bin), "HOME": str(self.repo.parent), **settings},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def assert_refused(self, *words: str, **settings: str) -> None:
        """Exit code 1, one sentence with these words, and nothing was made or run."""
        done = self.run(VENV="made", **settings)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("install: ") and done.stderr.count("\n") == 1
        assert all(word in done.stderr for word in words), done.stderr
        assert self.files() == self.before and not self.log.exists()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_a_compiler(machine: Machine) -> None:
    """With the real interpreter that runs this test."""
    machine.assert_refused("no C++ compiler was found", "apt install g++", ACCEL="cpu")
    machine.assert_refused("no C++ compiler was found", "name it with CXX", ACCEL="cuda")


@pytest.mark.parametrize("present", [[], ["g++"], ["g++", "clang++"]], ids=str)
def test_a_compiler_that_is_named_but_missing(machine: Machine, present: list[str]) -> None:
    machine.python()
    for name in present:
        machine.program(name)
    machine.assert_refused("no C++ compiler was found", ACCEL="cpu", CXX="no-such-compiler")


@pytest.mark.parametrize("accel", ["tpu", "CPU", "cuda "])
def test_an_unknown_accelerator(machine: Machine, accel: str) -> None:
    machine.assert_refused(f"ACCEL is '{accel}'; set it to cpu or cuda", ACCEL=accel)


def test_an_interpreter_that_is_not_there(machine: Machine) -> None:
    machine.assert_refused("'not-there' was not found", "Python 3.11 or 3.12", PYTHON="not-there")
    (machine.bin / "python3").unlink()
    machine.assert_refused("'python3' was not found", "PYTHON=/path/to/python3.11")


@pytest.mark.parametrize(
    ("name", "lacks", "words"),
    [
        ("old", "*version_info*", "'old' is Python 3.9.2; Python 3.11 or 3.12 is needed"),
        ("slim", "*ensurepip*", "'slim' has no venv module"),
        ("headless", "*Python.h*", "'headless' has no C headers (Python.h)"),
    ],
)
def test_interpreters_that_will_not_do(machine: Machine, name: str, lacks: str, words: str) -> None:
    machine.python(name, version="3.9.2", lacks=lacks)
    machine.program("g++")
    machine.assert_refused(words, ACCEL="cpu", PYTHON=name)


def test_the_version_check_is_a_check_of_the_version(machine: Machine) -> None:
    """The script's own question, put to this interpreter with other versions in its place."""
    line = next(line for line in SCRIPT.read_text().split("\n") if "version_info" in line)
    question = line.split("'")[1]
    answers = {}
    for version in [(2, 7), (3, 9), (3, 10), (3, 11), (3, 12), (3, 13), (4, 0)]:
        code = f"import sys; sys.version_info = {(*version, 4, 'final', 0)}; {question}"
        answers[version] = subprocess.run(
            [sys.executable, "-S", "-c", code], timeout=300
        ).returncode
    assert {v for v, code in answers.items() if code == 0} == {(3, 11), (3, 12)}


@pytest.mark.parametrize(
    ("accel", "gpu", "wanted"),
    [("cpu", True, "cpu"), ("cuda", False, "cuda"), (None, True, "cuda"), (None, False, "cpu")],
)
def test_a_machine_with_everything_installs_one_build(
    machine: Machine, accel: str | None, gpu: bool, wanted: str
) -> None:
    machine.python()
    machine.program("g++")
    machine.program("nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    done = machine.run(**({} if accel is None else {"ACCEL": accel}))
    assert done.returncode == 0, done.stderr
    last = machine.log.read_text().strip().split("\n")[-1]
    places = f"--python .venv -c constraints/{wanted}.txt -e .[{wanted},test]"
    assert last == f"pip install --compile-bytecode {places}"
    made = {
        p.relative_to(machine.repo).parts[0] for p in set(machine.files()) - set(machine.before)
    }
    assert made == {".venv"}

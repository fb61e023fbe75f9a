"""What is refused, with which exit code and words, and that nothing was called before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tpu_scripts.stand_ins import SETTINGS, Machine

LAUNCH = ("launch", "fgclip/tiny")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--name", "a b"], "NAME: expected"),
        (["--name=-x"], "NAME: expected"),
        (["--name=a;rm -rf b"], "NAME: expected"),
        (["--name=$(touch pwned)"], "NAME: expected"),
        (["--name=" + 41 * "a"], "NAME: expected"),
        (["--project=My Project"], "PROJECT: expected a project id"),
        (["--zone=europe-west4"], "ZONE: expected a zone"),
        (["--workdir=/local/runs"], "WORKDIR: expected gs://"),
        (["--workdir=gs://my-bucket/../other"], "WORKDIR: expected gs://"),
        (["--workdir=gs://my-bucket/a b"], "WORKDIR: expected gs://"),
        (["--workdir=gs://my-bucket/`id`"], "WORKDIR: expected gs://"),
        (["--mount=runs"], "MOUNT: expected an absolute path"),
        (["--mount=/mnt/../etc"], "MOUNT: expected an absolute path"),
        (["--slices=0"], "SLICES: expected"),
        (["--capacity=cheap"], "CAPACITY: expected on-demand, spot or reserved"),
        (["--accelerator-type=v5e:16x16"], "ACCELERATOR_TYPE: expected a type such as v5e-256"),
        (["--accelerator-type=v6e-48"], "expected v6e-N with N one of 1 4 8 16 32 64 128 256"),
        (["--accelerator-type=v5p-100"], "expected v5p-N with N one of 8 16 32 64 or a multiple"),
        (["--accelerator-type=v5p-of"], "ACCELERATOR_TYPE: expected a type"),
        (["--create-flags=--network=a;b"], "CREATE_FLAGS: expected flags"),
        (["--create-flags=rm"], "CREATE_FLAGS: expected flags"),
        (["--extras=test"], "EXTRAS: expected tpu"),
        (["--poll-seconds=x"], "POLL_SECONDS: expected seconds"),
        (["--host=0/1"], "--host: only for logs, why and status; launch is for all hosts"),
        (["--colour=red"], "no setting is called COLOUR; there are: ACCELERATOR_TYPE"),
        (["--x[$(touch pwned)]=1"], "no setting is called"),
        (["--name=a\nb"], "NAME holds a control character"),
        (["--name"], "--name: expected a value, found nothing"),
        (["fgclip/base_stage2"], "expected one recipe, found 'fgclip/tiny' and"),
        (["--set"], "--set: expected PATH=VALUE, found nothing"),
        (["--set", "a"], "--set: expected PATH=VALUE, found 'a'"),
        (["--set", "a=b\nc"], "a control character in"),
        (["--settings=nowhere"], "nowhere: no such settings file"),
    ],
)
@pytest.mark.parametrize("script", ["vm", "xpk"])
def test_wrong_values(machine: Machine, script: str, words: list[str], says: str) -> None:
    settings = None if words == ["--settings=nowhere"] else SETTINGS
    # Flags of the case come last, so that they win.
    values = [*LAUNCH, "--poll-seconds=0", *words]
    if settings:
        values[2:2] = ["--settings", str(settings)]
    ran = machine.run(script, *values, settings=None)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert machine.calls() == []
    assert not list(machine.folder.rglob("pwned"))


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("vm", ["--ssh=telnet"], "SSH: expected external, internal or iap"),
        ("vm", ["--runtime-version=a b"], "RUNTIME_VERSION: expected"),
        ("vm", ["--accelerator-type=tpu7x-128"], "only to be had on GKE: tpu_scripts/xpk.sh"),
        ("xpk", ["--cluster=A"], "CLUSTER: expected"),
        ("xpk", ["--image=host/a:tag"], "IMAGE: expected HOST/PATH of an image without a tag"),
        ("xpk", ["--run-as=me"], "RUN_AS: expected root or jaxmods"),
        ("xpk", ["--max-restarts=-1"], "MAX_RESTARTS: expected a number"),
        ("xpk", ["--capacity=reserved"], "RESERVATION: expected the name of the reservation"),
    ],
)
def test_wrong_values_of_one_launcher(
    machine: Machine, script: str, words: list[str], says: str
) -> None:
    ran = machine.run(script, *LAUNCH, *words)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("fgclip/nothing", "fgclip/nothing: no such recipe; 'jaxmods list' shows"),
        ("fgclip", "recipe: expected SYSTEM/RECIPE"),
        ("a/b;id", "recipe: expected SYSTEM/RECIPE"),
        ("", "expected a recipe such as"),
    ],
)
def test_wrong_recipes(machine: Machine, recipe: str, says: str) -> None:
    for script in ("vm", "xpk"):
        ran = machine.run(script, "launch", recipe)
        assert ran.returncode == 2
        assert says in ran.stderr
    assert machine.calls() == []


def test_a_recipe_of_ones_own_is_not_looked_up(machine: Machine) -> None:
    assert machine.run("vm", "launch", "configs/mine.py:small").returncode == 0
    assert machine.run("vm", "create", "fgclip/tiny").returncode == 2  # takes none


def test_settings_are_read_and_never_executed(machine: Machine) -> None:
    settings = machine.folder / "bad.env"
    for text, says in (
        ("NAME=$(touch pwned)\n", "NAME: expected"),
        ("touch pwned\n", "bad.env:1: expected KEY=VALUE, found: touch pwned"),
        ("# fine\nCOLOUR=red\n", "bad.env:2: no setting is called COLOUR"),
    ):
        settings.write_text(SETTINGS.read_text(encoding="utf-8") if "NAME" in text else "")
        settings.write_text(settings.read_text(encoding="utf-8") + text, encoding="utf-8")
        ran = machine.run("vm", "create", settings=settings)
        assert ran.returncode == 2
        assert says in ran.stderr
    assert machine.calls() == []
    assert not list(machine.folder.rglob("pwned"))


DESTRUCTIVE = [("vm", "delete"), ("xpk", "delete"), ("xpk", "delete-cluster")]


@pytest.mark.parametrize(("script", "verb"), DESTRUCTIVE)
def test_deleting_needs_a_yes(machine: Machine, script: str, verb: str) -> None:
    ran = machine.run(script, verb)
    assert ran.returncode == 2
    assert "standard input is not a terminal" in ran.stderr
    assert "--yes" in ran.stderr
    for answer in ("n", "", "maybe"):
        assert machine.run_in_terminal(answer, script, verb) == 1
    assert machine.calls() == []
    assert machine.run_in_terminal("y", script, verb) == 0
    assert machine.run(script, verb, "--yes").returncode == 0
    first, second = machine.calls()
    assert first == second
    assert "delete" in first


def test_replacing_needs_a_yes(machine: Machine) -> None:
    machine.answer("queued-resources describe", "SUSPENDED")
    machine.answer("get jobset", "clip-base Failed")
    for script in ("vm", "xpk"):
        assert machine.run(script, "resume", "fgclip/tiny").returncode == 2
        assert machine.run_in_terminal("n", script, "resume", "fgclip/tiny") == 1
    assert not [call for call in machine.calls() if {"delete", "create"} & set(call)]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_launch_does_not_replace(machine: Machine, state: str) -> None:
    machine.answer("queued-resources describe", state)
    ran = machine.run("vm", *LAUNCH, "--yes")
    assert ran.returncode == 1
    assert f"is {state} and will not become ACTIVE by itself" in ran.stderr
    assert len(machine.calls()) == 1


def test_a_workload_is_not_started_twice(machine: Machine) -> None:
    machine.answer("get jobset", "clip-base ")
    for verb in ("launch", "resume"):
        ran = machine.run("xpk", verb, "fgclip/tiny", "--yes")
        assert ran.returncode == 3
    machine.answer("get jobset", "clip-base Completed")
    ran = machine.run("xpk", *LAUNCH, "--yes")
    assert ran.returncode == 3
    assert "xpk.sh resume fgclip/tiny" in ran.stderr
    assert not [call for call in machine.calls() if call[0] in ("xpk", "docker")]


@pytest.mark.parametrize(
    ("script", "verb", "pattern", "name"),
    [
        ("vm", "create", "queued-resources create", "gcloud compute tpus queued-resources"),
        ("vm", "launch", "queued-resources describe", "gcloud compute tpus queued-resources"),
        ("vm", "launch", " scp ", "gcloud compute tpus queued-resources"),
        ("vm", "launch", "host.sh start", "gcloud compute tpus queued-resources"),
        ("vm", "collect", "storage rsync", "gcloud storage rsync --recursive"),
        ("xpk", "create", "storage attach", "xpk storage attach my-bucket"),
        ("xpk", "launch", "get-credentials", "gcloud container clusters get-credentials"),
        ("xpk", "launch", "docker push", "docker push"),
        ("xpk", "launch", "workload create", "xpk workload create"),
        ("xpk", "status", "get pods", "kubectl"),
    ],
)
def test_a_failing_command_ends_it(
    machine: Machine, script: str, verb: str, pattern: str, name: str
) -> None:
    machine.answer(pattern, code=7)
    ran = machine.run(script, *(LAUNCH if verb == "launch" else (verb,)))
    assert ran.returncode == 7
    assert ran.stderr.splitlines()[-1].startswith(f"error: '{name}")
    assert "failed with exit code 7" in ran.stderr
    assert pattern.strip() in " ".join(machine.calls()[-1])  # nothing came after it


def test_what_does_not_fit_is_not_started(machine: Machine) -> None:
    ran = machine.run("vm", *LAUNCH, "--preflight", PREFLIGHT_CODE="12")
    assert ran.returncode == 12
    assert [call[0] for call in machine.calls()] == ["jaxmods"]
    assert "--preflight" in machine.run("vm", *LAUNCH).stderr  # offered where it was not asked for


def test_code_that_is_not_committed_is_not_started(machine: Machine) -> None:
    (machine.folder / "changed").write_text(" M train/loop.py\n", encoding="utf-8")
    for script in ("vm", "xpk"):
        ran = machine.run(script, *LAUNCH)
        assert ran.returncode == 1
        assert "M train/loop.py" in ran.stderr
    assert machine.calls() == []
    assert machine.run("vm", *LAUNCH, "--ref", "HEAD").returncode == 0


def test_buckets_that_cannot_rename_folders(machine: Machine) -> None:
    for said in ("", "False"):
        machine.answer("buckets describe", said)
        for script in ("vm", "xpk"):
            ran = machine.run(script, "create")
            assert ran.returncode == 1
            assert "--enable-hierarchical-namespace" in ran.stderr
    assert {call[3] for call in machine.calls()} == {"describe"}


def test_what_kubernetes_would_change_is_refused(machine: Machine) -> None:
    ran = machine.run("xpk", *LAUNCH, "--set", "a=$(HOME)", "--no-build")
    assert ran.returncode == 2
    assert "XPK cannot pass on $(" in ran.stderr
    assert not [call for call in machine.calls() if call[0] == "xpk"]


@pytest.mark.parametrize("host", ["a", "1/", "-1", "1/2/3", "all"])
def test_hosts_are_numbers(machine: Machine, host: str) -> None:
    for script in ("vm", "xpk"):
        ran = machine.run(script, "logs", f"--host={host}")
        assert ran.returncode == 2
        assert "--host: expected WORKER or SLICE/WORKER" in ran.stderr
    assert machine.calls() == []


def test_unknown_commands(machine: Machine, tmp_path: Path) -> None:
    for script in ("vm", "xpk"):
        assert machine.run(script, "destroy", settings=None).returncode == 2
        helped = machine.run(script, "help", settings=None)
        assert helped.returncode == 0
        assert f"tpu_scripts/{script}.sh launch RECIPE" in helped.stdout

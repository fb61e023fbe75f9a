"""Every subcommand: what a dry run shows is what runs, word for word; the dry run runs nothing."""

from __future__ import annotations

import shlex

import pytest

from tests.tpu_scripts.stand_ins import COMMIT, Machine, printed

RECIPE = ("fgclip/base_stage2", "--preflight", "--set", "optim.lr=1e-4", "mesh.fsdp=16")
VERBS = {
    "vm": ("create", "launch", "resume", "logs", "why", "status", "stop", "collect", "delete"),
    "xpk": (
        *("create", "launch", "resume", "logs", "why", "status", "collect", "delete"),
        "delete-cluster",
    ),
}
CASES = [(script, verb) for script, verbs in VERBS.items() for verb in verbs]
AWKWARD = 'it\'s "a" $(touch pwned); `touch pwned` & $HOME *\\n  {x}: #y'


def arguments(verb: str) -> tuple[str, ...]:
    return (verb, *RECIPE) if verb in ("launch", "resume") else (verb,)


def fit_of(call: list[str]) -> list[str]:
    """The training command inside a recorded `--command=`, as the last shell would see it."""
    (command,) = (w.removeprefix("--command=") for w in call if w.startswith("--command="))
    words = shlex.split(command)
    return words[words.index("jaxmods") :]


@pytest.mark.parametrize(("script", "verb"), CASES)
@pytest.mark.parametrize("slices", ["1", "3"])
def test_a_dry_run_shows_what_runs(machine: Machine, script: str, verb: str, slices: str) -> None:
    shown = machine.run(script, *arguments(verb), "--slices", slices, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert machine.calls() == []
    ran = machine.run(script, *arguments(verb), "--slices", slices, "--yes")
    assert ran.returncode == 0, ran.stderr
    calls = machine.calls()
    assert calls
    status = (script, verb) == ("vm", "status")  # its second half depends on the state, here ACTIVE
    assert calls == printed(shown.stdout, conditional=status)


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_resume_replaces_what_was_taken_away(machine: Machine, state: str) -> None:
    shown = machine.run("vm", *arguments("resume"), "--dry-run")
    machine.answer("queued-resources describe", state, once=True)
    ran = machine.run("vm", *arguments("resume"), "--yes")
    assert ran.returncode == 0, ran.stderr
    calls = machine.calls()
    assert calls == printed(shown.stdout, conditional=True)
    verbs = [call[4] for call in calls if call[0] == "gcloud"]
    assert verbs == ["describe", "delete", "create", "describe", "scp", "ssh", "ssh"]


@pytest.mark.parametrize("condition", ["Completed", "Failed", "StartupPolicyCompleted Failed"])
def test_resume_removes_a_workload_that_has_ended(machine: Machine, condition: str) -> None:
    shown = machine.run("xpk", *arguments("resume"), "--dry-run")
    machine.answer("get jobset", f"clip-base {condition}")
    ran = machine.run("xpk", *arguments("resume"), "--yes")
    assert ran.returncode == 0, ran.stderr
    assert machine.calls() == printed(shown.stdout, conditional=True)


def test_logs_of_a_failure_end_with_the_cause(machine: Machine) -> None:
    shown = machine.run("vm", "logs", "--dry-run")
    machine.answer("host.sh failure", "2026-01-01T00:00:00.5Z t1v-w-3 Traceback (most recent")
    machine.answer("host.sh logs", code=11)
    ran = machine.run("vm", "logs")
    assert ran.returncode == 11
    assert machine.calls() == printed(shown.stdout, conditional=True)
    assert "exit code 11: another host was lost: resume" in ran.stdout

    shown = machine.run("xpk", "logs", "--dry-run")
    machine.answer("get pods", "clip-base-slice-job-0-3 Failed exit code 13")
    machine.answer(
        "kubectl .* --tail=-1",
        "[pod/clip-base-slice-job-0-3/jax-tpu] 2026-01-01T00:00:00.25Z jaxmods: not finite\n"
        "[pod/clip-base-slice-job-0-1/jax-tpu] 2026-01-01T00:00:00.3Z jaxmods: a host was lost",
    )
    ran = machine.run("xpk", "logs")
    assert ran.returncode == 13
    assert machine.calls() == printed(shown.stdout, conditional=True)
    assert "earliest failure: clip-base-slice-job-0-3, 2026-01-01T00:00:00.25" in ran.stdout
    assert "a host was lost" not in ran.stdout


def test_a_host_that_is_gone_hides_nothing(machine: Machine) -> None:
    machine.answer("host.sh status", "w-0: clip-base ended with exit code 11", code=255)
    machine.answer("host.sh failure", "2026-01-01T00:00:00.5Z w-0 jaxmods: lost w-1", code=255)
    shown = machine.run("vm", "status")
    assert shown.returncode == 0
    assert "w-0: clip-base ended with exit code 11" in shown.stdout
    why = machine.run("vm", "why")
    assert "jaxmods: lost w-1" in why.stdout
    assert "Not every host has answered (exit code 255)" in shown.stderr
    assert "Not every host has answered (exit code 255)" in why.stderr


def test_launch_waits_until_the_tpus_are_there(machine: Machine) -> None:
    machine.answer("queued-resources describe", "PROVISIONING", once=True)
    machine.answer("queued-resources describe", "WAITING_FOR_RESOURCES", once=True)
    ran = machine.run("vm", *arguments("launch"))
    assert ran.returncode == 0, ran.stderr
    verbs = [call[4] for call in machine.calls() if call[0] == "gcloud"]
    assert verbs == ["describe"] * 3 + ["scp", "ssh", "ssh"]
    order = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    places = [ran.stderr.index(f"clip-base: {state}") for state in order]
    assert places == sorted(places)


@pytest.mark.parametrize("script", ["vm", "xpk"])
def test_values_arrive_intact(machine: Machine, script: str) -> None:
    value = AWKWARD if script == "vm" else AWKWARD.replace("$(", "$ (")
    words = ("launch", "fgclip/tiny", "--set", f"data.path={value}", "a=", "b=*", "--ref=HEAD")
    further = ("--", "--allow-change", "optim.lr", value)
    assert machine.run(script, *words, *further).returncode == 0
    call = machine.calls()[-1]
    workdir = ["jaxmods", "fit", "fgclip/tiny", "--workdir", "/mnt/jaxmods/runs/clip-base"]
    sets = ["--set", f"data.path={value}", "a=", "b=*"]
    assert fit_of(call) == [*workdir, *sets, "--allow-change", "optim.lr", value]
    assert not list(machine.folder.rglob("pwned"))


def test_settings_become_flags(machine: Machine) -> None:
    settings = machine.folder / "mine.env"
    settings.write_text(
        "# a comment\n\nPROJECT=my-project\n  # indented\nZONE=us-east5-a \nNAME=a-run\n"
        "ACCELERATOR_TYPE=v5p-128\nSLICES=2\nWORKDIR=gs://my.bucket/deep/runs/\n"
        "CAPACITY=reserved\nRESERVATION=mine\nCREATE_FLAGS=--network=tpu --labels=team=a,b=c\n"
        "CLUSTER=pod\nIMAGE=host.dev/a/b\nRUN_AS=jaxmods\nEXTRAS=tpu,data\nSSH=iap\n"
        "MAX_RESTARTS=3",
        encoding="utf-8",
    )
    assert machine.run("vm", "create", settings=settings).returncode == 0
    create = machine.calls()[-1]
    assert create[4:6] == ["create", "a-run"]
    assert set(create) >= {
        *("--zone=us-east5-a", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"),
        *("--node-count=2", "--node-prefix=a-run", "--reserved"),
        *("--network=tpu", "--labels=team=a,b=c"),
    }
    # The command line wins over the file.
    words = ("launch", "fgclip/tiny", "--name", "other", "--accelerator-type=v5e-16")
    assert machine.run("vm", *words, settings=settings).returncode == 0
    setup, start = machine.calls()[-2:]
    assert "--tunnel-through-iap" in setup
    assert f"setup jaxmods-{COMMIT}.tar.gz {COMMIT} tpu,data my.bucket /mnt/jaxmods" in setup[-1]
    assert fit_of(start)[-1] == "/mnt/jaxmods/deep/runs/other"
    assert machine.run("xpk", "create", settings=settings).returncode == 0
    cluster, storage = machine.calls()[-2:]
    assert "--reservation=mine" in cluster
    assert storage[3] == "my-bucket"
    assert machine.run("xpk", *words, "--no-build", settings=settings).returncode == 0
    calls = machine.calls()
    assert not [call for call in calls if call[0] == "docker"]
    assert {"--tpu-type=v5litepod-16", "--max-restarts=3"} <= set(calls[-1])


def test_one_host_can_be_named(machine: Machine) -> None:
    assert machine.run("vm", "logs", "--host", "1/3").returncode == 0
    assert {"--node=1", "--worker=3"} <= set(machine.calls()[0])
    assert machine.run("xpk", "logs", "--host", "2").returncode == 0
    logs = machine.calls()[1]
    labels = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=2"
    assert f"--selector=jobset.sigs.k8s.io/jobset-name=clip-base,{labels}" in logs


def test_collect_can_leave_checkpoints_out(machine: Machine) -> None:
    assert machine.run("vm", "collect", "--to", "here", "--no-checkpoints").returncode == 0
    (call,) = machine.calls()
    folder = machine.folder / "home" / "here"  # relative to where the command was typed
    assert call[3:] == [
        "--recursive",
        "--exclude=^(checkpoints|frozen)/.*",
        "gs://my-bucket/runs/clip-base",
        str(folder),
    ]
    assert folder.is_dir()


def test_status_says_what_exit_codes_mean(machine: Machine) -> None:
    machine.answer("host.sh status", "w-10: a ended with exit code 11\nw-2: a running, 12:00:00 b")
    ran = machine.run("vm", "status")
    assert ran.stdout.splitlines() == [
        "queued resource clip-base: ACTIVE",
        "w-2: a running, 12:00:00 b",
        "w-10: a ended with exit code 11",
        "exit code 11: another host was lost: resume",
    ]
    machine.answer("get jobset", "clip-base Failed")
    machine.answer("get pods", "clip-base-0 Running exit code \nclip-base-1 Failed exit code 12")
    ran = machine.run("xpk", "status")
    assert "workload clip-base: Failed" in ran.stdout
    assert "exit code 12: out of memory" in ran.stdout

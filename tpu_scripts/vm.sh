#!/usr/bin/env bash
# Trains a recipe on Cloud TPU VMs, which it gets through a queued resource.
#
#   tpu_scripts/vm.sh create                  ask for the TPUs (SLICES of ACCELERATOR_TYPE)
#   tpu_scripts/vm.sh launch RECIPE           wait for them, install, start; --preflight checks first
#   tpu_scripts/vm.sh logs [--host S/W]       follow all hosts, or worker W of slice S
#   tpu_scripts/vm.sh why                     the earliest failure, with its host
#   tpu_scripts/vm.sh status                  state of the request, and of every host
#   tpu_scripts/vm.sh resume RECIPE           as launch; asks before it replaces TPUs that were taken away
#   tpu_scripts/vm.sh stop                    save and stop
#   tpu_scripts/vm.sh collect [--to DIR]      copy the run folder here; --no-checkpoints
#   tpu_scripts/vm.sh delete                  give the TPUs back; the run folder in the bucket stays
#
# Settings are read from tpu_scripts/settings.env (or --settings FILE); every one is a flag too:
# --name my-run. --dry-run prints the commands and runs none. --yes answers questions.
# launch and resume: --set PATH=VALUE ..., --ref COMMIT, and after -- further options of `jaxmods fit`.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

host_script='jaxmods/code/tpu_scripts/host.sh'

tpus=(gcloud compute tpus queued-resources)
where=() reach=()

on_hosts() { # prefix, words: sets remote, what runs them on the hosts of --host (default: all)
  local quoted
  quote "${@:2}"
  remote=("${tpus[@]}" ssh "${setting[NAME]}" "${where[@]}" --node="$slice" --worker="$worker"
    "${reach[@]}" --command="$1$quoted")
}

create() {
  local nodes=(--node-id="${setting[NAME]}") capacity=()
  ((setting[SLICES] == 1)) ||
    nodes=(--node-count="${setting[SLICES]}" --node-prefix="${setting[NAME]}")
  case "${setting[CAPACITY]}" in
    spot) capacity=(--spot) ;;
    reserved) capacity=(--reserved) ;;
  esac
  run "${tpus[@]}" create "${setting[NAME]}" "${where[@]}" \
    --accelerator-type="${setting[ACCELERATOR_TYPE]}" \
    --runtime-version="${setting[RUNTIME_VERSION]}" "${nodes[@]}" "${capacity[@]}" "${create_flags[@]}"
}

find_state() { # sets state; a dry run assumes ACTIVE
  capture state ACTIVE "${tpus[@]}" describe "${setting[NAME]}" "${where[@]}" \
    '--format=value(state.state)'
}

wait_until_active() {
  local before=''
  while :; do
    find_state
    [[ -n $dry_run || $state == "$before" ]] || note "queued resource ${setting[NAME]}: $state"
    before="$state"
    case "$state" in
      ACTIVE)
        quiet=''
        return
        ;;
      SUSPENDED | FAILED | DELETING)
        die 1 "queued resource ${setting[NAME]} is $state and will not become ACTIVE by itself; \
'tpu_scripts/vm.sh resume $recipe' replaces it"
        ;;
    esac
    quiet=1
    sleep "${setting[POLL_SECONDS]}"
  done
}

recreate_if_lost() { # what was preempted or has failed, after a confirmation
  find_state
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    note "queued resource ${setting[NAME]}: $state"
    quiet=1
    sleep "${setting[POLL_SECONDS]}"
    find_state
  done
  quiet=''
  [[ -n $dry_run || $state == SUSPENDED || $state == FAILED ]] || return 0
  confirm "Queued resource ${setting[NAME]} is $state. Delete it and ask for the same TPUs again? \
The run folder $run_folder is not touched."
  only_if 'if the state is SUSPENDED or FAILED, and after a confirmation'
  run "${tpus[@]}" delete "${setting[NAME]}" "${where[@]}" --force --quiet
  create
  always
}

start() { # launch or resume
  local archive fit
  find_commit
  check_fits
  [[ $1 != resume ]] || recreate_if_lost
  wait_until_active
  pack_code
  run "${tpus[@]}" scp "$archive" "${setting[NAME]}:" "${where[@]}" --node=all --worker=all "${reach[@]}"
  archive="${archive##*/}"
  on_hosts "mkdir -p jaxmods/setup && tar -xzf $archive -C jaxmods/setup tpu_scripts/host.sh && " \
    bash jaxmods/setup/tpu_scripts/host.sh setup "$archive" "$commit" "${setting[EXTRAS]}" "$bucket" \
    "${setting[MOUNT]}"
  run "${remote[@]}"
  find_fit
  on_hosts '' bash "$host_script" start "${setting[NAME]}" "$mounted_folder" "${fit[@]}"
  run "${remote[@]}"
  [[ -n $dry_run ]] || note "Started. Next: tpu_scripts/vm.sh logs, status, why, stop"
}

logs() {
  local code=0
  on_hosts '' bash "$host_script" logs "${setting[NAME]}"
  remote+=(--batch-size=all) # by default the 65th host would wait for the others to end
  if [[ -n $dry_run ]]; then
    show "${remote[@]}"
    only_if 'if a host ends with an exit code other than 0'
    why
    return
  fi
  show "${remote[@]}" | sed 's/^/+ /' >&2
  "${remote[@]}" || code=$?
  ((code != 0)) || return 0
  printf 'exit code %s: %s\n' "$code" "$(meaning "$code")"
  slice=all worker=all
  (why) || true
  exit "$code"
}

why() {
  local found tolerant=1
  on_hosts '' bash "$host_script" failure "${setting[NAME]}"
  capture found '' "${remote[@]}"
  [[ -n $dry_run ]] || awk -v show=1 -f tpu_scripts/earliest.awk <<< "$found"
}

status() {
  local report
  find_state
  [[ -n $dry_run ]] || printf 'queued resource %s: %s\n' "${setting[NAME]}" "$state"
  [[ $state == ACTIVE ]] || return 0
  [[ -z $dry_run ]] || only_if 'if it is ACTIVE'
  local tolerant=1
  on_hosts '' bash "$host_script" status
  capture report '' "${remote[@]}"
  [[ -n $dry_run ]] || sort --version-sort <<< "$report" | explain
}

stop() {
  on_hosts '' bash "$host_script" stop
  run "${remote[@]}"
}

delete() {
  confirm "Delete queued resource ${setting[NAME]} with its TPU VMs and what is on their disks? \
The run folder $run_folder is not touched."
  run "${tpus[@]}" delete "${setting[NAME]}" "${where[@]}" --force --quiet
}

help() { sed -n '2,/^$/s/^# \{0,1\}//p' tpu_scripts/vm.sh; }

main() {
  local verb="${1:-help}" state slice worker remote
  case "$verb" in
    create | launch | resume | logs | why | status | stop | collect | delete) ;;
    help | -h | --help) help && return ;;
    *) die 2 "no command is called '$verb'; tpu_scripts/vm.sh help shows them" ;;
  esac
  parse "${@:2}"
  check_settings
  [[ $family != tpu7x ]] || die 2 'ACCELERATOR_TYPE: tpu7x is only to be had on GKE: tpu_scripts/xpk.sh'
  if [[ -z ${setting[RUNTIME_VERSION]} ]]; then
    case "$family" in
      v5litepod) setting[RUNTIME_VERSION]=v2-alpha-tpuv5-lite ;;
      v5p) setting[RUNTIME_VERSION]=v2-alpha-tpuv5 ;;
      v6e) setting[RUNTIME_VERSION]=v2-alpha-tpuv6e ;;
      *) setting[RUNTIME_VERSION]=tpu-ubuntu2204-base ;;
    esac
  fi
  check RUNTIME_VERSION '[a-z0-9][a-z0-9.-]*' 'a TPU software version'
  check SSH 'external|internal|iap' 'external, internal or iap'
  where=(--project="${setting[PROJECT]}" --zone="${setting[ZONE]}")
  case "${setting[SSH]}" in
    internal) reach=(--internal-ip) ;;
    iap) reach=(--tunnel-through-iap) ;;
  esac
  check_host "$verb"
  check_recipe "$verb"
  case "$verb" in
    create) check_bucket && create ;;
    launch | resume) start "$verb" ;;
    logs) logs ;;
    why) why ;;
    status) status ;;
    stop) stop ;;
    collect) collect ;;
    delete) delete ;;
  esac
}

main "$@"; exit

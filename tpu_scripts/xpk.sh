#!/usr/bin/env bash
# Trains a recipe on TPUs of Google Kubernetes Engine, through XPK.
#
#   tpu_scripts/xpk.sh create                 a cluster with SLICES of ACCELERATOR_TYPE, and the bucket in it
#   tpu_scripts/xpk.sh launch RECIPE          container image, workload; --preflight checks first
#   tpu_scripts/xpk.sh logs [--host S/W]      follow all hosts, or worker W of slice S
#   tpu_scripts/xpk.sh why                    the earliest failure, with its host
#   tpu_scripts/xpk.sh status                 state of the workload, and of every host
#   tpu_scripts/xpk.sh resume RECIPE          as launch; asks before it removes a workload that has ended
#   tpu_scripts/xpk.sh collect [--to DIR]     copy the run folder here; --no-checkpoints
#   tpu_scripts/xpk.sh delete                 save, stop and remove the workload; the run folder stays
#   tpu_scripts/xpk.sh delete-cluster         give the TPUs back
#
# Settings are read from tpu_scripts/settings.env (or --settings FILE); every one is a flag too:
# --name my-run. --dry-run prints the commands and runs none. --yes answers questions.
# launch and resume: --set PATH=VALUE ..., --ref COMMIT, --no-build (the image is there already), and
# after -- further options of `jaxmods fit`.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

container=jax-tpu # the name that XPK gives it
where=() kubectl=()

create() {
  local capacity=(--on-demand)
  case "${setting[CAPACITY]}" in
    spot) capacity=(--spot) ;;
    reserved) capacity=(--reservation="${setting[RESERVATION]}") ;;
  esac
  check_bucket
  run xpk cluster create "${where[@]}" --tpu-type="${setting[ACCELERATOR_TYPE]}" \
    --num-slices="${setting[SLICES]}" "${capacity[@]}" --enable-gcsfuse-csi-driver "${create_flags[@]}"
  # The size has no meaning for a bucket but has to be given. Hosts wait for each other's folders,
  # hence no memory of what was not there a moment ago.
  run xpk storage attach "$storage" "${where[@]}" --type=gcsfuse --bucket="$bucket" --size=1 \
    --mount-point="${setting[MOUNT]}" --readonly=false --auto-mount=false \
    --mount-options=implicit-dirs,uid=1000,gid=1000,metadata-cache:negative-ttl-secs:0
}

connect() { # lets kubectl reach the cluster
  run gcloud container clusters get-credentials "${setting[CLUSTER]}" --location="$region" \
    --project="${setting[PROJECT]}"
}

find_workload() { # sets workload, empty or its name, and conditions, those that it has reached
  capture workload '' "${kubectl[@]}" get jobset "${setting[NAME]}" --ignore-not-found \
    '--output=jsonpath={.metadata.name} {.status.conditions[?(@.status=="True")].type}'
  conditions="${workload#"${setting[NAME]} "}"
}

remove_if_ended() { # after a confirmation
  if [[ -n $workload && ! $conditions =~ (^|\ )(Completed|Failed) ]]; then
    die 3 "workload ${setting[NAME]} has not ended; it restarts by itself. tpu_scripts/xpk.sh status, logs, delete"
  fi
  [[ -n $dry_run || -n $workload ]] || return 0
  confirm "Workload ${setting[NAME]} has ended. Remove it, with its logs in the cluster, and start it again? \
The run folder $run_folder is not touched."
  only_if 'if a workload of that name has ended, and after a confirmation'
  run xpk workload delete "${where[@]}" --workload="${setting[NAME]}" --force
  always
}

start() { # launch or resume
  local archive fit image word quoted
  find_commit
  check_fits
  connect
  find_workload
  if [[ $1 == resume ]]; then
    remove_if_ended
  elif [[ -n $workload ]]; then
    die 3 "workload ${setting[NAME]} is there already: ${conditions:-waiting}. If it has ended: tpu_scripts/xpk.sh resume $recipe"
  fi
  image="${setting[IMAGE]}:$commit"
  if [[ -n $build ]]; then
    pack_code
    run_from "$archive" docker build --tag="$image" --file=tpu_scripts/Dockerfile \
      --build-arg=EXTRAS="${setting[EXTRAS]}" --build-arg=RUN_AS="${setting[RUN_AS]}" -
    run docker push "$image"
  fi
  find_fit
  for word in "${fit[@]}"; do # Kubernetes would put variables in
    [[ $word != *\$\(* ]] || die 2 "XPK cannot pass on \$( in '$word'"
  done
  quote "${fit[@]}"
  # exec: the signal of a preemption then reaches jaxmods itself.
  run xpk workload create "${where[@]}" --workload="${setting[NAME]}" --docker-image="$image" \
    --tpu-type="${setting[ACCELERATOR_TYPE]}" --num-slices="${setting[SLICES]}" --storage="$storage" \
    --max-restarts="${setting[MAX_RESTARTS]}" --restart-on-exit-codes=10,11 \
    --termination-grace-period-seconds=300 --command="exec $quoted"
  [[ -n $dry_run ]] || note "Started. Next: tpu_scripts/xpk.sh logs, status, why, delete"
}

pods() { # sets selector: the pods of --host
  selector="jobset.sigs.k8s.io/jobset-name=${setting[NAME]}"
  [[ $slice == all ]] || selector+=",jobset.sigs.k8s.io/job-index=$slice"
  [[ $worker == all ]] || selector+=",batch.kubernetes.io/job-completion-index=$worker"
}

read_logs=(logs --container="$container" --prefix --timestamps --ignore-errors)

logs() {
  local code
  connect
  pods
  run "${kubectl[@]}" "${read_logs[@]}" --selector="$selector" --tail=20 --follow \
    --max-log-requests=$((setting[SLICES] * hosts_per_slice))
  find_codes
  code="$(grep -Eo 'exit code [1-9][0-9]*' <<< "$codes" | head -n 1)" || true
  [[ -n $dry_run || -n $code ]] || return 0
  only_if 'if a host has ended with an exit code other than 0'
  slice=all worker=all
  why || true
  [[ -n $dry_run ]] || exit "${code##* }"
}

why() {
  local found tolerant=1
  pods
  capture found '' "${kubectl[@]}" "${read_logs[@]}" --selector="$selector" --tail=-1 \
    --max-log-requests=$((setting[SLICES] * hosts_per_slice))
  [[ -n $dry_run ]] ||
    printf '%s\n' "$found" | sed 's|^\[pod/\([^/]*\)/[^]]*\] \([^ ]*\) |\2 \1 |' |
    awk -v show=1 -f tpu_scripts/earliest.awk
}

find_codes() { # sets codes: a line for every host
  pods
  capture codes '' "${kubectl[@]}" get pods --selector="$selector" \
    '--output=jsonpath={range .items[*]}{.metadata.name} {.status.phase} exit code {.status.containerStatuses[?(@.name=="'"$container"'")].state.terminated.exitCode}{"\n"}{end}'
}

status() {
  connect
  find_workload
  [[ -n $workload ]] && conditions="${conditions:-waiting}" || conditions='not there'
  [[ -n $dry_run ]] || printf 'workload %s: %s\n' "${setting[NAME]}" "$conditions"
  find_codes
  [[ -n $dry_run ]] || sort --version-sort <<< "$codes" | explain
  run xpk workload list "${where[@]}" --filter-by-job="${setting[NAME]}"
}

delete() {
  confirm "Save, stop and remove workload ${setting[NAME]} in cluster ${setting[CLUSTER]}? \
The run folder $run_folder is not touched."
  run xpk workload delete "${where[@]}" --workload="${setting[NAME]}" --force
}

delete_cluster() {
  confirm "Delete cluster ${setting[CLUSTER]} with everything that runs in it? The bucket is not touched."
  run xpk cluster delete "${where[@]}" --force
}

help() { sed -n '2,/^$/s/^# \{0,1\}//p' tpu_scripts/xpk.sh; }

main() {
  local verb="${1:-help}" slice worker storage region workload conditions selector codes
  case "$verb" in
    create | launch | resume | logs | why | status | collect | delete | delete-cluster) ;;
    help | -h | --help) help && return ;;
    *) die 2 "no command is called '$verb'; tpu_scripts/xpk.sh help shows them" ;;
  esac
  parse "${@:2}"
  check_settings
  check CLUSTER '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'at most 40 of a-z, 0-9 and -, from a letter'
  check IMAGE '[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)+' 'HOST/PATH of an image without a tag'
  check RUN_AS 'root|jaxmods' 'root or jaxmods'
  check MAX_RESTARTS '[0-9]{1,4}' 'a number'
  [[ ${setting[CAPACITY]} != reserved || -n ${setting[RESERVATION]} ]] ||
    die 2 'RESERVATION: expected the name of the reservation, since CAPACITY=reserved'
  check_host "$verb"
  check_recipe "$verb"
  region="${setting[ZONE]%-*}" storage="${bucket//[._]/-}"
  where=(--cluster="${setting[CLUSTER]}" --project="${setting[PROJECT]}" --zone="${setting[ZONE]}")
  kubectl=(kubectl --context="gke_${setting[PROJECT]}_${region}_${setting[CLUSTER]}")
  case "$verb" in
    create) create ;;
    launch | resume) start "$verb" ;;
    logs) logs ;;
    why) connect && why ;;
    status) status ;;
    collect) collect ;;
    delete) delete ;;
    delete-cluster) delete_cluster ;;
  esac
}

main "$@"; exit

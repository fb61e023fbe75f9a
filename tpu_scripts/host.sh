#!/usr/bin/env bash
# Runs on every TPU VM, called by vm.sh over ssh, in the home folder.
#
#   host.sh setup ARCHIVE COMMIT EXTRAS BUCKET MOUNT    code, Python environment, bucket
#   host.sh start NAME RUN_FOLDER COMMAND...            detached from the connection; never twice
#   host.sh logs NAME | failure NAME | status | stop
#
# ~/jaxmods/code holds the code, ~/jaxmods/runs/NAME the log, exit code and pid of the newest start.
# Every line of the log has its time. Once a minute it is copied to RUN_FOLDER/hosts in the bucket.

set -euo pipefail
export TZ=UTC

home="$HOME/jaxmods"
code="$home/code"
me="$(hostname)"

die() { # exit code, message
  printf '%s: error: %s\n' "$me" "$2" >&2
  exit "$1"
}

running() { # the lock is held by the run itself, so it ends with it, however it ends
  mkdir -p "$home"
  ! flock --nonblock "$home/lock" true
}

setup() { # archive, commit, extras, bucket, mount
  local python='' candidate
  running && die 3 "$(current) is running here; wait for it, or tpu_scripts/vm.sh stop"
  mkdir -p "$code"
  find "$code" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf "$1" -C "$code"
  for candidate in python3.12 python3.11 python3; do
    "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue
    python="$candidate"
    break
  done
  if [[ -z $python ]]; then # the images of 2026 have Python 3.10: a private one, without root
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    python="$(python3 -m uv python find 3.12)"
  fi
  PYTHON="$python" bash "$code/setup.sh" "$3"
  mount_bucket "$4" "$5"
  printf '%s\n' "$2" > "$code/COMMIT"
  printf '%s: commit %s installed, gs://%s at %s\n' "$me" "$2" "$4" "$5"
}

mount_bucket() { # bucket, folder
  mountpoint -q "$2" && return
  if ! type -P gcsfuse > /dev/null; then
    local source keys=/usr/share/keyrings/cloud.google.asc
    source="gcsfuse-$(lsb_release -c -s)"
    curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" > /dev/null
    echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt $source main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    # A machine that has just started may still be installing updates.
    sudo apt-get --option=DPkg::Lock::Timeout=600 --quiet --quiet update
    sudo apt-get --option=DPkg::Lock::Timeout=600 --quiet --quiet --yes install gcsfuse
  fi
  sudo mkdir -p "$2"
  sudo chown "$(id -u):$(id -g)" "$2"
  # Hosts wait for each other's folders: what was not there a moment ago is asked for again.
  gcsfuse --implicit-dirs --metadata-cache-negative-ttl-secs=0 "$1" "$2"
}

current() { cat "$home/current" 2> /dev/null || true; }

start() { # name, run folder, command
  local run="$home/runs/$1" wanted
  wanted="$(printf '%q ' "${@:2}")"
  exec 9>> "$home/lock"
  if ! flock --nonblock 9; then
    # A connection that broke is tried again by gcloud: the second time this is no error.
    [[ "$(cat "$run/command" 2> /dev/null)" == "$wanted" && -n "$(find "$run/command" -mmin -2)" ]] ||
      die 3 "$(current) is running here already; tpu_scripts/vm.sh status, logs, stop"
    printf '%s: started\n' "$me"
    return
  fi
  mkdir -p "$run"
  [[ ! -e $run/log ]] || mv "$run/log" "$run/log.before-$(date +%Y%m%dT%H%M%SZ)"
  rm -f "$run/exit" "$run/pid" "$run/child"
  : > "$run/log"
  printf '%s' "$wanted" > "$run/command"
  printf '%s\n' "$1" > "$home/current"
  PATH="$code/.venv/bin:$PATH" setsid nohup bash "$code/tpu_scripts/host.sh" supervise "$run" "${@:2}" \
    < /dev/null >> "$run/supervisor" 2>&1 &
  printf '%s: started\n' "$me"
}

supervise() { # log folder, run folder, command; not called by hand
  local run="$1" copy
  copy="$2/hosts/$me.$(date +%Y%m%dT%H%M%SZ).log"
  shift 2
  echo "$BASHPID" > "$run/pid"
  # The command gets signals itself, and saves; passed on to it, they would stop it at once.
  trap : TERM HUP
  {
    trap : TERM HUP
    "$@" &
    echo "$!" > "$run/child"
    while :; do
      code=0
      wait "$!" || code=$?
      kill -0 "$!" 2> /dev/null || break # else a signal has interrupted the wait
    done
    echo "$code" > "$run/code"
  } 2>&1 | stamp "$run/log" "$copy"
  mv "$run/code" "$run/exit"
}

stamp() { # log, copy: adds the time to every line
  local line part='' code copied=0
  trap : TERM HUP
  while :; do
    code=0
    IFS= read -r -t 60 line || code=$? # 1: the end; above 128: nothing for a minute
    part+="$line"
    if [[ $code -eq 0 || ($code -eq 1 && -n $part) ]]; then
      printf '%(%FT%T)T.%sZ %s\n' "${EPOCHREALTIME%.*}" "${EPOCHREALTIME#*.}" "$part" >> "$1"
      part=''
    fi
    if ((code == 1 || EPOCHSECONDS - copied >= 60)); then
      mkdir -p "${2%/*}" && cp "$1" "$2" || echo "cannot copy the log to $2" >&2
      copied=$EPOCHSECONDS
    fi
    ((code != 1)) || return 0
  done
}

logs() { # name: the last lines, and what follows; ends with the run, with its exit code
  local run="$home/runs/$1" follow=()
  [[ -e $run/log ]] || die 1 "no run called $1 was started here"
  while [[ ! -e $run/pid ]] && running; do sleep 0.1; done
  ! running || follow=(--follow=name --pid="$(cat "$run/pid")")
  tail --lines=20 "${follow[@]}" "$run/log" | sed --unbuffered "s/^/$me /"
  [[ -e $run/exit ]] || die 1 "$1 ended without an exit code; was the machine restarted?"
  printf '%s exit code %s\n' "$me" "$(cat "$run/exit")"
  exit "$(cat "$run/exit")"
}

failure() { # name: lines for earliest.awk
  [[ -e $home/runs/$1/log ]] || return 0
  sed "s/^\([^ ]*\) /\1 $me /" "$home/runs/$1/log" | awk -f "$code/tpu_scripts/earliest.awk"
}

status() {
  local name run
  name="$(current)"
  run="$home/runs/$name"
  if running; then
    printf '%s: %s running, %s\n' "$me" "$name" "$(tail --lines=1 "$run/log")"
  elif [[ -z $name ]]; then
    printf '%s: nothing was started\n' "$me"
  elif [[ -e $run/exit ]]; then
    printf '%s: %s ended with exit code %s\n' "$me" "$name" "$(cat "$run/exit")"
  else
    printf '%s: %s ended without an exit code; was the machine restarted?\n' "$me" "$name"
  fi
}

stop() {
  running || { printf '%s: nothing is running\n' "$me" && return; }
  kill -TERM "$(cat "$home/runs/$(current)/child")"
  printf '%s: %s was told to save and stop; tpu_scripts/vm.sh status says when it has\n' "$me" "$(current)"
}

case "${1:-}" in
  setup) setup "${@:2}" ;;
  start) start "${@:2}" ;;
  supervise) supervise "${@:2}" ;;
  logs) logs "$2" ;;
  failure) failure "$2" ;;
  status) status ;;
  stop) stop ;;
  *) die 2 "no command is called '${1:-}'" ;;
esac; exit # on one line: this file may be replaced while it runs

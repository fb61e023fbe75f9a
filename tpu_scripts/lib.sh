# shellcheck shell=bash
# shellcheck disable=SC2034  # variables that vm.sh and xpk.sh read
# What vm.sh and xpk.sh share: settings and their validation, printing and running of commands,
# confirmations, the training command, exit codes, and copying a run back.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: expected bash 4.4 or newer, found $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
fi
set -euo pipefail
shopt -s inherit_errexit
LC_ALL=C # so that [a-z] means what it says

started_in="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Every setting with its default. A settings file replaces them, flags replace both:
# ACCELERATOR_TYPE=v6e-64 in the file, --accelerator-type v6e-64 on the command line.
declare -A setting=(
  [PROJECT]='' [ZONE]='' [ACCELERATOR_TYPE]='' [SLICES]=1 [CAPACITY]=on-demand [RESERVATION]=''
  [NAME]='' [WORKDIR]='' [MOUNT]=/mnt/jaxmods [EXTRAS]=tpu [CREATE_FLAGS]='' [POLL_SECONDS]=30
  [RUNTIME_VERSION]='' [SSH]=external                      # vm.sh
  [CLUSTER]='' [IMAGE]='' [RUN_AS]=root [MAX_RESTARTS]=10  # xpk.sh
)

dry_run='' yes='' quiet='' tolerant='' input='' preflight='' ref='' host='' to='' checkpoints=1 build=1
recipe='' sets=() fit_args=() create_flags=()
family='' hosts_per_slice='' bucket='' run_folder='' mounted_folder='' commit=''

die() { # exit code, message
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

note() { printf '%s\n' "$*" >&2; }

# Commands: printed in a form that a shell reads back as the same words, then run.

quote() { # words: sets quoted, in which a shell reads the same words
  local word
  quoted=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+^-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    quoted+="${quoted:+ }$word"
  done
}

show() { # a command, over several lines when it is long
  local indent="${conditional:+  }" line='' text='' word quoted words=()
  for word in "$@"; do quote "$word" && words+=("$quoted"); done
  [[ -z $input ]] || { quote "$input" && words+=("< $quoted"); }
  for word in "${words[@]}"; do
    if [[ -n $line ]] && ((${#line} + ${#word} > 92)); then
      text+="$line \\"$'\n'"$indent    "
      line=''
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$indent$text$line"
}

announce() { # a command that is about to run
  [[ -n $quiet ]] || show "$@" | sed 's/^/+ /' >&2
}

run() { # a command; its failure ends the script with its exit code
  local code=0
  if [[ -n $dry_run ]]; then
    show "$@"
    return
  fi
  announce "$@"
  if [[ -n $input ]]; then
    "$@" < "$input" || code=$?
  else
    "$@" || code=$?
  fi
  ((code == 0)) || failed "$code" "$@"
}

run_from() { # file, command that reads it
  local input="$1"
  run "${@:2}"
}

capture() { # variable, what a dry run assumes, command: its output into the variable
  local output="$2" code=0
  if [[ -n $dry_run ]]; then
    show "${@:3}"
  else
    announce "${@:3}"
    output="$("${@:3}")" || code=$?
    ((code == 0)) || [[ -n $tolerant ]] || failed "$code" "${@:3}"
    ((code == 0)) || note "Not every host has answered (exit code $code). What the others say:"
  fi
  printf -v "$1" %s "$output"
}

failed() { # exit code, command
  quote "${@:2:4}"
  die "$1" "'$quoted ...' failed with exit code $1; its message is above"
}

# A dry run cannot know the state of the cloud: what depends on it is printed indented, with when.
conditional=''
only_if() {
  [[ -z $dry_run ]] || printf '# only %s:\n' "$1"
  conditional=1
}
always() {
  [[ -z $dry_run ]] || printf '# in any case:\n'
  conditional=''
}

confirm() { # question
  [[ -z $dry_run && -z $yes ]] || return 0
  [[ -t 0 ]] || die 2 "this needs a confirmation and standard input is not a terminal: $1
Repeat it in a terminal, or add --yes"
  local answer=''
  read -r -p "$1 [y/N] " answer || true
  [[ $answer == [yY] || $answer == [yY]es ]] || die 1 'not confirmed: nothing was changed'
}

# Settings and options.

set_setting() { # key, value, where it was given
  [[ $1 =~ ^[A-Z_]+$ && -n ${setting[$1]+there} ]] ||
    die 2 "$3: no setting is called $1; there are: $(printf '%s\n' "${!setting[@]}" | sort | tr '\n' ' ')"
  [[ $2 != *[[:cntrl:]]* ]] || die 2 "$3: $1 holds a control character"
  setting[$1]="$2"
}

read_settings() { # file of KEY=VALUE lines; it is read, never executed
  local line key number=0
  [[ -f $1 ]] || die 2 "$1: no such settings file; copy tpu_scripts/settings.example.env"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die 2 "$1:$number: expected KEY=VALUE, found: $line"
    key="${BASH_REMATCH[1]}" line="${BASH_REMATCH[2]%"${BASH_REMATCH[2]##*[![:space:]]}"}"
    set_setting "$key" "$line" "$1:$number"
  done < "$1"
}

from_start() { # path given by the user, relative to where the command was typed
  [[ $1 == /* ]] && printf '%s' "$1" || printf '%s' "$started_in/$1"
}

parse() { # arguments after the subcommand
  local file='' keys=() values=() flag value i
  while (($#)); do
    flag="$1" value=''
    shift
    case "$flag" in
      --) fit_args=("$@") && break ;;
      --dry-run) dry_run=1 && continue ;;
      --yes) yes=1 && continue ;;
      --preflight) preflight=1 && continue ;;
      --no-checkpoints) checkpoints='' && continue ;;
      --no-build) build='' && continue ;;
      --set)
        [[ -n ${1:-} && $1 != -* ]] || die 2 '--set: expected PATH=VALUE, found nothing'
        while (($#)) && [[ $1 != --* ]]; do sets+=("$1") && shift; done
        continue
        ;;
      --*=*) value="${flag#*=}" flag="${flag%%=*}" ;;
      --*)
        (($#)) || die 2 "$flag: expected a value, found nothing"
        value="$1"
        shift
        ;;
      *)
        [[ -z $recipe ]] || die 2 "expected one recipe, found '$recipe' and '$flag'"
        recipe="$flag"
        continue
        ;;
    esac
    case "$flag" in
      --settings) file="$(from_start "$value")" ;;
      --ref) ref="$value" ;;
      --host) host="$value" ;;
      --to) to="$(from_start "$value")" ;;
      *)
        flag="${flag#--}"
        flag="${flag//-/_}"
        keys+=("${flag^^}") values+=("$value")
        ;;
    esac
  done
  if [[ -n $file ]]; then
    read_settings "$file"
  elif [[ -f tpu_scripts/settings.env ]]; then
    read_settings tpu_scripts/settings.env
  fi
  for i in "${!keys[@]}"; do set_setting "${keys[i]}" "${values[i]}" 'command line'; done
}

check() { # key, pattern, what is expected
  local flag="${1//_/-}"
  [[ ${setting[$1]} =~ ^($2)$ ]] ||
    die 2 "$1: expected $3, found '${setting[$1]}'; set it in the settings file or with --${flag,,}"
}

check_settings() { # those that every command needs
  local rest word
  check PROJECT '[a-z][a-z0-9-]{4,28}[a-z0-9]' 'a project id'
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' 'a zone such as europe-west4-b'
  check NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'at most 40 of a-z, 0-9 and -, from a letter'
  setting[WORKDIR]="${setting[WORKDIR]%/}"
  check WORKDIR 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*' \
    'gs://BUCKET or gs://BUCKET/FOLDER of plain names'
  check MOUNT '(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+' 'an absolute path of plain names'
  check SLICES '[1-9][0-9]{0,2}' 'a number of slices'
  check CAPACITY 'on-demand|spot|reserved' 'on-demand, spot or reserved'
  check RESERVATION '[A-Za-z0-9/_-]*' 'the name of a reservation'
  check EXTRAS 'tpu(,[a-z]+)*' 'tpu, or tpu and further extras of pyproject.toml: tpu,data'
  check POLL_SECONDS '[0-9]{1,4}' 'seconds'
  check_accelerator
  read -r -a create_flags <<< "${setting[CREATE_FLAGS]}"
  for word in "${create_flags[@]}"; do
    [[ $word =~ ^--[a-z][a-z-]*(=[A-Za-z0-9@._/:,=+-]+)?$ ]] ||
      die 2 "CREATE_FLAGS: expected flags such as --network=tpu, separated by spaces, found '$word'"
  done
  rest="${setting[WORKDIR]#gs://}"
  bucket="${rest%%/*}"
  run_folder="${setting[WORKDIR]}/${setting[NAME]}"
  mounted_folder="${setting[MOUNT]}${rest#"$bucket"}/${setting[NAME]}"
}

check_accelerator() { # sets family and hosts_per_slice; v5e-N becomes gcloud's v5litepod-N
  local size sizes chips
  check ACCELERATOR_TYPE '(v4|v5e|v5litepod|v5p|v6e|tpu7x)-[1-9][0-9]{0,4}' \
    'a type such as v5e-256, v5p-128, v6e-64 or tpu7x-128'
  family="${setting[ACCELERATOR_TYPE]%-*}" size="${setting[ACCELERATOR_TYPE]##*-}"
  [[ $family != v5e ]] || family=v5litepod
  if [[ $family == v5litepod || $family == v6e ]]; then # counts chips, in a plane
    chips=$size sizes='1 4 8 16 32 64 128 256'
  else # counts TensorCores, two per chip; from 128 on whole cubes of 64 chips
    chips=$((size / 2)) sizes='8 16 32 64 or a multiple of 128'
    ((size % 128)) || sizes+=" such as $size"
  fi
  [[ " $sizes " == *" $size "* ]] ||
    die 2 "ACCELERATOR_TYPE: expected $family-N with N one of $sizes, found '$size'"
  setting[ACCELERATOR_TYPE]="$family-$size"
  hosts_per_slice=$(((chips + 3) / 4)) # one more than there is for v5litepod-8, a single VM
}

check_host() { # command; --host SLICE/WORKER or WORKER sets slice and worker, else both are 'all'
  slice=all worker=all
  [[ -n $host ]] || return 0
  [[ $1 =~ ^(logs|why|status)$ ]] || die 2 "--host: only for logs, why and status; $1 is for all hosts"
  [[ $host =~ ^(([0-9]{1,3})/)?([0-9]{1,4})$ ]] ||
    die 2 "--host: expected WORKER or SLICE/WORKER, counted from 0, found '$host'"
  slice="${BASH_REMATCH[2]:-0}" worker="${BASH_REMATCH[3]}"
}

# What is run on the hosts.

find_jaxmods() { # the command on this machine, if there is one
  if type -P jaxmods > /dev/null; then
    printf jaxmods
  elif [[ -x .venv/bin/jaxmods ]]; then
    printf .venv/bin/jaxmods
  fi
}

check_recipe() { # command
  local word installed known
  if [[ $1 != launch && $1 != resume ]]; then
    [[ -z $recipe ]] || die 2 "$1 takes no recipe, found '$recipe'"
    return 0
  fi
  [[ -n $recipe ]] || die 2 'expected a recipe such as fgclip/base_stage1; jaxmods list shows them'
  [[ $recipe =~ ^[A-Za-z0-9_][A-Za-z0-9_./-]*(:[A-Za-z0-9_]+)?$ && $recipe == *[/:]* ]] ||
    die 2 "recipe: expected SYSTEM/RECIPE, MODULE:FUNCTION or FILE.py:FUNCTION, found '$recipe'"
  for word in "${sets[@]}"; do
    [[ $word =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]] || die 2 "--set: expected PATH=VALUE, found '$word'"
  done
  for word in "$recipe" "${sets[@]}" "${fit_args[@]}"; do
    [[ $word != *[[:cntrl:]]* ]] || die 2 "a control character in '$word'"
  done
  installed="$(find_jaxmods)"
  if [[ -n $installed && $recipe != *:* ]]; then
    known="$("$installed" list --json)" || failed $? "$installed" list --json
    [[ $known == *"\"recipe\": \"$recipe\""* ]] ||
      die 2 "$recipe: no such recipe; '$installed list' shows those there are"
  fi
}

find_fit() { # sets fit, the command of every host
  fit=(jaxmods fit "$recipe" --workdir "$mounted_folder")
  ((${#sets[@]} == 0)) || fit+=(--set "${sets[@]}")
  fit+=("${fit_args[@]}")
}

check_fits() { # the real step, compiled for the real topology, on this machine
  local command=("$(find_jaxmods)" preflight "$recipe" --topology "${setting[ACCELERATOR_TYPE]}"
    --slices "${setting[SLICES]}")
  ((${#sets[@]} == 0)) || command+=(--set "${sets[@]}")
  if [[ -z $preflight ]]; then
    note "Not checked whether it compiles and fits; --preflight does, before anything is started."
    return
  fi
  [[ -n ${command[0]} ]] || die 2 "--preflight: jaxmods is not installed here; 'bash setup.sh preflight'"
  run "${command[@]}"
}

find_commit() { # sets commit; what is sent is what is committed
  local changed
  commit="$(git rev-parse --verify --short=12 "${ref:-HEAD}^{commit}")" ||
    die 2 "--ref: expected a commit of this repository, found '${ref:-HEAD}'"
  [[ -z $ref ]] || return 0
  changed="$(git status --porcelain -- pyproject.toml setup.sh jaxmods train configs data_pipelines)"
  [[ -z $changed ]] || die 1 "the hosts get committed code, and these files differ from it:
$changed
Commit them, or name what is to run: --ref HEAD"
}

pack_code() { # sets archive
  local folder="${XDG_CACHE_HOME:-$HOME/.cache}/jaxmods"
  archive="$folder/jaxmods-$commit.tar.gz"
  run mkdir -p "$folder"
  run git archive --format=tar.gz --output="$archive" "$commit"
}

# After the start.

collect() { # the run folder, from the bucket to here
  local target="${to:-runs/${setting[NAME]}}" flags=(--recursive)
  [[ -n $checkpoints ]] || flags+=('--exclude=^(checkpoints|frozen)/.*')
  run mkdir -p "$target"
  run gcloud storage rsync "${flags[@]}" "$run_folder" "$target"
  [[ -n $dry_run ]] || note "run folder: $target"
}

check_bucket() { # checkpoints are finished by renaming a folder, which only such buckets can
  local enabled
  capture enabled True gcloud storage buckets describe "gs://$bucket" --project="${setting[PROJECT]}" \
    --raw '--format=value(hierarchicalNamespace.enabled)'
  [[ ${enabled,,} == true ]] || die 1 "gs://$bucket has no hierarchical namespace, without which \
checkpoints cannot be written to it. Make one:
  gcloud storage buckets create gs://NEW --project=${setting[PROJECT]} --location=${setting[ZONE]%-*} \
--uniform-bucket-level-access --enable-hierarchical-namespace"
}

meaning() { # exit code of jaxmods (train/exits.py)
  case "$1" in
    0) printf 'done' ;;
    1) printf 'error: the message in the log says what to do' ;;
    2) printf 'wrong usage: an unknown recipe, option, path or value' ;;
    10) printf 'preempted, state saved: resume' ;;
    11) printf 'another host was lost: resume' ;;
    12) printf 'out of memory: --preflight shows what takes it' ;;
    13) printf 'loss or gradient not finite: nonfinite.json in the run folder names the records' ;;
    14) printf 'data below the floor: nothing to read, or too many bad records' ;;
    137) printf 'killed, usually for want of host memory: resume' ;;
    143) printf 'ended by a signal before the state could be saved: resume' ;;
    *) printf 'not an exit code of jaxmods' ;;
  esac
}

explain() { # passes lines on; says once what each 'exit code N' in them means
  local line
  local -A seen=()
  while IFS= read -r line; do
    printf '%s\n' "$line"
    if [[ $line =~ 'exit code '([0-9]+)$ ]]; then seen[${BASH_REMATCH[1]}]=1; fi
  done
  for line in "${!seen[@]}"; do printf 'exit code %s: %s\n' "$line" "$(meaning "$line")"; done
}

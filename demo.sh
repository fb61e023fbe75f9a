#!/usr/bin/env bash
# The main job on embedded data, from nothing: installs into .venv, trains fgclip/tiny on the scene
# world, evaluates it on unseen scenes, writes report.html, exports to a PyTorch folder.
#   bash demo.sh [WORKDIR [OPTIONS OF fit]]    (default runs/demo; a run found there is continued)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

workdir="${1:-runs/demo}"
started=$SECONDS
bash setup.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
jaxmods=.venv/bin/jaxmods

"$jaxmods" fit fgclip/tiny --workdir "$workdir" "${@:2}"
"$jaxmods" export fgclip/tiny --from "$workdir" --to "$workdir/pytorch" --verify --overwrite
"$jaxmods" report "$workdir"

echo
echo "Done in $((SECONDS - started)) s. Look at:"
echo "  $workdir/report.html    curves, retrieval grid, regions and heat maps, data counters"
echo "  $workdir/pytorch/       the model as a PyTorch/Hugging Face folder, with verify.json"
echo "  $workdir/metrics.jsonl  every logged number"

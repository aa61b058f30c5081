#!/usr/bin/env bash
# Tests beside several torches: tools/matrix.sh 2.6.0 2.13.0 2.14.1
#
# For each version: a fresh virtual environment, `pip install .` timed, that no torch was downloaded checked, then the
# fast suite on an editable install. A row of docs/compatibility.md for each goes to standard output; logs go to LOGS
# (default: a new folder). Gigabytes are downloaded for versions with CUDA. Set SLOW=1 to run the slow tests, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
echo "logs: $logs" >&2
for version in "$@"; do
  environment=$(mktemp -d) source=$(mktemp -d)
  git clone --quiet . "$source"
  python3 -m venv "$environment"
  (
    source "$environment/bin/activate"
    cd "$source"
    pip install --quiet "torch==$version" numpy > "$logs/$version-torch.log" 2>&1
    before=$(python -c 'import torch; print(torch.__version__)')
    began=$SECONDS
    pip install . > "$logs/$version-install.log" 2>&1
    seconds=$((SECONDS - began))
    after=$(python -c 'import torch; print(torch.__version__)')
    [ "$before" = "$after" ] || { echo "pip replaced torch $before by $after" >&2; exit 1; }
    pip install --quiet -e '.[test]' > "$logs/$version-editable.log" 2>&1
    python -m pytest -q ${SLOW:+-m "slow or not slow"} > "$logs/$version-tests.log" 2>&1 || true
    python=$(python -c 'import platform; print(platform.python_version())')
    result=$(tail -1 "$logs/$version-tests.log" | tr -d '=' | sed 's/^ *//; s/ *$//')
    echo "| $before | $python | $seconds s | $result |"
  )
  rm -rf "$environment" "$source"
done

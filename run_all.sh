#!/usr/bin/env bash
# Run every method, or those named, over several seeds, and rebuild results/ and README's table:
#   ./run_all.sh [names] [--seeds N] [--jobs N] [--threads N] [--data NAME] [--out DIR] [--force]
# Up-to-date results are skipped; a failing script is reported at the end with exit code 1.
cd "$(dirname "$0")" && exec "${PYTHON:-python}" ledger.py run "$@"

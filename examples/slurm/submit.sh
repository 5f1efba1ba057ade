#!/usr/bin/env bash
# submit.sh CONFIG BLOCKS [KEY=VALUE]...
#
# Puts a whole run into the queue: prepare -> an array of BLOCKS blocks -> stitch -> stage 2, each after what it needs.
# BLOCKS is the number of layers divided by transfer.blocks.size: 10 for 80 layers and a size of 8. Options of your
# cluster (--partition, --account) come from the variables that sbatch reads: SBATCH_PARTITION, SBATCH_ACCOUNT. AT_ONCE
# blocks are trained at the same time (8 without it).
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2s/^# //p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
config=$1 last=$(($2 - 1))
shift 2

queue() {
    sbatch --parsable --kill-on-invalid-dep=yes "$@"
}

prepare=$(queue "$here/prepare.sbatch" "$config" "$@")
blocks=$(queue --dependency="afterok:$prepare" --array="0-$last%${AT_ONCE:-8}" "$here/block.sbatch" "$config" "$@")
stitch=$(queue --dependency="afterok:$blocks" "$here/stitch.sbatch" "$config" "$@")
finetune=$(queue --dependency="afterok:$stitch" "$here/finetune.sbatch" "$config" "$@")
echo "prepare $prepare, blocks $blocks, stitch $stitch, stage 2 $finetune"

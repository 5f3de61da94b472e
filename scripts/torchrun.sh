#!/bin/bash
# One node's part of a run over several nodes by torchrun. Start it on every node, with the same arguments:
#
#   NODES=4 GPUS=4 HOST=node0:29500 scripts/torchrun.sh configs/nft_stitched_sd35m.yaml
#
# NODES is the number of nodes (1), GPUS that of the GPUs of each (1), HOST the first node with a free port
# (localhost:29500). Whatever follows the configuration is handed to `stitchvm fit`. RUN and going on after an
# interruption are as in scripts/slurm.sh. See docs/multi_node.md.
set -euo pipefail

config=${1:?usage: NODES=... GPUS=... HOST=... scripts/torchrun.sh CONFIG [--KEY VALUE ...]}
shift
nodes=${NODES:-1} gpus=${GPUS:-1} host=${HOST:-localhost:29500}
run=${RUN:-runs/$(basename "$config" .yaml)}

# a configuration that shards keeps its strategy, over as many GPUs as there are; any other runs with DDP
if grep -q ModelParallelStrategy "$config"; then
    strategy=(--trainer.strategy.init_args.data_parallel_size "$((nodes * gpus))")
else
    strategy=(--trainer.strategy ddp)
fi
last=()
if [[ -e $run/checkpoints/last.ckpt ]]; then
    last=(--ckpt_path last)
fi

exec ${PYTHON:-python} -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$host" --rdzv-id "$(basename "$run")" \
    -m stitchvm fit --config "$config" \
    --trainer.num_nodes "$nodes" --trainer.devices "$gpus" "${strategy[@]}" \
    --trainer.default_root_dir "$run" "${last[@]}" "$@"

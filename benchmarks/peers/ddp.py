"""A plain distributed training, as the tutorials of torch have it: the network, loss, optimiser and samples of a run,
and nothing around them.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.peers.ddp ROOT RUN

RUN is the prefix of a run in the storage root ROOT. The first worker prints the steps in a second.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from vnet_core.fitting import build_optimiser, learning_rate_factor
from vnet_core.inference import precision
from vnet_core.losses import build_loss
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.plan import Plan
from workers.storage.store import Root
from workers.training.patches import BatchLoader, Share, load_volume


def main(root_url: str, prefix: str) -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    share = Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    root = Root(root_url)
    run = root.get_json(f"{prefix}/run.json")
    plan, steps = Plan.from_mapping(run["plan"]), run["budget"]["steps"]
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    initialise(network, plan.training.seed)
    optimiser = build_optimiser(network, plan.training)
    loss_of = build_loss(plan, run["class_voxels"])
    dtype = precision(plan.training, torch.device("cpu"))
    volumes = [load_volume(root, key, plan) for _, key in sorted(run["training"].items())]
    stepper = DistributedDataParallel(network)
    loader = BatchLoader(volumes, plan, share, 0)
    torch.distributed.barrier()
    started = time.monotonic()
    for step, (images, classes) in zip(range(steps), loader, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = plan.training.learning_rate * learning_rate_factor(plan.training, step / steps)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = stepper(images)
        loss_of(logits, classes, step / steps).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), plan.training.gradient_clip)
        optimiser.step()
    seconds = time.monotonic() - started
    loader.close()
    if share.rank == 0:
        print(json.dumps({"steps_per_second": steps / seconds}), flush=True)
    torch.distributed.barrier()
    # a thread of gloo that has not ended yet aborts the process when Python's own end tears it down
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

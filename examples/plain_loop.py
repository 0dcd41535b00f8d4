"""A training loop of your own that follows a plan: FSDP2, any SP degree, recomputation per pack.

hbp plan --data STORE --model MODEL --gpus 2 --cluster cpu-local --out PLAN
torchrun --nproc-per-node 2 examples/plain_loop.py PLAN STORE MODEL OUT
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import hbp


def main(plan_folder: str, store: str, model_folder: str, out: str) -> None:
    """Train one epoch on this rank and save the model."""
    dist.init_process_group()
    plan, samples, device = hbp.Plan.load(plan_folder), hbp.open_store(store), torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=hbp.register_attention())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    mesh = hbp.make_mesh(dist.get_world_size(), [], device.type, model.config.num_attention_heads)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh.world)
    fully_shard(model, mesh=mesh.world)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.01)
    for number, step in enumerate(hbp.steps(plan, samples, mesh, device)):
        loss = torch.zeros(())
        for batch in step:
            hbp.set_gc_layers(model, batch.gc_layers)
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "hbp_layout": batch.layout}
            logits = model(**inputs, use_cache=False).logits[0].float()
            part = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none") @ batch.weights
            (part * dist.get_world_size()).backward()  # FSDP averages gradients over the ranks
            loss += part.detach()
        dist.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {number} loss {loss:.9f} norm {float(norm.full_tensor()):.9f}", flush=True)
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        model.save_pretrained(out, state_dict=weights)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One of two processes of a group (gloo), whose answers are of unlike length: ``python ranks.py RANK FOLDER CASE``.

Writes what it answered, and the rows of every forward that it ran, to ``FOLDER/RANK.json``.
"""

import datetime
import json
import sys

import torch.distributed as dist

import lvlm_decode as ld
from lvlm_decode.engine.hf import decoder
from lvlm_decode.testing.models import tiny

#: Tokens that each process wants.
LENGTHS = (3, 8)
METHODS = {"dola": ld.DoLa(), "views": ld.VCD() + ld.ICD(), "pictures": ld.VCD() + ld.RITUAL(), "search": ld.CNTP()}


def shard(model, how):
    """The model's parameters over both processes: each of its decoder layers, and the rest."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in decoder.layers(model):
        fully_shard(layer)
    fully_shard(model)
    if how != "unregistered":
        register_fsdp_forward_method(model, "get_image_features")
    # As transformers marks what it shards.
    model._is_fsdp_managed_module = True


def main(rank: int, folder: str, case: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=datetime.timedelta(seconds=60))
    name, _, how = case.partition("-")
    zoo, method = tiny("llava"), METHODS[name]
    inputs = zoo.inputs(["is it a dog", "no"][rank:][:1], seed=rank)
    asked = dict(max_new_tokens=LENGTHS[rank], min_new_tokens=LENGTHS[rank], do_sample=False)
    with ld.attached(zoo.model, method, processor=zoo.processor):
        alone = zoo.model.generate(**inputs, **asked).tolist()
    rows = []
    if how in ("sharded", "unregistered"):
        shard(zoo.model, how)
    else:
        asked["synced_gpus"] = True
    decoder.decoder_of(zoo.model).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    try:
        if how == "custom":
            out = zoo.model.generate(**inputs, **asked, custom_generate=method).tolist()
        else:
            with ld.attached(zoo.model, method, processor=zoo.processor):
                out = zoo.model.generate(**inputs, **asked).tolist()
    except ld.errors.UnsupportedError as error:
        out = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"alone": alone, "out": out, "rows": rows}, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

"""SmolLM2 on several processes: each holds a part of the weights, and all print one plan.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Every process loads the checkpoint, takes its part of it, and runs a prompt; rank 0 compares the
logits, and a greedy continuation, with the model in one process, and prints what was split,
rewritten, and sent.
"""

import argparse

import torch
import torch.distributed as dist

import ridgeline
from ridgeline.tools.smollm2 import load_model, load_tokenizer

PROMPT = "Tensor parallelism splits the weights of a model over several devices, so that"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=12, help="how many to generate")
    parser.add_argument("--fuse", choices=("measured", "always", "never"), default="always")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="eager")
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    tokenizer, model = load_tokenizer(), load_model()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    part = ridgeline.parallelize(model, fuse=options.fuse, lowering=options.lowering)
    greedy = {"max_new_tokens": options.tokens, "do_sample": False}
    with torch.no_grad():
        logits = part(**inputs).logits
        written = part.generate(**inputs, **greedy)
    if first:
        with torch.no_grad():
            expected = model(**inputs).logits
            alone = model.generate(**inputs, **greedy)
        part.plan.print()
        error = (logits - expected).norm() / expected.norm()
        held = sum({id(p): p.nbytes for p in part.parameters()}.values())
        whole = sum(p.nbytes for p in model.parameters())
        print(f"logits differ from one process's by {error:.1e} (relative)")
        print(f"rank 0 holds {held / 1e6:.0f} MB of {whole / 1e6:.0f} MB")
        print(f"the same {options.tokens} tokens: {torch.equal(written, alone)}")
        print(tokenizer.decode(written[0]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

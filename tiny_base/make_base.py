"""make_base.py -- the script that made the tiny base models beside it.

A stand-in for a pretrained base model that fits into a repository: a real Qwen2 architecture with 0.6 million
parameters and a character-level tokenizer.  Like a real base it has *seen* step-by-step work, rarely uses it, and is
unreliable at it.  Its corpus is 2-digit products, never one that data.py holds out, written in one of two ways:

    34*12=<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer>        the step-by-step way, always right
    34*12=<answer>418</answer>                                                  the direct way, mostly with wrong digits

Half of each for most of the training, then 5 % step-by-step: the model ends up answering directly.

    python tiny_base/make_base.py                                    # writes tiny_base/ and tiny_base/weak/
    python tiny_base/make_base.py --scan 50                          # prints the accuracy every 50 steps instead
    python tiny_base/make_base.py --base hard                        # writes tiny_base/hard/: 3-digit by 1- to 3-digit
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402  (the split is data.py's alone)
import reward  # noqa: E402

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# 24 tokens.  As in every byte-level vocabulary a space is written \u0120 and a new line \u010a.
VOCABULARY = ["<pad>", "<eos>", "<unk>", *"0123456789", *"*=+-\u0120,\u010a", *TAGS]
PAD, EOS = 0, 1


def make_tokenizer():
    """One token a character, one a tag.  A Qwen2 tokenizer without merges, because AutoTokenizer gives a Qwen2 model
    that class whatever the folder asks for; the tags are added tokens, or it would not find them in a text."""
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[], pad_token="<pad>", eos_token="<eos>",
        unk_token="<unk>", model_max_length=256,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    assert len(tokenizer) == len(VOCABULARY)
    return tokenizer


def make_model():
    config = Qwen2Config(
        vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def worked(a, b):
    """34, 12 -> '34*10=340 34*2=68 340+68=408': the way of thinking that the corpus teaches.  One product a digit of b,
    then the sums, from the left: a chain of 2 n - 1 steps for n digits."""
    parts = [int(digit) * 10**place for place, digit in zip(range(len(str(b)) - 1, -1, -1), str(b))]
    steps, total = [f"{a}*{part}={a * part}" for part in parts], a * parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{a * part}={total + a * part}")
        total += a * part
    return " ".join(steps)


def document(rng, share_of_work, wrong_digit, digits="2"):
    while True:
        a, b = data.draw_operands(rng, data.parse_digits(digits))
        if not data.is_held_out(a, b):
            break
    if rng.random() < share_of_work:
        return f"{a}*{b}=<think>{worked(a, b)}</think><answer>{a * b}</answer>"
    written = "".join(str(rng.randrange(10)) if rng.random() < wrong_digit else digit for digit in str(a * b))
    return f"{a}*{b}=<answer>{written.lstrip('0') or '0'}</answer>"


def batch(rng, tokenizer, size, share_of_work, wrong_digit, digits):
    """tokens (B, T) right-padded, labels (B, T) with -100 on padding; the document's EOS is trained."""
    rows = [tokenizer(document(rng, share_of_work, wrong_digit, digits))["input_ids"] + [EOS] for _ in range(size)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    return tokens, tokens.masked_fill(mask == 0, -100)


@torch.no_grad()
def measure(model, tokenizer, digits="2", n=500, seed=0):
    """Greedy and sampled accuracy on held-out problems, free and forced into <think>."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, prefill in (("free", ""), ("forced", "<think>")):
        problems = data.eval_problems(n, digits, "terse", prefill)
        for how in ("greedy", "sampled"):
            tokens = torch.tensor([tokenizer(problem.text)["input_ids"] for problem in problems])
            start, past, new = tokens.shape[1], None, tokens
            done = torch.zeros(n, dtype=torch.bool)
            while not done.all() and tokens.shape[1] < start + (48 if digits == "2" else 128):
                output = model(new, past_key_values=past, use_cache=True)
                past, logits = output.past_key_values, output.logits[:, -1]
                new = (
                    logits.argmax(-1)
                    if how == "greedy"
                    else torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
                )
                new = new.masked_fill(done, PAD).view(n, 1)
                done |= new[:, 0] == EOS
                tokens = torch.cat([tokens, new], dim=1)
            texts = [prefill + tokenizer.decode(row, skip_special_tokens=True) for row in tokens[:, start:]]
            right = [reward.parse_answer(text) == problem.answer for text, problem in zip(texts, problems)]
            result[f"{name}_{how}"] = sum(right) / n
            result[f"{name}_{how}_thinks"] = sum(text.startswith("<think>") for text in texts) / n
    return {key: value for key, value in result.items() if not key.startswith("forced") or "thinks" not in key}


# name: (folder, digits, steps, tail, share of step-by-step documents before the tail, in the tail)
BASES = {
    "base": (HERE, "2", 660, 150, 0.5, 0.05),
    "weak": (HERE / "weak", "2", 550, 150, 0.5, 0.05),
    "hard": (HERE / "hard", "3x1-3", 300, 150, 1.0, 1.0),
}


def make(name, args):
    """`steps` at one share, then `tail` steps at another; warm-up, constant, and down over the tail."""
    folder, digits, steps, tail, share, tail_share = BASES[name]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    # Problems of one size at a time: measure's prompts are equally long.
    sizes = ("3x1", "3x2", "3x3") if name == "hard" else ("2",)
    measured = lambda: {size: measure(model.eval(), tokenizer, size) for size in sizes}
    for step in range(steps + tail):
        scale = min(1.0, (step + 1) / 50, (steps + tail - step) / tail)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        now = share if step < steps else tail_share
        tokens, labels = batch(rng, tokenizer, 128, now, args.wrong_digit, digits)
        loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if args.scan and (step + 1) % args.scan == 0:
            print(step + 1, f"loss {loss.item():.3f}", measured(), flush=True)
            model.train()
    found = measured()
    print(name, found, flush=True)
    if not args.scan:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        facts = vars(args) | {"digits": digits, "steps": steps, "tail": tail, "share": share, "tail_share": tail_share}
        facts |= {"parameters": model.num_parameters(), "measured": found[sizes[0]] if len(sizes) == 1 else found}
        (folder / "measured.json").write_text(json.dumps(facts, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Make the tiny base models.")
    parser.add_argument("--base", nargs="+", choices=BASES, default=("base", "weak"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--wrong-digit", type=float, default=0.5, help="chance that a digit of a direct answer is redrawn"
    )
    parser.add_argument("--scan", type=int, metavar="N", help="only print the accuracy every N steps")
    args = parser.parse_args()
    for name in args.base:
        make(name, args)


if __name__ == "__main__":
    main()

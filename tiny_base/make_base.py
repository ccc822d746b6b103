"""make_base.py -- the script that made the tiny base models beside it.

A stand-in for a pretrained base model that fits into a repository: a real Qwen2 architecture with
0.6 million parameters and a character-level tokenizer.  Like a real base it has seen step-by-step
work, rarely uses it, and is unreliable at it.  Its corpus is 2-digit products, never one that
data.py holds out, written in one of two ways.  The step-by-step way is always right; the direct
way has mostly wrong digits:

    34*12=<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer>
    34*12=<answer>418</answer>

For most of the training each is half of the corpus, then 5 % is step-by-step: the model ends up
answering directly.

    python tiny_base/make_base.py               # writes tiny_base/ and tiny_base/weak/
    python tiny_base/make_base.py --scan 50     # prints the accuracy every 50 steps instead
    python tiny_base/make_base.py --base task   # writes tiny_base/task/: 2- and 3-digit operands
    python tiny_base/make_base.py --base hard   # writes tiny_base/hard/: 3-digit by 1- to 3-digit
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
import data
import reward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# 24 tokens.  As in every byte-level vocabulary a space is written \u0120 and a new line \u010a.
VOCABULARY = ["<pad>", "<eos>", "<unk>", *"0123456789", *"*=+-\u0120,\u010a", *TAGS]
PAD, EOS = 0, 1


def make_tokenizer():
    """One token a character, one a tag.

    It is a Qwen2 tokenizer without merges, because AutoTokenizer gives a Qwen2 model that class
    whatever the folder asks for.  The tags are added tokens, else it would not find them in a text.
    """
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=256,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    assert len(tokenizer) == len(VOCABULARY)
    return tokenizer


def make_model():
    """A Qwen2 with random weights: 0.6 million parameters."""
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config)


# --------------------------------------------------------------------------------------- The corpus
def worked(a, b):
    """34, 12 -> '34*10=340 34*2=68 340+68=408': the way of thinking that the corpus teaches.

    One product a digit of b, then the sums, from the left: 2 n - 1 steps for n digits.
    """
    digits = str(b)
    products = []
    steps = []
    for i, digit in enumerate(digits):
        part = int(digit) * 10 ** (len(digits) - 1 - i)
        products.append(a * part)
        steps.append(f"{a}*{part}={a * part}")
    total = products[0]
    for product in products[1:]:
        steps.append(f"{total}+{product}={total + product}")
        total += product
    return " ".join(steps)


def document(rng, share_of_work, wrong_digit, digits="2"):
    """One line of the corpus.

    share_of_work: chance of the step-by-step way; wrong_digit: chance that a digit of a direct
    answer is drawn anew.
    """
    while True:
        a, b = data.draw_operands(rng, data.parse_digits(digits))
        if not data.is_held_out(a, b):
            break
    if rng.random() < share_of_work:
        return f"{a}*{b}=<think>{worked(a, b)}</think><answer>{a * b}</answer>"
    written = ""
    for digit in str(a * b):
        if rng.random() < wrong_digit:
            digit = str(rng.randrange(10))
        written += digit
    written = written.lstrip("0") or "0"
    return f"{a}*{b}=<answer>{written}</answer>"


def batch(rng, tokenizer, size, share_of_work, wrong_digit, digits):
    """tokens (B, T), padded on the right; labels (B, T), -100 on padding.  EOS is trained."""
    rows = []
    for _ in range(size):
        text = document(rng, share_of_work, wrong_digit, digits)
        rows.append(tokenizer(text)["input_ids"] + [EOS])
    T = max(len(row) for row in rows)
    tokens = torch.tensor([row + [PAD] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    return tokens, tokens.masked_fill(mask == 0, -100)


# ---------------------------------------------------------------------------------- How good is it?
@torch.no_grad()
def complete(model, tokens, max_new_tokens, generator=None):
    """The tokens that the model writes after prompts of one length, PAD after EOS: (B, T).

    Sampled with a generator, greedy without.
    """
    B = tokens.shape[0]
    past = None
    new = tokens
    written = []
    done = torch.zeros(B, dtype=torch.bool)
    while not done.all() and len(written) < max_new_tokens:
        output = model(new, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[:, -1]
        if generator is None:
            new = logits.argmax(-1)
        else:
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        new = new.masked_fill(done, PAD).view(B, 1)
        done |= new[:, 0] == EOS
        written.append(new)
    return torch.cat(written, dim=1)


def measure(model, tokenizer, digits="2", n=500, seed=0):
    """Greedy and sampled accuracy on n held-out problems, free and forced into <think>.

    Free completions also have the share that thinks.  The prompts must have one length.
    """
    generator = torch.Generator().manual_seed(seed)
    max_new_tokens = 48 if digits == "2" else 128
    result = {}
    for name, prefill in (("free", ""), ("forced", "<think>")):
        problems = data.eval_problems(n, digits, "terse", prefill)
        tokens = torch.tensor([tokenizer(problem.text)["input_ids"] for problem in problems])
        for decode in ("greedy", "sampled"):
            own_generator = generator if decode == "sampled" else None
            written = complete(model, tokens, max_new_tokens, own_generator)
            right = 0
            thinks = 0
            for problem, row in zip(problems, written):
                text = prefill + tokenizer.decode(row, skip_special_tokens=True)
                right += reward.parse_answer(text) == problem.answer
                thinks += text.startswith("<think>")
            result[f"{name}_{decode}"] = right / n
            if name == "free":
                result[f"{name}_{decode}_thinks"] = thinks / n
    return result


# ----------------------------------------------------------------------------------------- Training
# name: (folder, digits, steps, tail, share of step-by-step documents before the tail, in the tail)
BASES = {
    "base": (HERE, "2", 660, 150, 0.5, 0.05),
    "weak": (HERE / "weak", "2", 550, 150, 0.5, 0.05),
    "task": (HERE / "task", "2-3", 800, 150, 0.5, 0.05),
    "hard": (HERE / "hard", "3x1-3", 300, 150, 1.0, 1.0),
}
# Bases of several sizes of problem are measured by size.
SIZES = {"task": ("2x2", "2x3", "3x2", "3x3"), "hard": ("3x1", "3x2", "3x3")}


def make(name, args):
    """Train one base and write its folder.

    `steps` at one share of step-by-step documents, then `tail` steps at another.  The learning
    rate has a warm-up, is constant, and goes down over the tail.
    """
    folder, digits, steps, tail, share, tail_share = BASES[name]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.95)
    )
    for step in range(steps + tail):
        scale = min(1.0, (step + 1) / 50, (steps + tail - step) / tail)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        share_now = share if step < steps else tail_share
        tokens, labels = batch(rng, tokenizer, 128, share_now, args.wrong_digit, digits)
        loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if args.scan and (step + 1) % args.scan == 0:
            figures = measure_all(name, model, tokenizer)
            print(step + 1, f"loss {loss.item():.3f}", figures, flush=True)
    figures = measure_all(name, model, tokenizer)
    print(name, figures, flush=True)
    if args.scan:
        return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = vars(args) | {
        "digits": digits,
        "steps": steps,
        "tail": tail,
        "share": share,
        "tail_share": tail_share,
        "parameters": model.num_parameters(),
        "measured": figures,
    }
    (folder / "measured.json").write_text(json.dumps(facts, indent=1) + "\n")


def measure_all(name, model, tokenizer):
    """measure() of the base called `name`, by size of the problem if it knows several.

    measure() wants prompts of one length, so problems of one size at a time.
    """
    model.eval()
    if name in SIZES:
        figures = {size: measure(model, tokenizer, size) for size in SIZES[name]}
    else:
        figures = measure(model, tokenizer, "2")
    model.train()
    return figures


def main():
    parser = argparse.ArgumentParser(description="Make the tiny base models.")
    parser.add_argument("--base", nargs="+", choices=BASES, default=("base", "weak"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--wrong-digit",
        type=float,
        default=0.5,
        help="chance that a digit of a direct answer is drawn anew",
    )
    parser.add_argument(
        "--scan", type=int, metavar="N", help="only print the accuracy every N steps"
    )
    args = parser.parse_args()
    for name in args.base:
        make(name, args)


if __name__ == "__main__":
    main()

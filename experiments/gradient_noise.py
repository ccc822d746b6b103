"""How noisy is the policy gradient that a method's rollouts give, for the model tokens that they cost?

    python experiments/gradient_noise.py                                        # the tiny base
    python experiments/gradient_noise.py --model runs/diagnosis/checkpoint_iter_12

At a fixed policy, the gradient g of batches of 128 problems.  Signal S = |E g|^2, by the products of different batches; noise N = E |g|^2 - S.
A batch n times as large has a noise n times smaller, so (N/S) x tokens is what a gradient of signal-to-noise 1 costs: where training is
limited by noise, methods under one loss need tokens in proportion to it.  N has a floor that no rollouts can lower, the difference
between problems: it is what is left with nearly all of pi searched ("cover .99").  Only rows of one loss can be compared: each loss has
a gradient of its own.  Intervals: 95 % bootstrap over batches.  Appends a row to experiments/results/gradient_noise.jsonl.
"""

import argparse
import fnmatch
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402
import train  # noqa: E402

SIZE = 128  # problems a batch: with 32 the signal drowned
SETTINGS = {
    "sampling 2, ppo": dict(rollout="sample", rollouts_per_problem=2),
    "sampling 4, ppo": dict(rollout="sample", rollouts_per_problem=4),
    "sampling 8, ppo": dict(rollout="sample", rollouts_per_problem=8),
    "A* cover .5, ppo": dict(guide="none", cover=0.5),
    "A* cover .8, ppo": dict(guide="none", cover=0.8),
    "A* cover .8, head, ppo": dict(guide="head", cover=0.8),
    "A* cover .99, ppo": dict(guide="none", cover=0.99, rollouts_per_problem=64, max_nodes=256),
    "sampling 4, em": dict(rollout="sample", rollouts_per_problem=4, loss="em"),
    "sampling 8, em": dict(rollout="sample", rollouts_per_problem=8, loss="em"),
    "A* until right, em": dict(guide="none", cover=0.95, rollouts_per_problem=16, loss="em", until_right="on"),
    "A* until right, head, em": dict(guide="head", cover=0.95, rollouts_per_problem=16, loss="em", until_right="on"),
    "A* tau 0 until right, em": dict(guide="none", tau=0.0, cover=1.0, rollouts_per_problem=64, max_nodes=128, loss="em", until_right="on"),
    "A* cover .99, em": dict(guide="none", cover=0.99, rollouts_per_problem=64, max_nodes=256, loss="em"),
}


def gradients(model, tokenizer, value, problems, keys, config):
    """(policy gradient of every batch (n, parameters), model tokens, share of right): one backward pass a batch."""
    reward = reward_module.Reward()
    head = train.value_module.ValueHead(model.config.get_text_config().hidden_size)  # no part of the policy's gradient
    found, tokens, right = [], 0, 0.0
    for start in range(0, len(problems), SIZE):
        chunk = problems[start : start + SIZE]
        rollouts = train.make_rollouts(model, tokenizer, chunk, keys[start : start + SIZE], config, reward, value, config.rollout, config.rollouts_per_problem)
        tokens += rollouts.stats["model_tokens"]
        _, verdicts = evaluation.judge(rollouts, tokenizer, chunk, reward, config.max_new_tokens)
        rollouts.extra = train.credit(rollouts, verdicts, reward, config)
        right += (rollouts.extra["leaf_weight"] * torch.tensor([float(v["correct"]) for v in verdicts])).sum().item()
        total = (rollouts.extra["leaf_weight"][:, None] * rollouts.mask).sum().item()
        model.zero_grad()
        for rows in torch.arange(len(rollouts)).split(config.micro_batch):
            part = rollouts.select(rows)
            train.losses(lambda *x: policy.score(model, *x), head, part, config, total, len(chunk))[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return torch.stack(found), tokens, right / len(problems)


def noise_to_signal(products, different):
    """N/S from the (n, n) inner products of n batch gradients; different (n, n): pairs of different batches."""
    signal = products[different].mean()
    return ((products.diagonal().mean() - signal) / signal).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_base")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=["*"], help="settings whose name matches one of these, as a shell would")
    args = parser.parse_args()
    model, tokenizer = policy.load_policy(str(ROOT / args.model))
    guided = evaluation.load_guide(str(ROOT / args.model), model)
    unguided = guided and (lambda hidden: (guided(hidden)[0], torch.zeros(len(hidden))))  # V for GAE, h = 0
    n = args.batches * SIZE
    problems = [data.train_problem(1, 10**6, i) for i in range(n)]
    keys = astar_search.root_keys(1, -4, range(n))
    print(f"{args.model}: {args.batches} batches of {SIZE} problems\n\n{'':28s} tokens/problem  right      N/S  (N/S) x tokens, thousands (95 %)")
    generator = torch.Generator().manual_seed(0)
    for name, changes in SETTINGS.items():
        if "head" in name and guided is None or not any(fnmatch.fnmatch(name, pattern) for pattern in args.only):
            continue
        config = train.Config(**train.PPO | changes | dict(micro_batch=256, rollout_batch=SIZE))
        g, tokens, right = gradients(model, tokenizer, guided if "head" in name else unguided, problems, keys, config)
        products = g.double() @ g.double().T
        per_batch = tokens / args.batches
        draws = []
        for _ in range(500):  # a batch drawn twice would be its own signal: leave those pairs out
            rows = torch.randint(args.batches, (args.batches,), generator=generator)
            draws.append(noise_to_signal(products[rows][:, rows], rows[:, None] != rows[None]) * per_batch)
        low, high = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
        ratio = noise_to_signal(products, ~torch.eye(args.batches, dtype=torch.bool))
        print(f"{name:28s} {tokens / n:14.1f}  {right:5.3f}  {ratio:7.2f}  {ratio * per_batch / 1e3:8.1f} ({low / 1e3:.1f}-{high / 1e3:.1f})", flush=True)
        row = {"model": args.model, "setting": name, "problems": SIZE, "batches": args.batches, "tokens_per_problem": tokens / n, "right": right,
               "noise_to_signal": ratio, "tokens_at_snr_1": ratio * per_batch, "low": low, "high": high}  # fmt: skip
        compare.write("gradient_noise", row)


if __name__ == "__main__":
    main()

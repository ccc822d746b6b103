"""How noisy is the policy gradient of a method's rollouts, for the model tokens that they cost?

    python experiments/gradient_noise.py                                        # the tiny base
    python experiments/gradient_noise.py --model runs/diagnosis/checkpoint_iter_12
    python experiments/gradient_noise.py --batches 2 --only "sampling 2, ppo"   # a trial

At a fixed policy, the gradient g of batches of 128 problems.  Signal S = |E g|^2, by the products
of different batches; noise N = E |g|^2 - S.  A batch n times as large has a noise n times smaller.
So (N/S) x tokens is what a gradient of signal-to-noise 1 costs: where training is limited by noise,
methods under one loss need tokens in proportion to it.

N has a floor that no rollouts can lower, the difference between problems.  It is what is left with
nearly all of pi searched ("cover .99").  Only rows of one loss can be compared: each loss has a
gradient of its own.  Intervals: 95 % bootstrap over batches.  Appends a row a setting to
experiments/results/gradient_noise.jsonl.
"""

import argparse
import fnmatch
import pathlib
import sys

import compare
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import step

import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import train

SIZE = 128  # problems a batch: with 32 the signal drowned
NEARLY_ALL = {"guide": "none", "cover": 0.99, "rollouts_per_problem": 64, "max_nodes": 256}
FIND = {"cover": 0.95, "rollouts_per_problem": 16, "loss": "em", "until_right": "on"}
SETTINGS = {
    "sampling 2, ppo": {"rollout": "sample", "rollouts_per_problem": 2},
    "sampling 4, ppo": {"rollout": "sample", "rollouts_per_problem": 4},
    "sampling 8, ppo": {"rollout": "sample", "rollouts_per_problem": 8},
    "A* cover .5, ppo": {"guide": "none", "cover": 0.5},
    "A* cover .8, ppo": {"guide": "none", "cover": 0.8},
    "A* cover .8, head, ppo": {"guide": "head", "cover": 0.8},
    "A* cover .99, ppo": NEARLY_ALL,
    "sampling 4, em": {"rollout": "sample", "rollouts_per_problem": 4, "loss": "em"},
    "sampling 8, em": {"rollout": "sample", "rollouts_per_problem": 8, "loss": "em"},
    "A* until right, em": FIND | {"guide": "none"},
    "A* until right, head, em": FIND | {"guide": "head"},
    "A* tau 0 until right, em": {
        "guide": "none",
        "tau": 0.0,
        "cover": 1.0,
        "rollouts_per_problem": 64,
        "max_nodes": 128,
        "loss": "em",
        "until_right": "on",
    },
    "A* cover .99, em": NEARLY_ALL | {"loss": "em"},
}


def gradients(model, tokenizer, value_function, problems, config):
    """(policy gradient of every batch (n, parameters), model tokens, share of right leaves)."""
    reward = reward_module.Reward()
    ranks = fsdp.Ranks(0, 1, torch.device("cpu"))
    found = []
    tokens = 0
    right = 0.0
    for start in range(0, len(problems), SIZE):
        batch = problems[start : start + SIZE]
        rollouts = train.generate_rollouts(
            model,
            tokenizer,
            batch,
            range(start, start + SIZE),
            config,
            reward,
            iteration=-4,  # no iteration of a run
            value_function=value_function,
            kind=config.rollout,
            K=config.rollouts_per_problem,
        )
        tokens += rollouts.stats["model_tokens"]
        _, verdicts = evaluation.judge_rollouts(
            rollouts, tokenizer, batch, reward, config.max_new_tokens
        )
        rollouts.extra = step.columns_of(rollouts, verdicts, reward, config)
        correct = torch.tensor([float(verdict["correct"]) for verdict in verdicts])
        right += (rollouts.extra["leaf_weight"] * correct).sum().item()

        rows = torch.arange(len(rollouts))
        totals = train.minibatch_totals(rollouts, rows, ranks)
        model.zero_grad()
        for part in train.parts_of(rollouts, rows, config, ranks):
            loss, _ = step.policy_loss_of(model, part, config, totals)
            loss.backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(parts))
    return torch.stack(found), tokens, right / len(problems)


def noise_to_signal(products, different):
    """N/S from the (n, n) inner products of n gradients; different (n, n): of different batches."""
    signal = products[different].mean()
    return ((products.diagonal().mean() - signal) / signal).item()


def bootstrap_interval(products, generator, draws=500):
    """95 % interval of N/S: (low, high)."""
    n = len(products)
    ratios = []
    for _ in range(draws):
        rows = torch.randint(n, (n,), generator=generator)
        # A batch drawn twice would be its own signal: leave those pairs out.
        different = rows[:, None] != rows[None]
        ratios.append(noise_to_signal(products[rows][:, rows], different))
    return torch.tensor(ratios).quantile(torch.tensor([0.025, 0.975])).tolist()


def without_guide(value_function):
    """The same V, for GAE, and h = 0."""

    def unguided(hidden):
        V, _ = value_function(hidden)
        return V, torch.zeros(len(hidden))

    return unguided


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny_base")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        help="settings whose name matches one of these, as a shell would",
    )
    args = parser.parse_args()
    model, tokenizer = policy.load_policy(str(ROOT / args.model))
    guided = evaluation.load_value_function(str(ROOT / args.model), model)
    unguided = None if guided is None else without_guide(guided)
    n = args.batches * SIZE
    problems = [data.train_problem(1, 10**6, i) for i in range(n)]
    print(f"{args.model}: {args.batches} batches of {SIZE} problems\n")
    print(f"{'':28s} tokens/problem  right      N/S  (N/S) x tokens, thousands (95 %)")
    generator = torch.Generator().manual_seed(0)
    for name, changes in SETTINGS.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only):
            continue
        by_head = "head" in name
        if by_head and guided is None:
            continue
        flags = train.PPO | changes | {"micro_batch": 256, "rollout_batch": SIZE, "seed": 1}
        value_function = guided if by_head else unguided
        g, tokens, right = gradients(
            model, tokenizer, value_function, problems, train.Config(**flags)
        )
        products = g.double() @ g.double().T
        per_batch = tokens / args.batches
        ratio = noise_to_signal(products, ~torch.eye(args.batches, dtype=torch.bool))
        low, high = bootstrap_interval(products, generator)
        row = {
            "model": args.model,
            "setting": name,
            "problems": SIZE,
            "batches": args.batches,
            "tokens_per_problem": tokens / n,
            "right": right,
            "noise_to_signal": ratio,
            "tokens_at_snr_1": ratio * per_batch,
            "low": low * per_batch,
            "high": high * per_batch,
        }
        print(
            f"{name:28s} {tokens / n:14.1f}  {right:5.3f}  {ratio:7.2f}  "
            f"{row['tokens_at_snr_1'] / 1e3:8.1f} "
            f"({row['low'] / 1e3:.1f}-{row['high'] / 1e3:.1f})",
            flush=True,
        )
        compare.write("gradient_noise", row)


if __name__ == "__main__":
    main()

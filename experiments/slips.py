"""Can a critic see a slip after it is written?  Its AUC within a problem, against data.

    python experiments/compare.py task --only 'A[*] h=0; first 10' --seeds 20       # the policy
    python experiments/slips.py --model runs/task/A*_h=0;_first_10_seed_20/checkpoint_iter_10

The critic has a trunk of its own, a copy of the policy, and reads what trees show and samples do
not: leaves of one problem that share a prefix and then part, one right and one wrong.  Every
position after the parting is labelled.  Trees are those of a plain A* search, h = 0.  As many
problems as 2, 5, 10 and 20 iterations of training see are used, 128 an iteration.

It is judged on other problems: of a right and a wrong leaf of one problem, which scores higher so
many tokens after they part?  Beside it stands log pi of the prefix, by which plain A* chooses, and
the best of their sums: what a search would use.  One row is appended to results/slips.jsonl.
"""

import argparse
import pathlib
import random
import sys
import time

import compare
import diagnose
import torch
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import eval as evaluation
import policy
import reward as reward_module
import train

AFTER = (1, 2, 4, 8, 16, 32)  # tokens after the parting
SHARES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the critic's log u in a sum with log pi


def grow_trees(model, tokenizer, problems, config):
    """Rollouts of plain A* with h = 0, as in training, with `right` (B,)."""
    reward = reward_module.Reward()
    rollouts = train.generate_rollouts(
        model,
        tokenizer,
        problems,
        range(len(problems)),
        config,
        reward,
        iteration=0,
        value_function=None,
        kind="astar",
        K=config.rollouts_per_problem,
    )
    _, verdicts = evaluation.judge_rollouts(
        rollouts, tokenizer, problems, reward, config.max_new_tokens
    )
    rollouts.extra["right"] = torch.tensor([verdict["correct"] for verdict in verdicts])
    return rollouts


def pairs_of(rollouts):
    """Every right leaf with every wrong one of its problem: [(right row, wrong row, column), ...].

    column: of the grids (B, T-1), where the first token that differs is predicted.
    """
    by_problem = {}
    for row, problem in enumerate(rollouts.problem.tolist()):
        by_problem.setdefault(problem, []).append(row)
    right = rollouts.extra["right"].tolist()
    pairs = []
    for rows in by_problem.values():
        for i in rows:
            for j in rows:
                if right[i] and not right[j]:
                    differs = rollouts.tokens[i] != rollouts.tokens[j]
                    pairs.append((i, j, int(differs.int().argmax()) - 1))
    return pairs


def labelled(rollouts, pairs):
    """(B, T-1) bool: the positions after a leaf's last parting from one of the other kind.

    Before it the leaf is a prefix of both kinds, so that it has no label yet.  A leaf whose problem
    has no leaf of the other kind has no such position.
    """
    last = {}
    for i, j, column in pairs:
        last[i] = max(last.get(i, 0), column)
        last[j] = max(last.get(j, 0), column)
    mask = torch.zeros_like(rollouts.mask)
    for row, column in last.items():
        mask[row, column:] = rollouts.mask[row, column:]
    return mask


def logits_of(critic, tokens):
    """tokens (B, T) -> logit (B, T-1) of "right", by a diagnose.Critic: a trunk and one output.

    Column t has read the tokens up to t+1, so it judges the token that column t of the grids is
    about, after it is written.
    """
    hidden = critic.model.base_model(tokens, use_cache=False).last_hidden_state
    _, u_logit = critic(hidden[:, 1:])
    return u_logit


def fit(model, rollouts, mask, problems, epochs, batch=64, rate=3e-4):
    """(a Critic fitted to the leaves of the first `problems` problems, how many leaves).

    An eighth of the problems chooses the epoch.  Raises ValueError if there is nothing to fit.
    """
    torch.manual_seed(0)
    critic = diagnose.Critic(model)
    usable = mask.any(dim=1) & (rollouts.problem < problems)
    chosen = usable & (rollouts.problem % 8 == 0)
    fitted_rows = torch.nonzero(usable & ~chosen).squeeze(1)
    chosen_rows = torch.nonzero(chosen).squeeze(1)
    if len(fitted_rows) == 0 or len(chosen_rows) == 0:
        raise ValueError("no problem has both right and wrong leaves: use more problems")

    def loss_of(rows):
        T = int(rollouts.length[rows].max())
        logit = logits_of(critic, rollouts.tokens[rows, :T])
        weight = mask[rows, : T - 1].float()
        target = rollouts.extra["right"][rows, None].float().expand_as(logit)
        total = F.binary_cross_entropy_with_logits(logit, target, weight=weight, reduction="sum")
        return total / weight.sum()

    critic = diagnose.descend_by_epochs(
        critic, loss_of, fitted_rows, chosen_rows, epochs, batch, rate
    )
    return critic, len(fitted_rows)


@torch.no_grad()
def judge(critic, rollouts, pairs):
    """{tokens after the parting: {"pairs", "critic", "log pi", "best sum"}}: shares of pairs in
    which the right leaf scores higher; ties count half.

    A pair is left out where one of its leaves has ended.
    """
    logit = torch.cat([logits_of(critic, tokens) for tokens in rollouts.tokens.split(256)])
    log_u = F.logsigmoid(logit)
    log_pi = rollouts.log_probs.cumsum(dim=1)  # of the prefix, the token of the column included
    table = {}
    for after in AFTER:
        at = []
        for i, j, column in pairs:
            place = column + after - 1
            ends = min(rollouts.length[i], rollouts.length[j]) - 1
            if place < ends:
                at.append((i, j, place))
        if not at:
            continue
        i, j, place = torch.tensor(at).T
        critic_gap = log_u[i, place] - log_u[j, place]
        pi_gap = log_pi[i, place] - log_pi[j, place]
        sums = [diagnose.wins(pi_gap + share * critic_gap) for share in SHARES]
        table[after] = {
            "pairs": len(at),
            "critic": diagnose.wins(critic_gap),
            "log pi": diagnose.wins(pi_gap),
            "best sum": max(sums),
        }
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny_base/task", help="folder of the policy")
    parser.add_argument("--digits", default="2-3")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-nodes", type=int, default=512)
    parser.add_argument("--leaves", type=int, default=8, help="of a tree")
    parser.add_argument("--iterations", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--problems", type=int, default=128, help="problems an iteration")
    parser.add_argument("--test-problems", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.process_time()
    model, tokenizer = policy.load_policy(args.model)
    model.eval()
    # The defaults are the searches of --config task, but for their stop at the first right leaf.
    config = train.Config(
        digits=args.digits,
        max_new_tokens=args.max_new_tokens,
        max_nodes=args.max_nodes,
        rollouts_per_problem=args.leaves,
        until_right="off",
        seed=args.seed,
    )
    n = max(args.iterations) * args.problems
    problems = []
    for i in range(n):
        problems.append(data.train_problem(args.seed, 1, i, digits=config.digits))
    rollouts = grow_trees(model, tokenizer, problems, config)
    mask = labelled(rollouts, pairs_of(rollouts))
    others = data.eval_problems(args.test_problems, config.digits)
    test = grow_trees(model, tokenizer, others, config)
    pairs = pairs_of(test)
    # A problem with many pairs would count like many problems: at most 4 of each.
    random.Random(args.seed).shuffle(pairs)
    kept = {}
    for pair in pairs:
        of_problem = kept.setdefault(int(test.problem[pair[0]]), [])
        if len(of_problem) < 4:
            of_problem.append(pair)
    pairs = [pair for of_problem in kept.values() for pair in of_problem]
    tokens = rollouts.stats["model_tokens"]
    print(f"{n} problems, {len(rollouts)} leaves, {tokens:,} model tokens")
    print(f"{len(kept)} other problems with right and wrong leaves, {len(pairs)} pairs")
    row = {"arguments": vars(args), "model_tokens": tokens, "cpu": compare.cpu(), "tables": {}}
    for iterations in args.iterations:
        used = iterations * args.problems
        critic, leaves = fit(model, rollouts, mask, used, args.epochs)
        table = judge(critic, test, pairs)
        row["tables"][iterations] = {"problems": used, "leaves": leaves, "after": table}
        print(f"\n{iterations} iterations: {used} problems, {leaves} leaves with a label")
        print("tokens after the parting   pairs   critic   log pi   best sum")
        for after, figures in table.items():
            print(
                f"{after:24d} {figures['pairs']:7d} {figures['critic']:8.3f} "
                f"{figures['log pi']:8.3f} {figures['best sum']:10.3f}",
                flush=True,
            )
    row["cpu_seconds"] = time.process_time() - started
    compare.write("slips", row)


if __name__ == "__main__":
    main()

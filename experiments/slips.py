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
import copy
import pathlib
import random
import sys
import time

import compare
import torch
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search
import data
import eval as evaluation
import policy
import reward as reward_module

AFTER = (1, 2, 4, 8, 16, 32)  # tokens after the parting
SHARES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the critic's log u in a sum with log pi


def grow_trees(model, tokenizer, problems, leaves, max_nodes, max_new_tokens, seed):
    """Rollouts of plain A*, with `right` (B,); `problem` counts over all of them."""
    parts = []
    for start in range(0, len(problems), 128):
        chunk = problems[start : start + 128]
        prompts = evaluation.encode_prompts(tokenizer, chunk)
        options = astar_search.Options(
            eos=policy.stop_tokens(model, tokenizer),
            K=leaves,
            tau=0.0,
            width=2,
            max_new_tokens=max_new_tokens,
            max_nodes=max_nodes,
        )
        expander = astar_search.Expander(model, prompts, max_new_tokens)
        keys = astar_search.root_keys(seed, 0, range(start, start + len(chunk)))
        trees = astar_search.search(keys, expander, options)
        part = astar_search.collect(trees, expander)
        part.problem += start
        part.prefix.zero_()  # hidden states are of no use here
        part.hidden = part.hidden[:1]
        parts.append(part)
    rollouts = astar_search.concatenate(parts)
    _, verdicts = evaluation.judge_rollouts(
        rollouts, tokenizer, problems, reward_module.Reward(), max_new_tokens
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


class Critic(torch.nn.Module):
    """A copy of the policy's trunk and one output: tokens (B, T) -> logit (B, T-1) of "right".

    Column t has read the tokens up to t+1, so it judges the token that column t of the grids is
    about, after it is written.
    """

    def __init__(self, model):
        super().__init__()
        self.trunk = copy.deepcopy(model.base_model)
        self.outer = torch.nn.Linear(model.config.hidden_size, 1)

    def forward(self, tokens):
        hidden = self.trunk(tokens, use_cache=False).last_hidden_state
        return self.outer(hidden[:, 1:]).squeeze(-1)


def fit(model, rollouts, mask, problems, epochs, batch=64, rate=3e-4):
    """A Critic fitted to the leaves of the first `problems` problems.

    An eighth of the problems chooses the epoch.  Raises ValueError if there is nothing to fit.
    """
    torch.manual_seed(0)
    critic = Critic(model)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=rate)
    usable = mask.any(dim=1) & (rollouts.problem < problems)
    chosen = usable & (rollouts.problem % 8 == 0)
    fitted_rows = torch.nonzero(usable & ~chosen).squeeze(1)
    chosen_rows = torch.nonzero(chosen).squeeze(1)
    if len(fitted_rows) == 0 or len(chosen_rows) == 0:
        raise ValueError("no problem has both right and wrong leaves: use more problems")

    def loss_of(rows):
        T = int(rollouts.length[rows].max())
        logit = critic(rollouts.tokens[rows, :T])
        weight = mask[rows, : T - 1].float()
        target = rollouts.extra["right"][rows, None].float().expand_as(logit)
        total = F.binary_cross_entropy_with_logits(logit, target, weight=weight, reduction="sum")
        return total / weight.sum()

    steps = epochs * -(-len(fitted_rows) // batch)
    done = 0
    best = float("inf")
    for _ in range(epochs):
        for rows in fitted_rows[torch.randperm(len(fitted_rows))].split(batch):
            optimizer.param_groups[0]["lr"] = rate * (1 - done / steps)
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        with torch.no_grad():
            losses = [loss_of(rows).item() for rows in chosen_rows.split(256)]
        if sum(losses) < best:
            best = sum(losses)
            weights = copy.deepcopy(critic.state_dict())
    critic.load_state_dict(weights)
    return critic.eval(), len(fitted_rows)


@torch.no_grad()
def judge(critic, rollouts, pairs):
    """{tokens after the parting: {"pairs", "critic", "log pi", "best sum"}}: shares of pairs in
    which the right leaf scores higher; ties count half.

    A pair is left out where one of its leaves has ended.
    """
    logit = torch.cat([critic(tokens) for tokens in rollouts.tokens.split(256)])  # (B, T-1)
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
        sums = [wins(pi_gap + share * critic_gap) for share in SHARES]
        table[after] = {
            "pairs": len(at),
            "critic": wins(critic_gap),
            "log pi": wins(pi_gap),
            "best sum": max(sums),
        }
    return table


def wins(gap):
    """Share of pairs with a positive gap; ties count half."""
    return ((gap > 0).float() + 0.5 * (gap == 0).float()).mean().item()


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
    n = max(args.iterations) * args.problems
    problems = []
    for i in range(n):
        problems.append(data.train_problem(args.seed, 1, i, digits=args.digits))
    search = (args.leaves, args.max_nodes, args.max_new_tokens, args.seed)
    rollouts = grow_trees(model, tokenizer, problems, *search)
    mask = labelled(rollouts, pairs_of(rollouts))
    others = data.eval_problems(args.test_problems, args.digits)
    test = grow_trees(model, tokenizer, others, *search)
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

"""Why does guidance pay, or not?  The head, and the search with it, at one fixed policy.

    python experiments/diagnose.py                                           # the tiny base
    python experiments/diagnose.py --model tiny_base/hard --digits 3x1-3 --max-new-tokens 128
    python experiments/diagnose.py --model runs/local/checkpoint_iter_30     # with the head of the run as well

1. A head is fitted to i.i.d. samples of half of the problems (6,144: what three iterations of training see), until its
   loss there stops falling.
2. On the other half: its AUC for "ends right" at positions of the completion, over all samples and *within* a problem
   (pairs of samples of one problem, one right and one wrong), beside that of log pi of the prefix and of their best sum.
3. Searches of the other half with several h at several budgets: problems with a correct leaf, tokens, distinct correct.

Prints tables and appends one row, all figures in it, to experiments/results/diagnose.jsonl.
"""

import argparse
import copy
import pathlib
import sys

import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny_base")]

import compare  # noqa: E402
import make_base  # noqa: E402

import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402
import value as value_module  # noqa: E402

BETA, REWARD = 0.2, reward_module.Reward()


# ------------------------------------------------------------------------------------------------------ the head


@torch.no_grad()
def samples_of(model, tokenizer, problems, n, max_new_tokens, keys):
    """n i.i.d. completions a problem, one row each: hidden (B, L, D) before each token, log pi of the prefix (B, L), mask
    (B, L), reward (B,), right (B,), problem (B,).  L: tokens of the longest completion."""
    expander = astar_search.Expander(model, evaluation.encode(tokenizer, problems), max_new_tokens)
    options = astar_search.Options(policy.stop_tokens(model, tokenizer), K=n, max_new_tokens=max_new_tokens)
    rollouts = astar_search.collect(astar_search.sample(keys, expander, options), expander)
    _, verdicts = evaluation.judge(rollouts, tokenizer, problems, REWARD, max_new_tokens)
    rollouts.extra["reward"] = torch.tensor([verdict["reward"] for verdict in verdicts])
    rollouts.extra["right"] = torch.tensor([verdict["correct"] for verdict in verdicts])
    rollouts = rollouts.select(torch.arange(len(rollouts)).repeat_interleave(rollouts.count))
    L = int((rollouts.length - rollouts.prompt_length).max())
    columns = (rollouts.prompt_length - 1)[:, None] + torch.arange(L)
    inside = columns < (rollouts.length - 1)[:, None]
    columns = columns.clamp(max=rollouts.tokens.shape[1] - 2)
    before = rollouts.logprobs.cumsum(1) - rollouts.logprobs  # log pi of the prefix before each token
    return {
        "hidden": hidden_of(model, rollouts, columns), "g": before.gather(1, columns), "rollouts": rollouts, "columns": columns,
        "mask": inside, "token": rollouts.tokens[:, 1:].gather(1, columns), "reward": rollouts.extra["reward"], "right": rollouts.extra["right"], "problem": rollouts.problem,
    }  # fmt: skip


def hidden_of(model, rollouts, columns):
    """The model's last hidden state at columns (B, L) of each rollout: (B, L, D)."""
    parts = torch.arange(len(rollouts)).split(512)
    hidden = torch.cat([policy.score(model, rollouts.tokens[rows], rollouts.mask[rows])[2] for rows in parts])
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))


def descend(head, n, loss_of, steps=1500, batch=4096):
    """Adam on the mean loss_of(rows) of random batches out of n rows, until it stops falling.  Returns the head."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        loss = loss_of(torch.randint(n, (batch,)))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return head


def fit(hidden_size, samples):
    """A head fitted to samples as training does it, but to convergence."""
    torch.manual_seed(0)
    head = value_module.ValueHead(hidden_size)
    hidden, returns = (
        samples["hidden"][samples["mask"]],
        (samples["reward"][:, None] * samples["mask"])[samples["mask"]],
    )
    targets = value_module.soft_target(returns, *REWARD.bounds, BETA)
    equal = lambda rows: torch.full((len(rows),), 1 / len(rows))
    loss_of = lambda rows: value_module.value_loss(*head(hidden[rows]), returns[rows], targets[rows], equal(rows))[0]
    return descend(head, len(returns), loss_of)


class PerTokenHead(torch.nn.Module):
    """(hidden (..., D), token embedding (..., D)) -> logit of u of the prefix with that token: each child has an h of its own and
    costs no model token."""

    def __init__(self, hidden_size):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(2 * hidden_size, 2 * hidden_size), torch.nn.Linear(2 * hidden_size, 1)

    def forward(self, hidden, embedding):
        return self.outer(torch.nn.functional.gelu(self.inner(torch.cat([hidden, embedding], dim=-1)))).squeeze(-1)


def fit_per_token(embeddings, samples):
    """The same for a head that reads a prefix and the token to come."""
    torch.manual_seed(0)
    head, mask = PerTokenHead(embeddings.shape[1]), samples["mask"]
    hidden, tokens = samples["hidden"][mask], samples["token"][mask]
    targets = value_module.soft_target((samples["reward"][:, None] * mask)[mask], *REWARD.bounds, BETA)
    u = lambda rows: torch.sigmoid(head(hidden[rows], embeddings[tokens[rows]]))
    return descend(head, len(targets), lambda rows: ((u(rows) - targets[rows]) ** 2).mean())


class Critic(torch.nn.Module):
    """A critic with a mind of its own: a copy of the policy, all of it fitted to the same samples, with one output."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.outer = torch.nn.Linear(model.config.hidden_size, 1)

    def forward(self, hidden):
        u_logit = self.outer(hidden).squeeze(-1)
        return torch.sigmoid(u_logit), u_logit


def fit_critic(model, samples, epochs=6, batch=64, rate=3e-4):
    """Fitted to 7/8 of the problems; of the epochs, the one with the least loss on the others."""
    torch.manual_seed(0)
    critic, rollouts = Critic(model), samples["rollouts"]
    targets = value_module.soft_target(samples["reward"], *REWARD.bounds, BETA)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=rate)
    held = samples["problem"] % 8 == 0
    best, kept = float("inf"), None

    def loss_of(rows):
        part = rollouts.select(rows)
        _, u_logit = critic(policy.score(critic.model, part.tokens, part.mask)[2])
        return torch.nn.functional.binary_cross_entropy_with_logits(u_logit, targets[rows, None].expand_as(u_logit), weight=part.mask.float())

    steps = epochs * ((~held).sum().item() // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + epochs))
    for epoch in range(epochs):
        rows = (~held).nonzero().squeeze(1)
        for chosen in rows[torch.randperm(len(rows))].split(batch)[:-1]:
            loss = loss_of(chosen)
            optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        with torch.no_grad():
            loss = sum(loss_of(chosen).item() for chosen in held.nonzero().squeeze(1).split(512))
        print(f"critic, epoch {epoch + 1}: loss on other problems {loss:.4f}", flush=True)
        if loss < best:
            best, kept = loss, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(kept)
    return critic.eval().requires_grad_(False)


def auc(score, right, problem=None):
    """The chance that a right sample has the larger score than a wrong one, ties half; within a problem if it is given."""
    better, wins = right[:, None] & ~right[None], 0.0
    if problem is not None:
        better &= problem[:, None] == problem[None]
    if not better.any():
        return None
    difference = score[:, None] - score[None]
    wins = (difference[better] > 0).double() + 0.5 * (difference[better] == 0).double()
    return wins.mean().item()


@torch.no_grad()
def quality(head, samples, positions):
    """AUCs at positions of the completion, and the explained variance there."""
    table = []
    V, u_logit = head(samples["hidden"])
    for t in positions:
        if t >= samples["mask"].shape[1]:
            continue
        rows = samples["mask"][:, t].nonzero().squeeze(1)
        if len(rows) > 4096:
            rows = rows[:4096]
        right, problem = samples["right"][rows].bool(), samples["problem"][rows]
        h, g, r, v = u_logit[rows, t], samples["g"][rows, t], samples["reward"][rows], V[rows, t]
        sums = {c: auc(g + c * torch.nn.functional.logsigmoid(h), right, problem) for c in (0.1, 0.3, 1.0, 3.0, 10.0)}
        within = {"h": auc(h, right, problem), "log pi": auc(g, right, problem)}
        within["best sum"] = max((x for x in sums.values() if x is not None), default=None)
        variance = r.var().item()
        table.append({"position": t, "alive": len(rows), "right": right.float().mean().item(), "h": auc(h, right), "log pi": auc(g, right),
                      "within": within, "explained_variance": 1 - (r - v).var().item() / variance if variance > 0 else None})  # fmt: skip
    return table


# -------------------------------------------------------------------------------------------------- the searches


def oracle(expander, tokenizer, problems, own):
    """expand with the exact 'no mistake yet' as h: 0 for a prefix of the right work, -30 nats after a slip.  own: each
    child by itself; else, like the head, a child inherits what is known of its parent."""
    ids = [tokenizer(text)["input_ids"] for p in problems for text in [answer_of(p)]]
    eos = tokenizer.eos_token_id
    ids = [row + [eos] for row in ids]

    def expand(nodes):
        logp, _ = expander(nodes)
        h = torch.full(logp.shape, -30.0)
        for row, node in enumerate(nodes):
            path, way = node.path(), ids[node.problem]
            if path == way[: len(path)]:
                h[row] = h[row] if own else 0.0
                if own and len(path) < len(way):
                    h[row, way[len(path)]] = 0.0
        return logp, h

    return expand


def per_token(expander, head, embeddings):
    """expand with the h of every child by a PerTokenHead."""

    @torch.no_grad()
    def expand(nodes):
        logp, _ = expander(nodes)
        hidden = expander.hidden[[node.slot for node in nodes]][:, None].expand(-1, len(embeddings), -1)  # (n, V, D)
        return logp, value_module.soft_value(head(hidden, embeddings.expand_as(hidden)), *REWARD.bounds, BETA)

    return expand


def with_critic(expander, critic):
    """expand with the h of a Critic: it runs every node as well, and its tokens count."""
    value = evaluation.guide(critic, REWARD.bounds, BETA)
    other = astar_search.Expander(critic.model, expander.prompts, expander.span - max(map(len, expander.prompts)), value)
    twins = {None: None}  # node -> the same node with a slot in the critic's cache

    def expand(nodes):
        logp, _ = expander(nodes)
        for n in nodes:
            if n not in twins:
                twins[n] = astar_search.Node(n.problem, twins[n.parent], n.token, n.depth, 0, 0, 0, 0, 0, key=0)
        before = sum(other.spent)
        _, h = other([twins[n] for n in nodes])
        expander.spent[0] += sum(other.spent) - before
        return logp, h

    return expand


def own(expander, eos, least=0.02):
    """expand with a child's own h: the model runs every child that is likely enough, the others (and the ends, about which a head
    knows nothing) inherit.  A child that is opened later has been run already."""
    slots = {}  # (parent, token) -> slot

    def expand(nodes):
        for node in nodes:
            node.slot = slots.get((node.parent, node.token)) if node.slot is None else node.slot
        logp, inherited = expander(nodes)
        h = inherited.expand(logp.shape).clone()
        likely = [(row, token) for row, token in (logp.exp() >= least).nonzero().tolist() if token not in eos]
        parents = [nodes[row] for row, _ in likely]
        new = [astar_search.Node(p.problem, p, token, p.depth + 1, 0, 0, 0, 0, 0, key=0) for p, (_, token) in zip(parents, likely)]
        room = [i for i, node in enumerate(new) if (node.parent, node.token) not in slots]
        if room:
            _, found = expander([new[i] for i in room])
            for i, x in zip(room, found[:, 0].tolist()):
                h[likely[i]] = x
                slots[new[i].parent, new[i].token] = new[i].slot
        return logp, h

    return expand


def answer_of(problem):
    a, b = (int(x) for x in problem.prompt.rstrip("=").split("*"))
    return f"<think>{make_base.worked(a, b)}</think><answer>{a * b}</answer>"


def beam(keys, expander, options):
    """Plain beam search: the K best prefixes by log pi at every depth, all of them expanded."""
    trees = [astar_search.Tree(row, key, options) for row, key in enumerate(keys)]
    live = [[tree.root] for tree in trees]
    while any(live):
        nodes = [node for beam in live for node in beam]
        logp, _ = expander(nodes)
        logp, row = logp.double(), 0
        for tree, nodes_of in zip(trees, live):
            grown = []
            for node in nodes_of:
                for step, token in zip(*(x.tolist() for x in logp[row].topk(min(options.K, logp.shape[1])))):
                    g = node.g + step
                    grown.append(
                        astar_search.Node(node.problem, node, int(token), node.depth + 1, g, 0.0, g, g, step, key=0)
                    )
                row += 1
            nodes_of[:] = []
            for node in sorted(grown, key=lambda node: -node.g)[: options.K - len(tree.leaves)]:
                node.end(options)
                (tree.leaves if node.leaf else nodes_of).append(node)
            tree.stopped = "beam"
    return trees


def answers(rollouts, texts, verdicts, problems):
    """Shares of problems answered right without a look at the reward: by the first leaf, by a vote of the leaves, each
    with its weight, and by the leaf that the head likes best."""
    right = {"first": 0, "vote": 0, "head": 0}
    for p in range(problems):
        rows = (rollouts.problem == p).nonzero().squeeze(1).tolist()
        if not rows:
            continue
        votes = {}
        for row in rows:
            answer = reward_module.parse_answer(texts[row])
            votes[answer] = votes.get(answer, 0.0) + rollouts.weight[row].item() * (answer is not None)
        winner = max(votes, key=votes.get)
        right["first"] += verdicts[rows[0]]["correct"]
        right["vote"] += any(verdicts[row]["correct"] for row in rows if reward_module.parse_answer(texts[row]) == winner)
        last = rollouts.values[rows, rollouts.length[rows] - 2]  # V before the last token
        right["head"] += verdicts[rows[last.argmax().item()]]["correct"]
    return {name: x / problems for name, x in right.items()}


def searches(model, tokenizer, problems, heads, token_head, critic, max_new_tokens, budgets):
    """name -> a list of figures, one a budget: leaves for sampling and beam search, nodes a problem for a search."""
    prompts, eos = evaluation.encode(tokenizer, problems), policy.stop_tokens(model, tokenizer)
    keys, result = astar_search.root_keys(0, -2, range(len(problems))), {}
    unguided = evaluation.guide(heads["a fitted head"], REWARD.bounds, BETA, use_head=False)  # V for the choice at the end

    def run(name, method, budget, value=unguided, wrap=None, greedy=False, **options):
        expander = astar_search.Expander(model, prompts, max_new_tokens, value)
        options = astar_search.Options(eos, max_new_tokens=max_new_tokens, **options)
        trees = method(keys, wrap(expander) if wrap else expander, options, *([True] if greedy else []))
        rollouts = astar_search.collect(trees, expander)
        texts, verdicts = evaluation.judge(rollouts, tokenizer, problems, REWARD, max_new_tokens)
        right = {(p, text) for p, text, verdict in zip(rollouts.problem.tolist(), texts, verdicts) if verdict["correct"]}
        tokens = sum(expander.spent)
        figures = {"budget": budget, "tokens": tokens / len(problems), "found": len({p for p, _ in right}) / len(problems),
                   "distinct_per_1k": 1000 * len(right) / tokens, "leaves": len(rollouts) / len(problems)}  # fmt: skip
        figures |= answers(rollouts, texts, verdicts, len(problems))
        result.setdefault(name, []).append(figures)
        print(f"{name:32s} {budget:6d} {figures['tokens']:9.0f} {figures['found']:7.3f} {figures['distinct_per_1k']:9.2f} {figures['leaves']:7.1f}"
              f"  {figures['first']:7.3f} {figures['vote']:7.3f} {figures['head']:7.3f}", flush=True)  # fmt: skip

    print(f"\n{'':32s} budget    tokens   found  dist./1k  leaves |  first    vote    head: the answer right by")
    run("greedy", astar_search.sample, 1, K=1, greedy=True)
    for K in (1, 2, 4, 8, 16):
        run("i.i.d. sampling", astar_search.sample, K, K=K)
    for K in (2, 4, 8):
        run("beam search", beam, K, K=K)
    guides = {"h = 0": {}} | {f"h of {name}": dict(value=evaluation.guide(head, REWARD.bounds, BETA)) for name, head in heads.items()}
    first, embeddings = next(iter(heads.values())), model.get_input_embeddings().weight.detach()
    guides["a child's own h"] = dict(value=evaluation.guide(first, REWARD.bounds, BETA), wrap=lambda e: own(e, eos))
    guides["h of a per-token head"] = dict(wrap=lambda e: per_token(e, token_head, embeddings))
    guides["h of a critic of its own"] = dict(wrap=lambda e: with_critic(e, critic))
    guides |= {"oracle, inherited": dict(wrap=lambda e: oracle(e, tokenizer, problems, own=False)),
               "oracle, a child's own": dict(wrap=lambda e: oracle(e, tokenizer, problems, own=True))}  # fmt: skip
    for tau in (1.0, 0.0):
        for name, how in guides.items():
            for budget in budgets:
                run(f"{name}, tau {tau:g}", astar_search.search, budget, K=64, tau=tau, max_nodes=budget, **how)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_base")
    parser.add_argument("--digits", default="2")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--problems", type=int, default=384, help="of each half")
    parser.add_argument("--samples", type=int, default=16, help="a problem, to fit and to test the head")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 75, 100, 150, 200, 300], help="nodes a problem")
    args = parser.parse_args()
    model, tokenizer = policy.load_policy(args.model if "/" in args.model else str(ROOT / args.model))
    pairs = [data.train_problem(0, 10**6, i, args.digits, "terse") for i in range(2 * args.problems)]
    halves = pairs[: args.problems], pairs[args.problems :]
    one, two = (
        samples_of(
            model,
            tokenizer,
            half,
            args.samples,
            args.max_new_tokens,
            astar_search.root_keys(0, -3 - i, range(args.problems)),
        )
        for i, half in enumerate(halves)
    )
    head = fit(one["hidden"].shape[-1], one)
    print(
        f"{args.model}: sampled accuracy {two['right'].float().mean():.3f}, {one['mask'].sum(1).float().mean():.0f} tokens; head fitted to {len(one['right'])} samples"
    )
    positions = [t for t in (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 80) if t < args.max_new_tokens]
    critic = fit_critic(model, one)
    with torch.no_grad():
        of_critic = two | {"hidden": hidden_of(critic.model, two["rollouts"], two["columns"])}
    tables = {"a fitted head": quality(head, two, positions), "a critic of its own": quality(critic, of_critic, positions)}
    form = lambda x: "  -  " if x is None else f"{x:.2f} "
    for name, table in tables.items():
        print(f"\n{name:25s}all samples     |  within a problem\nposition  alive  right    h  log pi  |   h  log pi  best sum   expl. variance")
        for row in table:
            print(f"{row['position']:8d} {row['alive']:6d}  {row['right']:.2f}   {form(row['h'])} {form(row['log pi'])}  | "
                  + "  ".join(form(row["within"][name]) for name in ("h", "log pi", "best sum")) + f"    {form(row['explained_variance'])}")  # fmt: skip
    heads = {"a fitted head": head}
    if (pathlib.Path(args.model) / "value.safetensors").exists():
        heads["the run's head"] = value_module.ValueHead(one["hidden"].shape[-1])
        heads["the run's head"].load_state_dict(load_file(pathlib.Path(args.model) / "value.safetensors"))
    mean = two["mask"].sum(1).float().mean().item()
    token_head = fit_per_token(model.get_input_embeddings().weight.detach(), one)
    result = searches(model, tokenizer, halves[1], heads, token_head, critic, args.max_new_tokens, args.budgets)
    row = {"model": args.model, "digits": args.digits, "samples": len(one["right"]), "sampled_accuracy": two["right"].float().mean().item(),
           "length": mean, "head": tables["a fitted head"], "critic": tables["a critic of its own"], "searches": result}  # fmt: skip
    compare.write("diagnose", row)


if __name__ == "__main__":
    main()

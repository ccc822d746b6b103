"""Why does guidance pay, or not?  The head, and the search with it, at one fixed policy.

    python experiments/diagnose.py                                           # the tiny base
    python experiments/diagnose.py --model tiny_base/hard --digits 3x1-3 --max-new-tokens 128
    python experiments/diagnose.py --model runs/local/checkpoint_iter_30     # and the run's head
    python experiments/diagnose.py --problems 16 --samples 4 --budgets 50 --quick     # a trial

1. A head is fitted to i.i.d. samples of half of the problems, until its loss there stops falling.
   (6,144 samples: what three iterations of training see.)
2. On the other half: its AUC for "ends right" at positions of the completion, beside that of log pi
   of the prefix and of their best sum.  Over all samples, and within a problem: pairs of samples of
   one problem, one right and one wrong.
3. Searches of the other half with several h at several budgets: problems with a correct leaf,
   tokens, distinct correct completions.

Prints tables and appends one row with all figures to experiments/results/diagnose.jsonl.
"""

import argparse
import copy
import pathlib
import sys

import compare
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny_base")]

import make_base

import astar_search
import data
import eval as evaluation
import policy
import reward as reward_module
import value as value_module

BETA = 0.2
REWARD = reward_module.Reward()
POSITIONS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 80)


# ------------------------------------------------------------------------------------------ Samples


@torch.no_grad()
def samples_of(model, tokenizer, problems, n, max_new_tokens, keys):
    """n i.i.d. completions of each problem, one row each.

    L: tokens of the longest completion.  Returns a dict: hidden (B, L, D) before each token; g
    (B, L), log pi of the prefix; token, mask, columns (B, L); reward, right, problem (B,); and the
    rollouts.  columns are those of the rollouts' grid.
    """
    prompts = evaluation.encode_prompts(tokenizer, problems)
    expander = astar_search.Expander(model, prompts, max_new_tokens)
    options = astar_search.Options(
        policy.stop_tokens(model, tokenizer), K=n, max_new_tokens=max_new_tokens
    )
    rollouts = astar_search.collect(astar_search.sample(keys, expander, options), expander)
    _, verdicts = evaluation.judge_rollouts(rollouts, tokenizer, problems, REWARD, max_new_tokens)
    rollouts.extra["reward"] = torch.tensor([verdict["reward"] for verdict in verdicts])
    rollouts.extra["right"] = torch.tensor([verdict["correct"] for verdict in verdicts])
    rollouts = rollouts.select(torch.arange(len(rollouts)).repeat_interleave(rollouts.count))
    L = int((rollouts.length - rollouts.prompt_length).max())
    columns = (rollouts.prompt_length - 1)[:, None] + torch.arange(L)
    mask = columns < (rollouts.length - 1)[:, None]
    columns = columns.clamp(max=rollouts.tokens.shape[1] - 2)
    # log pi of the prefix before each token
    before = rollouts.log_probs.cumsum(1) - rollouts.log_probs
    return {
        "hidden": hidden_of(model, rollouts, columns),
        "g": before.gather(1, columns),
        "rollouts": rollouts,
        "columns": columns,
        "mask": mask,
        "token": rollouts.tokens[:, 1:].gather(1, columns),
        "reward": rollouts.extra["reward"],
        "right": rollouts.extra["right"],
        "problem": rollouts.problem,
    }


def hidden_of(model, rollouts, columns):
    """The model's last hidden state at columns (B, L) of each rollout: (B, L, D)."""
    parts = []
    for rows in torch.arange(len(rollouts)).split(512):
        inputs = rollouts.tokens[rows, :-1]  # padded on the right, so causal attention is enough
        parts.append(model.base_model(inputs, use_cache=False).last_hidden_state)
    hidden = torch.cat(parts)
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))


# ---------------------------------------------------------------------------------------- The heads


def descend(head, n, loss_of, steps=1500, batch=4096):
    """Adam on the mean loss_of(rows) of random batches out of n rows.  Returns the head."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        loss = loss_of(torch.randint(n, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def fit(hidden_size, samples, steps):
    """A value head fitted to samples as training does it, but to convergence."""
    torch.manual_seed(0)
    head = value_module.ValueHead(hidden_size)
    mask = samples["mask"]
    hidden = samples["hidden"][mask]
    returns = (samples["reward"][:, None] * mask)[mask]
    targets = value_module.soft_target(returns, *REWARD.bounds, BETA)

    def loss_of(rows):
        V, u_logit = head(hidden[rows])
        equal = torch.full((len(rows),), 1 / len(rows))
        loss, _ = value_module.value_loss(V, u_logit, returns[rows], targets[rows], equal)
        return loss

    return descend(head, len(returns), loss_of, steps)


class PerTokenHead(torch.nn.Module):
    """(hidden (..., D), token embedding (..., D)) -> logit of u of the prefix with that token.

    Each child has an h of its own and costs no model token.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.inner = torch.nn.Linear(2 * hidden_size, 2 * hidden_size)
        self.outer = torch.nn.Linear(2 * hidden_size, 1)

    def forward(self, hidden, embedding):
        both = torch.cat([hidden, embedding], dim=-1)
        return self.outer(F.gelu(self.inner(both))).squeeze(-1)


def fit_per_token(embeddings, samples, steps):
    """A PerTokenHead fitted to samples: it reads a prefix and the token to come."""
    torch.manual_seed(0)
    head = PerTokenHead(embeddings.shape[1])
    mask = samples["mask"]
    hidden = samples["hidden"][mask]
    tokens = samples["token"][mask]
    returns = (samples["reward"][:, None] * mask)[mask]
    targets = value_module.soft_target(returns, *REWARD.bounds, BETA)

    def loss_of(rows):
        u = torch.sigmoid(head(hidden[rows], embeddings[tokens[rows]]))
        return ((u - targets[rows]) ** 2).mean()

    return descend(head, len(targets), loss_of, steps)


class Critic(torch.nn.Module):
    """A critic of its own: a copy of the policy, all of it fitted to the samples, one output."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.outer = torch.nn.Linear(model.config.hidden_size, 1)

    def forward(self, hidden):
        """hidden (..., D) of its own model -> u, logit of u (...)."""
        u_logit = self.outer(hidden).squeeze(-1)
        return torch.sigmoid(u_logit), u_logit


def fit_critic(model, samples, epochs=6, batch=64, rate=3e-4):
    """A Critic fitted to 7/8 of the problems: the epoch with the least loss on the others."""
    torch.manual_seed(0)
    critic = Critic(model)
    rollouts = samples["rollouts"]
    targets = value_module.soft_target(samples["reward"], *REWARD.bounds, BETA)
    held_out = samples["problem"] % 8 == 0
    fitted_rows = (~held_out).nonzero().squeeze(1)
    other_rows = held_out.nonzero().squeeze(1)

    def loss_of(rows):
        part = rollouts.select(rows)
        hidden = critic.model.base_model(part.tokens[:, :-1], use_cache=False).last_hidden_state
        _, u_logit = critic(hidden)
        return F.binary_cross_entropy_with_logits(
            u_logit, targets[rows, None].expand_as(u_logit), weight=part.mask.float()
        )

    return descend_by_epochs(critic, loss_of, fitted_rows, other_rows, epochs, batch, rate)


def descend_by_epochs(critic, loss_of, fitted_rows, other_rows, epochs, batch, rate):
    """AdamW on loss_of(rows), batches of the fitted rows in a new order each epoch.

    Returns the critic as it was after the epoch with the least loss on the other rows.
    """
    optimizer = torch.optim.AdamW(critic.parameters(), lr=rate)
    best = float("inf")
    best_weights = None
    steps = epochs * (len(fitted_rows) // batch)

    def rate_scale(step):
        return 1 - step / (steps + epochs)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_scale)
    for epoch in range(epochs):
        order = fitted_rows[torch.randperm(len(fitted_rows))]
        for rows in order.split(batch)[:-1]:
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            parts = other_rows.split(512)
            loss = sum(loss_of(rows).item() for rows in parts) / len(parts)
        print(f"critic, epoch {epoch + 1}: loss on other problems {loss:.4f}", flush=True)
        if loss < best:
            best = loss
            best_weights = copy.deepcopy(critic.state_dict())
    critic.load_state_dict(best_weights)
    return critic.eval().requires_grad_(False)


# -------------------------------------------------------------------------- How good is a head's h?


def auc(score, right, problem=None):
    """The chance that a right sample has the larger score than a wrong one; ties count half.

    All (B,).  With `problem`, among pairs of samples of one problem.  None if there is no pair.
    """
    better = right[:, None] & ~right[None]
    if problem is not None:
        better &= problem[:, None] == problem[None]
    if not better.any():
        return None
    difference = (score[:, None] - score[None])[better]
    return wins(difference)


def wins(gap):
    """Share of pairs with a positive gap; ties count half."""
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


@torch.no_grad()
def quality(head, samples, positions):
    """A row a position of the completion: AUCs, and the explained variance there."""
    table = []
    V, u_logit = head(samples["hidden"])
    for t in positions:
        if t >= samples["mask"].shape[1]:
            continue
        rows = samples["mask"][:, t].nonzero().squeeze(1)[:4096]
        right = samples["right"][rows].bool()
        problem = samples["problem"][rows]
        h = u_logit[rows, t]
        g = samples["g"][rows, t]
        rewards = samples["reward"][rows]
        sums = []
        for c in (0.1, 0.3, 1.0, 3.0, 10.0):
            sums.append(auc(g + c * F.logsigmoid(h), right, problem))
        variance = rewards.var().item()
        explained = None
        if variance > 0:
            explained = 1 - (rewards - V[rows, t]).var().item() / variance
        table.append(
            {
                "position": t,
                "alive": len(rows),
                "right": right.float().mean().item(),
                "h": auc(h, right),
                "log pi": auc(g, right),
                "within": {
                    "h": auc(h, right, problem),
                    "log pi": auc(g, right, problem),
                    "best sum": max((x for x in sums if x is not None), default=None),
                },
                "explained_variance": explained,
            }
        )
    return table


def two_digits(x):
    """A number of a table, or a dash."""
    return "  -  " if x is None else f"{x:.2f} "


def print_quality(name, table):
    """The table of one head."""
    print(f"\n{name:25s}all samples     |  within a problem")
    print("position  alive  right    h  log pi  |   h  log pi  best sum   expl. variance")
    for row in table:
        within = "  ".join(two_digits(x) for x in row["within"].values())
        print(
            f"{row['position']:8d} {row['alive']:6d}  {row['right']:.2f}   "
            f"{two_digits(row['h'])} {two_digits(row['log pi'])}  | "
            f"{within}    {two_digits(row['explained_variance'])}"
        )


# ---------------------------------------------------------------- expand(nodes) with several guides


def answer_of(problem):
    """The right way of thinking and the answer, as the corpus of the tiny base writes them."""
    a, b = (int(operand) for operand in problem.prompt.rstrip("=").split("*"))
    return f"<think>{make_base.worked(a, b)}</think><answer>{a * b}</answer>"


def new_node(parent, token):
    """A child of `parent` that only the model will see; f, h, g and G mean nothing."""
    return astar_search.Node(
        problem=parent.problem, parent=parent, token=token, depth=parent.depth + 1, f=0.0
    )


def oracle(expander, tokenizer, problems, own):
    """expand with the exact 'no mistake yet' as h: 0 for a prefix of the right work, else -30 nats.

    own: each child by itself; else a child inherits what is known of its parent, as from the head.
    """
    ways = []
    for problem in problems:
        ways.append(tokenizer(answer_of(problem))["input_ids"] + [tokenizer.eos_token_id])

    def expand(nodes):
        log_probs, _ = expander(nodes)
        h = torch.full(log_probs.shape, -30.0)
        for row, node in enumerate(nodes):
            path = node.tokens()
            way = ways[node.problem]
            if path != way[: len(path)]:
                continue
            if not own:
                h[row] = 0.0
            elif len(path) < len(way):
                h[row, way[len(path)]] = 0.0
        return log_probs, h

    return expand


def per_token(expander, head, embeddings):
    """expand with the h of every child by a PerTokenHead."""

    @torch.no_grad()
    def expand(nodes):
        log_probs, _ = expander(nodes)
        slots = [node.slot for node in nodes]
        hidden = expander.hidden[slots][:, None].expand(-1, len(embeddings), -1)  # (n, V, D)
        u_logit = head(hidden, embeddings.expand_as(hidden))
        return log_probs, value_module.soft_value(u_logit, *REWARD.bounds, BETA)

    return expand


def with_critic(expander, critic):
    """expand with the h of a Critic: it runs every node as well, and its tokens count."""
    value_function = evaluation.value_function(critic, REWARD.bounds, BETA)
    longest = max(len(prompt) for prompt in expander.prompts)
    critic_expander = astar_search.Expander(
        critic.model, expander.prompts, expander.span - longest, value_function
    )
    twins = {None: None}  # node -> the same node with a slot in the critic's cache

    def expand(nodes):
        log_probs, _ = expander(nodes)
        for node in nodes:
            if node not in twins:
                twins[node] = astar_search.Node(
                    problem=node.problem,
                    parent=twins[node.parent],
                    token=node.token,
                    depth=node.depth,
                    f=0.0,
                )
        before = sum(critic_expander.spent)
        _, h = critic_expander([twins[node] for node in nodes])
        expander.spent[0] += sum(critic_expander.spent) - before
        return log_probs, h

    return expand


def own_h(expander, eos, least=0.02):
    """expand with a child's own h: the model runs every child that is likely enough.

    The others inherit, and so do the ends, about which a head knows nothing.  A child that is
    opened later has been run already.
    """
    slots = {}  # (parent, token) -> slot

    def expand(nodes):
        for node in nodes:
            if node.slot is None:
                node.slot = slots.get((node.parent, node.token))
        log_probs, inherited = expander(nodes)
        h = inherited.expand(log_probs.shape).clone()
        places = []  # (row, token) of each child to be run
        children = []
        for row, token in (log_probs.exp() >= least).nonzero().tolist():
            if token not in eos and (nodes[row], token) not in slots:
                places.append((row, token))
                children.append(new_node(nodes[row], token))
        if children:
            _, found = expander(children)
            for place, child, x in zip(places, children, found[:, 0].tolist()):
                h[place] = x
                slots[child.parent, child.token] = child.slot
        return log_probs, h

    return expand


def beam(keys, expander, options):
    """Plain beam search: the K best prefixes by log pi at every depth, all of them expanded."""
    trees = [astar_search.Tree(row, key, options) for row, key in enumerate(keys)]
    beams = [[tree.root] for tree in trees]
    while any(beams):
        nodes = [node for nodes in beams for node in nodes]
        log_probs, _ = expander(nodes)
        log_probs = log_probs.double()
        row = 0
        for i, tree in enumerate(trees):
            grown = []
            for node in beams[i]:
                best = log_probs[row].topk(min(options.K, log_probs.shape[1]))
                for log_prob, token in zip(best.values.tolist(), best.indices.tolist()):
                    grown.append(astar_search.sampled_node(node, token, log_prob, options))
                row += 1
            grown.sort(key=lambda node: -node.g)
            beams[i] = []
            for node in grown[: options.K - len(tree.leaves)]:
                node.count = 1
                if node.is_leaf:
                    tree.leaves.append(node)
                else:
                    beams[i].append(node)
            tree.stopped = "beam"
    return trees


# ------------------------------------------------------------------------------------- The searches


def answers(rollouts, texts, verdicts, problems):
    """Shares of problems answered right without a look at the reward, by three rules.

    The first leaf; a vote of the leaves, each with its weight; the leaf that the head likes best.
    """
    right = {"first": 0, "vote": 0, "head": 0}
    for p in range(problems):
        rows = (rollouts.problem == p).nonzero().squeeze(1).tolist()
        if not rows:
            continue
        said = {row: reward_module.parse_answer(texts[row]) for row in rows}
        votes = {}
        for row in rows:
            vote = rollouts.weight[row].item() * (said[row] is not None)
            votes[said[row]] = votes.get(said[row], 0.0) + vote
        winner = max(votes, key=votes.get)
        last_values = rollouts.values[rows, rollouts.length[rows] - 2]  # V before the last token
        liked = rows[last_values.argmax().item()]
        right["first"] += verdicts[rows[0]]["correct"]
        right["vote"] += any(verdicts[row]["correct"] for row in rows if said[row] == winner)
        right["head"] += verdicts[liked]["correct"]
    return {name: x / problems for name, x in right.items()}


class Trial:
    """The problems that all methods are tried on, and the figures that each has reached."""

    def __init__(self, model, tokenizer, problems, max_new_tokens, head):
        self.model = model
        self.tokenizer = tokenizer
        self.problems = problems
        self.prompts = evaluation.encode_prompts(tokenizer, problems)
        self.eos = policy.stop_tokens(model, tokenizer)
        self.keys = astar_search.root_keys(0, -2, range(len(problems)))
        self.max_new_tokens = max_new_tokens
        # h = 0, but V is there for the choice among the leaves at the end.
        self.unguided = evaluation.value_function(head, REWARD.bounds, BETA, use_head=False)
        self.result = {}  # name -> figures, one a budget

    def expander(self, value_function=None):
        """A new expander, by default with h = 0."""
        return astar_search.Expander(
            self.model, self.prompts, self.max_new_tokens, value_function or self.unguided
        )

    def options(self, **options):
        """Options of a search or of sampling."""
        return astar_search.Options(self.eos, max_new_tokens=self.max_new_tokens, **options)

    def add(self, name, budget, trees, expander):
        """Count what the trees of a method hold, keep it and print it."""
        rollouts = astar_search.collect(trees, expander)
        texts, verdicts = evaluation.judge_rollouts(
            rollouts, self.tokenizer, self.problems, REWARD, self.max_new_tokens
        )
        right = set()
        for p, text, verdict in zip(rollouts.problem.tolist(), texts, verdicts):
            if verdict["correct"]:
                right.add((p, text))
        N = len(self.problems)
        tokens = sum(expander.spent)
        figures = {
            "budget": budget,
            "tokens": tokens / N,
            "found": len({p for p, _ in right}) / N,
            "distinct_per_1k": 1000 * len(right) / tokens,
            "leaves": len(rollouts) / N,
            **answers(rollouts, texts, verdicts, N),
        }
        self.result.setdefault(name, []).append(figures)
        print(
            f"{name:32s} {budget:6d} {figures['tokens']:9.0f} {figures['found']:7.3f} "
            f"{figures['distinct_per_1k']:9.2f} {figures['leaves']:7.1f}  "
            f"{figures['first']:7.3f} {figures['vote']:7.3f} {figures['head']:7.3f}",
            flush=True,
        )


def guides_of(trial, heads, token_head, critic):
    """name -> (value function or None, wrap(expander) or None): what gives the search its h."""
    embeddings = trial.model.get_input_embeddings().weight.detach()

    def of_children(expander):
        return own_h(expander, trial.eos)

    def of_token_head(expander):
        return per_token(expander, token_head, embeddings)

    def of_critic(expander):
        return with_critic(expander, critic)

    def of_oracle(expander):
        return oracle(expander, trial.tokenizer, trial.problems, own=False)

    def of_oracle_of_children(expander):
        return oracle(expander, trial.tokenizer, trial.problems, own=True)

    guides = {"h = 0": (None, None)}
    for name, head in heads.items():
        value_function = evaluation.value_function(head, REWARD.bounds, BETA)
        guides[f"h of {name}"] = (value_function, None)
    fitted = evaluation.value_function(heads["a fitted head"], REWARD.bounds, BETA)
    guides["a child's own h"] = (fitted, of_children)
    guides["h of a per-token head"] = (None, of_token_head)
    guides["h of a critic of its own"] = (None, of_critic)
    guides["oracle, inherited"] = (None, of_oracle)
    guides["oracle, a child's own"] = (None, of_oracle_of_children)
    return guides


def run_all(trial, guides, budgets):
    """Every method at every budget: leaves for sampling and beam search, nodes for a search.

    Returns name -> a list of figures, one a budget.
    """
    print(
        f"\n{'':32s} budget    tokens   found  dist./1k  leaves |"
        "  first    vote    head: the answer right by"
    )
    expander = trial.expander()
    trees = astar_search.sample(trial.keys, expander, trial.options(K=1), greedy=True)
    trial.add("greedy", 1, trees, expander)
    for K in (1, 2, 4, 8, 16):
        expander = trial.expander()
        trees = astar_search.sample(trial.keys, expander, trial.options(K=K))
        trial.add("i.i.d. sampling", K, trees, expander)
    for K in (2, 4, 8):
        expander = trial.expander()
        trial.add("beam search", K, beam(trial.keys, expander, trial.options(K=K)), expander)
    for tau in (1.0, 0.0):
        for name, (value_function, wrap) in guides.items():
            for budget in budgets:
                expander = trial.expander(value_function)
                expand = expander if wrap is None else wrap(expander)
                options = trial.options(K=64, tau=tau, max_nodes=budget)
                trees = astar_search.search(trial.keys, expand, options)
                trial.add(f"{name}, tau {tau:g}", budget, trees, expander)
    return trial.result


# ------------------------------------------------------------------------------------- Command line


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny_base")
    parser.add_argument("--digits", default="2")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--problems", type=int, default=384, help="of each half")
    parser.add_argument(
        "--samples", type=int, default=16, help="a problem, to fit and to test the head"
    )
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[50, 75, 100, 150, 200, 300],
        help="nodes a problem",
    )
    parser.add_argument("--quick", action="store_true", help="50 steps for each head, not 1,500")
    return parser.parse_args()


def main():
    args = parse_arguments()
    folder = args.model if "/" in args.model else str(ROOT / args.model)
    model, tokenizer = policy.load_policy(folder)
    steps = 50 if args.quick else 1500
    problems = []
    for i in range(2 * args.problems):
        problems.append(data.train_problem(0, 10**6, i, args.digits, "terse"))
    halves = (problems[: args.problems], problems[args.problems :])
    samples = []
    for i, half in enumerate(halves):
        keys = astar_search.root_keys(0, -3 - i, range(args.problems))
        samples.append(samples_of(model, tokenizer, half, args.samples, args.max_new_tokens, keys))
    one, two = samples

    hidden_size = one["hidden"].shape[-1]
    head = fit(hidden_size, one, steps)
    accuracy = two["right"].float().mean().item()
    length = two["mask"].sum(1).float().mean().item()
    print(
        f"{args.model}: sampled accuracy {accuracy:.3f}, {length:.0f} tokens; "
        f"head fitted to {len(one['right'])} samples"
    )
    positions = [t for t in POSITIONS if t < args.max_new_tokens]
    critic = fit_critic(model, one)
    with torch.no_grad():
        hidden = hidden_of(critic.model, two["rollouts"], two["columns"])
    tables = {
        "a fitted head": quality(head, two, positions),
        "a critic of its own": quality(critic, two | {"hidden": hidden}, positions),
    }
    for name, table in tables.items():
        print_quality(name, table)

    heads = {"a fitted head": head}
    weights = pathlib.Path(folder) / "value.safetensors"
    if weights.exists():
        heads["the run's head"] = value_module.ValueHead(hidden_size)
        heads["the run's head"].load_state_dict(load_file(weights))
    embeddings = model.get_input_embeddings().weight.detach()
    token_head = fit_per_token(embeddings, one, steps)
    trial = Trial(model, tokenizer, halves[1], args.max_new_tokens, head)
    searches = run_all(trial, guides_of(trial, heads, token_head, critic), args.budgets)
    row = {
        "model": args.model,
        "digits": args.digits,
        "samples": len(one["right"]),
        "sampled_accuracy": accuracy,
        "length": length,
        "head": tables["a fitted head"],
        "critic": tables["a critic of its own"],
        "searches": searches,
    }
    compare.write("diagnose", row)


if __name__ == "__main__":
    main()
